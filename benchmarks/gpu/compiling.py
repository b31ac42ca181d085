"""`torch.compile` with counts of graph breaks and recompilations."""

from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo.utils import counters

from .frame import Setting, aim


def compiled(model: Any, **kwargs: Any) -> Callable[..., Any]:
    """The model as one graph for the shapes that it is called with; counting starts here."""
    torch.compiler.reset()
    counters.clear()
    return torch.compile(model, fullgraph=True, dynamic=False, **kwargs)


def counts(num_graphs: int, setting: Setting) -> dict[str, dict[str, Any]]:
    """Aims: what happened since `compiled`, beyond one graph for each of `num_graphs` models."""
    made = counters["stats"]["unique_graphs"]
    if not made:
        raise RuntimeError("nothing was compiled")
    aims = {
        "recompiles": aim(made - num_graphs, at_most=0),
        "graph breaks": aim(sum(counters["graph_break"].values()), at_most=0),
    }
    if setting.device.type == "cuda":
        skipped = counters["inductor"]["cudagraph_skips"]
        aims["CUDA graphs skipped"] = aim(skipped, at_most=0)
    return aims


def difference(one: torch.Tensor, other: torch.Tensor, num_ids: int) -> float:
    """Norm of the difference of logits (..., V) over the norm of `other`, of the first `num_ids`:
    those behind are a large constant.
    """
    one, other = one[..., :num_ids].float(), other[..., :num_ids].float()
    return ((one - other).norm() / other.norm()).item()
