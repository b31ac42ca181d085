"""Floating-point operations of matrix products, as PyTorch counts them while they run."""

from torch.utils.flop_counter import FlopCounterMode

from ..timing import Run

COUNTED_BY = "torch.utils.flop_counter"


def count(run: Run) -> int:
    """FLOPs of the matrix products, convolutions and attention of a run.

    Attention counts without its causal mask, and on a CPU not at all: PyTorch has no formula for
    its kernel there.
    """
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()
