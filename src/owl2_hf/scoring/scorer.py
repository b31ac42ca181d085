"""Score images and videos by the probabilities of level words, as Q-Align and DeQA-Score do.

The computation of one score is in `owl2_hf.modeling.scoring_mplug_owl2`, which is saved with the
weights. This file adds batches, videos, crops and scales. B: images of one batch, K: levels.

Sources: Q-Align (arXiv:2312.17090), Q-Instruct (arXiv:2311.06783), DeQA-Score (arXiv:2501.11561),
and their released code.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature

from ..modeling.modeling_mplug_owl2 import MplugOwl2ForConditionalGeneration
from ..modeling.presets_mplug_owl2 import PRESETS, Preset
from ..modeling.scoring_mplug_owl2 import (
    expected_score,
    level_id,
    level_ids,
    level_inputs,
    level_logits,
    own_preset,
    read_levels,
)
from ..processing.image_processing_mplug_owl2 import is_many
from ..processing.processing_mplug_owl2 import MplugOwl2Processor
from .crops import crop_boxes, side_of
from .frames import is_video_path, read_frames
from .tensors import score_tensor

__all__ = ["Score", "Scorer", "crop_boxes", "level_id"]


@dataclass(frozen=True)
class Score:
    """The score of one image or video.

    Args:
        score: Mean value of the levels, weighted by their probabilities, on `scale`.
        std: Standard deviation of the level's value, on the same scale (DeQA-Score).
        probs: Probability of each level. They sum to 1.
        levels: The level words, best first. A group of words is named by its first word.
        logits: The model's logit of each level, divided by the temperature. With crops, the
            logarithms of `probs`.
        scale: Lowest and highest score.
    """

    score: float
    std: float
    probs: tuple[float, ...]
    levels: tuple[str, ...]
    logits: tuple[float, ...]
    scale: tuple[float, float]


class Scorer:
    """Score images and videos with a model and its processor.

    Args:
        model: `MplugOwl2ForConditionalGeneration`, in evaluation mode.
        processor: Its processor.
        preset: A name in `PRESETS`, or a `Preset`. Default: the preset stored with the weights,
            otherwise OneAlign's.
        scale: Lowest and highest score. Default: the preset's.
        batch_size: Images in one forward pass. It does not change the scores.
        crops: Cut squares of the model's input size from the image at full resolution, score them,
            and average the scores. The papers do not score this way.
        original_reading: Read files as the original code does, to reproduce the papers' numbers;
            see `MplugOwl2ImageProcessor`.

    Raises:
        ValueError: If the preset is unknown or damaged, or a level word is not one token of the
            vocabulary.
    """

    def __init__(
        self,
        model: MplugOwl2ForConditionalGeneration,
        processor: MplugOwl2Processor,
        preset: str | Preset | None = None,
        scale: tuple[float, float] | None = None,
        batch_size: int = 8,
        crops: bool = False,
        original_reading: bool = False,
    ):
        if preset is None:
            preset = own_preset(model) or PRESETS["one-align"]
        if isinstance(preset, str):
            if preset not in PRESETS:
                raise ValueError(f"expected a preset of {', '.join(PRESETS)}, got {preset!r}.")
            preset = PRESETS[preset]
        if batch_size < 1:
            raise ValueError(f"expected a batch_size of at least 1, got {batch_size}.")
        self.model, self.processor, self.batch_size = model, processor, batch_size
        self.crops, self.original_reading = crops, original_reading
        self.preset = preset if scale is None else replace(preset, scale=scale)
        self._names = tuple(
            level if isinstance(level, str) else level[0] for level in preset.levels
        )
        self._ids = level_ids(processor.tokenizer, preset)

    @property
    def levels(self) -> tuple[str, ...]:
        """Return the level words, best first. A group of words is named by its first word."""
        return self._names

    def __call__(self, images: Any, task: str = "quality") -> list[Score]:
        """Scores of images, or of videos.

        Args:
            images: Images as the processor takes them. For task "video" the path of a video each,
                of which one frame a second counts, or a list or array of frames. One alone may
                stand without a list.
            task: One of the preset's; "aesthetic" means "aesthetics".

        Raises:
            ValueError: If the preset has no such task, an image or video cannot be read, or the
                model gives NaN.
        """
        prompt = self._prompt(task)
        images = _to_list(images, is_video=task == "video")
        scores: list[Score] = []
        if self.crops:
            return [self._score_crops(image, prompt) for image in images]
        for start in range(0, len(images), self.batch_size):
            batch = images[start : start + self.batch_size]
            if task == "video":
                batch = [
                    read_frames(video) if isinstance(video, (str, Path)) else video
                    for video in batch
                ]
            scores += [self._score(levels) for levels in self._levels(batch, prompt)]
        return scores

    def prepare(self, images: Sequence[Any], task: str = "quality") -> BatchFeature:
        """Return the model's inputs for B images. Images can be read while the model is busy.

        Raises:
            ValueError: If the preset has no such task, or an image cannot be read.
        """
        return self._inputs([[image] for image in images], self._prompt(task))

    def score_prepared(self, inputs: BatchFeature) -> list[Score]:
        """Return the scores of inputs that `prepare` made, in one forward pass.

        Raises:
            ValueError: If the model gives NaN.
        """
        return [self._score(levels) for levels in self._read(inputs)]

    def score_tensor(self, images: Any, task: str = "quality") -> Tensor:
        """Return scores with gradients to the pixels, to train an image generator with.

        The scores differ slightly from those of a call, because PIL rounds when it resizes and
        torch does not. docs/scoring.md gives the size of the difference. Gradients also reach the
        weights unless these are frozen (`model.requires_grad_(False)`). Gradient checkpointing, if
        enabled, also works in evaluation mode.

        Args:
            images: (B, 3, H, W) floats from 0 to 1, or a list of tensors (3, H, W) of different
                sizes. Values outside this range are clipped and get no gradient. For task "video",
                or for presets with several images in a prompt, (B, T, 3, H, W) or a list of (T, 3,
                H, W).
            task: A task of the preset.

        Returns:
            (B,) scores on the preset's scale, on the model's device, in float32 or float64.

        Raises:
            ValueError: If the preset has no such task, the tensors have another shape or dtype, or
                the model returns NaN.
        """
        return score_tensor(self, images, task)

    def _prompt(self, task: str) -> str:
        """The preset's prompt for a task.

        Raises:
            ValueError: If the preset has no such task, or crops of videos are asked for.
        """
        task = self.preset.task_named(task)
        if task not in self.preset.prompts:
            raise ValueError(f"expected a task of {', '.join(self.preset.prompts)}, got {task!r}.")
        if self.crops and task == "video":
            raise ValueError(
                "expected crops of images, got task 'video': score its frames with another task."
            )
        return self.preset.prompts[task]

    def open_image(self, image: Any) -> Image.Image:
        """Open an image of any kind in RGB, as this scorer reads it.

        Raises:
            ValueError: If it cannot be read.
        """
        return self.processor.image_processor.process_image(
            image, original_reading=self.original_reading
        )

    def _score_crops(self, image: Any, prompt: str) -> Score:
        """The score by the mean of all crops' probabilities."""
        image = self.open_image(image)
        boxes = crop_boxes(image.width, image.height, side_of(self.processor.image_processor))
        probs = []  # (K,) each
        for start in range(0, len(boxes), self.batch_size):
            batch = [image.crop(box) for box in boxes[start : start + self.batch_size]]
            probs += [levels.softmax(-1) for levels in self._levels(batch, prompt)]
        return self._score(torch.stack(probs).mean(0).log())

    def _levels(self, images: Sequence[Any], prompt: str) -> Tensor:
        """(B, K) logits of the levels, over the temperature."""
        frames = [list(image) if is_many(image) else [image] for image in images]
        return self._read(self._inputs(frames, prompt))

    def _read(self, inputs: BatchFeature) -> Tensor:
        """The model's inputs -> (B, K) logits of the levels, over the temperature."""
        return read_levels(self.model, inputs, self._ids, self.preset)

    def _inputs(
        self, frames: list[list[Any]], prompt: str, size: Mapping[str, int] | None = None
    ) -> BatchFeature:
        """What the model takes for B images or videos.

        Args:
            frames: Those of each; an image is one.
            size: Of the square, where not the processor's.
        """
        options = {} if size is None else {"size": size}
        return level_inputs(
            self.model,
            self.processor,
            self.preset,
            frames,
            prompt,
            original_reading=self.original_reading,
            **options,
        )

    def _level_logits(self, logits: Tensor) -> Tensor:
        """(B, V) logits of the next token -> (B, K) of the levels, over the temperature.

        Raises:
            ValueError: If the model gives NaN.
        """
        return level_logits(logits, self._ids, self.preset)

    def _score(self, levels: Tensor) -> Score:
        """(K,) logits of the levels -> the score."""
        mean, std, probs = expected_score(levels, self.preset)
        return Score(
            mean, std, tuple(probs.tolist()), self._names, tuple(levels.tolist()), self.preset.scale
        )


def _to_list(images: Any, is_video: bool) -> Any:
    """What is to be scored one by one; a list of images is one video."""
    if not is_video:
        return images if is_many(images) else [images]
    is_several = isinstance(images, (list, tuple)) and all(
        is_many(one) or is_video_path(one) for one in images
    )
    return images if is_several else [images]
