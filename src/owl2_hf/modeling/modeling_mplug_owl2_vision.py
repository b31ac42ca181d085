"""Vision encoder of mPLUG-Owl2: a pre-norm ViT whose class token stays in the output.

N: images, C: width, H, W: pixels of a side, G: patches along a side, P: positions of one image
(class token and patches).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.llama.modeling_llama import eager_attention_forward
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_mplug_owl2 import MplugOwl2VisionConfig


class MplugOwl2VisionEmbeddings(nn.Module):
    """Patches, class token, learned positions and the norm in front of the first layer."""

    def __init__(self, config: MplugOwl2VisionConfig):
        super().__init__()
        self.config = config
        if config.use_cls_token:
            self.cls_token = nn.Parameter(torch.empty(1, 1, config.hidden_size))
        else:
            self.register_parameter("cls_token", None)
        self.patch_embedding = nn.Conv2d(
            config.num_channels,
            config.hidden_size,
            config.patch_size,
            stride=config.patch_size,
            bias=False,
        )
        num_positions = config.position_table_side**2 + int(config.use_cls_token)
        # Without a class token, the original stores the table without its leading axis.
        table_shape = (1, num_positions) if config.use_cls_token else (num_positions,)
        self.position_embedding = nn.Parameter(torch.empty(*table_shape, config.hidden_size))
        self.pre_layernorm = (
            nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
            if config.use_pre_layernorm
            else nn.Identity()
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(N, 3, H, W) normalised pixels -> (N, P, C)."""
        # (N, C, G, G)
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))
        hidden_states = patches.flatten(2).transpose(1, 2)  # (N, G * G, C)
        if self.cls_token is not None:
            cls_token = self.cls_token.expand(hidden_states.shape[0], -1, -1)  # (N, 1, C)
            hidden_states = torch.cat([cls_token, hidden_states], dim=1)  # (N, P, C)
        return self.pre_layernorm(hidden_states + self._positions())

    def _positions(self) -> Tensor:
        """(1, P, C) or (P, C) positions, those of a table of another size resized."""
        source, target = self.config.position_table_side, self.config.grid_size
        if source == target:
            return self.position_embedding
        table = self.position_embedding.float().reshape(1, source, source, -1).permute(0, 3, 1, 2)
        # A table with a class token is never resized: the configuration sees to it.
        table = nn.functional.interpolate(  # (1, C, G, G)
            table, size=(target, target), mode="bicubic", align_corners=False
        )
        return table.flatten(2).transpose(1, 2).to(self.position_embedding.dtype)


class MplugOwl2VisionAttention(nn.Module):
    def __init__(self, config: MplugOwl2VisionConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.num_key_value_groups = 1
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """(N, P, C) -> (N, P, C) and, with eager attention, the (N, heads, P, P) weights."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)  # (N, P, heads, head_dim)
        attention: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention(  # (N, P, heads, head_dim)
            self,
            self.q_proj(hidden_states).view(shape).transpose(1, 2),
            self.k_proj(hidden_states).view(shape).transpose(1, 2),
            self.v_proj(hidden_states).view(shape).transpose(1, 2),
            None,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.out_proj(output.reshape(*hidden_states.shape[:-1], -1)), weights


class MplugOwl2VisionMLP(nn.Module):
    def __init__(self, config: MplugOwl2VisionConfig):
        super().__init__()
        self.act_fn = ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(N, P, C) -> (N, P, C)."""
        return self.fc2(self.act_fn(self.fc1(hidden_states)))


class MplugOwl2VisionLayer(GradientCheckpointingLayer):
    def __init__(self, config: MplugOwl2VisionConfig):
        super().__init__()
        self.self_attn = MplugOwl2VisionAttention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MplugOwl2VisionMLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """(N, P, C) -> (N, P, C)."""
        hidden_states = hidden_states + self.self_attn(self.layer_norm1(hidden_states), **kwargs)[0]
        return hidden_states + self.mlp(self.layer_norm2(hidden_states))


class MplugOwl2VisionModel(PreTrainedModel):
    """Vision encoder."""

    config: MplugOwl2VisionConfig
    base_model_prefix = "vision_tower"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["MplugOwl2VisionEmbeddings", "MplugOwl2VisionLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": MplugOwl2VisionLayer,
        "attentions": MplugOwl2VisionAttention,
    }

    def __init__(self, config: MplugOwl2VisionConfig):
        super().__init__(config)
        self.embeddings = MplugOwl2VisionEmbeddings(config)
        self.layers = nn.ModuleList(
            MplugOwl2VisionLayer(config) for _ in range(config.num_hidden_layers)
        )
        self.post_layernorm = (
            nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
            if config.use_post_layernorm
            else nn.Identity()
        )
        self.gradient_checkpointing = False
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MplugOwl2VisionEmbeddings):
            std = self.config.initializer_range
            init.normal_(module.position_embedding, mean=0.0, std=std)
            if module.cls_token is not None:
                init.normal_(module.cls_token, mean=0.0, std=std)

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.patch_embedding

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutput:
        """Encode images.

        Args:
            pixel_values: (N, 3, H, W) normalised pixels, H = W = image_size.

        Returns:
            `last_hidden_state` (N, P, C), class token first; on request `hidden_states` (layers + 1
            times (N, P, C), before the last norm) and `attentions` (layers times (N, heads, P, P)).

        Raises:
            ValueError: If images do not have the shape that the configuration gives.
        """
        expected = (self.config.num_channels, self.config.image_size, self.config.image_size)
        if pixel_values.ndim != 4 or pixel_values.shape[1:] != expected:
            raise ValueError(
                f"pixel_values must be (images, {', '.join(map(str, expected))}), got "
                f"{tuple(pixel_values.shape)}. Prepare images with MplugOwl2Processor; each "
                "frame of a video is one image."
            )
        hidden_states = self.embeddings(pixel_values)  # (N, P, C)
        for layer in self.layers:
            hidden_states = layer(hidden_states, **kwargs)
        return BaseModelOutput(last_hidden_state=self.post_layernorm(hidden_states))


__all__ = ["MplugOwl2VisionModel"]
