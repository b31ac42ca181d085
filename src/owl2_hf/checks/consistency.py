"""Check that different ways to compute logits agree: cache, batch, saving, compiling, attention.

They hold for any model of the family. Each answer is compared with its own tokens read at once,
row by row, without a cache. So it does not matter which of two near-equal tokens was chosen.
"""

import os
import shutil
import sys
import sysconfig
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers.utils
from torch import Tensor
from transformers import CompileConfig

from .remote import ask_without_the_package
from .subject import PROMPTS, Found, Skipped, Subject, relative_error

ALL = tuple(range(len(PROMPTS)))
ONE_IMAGE, TWO_IMAGES = 1, 2


def cache(subject: Subject) -> Found:
    return Found(subject.decoding_error((TWO_IMAGES,)), subject.tolerance)


def static_cache(subject: Subject) -> Found:
    options = {"cache_implementation": "static", "disable_compile": True}
    return Found(subject.decoding_error((TWO_IMAGES,), **options), subject.tolerance)


def batch(subject: Subject) -> Found:
    found = Found(subject.decoding_error(ALL), subject.tolerance)
    side = subject.processor.tokenizer.padding_side
    if found.is_ok or side == "left":
        return found
    wrong = f"the tokenizer pads on the {side}, generation needs padding on the left"
    return found._replace(wrong=wrong)


def save_and_load(subject: Subject) -> Found:
    """Every tensor bit by bit, and the logits."""
    model = subject.model
    loaded = type(model).from_pretrained(subject.saved(), dtype=model.dtype, **_attention(subject))
    loaded = loaded.to(model.device).eval()
    before, after = model.state_dict(), loaded.state_dict()
    names = sorted(before.keys() | after.keys())
    other = [name for name in names if not _same(before.get(name), after.get(name))]
    again = Subject(loaded, subject.processor, subject.scratch)
    nothing = torch.zeros(0, dtype=torch.long)
    logits = (one.whole(one.rows(TWO_IMAGES), nothing) for one in (again, subject))
    wrong = ""
    if other:
        wrong = f"{len(other)} of {len(names)} tensors changed, the first is {other[0]}"
    return Found(relative_error(*logits), subject.tolerance, wrong)


def remote_code(subject: Subject) -> Found:
    text, images = PROMPTS[ONE_IMAGE]
    prompt = text.format(image=subject.processor.image_token)
    found = ask_without_the_package(subject, prompt, images)
    expected = subject.whole(subject.rows(ONE_IMAGE), torch.zeros(0, dtype=torch.long))
    return Found(relative_error(subject.real(found), expected), subject.tolerance)


def attention(name: str, subject: Subject) -> Found:
    """A padded batch with this attention against each row alone with eager attention."""
    model = subject.model
    if name.startswith("flash"):
        if model.device.type == "cpu":
            raise Skipped("it runs only on GPUs")
        if model.dtype == torch.float32:
            raise Skipped("it does not support float32: run again with --dtype bfloat16")
    stance, detail = nullcontext(), ""
    if name == "flex_attention":
        if model.device.type == "mps":
            raise Skipped("PyTorch supports it only on CPUs and CUDA GPUs")
        if model.device.type == "cpu":  # compiling takes longer than all other checks
            stance, detail = torch.compiler.set_stance("force_eager"), "not compiled"
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation(name)
        with stance:
            new_ids, logits = subject.decode(subject.rows(*ALL, padding_side="left"), 3)
        model.set_attn_implementation("eager")
        return Found(subject.whole_error(ALL, new_ids, logits), subject.tolerance, detail=detail)
    finally:
        model.set_attn_implementation(before)


def compiled(subject: Subject) -> Found:
    """One graph for each decoding step, with a static cache."""
    _check_compiler(subject.model.device)
    config = CompileConfig(fullgraph=True, dynamic=False, mode="default")
    config._compile_all_devices = True  # by default, transformers compiles only on GPUs
    options = {"cache_implementation": "static", "compile_config": config}
    return Found(subject.decoding_error((ONE_IMAGE,), **options), subject.tolerance)


def attention_checks() -> list[tuple[str, Callable[[Subject], Found]]]:
    """A check for each implementation that is here; eager is what the others are compared with."""
    names = ["sdpa", "flex_attention"]
    for version in (2, 3, 4):
        is_here = getattr(transformers.utils, f"is_flash_attn_{version}_available", None)
        if is_here is not None and is_here():
            names.append(f"flash_attention_{version}")
    return [(name, partial(attention, name)) for name in names]


def _attention(subject: Subject) -> dict[str, Any]:
    return {"attn_implementation": subject.model.config._attn_implementation}


def _same(before: Tensor | None, after: Tensor | None) -> bool:
    if before is None or after is None:
        return False
    if hasattr(before, "__tensor_flatten__"):  # torch.equal does not take torchao's tensors
        before, after = before.dequantize(), after.dequantize()
    return before.dtype == after.dtype and torch.equal(before, after)


def _check_compiler(device: torch.device) -> None:
    """Raises Skipped where torch.compile has nothing to compile with."""
    if device.type == "mps":
        raise Skipped("torch.compile was not tested on MPS")
    if device.type == "cuda":
        names, variable = [os.environ.get("CC", "gcc"), "clang"], "CC"
    else:
        default = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
        names, variable = [os.environ.get("CXX", default)], "CXX"
    if not any(map(shutil.which, names)):
        reason = f"{names[0]} was not found: install it, or set {variable} to your compiler"
        raise Skipped(f"no C compiler: {reason}")
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        raise Skipped(
            "Python.h was not found: install Python's headers, for example the package python3-dev"
        )
