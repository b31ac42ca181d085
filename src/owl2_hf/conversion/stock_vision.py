"""Vision encoders for a new model: from CLIP, DINOv2 or this family, or new ones. C: width."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, CLIPModel, CLIPVisionModel, Dinov2Model, LlamaConfig
from transformers.configuration_utils import PreTrainedConfig
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.utils import cached_file

from ..modeling.configuration_mplug_owl2 import MplugOwl2VisionConfig
from ..modeling.modeling_mplug_owl2 import MplugOwl2ForConditionalGeneration
from ..processing.processing_mplug_owl2 import MplugOwl2Processor
from ..processing.tokenization_mplug_owl2 import read_json

_CLIP_NAMES = {
    r"embeddings\.class_embedding": "embeddings.cls_token",
    r"embeddings\.position_embedding\.weight": "embeddings.position_embedding",
    r"pre_layrnorm": "embeddings.pre_layernorm",
    r"encoder\.layers": "layers",
}
_DINOV2_NAMES = {
    r"embeddings\.patch_embeddings\.projection": "embeddings.patch_embedding",
    r"embeddings\.position_embeddings": "embeddings.position_embedding",
    r"encoder\.layer\.(\d+)\.attention\.o_proj": r"layers.\1.self_attn.out_proj",
    r"encoder\.layer\.(\d+)\.attention": r"layers.\1.self_attn",
    r"encoder\.layer\.(\d+)\.norm": r"layers.\1.layer_norm",
    r"encoder\.layer": "layers",
    r"layernorm": "post_layernorm",
}


@dataclass
class StockVision:
    """The vision encoder of the new model.

    Args:
        state: Its weights in float32 under our names; `None` for a fresh one.
        pixels: Mean and deviation of its pixels, where they are not CLIP's.
    """

    config: MplugOwl2VisionConfig
    state: dict[str, Tensor] | None = None
    pixels: dict[str, Any] = field(default_factory=dict)


def find_file(source: str | Path, name: str) -> Path | None:
    """A file of a folder or of a repository on the Hub."""
    found = cached_file(
        source,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)


def check_not_quantized(source: str | Path, config: PreTrainedConfig) -> None:
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"{source} is quantized: expected weights of a floating-point type; dequantize it "
            "first."
        )


def load_whole(source: str | Path, model_class: Any, dtype: Any) -> Any:
    """A model whose parameters all came from its files; transformers would make the missing ones
    up.
    """
    model, info = model_class.from_pretrained(source, dtype=dtype, output_loading_info=True)
    if lost := sorted(key for key in info["missing_keys"] if not key.endswith("mask_token")):
        raise ValueError(
            f"{source} lacks {len(lost)} parameters of its model, the first is {lost[0]}: the "
            "checkpoint is incomplete, or its configuration does not match."
        )
    return model.eval()


def fresh_vision(language: LlamaConfig, image_size: int | None) -> StockVision:
    if language.hidden_size == 4096:
        return StockVision(
            MplugOwl2VisionConfig(**({} if image_size is None else {"image_size": image_size}))
        )
    return StockVision(
        MplugOwl2VisionConfig(
            hidden_size=384,
            intermediate_size=1536,
            num_hidden_layers=12,
            num_attention_heads=6,
            image_size=224 if image_size is None else image_size,
        )
    )


def read_vision(source: str | Path, image_size: int | None) -> StockVision:
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    readers: dict[str, Callable[[str | Path, Any], StockVision]] = {
        "clip": _read_clip,
        "clip_vision_model": _read_clip,
        "dinov2": _read_dinov2,
        "mplug_owl2": _read_own,
    }
    if config.model_type not in readers:
        raise ValueError(
            f"{source}: expected a ViT with a class token and without registers, of model_type "
            f"{', '.join(map(repr, readers))} (not SigLIP), got {config.model_type!r}. Leave "
            "vision out for a new one."
        )
    check_not_quantized(source, config)
    tower = readers[config.model_type](source, getattr(config, "vision_config", config))
    settings = find_file(source, "preprocessor_config.json")
    given = {} if settings is None else read_json(settings)
    tower.pixels.update(
        {key: given[key] for key in ("image_mean", "image_std", "resample") if key in given}
    )
    return _resized(tower, image_size)


def _vision_config(
    source: str | Path, config: PreTrainedConfig, **kwargs: Any
) -> MplugOwl2VisionConfig:
    """Ours, from the fields that CLIP and DINOv2 share."""
    if config.num_channels != 3:
        raise ValueError(
            f"{source}: expected 3 channels for RGB images, got {config.num_channels}."
        )
    return MplugOwl2VisionConfig(
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        image_size=_side(source, "image_size", config.image_size),
        patch_size=_side(source, "patch_size", config.patch_size),
        hidden_act=config.hidden_act,
        layer_norm_eps=config.layer_norm_eps,
        initializer_range=config.initializer_range,
        **kwargs,
    )


def _side(source: str | Path, name: str, value: Any) -> int:
    sides = set(value) if isinstance(value, (list, tuple)) else {value}
    if len(sides) != 1:
        raise ValueError(f"{source}: expected a square {name}, got {value}.")
    return sides.pop()


def _read_clip(source: str | Path, config: PreTrainedConfig) -> StockVision:
    ours = _vision_config(
        source,
        config,
        intermediate_size=config.intermediate_size,
        attention_dropout=config.attention_dropout or 0.0,
    )
    is_whole = AutoConfig.from_pretrained(source, trust_remote_code=False).model_type == "clip"
    loaded = load_whole(source, CLIPModel if is_whole else CLIPVisionModel, torch.float32)
    state = _renamed((loaded.vision_model if is_whole else loaded).state_dict(), _CLIP_NAMES)
    state["embeddings.cls_token"] = state["embeddings.cls_token"].reshape(1, 1, -1)
    state["embeddings.position_embedding"] = state["embeddings.position_embedding"].unsqueeze(0)
    return StockVision(ours, state)


def _read_dinov2(source: str | Path, config: PreTrainedConfig) -> StockVision:
    """DINOv2 without what our tower lacks: scales go into the layers before them, the patch bias
    into positions.
    """
    if config.use_swiglu_ffn:
        raise ValueError(
            f"{source}: expected a DINOv2 with an MLP, such as the sizes S, B and L, got "
            "use_swiglu_ffn."
        )
    ours = _vision_config(
        source,
        config,
        intermediate_size=int(config.hidden_size * config.mlp_ratio),
        attention_dropout=config.attention_probs_dropout_prob,
        use_pre_layernorm=False,
    )
    model = load_whole(source, Dinov2Model, torch.float32)
    _fold_scales(model)
    state = _renamed(model.state_dict(), _DINOV2_NAMES)
    for name in [name for name in state if "layer_scale" in name or name.endswith("mask_token")]:
        del state[name]
    state["embeddings.position_embedding"][:, 1:] += state.pop("embeddings.patch_embedding.bias")
    return StockVision(
        ours, state, {"image_mean": IMAGENET_DEFAULT_MEAN, "image_std": IMAGENET_DEFAULT_STD}
    )


def _read_own(source: str | Path, config: MplugOwl2VisionConfig) -> StockVision:
    """The trained vision encoder of a model of this family."""
    model = load_whole(source, MplugOwl2ForConditionalGeneration, torch.float32)
    pixels = MplugOwl2Processor.from_pretrained(source).image_processor
    settings = {name: getattr(pixels, name) for name in ("image_mean", "image_std", "resample")}
    return StockVision(
        MplugOwl2VisionConfig(**_own_values(config)),
        dict(model.model.vision_tower.state_dict()),
        settings,
    )


@torch.no_grad()
def _fold_scales(model: Dinov2Model) -> None:
    for layer in model.encoder.layer:
        for linear, scale in (
            (layer.attention.o_proj, layer.layer_scale1),
            (layer.mlp.fc2, layer.layer_scale2),
        ):
            linear.weight *= scale.lambda1.unsqueeze(1)
            linear.bias *= scale.lambda1
        attention = layer.attention
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
            if linear.bias is None:  # qkv_bias=False
                linear.bias = nn.Parameter(linear.weight.new_zeros(len(linear.weight)))


def _renamed(state: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """Names rewritten by the first pattern that their beginning matches."""

    def rename(name: str) -> str:
        for pattern, new in names.items():
            if (match := re.match(pattern, name)) is not None:
                return match.expand(new) + name[match.end() :]
        return name

    return {rename(name): value for name, value in state.items()}


def _resized(tower: StockVision, image_size: int | None) -> StockVision:
    if image_size is None or tower.state is None:
        return tower
    own = tower.config.grid_size
    tower.config = MplugOwl2VisionConfig(**{**_own_values(tower.config), "image_size": image_size})
    name = "embeddings.position_embedding"
    tower.state[name] = resize_position_table(tower.state[name], own, tower.config.grid_size)
    return tower


def _own_values(config: MplugOwl2VisionConfig) -> dict[str, Any]:
    names = set(MplugOwl2VisionConfig.__dataclass_fields__) - set(
        PreTrainedConfig.__dataclass_fields__
    )
    return {name: getattr(config, name) for name in names}


def resize_position_table(table: Tensor, from_side: int, to_side: int) -> Tensor:
    """Learned positions for images of another size, by bicubic interpolation in float32.

    Args:
        table: (1, 1 + from_side**2, C), the class token first; its row stays as it is.
        from_side: Patches along one side now.
        to_side: Patches along one side of the result.

    Returns:
        (1, 1 + to_side**2, C) in the table's dtype; the table itself where the sides are equal.

    Raises:
        ValueError: If the table has another shape.
    """
    if table.ndim != 3 or table.shape[:2] != (1, 1 + from_side**2):
        raise ValueError(
            f"expected a position table of shape (1, {1 + from_side**2}, width) for {from_side} x "
            f"{from_side} patches and a class token, got {tuple(table.shape)}."
        )
    if from_side == to_side:
        return table
    grid = table[:, 1:].float().reshape(1, from_side, from_side, -1).permute(0, 3, 1, 2)
    grid = nn.functional.interpolate(
        grid, size=(to_side, to_side), mode="bicubic", align_corners=False, antialias=False
    )
    return torch.cat([table[:, :1], grid.flatten(2).transpose(1, 2).to(table.dtype)], dim=1)
