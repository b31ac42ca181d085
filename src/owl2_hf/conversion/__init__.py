"""Checkpoints of the original, in and out."""

from .convert import ConversionReport, convert, open_source
from .reading import ConversionError

__all__ = ["ConversionError", "ConversionReport", "convert", "open_source"]
