"""Presets: the prompt, level words and level values of each scorer of the family.

The part that a model needs to score without this package is in
`owl2_hf.modeling.presets_mplug_owl2`.
"""

from collections.abc import Sequence
from dataclasses import replace

from ..modeling.presets_mplug_owl2 import (
    IMAGE_TOKEN,
    PRESET_FILE,
    PRESETS,
    Preset,
    load_preset,
)
from ..modeling.scoring_mplug_owl2 import own_preset

__all__ = [
    "IMAGE_TOKEN",
    "PRESETS",
    "PRESET_FILE",
    "Preset",
    "custom_preset",
    "load_preset",
    "own_preset",
    "preset_for",
]


def preset_for(model: str, name: str | None = None) -> Preset:
    """Return the named preset. Default: the model's own preset, otherwise OneAlign's.

    Args:
        model: Folder or Hub id.
    """
    own = load_preset(model) if name is None else None
    return own or custom_preset(name or "one-align")


def custom_preset(
    name: str | Preset,
    task: str = "quality",
    prompt: str | None = None,
    levels: Sequence[str] | None = None,
) -> Preset:
    """Return a copy of a preset with your own prompt or levels.

    The values of your own levels are evenly spaced.

    Args:
        name: Name of the preset to change, or the preset itself.

    Raises:
        ValueError: If there is no preset of that name.
    """
    if isinstance(name, str) and name not in PRESETS:
        raise ValueError(f"expected a preset of {', '.join(PRESETS)}, got {name!r}.")
    preset = PRESETS[name] if isinstance(name, str) else name
    if levels is not None:
        words = tuple(word.strip() for word in levels)
        steps = max(len(words) - 1, 1)
        preset = replace(
            preset, levels=words, values=tuple(1 - index / steps for index in range(len(words)))
        )
    return (
        preset if prompt is None else replace(preset, prompts={task: prompt.replace("\\n", "\n")})
    )
