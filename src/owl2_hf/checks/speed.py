"""Measure decoding speed, and compare it with the limit that memory bandwidth sets."""

import time
from collections.abc import Callable

import torch

from ..modeling.modeling_mplug_owl2 import MplugOwl2ForConditionalGeneration
from .subject import Found, Subject, num_bytes

NUM_TOKENS = 32
COPIED = {"cpu": 2**26, "cuda": 2**29}  # bytes; larger than the caches


def speed(subject: Subject) -> Found:
    """Never fails for being slow; what it measures is in `detail`."""
    device = subject.model.device
    inputs = subject.rows(0)
    subject.decode(inputs, 2)  # warm-up
    rest = _seconds(lambda: subject.decode(inputs, 1), device)
    seconds = max(_seconds(lambda: subject.decode(inputs, 1 + NUM_TOKENS), device) - rest, 1e-9)
    tokens, bandwidth = NUM_TOKENS / seconds, copy_bandwidth(device)
    share = tokens * bytes_per_token(subject.model) / bandwidth
    memory = f"{share:.1%} of the memory bandwidth ({bandwidth / 1e9:.1f} GB/s)"
    return Found(None, None, detail=f"{tokens:.1f} tokens a second, {memory}")


def bytes_per_token(model: MplugOwl2ForConditionalGeneration) -> int:
    """Bytes of the weights that a decoded token reads: text branch, last norm and head."""
    decoder = model.model.language_model
    read = [*decoder.norm.parameters(), *model.lm_head.parameters()]
    read += [weight for name, weight in decoder.layers.named_parameters() if "visual_" not in name]
    return sum(map(num_bytes, read))


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second that a copy reads and writes."""
    size = COPIED.get(device.type, COPIED["cpu"])
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    return 2 * size / _seconds(lambda: target.copy_(source), device, repeats=5)


def _seconds(call: Callable[[], object], device: torch.device, repeats: int = 2) -> float:
    """The shortest of some runs."""

    def wait() -> None:
        if device.type in ("cuda", "mps"):
            getattr(torch, device.type).synchronize()

    times = []
    for _ in range(repeats):
        wait()
        start = time.perf_counter()
        call()
        wait()
        times.append(time.perf_counter() - start)
    return max(min(times), 1e-9)
