"""Checkpoints of the original, in and out."""

from .convert import ConversionError, ConversionReport, convert

__all__ = ["ConversionError", "ConversionReport", "convert"]
