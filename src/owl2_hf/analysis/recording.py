"""Run the decoder once, and reduce each layer's attention weights without keeping them.

L: positions, D: width.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..modeling.modeling_mplug_owl2_text import MplugOwl2TextModel, route
from .attention import attention_shares

# Parts of a layer that the modality-adaptive module may double, as (parent, name of the text
# branch).
BRANCHES = (
    ("", "input_layernorm"),
    ("", "post_attention_layernorm"),
    ("self_attn", "q_proj"),
    ("self_attn", "k_proj"),
    ("self_attn", "v_proj"),
)
STATES = (
    "residual",
    "input_layernorm",
    "query",
    "key",
    "value",
    "residual_after_attention",
    "post_attention_layernorm",
)


class DecoderRecorder:
    """Records attention by modality and norms of each layer of a decoder with eager attention.

    Args:
        mm_token_type_ids: (1, L) modality indicators.
        query_groups: Name -> (1, L), True at the positions whose attention counts.
    """

    def __init__(self, mm_token_type_ids: Tensor, query_groups: dict[str, Tensor]):
        self._query_groups = query_groups
        visual = mm_token_type_ids.bool().cpu()
        self._modalities = {"text": ~visual[0], "visual": visual[0]}
        first = torch.zeros_like(visual)
        first[:, 0] = True
        self._key_groups = {"text": ~visual, "visual": visual, "first_token": first}
        self.attention: dict[str, dict[str, list[float]]] = {
            queries: {keys: [] for keys in self._key_groups} for queries in query_groups
        }
        self.norms: dict[str, dict[str, list[float | None]]] = {
            state: {modality: [] for modality in self._modalities} for state in STATES
        }

    @contextmanager
    def watching(self, text_model: MplugOwl2TextModel) -> Iterator[None]:
        """Forward passes of `MplugOwl2TextModel` inside the block are recorded."""
        with ExitStack() as stack:
            for layer in text_model.layers:
                attention, mlp = layer.get_submodule("self_attn"), layer.get_submodule("mlp")
                for handle in (
                    layer.register_forward_pre_hook(self._enter_layer),
                    attention.register_forward_hook(self._leave_attention, with_kwargs=True),
                    mlp.register_forward_pre_hook(self._enter_mlp),
                ):
                    stack.callback(handle.remove)
            yield

    def _enter_layer(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        self._residual = args[0]
        self._add_norm("residual", args[0])

    def _leave_attention(
        self, attn: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: tuple[Any, ...]
    ) -> None:
        normed, routing = args[0], kwargs["routing"]
        self._add_norm("input_layernorm", normed)
        for state, name in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
            branches = getattr(attn, name), getattr(attn, f"visual_{name}")
            self._add_norm(state, route(*branches, normed, routing))
        self._add_norm("residual_after_attention", self._residual + output[0])
        keys = torch.stack(list(self._key_groups.values()), dim=1)
        for queries, mask in self._query_groups.items():
            shares = attention_shares([output[1]], keys, query_mask=mask)[0, 0].tolist()
            for group, share in zip(self._key_groups, shares, strict=True):
                self.attention[queries][group].append(share)

    def _enter_mlp(self, mlp: nn.Module, args: tuple[Any, ...]) -> None:
        self._add_norm("post_attention_layernorm", args[0])

    def _add_norm(self, state: str, hidden_states: Tensor) -> None:
        """Of (1, L, D) states the root mean square over channels, as the median over the tokens of
        each modality.
        """
        rms = hidden_states[0].float().pow(2).mean(-1).sqrt().cpu()
        for modality, mask in self._modalities.items():
            self.norms[state][modality].append(float(rms[mask].median()) if mask.any() else None)


def branch_weights(text_model: MplugOwl2TextModel) -> dict[str, dict[str, list[float | None]]]:
    """Size of the weights of each branch, layer by layer, and how far apart the two branches are.

    Returns:
        Part -> `text` and `visual`, root mean squares of the weights, and `distance`, the Frobenius
        norm of their difference over that of the text branch. `None` where there is no visual
        branch, or where the weights are quantised or not in memory.
    """
    found: dict[str, dict[str, list[float | None]]] = {}
    for parent, name in BRANCHES:
        rows = [_compare(layer.get_submodule(parent), name) for layer in text_model.layers]
        found[name] = {key: [row[key] for row in rows] for key in ("text", "visual", "distance")}
    return found


@torch.no_grad()
def _compare(parent: nn.Module, name: str) -> dict[str, float | None]:
    text, visual = _weight(getattr(parent, name)), _weight(getattr(parent, f"visual_{name}", None))
    return {
        "text": None if text is None else float(text.pow(2).mean().sqrt()),
        "visual": None if visual is None else float(visual.pow(2).mean().sqrt()),
        "distance": None
        if text is None or visual is None
        else float((visual - text).norm() / text.norm()),
    }


def _weight(module: nn.Module | None) -> Tensor | None:
    weight = getattr(module, "weight", None)
    if weight is None or weight.is_meta or not weight.is_floating_point():
        return None
    return weight.detach().float()
