"""Training steps: LoRA, QLoRA, the visual branch and stage 2, with and without gradient
checkpointing.

Each model is made ready as the shipped recipe of that name says (what trains, dtype of the weights,
adapter), and steps as the Trainer does: a forward under bfloat16 autocast, a backward, clipped
gradients, and fused AdamW. A row has 2,048 positions, 4 x 65 of them visual. QLoRA needs
bitsandbytes.

LoRA takes turns with the same LoRA on `LlamaForCausalLM` of the same shape. LLaMA has no vision
encoder, so the aim is for a step whose images were encoded before; the whole step is told beside
it.

MFU is the FLOPs of a step over its time and the measured bfloat16 rate of matrix products. The
FLOPs are counted as `operations.count` does, without what checkpointing computes a second time; as
in PaLM (arXiv:2204.02311, appendix B), attention counts without its causal mask. They are counted,
and the memory is measured, with 1 and 2 decoder layers; each further layer adds the same. Where all
32 layers do not fit, "decoder layers" says how many were trained.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from peft import get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import BitsAndBytesConfig, LlamaForCausalLM

from owl2_hf.modeling import MplugOwl2ForConditionalGeneration
from owl2_hf.modeling.loading_mplug_owl2 import UNQUANTIZED
from owl2_hf.training.adapters import LORA_PRESETS, lora_config
from owl2_hf.training.components import freeze_all_but
from owl2_hf.training.recipe import Recipe, load_recipe

from ..timing import Run
from . import models, operations
from .frame import Setting, Step, aim, compare, matmul_rate, peak_memory, release

NUM_IMAGES = 4
LIMIT = 1.06  # of the time over LLaMA's
ROUNDS, WARMUP = 5, 2
USABLE = 0.9  # share of the free memory; the rest is lost between allocations
MAX_GRAD_NORM = 1.0  # the Trainer's default
OURS, LLAMA, ENCODED = "ours", "LLaMA", "ours, images encoded before"


class Training:
    """A model that trains on one batch, again and again."""

    def __init__(self, model: nn.Module, batch: Mapping[str, Any], setting: Setting):
        self.model, self.batch, self.device = model.train(), batch, setting.device
        self.parameters = [one for one in model.parameters() if one.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5, fused=True)

    def step(self, **inputs: Any) -> None:
        """One optimizer step.

        Args:
            inputs: In the place of those of the batch; `None` leaves one out.
        """
        with torch.autocast(self.device.type, torch.bfloat16):
            loss = self.model(**{**self.batch, **inputs}).loss
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def checkpoint(self) -> None:
        """Keep no activations but those between layers, from now on."""
        base = self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model
        # Older releases of transformers have the second name alone, newer ones warn about it.
        enable = getattr(base, "activation_checkpointing_enable", None)
        (enable or base.gradient_checkpointing_enable)({"use_reentrant": False})


def num_positions(setting: Setting) -> int:
    return 64 if setting.tiny else 2048


def ours(recipe: Recipe, setting: Setting, num_layers: int | None = None) -> Training:
    """The model as `owl2_hf.training.run` makes it ready, with random weights."""
    config = models.config(setting, num_layers)
    model = models.build(MplugOwl2ForConditionalGeneration, config, setting)
    if recipe.quantization is not None:
        quantise(model, setting)
    else:
        model = model.to(getattr(torch, recipe.dtype))
    if recipe.adapter is not None:
        model = get_peft_model(model, lora_config(**dataclasses.asdict(recipe.adapter)))
    freeze_all_but(model, recipe.trains if recipe.adapter is None else "adapters")
    model.config.use_cache = False
    num_text = num_positions(setting) - NUM_IMAGES * config.num_image_tokens
    batch = models.inputs(setting, 1, num_text, NUM_IMAGES)
    return Training(model, with_labels(batch), setting)


def llama(recipe: Recipe, setting: Setting, num_layers: int | None = None) -> Training:
    """LLaMA of the same shape with the same adapter, and as many positions of text."""
    assert recipe.adapter is not None
    model = models.build(LlamaForCausalLM, models.llama_config(setting, num_layers), setting)
    adapter = lora_config(**dataclasses.asdict(recipe.adapter))
    adapter.target_modules = set(LORA_PRESETS[recipe.adapter.preset].leaves)
    model = get_peft_model(model.to(getattr(torch, recipe.dtype)), adapter)
    model.config.use_cache = False
    batch = models.inputs(setting, 1, num_positions(setting), 0)
    return Training(model, with_labels({"input_ids": batch["input_ids"]}), setting)


def with_labels(batch: dict[str, Any]) -> dict[str, Any]:
    """Every position is learned from; the model itself leaves the visual ones out."""
    ids = batch["input_ids"]
    return {**batch, "attention_mask": torch.ones_like(ids), "labels": ids}


def quantise(model: nn.Module, setting: Setting) -> None:
    """Quantise in place what `from_pretrained` would, and make the rest ready as
    `owl2_hf.training.run` does.
    """
    from bitsandbytes.nn import Linear4bit, Params4bit
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    weights = dict(model.named_parameters())
    replace_with_bnb_linear(model, UNQUANTIZED, config)  # by modules without data
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            whole = weights[f"{name}.weight"].data
            settings = {**vars(module.weight), "requires_grad": False}
            module.weight = Params4bit(whole, **settings).to(setting.device)
    model.is_loaded_in_4bit = True
    prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


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
    found = {
        "decoder layers": num_layers,
        "positions": num_positions(setting),
        "images": NUM_IMAGES,
        "weights": recipe.quantization or recipe.dtype,
        "counted by": operations.COUNTED_BY,
        **report(training, times[OURS]["seconds"], needs.flops_of(num_layers), peak, setting),
    }
    if base is not None:
        seconds, ratio = times[LLAMA]["seconds"], times[ENCODED]["ratio"]
        found[LLAMA] = report(other, seconds, base.flops_of(num_layers), others_peak, setting)
        found["over LLaMA"] = {name: times[name] for name in (OURS, ENCODED)}
        found["aims"] = {"step without image encoding, over LLaMA": aim(ratio, at_most=LIMIT)}
    return found


@torch.no_grad()
def encode(training: Training) -> dict[str, Any]:
    """What a step takes in the place of pixels."""
    with torch.autocast(training.device.type, torch.bfloat16):
        model = training.model.get_base_model()
        features = model.get_image_features(training.batch["pixel_values"])
    return {"pixel_values": None, "mm_encoder_outputs": {"image": features}}


def lacks_bitsandbytes(setting: Setting) -> str | None:
    if find_spec("bitsandbytes") is None:
        return "bitsandbytes is not installed: pip install 'owl2_hf[qlora]'"
    return None


def _step(title: str, recipe: str, checkpointing: bool, minutes: float) -> Step:
    how = "with" if checkpointing else "without"
    run = partial(measure, recipe, checkpointing)
    needs = {"needs": lacks_bitsandbytes} if recipe == "qlora" else {}
    return Step(f"{title}, {how} gradient checkpointing", run, minutes, **needs)


STEPS = [
    _step("LoRA", "lora", True, 0.35),
    _step("LoRA", "lora", False, 0.35),
    _step("stage 2", "instruct", True, 0.3),
    _step("visual branch", "visual-branch", True, 0.3),
    _step("QLoRA", "qlora", True, 0.35),
    _step("stage 2", "instruct", False, 0.3),
    _step("visual branch", "visual-branch", False, 0.3),
    _step("QLoRA", "qlora", False, 0.35),
]
