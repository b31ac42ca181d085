"""Stand-ins for quantised layers: the sizes that torchao and bitsandbytes make, without weights.

So neither package nor a GPU is needed to compute what they take.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.quantizers_utils import should_convert_module

from ..modeling.loading_mplug_owl2 import UNQUANTIZED

_BLOCK = 64  # weights with a scale of their own in NF4
_SCALES_BLOCK = 256  # scales with a scale of their own, as they are quantised too


class StandInLinear(nn.Linear):
    """A quantised layer that allocates what the real one does, with numbers of no meaning.

    Args:
        linear: The layer to stand in for.
        to: `int8`, torchao's Int8WeightOnlyConfig; or `int4`, NF4 of bitsandbytes with quantised
            scales, as the recipe `qlora` sets it.
    """

    def __init__(self, linear: nn.Linear, to: str):
        nn.Module.__init__(self)
        self.out_features, self.in_features = linear.weight.shape
        self.dtype, self.bias = linear.weight.dtype, linear.bias
        num = linear.weight.numel()
        if to == "int8":
            packed = torch.empty(self.out_features, self.in_features, dtype=torch.int8)
            self.register_buffer("scale", torch.empty(self.out_features, 1))
            zero_point = torch.empty(self.out_features, 1, dtype=torch.int8)
            self.register_buffer("zero_point", zero_point)
        else:
            blocks = -(-num // _BLOCK)
            packed = torch.empty(-(-num // 2), 1, dtype=torch.uint8)  # two weights in a byte
            self.register_buffer("absmax", torch.empty(blocks, dtype=torch.uint8))
            self.register_buffer("code", torch.empty(16))
            self.register_buffer("nested_absmax", torch.empty(-(-blocks // _SCALES_BLOCK)))
            self.register_buffer("nested_code", torch.empty(256))
            self.register_buffer("offset", torch.empty(()))
        self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        shape = (self.out_features, self.in_features)
        # The type of the input is that of the output; between, all is in the weights' own.
        output = _multiply(x.to(self.dtype), shape).to(x.dtype)
        return output if self.bias is None else output + self.bias


class _Dequantized(torch.autograd.Function):
    """Multiplies with a matrix that is restored for the product and dropped after it, so that
    gradients keep neither it nor the input.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: tuple[int, int]) -> Tensor:
        ctx.shape = shape
        return x @ x.new_empty(shape).t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        return grad @ grad.new_empty(ctx.shape), None


_multiply: Callable[..., Tensor] = _Dequantized.apply


def quantize_stand_in(model: nn.Module, to: str) -> None:
    """Put stand-ins in the place of the layers that this package quantises."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and should_convert_module(name, UNQUANTIZED):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, StandInLinear(module, to))
