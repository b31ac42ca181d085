"""Load models by the names that a user gives."""

from typing import TYPE_CHECKING

from ..naming import DEFAULT_MODEL, naming_model
from ..naming import place as place_of

if TYPE_CHECKING:  # torch and transformers take seconds to import
    from ..modeling.modeling_mplug_owl2 import MplugOwl2ForConditionalGeneration
    from ..modeling.presets_mplug_owl2 import Preset
    from ..processing.processing_mplug_owl2 import MplugOwl2Processor


def load(
    model: str | None, device: str | None = None
) -> "tuple[MplugOwl2ForConditionalGeneration, MplugOwl2Processor]":
    """Load a model, to a device if one is given, and its processor."""
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from transformers.utils import logging

    model = DEFAULT_MODEL if model is None else model
    source = place_of(model)
    if source != model:
        logging.disable_progress_bar()  # a model inside the package takes no time
    with naming_model(model):
        loaded = AutoModelForImageTextToText.from_pretrained(source)
        processor = AutoProcessor.from_pretrained(source)
    return (loaded.to(device) if device else loaded), processor


def load_processor(model: str) -> "MplugOwl2Processor":
    from transformers import AutoProcessor

    with naming_model(model):
        return AutoProcessor.from_pretrained(place(model))


def place(model: str | None) -> str:
    """Return the folder or Hub id of a model's name, for `from_pretrained`."""
    return place_of(DEFAULT_MODEL if model is None else model)


def preset_of(
    model: str, name: str | None, task: str, prompt: str | None, levels: str | None
) -> "Preset":
    """Return the preset of a model's name, changed by the options of a command.

    Args:
        name, task, prompt, levels: The options; levels are separated by commas.
    """
    from ..scoring.presets import custom_preset, preset_for

    with naming_model(model):
        own = preset_for(place(model), name)
    return custom_preset(own, task, prompt, levels.split(",") if levels else None)
