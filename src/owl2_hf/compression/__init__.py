"""Models with rounded weights: smaller folders, and what they lose."""

from .losses import QUESTIONS, Losses
from .rounding import QuantizeReport, quantize

__all__ = ["QUESTIONS", "Losses", "QuantizeReport", "quantize"]
