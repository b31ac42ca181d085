"""Scorers with the interface of pyiqa (chaofengc/IQA-PyTorch), for code written for pyiqa.

Source of the interface: pyiqa's `create_metric` and `InferenceModel` at commit 01ae427. pyiqa does
not need to be installed.

B: images, H, W: height and width.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..modeling.modeling_mplug_owl2 import MplugOwl2ForConditionalGeneration
from ..naming import naming_model
from ..processing.processing_mplug_owl2 import MplugOwl2Processor
from .presets import PRESETS, Preset
from .scorer import Scorer

# pyiqa's names -> those of the presets here.
_NAMES = {"qalign": "one-align"}
# Hub ids of the weights, used if no model is passed.
_PUBLISHED = {"one-align": "q-future/one-align", "deqa": "zhiyuanyou/DeQA-Score-Mix3"}
_REDUCTIONS = ("mean", "sum", "none")
_TOLERANCE = 1e-6  # allowed below 0 and above 1, as in pyiqa


class Metric(nn.Module):
    """A scorer with the interface of pyiqa's metrics.

    Args:
        scorer: The `Scorer` to use.
        metric_name: Name of the metric.
        as_loss: Keep gradients to the pixels, and reduce the scores to one number.
        loss_reduction: "mean", "sum" or "none". Only used with `as_loss`.
        check_input_range: Raise an error for tensors with values outside 0 to 1. Not used with
            `as_loss`.

    Attributes:
        net: The model.
        lower_better: `False`: higher is better, so a loss is `-metric(images)`.
        metric_mode: "NR": there is no reference image.
        score_range: Lowest and highest score, as text: "1, 5".

    Raises:
        ValueError: If there is no such reduction.
    """

    lower_better = False
    metric_mode = "NR"

    def __init__(
        self,
        scorer: Scorer,
        metric_name: str,
        as_loss: bool = False,
        loss_reduction: str = "mean",
        check_input_range: bool = True,
    ):
        super().__init__()
        if loss_reduction not in _REDUCTIONS:
            raise ValueError(
                f"expected a loss_reduction of {', '.join(_REDUCTIONS)}, got {loss_reduction!r}."
            )
        self.scorer, self.net, self.metric_name = scorer, scorer.model, metric_name
        self.as_loss, self.loss_reduction = as_loss, loss_reduction
        self.check_input_range = check_input_range and not as_loss
        self.score_range = ", ".join(f"{end:g}" for end in scorer.preset.scale)

    @property
    def device(self) -> torch.device:
        """Return the device of the model."""
        return self.net.device

    def forward(
        self, target: Any, ref: Any = None, task_: str = "quality", input_: str = "image"
    ) -> Tensor:
        """Return the scores of images.

        Args:
            target: (B, 3, H, W) or (B, 1, H, W) floats from 0 to 1; or a path, bytes or a PIL
                image, or a list of these.
            ref: Ignored, as by every pyiqa metric of mode NR (no reference).
            task_: A task of the preset: "quality", "aesthetic".
            input_: "image".

        Returns:
            (B,) scores, as pyiqa's qalign returns. With `as_loss`, one number, unless the reduction
            is "none".

        Raises:
            ValueError: If there is no such task, or an image cannot be scored. The message says
                why.
        """
        if input_ != "image":
            raise ValueError(f"expected input_ 'image', got {input_!r}: use Scorer for videos.")
        if isinstance(target, Tensor):
            target = self._checked(target)
        elif not isinstance(target, (list, tuple)):
            target = [target]
        if not self.as_loss:
            # Converted to PIL images, so that scores are the same as for files.
            images = target.clamp(0, 1) if isinstance(target, Tensor) else target
            return torch.tensor(
                [found.score for found in self.scorer(images, task_)], device=self.device
            )
        if not isinstance(target, Tensor):
            target = [_to_tensor(self.scorer.open_image(image)) for image in target]
        scores = self.scorer.score_tensor(target, task_)
        return scores if self.loss_reduction == "none" else getattr(scores, self.loss_reduction)()

    def _checked(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) of the tensor that came."""
        if images.ndim != 4 or images.shape[1] not in (1, 3) or not images.is_floating_point():
            raise ValueError(
                "expected floats from 0 to 1 of shape (B, 3, H, W) or (B, 1, H, W), got "
                f"{images.dtype} of shape {tuple(images.shape)}."
            )
        if self.check_input_range and images.numel():
            low, high = (float(end) for end in images.aminmax())
            if not (low > -_TOLERANCE and high < 1 + _TOLERANCE):
                raise ValueError(f"expected values from 0 to 1, got {low:g} to {high:g}.")
        return images.expand(-1, 3, -1, -1)


def create_metric(
    metric_name: str | Preset,
    as_loss: bool = False,
    device: str | torch.device | None = None,
    *,
    model: str | Path | MplugOwl2ForConditionalGeneration | None = None,
    processor: MplugOwl2Processor | None = None,
    original_reading: bool = True,
    batch_size: int = 8,
    loss_reduction: str = "mean",
    check_input_range: bool = True,
    **kwargs: Any,
) -> Metric:
    """Create a metric, with the interface of `pyiqa.create_metric`.

    Args:
        metric_name: "qalign", a name in `PRESETS` such as "deqa", or a `Preset`.
        as_loss, loss_reduction, check_input_range: See `Metric`.
        device: Device to move the model to. Default: for a model loaded here, the GPU if there is
            one.
        model: Folder or Hub id of the weights, or a loaded model, whose training or evaluation mode
            is kept. Default: the published weights of "qalign" or "deqa", from the Hub.
        processor: Processor of `model`, if `model` is a loaded model.
        original_reading: Read files as pyiqa does; see `MplugOwl2ImageProcessor`.
        batch_size: Images in one forward pass. It does not change the scores.
        kwargs: Arguments of the model's `from_pretrained`, for example `dtype` or
            `quantization_config`.

    Raises:
        ValueError: If there is no such metric, or the model cannot be loaded.
    """
    preset = _NAMES.get(metric_name, metric_name) if isinstance(metric_name, str) else metric_name
    if isinstance(preset, str) and preset not in PRESETS:
        raise ValueError(_unknown(preset))
    if model is None:
        model = _PUBLISHED.get(preset) if isinstance(preset, str) else None
        if model is None:
            raise ValueError(f"{metric_name!r} has no default weights: pass model=.")
    if isinstance(model, (str, Path)):
        model, processor = _load(str(model), processor, kwargs)
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
    elif processor is None or kwargs:
        raise ValueError(
            "expected the model's processor together with the model, got none."
            if processor is None
            else f"{', '.join(kwargs)} apply only to loading, but the model is loaded: leave them out."
        )
    # loading already placed a quantised model
    if device is not None and not getattr(model, "is_quantized", False):
        model.to(device)
    scorer = Scorer(
        model, processor, preset, batch_size=batch_size, original_reading=original_reading
    )
    name = metric_name if isinstance(metric_name, str) else "custom"
    return Metric(scorer, name, as_loss, loss_reduction, check_input_range)


def _load(
    model: str, processor: MplugOwl2Processor | None, kwargs: dict[str, Any]
) -> tuple[MplugOwl2ForConditionalGeneration, MplugOwl2Processor]:
    """A model with frozen weights, and its processor."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    with naming_model(model):
        loaded = AutoModelForImageTextToText.from_pretrained(model, **kwargs)
        processor = processor or AutoProcessor.from_pretrained(model)
    return loaded.eval().requires_grad_(False), processor


def _unknown(name: str) -> str:
    """What to do about a name that no preset has."""
    known = ", ".join([*_NAMES, *PRESETS])
    if name in ("qalign_4bit", "qalign_8bit"):
        return f"expected 'qalign', got {name!r}: pass it with a quantization_config."
    if name == "compare2score":
        return f"expected a metric of {known}, got {name!r}: use owl2_hf.scoring.comparison.Comparator."
    return f"expected a metric of {known}, got {name!r}."


def _to_tensor(image: Image.Image) -> Tensor:
    """RGB -> (3, H, W) from 0 to 1."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
