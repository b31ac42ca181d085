"""The small scorer inside the package; its card is README.md in this folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..scoring import Scorer


def default_scorer_dir() -> Path:
    """Folder of the bundled scorer, as `from_pretrained` takes it."""
    return Path(__file__).parent


def default_scorer_images() -> dict[str, Path]:
    """Name -> file of the images that come with the scorer; it was trained on none of them."""
    return {path.stem: path for path in sorted((default_scorer_dir() / "images").glob("*.png"))}


def load_default_scorer(**kwargs: Any) -> Scorer:
    """The bundled scorer, which knows its prompt and its levels.

    It learned simulated opinions of degraded images, no people's: see its card for what its scores are worth.

    Args:
        kwargs: As `Scorer` takes them, for instance `batch_size` or `crops`.
    """
    from ..modeling import MplugOwl2ForConditionalGeneration
    from ..processing import MplugOwl2Processor
    from ..scoring import Scorer
    from ..scoring.presets import preset_for

    folder = str(default_scorer_dir())
    model = MplugOwl2ForConditionalGeneration.from_pretrained(folder).eval()
    processor = MplugOwl2Processor.from_pretrained(folder)
    return Scorer(model, processor, preset_for(folder), **kwargs)
