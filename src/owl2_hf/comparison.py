"""Comparisons of images, from `owl2_hf.scoring.comparison`, under their first name."""

from .scoring.comparison import COMPARE2SCORE, Comparator, numbered_images, thurstone_map

__all__ = ["COMPARE2SCORE", "Comparator", "numbered_images", "thurstone_map"]
