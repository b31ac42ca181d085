"""Visual abstractor of mPLUG-Owl2: learnable queries that read one encoded image (figure 2 of the
paper).

N: images, Q: learnable queries, P: positions of one encoded image, C: width, D: width of the
language model.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.llama.modeling_llama import eager_attention_forward
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_mplug_owl2 import MplugOwl2AbstractorConfig


def sincos_table(positions: np.ndarray, dim: int) -> np.ndarray:
    """(M,) positions -> (M, dim) `[sin | cos]` of them at dim / 2 frequencies from 1 down to 1 /
    10000.
    """
    frequencies = np.arange(dim // 2, dtype=np.float32)
    frequencies /= dim / 2.0
    angles = np.outer(positions, 1.0 / 10000**frequencies)  # (positions, dim / 2)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def query_position_table(config: MplugOwl2AbstractorConfig) -> Tensor:
    """(Q, C) sin-cos positions of the queries, float32."""
    positions = np.arange(config.num_learnable_queries, dtype=np.float32)
    return torch.from_numpy(sincos_table(positions, config.hidden_size)).float()


def image_position_table(config: MplugOwl2AbstractorConfig) -> Tensor:
    """(P, C) sin-cos positions of the image, float32: column in the first half of C, row in the
    second.
    """
    rows, columns = np.divmod(np.arange(config.grid_size**2, dtype=np.float32), config.grid_size)
    half = config.hidden_size // 2
    # (G * G, C)
    table = np.concatenate([sincos_table(columns, half), sincos_table(rows, half)], axis=1)
    if config.use_cls_token:
        table = np.concatenate([np.zeros((1, config.hidden_size)), table])
    return torch.from_numpy(table).float()


class MplugOwl2AbstractorAttention(nn.Module):
    """Queries attend to themselves and to the image; positions enter queries and keys, not
    values.
    """

    q_pos_embed: Tensor
    k_pos_embed: Tensor

    def __init__(self, config: MplugOwl2AbstractorConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.num_key_value_groups = 1
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.encoder_hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.encoder_hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)
        # Saved with the weights, because a checkpoint may have rounded tables; computed if missing.
        self.register_buffer("q_pos_embed", query_position_table(config))
        self.register_buffer("k_pos_embed", image_position_table(config))

    def forward(
        self, queries: Tensor, image: Tensor, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """(N, Q, C) queries, (N, P, C) image -> (N, Q, C) and, with eager attention, (N, heads, Q,
        Q + P) weights.
        """
        context = torch.cat([queries, image], dim=1)  # (N, Q + P, C)
        query_positions = self.q_pos_embed.to(queries)  # (Q, C)
        context_positions = torch.cat([query_positions, self.k_pos_embed.to(queries)])  # (Q + P, C)

        def heads(states: Tensor) -> Tensor:
            # (N, heads, ., head_dim)
            return states.view(*states.shape[:-1], -1, self.head_dim).transpose(1, 2)

        attention: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention(  # (N, Q, heads, head_dim)
            self,
            heads(self.q_proj(queries + query_positions)),
            heads(self.k_proj(context + context_positions)),
            heads(self.v_proj(context)),
            None,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.out_proj(output.reshape(queries.shape)), weights


class MplugOwl2AbstractorMLP(nn.Module):
    """Gated MLP with a norm on the gated activations."""

    def __init__(self, config: MplugOwl2AbstractorConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)
        self.layer_norm = nn.LayerNorm(config.intermediate_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states: Tensor) -> Tensor:
        # (N, Q, width of the MLP)
        gated = nn.functional.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states)
        return self.down_proj(self.layer_norm(gated))


class MplugOwl2AbstractorLayer(GradientCheckpointingLayer):
    def __init__(self, config: MplugOwl2AbstractorConfig):
        super().__init__()
        self.query_layernorm = nn.LayerNorm(config.hidden_size, eps=config.block_norm_eps)
        self.image_layernorm = nn.LayerNorm(config.encoder_hidden_size, eps=config.block_norm_eps)
        self.cross_attn = MplugOwl2AbstractorAttention(config)
        self.mlp_layernorm = nn.LayerNorm(config.hidden_size, eps=config.block_norm_eps)
        self.mlp = MplugOwl2AbstractorMLP(config)

    def forward(self, queries: Tensor, image: Tensor, **kwargs: Any) -> Tensor:
        """(N, Q, C) queries, (N, P, C) image -> (N, Q, C)."""
        # Upstream: the residual starts after the norm.
        queries = self.query_layernorm(queries)
        queries = queries + self.cross_attn(queries, self.image_layernorm(image), **kwargs)[0]
        return queries + self.mlp(self.mlp_layernorm(queries))


class MplugOwl2VisualAbstractor(PreTrainedModel):
    """Visual abstractor: Q + 1 visual tokens for each encoded image."""

    config: MplugOwl2AbstractorConfig
    base_model_prefix = "visual_abstractor"
    main_input_name = "image_features"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["MplugOwl2AbstractorLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": MplugOwl2AbstractorLayer,
        "attentions": MplugOwl2AbstractorAttention,
    }
    _keys_to_ignore_on_load_missing = [r"[qk]_pos_embed$"]

    def __init__(self, config: MplugOwl2AbstractorConfig):
        super().__init__(config)
        self.query_embeds = nn.Parameter(
            torch.empty(1, config.num_learnable_queries, config.hidden_size)
        )
        self.layers = nn.ModuleList(
            MplugOwl2AbstractorLayer(config) for _ in range(config.num_hidden_layers)
        )
        self.visual_fc = nn.Linear(config.hidden_size, config.projection_dim)
        self.vit_eos = nn.Parameter(torch.empty(1, 1, config.projection_dim))
        self.gradient_checkpointing = False
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MplugOwl2VisualAbstractor):
            init.normal_(module.query_embeds, mean=0.0, std=self.config.initializer_range)
            init.normal_(module.vit_eos, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, MplugOwl2AbstractorAttention):
            init.copy_(module.q_pos_embed, query_position_table(module.config))
            init.copy_(module.k_pos_embed, image_position_table(module.config))

    def get_input_embeddings(self) -> None:
        """None: the queries are parameters, not a table to look up."""

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, image_features: Tensor, **kwargs: Any) -> BaseModelOutput:
        """Summarise each image in Q visual tokens and an end-of-image vector.

        Args:
            image_features: (N, P, C) vision encoder output, class token first.

        Returns:
            `last_hidden_state` (N, Q + 1, D); on request `hidden_states` (layers + 1 times (N, Q,
            C)) and `attentions` (layers times (N, heads, Q, Q + P)).
        """
        # (N, Q, C)
        queries = self.query_embeds.to(image_features.dtype).expand(image_features.shape[0], -1, -1)
        for layer in self.layers:
            queries = layer(queries, image_features, **kwargs)
        visual_tokens = self.visual_fc(queries)  # (N, Q, D)
        # (N, 1, D)
        vit_eos = self.vit_eos.to(visual_tokens.dtype).expand(visual_tokens.shape[0], -1, -1)
        return BaseModelOutput(last_hidden_state=torch.cat([visual_tokens, vit_eos], dim=1))


__all__ = ["MplugOwl2VisualAbstractor"]
