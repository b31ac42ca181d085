"""Images and prompts; the same files travel to the Hub as remote code."""

from ..registration import register
from .image_processing_mplug_owl2 import MplugOwl2ImageProcessor
from .processing_mplug_owl2 import MplugOwl2Processor

__all__ = ["MplugOwl2ImageProcessor", "MplugOwl2Processor"]

register()
