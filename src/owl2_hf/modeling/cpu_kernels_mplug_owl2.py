"""Faster matrix products on a CPU: one row in bfloat16, and int8 weights of torchao.

A decoding step multiplies each weight matrix with one row. It should take as long as reading the
weights, but the default kernels take two to ten times as long.

T: rows, K: input features, N: output features.
"""

import functools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# 1: use PyTorch's kernel for single rows on every processor. 0: on none.
VARIABLE = "OWL2_HF_SINGLE_ROW_KERNEL"
# Up to 16 rows would be faster, but the two products add up in another order: a score would change
# in the last bits with the number of images in its batch. Prompts have more rows.
MAX_INT8_ROWS = 4
# PyTorch's int8 kernel reads 16 columns at a time with aligned loads, and checks neither: where a
# row is not aligned, the process crashes. PyTorch aligns what it allocates to 64 bytes.
INT8_COLUMNS, ALIGNMENT = 16, 64
# Weights that are brought to 16 bits at a time. Memory of larger tensors goes back to the system
# after each use, and getting it again takes longer than the product.
INT8_BLOCK = 4 * 2**20


@functools.cache
def onednn_is_slow() -> bool:
    """Whether oneDNN multiplies a single bfloat16 row slower than PyTorch's own kernel.

    True on processors with AVX512-BF16 and without AMX (AMD Zen 4 and 5). Without AVX512-BF16
    oneDNN is as fast. With AMX it was not measured. The environment variable
    `OWL2_HF_SINGLE_ROW_KERNEL` overrules this: 1 is True, 0 is False.
    """
    wanted = os.environ.get(VARIABLE)
    if wanted in ("0", "1"):
        return wanted == "1"
    # Private names: if a release of PyTorch lacks one, nothing is changed.
    has_bfloat16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    has_tiles = getattr(torch.cpu, "_is_amx_tile_supported", lambda: True)()
    return bool(has_bfloat16 and not has_tiles)


class OneDnnSwitch:
    """Turns oneDNN off for the whole process, while nothing but single rows is computed.

    The setting belongs to the process, so all threads count together: the first single row turns
    oneDNN off, the last one turns it on again, and it is on while any thread has more rows. It is
    never turned on for a user who turned it off.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running = {"single": 0, "many": 0}
        self.is_off = False  # by this object

    @contextmanager
    def rows(self, kind: str) -> Iterator[None]:
        """Args: kind: `single` or `many`, the rows that are computed inside."""
        self._count(kind, 1)
        try:
            yield
        finally:
            self._count(kind, -1)

    def _count(self, kind: str, change: int) -> None:
        with self._lock:
            self._running[kind] += change
            wants_off = self._running["single"] > 0 and not self._running["many"]
            if wants_off and not self.is_off and torch._C._get_mkldnn_enabled():
                self._set(is_off=True)
            elif self.is_off and not wants_off:
                self._set(is_off=False)

    def _set(self, is_off: bool) -> None:
        # `torch.backends.mkldnn.flags` would also reset the user's float32 precision.
        torch._C._set_mkldnn_enabled(not is_off)
        self.is_off = is_off


ONEDNN = OneDnnSwitch()


def fast_single_row(method: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator of a model's method: a single row in bfloat16 is computed without oneDNN.

    This holds without gradients, in evaluation, on a CPU where `onednn_is_slow`. All other calls
    keep oneDNN. The first argument is looked at: ids (B, L) or embeddings (B, L, D). Images (N, 3,
    H, W) are never a single row. Compiled and traced graphs are left alone.
    """

    @functools.wraps(method)
    def chosen(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_eager() or not onednn_is_slow():
            return method(self, *args, **kwargs)
        given = args[0] if args else kwargs.get("input_ids")
        given = kwargs.get("inputs_embeds") if given is None else given
        is_single = (
            isinstance(given, Tensor)
            and given.shape[:2].numel() == 1
            and given.device.type == "cpu"
            and not (self.training or torch.is_grad_enabled())
            and self.dtype == torch.bfloat16
        )
        with ONEDNN.rows("single" if is_single else "many"):
            return method(self, *args, **kwargs)

    return chosen


def suits_single_row(
    module: Any, query: Tensor, key: Tensor, attention_mask: Tensor | None, kwargs: dict[str, Any]
) -> bool:
    """Whether `single_row_attention` may stand for the attention function sdpa.

    Args:
        module: The attention layer.
        query, key: (B, heads, L, head_dim) and (B, key_value_heads, past + L, head_dim).
        attention_mask: `None` where each position is seen.
        kwargs: Arguments of the attention function, with `cache` for a paged one.
    """
    return (
        _is_eager()
        and ONEDNN.is_off
        and module.config._attn_implementation == "sdpa"
        and attention_mask is None
        and query.device.type == "cpu"
        and query.dtype == torch.bfloat16
        and query.shape[2] == 1
        and query.shape[1] == key.shape[1]
        and kwargs.get("cache") is None
    )


def single_row_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one position, as products of matrices with columns.

    PyTorch's sdpa multiplies bfloat16 rows element by element here. This rounds scores to bfloat16,
    as transformers' eager attention does; the softmax is in float32.

    Args:
        query: (B, heads, 1, head_dim).
        key, value: (B, heads, past + 1, head_dim).

    Returns:
        (B, 1, heads, head_dim), and no weights, as sdpa.
    """
    scores = key.matmul(query.transpose(2, 3)).float() * scaling  # (B, heads, past + 1, 1)
    weights = scores.softmax(dim=2).to(query.dtype)
    output = value.transpose(2, 3).matmul(weights)  # (B, heads, head_dim, 1)
    return output.permute(0, 3, 1, 2), None


def _is_eager() -> bool:
    # What `torch.jit.is_tracing` asks, which has no types.
    return not torch.compiler.is_compiling() and torch._C._get_tracing_state() is None


class MplugOwl2Int8Linear(nn.Linear):
    """A linear layer whose weight is torchao's `Int8Tensor` with a scale for each row.

    torchao makes a copy of the whole matrix in 16 bits for each product. This layer multiplies few
    rows directly, and copies a part of the matrix at a time for many. The weight stays as it is, so
    saving and adapters do not notice. Where a product needs gradients, is compiled, or is not on a
    CPU, torchao computes it.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        if not _takes(self.weight, input):
            return super().forward(input)
        weight: Any = self.weight
        scale = weight.scale.flatten().to(input.dtype)  # (N,)
        rows = input.reshape(-1, input.shape[-1]).contiguous()  # (T, K)
        if len(rows) <= MAX_INT8_ROWS and _is_aligned(weight.qdata):
            rows = rows if _is_aligned(rows) else rows.clone()
            output = torch.ops.aten._weight_int8pack_mm(rows, weight.qdata, scale)  # (T, N)
        else:
            parts = weight.qdata.split(max(1, INT8_BLOCK // rows.shape[1]))
            products = [nn.functional.linear(rows, part.to(rows.dtype)) for part in parts]
            output = torch.cat(products, dim=-1).mul_(scale)  # (T, N)
        if self.bias is not None:
            output += self.bias
        return output.view(*input.shape[:-1], -1)


def _takes(weight: Any, input: Tensor) -> bool:
    """Whether the product is one for a CPU, without gradients, with a scale for each row."""
    return (
        hasattr(weight, "qdata")
        and _is_eager()
        and not torch.is_grad_enabled()
        and input.device.type == weight.qdata.device.type == "cpu"
        and input.numel() > 0
        and weight.act_quant_kwargs is None
        and weight.act_pre_scale is None
        and weight.scale.numel() == weight.shape[0]
        and weight.qdata.is_contiguous()
        and weight.shape[1] % INT8_COLUMNS == 0
    )


def _is_aligned(tensor: Tensor) -> bool:
    return tensor.data_ptr() % ALIGNMENT == 0


def use_int8_kernel(model: nn.Module) -> None:
    """Make `MplugOwl2Int8Linear` of the linear layers that torchao has rounded to int8.

    A weight that lies in a file has the file's alignment, so it may be copied into memory.
    """
    for module in model.modules():
        if type(module) is nn.Linear and type(module.weight).__name__ == "Int8Tensor":
            module.__class__ = MplugOwl2Int8Linear
            weight: Any = module.weight
            if weight.qdata.device.type == "cpu" and not _is_aligned(weight.qdata):
                weight.qdata = weight.qdata.clone()
