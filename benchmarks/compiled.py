"""A compiled prompt against LlamaModel compiled: each token once, or both branches for every token.

    python -m benchmarks.compiled --json compiled.json

A compiled graph needs shapes that do not depend on the data. Where the number of visual tokens is
known, as it is where images come with the prompt, the graph sorts the tokens by modality and
computes each one once. Without it both branches compute every token and a mask selects. The prompt
is that of `benchmarks.decoder`. "projection" is the keys of one layer alone, in both ways and as a
grouped product (`torch.nn.functional.grouped_mm`, which compiled takes bfloat16 alone).
"""

from typing import Any

import torch
from torch import Tensor, nn

from .decoder import PICTURE, POSITIONS, SHAPES, STARTS, build, indicators
from .timing import DTYPES, compare, parser, row, write

NUM_VISUAL = PICTURE * len(STARTS)


@torch.no_grad()
def prompt(shape: str, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """LlamaModel compiled, ours compiled with and without the number of visual tokens, and ours as
    it is.
    """
    models = {name: build(name, shape, dtype).eval() for name in ("llama", "ours")}
    compiled = {
        name: torch.compile(model, fullgraph=True, dynamic=False) for name, model in models.items()
    }
    embeds = torch.randn(1, POSITIONS, models["llama"].config.hidden_size, dtype=dtype)
    visual = {"mm_token_type_ids": indicators()}
    counted = {**visual, "num_visual_tokens": NUM_VISUAL}
    runs = {
        "LlamaModel, compiled": lambda: compiled["llama"](inputs_embeds=embeds, use_cache=False),
        "ours, compiled": lambda: compiled["ours"](
            inputs_embeds=embeds, use_cache=False, **counted
        ),
        "ours, compiled, number not known": lambda: compiled["ours"](
            inputs_embeds=embeds, use_cache=False, **visual
        ),
        "ours, eager": lambda: models["ours"](inputs_embeds=embeds, use_cache=False, **visual),
    }
    return compare(runs, "LlamaModel, compiled", rounds, warmup=2)


def dense(x: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
    """(L, D), (2, D, D), (L,) -> (L, D), both products at every position."""
    text, visual = (nn.functional.linear(x, weight) for weight in weights)
    return torch.where(mask[:, None], visual, text)


def split(x: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
    """The same as the model does it, each position multiplied once."""
    order = torch.argsort(mask, stable=True)
    text, visual = x[order].split([len(mask) - NUM_VISUAL, NUM_VISUAL])
    product = torch.cat(
        [nn.functional.linear(text, weights[0]), nn.functional.linear(visual, weights[1])]
    )
    return product[torch.argsort(order)]


def grouped(x: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
    """The same by one grouped product, which needs no number of visual tokens."""
    order = torch.argsort(mask.int(), stable=True)
    ends = torch.stack([(~mask).sum(), torch.full_like(order[0], len(mask))]).int()
    product = nn.functional.grouped_mm(x[order], weights.transpose(1, 2), offs=ends)
    return torch.empty_like(product).index_copy(0, order, product)


@torch.no_grad()
def projection(shape: str, rounds: int) -> dict[str, Any]:
    """The keys of one layer, compiled, in bfloat16."""
    width = SHAPES[shape]["hidden_size"]
    x = torch.randn(POSITIONS, width).bfloat16()
    weights = (torch.randn(2, width, width) / width**0.5).bfloat16()
    mask = indicators()[0].bool()
    for way in (split, grouped):
        torch.testing.assert_close(way(x, weights, mask), dense(x, weights, mask))
    ways = {way.__name__: torch.compile(way, fullgraph=True) for way in (dense, split, grouped)}
    runs = {name: lambda way=way: way(x, weights, mask) for name, way in ways.items()}
    # The weights are parameters of two modules: a group needs them side by side, which is a copy of
    # both.
    parts = weights.unbind()
    runs["grouped, weights stacked first"] = lambda: ways["grouped"](x, torch.stack(parts), mask)
    return compare(runs, "dense", rounds, warmup=2)


def main() -> None:
    options = parser(__doc__, rounds=9)
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    results: dict[str, Any] = {}
    for name, dtype in DTYPES.items():
        results[f"prompt, {name}"] = prompt("1024 x 8", dtype, args.rounds)
    for shape in SHAPES:
        results[f"projection, {shape}"] = projection(shape, 5 * args.rounds)
    for what, found in results.items():
        print(what)
        for name, result in found.items():
            print(row(name, result))
    write(args.json, args, results)


if __name__ == "__main__":
    main()
