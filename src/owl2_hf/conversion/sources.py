"""Read every layout as a stream of tensors with the names of this package."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.utils import CONFIG_NAME

from ..modeling.configuration_mplug_owl2 import MAX_LAYERS, MAX_SIZE, MplugOwl2Config
from ..modeling.conversion_mplug_owl2 import owner_of, to_ours
from ..modeling.modeling_mplug_owl2 import (
    MplugOwl2ForConditionalGeneration,
    MplugOwl2PreTrainedModel,
)
from ..modeling.modeling_mplug_owl2_classification import MplugOwl2ForSequenceClassification
from ..processing.tokenization_mplug_owl2 import read_json
from .reading import (
    ConversionError,
    check_tensor,
    describe,
    has_weights,
    read_tensors,
    weight_files,
)

_MODEL_TYPES = ("mplug_owl2", "mplug_owl2_1", "mplug_docowl")
_SIZES = ("num_", "_size", "head_dim", "projection_dim", "max_position_embeddings")


OnFile = Callable[[Path], None]


def nobody(path: Path) -> None:
    """For whoever does not want to hear of files."""


@dataclass
class Piece:
    """One tensor of a source.

    Args:
        where: File and tensor, as errors name them.
        key: The source's own name.
        tensors: Our names and what goes there; none where the tensor is dropped on purpose.
    """

    where: str
    key: str
    tensors: list[tuple[str, Tensor]]


class Source(Protocol):
    """A checkpoint to read.

    Args:
        layout: What it is, in words.
        folder: Where its configuration, tokenizer and preprocessing settings are.
        config: Our configuration of the model.
        files: Everything that is read for the weights.
    """

    layout: str
    folder: Path
    config: MplugOwl2Config
    files: list[Path]

    def read(self, on_file: OnFile = nobody, meta: bool = False) -> Iterator[Piece]:
        """All tensors, file by file.

        Args:
            on_file: Hears of each file before it is read.
            meta: Shapes and dtypes alone, for a plan.
        """


@dataclass
class HuggingFaceSource:
    """A folder with config.json and weights, in the original's layout or in ours."""

    folder: Path
    config: MplugOwl2Config
    is_original: bool
    files: list[Path] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.layout = (
            "the original's Hugging Face layout" if self.is_original else "this package's format"
        )
        self._placed = weight_files(self.folder)
        self.files = list(self._placed)

    def read(self, on_file: OnFile = nobody, meta: bool = False) -> Iterator[Piece]:
        for file, placed in self._placed.items():
            on_file(file)
            tensors = read_tensors(file)
            if lost := sorted((placed or set()) - tensors.keys()):
                raise ConversionError(
                    f"{file}, tensor {lost[0]!r}: the index names it, but the file does not "
                    "contain it."
                )
            while tensors:
                # Free each tensor after use, and the file after the last one.
                key = next(iter(tensors))
                yield self._piece(file, key, tensors.pop(key), meta)

    def _piece(self, file: Path, key: str, tensor: Tensor, meta: bool) -> Piece:
        where = describe(file, key)
        tensor = check_tensor(where, tensor, meta)
        return Piece(
            where,
            key,
            rename(where, key, tensor, self.config) if self.is_original else [(key, tensor)],
        )


def rename(
    where: str, key: str, tensor: Tensor, config: MplugOwl2Config
) -> list[tuple[str, Tensor]]:
    """One tensor of the original under our names, with errors that say where it stands."""
    try:
        return list(to_ours(key, tensor, config))
    except KeyError:
        ours = "mPLUG-Owl2.1" if config.is_owl21 else "mPLUG-Owl2"
        owner = owner_of(key)
        if owner is not None:
            raise ConversionError(
                f"{where}: it is a parameter of {owner}, but config.json is for {ours}."
            ) from None
        raise ConversionError(f"{where}: {ours} has no such parameter.") from None
    except ValueError as error:
        raise ConversionError(f"{where}: {error}.") from None


def model_class(config: MplugOwl2Config) -> type[MplugOwl2PreTrainedModel]:
    """The class of a checkpoint: one that answers, or Q-Scorer's."""
    is_scorer = getattr(config, "deepmlp_hidden_dims", None) is not None
    return MplugOwl2ForSequenceClassification if is_scorer else MplugOwl2ForConditionalGeneration


def expected_tensors(config: MplugOwl2Config) -> dict[str, Tensor]:
    """Every tensor of a saved model by name, on the meta device."""
    with torch.device("meta"):
        state_dict = model_class(config)(config).state_dict()
    if config.tie_word_embeddings:
        del state_dict["lm_head.weight"]
    return state_dict


def read_config(folder: Path) -> tuple[MplugOwl2Config, bool]:
    """Our configuration from a folder's config.json, and whether it is in the original's form.

    Raises:
        ConversionError: If it is missing, broken, another model's, or of sizes that no model has.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise ConversionError(f"{path} does not exist: expected the config.json of the checkpoint.")
    try:
        values = read_json(path)
    except ValueError as error:
        raise ConversionError(str(error)) from None
    # Upstream: DocOwl2 has DocOwl 1.5's model_type; MplugOwl2Config detects it.
    if (found := values.get("model_type")) not in _MODEL_TYPES:
        expected = " or ".join(map(repr, _MODEL_TYPES))
        raise ConversionError(
            f"{path}: expected model_type {expected}, got {found!r}; nothing was converted."
        )
    # Drop references to the source's code and settings that belong to the machine that saved it.
    for name in (
        "auto_map",
        "quantization_config",
        "_attn_implementation",
        "attn_implementation",
        "_name_or_path",
    ):
        values.pop(name, None)
    is_original = "visual_config" in values
    if (
        is_original
        and found == "mplug_owl2_1"
        and (num_tokens := _rows_of(folder, "transformer.wte.weight"))
    ):
        values["vocab_size"] = num_tokens
    _check_sizes(path, values)
    for name in values:
        if callable(getattr(MplugOwl2Config, name, None)):
            raise ConversionError(f"{path}: {name!r} is not a setting of a model.")
    try:
        config = MplugOwl2Config.from_dict(values)
        expected_tensors(config)
    except Exception as error:  # wrong values raise almost any error
        reason = str(error.__cause__ or error) or "no reason given"
        raise ConversionError(
            f"{path}: cannot build a model of this configuration: {reason} ({type(error).__name__})"
        ) from None
    return config, is_original


def _rows_of(folder: Path, key: str) -> int | None:
    """Rows of one tensor of the weights; `None` where it is not there."""
    if not has_weights(folder):
        return None
    for file, placed in weight_files(folder).items():
        if (placed is None or key in placed) and key in (tensors := read_tensors(file)):
            table = check_tensor(describe(file, key), tensors[key], meta=True)
            return table.shape[0] if table.ndim else None
    return None


def _check_sizes(path: Path, values: dict[str, Any]) -> None:
    """Before a model of a billion layers is built."""
    for name, value in values.items():
        if isinstance(value, dict):
            _check_sizes(path, value)
        elif isinstance(value, int) and (name.startswith(_SIZES) or name.endswith(_SIZES)):
            least = 0 if "ngram" in name else 1
            most = MAX_LAYERS if name == "num_hidden_layers" else MAX_SIZE
            if not least <= value <= most:
                raise ConversionError(
                    f"{path}: expected {name} from {least} to {most}, got {value}."
                )
