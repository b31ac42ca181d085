"""Deprecated: the names of `owl2_hf.scoring.comparison` that version 0.1.0 had here."""

from .deprecation import warn_deprecated
from .scoring.comparison import COMPARE2SCORE, Comparator, numbered_images, thurstone_map

__all__ = ["COMPARE2SCORE", "Comparator", "numbered_images", "thurstone_map"]

warn_deprecated(
    "owl2_hf.comparison", since="0.2.0", removed_in="0.4.0", instead="owl2_hf.scoring.comparison"
)
