"""Reduce attention weights to a few numbers: by modality in the decoder, over the image in the
visual abstractor.

B: batch, L: positions, N: images, Q: learnable queries, G: patches along one side, P: positions of
one encoded image (patches, and a class token where the model has one).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def attention_mass(
    attentions: Sequence[Tensor],
    mm_token_type_ids: Tensor,
    attention_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
) -> Tensor:
    """Shares of the decoder's attention that go to text and to visual tokens, as means over heads
    and queries.

    Args:
        attentions: layers times (B, heads, L, L), `attentions` of an output.
        mm_token_type_ids: (B, L) modality indicators, 0 text and 1 image.
        attention_mask: (B, L), 0 at padding; no padding if not given.
        query_mask: (B, L), True at the positions whose attention counts; all but padding if not
            given.

    Returns:
        (layers, B, 2), text and visual; the two sum to one.

    Raises:
        ValueError: If shapes disagree, or a row has no query.
    """
    visual = mm_token_type_ids.bool()
    return attention_shares(
        attentions, torch.stack([~visual, visual], dim=1), attention_mask, query_mask
    )


def attention_shares(
    attentions: Sequence[Tensor],
    key_groups: Tensor,
    attention_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
) -> Tensor:
    """Shares of attention that go to groups of keys, as means over heads and queries.

    Args:
        attentions: layers times (B, heads, L, L).
        key_groups: (B, groups, L), True at the keys of a group.
        attention_mask, query_mask: as for `attention_mass`.

    Returns:
        (layers, B, groups) float32.

    Raises:
        ValueError: If shapes disagree, or a row has no query.
    """
    num_rows, _, length = key_groups.shape
    tokens = torch.ones(num_rows, length) if attention_mask is None else attention_mask
    queries = tokens.bool() if query_mask is None else query_mask.to(tokens.device) & tokens.bool()
    if not queries.any(-1).all():
        raise ValueError(
            "every row needs at least one query, got a row with none: check query_mask and "
            "attention_mask."
        )
    shares = []
    for layer, weights in enumerate(attentions):
        if weights.shape[0] != num_rows or weights.shape[2:] != (length, length):
            raise ValueError(
                f"expected attention weights of shape ({num_rows}, heads, {length}, {length}) in "
                f"layer {layer}, got {tuple(weights.shape)}: run the whole text in one forward "
                "pass, without a cache."
            )
        means = weights.float().mean(1) * tokens.to(weights.device, torch.float)[:, None]
        # In half precision, rows sum to one only approximately.
        means = means / means.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float).tiny)
        counted = queries.to(weights.device, torch.float)
        by_key = torch.einsum("bl,blk->bk", counted / counted.sum(-1, keepdim=True), means)
        shares.append(torch.einsum("bk,bgk->bg", by_key, key_groups.to(by_key)).cpu())
    return torch.stack(shares)


def uniform_attention(attention_mask: Tensor) -> Tensor:
    """(B, L) mask -> (B, 1, L, L) weights of a decoder that attends to all that each position sees
    alike.
    """
    seen = (
        attention_mask.bool()[:, None]
        & torch.ones(2 * attention_mask.shape[1:]).tril().to(attention_mask).bool()
    )
    return (seen / seen.sum(-1, keepdim=True).clamp_min(1))[:, None]


class QueryAttention(NamedTuple):
    """What the learnable queries attend to.

    Args:
        maps: (N, Q, G, G) attention over the patches, as means over layers and heads; each map sums
            to one.
        shares: (layers, N, 3) shares of attention that go to the queries themselves, to the class
            token and to the patches, as means over heads and queries; they sum to one.
    """

    maps: Tensor
    shares: Tensor


def query_maps(abstractor_attentions: Sequence[Tensor], grid_size: int) -> QueryAttention:
    """Attention of the learnable queries over the image.

    Args:
        abstractor_attentions: layers times (N, heads, Q, Q + P), of `get_image_features`. The keys
            are the queries, a class token where there is one, and the patches row by row.
        grid_size: G.

    Raises:
        ValueError: If the weights are not those of an image with this grid.
    """
    weights = torch.stack([layer.float().mean(1).cpu() for layer in abstractor_attentions])
    num_queries, num_keys = weights.shape[-2:]
    num_class_tokens = num_keys - num_queries - grid_size**2
    if num_class_tokens not in (0, 1):
        raise ValueError(
            f"expected {num_queries} queries, {grid_size} x {grid_size} patches and at most one "
            f"class token as keys, got {num_keys}: check that grid_size is this model's."
        )
    weights = weights / weights.sum(-1, keepdim=True)
    groups = weights.split([num_queries, num_class_tokens, grid_size**2], dim=-1)
    shares = torch.stack([group.sum(-1).mean(-1) for group in groups], dim=-1)
    over_patches = groups[-1].mean(0)
    maps = over_patches / over_patches.sum(-1, keepdim=True).clamp_min(
        torch.finfo(torch.float).tiny
    )
    return QueryAttention(maps.unflatten(-1, (grid_size, grid_size)), shares)
