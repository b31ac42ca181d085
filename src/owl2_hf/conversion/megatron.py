"""Checkpoints of Megatron, which mPLUG-Owl2 was trained with, also split over several
tensor-parallel ranks.

The published converter of the original reads one rank. How tensors are split over ranks follows
Megatron's parallel layers: projections into a wider space by output rows, projections out of it by
input columns, tables of tokens by rows, norms not at all. It is checked on checkpoints that were
cut that way from whole ones, never on one of a real two-rank run, because none was published.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..modeling.configuration_mplug_owl2 import MplugOwl2Config
from ..modeling.conversion_mplug_owl2 import PADDED, original_key, split_number, to_original
from .reading import ConversionError, check_tensor, describe, read_tensors
from .sources import OnFile, Piece, expected_tensors, nobody, read_config, rename

_TRACKER = "latest_checkpointed_iteration.txt"
_WEIGHT_NAMES = ("model_optim_rng.pt", "model_rng.pt")
_LLM, _LLM_LAYER = "language_model.", "language_model.encoder.layers.{}."
_VIT, _VIT_LAYER = "vision_model.", "vision_model.transformer.layers.{}."
_ABSTRACTOR, _ABSTRACTOR_LAYER = "vision_abstractor.", "vision_abstractor.transformer.layers.{}."
_TO_LAYER = "model.layers.{}."
_TO_VIT, _TO_VIT_LAYER = "model.vision_model.", "model.vision_model.encoder.layers.{}."
_TO_ABSTRACTOR = "model.visual_abstractor."
_TO_CROSS = _TO_ABSTRACTOR + "encoder.layers.{}.crossattention."

Split = int | None


def _linear(source: str, target: str, dim: int, bias: bool = False) -> dict[str, tuple[str, Split]]:
    """A bias follows the output rows; beside a weight that is split by columns it is whole."""
    names: dict[str, tuple[str, Split]] = {f"{source}.weight": (f"{target}.weight", dim)}
    if bias:
        names[f"{source}.bias"] = f"{target}.bias", 0 if dim == 0 else None
    return names


def _whole(
    source: str, target: str, leaves: tuple[str, ...] = ("weight", "bias")
) -> dict[str, tuple[str, Split]]:
    return {f"{source}.{leaf}": (f"{target}.{leaf}", None) for leaf in leaves}


# Megatron's name -> the original's name in the Hugging Face layout, and the dimension that is split
# over ranks.
RENAMED: dict[str, tuple[str, Split]] = {
    _LLM + "embedding.word_embeddings.weight": ("model.embed_tokens.weight", 0),
    _LLM + "encoder.lm_head.weight": ("lm_head.weight", 0),
    **_whole(_LLM + "encoder.norm", "model.norm", ("weight",)),
    **_linear(_LLM_LAYER + "self_attention.q_proj", _TO_LAYER + "self_attn.q_proj", 0),
    **_linear(_LLM_LAYER + "self_attention.o_proj", _TO_LAYER + "self_attn.o_proj", 1),
    **_linear(_LLM_LAYER + "mlp.gate_proj", _TO_LAYER + "mlp.gate_proj", 0),
    **_linear(_LLM_LAYER + "mlp.up_proj", _TO_LAYER + "mlp.up_proj", 0),
    **_linear(_LLM_LAYER + "mlp.down_proj", _TO_LAYER + "mlp.down_proj", 1),
    _VIT + "cls_token": (_TO_VIT + "embeddings.cls_token", None),
    _VIT + "position_embeddings": (_TO_VIT + "embeddings.position_embedding", None),
    _VIT + "patch_embed.weight": (_TO_VIT + "embeddings.patch_embed.weight", None),
    **_whole(_VIT + "pre_layernorm", _TO_VIT + "embeddings.pre_layernorm"),
    **_whole(_VIT + "transformer.final_layernorm", _TO_VIT + "post_layernorm"),
    **_whole(_VIT_LAYER + "input_layernorm", _TO_VIT_LAYER + "input_layernorm"),
    **_whole(_VIT_LAYER + "post_attention_layernorm", _TO_VIT_LAYER + "post_attention_layernorm"),
    **_linear(
        _VIT_LAYER + "self_attention.query_key_value",
        _TO_VIT_LAYER + "self_attn.query_key_value",
        0,
        bias=True,
    ),
    **_linear(_VIT_LAYER + "self_attention.dense", _TO_VIT_LAYER + "self_attn.dense", 1, bias=True),
    **_linear(_VIT_LAYER + "mlp.dense_h_to_4h", _TO_VIT_LAYER + "mlp.fc1", 0, bias=True),
    **_linear(_VIT_LAYER + "mlp.dense_4h_to_h", _TO_VIT_LAYER + "mlp.fc2", 1, bias=True),
    _ABSTRACTOR + "learnable_queries": (_TO_ABSTRACTOR + "query_embeds", None),
    _ABSTRACTOR + "vit_eos": (_TO_ABSTRACTOR + "vit_eos", None),
    **_linear(_ABSTRACTOR + "visual_fc", _TO_ABSTRACTOR + "visual_fc", 0, bias=True),
    **_linear(
        _ABSTRACTOR_LAYER + "self_attention.o_proj", _TO_CROSS + "output.out_proj", 1, bias=True
    ),
    **_whole(_ABSTRACTOR_LAYER + "norm1", _TO_CROSS + "norm1"),
    **_whole(_ABSTRACTOR_LAYER + "normk", _TO_CROSS + "normk"),
    **_whole(_ABSTRACTOR_LAYER + "norm2", _TO_CROSS + "output.norm2"),
    **_linear(_ABSTRACTOR_LAYER + "mlp.w1", _TO_CROSS + "output.mlp.w1", 0, bias=True),
    **_linear(_ABSTRACTOR_LAYER + "mlp.w3", _TO_CROSS + "output.mlp.w3", 0, bias=True),
    **_linear(_ABSTRACTOR_LAYER + "mlp.w2", _TO_CROSS + "output.mlp.w2", 1, bias=True),
    # This norm is applied to the outputs of w1 and w3.
    _ABSTRACTOR_LAYER + "mlp.ffn_ln.weight": (_TO_CROSS + "output.mlp.ffn_ln.weight", 0),
    _ABSTRACTOR_LAYER + "mlp.ffn_ln.bias": (_TO_CROSS + "output.mlp.ffn_ln.bias", 0),
}
for _branch in (0, 1):
    for _module in ("k_proj", "v_proj"):
        RENAMED.update(
            _linear(
                f"{_LLM_LAYER}self_attention.{_module}.multiway.{_branch}",
                f"{_TO_LAYER}self_attn.{_module}.multiway.{_branch}",
                0,
            )
        )
    for _module in ("input_layernorm", "post_attention_layernorm"):
        _name = f"{_module}.multiway.{_branch}"
        RENAMED.update(_whole(_LLM_LAYER + _name, _TO_LAYER + _name, ("weight",)))
for _ours, _theirs in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
    RENAMED.update(
        _linear(
            f"{_ABSTRACTOR_LAYER}self_attention.{_theirs}",
            f"{_TO_CROSS}attention.{_ours}",
            0,
            bias=True,
        )
    )


class _Settings:
    """Takes the place of `argparse.Namespace` in a pickle: a bag of values that nothing is done
    with.
    """


class _Ignored:
    """Takes the place of numpy's arrays in a pickle, the state of random numbers: built from
    anything, kept nowhere.
    """

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


_STAND_INS = [
    (_Settings, "argparse.Namespace"),
    *[
        (_Ignored, name)
        for name in (
            "numpy.ndarray",
            "numpy.dtype",
            "numpy.core.multiarray._reconstruct",
            "numpy._core.multiarray._reconstruct",
            "numpy.core.multiarray.scalar",
            "numpy._core.multiarray.scalar",
        )
    ],
]


def is_megatron(folder: Path) -> bool:
    """Whether a folder holds ranks of Megatron, or the iterations that hold them."""
    return (folder / _TRACKER).is_file() or any(
        path.is_dir() and re.fullmatch(r"release|iter_\d+|mp_rank_\d+(_\d+)?", path.name)
        for path in folder.iterdir()
    )


def rank_files(folder: Path) -> list[Path]:
    """The weights of every tensor-parallel rank, in order.

    Raises:
        ConversionError: If it is not clear which iteration is meant, or a rank is missing.
    """
    folder = _iteration(folder)
    ranks = sorted(
        path for path in folder.iterdir() if path.is_dir() and path.name.startswith("mp_rank_")
    )
    if pipeline := [path.name for path in ranks if not re.fullmatch(r"mp_rank_\d+", path.name)]:
        raise ConversionError(
            f"{folder} has {pipeline[0]!r}: checkpoints with several pipeline stages are not "
            "supported."
        )
    expected = [folder / f"mp_rank_{rank:02d}" for rank in range(max(len(ranks), 1))]
    if missing := [path for path in expected if path not in ranks]:
        raise ConversionError(
            f"{missing[0]} does not exist, found only {[path.name for path in ranks]}."
        )
    return [_rank_file(path) for path in ranks]


def _rank_file(rank: Path) -> Path:
    for name in _WEIGHT_NAMES:
        if (rank / name).is_file():
            return rank / name
    raise ConversionError(f"{rank} contains no weights: expected {' or '.join(_WEIGHT_NAMES)}.")


def _iteration(folder: Path) -> Path:
    """The folder that holds the ranks: the one itself, what its tracker names, or the only one that
    there is.
    """
    if any(folder.glob("mp_rank_*")):
        return folder
    tracker = folder / _TRACKER
    iterations = [
        path
        for path in folder.iterdir()
        if path.is_dir() and re.fullmatch(r"release|iter_\d+", path.name)
    ]
    if not tracker.is_file():
        if len(iterations) == 1:
            return iterations[0]
        names = ", ".join(sorted(path.name for path in iterations))
        raise ConversionError(
            f"{folder} has no {_TRACKER} and contains {names}: choose one of these folders."
        )
    with tracker.open("rb") as file:
        content = file.read(64).decode("ascii", "replace").strip()
    if content != "release" and not re.fullmatch(r"\d{1,12}", content):
        raise ConversionError(
            f"{tracker}: expected 'release' or the number of an iteration, got {content!r}."
        )
    pattern = content if content == "release" else rf"iter_0*{int(content)}"
    found = [path for path in iterations if re.fullmatch(pattern, path.name)]
    if not found:
        raise ConversionError(f"{tracker} names {content}, which does not exist.")
    return found[0]


@dataclass
class MegatronSource:
    """Ranks of Megatron.

    Args:
        folder: Where the ranks, their iteration or their release are.
        base: Folder with the config.json and tokenizer that belong to the weights, where `folder`
            has none. Without either the published model's configuration is taken.
    """

    folder: Path
    base: Path | None = None
    files: list[Path] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.layout = "Megatron"
        self.files = rank_files(self.folder)
        if len(self.files) > 1:
            self.layout += f", {len(self.files)} tensor-parallel ranks"
        with_config = [
            path for path in (self.base, self.folder) if path and (path / "config.json").is_file()
        ]
        if self.base and not with_config:
            raise ConversionError(f"{self.base}: expected a folder with config.json, got none.")
        self.is_published = not with_config
        self.config = MplugOwl2Config() if self.is_published else read_config(with_config[0])[0]
        self.folder = with_config[0] if with_config else self.folder

    def read(self, on_file: OnFile = nobody, meta: bool = False) -> Iterator[Piece]:
        shapes = _original_shapes(self.config)
        ranks = []
        for file in self.files:
            on_file(file)
            ranks.append(self._read_rank(file))
        for other, file in zip(ranks[1:], self.files[1:], strict=True):
            if different := sorted(ranks[0].keys() ^ other.keys()):
                raise ConversionError(
                    f"{file}, tensor {different[0]!r}: not every rank has this tensor."
                )
        for key in list(ranks[0]):
            where = describe(self.files[0], key)
            template, number = split_number(key)
            if template not in RENAMED:
                raise ConversionError(f"{where}: mPLUG-Owl2 has no such parameter.")
            target, dim = RENAMED[template]
            target = target.format(number)
            if target not in shapes:
                raise ConversionError(
                    f"{where}: the model of config.json has no such parameter{self._hint()}."
                )
            parts = [check_tensor(where, rank.pop(key), meta) for rank in ranks]
            try:
                tensor = merge_ranks(parts, dim, shapes[target], may_be_padded=target in PADDED)
            except ValueError as error:
                raise ConversionError(f"{where}: {error}{self._hint()}.") from None
            yield Piece(where, key, rename(where, target, tensor, self.config))

    def _hint(self) -> str:
        hint = (
            "; the checkpoint has no config.json, so the published model's sizes are expected: "
            "pass a folder with config.json as --base"
        )
        return hint if self.is_published else ""

    def _read_rank(self, file: Path) -> dict[str, Any]:
        loaded = read_tensors(file, allowed=_STAND_INS)
        model = loaded.get("model")
        if not isinstance(model, dict) or not model:
            raise ConversionError(
                f"{file}: expected a 'model' with its parameters, as Megatron saves it."
            )
        settings = vars(loaded["args"]) if isinstance(loaded.get("args"), _Settings) else {}
        size = settings.get("tensor_model_parallel_size", settings.get("model_parallel_size"))
        if isinstance(size, int) and size != len(self.files):
            raise ConversionError(
                f"{file}: expected {size} tensor-parallel ranks, got {len(self.files)}."
            )
        return dict(_flatten(model))


def _flatten(values: dict[str, Any], prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and depth < 8:
            yield from _flatten(value, f"{prefix}{key}.", depth + 1)
        else:
            yield f"{prefix}{key}", value


def _original_shapes(config: MplugOwl2Config) -> dict[str, torch.Size]:
    expected = expected_tensors(config)
    shapes = {}
    for name in expected:
        key, parts = original_key(name)
        shapes[key] = to_original(key, {part: expected[part] for part in parts}, config).shape
    return shapes


def merge_ranks(
    parts: list[Tensor], dim: Split, shape: torch.Size, may_be_padded: bool = False
) -> Tensor:
    """One tensor from what each tensor-parallel rank holds of it.

    Args:
        parts: One for each rank, in order.
        dim: Dimension along which ranks split it; `None` where each holds the whole.
        shape: Of the whole.
        may_be_padded: Megatron pads tables of tokens with rows that no token has; they are cut off.

    Raises:
        ValueError: If the parts do not make up the whole.
    """
    if all(part.shape == shape for part in parts):
        if parts[0].is_meta or all(torch.equal(parts[0], part) for part in parts[1:]):
            return parts[0]
        if not may_be_padded:  # half of a padded table may be as long as the table
            raise ValueError("expected equal values in all ranks, got different ones")
    shapes = [tuple(part.shape) for part in parts]
    try:
        merged = torch.cat(parts, dim=dim or 0)
    except (RuntimeError, IndexError):
        raise ValueError(f"expected parts of shape {tuple(shape)}, got {shapes}") from None
    if may_be_padded and merged.shape[1:] == shape[1:] and merged.shape[0] > shape[0]:
        merged = merged[: shape[0]]
    if (dim is None and len(parts) > 1) or merged.shape != shape:
        raise ValueError(
            f"expected shape {tuple(shape)} by the configuration, got {shapes} from {len(parts)} "
            "ranks"
        )
    return merged
