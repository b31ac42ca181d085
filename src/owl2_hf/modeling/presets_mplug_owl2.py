"""Presets of scorers (prompt, level words, values), stored in scorer.json beside the weights.

Sources: Q-Align (arXiv:2312.17090), Q-Instruct (arXiv:2311.06783), DeQA-Score (arXiv:2501.11561),
and their released code.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

IMAGE_TOKEN = "<|image|>"
# The file is in the folder of a scorer's weights.
PRESET_FILE = "scorer.json"
# All files that say how a model scores: ours, and those of transformers' pipeline("decision").
SCORER_FILES = (PRESET_FILE, "decision.json", "decision_template.jinja")
_ALIGN_PROMPT = (
    "USER: How would you rate the {aspect} of this {medium}?\n{image}\n"
    "ASSISTANT: The {aspect} of the {medium} is"
)
_ALIGN_LEVELS = ("excellent", "good", "fair", "poor", "bad")
_ALIGN_VALUES = (1.0, 0.75, 0.5, 0.25, 0.0)


@dataclass(frozen=True)
class Preset:
    """The settings that a model scores with.

    Args:
        prompts: Task -> prompt, with `<|image|>` where the image or the frames of a video go.
        levels: Level words, best first. A level may be a group of words with the same meaning,
            whose logits are averaged.
        values: Value of each level, from 0 to 1.
        image_aspect_ratio: How an image is made square; see `MplugOwl2ImageProcessor`.
        scale: Lowest and highest score.
        temperature: Number that the logits are divided by.
        images_per_prompt: Number of images in the prompt. The frames of a video count as one image.
    """

    prompts: dict[str, str]
    levels: tuple[str | tuple[str, ...], ...] = _ALIGN_LEVELS
    values: tuple[float, ...] = _ALIGN_VALUES
    image_aspect_ratio: str = "pad"
    scale: tuple[float, float] = (1.0, 5.0)
    temperature: float = 1.0
    images_per_prompt: int = 1

    def __post_init__(self) -> None:
        if len(self.levels) != len(self.values) or len(self.levels) < 2:
            raise ValueError(
                f"expected a value for each of two or more levels, got {self.levels} and "
                f"{self.values}."
            )
        for task, prompt in self.prompts.items():
            if prompt.count(IMAGE_TOKEN) != self.images_per_prompt:
                times = "once" if self.images_per_prompt == 1 else f"{self.images_per_prompt} times"
                raise ValueError(
                    f"the prompt of task {task!r} must contain {IMAGE_TOKEN} {times}, got "
                    f"{prompt!r}."
                )

    def task_named(self, task: str) -> str:
        """Return a task's name here. "aesthetic", pyiqa's word, means "aesthetics"."""
        is_pyiqas = task == "aesthetic" and task not in self.prompts
        return "aesthetics" if is_pyiqas else task

    def to_json(self) -> str:
        """Return the preset as JSON, for a file that `load_preset` reads."""
        return json.dumps(asdict(self), indent=2) + "\n"


def _align(aspect: str, medium: str) -> str:
    return _ALIGN_PROMPT.format(aspect=aspect, medium=medium, image=IMAGE_TOKEN)


_Q_INSTRUCT_PROMPT = f"USER: {IMAGE_TOKEN}Rate the quality of the image.\nASSISTANT: "
PRESETS: dict[str, Preset] = {
    # Upstream: Q-Align's repository asks for "the image of the quality"; its model on the Hub, like
    # this, does not.
    "one-align": Preset(
        {
            "quality": _align("quality", "image"),
            "aesthetics": _align("aesthetics", "image"),
            "video": _align("quality", "video"),
        }
    ),
    "deqa": Preset({"quality": _align("quality", "image")}),
    "q-instruct": Preset(
        {"quality": _Q_INSTRUCT_PROMPT},
        ("good", "average", "poor"),
        (1.0, 0.5, 0.0),
        "crop",
        scale=(0.0, 1.0),
    ),
    "q-instruct-boost": Preset(
        {"quality": _Q_INSTRUCT_PROMPT},
        (("good", "high", "fine"), ("average", "medium", "acceptable"), ("poor", "low", "bad")),
        (1.0, 0.5, 0.0),
        "crop",
        scale=(0.0, 1.0),
    ),
}


def load_preset(model: str, **hub: Any) -> Preset | None:
    """Load the preset beside a model's weights. Return `None` if there is none.

    Args:
        model: Folder or Hub id.
        hub: Arguments of `cached_file`, for example `revision`.

    Raises:
        ValueError: If the file is damaged.
    """
    found = cached_file(
        model,
        PRESET_FILE,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
        **hub,
    )
    return None if found is None else read_preset(found)


def read_preset(file: str | Path) -> Preset:
    """Read a preset from a file.

    Raises:
        ValueError: If the file is damaged.
    """
    try:
        values = json.loads(Path(file).read_text(encoding="utf-8"))
        levels = tuple(
            level if isinstance(level, str) else tuple(level) for level in values["levels"]
        )
        plain = {
            "values": tuple(values["values"]),
            "scale": tuple(values["scale"]),
            "levels": levels,
        }
        return Preset(**{**values, **plain})
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is not a valid scorer preset: {error}") from None
