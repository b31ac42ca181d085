"""mPLUG-Owl2 and its family for Hugging Face transformers.

After importing the package `AutoModel*.from_pretrained`, `AutoProcessor.from_pretrained` and
`pipeline("image-text-to-text")` load the model without remote code. `import owl2_hf` imports
neither torch nor transformers: the names below are imported at first use. registration.py registers
the classes with the Auto classes.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from .default import default_pictures, load_default
from .default_scorer import default_scorer_images, load_default_scorer
from .registration import register_when_looked_up

if TYPE_CHECKING:
    from .checks import check
    from .modeling import (
        MplugDocOwlConfig,
        MplugOwl2AbstractorConfig,
        MplugOwl2Config,
        MplugOwl2ForConditionalGeneration,
        MplugOwl2ForSequenceClassification,
        MplugOwl2HReducer,
        MplugOwl2HReducerConfig,
        MplugOwl2Model,
        MplugOwl2PreTrainedModel,
        MplugOwl2TextConfig,
        MplugOwl2TextModel,
        MplugOwl2VisionConfig,
        MplugOwl2VisionModel,
        MplugOwl2VisualAbstractor,
        MplugOwl21Config,
    )
    from .processing import MplugOwl2ImageProcessor, MplugOwl2Processor

__version__ = "0.1.0"

__all__ = [
    "MplugDocOwlConfig",
    "MplugOwl2AbstractorConfig",
    "MplugOwl2Config",
    "MplugOwl2ForConditionalGeneration",
    "MplugOwl2ForSequenceClassification",
    "MplugOwl2HReducer",
    "MplugOwl2HReducerConfig",
    "MplugOwl2ImageProcessor",
    "MplugOwl2Model",
    "MplugOwl2PreTrainedModel",
    "MplugOwl2Processor",
    "MplugOwl2TextConfig",
    "MplugOwl2TextModel",
    "MplugOwl2VisionConfig",
    "MplugOwl2VisionModel",
    "MplugOwl2VisualAbstractor",
    "MplugOwl21Config",
    "check",
    "default_pictures",
    "default_scorer_images",
    "load_default",
    "load_default_scorer",
]

if not TYPE_CHECKING:  # so type checkers know only the names above

    def __getattr__(name):
        if name in ("modeling", "processing"):
            return import_module(f".{name}", __name__)
        if name == "check":
            return import_module(".checks", __name__).check
        if name in __all__:
            return getattr(
                import_module(
                    ".processing" if name.endswith("Processor") else ".modeling", __name__
                ),
                name,
            )
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__():
        return sorted({*globals(), *__all__, "modeling", "processing"})


register_when_looked_up()
