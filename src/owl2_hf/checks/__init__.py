"""`owl2_hf.check()` and `owl2-hf check`: does the model compute what it should on this machine?"""

from .report import Check, Report
from .run import check

__all__ = ["Check", "Report", "check"]
