"""Score images and videos, train scorers on people's opinions, and evaluate them."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .frames import expand_paths
from .metrics import Metric, create_metric
from .paths import score_each, score_paths
from .presets import IMAGE_TOKEN, PRESETS, Preset, custom_preset
from .rewards import reward
from .scorer import Score, Scorer, crop_boxes, level_id

if TYPE_CHECKING:
    from .judging import evaluate
    from .opinions import load_opinions

_token_id = level_id  # its old name
# Imported on first use: they import training, which imports the names above.
_LATER = {"evaluate": "judging", "load_opinions": "opinions"}

__all__ = [
    "IMAGE_TOKEN",
    "PRESETS",
    "Metric",
    "Preset",
    "Score",
    "Scorer",
    "create_metric",
    "crop_boxes",
    "custom_preset",
    "evaluate",
    "expand_paths",
    "level_id",
    "load_opinions",
    "reward",
    "score_each",
    "score_paths",
]


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_LATER[name]}", __name__), name)
