"""Images and prompts. The same files are uploaded to the Hub as remote code."""

from ..registration import register
from .image_processing_mplug_owl2 import MplugOwl2ImageProcessor
from .processing_mplug_owl2 import MplugOwl2Processor

__all__ = ["MplugOwl2ImageProcessor", "MplugOwl2Processor"]

register()
