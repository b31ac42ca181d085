"""Rounds the weights of a model to 8 or 4 bits, saves them, and measures what was lost.

Only the decoder's matrices are rounded, those of both modalities; activations stay as they are.
"""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor, TorchAoConfig
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils import CONFIG_NAME

from ..conversion.staging import check_apart, staged_folder
from ..modeling.adapters_mplug_owl2 import find_file, read_settings
from ..modeling.loading_mplug_owl2 import UNQUANTIZED
from ..modeling.modeling_mplug_owl2 import MplugOwl2ForConditionalGeneration
from ..naming import naming_model, place
from ..processing.processing_mplug_owl2 import MplugOwl2Processor
from ..scoring.opinions import load_opinions
from .card import write_compressed_card
from .losses import QUESTIONS, Losses, Trial

TYPES = ("int8", "int4", "fp8")
TOOLS = ("torchao", "llmcompressor")
# Columns that share a scale in int4. The largest that divides all widths is used.
GROUP_SIZES = (128, 64, 32, 16, 8)
_PACKED = 8  # columns of 4 bits that llmcompressor stores in one number
_LICENSES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt", "NOTICE.md")
_INSTALL = {
    "torchao": "pip install 'owl2_hf[quantization]'",
    "llmcompressor": "pip install llmcompressor, in an environment of its own: it needs an older "
    "transformers (5.17 works with owl2_hf)",
}


@dataclass(frozen=True)
class QuantizeReport:
    """What was made.

    Args:
        to: Type of the rounded weights.
        by: Package that rounded them.
        group_size: Columns that share a scale; `None` where a row has one.
        matrices: How many were rounded.
        num_bytes: Size of the weight files.
        bytes_before: Size of all weights in 16 bits.
        losses: What was lost.
    """

    to: str
    by: str
    group_size: int | None
    matrices: int
    num_bytes: int
    bytes_before: int
    losses: Losses

    def summary(self) -> str:
        """Two sentences."""
        scale = "row" if self.group_size is None else f"{self.group_size} columns of a row"
        sizes = f"{self.num_bytes / 1e6:,.1f} MB, {self.bytes_before / 1e6:,.1f} MB with 16 bits"
        return (
            f"{self.matrices} matrices of the decoder are quantised to {self.to} with {self.by}, "
            f"with a scale for each {scale}. The weights take {sizes}."
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**vars(self), "losses": self.losses.to_dict()}


def quantize(
    model: str,
    target: str | Path,
    to: str = "int8",
    by: str = "torchao",
    group_size: int | None = None,
    data: Any = None,
    image_folder: str | Path | None = None,
    split: str | None = None,
    images: Sequence[str] = (),
    questions: Sequence[str] = QUESTIONS,
    device: str | None = None,
    overwrite: bool = False,
) -> QuantizeReport:
    """Write a model folder with rounded weights, and a card that says what was lost.

    Args:
        model: Folder or Hub id of a model, `default` or `default-scorer`.
        target: Folder to make.
        to: int8, int4 or fp8.
        by: torchao, or llmcompressor, which packs two weights of int4 into a byte.
        group_size: Columns that share a scale in int4. Default: the largest of 128, 64, 32, 16 and
            8 that divides all widths.
        data: Opinions to judge a scorer by, as `load_opinions` takes them.
        image_folder: What paths of images in `data` start from.
        split: Judge by this part of the rows alone.
        images: Files and folders to test the model on, instead of opinions. Default: the bundled
            images.
        questions: What a model that does not score is asked about each image.
        device: Where to measure, for instance cuda:0.
        overwrite: A model may stand in the target.

    Raises:
        ValueError: If the model is of another kind or already rounded, a package is missing, no
            group size fits, opinions or images cannot be read, or the saved folder gives other
            results than before saving.
    """
    target, source = Path(target), place(model)
    _check(to, by, group_size)
    check_apart(target, Path(source))
    _check_free(target, overwrite)
    opinions = None if data is None else load_opinions(data, image_folder, split)
    with naming_model(model):
        whole = _load(source, device)
        processor = AutoProcessor.from_pretrained(source)
        taken = _matrices(whole)
        group = _group_size(taken, group_size) if to == "int4" else None
    trial = Trial(whole, opinions, images, questions, split)
    before = trial(whole, processor)
    # By address, so that tied tables count once.
    tensors = {tensor.data_ptr(): tensor for tensor in whole.state_dict().values()}
    bytes_before = 2 * sum(tensor.numel() for tensor in tensors.values())
    dtype = torch.bfloat16 if whole.dtype == torch.float32 else whole.dtype
    del whole  # frees its memory before the next model is loaded
    rounded = (
        _round_by_torchao(source, to, group, dtype)
        if by == "torchao"
        else _round_by_llmcompressor(source, to, group, dtype)
    )
    rounded = (rounded.to(device) if device else rounded).eval()
    with staged_folder(target, overwrite) as staging:
        expected = _logits(rounded, processor, trial.images[0])
        _save(rounded, processor, source, staging, by)
        del rounded
        saved = _load(str(staging), device, is_rounded=True)
        if not torch.equal(_logits(saved, processor, trial.images[0]), expected):
            raise ValueError(
                f"{target}: the saved model gives other results than before saving: do not use it."
            )
        files = staging.glob("model*.safetensors")
        report = QuantizeReport(
            to=to,
            by=by,
            group_size=group,
            matrices=len(taken),
            num_bytes=sum(file.stat().st_size for file in files),
            bytes_before=bytes_before,
            losses=Losses(trial.subject, before, trial(saved, processor), trial.preset is not None),
        )
        write_compressed_card(staging, target.resolve().name, source, report, trial.preset)
    return report


def _check(to: str, by: str, group_size: int | None) -> None:
    """What is asked for is known, and the package is there."""
    if to not in TYPES:
        raise ValueError(f"expected a type of {', '.join(TYPES)}, got {to!r}.")
    if by not in TOOLS:
        raise ValueError(f"expected {' or '.join(TOOLS)} to quantise with, got {by!r}.")
    if group_size is not None and to != "int4":
        raise ValueError(f"only int4 has a group size, got {to}: leave it out.")
    if group_size is not None and (group_size < _PACKED or group_size % _PACKED):
        raise ValueError(
            f"expected a group size that is a multiple of {_PACKED}, got {group_size}."
        )
    # It logs every step to stdout.
    os.environ.setdefault("LLM_COMPRESSOR_LOG_DISABLED", "true")
    try:
        __import__(by)
    except ImportError as error:
        raise ValueError(f"{by} cannot be imported ({error}): {_INSTALL[by]}.") from None


def _check_free(target: Path, overwrite: bool) -> None:
    """Before the model is measured; at the end the folder is looked at again."""
    if not overwrite and target.is_dir() and any(target.iterdir()):
        raise ValueError(
            f"{target} is not empty: remove it, choose another, or overwrite it (--overwrite)."
        )


def _load(
    source: str, device: str | None, is_rounded: bool = False
) -> MplugOwl2ForConditionalGeneration:
    """A model that writes text, in evaluation mode.

    Raises:
        ValueError: If it is already rounded, an adapter, a classifier, or of another kind.
    """
    if not is_rounded and read_settings(source, {}) is not None:
        raise ValueError(f"{source} holds an adapter: merge it first, as docs/adapters.md shows.")
    model = AutoModelForImageTextToText.from_pretrained(source)
    if not isinstance(model, MplugOwl2ForConditionalGeneration):
        raise ValueError(f"expected a model of this package, got {type(model).__name__}.")
    if not is_rounded and getattr(model, "hf_quantizer", None) is not None:
        raise ValueError("its weights are quantised already: use the unquantised model.")
    return (model.to(device) if device else model).eval()


def _matrices(model: MplugOwl2ForConditionalGeneration) -> dict[str, nn.Linear]:
    """Those that are rounded, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and should_convert_module(name, UNQUANTIZED)
    }


def _group_size(matrices: dict[str, nn.Linear], given: int | None) -> int:
    """Columns that share a scale.

    Raises:
        ValueError: It does not divide a width, or none does.
    """
    widths = sorted({module.in_features for module in matrices.values()})
    for size in GROUP_SIZES if given is None else (given,):
        if not any(width % size for width in widths):
            return size
    found = f"widths {', '.join(map(str, widths))}"
    if given is None:
        raise ValueError(
            f"int4 needs widths that are multiples of {GROUP_SIZES[-1]}, got {found}: use int8."
        )
    raise ValueError(f"expected a group size that divides its {found}, got {given}.")


def _round_by_torchao(
    source: str, to: str, group: int | None, dtype: torch.dtype
) -> MplugOwl2ForConditionalGeneration:
    from torchao.quantization import (
        Float8WeightOnlyConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        PerGroup,
    )

    kinds = {
        "int8": lambda: Int8WeightOnlyConfig(),
        "fp8": lambda: Float8WeightOnlyConfig(),
        # torchao's packed int4 runs only on GPUs; this one runs everywhere.
        "int4": lambda: IntxWeightOnlyConfig(getattr(torch, "int4"), PerGroup(group)),  # noqa: B009
    }
    return AutoModelForImageTextToText.from_pretrained(
        source, dtype=dtype, quantization_config=TorchAoConfig(kinds[to]())
    )


def _round_by_llmcompressor(
    source: str, to: str, group: int | None, dtype: torch.dtype
) -> MplugOwl2ForConditionalGeneration:
    from compressed_tensors.offload import remove_dispatch
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier

    model = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype)
    weights = QuantizationArgs(
        num_bits=4 if to == "int4" else 8,
        type="float" if to == "fp8" else "int",
        strategy="channel" if group is None else "group",
        group_size=group,
        symmetric=True,
    )
    taken = _matrices(model)
    others = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name not in taken
    ]
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    oneshot(
        model=model, recipe=QuantizationModifier(config_groups={"group_0": scheme}, ignore=others)
    )
    remove_dispatch(model)  # its hooks turn the named tuples between layers into plain tuples
    return model


def _save(
    model: MplugOwl2ForConditionalGeneration,
    processor: MplugOwl2Processor,
    source: str,
    folder: Path,
    by: str,
) -> None:
    """The model, its processor, and the files that its licence asks to keep."""
    if by == "llmcompressor":
        # Otherwise llmcompressor copies the source's config.json, with its dtype and layout.
        model.config._name_or_path = ""
    model.save_pretrained(folder)
    (folder / "recipe.yaml").unlink(missing_ok=True)
    processor.save_pretrained(folder)
    for name in _LICENSES:
        file = find_file(source, name, {})
        if file is not None:
            shutil.copyfile(file, folder / name)
    config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    assert "quantization_config" in config, "the configuration has no quantization_config"


@torch.no_grad()
def _logits(
    model: MplugOwl2ForConditionalGeneration, processor: MplugOwl2Processor, image: str
) -> Tensor:
    """(1, L, V) logits of a prompt with an image, on the CPU."""
    inputs = processor(
        images=[[image]], text=["USER: <|image|>What is this? ASSISTANT:"], return_tensors="pt"
    )
    return model(**inputs.to(model.device, dtype=model.dtype)).logits.cpu()
