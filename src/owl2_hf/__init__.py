"""mPLUG-Owl2 and its family on the Hugging Face stack.

Importing the package registers its classes with transformers' Auto classes, so that `AutoModel*.from_pretrained`,
`AutoProcessor.from_pretrained` and `pipeline("image-text-to-text")` know the model without remote code.
"""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from .default import default_pictures, load_default
from .modeling import (
    MplugDocOwlConfig,
    MplugOwl2AbstractorConfig,
    MplugOwl2Config,
    MplugOwl2ForConditionalGeneration,
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

AutoConfig.register("mplug_owl2", MplugOwl2Config, exist_ok=True)
# The originals' names of other members; what they read is an MplugOwl2Config, which finds the classes below.
AutoConfig.register("mplug_owl2_1", MplugOwl21Config, exist_ok=True)
AutoConfig.register("mplug_docowl", MplugDocOwlConfig, exist_ok=True)
AutoModel.register(MplugOwl2Config, MplugOwl2Model, exist_ok=True)
for _auto_class in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    _auto_class.register(MplugOwl2Config, MplugOwl2ForConditionalGeneration, exist_ok=True)
AutoImageProcessor.register(MplugOwl2Config, image_processor_classes={"pil": MplugOwl2ImageProcessor}, exist_ok=True)
AutoProcessor.register(MplugOwl2Config, MplugOwl2Processor, exist_ok=True)

__all__ = [
    "MplugDocOwlConfig",
    "MplugOwl2AbstractorConfig",
    "MplugOwl2Config",
    "MplugOwl2ForConditionalGeneration",
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
    "default_pictures",
    "load_default",
]
