"""H-Reducer of DocOwl 1.5: merges neighbouring patches of a row into one visual token.

N: images, C: width of the vision encoder, G: patches along one side, K: patches that become one
token, P: positions of one encoded image (class token and patches), Q: G * G / K visual tokens, D:
width of the language model.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import PreTrainedModel

from .configuration_mplug_owl2 import MplugOwl2HReducerConfig


class MplugOwl2HReducer(PreTrainedModel):
    """H-Reducer: Q + 1 visual tokens for each encoded image."""

    config: MplugOwl2HReducerConfig
    base_model_prefix = "h_reducer"
    main_input_name = "image_features"
    input_modalities = ("image",)
    _no_split_modules = ["MplugOwl2HReducer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def __init__(self, config: MplugOwl2HReducerConfig):
        super().__init__(config)
        width, kernel = config.hidden_size, (1, config.kernel_width)
        # Upstream: a norm that is in every checkpoint, but that no forward pass uses.
        self.ln_q = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.reducer_before = nn.Conv2d(width, width * config.kernel_width, kernel, stride=kernel)
        self.reducer = nn.Conv2d(width, width, kernel, stride=kernel)
        self.visual_fc = nn.Linear(width, config.projection_dim)
        self.vit_eos = nn.Parameter(torch.empty(1, 1, config.projection_dim))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MplugOwl2HReducer):
            init.normal_(module.vit_eos, mean=0.0, std=self.config.initializer_range)

    def get_input_embeddings(self) -> None:
        """None: there is no table to look up."""

    def forward(self, image_features: Tensor, **kwargs: Any) -> BaseModelOutput:
        """Merge the patches of each image into Q visual tokens, and append an end-of-image vector.

        Args:
            image_features: (N, P, C) vision encoder output, class token first; it is left out.

        Returns:
            `last_hidden_state` (N, Q + 1, D).
        """
        grid = self.config.grid_size
        # Contiguous, because compiled graphs and convolutions give other inputs different output
        # layouts.
        patches = (  # (N, C, G, G)
            image_features[:, -(grid**2) :].transpose(1, 2).contiguous().unflatten(2, (grid, grid))
        )
        mixed = nn.functional.gelu(self.reducer_before(patches))  # (N, K * C, G, G / K)
        merged = self.reducer(self._spread(mixed)).flatten(2).transpose(1, 2)  # (N, Q, C)
        visual_tokens = self.visual_fc(merged)  # (N, Q, D)
        if self.training:
            visual_tokens = visual_tokens + self._untouched_norm().to(visual_tokens)
        # (N, 1, D)
        vit_eos = self.vit_eos.to(visual_tokens.dtype).expand(visual_tokens.shape[0], -1, -1)
        return BaseModelOutput(last_hidden_state=torch.cat([visual_tokens, vit_eos], dim=1))

    def _spread(self, mixed: Tensor) -> Tensor:
        """(N, K * C, G, G / K) -> (N, C, G, G): K blocks of channels become K neighbouring
        columns.
        """
        blocks = mixed.unflatten(1, (self.config.kernel_width, -1))  # (N, K, C, G, G / K)
        return blocks.permute(0, 2, 3, 4, 1).flatten(3)

    def _untouched_norm(self) -> Tensor:
        """Zero that depends on the norm nobody applies, so that no rank waits for its gradient in
        vain.
        """
        return 0.0 * (self.ln_q.weight.sum() + self.ln_q.bias.sum())


__all__ = ["MplugOwl2HReducer"]
