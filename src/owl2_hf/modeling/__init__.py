"""Configuration and model. The same files are uploaded to the Hub as remote code."""

from ..registration import register
from .configuration_mplug_owl2 import (
    MplugDocOwlConfig,
    MplugOwl2AbstractorConfig,
    MplugOwl2Config,
    MplugOwl2HReducerConfig,
    MplugOwl2TextConfig,
    MplugOwl2VisionConfig,
    MplugOwl21Config,
)
from .modeling_mplug_owl2 import (
    MplugOwl2ForConditionalGeneration,
    MplugOwl2Model,
    MplugOwl2PreTrainedModel,
)
from .modeling_mplug_owl2_abstractor import MplugOwl2VisualAbstractor
from .modeling_mplug_owl2_classification import MplugOwl2ForSequenceClassification
from .modeling_mplug_owl2_h_reducer import MplugOwl2HReducer
from .modeling_mplug_owl2_text import MplugOwl2TextModel
from .modeling_mplug_owl2_vision import MplugOwl2VisionModel

__all__ = [
    "MplugDocOwlConfig",
    "MplugOwl2AbstractorConfig",
    "MplugOwl2Config",
    "MplugOwl2ForConditionalGeneration",
    "MplugOwl2ForSequenceClassification",
    "MplugOwl2HReducer",
    "MplugOwl2HReducerConfig",
    "MplugOwl2Model",
    "MplugOwl2PreTrainedModel",
    "MplugOwl2TextConfig",
    "MplugOwl2TextModel",
    "MplugOwl2VisionConfig",
    "MplugOwl2VisionModel",
    "MplugOwl2VisualAbstractor",
    "MplugOwl21Config",
]

register()
