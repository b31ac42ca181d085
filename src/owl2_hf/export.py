"""Export the vision encoder and connector, or a whole scorer, to ONNX.

N: images, Q + 1: visual tokens of one image, D: width of the language model, K: levels,
L: positions of the prompt.
"""

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .modeling.modeling_mplug_owl2 import MplugOwl2ForConditionalGeneration
from .modeling.presets_mplug_owl2 import Preset
from .modeling.scoring_mplug_owl2 import gather_levels, level_values

# Largest difference that rounding explains, divided by the largest value.
TOLERANCE = 1e-4
_MAX_BYTES = int(1.5 * 2**30)  # of weights in one file; protobuf's limit is 2 GB


class _VisionSide(nn.Module):
    def __init__(self, model: MplugOwl2ForConditionalGeneration) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(N, 3, H, W) normalised pixels -> (N, Q + 1, D) visual tokens."""
        return self.model.get_image_features(
            pixel_values=pixel_values, return_dict=True
        ).pooler_output


def export_vision(name: str, target: Path) -> float:
    """Write the vision encoder and connector of a model to an ONNX file.

    The weights are float32. The file takes any number of images.

    Args:
        name: Folder or Hub id of a model.
        target: The file to write. Weights above 1.5 GiB go to a second file, with `.data` added to
            the name.

    Returns:
        The largest difference between the outputs of the file and of torch for random images.

    Raises:
        ValueError: If packages are missing, the file exists, the model does not load, or the
            outputs of the file differ from torch's.
    """
    onnxruntime = _runtime(target)
    from transformers import AutoModel

    from .naming import naming_model

    with naming_model(name):
        model = AutoModel.from_pretrained(name)
    del model.language_model  # not exported, and float32 would double its memory
    vision = model.config.vision_config
    side = _VisionSide(model.float()).eval()
    images = torch.randn(3, vision.num_channels, vision.image_size, vision.image_size)
    with torch.no_grad():
        program = torch.onnx.export(
            side,
            (images[:2],),
            dynamo=True,
            verbose=False,
            input_names=["pixel_values"],
            output_names=["image_features"],
            dynamic_shapes=({0: torch.export.Dim("images")},),
        )
        expected = torch.stack(list(side(images))).numpy()
    assert program is not None  # None only without dynamo=True
    program.save(target)
    session = onnxruntime.InferenceSession(target, providers=["CPUExecutionProvider"])
    (found,) = session.run(["image_features"], {"pixel_values": images.numpy()})
    difference = float(np.abs(found - expected).max())
    if not difference <= TOLERANCE * float(np.abs(expected).max()):
        raise ValueError(f"{target} differs from torch by {difference:.1e}: do not use it.")
    return difference


class _ScorerGraph(nn.Module):
    """A scorer whose prompt is fixed, from pixels alone."""

    prompt: Tensor  # (1, L)
    values: Tensor  # (K,)

    def __init__(
        self,
        model: MplugOwl2ForConditionalGeneration,
        prompt: Tensor,
        ids: list[list[int]],
        preset: Preset,
    ) -> None:
        super().__init__()
        self.model, self.config = model, model.config
        self.ids, self.preset = ids, preset
        self.register_buffer("prompt", prompt, persistent=False)
        values = level_values(torch.zeros(0), preset)
        self.register_buffer("values", values, persistent=False)

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """(N, 3, H, W) pixels -> (N,) scores and (N, K) logits of the levels over the
        temperature.
        """
        # (N, L); len() would make N a constant
        prompts = self.prompt.expand(pixel_values.shape[0], -1)
        logits = self.model(
            input_ids=prompts, pixel_values=pixel_values, logits_to_keep=1, use_cache=False
        ).logits[:, -1]
        levels = gather_levels(logits, self.ids, self.preset)
        return {"scores": levels.softmax(-1) @ self.values, "level_logits": levels}


def export_scorer(
    name: str, target: Path, task: str = "quality", preset: str | None = None
) -> float:
    """Export a scorer to ONNX in float32, for any number of images, with transformers' exporter.

    The prompt is part of the file. Its input is `pixel_values` (N, 3, side, side), its outputs are
    `scores` (N,) and `level_logits` (N, K).

    Args:
        name: Folder or Hub id of a scorer.
        target: The file to write. Weights above 1.5 GiB go to a second file, with `.data` added to
            the name.
        task: Of the preset.
        preset: How it is asked, where it has no scorer.json.

    Returns:
        The largest difference between scores of the file and of `Scorer`.

    Raises:
        ValueError: If packages are missing, the file exists, the model does not load or does not
            score single images, or the scores of the file differ from those of `Scorer`.
    """
    onnxruntime = _runtime(target)
    import onnx_ir
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    try:
        from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter
    except ImportError as error:
        raise ValueError(
            f"this version of transformers has no ONNX exporter ({error}): install 5.17 or later."
        ) from None
    from .default_scorer import default_scorer_images
    from .naming import naming_model
    from .scoring import Scorer
    from .scoring.presets import own_preset

    with naming_model(name):
        model = AutoModelForImageTextToText.from_pretrained(name, dtype=torch.float32).eval()
        processor = AutoProcessor.from_pretrained(name)
        if getattr(model, "hf_quantizer", None) is not None:
            raise ValueError("its weights are quantised: export the unquantised model.")
        if preset is None and own_preset(model) is None:
            raise ValueError("it has no scorer.json: choose a preset with --preset.")
    scorer = Scorer(model, processor, preset)
    if task == "video" or scorer.preset.images_per_prompt != 1:
        raise ValueError(
            "expected a task whose prompt has one image; the exported file does not support others."
        )
    images = [Image.open(path).convert("RGB") for path in default_scorer_images().values()]
    images.append(Image.new("RGB", (64, 48), "gray"))
    inputs = scorer.prepare(images, task)
    pixels, prompt = inputs["pixel_values"].float(), inputs["input_ids"][:1]
    graph = _ScorerGraph(model, prompt, scorer._ids, scorer.preset).eval()
    config = OnnxConfig(
        dynamic=True, dynamic_shapes={"pixel_values": {0: torch.export.Dim("images")}}
    )
    with redirect_stdout(sys.stderr):  # the exporter prints its progress to stdout
        exported = OnnxExporter().export(graph, {"pixel_values": pixels[:2]}, config)
    # transformers 5.17 returns torch's own program.
    program = exported.program if hasattr(exported, "program") else exported.model
    weights = sum(
        one.const_value.nbytes for one in program.graph.initializers.values() if one.const_value
    )
    data = f"{target.name}.data" if weights > _MAX_BYTES else None
    onnx_ir.save(program, str(target), external_data=data)
    session = onnxruntime.InferenceSession(target, providers=["CPUExecutionProvider"])
    expected = np.array([one.score for one in scorer(images, task)])
    (found,) = session.run(["scores"], {"pixel_values": pixels.numpy()})
    difference = float(np.abs(found - expected).max())
    low, high = scorer.preset.scale
    if not difference <= TOLERANCE * (high - low):
        raise ValueError(f"{target} differs from torch by {difference:.1e}: do not use it.")
    return difference


def _runtime(target: Path) -> Any:
    """onnxruntime, where a file can be exported to this place.

    Raises:
        ValueError: Packages are missing, or the file exists.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401, torch exports with it
    except ImportError:
        raise ValueError(
            "the export needs onnx, onnxscript and onnxruntime: pip install 'owl2_hf[export]'."
        ) from None
    if target.exists():
        raise ValueError(f"{target} already exists: choose another name, or remove it.")
    return onnxruntime
