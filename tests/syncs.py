"""Where the host waits for the device, counted on a CPU.

On a GPU such a wait empties the queue of kernels. A CPU has no queue, but the same calls are made.
Every tensor counts as one of the device, but those that come from a copy to the host.
"""

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

# Operators whose result the host must see: numbers, or shapes that depend on the data.
READING = {
    "_local_scalar_dense",
    "_unique",
    "_unique2",
    "equal",
    "is_nonzero",
    "masked_scatter_backward",
    "masked_select",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
}
# Makes a tensor of Python's numbers: on a GPU a copy that the host waits for.
MAKING = "lift_fresh"
INDEXING = {"index", "index_put", "index_put_"}
# Methods that copy to the host, and dispatch nothing where the tensor is there.
COPYING = {"cpu", "numpy", "tolist"}


def tensors_in(values: Any) -> list[torch.Tensor]:
    return [one for one in tree_leaves(values) if isinstance(one, torch.Tensor)]


class HostSyncs:
    """What made the host wait, by name."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.on_host = WeakIdKeyDictionary()

    def operator(self, name: str, args: tuple[Any, ...], output: Any) -> None:
        inputs = tensors_in(args)
        if inputs and inputs[0] in self.on_host:
            self.on_host.update(dict.fromkeys(tensors_in(output)))
        elif name in READING or (name == MAKING and inputs[0].numel()):
            self.counts[name] += 1
        elif name in INDEXING:
            masks = [one for one in tensors_in(args[1]) if one.dtype in (torch.bool, torch.uint8)]
            self.counts["boolean index"] += len(masks)

    def method(self, name: str, args: tuple[Any, ...], output: Any) -> Any:
        # `.to(other.device)` is nothing to count: on a GPU both are there.
        is_copy = name in COPYING or (
            name == "to" and "cpu" in [one for one in args if isinstance(one, str)]
        )
        if not is_copy or args[0] in self.on_host:
            return output
        self.counts[name] += 1
        if isinstance(output, torch.Tensor):
            output = output.detach()  # an object of its own: on a CPU nothing was copied
            self.on_host[output] = None
        return output


class _Operators(TorchDispatchMode):
    def __init__(self, syncs: HostSyncs):
        super().__init__()
        self.syncs = syncs

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self.syncs.operator(func.overloadpacket.__name__, args, output)
        return output


class _Methods(TorchFunctionMode):
    def __init__(self, syncs: HostSyncs):
        super().__init__()
        self.syncs = syncs

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        return self.syncs.method(getattr(func, "__name__", ""), args, output)


def host_syncs(function: Callable[[], Any]) -> Counter[str]:
    """What makes the host wait in a call, with the backward pass if it runs one."""
    syncs = HostSyncs()
    with ExitStack() as stack:
        stack.enter_context(_Methods(syncs))
        stack.enter_context(_Operators(syncs))
        function()
    return +syncs.counts
