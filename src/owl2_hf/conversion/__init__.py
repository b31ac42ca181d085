"""Convert checkpoints from and to the original format, and make new models from pretrained ones."""

from .convert import convert
from .initialize import InitReport, initialize
from .layouts import open_source
from .lora import load_non_lora
from .reading import ConversionError
from .report import ConversionReport
from .verify import verify

__all__ = [
    "ConversionError",
    "ConversionReport",
    "InitReport",
    "convert",
    "initialize",
    "load_non_lora",
    "open_source",
    "verify",
]
