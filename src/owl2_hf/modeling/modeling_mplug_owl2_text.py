"""Modality-adaptive LLaMA: text and visual tokens have separate norms, keys and values.

All other weights are shared. The text branch has LLaMA's parameter names. The parameters of the
visual branch are named `visual_*`.

B: batch, L: positions, D: width, T, V: text and visual tokens of the whole batch, T + V = B * L.

This is one file so that the decoder can be read from its parts up.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .adapters_mplug_owl2 import has_named_rows
from .compatibility_mplug_owl2 import (
    BaseModelOutputWithPast,
    check_positions,
    create_causal_mask,
    known_arguments,
    named_cache,
    takes_past_key_values,
    update_cache,
)
from .configuration_mplug_owl2 import MplugOwl2TextConfig
from .cpu_kernels_mplug_owl2 import single_row_attention, suits_single_row


def text_first(visual_mask: Tensor) -> Tensor:
    """(B, L) mask -> (B * L,) positions in the flattened batch: those of text, then the visual
    ones, each in their order. No shape depends on the data, so nothing waits for the device.
    """
    return torch.argsort(visual_mask.flatten(), stable=True)


class ModalityRouting(NamedTuple):
    """Where the text and the visual tokens of a batch stand; made once per forward and shared by
    all layers.

    Tokens are sorted by modality, so that each is computed by its own branch alone and no second
    copy of it is kept for the gradients. The number of visual tokens must be known on the host for
    that. A graph that cannot know it has no order: there both branches compute every token, and the
    mask selects.
    """

    visual_mask: Tensor  # (B, L, 1), True at visual tokens
    order: Tensor | None  # (T + V,) into the flattened batch, text first
    inverse: Tensor | None  # (T + V,) into the sorted tokens
    num_text: int

    @classmethod
    def from_indicators(
        cls, mm_token_type_ids: Tensor, training: bool, num_visual_tokens: int | None = None
    ) -> "ModalityRouting | None":
        """Returns `None` where the text branch alone is needed.

        Args:
            mm_token_type_ids: (B, L), 0 text and 1 image.
            num_visual_tokens: V. Where it is not given, the host waits for the device to count.
        """
        visual_mask = mm_token_type_ids.bool()
        if num_visual_tokens is None:
            if torch.compiler.is_compiling() or visual_mask.is_meta:
                return cls(visual_mask.unsqueeze(-1), None, None, 0)
            num_visual_tokens = int(visual_mask.sum())
        # In training both branches always take part, so that data-parallel ranks reduce the same
        # gradients.
        if num_visual_tokens == 0 and not training:
            return None
        order = text_first(visual_mask)  # (T + V,)
        num_text = order.numel() - num_visual_tokens
        return cls(visual_mask.unsqueeze(-1), order, torch.argsort(order), num_text)

    def sort(self, hidden_states: Tensor) -> Tensor:
        """(B, L, D) -> (T + V, D), text first."""
        if self.order is None:
            return hidden_states
        return hidden_states.flatten(0, 1).index_select(0, self.order)

    def unsort(self, tokens: Tensor) -> Tensor:
        """Inverse of `sort`, for outputs of any width."""
        if self.inverse is None:
            return tokens
        return tokens.index_select(0, self.inverse).view(*self.visual_mask.shape[:2], -1)

    def split(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Sorted tokens -> what the text branch reads, (T, D), and what the visual branch reads,
        (V, D).
        """
        if self.order is None:
            return tokens, tokens
        text, visual = tokens.split([self.num_text, len(tokens) - self.num_text])
        return text, visual

    def merge(self, text: Tensor, visual: Tensor) -> Tensor:
        """What both branches made of a split -> (B, L, D')."""
        if self.order is None:
            return torch.where(self.visual_mask, visual, text)
        return self.unsort(torch.cat([text, visual.to(text.dtype)]))


def route(
    text_branch: nn.Module,
    visual_branch: nn.Module | None,
    x: Tensor,
    routing: ModalityRouting | None,
) -> Tensor:
    """(B, L, D) -> (B, L, D'), each token through the branch of its modality; all through one where
    it stands alone.
    """
    if routing is None or visual_branch is None:
        return text_branch(x)
    text, visual = routing.split(routing.sort(x))
    return routing.merge(text_branch(text), visual_branch(visual))


def match_indicators(mm_token_type_ids: Tensor, inputs_embeds: Tensor) -> Tensor:
    """(B, L) indicators for (B, L, D) embeddings; a single row, (1, L), holds for the whole batch.

    Raises:
        ValueError: If there is not one indicator for each position.
    """
    shape = inputs_embeds.shape[:2]
    rows, columns = mm_token_type_ids.shape
    # Number by number: a traced graph knows whether two lengths are equal, not whether a list holds
    # a shape.
    if columns != shape[1] or (rows != shape[0] and rows != 1):
        raise ValueError(
            "mm_token_type_ids must have one indicator for each position: expected "
            f"{tuple(shape)}, got {tuple(mm_token_type_ids.shape)}."
        )
    return mm_token_type_ids.to(inputs_embeds.device).expand(shape)


def check_count_in_graph(mm_token_type_ids: Tensor, num_visual_tokens: int) -> None:
    """Let a compiled graph check the number of visual tokens, which its host cannot read.

    The device checks it, so that nothing waits. The graph raises RuntimeError.
    """
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        torch._assert_async(
            mm_token_type_ids.bool().sum() == num_visual_tokens,
            "The number of visual positions differs from that of the visual tokens; the model "
            "without torch.compile names both.",
        )


class MplugOwl2NtkRotaryEmbedding(LlamaRotaryEmbedding):
    """Rotary embedding whose base grows with the length of a prompt beyond
    `rope_dynamic_ntk_length`.
    """

    @torch.no_grad()
    def forward(
        self, x: Tensor, position_ids: Tensor, prompt_lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Cosines and sines (B, L, head_dim) at the positions (B, L) of prompts of the lengths (B,
        1).

        Without lengths the base stays, as upstream in training.
        """
        if prompt_lengths is None:
            return super().forward(x, position_ids)
        dim, theta = self.config.head_dim, self.config.rope_parameters["rope_theta"]
        doublings = torch.ceil(torch.log2(prompt_lengths / self.config.rope_dynamic_ntk_length) + 1)
        base = theta * (torch.exp2(doublings) - 1).clamp_min(1) ** (dim / (dim - 2))
        inv_freq = 1.0 / base ** (torch.arange(0, dim, 2, device=x.device, dtype=torch.float) / dim)
        angles = position_ids[..., None].float() * inv_freq[:, None]  # (B, L, head_dim / 2)
        angles = torch.cat((angles, angles), dim=-1)  # (B, L, head_dim)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def prompt_lengths(position_ids: Tensor, cache: Cache | None) -> Tensor:
    """(B, L) positions -> (B, 1) lengths of the prompts that they are in, or that the cache began
    with.

    Upstream: what follows a prompt is read with the prompt's base, since the keys in the cache
    were.
    """
    lengths = position_ids.amax(-1, keepdim=True) + 1
    if cache is None:
        return lengths
    if not isinstance(cache, Cache):
        raise ValueError(
            "Continuous batching packs prompts of several lengths into one row, but this model's "
            "rotary base depends on the length of the prompt: use generate instead of "
            "generate_batch."
        )
    known = getattr(cache, "prompt_lengths", None)
    if known is not None:
        lengths = torch.where(
            position_ids.amin(-1, keepdim=True) > 0, known.to(lengths.device), lengths
        )
    cache.prompt_lengths = lengths
    return lengths


def log_n_scale(position_ids: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """(B, L) positions -> (B, 1, L, 1) factors of the queries: log_length(n) at the n-th position
    beyond `length`.
    """
    scale = torch.log(position_ids.float() + 1) / math.log(length)
    return scale.clamp_min(1).to(dtype)[:, None, :, None]


class MplugOwl2Attention(nn.Module):
    """Self-attention with keys and values of each token's own modality (equations 2 to 4 of the
    paper).
    """

    visual_q_proj: nn.Linear | None
    visual_k_proj: nn.Linear | None
    visual_v_proj: nn.Linear | None

    def __init__(self, config: MplugOwl2TextConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = True

        width, bias = config.hidden_size, config.attention_bias
        key_value_width = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(width, config.num_attention_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, key_value_width, bias=bias)
        self.v_proj = nn.Linear(width, key_value_width, bias=bias)
        for name in ("q", "k", "v"):
            own = name in config.modality_specific_projections
            out_width = getattr(self, f"{name}_proj").out_features
            setattr(
                self, f"visual_{name}_proj", nn.Linear(width, out_width, bias=bias) if own else None
            )
        out_bias = bias if config.attention_out_bias is None else config.attention_out_bias
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, width, bias=out_bias)

    @takes_past_key_values
    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        routing: ModalityRouting | None,
        cache: Cache | None = None,
        query_scale: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, L, D) -> (B, L, D) and, with eager attention, the (B, heads, L, past + L) weights."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        # (B, L, D), or (T + V, D) text first
        tokens = hidden_states if routing is None else routing.sort(hidden_states)

        def project(text_branch: nn.Module, visual_branch: nn.Module | None) -> Tensor:
            if routing is None:
                return text_branch(tokens)
            if visual_branch is None:
                return routing.unsort(text_branch(tokens))
            text, visual = routing.split(tokens)
            return routing.merge(text_branch(text), visual_branch(visual))

        query = project(self.q_proj, self.visual_q_proj)  # (B, L, heads * head_dim)
        key = project(self.k_proj, self.visual_k_proj)  # (B, L, key_value_heads * head_dim)
        value = project(self.v_proj, self.visual_v_proj)
        query = query.view(shape).transpose(1, 2)  # (B, heads, L, head_dim)
        key, value = key.view(shape).transpose(1, 2), value.view(shape).transpose(1, 2)

        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if query_scale is not None:
            query = query * query_scale
        if cache is not None:
            key, value = update_cache(cache, key, value, self.layer_idx, kwargs)

        attention: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        if suits_single_row(self, query, key, attention_mask, kwargs):
            attention = single_row_attention
        output, weights = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1).contiguous()), weights


class MplugOwl2DecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: MplugOwl2TextConfig, layer_idx: int):
        super().__init__()
        self.self_attn = MplugOwl2Attention(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.visual_input_layernorm = self._visual_norm(config)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.visual_post_attention_layernorm = self._visual_norm(config)

    @staticmethod
    def _visual_norm(config: MplugOwl2TextConfig) -> LlamaRMSNorm | None:
        return (
            LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            if config.modality_specific_norms
            else None
        )

    def forward(
        self, hidden_states: Tensor, routing: ModalityRouting | None = None, **kwargs: Any
    ) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        normed = route(self.input_layernorm, self.visual_input_layernorm, hidden_states, routing)
        hidden_states = hidden_states + self.self_attn(normed, routing=routing, **kwargs)[0]
        normed = route(
            self.post_attention_layernorm,
            self.visual_post_attention_layernorm,
            hidden_states,
            routing,
        )
        return hidden_states + self.mlp(normed)


class MplugOwl2TextModel(PreTrainedModel):
    """Modality-adaptive LLaMA without a head."""

    config: MplugOwl2TextConfig
    base_model_prefix = "language_model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MplugOwl2DecoderLayer"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": MplugOwl2DecoderLayer, "attentions": MplugOwl2Attention}

    def __init__(self, config: MplugOwl2TextConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            MplugOwl2DecoderLayer(config, idx) for idx in range(config.num_hidden_layers)
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        has_ntk = config.rope_dynamic_ntk_length is not None
        self.rotary_emb = (MplugOwl2NtkRotaryEmbedding if has_ntk else LlamaRotaryEmbedding)(
            config=config
        )
        self.gradient_checkpointing = False
        self.post_init()

    @known_arguments
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        use_cache: bool | None = None,
        num_visual_tokens: int | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the decoder.

        Args:
            input_ids: (B, L).
            inputs_embeds: (B, L, D). Give either this or `input_ids`.
            attention_mask: (B, past + L), 1 at tokens and 0 at padding.
            position_ids: (B, L). Default: counted from the end of the cache.
            mm_token_type_ids: (B, L) modality indicators, 0 for text and 1 for image. Default: all
                text.
            num_visual_tokens: Number of indicators that are 1, if you know it. Otherwise the host
                waits for the device to count them, and a compiled graph, which cannot, computes
                both branches for every token. Only a compiled graph checks the number.

        Returns:
            `last_hidden_state` (B, L, D) after the final norm, the cache, and, if requested,
            `hidden_states` and `attentions`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Expected input_ids or inputs_embeds, got both or neither.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if mm_token_type_ids is not None:
            mm_token_type_ids = match_indicators(mm_token_type_ids, inputs_embeds)
            if num_visual_tokens is not None:
                check_count_in_graph(mm_token_type_ids, num_visual_tokens)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        check_positions(attention_mask, inputs_embeds.shape[1], cache)
        if position_ids is None:
            past_length = cache.get_seq_length() if cache is not None else 0
            position_ids = (
                torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past_length
            )
            position_ids = position_ids.unsqueeze(0)
        attention_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            cache=cache,
            position_ids=position_ids,
        )
        if mm_token_type_ids is None and self.training:
            mm_token_type_ids = inputs_embeds.new_zeros(inputs_embeds.shape[:2], dtype=torch.long)
            num_visual_tokens = 0
        routing = None
        if mm_token_type_ids is not None and self.config.has_modality_adaptive_module:
            routing = ModalityRouting.from_indicators(
                mm_token_type_ids, self.training, num_visual_tokens
            )
        if (
            routing is not None
            and routing.order is not None
            and not self.training
            and has_named_rows(self)
        ):
            # The adapted layers need the rows as they are.
            routing = routing._replace(order=None, inverse=None)

        hidden_states = inputs_embeds
        position_embeddings = self._position_embeddings(hidden_states, position_ids, cache)
        if self.config.log_n_length is not None and not self.training:
            kwargs["query_scale"] = log_n_scale(
                position_ids, self.config.log_n_length, hidden_states.dtype
            )
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                routing=routing,
                attention_mask=attention_mask,
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                use_cache=use_cache,
                **named_cache(cache),
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states), **named_cache(cache)
        )

    def _position_embeddings(
        self, hidden_states: Tensor, position_ids: Tensor, cache: Cache | None
    ) -> tuple[Tensor, Tensor]:
        if self.training or not isinstance(self.rotary_emb, MplugOwl2NtkRotaryEmbedding):
            return self.rotary_emb(hidden_states, position_ids=position_ids)
        lengths = prompt_lengths(position_ids, cache)
        return self.rotary_emb(hidden_states, position_ids=position_ids, prompt_lengths=lengths)


__all__ = ["MplugOwl2TextModel"]
