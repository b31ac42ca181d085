"""The small scorer in the package. README.md in this folder is its model card."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..scoring import Scorer


def default_scorer_dir() -> Path:
    """Return the folder of the scorer in the package, for `from_pretrained`."""
    return Path(__file__).parent


def default_scorer_images() -> dict[str, Path]:
    """Return name -> file of the example images. The scorer was not trained on them."""
    return {path.stem: path for path in sorted((default_scorer_dir() / "images").glob("*.png"))}


def load_default_scorer(**kwargs: Any) -> Scorer:
    """Load the scorer in the package, with its prompt and levels.

    It was trained on simulated opinions of degraded images, not on people's opinions. Its model
    card reports how accurate its scores are.

    Args:
        kwargs: Arguments of `Scorer`, for example `batch_size` or `crops`.
    """
    from ..modeling import MplugOwl2ForConditionalGeneration
    from ..processing import MplugOwl2Processor
    from ..scoring import Scorer

    folder = str(default_scorer_dir())
    model = MplugOwl2ForConditionalGeneration.from_pretrained(folder).eval()
    processor = MplugOwl2Processor.from_pretrained(folder)
    return Scorer(model, processor, **kwargs)  # Scorer reads scorer.json in this folder
