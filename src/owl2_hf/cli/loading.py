"""Models by the names that a user gives."""

from typing import Any

from ..naming import DEFAULT_MODEL, naming_model


def load(model: str | None) -> tuple[Any, Any]:
    """A model and its processor."""
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from transformers.utils import logging

    if model in (None, DEFAULT_MODEL):
        from ..default import load_default

        logging.disable_progress_bar()  # it takes no time
        return load_default()
    with naming_model(model):
        return AutoModelForImageTextToText.from_pretrained(model), AutoProcessor.from_pretrained(
            model
        )


def load_processor(model: str) -> Any:
    from transformers import AutoProcessor

    with naming_model(model):
        return AutoProcessor.from_pretrained(place(model))


def place(model: str | None) -> str:
    """What `from_pretrained` takes for a model's name."""
    from ..default import default_dir

    return str(default_dir()) if model in (None, DEFAULT_MODEL) else str(model)
