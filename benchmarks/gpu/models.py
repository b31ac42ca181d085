"""Models of the published shape with random weights, made on the device; nothing is read."""

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from owl2_hf.modeling import MplugOwl2Config, MplugOwl2ForConditionalGeneration

from .frame import Setting

_kept: dict[tuple[Any, ...], Any] = {}

TINY_TEXT = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
}
TINY_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
TINY_ABSTRACTOR = {
    "num_learnable_queries": 8,
    "hidden_size": 32,
    "encoder_hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "grid_size": 2,
    "projection_dim": 64,
}


def config(setting: Setting, num_layers: int | None = None) -> MplugOwl2Config:
    """The published shape, or a tiny one, with other `num_layers` of the decoder if given.

    The context is 4096 positions, so that long prompts can be measured.
    """
    made = (
        MplugOwl2Config(
            text_config=TINY_TEXT,
            vision_config=TINY_VISION,
            abstractor_config=TINY_ABSTRACTOR,
            image_token_id=300,
            output_vocab_size=300,
        )
        if setting.tiny
        else MplugOwl2Config()
    )
    text = made.text_config
    text.max_position_embeddings = max(text.max_position_embeddings, 4096)
    if num_layers is not None:
        text.num_hidden_layers = min(num_layers, text.num_hidden_layers)
    return made


def owl2(
    setting: Setting, num_layers: int | None = None, **kwargs: Any
) -> MplugOwl2ForConditionalGeneration:
    """MplugOwl2ForConditionalGeneration in eval mode.

    It is kept for later steps of the part: change nothing of it, or take one of your own from
    `build`.

    Args:
        num_layers: Of the decoder. Default: 32, as published.
        kwargs: As for `_from_config`, for example `attn_implementation`.
    """
    key = ("owl2", setting, num_layers, *sorted(kwargs.items()))
    if key not in _kept:
        made = config(setting, num_layers)
        _kept[key] = build(MplugOwl2ForConditionalGeneration, made, setting, **kwargs)
    return _kept[key]


def llama(setting: Setting, num_layers: int | None = None, **kwargs: Any) -> LlamaForCausalLM:
    """LlamaForCausalLM with the shape of the decoder of `owl2`; kept as that is."""
    key = ("llama", setting, num_layers, *sorted(kwargs.items()))
    if key not in _kept:
        _kept[key] = build(LlamaForCausalLM, llama_config(setting, num_layers), setting, **kwargs)
    return _kept[key]


def llama_config(setting: Setting, num_layers: int | None = None) -> LlamaConfig:
    text = config(setting, num_layers).text_config
    names = (*TINY_TEXT, "rms_norm_eps", "hidden_act", "rope_parameters")
    return LlamaConfig(**{name: getattr(text, name) for name in names})


def build(kind: Any, config: Any, setting: Setting, **kwargs: Any) -> Any:
    """A fresh model of a class, its weights made on the device, in eval mode."""
    torch.manual_seed(0)
    with setting.device:
        model = kind._from_config(config, dtype=setting.dtype, **kwargs)
    # Tables that NumPy computes are on the CPU.
    return model.to(setting.device).eval()


def forget() -> None:
    """Let go of the models that are kept."""
    _kept.clear()


def inputs(setting: Setting, batch: int, text: int, images: int) -> dict[str, Tensor]:
    """A batch of prompts for `owl2`, images evenly among the text.

    Args:
        text: Tokens of text in each row.
        images: Images in each row.

    Returns:
        `input_ids` (B, L) with L = text + images * 65 (tiny: 9), `mm_token_type_ids` (B, L), and
        with images `pixel_values` (B * images, 3, H, W).
    """
    shape = config(setting)
    generator = torch.Generator(setting.device).manual_seed(1)
    words = torch.randint(
        3, shape.output_vocab_size, (batch, text), generator=generator, device=setting.device
    )
    placeholders = words.new_full((batch, shape.num_image_tokens), shape.image_token_id)
    pieces = []
    for piece in words.tensor_split(images + 1, dim=1):
        pieces += [piece, placeholders]
    input_ids = torch.cat(pieces[:-1], dim=1)  # (B, L)
    made = {
        "input_ids": input_ids,
        "mm_token_type_ids": input_ids.eq(shape.image_token_id).long(),
    }
    if images:
        size = shape.vision_config.image_size
        made["pixel_values"] = torch.randn(
            batch * images, 3, size, size, generator=generator, device=setting.device
        ).to(setting.dtype)
    return made
