"""`owl2_hf.check()` and `owl2-hf check`: test that a model computes correct results here."""

from .report import Check, Report
from .run import check

__all__ = ["Check", "Report", "check"]
