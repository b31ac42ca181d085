"""Where the host waits for the device, counted on a CPU.

On a GPU such a wait empties the queue of kernels. A CPU has no queue, but the same calls are made.
"""

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Operators whose result the host must see: numbers, or shapes that depend on the data.
# `lift_fresh` makes a tensor from Python's numbers: on a GPU a copy that the host waits for.
READING = {
    "_local_scalar_dense",
    "equal",
    "is_nonzero",
    "lift_fresh",
    "masked_select",
    "masked_scatter_backward",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
    "_unique",
    "_unique2",
}
# Methods that copy to the host, and dispatch nothing where the tensor is there.
COPYING = {"cpu", "numpy", "tolist"}


class _Operators(TorchDispatchMode):
    def __init__(self, counts: Counter[str]):
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in READING and not (name == "lift_fresh" and args[0].numel() == 0):
            self.counts[name] += 1
        elif name in ("index", "index_put", "index_put_"):
            masks = [one for one in args[1] if one is not None and one.dtype in _MASKS]
            self.counts["boolean index"] += len(masks)
        elif name == "repeat_interleave" and isinstance(args[0], torch.Tensor):
            self.counts[name] += kwargs is None or kwargs.get("output_size") is None
        return func(*args, **(kwargs or {}))


_MASKS = (torch.bool, torch.uint8)


class _Methods(TorchFunctionMode):
    def __init__(self, counts: Counter[str]):
        super().__init__()
        self.counts = counts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in COPYING:
            self.counts[name] += 1
        # `.to(other.device)` is nothing to count: on a GPU both are there.
        elif name == "to" and "cpu" in [
            one for one in (*args[1:], *(kwargs or {}).values()) if isinstance(one, str)
        ]:
            self.counts["to cpu"] += 1
        return func(*args, **(kwargs or {}))


def host_syncs(function: Callable[[], Any]) -> Counter[str]:
    """What makes the host wait in a call, with the backward pass if it runs one."""
    counts: Counter[str] = Counter()
    with ExitStack() as stack:
        stack.enter_context(_Methods(counts))
        stack.enter_context(_Operators(counts))
        function()
    return +counts
