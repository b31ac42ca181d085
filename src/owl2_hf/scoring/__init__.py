"""Scores of images and videos: by level words, by comparison, and how people's opinions of them are learned and met."""

from .paths import expand_paths, score_each, score_paths
from .presets import IMAGE_TOKEN, PRESETS, Preset, custom_preset
from .scorer import Score, Scorer, crop_boxes
from .scorer import _token_id as _token_id

__all__ = [
    "IMAGE_TOKEN",
    "PRESETS",
    "Preset",
    "Score",
    "Scorer",
    "crop_boxes",
    "custom_preset",
    "expand_paths",
    "score_each",
    "score_paths",
]
