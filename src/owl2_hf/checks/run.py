"""Run the checks one after the other, independent of each other."""

import os
import platform
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging

from .. import __version__, default, registration
from ..modeling.modeling_mplug_owl2 import MplugOwl2ForConditionalGeneration
from ..naming import naming_model, place
from ..processing.processing_mplug_owl2 import MplugOwl2Processor
from . import consistency
from .report import FAILED, OK, SKIPPED, Check, Report
from .speed import speed
from .stored import Stored
from .subject import RELATIVE, Found, Skipped, Subject
from .versions import installed_versions

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in RELATIVE}
REINSTALL = "install the package again, and compare the versions with the tested ones"
ONE_FAULT = "answers may be wrong; try the tested versions, then report this output"

# Name of a check -> what to do where it fails.
MENDS = {
    "loading": REINSTALL,
    "token ids": f"the tokenizer gives other token ids: {REINSTALL}",
    "pixels": f"images are prepared in another way: try a tested version of pillow, or {REINSTALL}",
    "visual tokens": f"the vision encoder or the connector gives other results: {REINSTALL}",
    "logits": f"if the visual tokens are right, the decoder gives other results: {REINSTALL}",
    "answers": f"if the logits are right, decoding fails, most likely its cache: {REINSTALL}",
    "cache": f"decoding with a cache gives other logits than one pass without it: {ONE_FAULT}",
    "static cache": f"do not use cache_implementation='static': {ONE_FAULT}",
    "batch": "ask one prompt at a time, or set the tokenizer's padding_side to 'left'",
    "save and load": "do not save this model with save_pretrained here; try the tested versions",
    "remote code": "install owl2_hf wherever you load this model; try the tested versions",
    "compiled": f"do not use torch.compile: {ONE_FAULT}",
    "speed": ONE_FAULT,
}
OTHER_ATTENTION = "use another attn_implementation"


def check(
    model: str | os.PathLike[str] | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    attn_implementation: str | None = None,
    on_line: Callable[[str], None] | None = None,
) -> Report:
    """Check that a model computes correct results on this machine.

    Args:
        model: Folder or Hub id of a model. Default: the model in the package, which is also
            compared with stored numbers.
        device: Device to run on. Default: the first CUDA or MPS device, otherwise the CPU.
        dtype: "float32", "bfloat16" or "float16". Default: float32 for the model in the package,
            the dtype of the checkpoint for others.
        attn_implementation: Attention implementation, as for `from_pretrained`.
        on_line: Called with each line of the report as soon as it is ready.

    Raises:
        ValueError: If the device, dtype or attention does not exist, or `model` cannot be loaded.
    """
    say = on_line or (lambda line: None)
    where, kind = _device(device), _dtype(dtype)
    report = Report(
        version=__version__,
        model="the bundled model" if model is None else str(model),
        platform=_platform(where),
        versions=installed_versions(),
        device=str(where),
    )
    for line in (*report.header(), ""):
        say(line)
    with _quiet(), tempfile.TemporaryDirectory() as scratch:
        try:
            loaded, processor = _load(model, kind, attn_implementation)
            subject = Subject(loaded.to(where).eval(), processor, Path(scratch))
        except Exception as error:
            if model is not None or attn_implementation is not None:  # the user chose it
                raise
            message = _words("loading", error)
            report.checks.append(Check("loading", FAILED, None, None, 0.0, message))
            say(report.checks[-1].line())
        else:
            report.dtype = str(subject.model.dtype).removeprefix("torch.")
            report.attn_implementation = subject.model.config._attn_implementation
            say(report.subject())
            for name, call in _checks(subject, is_bundled=model is None):
                report.checks.append(_run(name, call))
                say(report.checks[-1].line())
    for line in report.summary():
        say(line)
    return report


def _checks(subject: Subject, is_bundled: bool) -> Iterator[tuple[str, Callable[[], Found]]]:
    """Name and call of each check: one explains the next, the slowest comes last."""
    if is_bundled:
        stored = Stored(subject)
        yield "token ids", stored.token_ids
        yield "pixels", stored.pixels
        yield "visual tokens", stored.visual_tokens
        yield "logits", stored.logits
        yield "answers", stored.answers
    checks = [
        ("cache", consistency.cache),
        ("static cache", consistency.static_cache),
        ("batch", consistency.batch),
        *consistency.attention_checks(),
        ("save and load", consistency.save_and_load),
        ("remote code", consistency.remote_code),
        ("speed", speed),
        ("compiled", consistency.compiled),
    ]
    for name, call in checks:
        yield name, partial(call, subject)


def _run(name: str, call: Callable[[], Found]) -> Check:
    start = time.perf_counter()
    difference = tolerance = None
    try:
        found = call()
        difference, tolerance = found.difference, found.tolerance
        status, message = OK, found.detail
        if not found.is_ok:
            status, message = FAILED, "; ".join(filter(None, (found.wrong, _mend(name))))
    except Skipped as reason:
        status, message = SKIPPED, str(reason)
    except torch.OutOfMemoryError:
        status, message = SKIPPED, "the device has too little memory for it"
    except Exception as error:  # after any error, the other checks still run
        status, message = FAILED, _words(name, error)
    return Check(name, status, difference, tolerance, time.perf_counter() - start, message)


def _words(name: str, error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}; {_mend(name)}"


def _mend(name: str) -> str:
    return MENDS.get(name, OTHER_ATTENTION)


def _load(
    model: str | os.PathLike[str] | None,
    dtype: torch.dtype | None,
    attention: str | None,
) -> tuple[MplugOwl2ForConditionalGeneration, MplugOwl2Processor]:
    options: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
    try:
        if model is None:
            return default.load_default(dtype=dtype or torch.float32, **options)
        folder = place(str(model))
        with naming_model(folder):
            _check_type(folder)
            options["dtype"] = dtype or "auto"
            loaded = AutoModelForImageTextToText.from_pretrained(folder, **options)
            if loaded.dtype not in RELATIVE:
                known = ", ".join(DTYPES)
                raise ValueError(
                    f"expected weights in {known}, got {loaded.dtype}; choose one with --dtype"
                )
            return loaded, AutoProcessor.from_pretrained(folder)
    except ImportError as error:  # the attention implementation needs a package
        raise ValueError(f"the model cannot be loaded: {error}") from error
    except ValueError as error:
        if model is not None or attention is None:
            raise
        raise ValueError(f"the bundled model: {error}") from error


def _check_type(folder: str) -> None:
    """Raises ValueError for another kind of model; loading tells of what has no configuration."""
    try:
        model_type = AutoConfig.from_pretrained(folder).model_type
    except (ValueError, OSError):  # an adapter, or a missing folder
        return
    if model_type not in registration.MODEL_TYPES:
        raise ValueError(f"expected a model of type 'mplug_owl2', got {model_type!r}")


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        has_mps = torch.backends.mps.is_available()
        device = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    try:
        found = torch.zeros(1, device=device)
        if found.is_meta:
            raise RuntimeError("its tensors have no values")
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        name = f"device {str(device)!r}"
        raise ValueError(f"{name} cannot be used ({reason}); use cpu, cuda:0 or mps") from error
    return found.device


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or dtype in RELATIVE:
        return dtype
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"expected a dtype of {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]


def _platform(device: torch.device) -> dict[str, Any]:
    facts = {"system": platform.platform(), "threads": f"{torch.get_num_threads()} threads"}
    if device.type == "cuda":
        facts |= {"gpu": torch.cuda.get_device_name(device), "cuda": f"CUDA {torch.version.cuda}"}
    return facts


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars, no hints of transformers; products of float32 on a GPU in float32."""
    verbosity, had_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    cudnn, precision = torch.backends.cudnn, torch.get_float32_matmul_precision()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_float32_matmul_precision("highest")
    try:
        with (
            warnings.catch_warnings(),
            cudnn.flags(enabled=cudnn.enabled, benchmark=cudnn.benchmark, allow_tf32=False),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        logging.set_verbosity(verbosity)
        if had_bar:
            logging.enable_progress_bar()
