"""Count the memory that PyTorch allocates, for real tensors or for fake ones without data."""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make while it is active.

    Operations on tensors with data alone run as usual, also among fake tensors. Token ids have
    data, so the model's decisions on them (where the images are) are those of a real run.

    `torch.distributed._tools.mem_tracker` has more, but it is private, and hooks into modules that
    stand-ins of quantised layers do not have.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive = 0  # bytes
        self.peak = 0  # largest `alive` since the last `restart`
        self._known: dict[int, weakref.ref[Any]] = {}  # id of a storage -> the storage

    def restart(self) -> None:
        """Forget the peak so far."""
        self.peak = self.alive

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        if given and not any(isinstance(one, FakeTensor) for one in given):
            with unset_fake_temporarily():
                result = func(*args, **kwargs)
        else:
            result = func(*args, **kwargs)
        for one in tree_leaves(result):
            if isinstance(one, Tensor):
                self._count(one)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, num_bytes = id(storage), storage.nbytes()
        if key in self._known:
            return

        def free(_: Any) -> None:
            del self._known[key]
            self.alive -= num_bytes

        self._known[key] = weakref.ref(storage, free)
        self.alive += num_bytes
        self.peak = max(self.peak, self.alive)


class _LayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        if not torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        weight, bias = (None if one is None else one.float() for one in (self.weight, self.bias))
        return nn.functional.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps)


class _Dropout(nn.Dropout):
    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return torch.native_dropout(x, self.p, True)[0] if self.training and self.p else x


def follow_gpu(model: nn.Module) -> None:
    """Let modules keep for the gradients what they do on a GPU, where a CPU does something else.

    Under autocast a GPU computes layer norms in float32; dropout keeps a boolean mask.
    """
    for module in model.modules():
        for kind, as_on_gpu in ((nn.LayerNorm, _LayerNorm), (nn.Dropout, _Dropout)):
            if type(module) is kind:
                module.__class__ = as_on_gpu


@contextmanager
def without_data() -> Iterator[Allocations]:
    """Make fake tensors of whatever is made inside, and count them."""
    with FakeTensorMode(allow_non_fake_inputs=True), Allocations() as found:
        yield found


def materialize(model: nn.Module) -> None:
    """Replace parameters and buffers on the meta device, which would stay there, in place.

    `Module.to_empty` cannot: it exchanges tensors, which fake ones refuse.
    """
    made: dict[int, nn.Parameter] = {}  # tied parameters stay one
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None:
                if id(old) not in made:
                    new = torch.empty(old.shape, dtype=old.dtype)
                    made[id(old)] = nn.Parameter(new, requires_grad=old.requires_grad)
                module._parameters[name] = made[id(old)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors; what several of them share counts once."""
    storages = {id(storage): storage for storage in (one.untyped_storage() for one in tensors)}
    return sum(storage.nbytes() for storage in storages.values())
