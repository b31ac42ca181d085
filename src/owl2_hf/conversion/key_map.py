"""How the original's parameter names and layouts become ours: one table, pure `tensor -> tensors`.

`{}` stands for a layer number; `None` marks what is dropped on purpose, because the model computes it.
"""

import re
from collections.abc import Iterator

import torch
from torch import Tensor

from ..modeling.configuration_mplug_owl2 import MplugOwl2Config

_LAYER = "model.layers.{}."
_OUR_LAYER = "model.language_model.layers.{}."
_VIT = "model.vision_model."
_OUR_VIT = "model.vision_tower."
_ABSTRACTOR = "model.visual_abstractor."
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
    **_with_bias(_VIT + "encoder.layers.{}.self_attn.dense", _OUR_VIT + "layers.{}.self_attn.out_proj"),
    **_with_bias(_VIT + "encoder.layers.{}.input_layernorm", _OUR_VIT + "layers.{}.layer_norm1"),
    **_with_bias(_VIT + "encoder.layers.{}.post_attention_layernorm", _OUR_VIT + "layers.{}.layer_norm2"),
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
}

# Upstream: one projection holds the vision encoder's queries, keys and values, interleaved head by head.
FUSED: dict[str, tuple[str, str, str]] = {
    f"{_VIT}encoder.layers.{{}}.self_attn.query_key_value.{leaf}": (
        f"{_OUR_VIT}layers.{{}}.self_attn.q_proj.{leaf}",
        f"{_OUR_VIT}layers.{{}}.self_attn.k_proj.{leaf}",
        f"{_OUR_VIT}layers.{{}}.self_attn.v_proj.{leaf}",
    )
    for leaf in ("weight", "bias")
}

# Tables with one row per token id; ours hold the image placeholder and padding behind the original's rows.
PADDED = ("model.embed_tokens.weight", "lm_head.weight")

_LAYER_NUMBER = re.compile(r"(?<=\.layers\.)\d+(?=\.)")


def split_query_key_value(fused: Tensor, num_heads: int) -> list[Tensor]:
    """(heads * 3 * head_dim, ...) interleaved as [head][q | k | v][head_dim] -> three of (heads * head_dim, ...)."""
    per_head = fused.reshape(num_heads, 3, -1, *fused.shape[1:])
    return [per_head[:, i].reshape(-1, *fused.shape[1:]) for i in range(3)]


def pad_rows(table: Tensor, num_rows: int) -> Tensor:
    """(V, D) -> (num_rows, D), zeros behind."""
    return torch.cat([table, table.new_zeros(num_rows - table.shape[0], table.shape[1])])


def to_ours(key: str, tensor: Tensor, config: MplugOwl2Config) -> Iterator[tuple[str, Tensor]]:
    """One tensor of the original under our names, none where it is dropped on purpose.

    Raises:
        KeyError: The original has no such parameter.
        ValueError: The tensor cannot be split or padded as its name asks.
    """
    layer = _LAYER_NUMBER.search(key)
    template = _LAYER_NUMBER.sub("{}", key, count=1)
    number = layer.group() if layer else ""
    if template in FUSED:
        heads = config.vision_config.num_attention_heads
        if tensor.shape[0] != 3 * config.vision_config.hidden_size:
            raise ValueError(
                f"expected {3 * config.vision_config.hidden_size} rows (queries, keys, values), got {tensor.shape[0]}"
            )
        parts = split_query_key_value(tensor, heads)
        yield from ((target.format(number), part) for target, part in zip(FUSED[template], parts, strict=True))
        return
    target = RENAMED[template]
    if target is None:
        return
    if template in PADDED:
        if tensor.shape[0] != config.output_vocab_size:
            raise ValueError(f"expected {config.output_vocab_size} rows (vocab_size), got {tensor.shape[0]}")
        tensor = pad_rows(tensor, config.text_config.vocab_size)
    yield target.format(number), tensor
