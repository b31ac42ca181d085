"""Map the original's parameter names and layouts to this package's, and back.

`{}` stands for a layer number; `None` marks what is dropped on purpose, because the model computes
it. The inverse is derived. Importing this file tells transformers how to load a checkpoint in the
original's layout.

This is one file because it is one table, read in both directions.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.configuration_utils import PreTrainedConfig
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Chunk, ConversionOps, WeightConverter, WeightRenaming

from .configuration_mplug_owl2 import MplugOwl2Config

_LAYER = "model.layers.{}."
_OUR_LAYER = "model.language_model.layers.{}."
_VIT = "model.vision_model."
_OUR_VIT = "model.vision_tower."
_ABSTRACTOR = "model.visual_abstractor."
_REDUCER = "model.vision2text."
_OUR_REDUCER = "model.h_reducer."
_CROSS = _ABSTRACTOR + "encoder.layers.{}.crossattention."
_OUR_CROSS = _ABSTRACTOR + "layers.{}."


def _with_bias(source: str, target: str) -> dict[str, str | None]:
    return {f"{source}.{leaf}": f"{target}.{leaf}" for leaf in ("weight", "bias")}


def _adaptive(module: str, parent: str = "") -> dict[str, str | None]:
    """The original's `multiway.0` is the text branch, `multiway.1` the visual one."""
    source, target = f"{_LAYER}{parent}{module}.multiway", f"{_OUR_LAYER}{parent}"
    return {
        f"{source}.{branch}.{leaf}": f"{target}{prefix}{module}.{leaf}"
        for branch, prefix in enumerate(("", "visual_"))
        for leaf in ("weight", "bias")
    }


RENAMED: dict[str, str | None] = {
    "lm_head.weight": "lm_head.weight",
    "model.embed_tokens.weight": "model.language_model.embed_tokens.weight",
    "model.norm.weight": "model.language_model.norm.weight",
    **_with_bias(_LAYER + "self_attn.q_proj", _OUR_LAYER + "self_attn.q_proj"),
    **_with_bias(_LAYER + "self_attn.o_proj", _OUR_LAYER + "self_attn.o_proj"),
    **_adaptive("k_proj", "self_attn."),
    **_adaptive("v_proj", "self_attn."),
    **_adaptive("input_layernorm"),
    **_adaptive("post_attention_layernorm"),
    **_with_bias(_LAYER + "mlp.gate_proj", _OUR_LAYER + "mlp.gate_proj"),
    **_with_bias(_LAYER + "mlp.up_proj", _OUR_LAYER + "mlp.up_proj"),
    **_with_bias(_LAYER + "mlp.down_proj", _OUR_LAYER + "mlp.down_proj"),
    _LAYER + "self_attn.rotary_emb.inv_freq": None,
    "model.rotary_emb.inv_freq": None,
    _VIT + "embeddings.cls_token": _OUR_VIT + "embeddings.cls_token",
    _VIT + "embeddings.position_embedding": _OUR_VIT + "embeddings.position_embedding",
    _VIT + "embeddings.patch_embed.weight": _OUR_VIT + "embeddings.patch_embedding.weight",
    **_with_bias(_VIT + "embeddings.pre_layernorm", _OUR_VIT + "embeddings.pre_layernorm"),
    **_with_bias(
        _VIT + "encoder.layers.{}.self_attn.dense", _OUR_VIT + "layers.{}.self_attn.out_proj"
    ),
    **_with_bias(_VIT + "encoder.layers.{}.input_layernorm", _OUR_VIT + "layers.{}.layer_norm1"),
    **_with_bias(
        _VIT + "encoder.layers.{}.post_attention_layernorm", _OUR_VIT + "layers.{}.layer_norm2"
    ),
    **_with_bias(_VIT + "encoder.layers.{}.mlp.fc1", _OUR_VIT + "layers.{}.mlp.fc1"),
    **_with_bias(_VIT + "encoder.layers.{}.mlp.fc2", _OUR_VIT + "layers.{}.mlp.fc2"),
    **_with_bias(_VIT + "post_layernorm", _OUR_VIT + "post_layernorm"),
    _ABSTRACTOR + "query_embeds": _ABSTRACTOR + "query_embeds",
    _ABSTRACTOR + "vit_eos": _ABSTRACTOR + "vit_eos",
    **_with_bias(_ABSTRACTOR + "visual_fc", _ABSTRACTOR + "visual_fc"),
    _CROSS + "attention.q_pos_embed": _OUR_CROSS + "cross_attn.q_pos_embed",
    _CROSS + "attention.k_pos_embed": _OUR_CROSS + "cross_attn.k_pos_embed",
    **_with_bias(_CROSS + "attention.query", _OUR_CROSS + "cross_attn.q_proj"),
    **_with_bias(_CROSS + "attention.key", _OUR_CROSS + "cross_attn.k_proj"),
    **_with_bias(_CROSS + "attention.value", _OUR_CROSS + "cross_attn.v_proj"),
    **_with_bias(_CROSS + "output.out_proj", _OUR_CROSS + "cross_attn.out_proj"),
    **_with_bias(_CROSS + "norm1", _OUR_CROSS + "query_layernorm"),
    **_with_bias(_CROSS + "normk", _OUR_CROSS + "image_layernorm"),
    **_with_bias(_CROSS + "output.norm2", _OUR_CROSS + "mlp_layernorm"),
    **_with_bias(_CROSS + "output.mlp.w1", _OUR_CROSS + "mlp.gate_proj"),
    **_with_bias(_CROSS + "output.mlp.w3", _OUR_CROSS + "mlp.up_proj"),
    **_with_bias(_CROSS + "output.mlp.w2", _OUR_CROSS + "mlp.down_proj"),
    **_with_bias(_CROSS + "output.mlp.ffn_ln", _OUR_CROSS + "mlp.layer_norm"),
    _REDUCER + "vit_eos": _OUR_REDUCER + "vit_eos",
    **_with_bias(_REDUCER + "ln_q", _OUR_REDUCER + "ln_q"),
    **_with_bias(_REDUCER + "reducer_before.0", _OUR_REDUCER + "reducer_before"),
    **_with_bias(_REDUCER + "reducer", _OUR_REDUCER + "reducer"),
    **_with_bias(_REDUCER + "visual_fc", _OUR_REDUCER + "visual_fc"),
}

# Upstream: one projection holds the vision encoder's queries, keys and values, interleaved head by
# head.
FUSED: dict[str, tuple[str, str, str]] = {
    f"{_VIT}encoder.layers.{{}}.self_attn.query_key_value.{leaf}": (
        f"{_OUR_VIT}layers.{{}}.self_attn.q_proj.{leaf}",
        f"{_OUR_VIT}layers.{{}}.self_attn.k_proj.{leaf}",
        f"{_OUR_VIT}layers.{{}}.self_attn.v_proj.{leaf}",
    )
    for leaf in ("weight", "bias")
}

# Tables with one row per token id; ours have rows for the image placeholder and padding after the
# original's.
PADDED = ("model.embed_tokens.weight", "lm_head.weight")

_QWEN = "transformer."
_QWEN_LAYER = _QWEN + "h.{}."


def _under_qwen(key: str) -> str:
    return _QWEN + key.removeprefix("model.")


# mPLUG-Owl2.1: Qwen's names in the decoder. The vision side has the same names with another prefix.
QWEN_RENAMED: dict[str, str | None] = {
    "lm_head.weight": "lm_head.weight",
    _QWEN + "wte.weight": "model.language_model.embed_tokens.weight",
    _QWEN + "ln_f.weight": "model.language_model.norm.weight",
    _QWEN_LAYER + "ln_1.weight": _OUR_LAYER + "input_layernorm.weight",
    _QWEN_LAYER + "ln_2.weight": _OUR_LAYER + "post_attention_layernorm.weight",
    **_with_bias(_QWEN_LAYER + "attn.c_proj", _OUR_LAYER + "self_attn.o_proj"),
    # Upstream: the second of the two goes through the activation.
    **_with_bias(_QWEN_LAYER + "mlp.w1", _OUR_LAYER + "mlp.up_proj"),
    **_with_bias(_QWEN_LAYER + "mlp.w2", _OUR_LAYER + "mlp.gate_proj"),
    **_with_bias(_QWEN_LAYER + "mlp.c_proj", _OUR_LAYER + "mlp.down_proj"),
    _QWEN + "rotary_emb.inv_freq": None,
    **{
        _under_qwen(key): target
        for key, target in RENAMED.items()
        if key.startswith((_VIT, _ABSTRACTOR))
    },
}
QWEN_FUSED = {_under_qwen(key): targets for key, targets in FUSED.items()}
# Upstream: one projection of each modality holds all queries, then all keys, then all values.
QWEN_STACKED: dict[str, tuple[str, str, str]] = {
    f"{_QWEN_LAYER}attn.c_attn.multiway.{branch}.{leaf}": (
        f"{_OUR_LAYER}self_attn.{prefix}q_proj.{leaf}",
        f"{_OUR_LAYER}self_attn.{prefix}k_proj.{leaf}",
        f"{_OUR_LAYER}self_attn.{prefix}v_proj.{leaf}",
    )
    for branch, prefix in enumerate(("", "visual_"))
    for leaf in ("weight", "bias")
}
QWEN_PADDED = (_QWEN + "wte.weight", "lm_head.weight")


# The head of Q-Scorer, a scorer based on mPLUG-Owl2.
Q_SCORER: dict[str, str | None] = {
    **_with_bias("deepmlp.model.{}.linear", "score.layers.{}"),
    **_with_bias("deepmlp.output_layer", "score.out_proj"),
}


class _Names(NamedTuple):
    """The names of one original."""

    renamed: Mapping[str, str | None]
    fused: Mapping[str, tuple[str, str, str]]
    stacked: Mapping[str, tuple[str, str, str]]
    padded: tuple[str, ...]


_OWL2 = _Names({**RENAMED, **Q_SCORER}, FUSED, {}, PADDED)
_OWL21 = _Names(QWEN_RENAMED, QWEN_FUSED, QWEN_STACKED, QWEN_PADDED)


def _names_of(config: MplugOwl2Config | None) -> _Names:
    return _OWL21 if config is not None and config.is_owl21 else _OWL2


def _inverse(names: _Names) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Our template -> the original's, and all of ours that go into it."""
    whole = {
        target: (source, (target,))
        for source, target in names.renamed.items()
        if target is not None
    }
    parts = {**names.fused, **names.stacked}
    return {
        **whole,
        **{target: (source, targets) for source, targets in parts.items() for target in targets},
    }


_LAYER_NUMBER = re.compile(
    r"(?:(?<=\.layers\.)|(?<=^transformer\.h\.)|(?<=^deepmlp\.model\.))\d+(?=\.)"
)
_ORIGINAL = _inverse(_OWL2)
_ORIGINAL_OWL21 = _inverse(_OWL21)


def split_query_key_value(fused: Tensor, num_heads: int) -> list[Tensor]:
    """(heads * 3 * head_dim, ...) interleaved as [head][q | k | v][head_dim] -> three of (heads *
    head_dim, ...).
    """
    per_head = fused.reshape(num_heads, 3, -1, *fused.shape[1:])
    return [per_head[:, i].reshape(-1, *fused.shape[1:]) for i in range(3)]


def merge_query_key_value(parts: list[Tensor], num_heads: int) -> Tensor:
    """Inverse of `split_query_key_value`."""
    per_head = [part.reshape(num_heads, -1, *part.shape[1:]) for part in parts]
    return torch.stack(per_head, dim=1).reshape(-1, *parts[0].shape[1:])


def resize_rows(table: Tensor, num_rows: int) -> Tensor:
    """(V, D) -> (num_rows, D): rows behind are cut off, or zeros put there."""
    missing = num_rows - table.shape[0]
    if missing <= 0:
        return table[:num_rows]
    return torch.cat([table, table.new_zeros(missing, *table.shape[1:])])


def to_ours(key: str, tensor: Tensor, config: MplugOwl2Config) -> Iterator[tuple[str, Tensor]]:
    """One tensor of the original under our names, none where it is dropped on purpose.

    Args:
        config: `MplugOwl2Config` of the model.

    Raises:
        KeyError: If the original has no such parameter.
        ValueError: If the tensor cannot be split or padded as its name asks.
    """
    template, number = split_number(key)
    names = _names_of(config)
    if template in names.stacked:
        width = config.text_config.num_attention_heads * config.text_config.head_dim
        if tensor.ndim == 0 or tensor.shape[0] != 3 * width:
            raise ValueError(
                f"expected {3 * width} rows (queries, keys, values), got {_rows(tensor)}"
            )
        targets = names.stacked[template]
        yield from (
            (target.format(number), part)
            for target, part in zip(targets, tensor.chunk(3), strict=True)
        )
        return
    if template in names.fused:
        vision = config.vision_config
        if tensor.ndim == 0 or tensor.shape[0] != 3 * vision.hidden_size:
            raise ValueError(
                f"expected {3 * vision.hidden_size} rows (queries, keys, values), got "
                f"{_rows(tensor)}"
            )
        parts = split_query_key_value(tensor, vision.num_attention_heads)
        yield from (
            (target.format(number), part)
            for target, part in zip(names.fused[template], parts, strict=True)
        )
        return
    target = names.renamed[template]
    if target is None:
        return
    if template in names.padded:
        if tensor.ndim == 0 or tensor.shape[0] != config.output_vocab_size:
            raise ValueError(
                f"expected {config.output_vocab_size} rows (vocab_size), got {_rows(tensor)}"
            )
        tensor = resize_rows(tensor, config.text_config.vocab_size)
    yield target.format(number), tensor


def owner_of(key: str) -> str | None:
    """Which of the originals has a parameter of this name; `None` where none has, or all."""
    template, _ = split_number(key)
    found = [
        name
        for name, names in (("mPLUG-Owl2", _OWL2), ("mPLUG-Owl2.1", _OWL21))
        if template in names.renamed or template in names.fused or template in names.stacked
    ]
    return found[0] if len(found) == 1 else None


def original_key(name: str, config: MplugOwl2Config | None = None) -> tuple[str, tuple[str, ...]]:
    """Where the original keeps one of our parameters: its key, and all of our names that go into
    it.

    Args:
        config: `MplugOwl2Config` of the model, where it may be another original than mPLUG-Owl2.

    Raises:
        KeyError: If the original has no such parameter.
    """
    template, number = split_number(name)
    source, targets = (_ORIGINAL_OWL21 if _names_of(config) is _OWL21 else _ORIGINAL)[template]
    return source.format(number), tuple(target.format(number) for target in targets)


def to_original(key: str, parts: Mapping[str, Tensor], config: MplugOwl2Config) -> Tensor:
    """The original's tensor from ours.

    Args:
        key: The original's, as `original_key` gives it.
        parts: Our tensors that go into it, by name.
        config: `MplugOwl2Config` of the model.
    """
    template, number = split_number(key)
    names = _names_of(config)
    if template in names.stacked:
        return torch.cat([parts[target.format(number)] for target in names.stacked[template]])
    if template in names.fused:
        ordered = [parts[target.format(number)] for target in names.fused[template]]
        return merge_query_key_value(ordered, config.vision_config.num_attention_heads)
    (tensor,) = parts.values()
    if template not in names.padded:
        return tensor
    return resize_rows(tensor, config.output_vocab_size or len(tensor))


def split_number(key: str) -> tuple[str, str]:
    """A parameter's name with `{}` for its layer number, and the number; empty where it has
    none.
    """
    layer = _LAYER_NUMBER.search(key)
    return _LAYER_NUMBER.sub("{}", key, count=1), layer.group() if layer else ""


def _rows(tensor: Tensor) -> int | str:
    return tensor.shape[0] if tensor.ndim else "a single number"


class SplitQueryKeyValue(ConversionOps):
    """transformers' step from the vision encoder's fused projection to ours."""

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Tensor | list[Tensor]],
        source_patterns: list[str],
        target_patterns: list[str],
        config: PreTrainedConfig,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        (fused,) = map(_single, input_dict.values())
        vision = getattr(config, "vision_config", config)
        head_dim = vision.hidden_size // vision.num_attention_heads
        parts = split_query_key_value(fused, fused.shape[0] // (3 * head_dim))
        return dict(zip(target_patterns, parts, strict=True))

    @property
    def reverse_op(self) -> "MergeQueryKeyValue":
        return MergeQueryKeyValue()


class MergeQueryKeyValue(ConversionOps):
    """Inverse of `SplitQueryKeyValue`."""

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Tensor | list[Tensor]],
        source_patterns: list[str],
        target_patterns: list[str],
        config: PreTrainedConfig,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        vision = getattr(config, "vision_config", config)
        head_dim = vision.hidden_size // vision.num_attention_heads
        parts = [_single(input_dict[pattern]) for pattern in source_patterns]
        return {target_patterns[0]: merge_query_key_value(parts, parts[0].shape[0] // head_dim)}

    @property
    def reverse_op(self) -> SplitQueryKeyValue:
        return SplitQueryKeyValue()


class PadVocabulary(ConversionOps):
    """transformers' step from a table with a row for each token to ours; a table that is ours
    already stays.
    """

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Tensor | list[Tensor]],
        source_patterns: list[str],
        target_patterns: list[str],
        config: PreTrainedConfig,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        (table,) = map(_single, input_dict.values())
        if config.is_owl21 and table.shape[0] < (config.output_vocab_size or 0):
            # Upstream: the released mPLUG-Owl2.1 has fewer rows than vocab_size in its
            # configuration.
            config.output_vocab_size = table.shape[0]
        if table.shape[0] == config.output_vocab_size:
            table = resize_rows(table, config.text_config.vocab_size)
        return {target_patterns[0]: table}

    @property
    def reverse_op(self) -> "TrimVocabulary":
        return TrimVocabulary()


class TrimVocabulary(ConversionOps):
    """Inverse of `PadVocabulary`."""

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Tensor | list[Tensor]],
        source_patterns: list[str],
        target_patterns: list[str],
        config: PreTrainedConfig,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        (table,) = map(_single, input_dict.values())
        return {
            target_patterns[0]: resize_rows(
                table, config.output_vocab_size or table.shape[0]
            ).clone()
        }

    @property
    def reverse_op(self) -> PadVocabulary:
        return PadVocabulary()


def _single(tensors: Tensor | list[Tensor]) -> Tensor:
    return tensors[0] if isinstance(tensors, list) else tensors


def _renaming(source: str, target: str) -> WeightRenaming:
    """Whole names on both sides, so that neither direction touches any other name."""
    left, right = (re.escape(name).replace(r"\{\}", "{}") for name in (source, target))
    return WeightRenaming("^" + left.replace("{}", r"(\d+)"), "^" + right.replace("{}", r"\1"))


def _fused_name(source: str) -> str:
    """Where a fused projection stands between renaming and splitting: in our layer, under the
    original's last name.
    """
    return f"{_OUR_VIT}layers.{{}}.self_attn." + ".".join(source.split(".")[-2:])


def _stacked_name(source: str) -> str:
    return f"{_OUR_LAYER}attn." + ".".join(source.split(".")[-4:])


def _renamings(names: _Names) -> list[WeightRenaming]:
    targets = {
        # A table that is padded keeps the last part of its name until then.
        source: target.removesuffix(_last_name(target)) + _last_name(source)
        if source in names.padded
        else target
        for source, target in names.renamed.items()
        if target
    }
    renamings = [
        _renaming(source, target) for source, target in targets.items() if source != target
    ]
    renamings += [_renaming(source, _fused_name(source)) for source in names.fused]
    return renamings + [_renaming(source, _stacked_name(source)) for source in names.stacked]


def _last_name(key: str) -> str:
    return ".".join(key.split(".")[-2:])


def _paddings(names: _Names) -> list[WeightConverter]:
    """By their last names alone: before transformers 5.21 a saved tensor takes the original's name
    from here.
    """
    return [
        WeightConverter(
            # After a plain "weight", compressed-tensors' loader (transformers 5.23) would add its
            # own step, which loses tables. The lookahead prevents that; transformers removes it
            # when saving.
            re.escape(_last_name(source)) + "(?!.)",
            re.escape(_last_name(names.renamed[source] or source)),
            operations=[PadVocabulary()],
        )
        for source in names.padded
    ]


_splits = [
    WeightConverter(
        rf"\.self_attn\.query_key_value\.{leaf}",
        [rf"\.self_attn\.{part}_proj\.{leaf}" for part in "qkv"],
        operations=[SplitQueryKeyValue()],
    )
    for leaf in ("weight", "bias")
]
# transformers identifies the steps of saving by these patterns, so none may equal one of the vision
# encoder's.
_stacks = [
    WeightConverter(
        rf"attn\.c_attn\.multiway\.{branch}\.{leaf}",
        [rf"self_attn\.{prefix}{part}_proj\.{leaf}" for part in "qkv"],
        operations=[Chunk(dim=0)],
    )
    for branch, prefix in enumerate(("", "visual_"))
    for leaf in ("weight", "bias")
]
# Remote code may be imported more than once.
for _model_type in ("mplug_owl2", "mplug_docowl"):
    register_checkpoint_conversion_mapping(
        _model_type, [*_renamings(_OWL2), *_paddings(_OWL2)], overwrite=True
    )
register_checkpoint_conversion_mapping(
    "mplug_owl2_1", [*_renamings(_OWL21), *_paddings(_OWL21), *_stacks], overwrite=True
)
register_checkpoint_conversion_mapping("mplug_owl2_vision", _splits, overwrite=True)
