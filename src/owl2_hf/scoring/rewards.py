"""Scores as rewards, with the call signatures of trainers of image generators. N: images.

Sources of the signatures: TRL's `GRPOTrainer`, flow_grpo (github.com/yifan123/flow_grpo,
rewards.py), DDPO (github.com/kvablack/ddpo-pytorch, and TRL's `DDPOTrainer`).
"""

import threading
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from ..modeling.modeling_mplug_owl2 import MplugOwl2ForConditionalGeneration
from ..processing.processing_mplug_owl2 import MplugOwl2Processor
from .presets import Preset
from .scorer import Scorer

# Allowed below 0 and above 1 for rounding in half precision. Values further out mean that an image
# is in -1 to 1 or was not clipped.
TOLERANCE = 0.01
COLUMNS = ("images", "image")  # TRL's own names


def reward(
    model: MplugOwl2ForConditionalGeneration,
    processor: MplugOwl2Processor,
    style: Literal["trl", "flow_grpo", "ddpo"],
    preset: str | Preset | None = None,
    task: str = "quality",
    scale: tuple[float, float] | None = None,
    batch_size: int = 8,
    device: str | torch.device | None = None,
    column: str | None = None,
) -> "TRLReward | ImageReward":
    """Make a reward function from a scorer. It gives no gradients.

    Trainers call reward functions in different ways, so `style` names the trainer:

    - "trl": `(prompts, completions, **columns) -> list[float | None]`, one of TRL's `reward_funcs`;
    - "flow_grpo", "ddpo": `(images, prompts, metadata) -> (list[float], {})`.

    The rewards are the scores of `Scorer` for the same images in 8 bits. The function is
    thread-safe, so a trainer may compute rewards in the background.

    Args:
        model: `MplugOwl2ForConditionalGeneration`; it is put in evaluation mode.
        processor: Its processor.
        preset: See `Scorer`. Default: the preset stored with the weights, otherwise OneAlign's.
        task: A task of the preset that scores images.
        scale: Lowest and highest reward, such as (0, 1). Default: the preset's, which is 1 to 5 for
            OneAlign and DeQA-Score.
        batch_size: Images in one forward pass.
        device: Device to move the model to. Default: do not move it. Images may be on any device.
        column: For "trl", the column that holds the images. Default: "images" or "image".

    Raises:
        ValueError: If the style, preset or task is unknown, or a level is not one token of the
            vocabulary.
    """
    if style not in ("trl", "flow_grpo", "ddpo"):
        raise ValueError(f"expected a style of trl, flow_grpo, ddpo, got {style!r}.")
    if task == "video":
        raise ValueError(
            "expected a task for images, got 'video': score its frames with another task."
        )
    scorer = Scorer(model, processor, preset, scale, batch_size)
    scorer._prompt(task)  # raises now if the preset lacks this task
    model.eval()
    if device is not None:
        model.to(device)
    return TRLReward(scorer, task, column) if style == "trl" else ImageReward(scorer, task)


class _Reward:
    def __init__(self, scorer: Scorer, task: str) -> None:
        self.scorer, self.task = scorer, task
        self.__name__ = f"owl2_{task}"  # its name in TRL's logs
        self._turn = threading.Lock()  # threads share the tokenizer's padding settings

    def _score(self, images: Any) -> list[float]:
        device = self.scorer.model.device.type
        # A trainer's autocast must not change this model's dtype.
        with self._turn, torch.autocast(device, enabled=False):
            return [found.score for found in self.scorer(to_images(images), self.task)]


class ImageReward(_Reward):
    """A reward for trainers of image generators; see `reward`."""

    def __call__(
        self, images: Any, prompts: Any = None, metadata: Any = None
    ) -> tuple[list[float], dict[str, Any]]:
        """Rewards of images.

        Args:
            images: Tensor (N, 3, H, W) of floats from 0 to 1 or of uint8, array (N, H, W, 3) of the
                same, or a list of images, also of different sizes.
            prompts: Without effect: image quality does not depend on them.
            metadata: Without effect.

        Raises:
            ValueError: If the images are not of these kinds.
        """
        return self._score(images), {}


class TRLReward(_Reward):
    """One of the `reward_funcs` of TRL; see `reward`."""

    def __init__(self, scorer: Scorer, task: str, column: str | None) -> None:
        super().__init__(scorer, task)
        self.column = column

    def __call__(self, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """The reward of each completion: the mean score of the images of its row, `None` where it
        has none.

        Args:
            completions: Of these only the number counts.
            columns: Those of the data set and of the rollout, one value for each completion.

        Raises:
            ValueError: If there is no column of images, or its images cannot be read.
        """
        names = [self.column] if self.column else COLUMNS
        name = next((name for name in names if columns.get(name) is not None), None)
        if name is None:
            found = ", ".join(sorted(columns)) or "none"
            raise ValueError(
                f"expected a column {' or '.join(map(repr, names))} with images, got columns: "
                f"{found}."
            )
        rows = [_as_list(row) for row in columns[name]]
        if len(rows) != len(completions):
            raise ValueError(
                f"expected images for each of {len(completions)} completions, got {len(rows)} rows."
            )
        scores = iter(self._score([image for row in rows for image in row]))
        own = [[next(scores) for _ in row] for row in rows]
        return [sum(row) / len(row) if row else None for row in own]


def to_images(images: Any) -> list[Any]:
    """Convert images to what `Scorer` takes. Tensors and arrays become 8-bit images.

    Args:
        images: See `ImageReward`.

    Raises:
        ValueError: If a shape, dtype or value range is not accepted.
    """
    if isinstance(images, (torch.Tensor, np.ndarray)):
        return [Image.fromarray(one) for one in _to_bytes(images)]
    return [
        to_images(one[None])[0] if isinstance(one, (torch.Tensor, np.ndarray)) else one
        for one in images
    ]


def _to_bytes(images: torch.Tensor | np.ndarray) -> np.ndarray:
    """(N, 3, H, W) tensor or (N, H, W, 3) array -> (N, H, W, 3) uint8."""
    is_tensor, shape = isinstance(images, torch.Tensor), tuple(images.shape)
    if len(shape) != 4 or shape[1 if is_tensor else 3] != 3:
        expected = "a tensor (N, 3, H, W)" if is_tensor else "an array (N, H, W, 3)"
        raise ValueError(f"expected {expected} of images, got shape {shape}.")
    pixels = torch.as_tensor(images).detach()
    if pixels.is_floating_point():
        pixels = pixels.float()  # half precision cannot hold all 256 values
        low, high = (float(end) for end in pixels.aminmax()) if pixels.numel() else (0.0, 1.0)
        if not (low >= -TOLERANCE and high <= 1 + TOLERANCE):  # also true for NaN
            raise ValueError(
                f"expected images of floats from 0 to 1, got {low:.3g} to {high:.3g}: convert "
                "images from -1 to 1 with (images / 2 + 0.5).clamp(0, 1)."
            )
        pixels = (pixels * 255).round().clamp(0, 255).to(torch.uint8)
    elif pixels.dtype != torch.uint8:
        raise ValueError(f"expected images of floats or uint8, got {images.dtype}.")
    return (pixels.permute(0, 2, 3, 1) if is_tensor else pixels).cpu().numpy()


def _as_list(row: Any) -> list[Any]:
    """The images of one row of a data set."""
    if row is None:
        return []
    return list(row) if isinstance(row, (list, tuple)) else [row]
