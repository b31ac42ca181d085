"""The small trained model in the package. README.md in this folder is its model card."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..modeling import MplugOwl2ForConditionalGeneration
    from ..processing import MplugOwl2Processor


def default_dir() -> Path:
    """Return the folder of the model in the package, for `from_pretrained`."""
    return Path(__file__).parent


def default_pictures() -> dict[str, Path]:
    """Return name -> file of the example images. The model was not trained on them."""
    return {path.stem: path for path in sorted((default_dir() / "pictures").glob("*.png"))}


def load_default(**kwargs: Any) -> tuple[MplugOwl2ForConditionalGeneration, MplugOwl2Processor]:
    """Load the model in the package, in evaluation mode, and its processor.

    Args:
        kwargs: Arguments of the model's `from_pretrained`, for example `dtype`.
    """
    from ..modeling import MplugOwl2ForConditionalGeneration
    from ..processing import MplugOwl2Processor

    model = MplugOwl2ForConditionalGeneration.from_pretrained(default_dir(), **kwargs)
    return model.eval(), MplugOwl2Processor.from_pretrained(default_dir())
