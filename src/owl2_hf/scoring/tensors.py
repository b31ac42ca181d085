"""Differentiable scores: from pixels in a tensor to the score, all of it in torch.

`Scorer` reads images with PIL, which cuts the path of gradients. Here torch takes the same steps:
square, resizing, normalisation. PIL rounds to steps of 1/255 after each pass of resizing and torch
does not; nothing else differs.

B: images or videos, T: frames of one (1 of an image), H, W: height and width, S: side of the
model's square, K: levels, N: images of a whole batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BatchFeature
from transformers.modeling_layers import GradientCheckpointingLayer

from ..modeling.modeling_mplug_owl2 import MplugOwl2ForConditionalGeneration
from ..modeling.scoring_mplug_owl2 import level_values
from ..processing.image_processing_mplug_owl2 import MplugOwl2ImageProcessor
from ..processing.processing_mplug_owl2 import MplugOwl2Processor
from .crops import crop_boxes, side_of
from .presets import Preset

# Filters that PIL has too, and that torch can use with antialiasing.
_MODES = {Image.Resampling.BILINEAR: "bilinear", Image.Resampling.BICUBIC: "bicubic"}
_LARGEST_MEAN = 2.0  # of values from 0 to 1; generators may go a little beyond


class ReadsLevels(Protocol):
    """What this file uses of a `Scorer`."""

    model: MplugOwl2ForConditionalGeneration
    processor: MplugOwl2Processor
    preset: Preset
    batch_size: int
    crops: bool

    def _prompt(self, task: str) -> str: ...

    def _inputs(
        self, frames: list[list[Any]], prompt: str, size: Mapping[str, int] | None = None
    ) -> BatchFeature: ...

    def _level_logits(self, logits: Tensor) -> Tensor: ...


def score_tensor(scorer: ReadsLevels, images: Any, task: str = "quality") -> Tensor:
    """`Scorer.score_tensor`; see there."""
    prompt = scorer._prompt(task)
    is_video = task == "video" or scorer.preset.images_per_prompt > 1
    items = _to_items(images, is_video)
    scores = []
    for start in range(0, len(items), scorer.batch_size):
        batch = items[start : start + scorer.batch_size]
        if scorer.crops:
            scores += [_expected(scorer, _crop_levels(scorer, image, prompt)) for image in batch]
        else:
            scores.append(_expected(scorer, _levels(scorer, batch, prompt)))
    return torch.cat(scores)  # (B,)


def pixel_values(
    image_processor: MplugOwl2ImageProcessor, images: Tensor, image_aspect_ratio: str
) -> Tensor:
    """Images of one size -> what the image processor makes of them, with gradients.

    Args:
        image_processor: `MplugOwl2ImageProcessor`, whose settings count.
        images: (T, 3, H, W) from 0 to 1; values beyond are clipped.
        image_aspect_ratio: "pad", "resize" or "crop", see `MplugOwl2ImageProcessor`.

    Returns:
        (T, 3, S, S) in float32, or in float64 where the images are.

    Raises:
        ValueError: If the image is too large or too long, or a setting has no counterpart in torch.
    """
    images = images.to(torch.promote_types(images.dtype, torch.float32)).clamp(0, 1)
    if image_processor.do_resize:
        images = _to_square(image_processor, images, image_aspect_ratio)
    if image_processor.do_rescale:
        images = images * (255 * image_processor.rescale_factor)
    if image_processor.do_normalize:
        mean, std = (  # (3, 1, 1) each
            images.new_tensor(values).expand(3)[:, None, None]
            for values in (image_processor.image_mean, image_processor.image_std)
        )
        images = (images - mean) / std
    return images


def _to_square(
    image_processor: MplugOwl2ImageProcessor, images: Tensor, image_aspect_ratio: str
) -> Tensor:
    """(T, 3, H, W) -> (T, 3, S, S), by the steps of `MplugOwl2ImageProcessor`."""
    height, width = images.shape[-2:]
    side, max_pixels = side_of(image_processor), image_processor.max_image_pixels
    if height * width > max_pixels:
        raise ValueError(
            f"an image has {width} x {height} pixels, the limit is {max_pixels:,} in all: make "
            "it smaller."
        )
    resample = image_processor.resample
    mode = _MODES.get(Image.Resampling.BICUBIC if resample is None else resample)
    if mode is None:
        name = Image.Resampling(resample).name.lower()
        raise ValueError(
            f"gradients need bilinear or bicubic resampling, this processor's is {name}."
        )
    edge, short = max(height, width), min(height, width)
    if image_aspect_ratio == "crop":
        longer = int(side * edge / short)
        if longer * side > max_pixels:
            raise ValueError(
                f"an image of {width} x {height} pixels is too long and narrow for a center "
                "crop: crop it first."
            )
        size = (longer, side) if width <= height else (side, longer)
        images = _resize(images, size, mode)
        top, left = ((length - side) // 2 for length in size)
        return images[..., top : top + side, left : left + side]
    if image_aspect_ratio == "resize":
        if edge**2 <= max_pixels:
            images = _resize(images, (edge, edge), "bicubic")
        return _resize(images, (side, side), mode)
    if image_aspect_ratio != "pad":
        raise ValueError(
            "gradients need one square of each image, got image_aspect_ratio "
            f"{image_aspect_ratio!r}."
        )
    if edge**2 > max_pixels:
        height, width = (max(1, round(length * side / edge)) for length in (height, width))
        images, edge = _resize(images, (height, width), mode), side
    if height != width:
        top, left = (edge - height) // 2, (edge - width) // 2
        mean = np.broadcast_to(image_processor.image_mean, 3)
        # The processor pads 8-bit images, whose colours are whole numbers.
        colour = images.new_tensor([int(channel * 255) / 255 for channel in mean])  # (3,)
        square = colour[:, None, None].repeat(len(images), 1, edge, edge)  # (T, 3, edge, edge)
        square[..., top : top + height, left : left + width] = images
        images = square
    return _resize(images, (side, side), mode)


def _resize(images: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """(T, 3, H, W) -> (T, 3, *size).

    As PIL does: first along rows, then along columns, and clipped after each of the two passes.
    """
    for step in ((images.shape[-2], size[1]), size):
        if images.shape[-2:] != step:
            images = F.interpolate(images, size=step, mode=mode, antialias=True).clamp(0, 1)
    return images


def _levels(scorer: ReadsLevels, items: list[Tensor], prompt: str) -> Tensor:
    """B times (T, 3, H, W) -> (B, K) logits of the levels, over the temperature."""
    device, processor = scorer.model.device, scorer.processor
    ratio = scorer.preset.image_aspect_ratio
    # (T, 3, S, S) each
    pixels = [pixel_values(processor.image_processor, item.to(device), ratio) for item in items]
    # The prompt's ids do not depend on the pixels, only on how many images there are.
    blank = Image.new("RGB", (1, 1))
    inputs = scorer._inputs(
        [[blank] * len(item) for item in items], prompt, {"height": 1, "width": 1}
    )
    inputs["pixel_values"] = torch.cat(pixels)  # (N, 3, S, S)
    with _checkpointing(scorer.model):
        # (B, V)
        logits = scorer.model(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1]
    return scorer._level_logits(logits)


def _crop_levels(scorer: ReadsLevels, image: Tensor, prompt: str) -> Tensor:
    """(1, 3, H, W) -> (1, K) logarithms of the mean of all crops' probabilities."""
    side = side_of(scorer.processor.image_processor)
    boxes = crop_boxes(image.shape[-1], image.shape[-2], side)
    # (1, 3, side, side) each
    crops = [image[..., top:bottom, left:right] for left, top, right, bottom in boxes]
    probs = [  # (crops of a batch, K) each
        _levels(scorer, crops[start : start + scorer.batch_size], prompt).softmax(-1)
        for start in range(0, len(crops), scorer.batch_size)
    ]
    return torch.cat(probs).mean(0, keepdim=True).log()


def _expected(scorer: ReadsLevels, levels: Tensor) -> Tensor:
    """(B, K) logits of the levels -> (B,) expected values on the scale."""
    return levels.softmax(-1) @ level_values(levels, scorer.preset)


def _to_items(images: Any, is_video: bool) -> list[Tensor]:
    """B times (T, 3, H, W), checked."""
    axes, wanted = (4, "(T, 3, H, W)") if is_video else (3, "(3, H, W)")
    if isinstance(images, Tensor):
        images = (
            [images] if images.ndim == axes else list(images) if images.ndim == axes + 1 else None
        )
    if not isinstance(images, (list, tuple)) or not all(isinstance(one, Tensor) for one in images):
        raise ValueError(
            f"expected a tensor (B, {wanted[1:]} or a list of tensors {wanted}; "
            "for files and PIL images call the scorer."
        )
    if not images:
        raise ValueError("expected at least one image, got none.")
    for index, image in enumerate(images, start=1):
        _check(image, axes, wanted, f"image {index} of {len(images)}")
    return [image if is_video else image[None] for image in images]


def _check(image: Tensor, axes: int, wanted: str, name: str) -> None:
    shape = tuple(image.shape)
    if image.ndim != axes or shape[-3] != 3:
        raise ValueError(f"{name}: expected the shape {wanted}, got {shape}.")
    if not image.is_floating_point():
        raise ValueError(
            f"{name}: expected floats from 0 to 1, got {image.dtype}: divide by 255, or call the "
            "scorer, which accepts integers."
        )
    if image.numel() == 0:
        raise ValueError(f"{name}: it has no pixels (shape {shape}).")
    mean = float(image.detach().mean(dtype=torch.promote_types(image.dtype, torch.float32)))
    if abs(mean) == float("inf") or mean != mean:
        raise ValueError(f"{name}: it holds NaN or infinite values.")
    if mean > _LARGEST_MEAN:
        raise ValueError(
            f"{name}: expected values from 0 to 1, their mean is {mean:g}: divide by 255."
        )


@contextmanager
def _checkpointing(model: nn.Module) -> Iterator[None]:
    """Gradient checkpointing, where it is switched on, of a model in evaluation mode.

    transformers checkpoints layers in training mode alone. Only the layers themselves are put into
    it, for this pass; dropout and all else inside them stay as they are.
    """
    layers = [
        module
        for module in model.modules()
        if isinstance(module, GradientCheckpointingLayer)
        and module.gradient_checkpointing
        and not module.training
    ]
    for layer in layers if torch.is_grad_enabled() else ():
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False
