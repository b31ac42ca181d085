"""Training steps: LoRA, QLoRA, the visual branch and stage 2, with and without gradient
checkpointing.

Each model is made ready as the shipped recipe says (what trains, dtype of the weights, adapter), and
steps as the Trainer does. A row has 2,048 positions, 4 x 65 of them visual. QLoRA needs
bitsandbytes. One more step runs LoRA through `Owl2Trainer` itself.

LoRA takes turns with the same LoRA on `LlamaForCausalLM` of the same shape. LLaMA has no vision
encoder, so the aim is for a step whose images were encoded before; the whole step is told beside
it.

MFU is the FLOPs of a step over its time and the measured bfloat16 rate of matrix products. The
FLOPs are counted as `operations.count` does, without what checkpointing computes a second time; as
in PaLM (arXiv:2204.02311, appendix B), attention counts without its causal mask. They are counted,
and the memory is measured, with 1 and 2 decoder layers; each further layer adds the same. Where all
32 layers do not fit, "decoder layers" says how many were trained.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch

from owl2_hf.training.recipe import Recipe, load_recipe

from ..timing import Run
from . import models, operations
from .frame import Setting, Step, aim, compare, matmul_rate, peak_memory, release
from .trained import NUM_IMAGES, Training, encode, llama, num_positions, ours
from .trainer import through_the_trainer

LIMIT = 1.06  # of the time over LLaMA's
ROUNDS, WARMUP = 5, 2
USABLE = 0.9  # share of the free memory; the rest is lost between allocations
OURS, LLAMA, ENCODED = "ours", "LLaMA", "ours, images encoded before"


@dataclass(frozen=True)
class Needs:
    """What a step takes with any number of decoder layers, from what it takes with 1 and 2."""

    flops: tuple[int, int]
    peaks: tuple[int | None, int | None]

    def flops_of(self, num_layers: int) -> int:
        first, second = self.flops
        return first + (num_layers - 1) * (second - first)

    def layers_in(self, memory: float, most: int) -> int:
        """How many layers fit; all of them where the memory is not known."""
        first, second = self.peaks
        if first is None or second is None:
            return most
        return max(1, min(most, 1 + int((memory - first) / max(second - first, 1))))


Make = Callable[[Recipe, Setting, int | None], Training]


def probe(make: Make, recipe: Recipe, setting: Setting, checkpointing: bool) -> Needs:
    flops, peaks = [], []
    for num_layers in (1, 2):
        free(setting)
        training = make(recipe, setting, num_layers)
        flops.append(operations.count(training.step))
        if checkpointing:
            training.checkpoint()
        peaks.append(peak_memory(training.step, setting))
        del training
    free(setting)
    return Needs((flops[0], flops[1]), (peaks[0], peaks[1]))


def free(setting: Setting) -> None:
    """Free what is not used any more; it takes a second, and on a CPU nothing has to."""
    if setting.device.type == "cuda":
        release(setting)


def free_memory(setting: Setting) -> float:
    if setting.device.type != "cuda":
        return 0.0
    return USABLE * torch.cuda.mem_get_info(setting.device)[0]


def resident(setting: Setting) -> int:
    return torch.cuda.memory_allocated(setting.device) if setting.device.type == "cuda" else 0


def report(
    training: Training, seconds: float, flops: int, peak: int | None, setting: Setting
) -> dict[str, Any]:
    return {
        "step seconds": seconds,
        "tokens per second": num_positions(setting) / seconds,
        "FLOPs": flops,
        "MFU": flops / seconds / matmul_rate(setting),
        "peak memory": peak,
        "trained parameters": sum(one.numel() for one in training.parameters),
    }


def measure(name: str, checkpointing: bool, setting: Setting) -> dict[str, Any]:
    """A step of a recipe, with as many layers as fit."""
    recipe = load_recipe(name)
    needs = probe(ours, recipe, setting, checkpointing)
    base = probe(llama, recipe, setting, checkpointing) if name == "lora" else None
    most = models.config(setting).text_config.num_hidden_layers
    num_layers = needs.layers_in(free_memory(setting), most)
    while True:
        try:
            return measure_layers(recipe, checkpointing, setting, num_layers, needs, base)
        except torch.OutOfMemoryError:
            if num_layers <= 2:
                raise
        num_layers -= 2
        free(setting)


def measure_layers(
    recipe: Recipe,
    checkpointing: bool,
    setting: Setting,
    num_layers: int,
    needs: Needs,
    base: Needs | None,
) -> dict[str, Any]:
    """A step with so many layers.

    Args:
        base: Needs of LLaMA, where it is to take turns.
    """

    def begin(make: Make) -> tuple[Training, int | None]:
        """A model in training, and the peak of its first step."""
        before = resident(setting)
        training = make(recipe, setting, num_layers)
        if checkpointing:
            training.checkpoint()
        peak = peak_memory(training.step, setting)
        return training, None if peak is None else peak - before

    training, peak = begin(ours)
    runs: dict[str, Run] = {OURS: training.step}
    if base is not None:
        other, others_peak = begin(llama)
        runs |= {LLAMA: other.step, ENCODED: partial(training.step, **encode(training))}
    times = compare(runs, OURS if base is None else LLAMA, setting, ROUNDS, WARMUP)
    found: dict[str, Any] = {
        "decoder layers": num_layers,
        "positions": num_positions(setting),
        "images": NUM_IMAGES,
        "weights": recipe.quantization or recipe.dtype,
        "counted by": operations.COUNTED_BY,
        **report(training, times[OURS]["seconds"], needs.flops_of(num_layers), peak, setting),
    }
    names = ("decoder layers", "tokens per second", "MFU")
    found["shown"] = {name: found[name] for name in names}
    if peak is not None:
        found["shown"]["peak memory, GB"] = peak / 1e9
    if base is not None:
        seconds, ratio = times[LLAMA]["seconds"], times[ENCODED]["ratio"]
        found[LLAMA] = report(other, seconds, base.flops_of(num_layers), others_peak, setting)
        found["over LLaMA"] = {name: times[name] for name in (OURS, ENCODED)}
        found["aims"] = {"step without image encoding, over LLaMA": aim(ratio, at_most=LIMIT)}
    return found


def lacks_bitsandbytes(setting: Setting) -> str | None:
    if find_spec("bitsandbytes") is None:
        return "bitsandbytes is not installed: pip install 'owl2_hf[qlora]'"
    return None


def lacks_accelerate(setting: Setting) -> str | None:
    if find_spec("accelerate") is None:
        return "accelerate is not installed: pip install 'owl2_hf[train]'"
    return None


def _step(title: str, recipe: str, checkpointing: bool, minutes: float) -> Step:
    how = "with" if checkpointing else "without"
    run = partial(measure, recipe, checkpointing)
    needs = {"needs": lacks_bitsandbytes} if recipe == "qlora" else {}
    return Step(f"{title}, {how} gradient checkpointing", run, minutes, **needs)


STEPS = [
    _step("LoRA", "lora", True, 0.3),
    _step("LoRA", "lora", False, 0.3),
    Step("LoRA through the Trainer", through_the_trainer, 0.3, needs=lacks_accelerate),
    _step("stage 2", "instruct", True, 0.3),
    _step("visual branch", "visual-branch", True, 0.3),
    _step("QLoRA", "qlora", True, 0.35),
    _step("stage 2", "instruct", False, 0.3),
    _step("visual branch", "visual-branch", False, 0.3),
    _step("QLoRA", "qlora", False, 0.35),
]
