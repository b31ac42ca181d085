"""Scores of pictures and videos by the probabilities of level words, as Q-Align, Q-Instruct and DeQA-Score read them.

The model is shown a picture and the beginning of an answer; the probabilities of a few words at its next position, and
the value of each word, make the score. B: pictures of one batch, K: levels, V: embedding rows.

Sources: Q-Align (arXiv:2312.17090), Q-Instruct (arXiv:2311.06783), DeQA-Score (arXiv:2501.11561), and their released
code.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..processing.image_processing_mplug_owl2 import is_many
from .frames import is_video_path, read_frames
from .presets import IMAGE_TOKEN, PRESETS, Preset

# Ids of the level words in LLaMA-2's vocabulary, which is told by its size.
_LLAMA2_SIZE = 32000
_LLAMA2_IDS = {
    "excellent": 15129,
    "good": 1781,
    "fair": 6534,
    "poor": 6460,
    "bad": 4319,
    "average": 6588,
    "inferior": 20773,
    "worse": 15029,
    "similar": 2788,
    "better": 2253,
    "superior": 11558,
}


@dataclass(frozen=True)
class Score:
    """What a model thinks of one picture.

    Args:
        score: Expected value of the level, on `scale`.
        std: Standard deviation of the level's value, on the same scale (DeQA-Score).
        probs: Probability of each level, among the levels.
        levels: The level words; of a group the first.
        logits: The model's, for each level, over the temperature; with crops the logarithms of `probs`.
        scale: Lowest and highest score.
    """

    score: float
    std: float
    probs: tuple[float, ...]
    levels: tuple[str, ...]
    logits: tuple[float, ...]
    scale: tuple[float, float]


class Scorer:
    """Scores pictures with a model and its processor.

    Args:
        model: `MplugOwl2ForConditionalGeneration`, in evaluation mode.
        processor: Its processor.
        preset: A name in `PRESETS`, or one of your own.
        scale: Lowest and highest score, where not the preset's.
        batch_size: Pictures in one forward pass; it does not change the scores.
        crops: Score squares of the model's size, cut from the image at its own resolution, and average them. This is
            not how the papers score.
        original_reading: Read files as the originals do, for the papers' numbers; see `MplugOwl2ImageProcessor`.

    Raises:
        ValueError: The preset is unknown, or a level word is not one token of the vocabulary.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        preset: str | Preset = "one-align",
        scale: tuple[float, float] | None = None,
        batch_size: int = 8,
        crops: bool = False,
        original_reading: bool = False,
    ):
        if isinstance(preset, str):
            if preset not in PRESETS:
                raise ValueError(f"expected a preset of {', '.join(PRESETS)}, got {preset!r}.")
            preset = PRESETS[preset]
        if batch_size < 1:
            raise ValueError(f"expected a batch_size of at least 1, got {batch_size}.")
        self.model, self.processor, self.batch_size = model, processor, batch_size
        self.crops, self.original_reading = crops, original_reading
        self.preset = preset if scale is None else replace(preset, scale=scale)
        groups = [(level,) if isinstance(level, str) else level for level in preset.levels]
        self._names = tuple(group[0] for group in groups)
        self._ids = [[level_id(processor.tokenizer, word) for word in group] for group in groups]

    @property
    def levels(self) -> tuple[str, ...]:
        """The level words, best first; of a group the first."""
        return self._names

    def __call__(self, images: Any, task: str = "quality") -> list[Score]:
        """Scores of pictures, or of videos.

        Args:
            images: Pictures as the processor takes them. For task "video" the path of a video each, of which one frame
                a second counts, or a list or array of frames. One alone may stand without a list.
            task: One of the preset's; "aesthetic" means "aesthetics".

        Raises:
            ValueError: The preset has no such task, a picture or video cannot be read, or the model gives NaN.
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

    def prepare(self, images: Sequence[Any], task: str = "quality") -> Any:
        """The model's inputs for B images, so that images are read before the model is free.

        Raises:
            ValueError: The preset has no such task, or an image cannot be read.
        """
        return self._inputs([[image] for image in images], self._prompt(task))

    def score_prepared(self, inputs: Any) -> list[Score]:
        """Scores of what `prepare` made, in one forward pass.

        Raises:
            ValueError: The model gives NaN.
        """
        return [self._score(levels) for levels in self._read(inputs)]

    def score_tensor(self, images: Any, task: str = "quality") -> Tensor:
        """Scores with gradients to the pixels, so that a generator can be trained by them.

        They differ from those of a call by what PIL rounds when it resizes; see docs/scoring.md.
        Gradients also reach the weights unless these are frozen (`model.requires_grad_(False)`).
        Gradient checkpointing, where it is switched on, works in evaluation mode too.

        Args:
            images: (B, 3, H, W) floats from 0 to 1, or a list of tensors (3, H, W) of different
                sizes. Values beyond are clipped, and have no gradient. For task "video", or several
                images in a prompt, (B, T, 3, H, W) or a list of (T, 3, H, W).
            task: As in a call.

        Returns:
            (B,) on the preset's scale, on the model's device, in float32 or wider.

        Raises:
            ValueError: The preset has no such task, the tensors are not of this kind, or the model
                gives NaN.
        """
        from .tensors import score_tensor  # which needs this file

        return score_tensor(self, images, task)

    def _prompt(self, task: str) -> str:
        """The preset's prompt for a task.

        Raises:
            ValueError: The preset has no such task, or crops of videos are asked for.
        """
        if task == "aesthetic" and task not in self.preset.prompts:  # pyiqa's word
            task = "aesthetics"
        if task not in self.preset.prompts:
            raise ValueError(f"expected a task of {', '.join(self.preset.prompts)}, got {task!r}.")
        if self.crops and task == "video":
            raise ValueError(
                "expected crops of images, got task 'video': score its frames by another task."
            )
        return self.preset.prompts[task]

    def open_image(self, image: Any) -> Image.Image:
        """An image of any kind in RGB, read as this scorer reads it.

        Raises:
            ValueError: It cannot be read.
        """
        return self.processor.image_processor.process_image(
            image, original_reading=self.original_reading
        )

    def _score_crops(self, image: Any, prompt: str) -> Score:
        """The score by the mean of all crops' probabilities."""
        image = self.open_image(image)
        size = dict(self.processor.image_processor.size)
        boxes = crop_boxes(image.width, image.height, size.get("height") or size["shortest_edge"])
        probs = []  # (K,) each
        for start in range(0, len(boxes), self.batch_size):
            batch = [image.crop(box) for box in boxes[start : start + self.batch_size]]
            probs += [levels.softmax(-1) for levels in self._levels(batch, prompt)]
        return self._score(torch.stack(probs).mean(0).log())

    def _levels(self, images: Sequence[Any], prompt: str) -> Tensor:
        """(B, K) logits of the levels, over the temperature."""
        frames = [list(image) if is_many(image) else [image] for image in images]
        if not all(frames):
            raise ValueError("expected at least one frame of each video, got a list without any.")
        return self._read(self._inputs(frames, prompt))

    def _read(self, inputs: Any) -> Tensor:
        """The model's inputs -> (B, K) logits of the levels, over the temperature."""
        with torch.no_grad():
            logits = self.model(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1]
        return self._level_logits(logits.float().cpu())

    def _inputs(self, frames: list[list[Any]], prompt: str, size: Any = None) -> Any:
        """What the model takes for B images or videos.

        Args:
            frames: Those of each; an image is one.
            size: Of the square, where not the processor's.
        """
        # Frames of a video stand where one picture would, one behind the other.
        prompts = [prompt] * len(frames)
        if self.preset.images_per_prompt == 1:
            prompts = [prompt.replace(IMAGE_TOKEN, IMAGE_TOKEN * len(own)) for own in frames]
        return self.processor(
            images=frames,
            text=prompts,
            padding=True,
            padding_side="left",
            image_aspect_ratio=self.preset.image_aspect_ratio,
            original_reading=self.original_reading,
            return_tensors="pt",
            **({} if size is None else {"size": size}),
        ).to(self.model.device)

    def _level_logits(self, logits: Tensor) -> Tensor:
        """(B, V) logits of the next token -> (B, K) of the levels, over the temperature.

        Raises:
            ValueError: The model gives NaN.
        """
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        levels = (
            torch.stack([logits[:, ids].mean(-1) for ids in self._ids], -1)
            / self.preset.temperature
        )
        if not levels.isfinite().all():
            raise ValueError(
                f"the model's logits are not finite ({levels.tolist()}): try another dtype, or verify it."
            )
        return levels

    def _score(self, levels: Tensor) -> Score:
        """(K,) logits of the levels -> the score."""
        probs = levels.softmax(-1)
        low, high = self.preset.scale
        values = low + (high - low) * torch.tensor(self.preset.values)
        mean = float(probs @ values)
        std = math.sqrt(max(0.0, float(probs @ (values - mean) ** 2)))
        return Score(
            mean, std, tuple(probs.tolist()), self._names, tuple(levels.tolist()), self.preset.scale
        )


def _to_list(images: Any, is_video: bool) -> Any:
    """What is to be scored one by one; a list of pictures is one video."""
    if not is_video:
        return images if is_many(images) else [images]
    is_several = isinstance(images, (list, tuple)) and all(
        is_many(one) or is_video_path(one) for one in images
    )
    return images if is_several else [images]


def crop_boxes(width: int, height: int, side: int) -> list[tuple[int, int, int, int]]:
    """Squares of this side that cover an image, row by row, at even steps; the fewest that do, so they may overlap.

    Returns:
        (left, top, right, bottom) of each. Where the image is smaller than the side, a box ends with the image.
    """

    def starts(length: int) -> list[int]:
        steps = math.ceil(length / side) - 1
        return (
            [round(step * (length - side) / steps) for step in range(steps + 1)]
            if steps > 0
            else [0]
        )

    return [
        (left, top, min(left + side, width), min(top + side, height))
        for top in starts(height)
        for left in starts(width)
    ]


def level_id(tokenizer: Any, word: str) -> int:
    """The token that a word is behind other words, with its space."""
    before = tokenizer("a", add_special_tokens=False).input_ids
    ids = tokenizer(f"a {word}", add_special_tokens=False).input_ids[len(before) :]
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        pieces = tokenizer.convert_ids_to_tokens(ids)
        raise ValueError(
            f"the level {word!r} is not one token of this vocabulary but {pieces}: choose another word."
        )
    expected = _LLAMA2_IDS.get(word)
    if expected is not None and len(tokenizer) == _LLAMA2_SIZE + 1 and ids[0] != expected:
        raise ValueError(
            f"the level {word!r} has id {ids[0]}, LLaMA-2's vocabulary has {expected}: it is damaged."
        )
    return ids[0]
