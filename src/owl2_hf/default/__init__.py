"""The small trained model inside the package; its card is README.md in this folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..modeling import MplugOwl2ForConditionalGeneration
    from ..processing import MplugOwl2Processor


def default_dir() -> Path:
    """Folder of the embedded model, as `from_pretrained` takes it."""
    return Path(__file__).parent


def default_pictures() -> dict[str, Path]:
    """Name -> file of the images that come with the model; it was trained on none of them."""
    return {path.stem: path for path in sorted((default_dir() / "pictures").glob("*.png"))}


def load_default(**kwargs: Any) -> tuple[MplugOwl2ForConditionalGeneration, MplugOwl2Processor]:
    """The embedded model, in evaluation mode, and its processor.

    Args:
        kwargs: As `from_pretrained` of the model takes them, for instance `dtype`.
    """
    from ..modeling import MplugOwl2ForConditionalGeneration
    from ..processing import MplugOwl2Processor

    model = MplugOwl2ForConditionalGeneration.from_pretrained(default_dir(), **kwargs)
    return model.eval(), MplugOwl2Processor.from_pretrained(default_dir())
