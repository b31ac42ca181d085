"""Whether the model computes the right numbers on this device, under every attention."""

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import transformers.utils
from torch.nn.attention import SDPBackend

from . import golden, models
from .frame import Setting, Step, aim, exact_float32
from .golden import Attention, Comparison

TOLERANCE = 1e-5  # largest error over the largest number, as on a CPU
EAGER, SDPA = Attention("eager"), Attention("sdpa")
MATH = Attention("sdpa", SDPBackend.MATH)
EFFICIENT = Attention("sdpa", SDPBackend.EFFICIENT_ATTENTION)
FLASH = Attention("sdpa", SDPBackend.FLASH_ATTENTION, decoder_only=True)
CUDNN = Attention("sdpa", SDPBackend.CUDNN_ATTENTION, decoder_only=True)
# Its kernel for GPUs takes heads from width 16 on.
FLEX = Attention("flex_attention", decoder_only=True, smallest_head=16)
NUM_LAYERS = 8  # for errors of rounding at the published width


def exact(attention: Attention, setting: Setting, sets: tuple[str, ...] = golden.SETS) -> dict:
    """All golden sets in float32; with tiny shapes, one of them."""
    whole = attention is not FLEX
    kinds = [golden.logits]
    if whole:
        kinds += [golden.features, golden.answers, golden.gradients]
    with exact_float32(), _stance(attention, setting):
        found, missing = _compare(attention, setting, torch.float32, kinds, sets)
    errors = [one.summary()["largest error"] for one in found.values()]
    aims = {"largest error": aim(_largest(errors), at_most=TOLERANCE)}
    if whole:
        others = sum(len(one.other_ids) for one in found.values())
        aims["answers with other ids"] = aim(others, at_most=0)
    return {"aims": aims, **_told(found, missing)}


def half(attention: Attention, setting: Setting, sets: tuple[str, ...] = golden.SETS) -> dict:
    """All golden sets in bfloat16: the error beside that of eager attention."""
    with _stance(attention, setting):
        found, missing = _compare(attention, setting, torch.bfloat16, [golden.logits], sets)
    eager, _ = _compare(EAGER, setting, torch.bfloat16, [golden.logits], tuple(found))
    ratios = [
        error / eager[name].errors[what]
        for name, one in found.items()
        for what, error in one.errors.items()
    ]
    aims = {"error over that of eager attention": aim(_largest(ratios), at_most=2)}
    return {"aims": aims, **_told(found, missing)}


def _compare(
    attention: Attention,
    setting: Setting,
    dtype: torch.dtype,
    kinds: list[Callable[..., None]],
    sets: tuple[str, ...],
) -> tuple[dict[str, Comparison], list[str]]:
    """Set -> what was found, and the sets that are not here or do not suit the kernel."""
    found, missing = {}, []
    for name in sets[:1] if setting.tiny else sets:
        if golden.find(name) is None:
            missing.append(f"{name} is not here")
            continue
        numbers = golden.load(name, attention, setting, dtype)
        if (width := numbers.config.text_config.head_dim) < attention.smallest_head:
            missing.append(f"{name} has heads of width {width}")
            continue
        found[name] = Comparison()
        for kind in kinds:
            kind(numbers, attention, found[name])
    return found, missing


def _told(found: dict[str, Comparison], missing: list[str]) -> dict[str, Any]:
    if not any(one.errors for one in found.values()):
        reasons = [reason for one in found.values() for reason in one.refused.values()]
        raise RuntimeError(f"no case was computed: {(reasons or missing)[0]}")
    told: dict[str, Any] = {"sets": {name: one.summary() for name, one in found.items()}}
    return told | ({"left out": missing} if missing else {})


def _largest(values: list[float | None]) -> float:
    """The largest, or NaN if there is one or nothing."""
    known = [value for value in values if value is not None]
    return max(known, key=lambda value: (value != value, value), default=float("nan"))


def _stance(attention: Attention, setting: Setting) -> Any:
    """Compiling flex attention for a CPU takes longer than all the rest."""
    if attention is FLEX and setting.device.type == "cpu":
        return torch.compiler.set_stance("force_eager")
    return nullcontext()


@torch.no_grad()
def rounding(setting: Setting) -> dict:
    """Error of bfloat16 against float32 with the same weights, at the published width, beside that
    of LLaMA.
    """
    batch = models.inputs(setting, batch=1, text=256 if not setting.tiny else 16, images=2)
    ids, indicators = batch["input_ids"], batch["mm_token_type_ids"]
    embeds = torch.randn(
        (*ids.shape, models.config(setting).text_config.hidden_size),
        generator=torch.Generator(setting.device).manual_seed(2),
        device=setting.device,
    )
    embeds = embeds.to(setting.dtype) * 0.02  # the size of embedded tokens
    errors = {}
    for name in ("llama", "ours"):
        model = getattr(models, "owl2" if name == "ours" else "llama")(setting, NUM_LAYERS)
        mixed = {"mm_token_type_ids": indicators} if name == "ours" else {}
        rounded = model(inputs_embeds=embeds, use_cache=False, **mixed).logits.float()
        exactly = copy.deepcopy(model).float()
        with exact_float32():
            expected = exactly(inputs_embeds=embeds.float(), use_cache=False, **mixed).logits
        real = slice(0, models.config(setting).image_token_id)  # ours sets the others to a constant
        difference = (rounded - expected)[..., real].norm()
        errors[name] = (difference / expected[..., real].norm()).item()
        del exactly, expected, rounded
    ratio = errors["ours"] / errors["llama"]
    return {"relative error": errors, "aims": {"error over LLaMA's": aim(ratio, at_most=1.25)}}


def check(dtype: str, setting: Setting) -> dict:
    """`owl2-hf check` on this device."""
    command = [sys.executable, "-m", "owl2_hf", "check", "--device", str(setting.device)]
    done = subprocess.run(
        [*command, "--dtype", dtype, "--json"], capture_output=True, text=True, cwd=golden.ROOT
    )
    try:
        report = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        raise RuntimeError(f"owl2-hf check printed no report: {done.stderr[-500:]}") from None
    checks = {
        one["name"]: ": ".join(filter(None, (one["status"], one["message"])))
        for one in report["checks"]
    }
    failed = sum(one["status"] == "failed" for one in report["checks"])
    return {"checks": checks, "aims": {"checks that failed": aim(failed, at_most=0)}}


def _needs(attention: Attention, setting: Setting) -> str | None:
    if (why := golden.not_here()) is not None:
        return why
    if setting.device.type != "cuda" and attention.backend not in (None, SDPBackend.MATH):
        return f"{attention.backend.name} is a kernel for GPUs"
    if attention.name.startswith("flash_attention"):
        return _flash_is_missing(attention.name, setting)
    return None


def _flash_is_missing(name: str, setting: Setting) -> str | None:
    if setting.device.type != "cuda":
        return f"{name} runs on GPUs alone"
    is_here = getattr(transformers.utils, f"is_flash_attn_{name[-1]}_available", lambda: False)
    # transformers then takes the kernel from the Hub, which may be in its cache.
    if is_here() or transformers.utils.is_kernels_available():
        return None
    return f"neither the package of {name} nor `kernels` is installed"


def _steps() -> list[Step]:
    single = {"eager": EAGER, "sdpa": SDPA, "sdpa, math": MATH, "sdpa, efficient": EFFICIENT}
    fused = {"sdpa": SDPA, "sdpa, flash": FLASH, "sdpa, cuDNN": CUDNN}
    flash = {
        f"flash_attention_{n}": Attention(f"flash_attention_{n}", decoder_only=True)
        for n in (2, 3, 4)
    }

    def step(what: str, call: Any, name: str, attention: Attention, minutes: float, **kw) -> Step:
        title = f"{what}, {name}"
        return Step(title, partial(call, attention, **kw), minutes, partial(_needs, attention))

    return [
        *(step("float32", exact, name, one, 0.25) for name, one in single.items()),
        *(step("bfloat16", half, name, one, 0.1) for name, one in fused.items()),
        *(step("bfloat16", half, name, one, 0.1) for name, one in flash.items()),
        Step("bfloat16 beside LLaMA", rounding, 0.1),
        step("float32", exact, "flex_attention", FLEX, 0.5, sets=("A", "B")),
        Step("owl2-hf check, float32", partial(check, "float32"), 0.7),
        Step("owl2-hf check, bfloat16", partial(check, "bfloat16"), 0.7, _only_on_a_gpu),
    ]


def _only_on_a_gpu(setting: Setting) -> str | None:
    return None if setting.device.type == "cuda" else "one dtype is enough without a GPU"


STEPS = _steps()
