"""What all parts of `benchmarks.gpu` share: settings, steps, their file, clocks and limits."""

import gc
import json
import math
import statistics
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from .. import timing
from ..timing import Run
from .outcomes import BEGUN, ERROR, NOT_RUN, RESULT, lines_of, read, write

SHORT = 0.3  # minutes


@dataclass(frozen=True)
class Setting:
    """What the steps run on.

    Args:
        device: A CUDA device; the CPU runs every step as well, with `tiny`.
        tiny: Small shapes, to try the steps in seconds.
        dtype: Of weights and activations.
    """

    device: torch.device
    tiny: bool = False
    dtype: torch.dtype = torch.bfloat16


def nothing_missing(setting: Setting) -> str | None:
    """Every machine can run this step."""
    return None


@dataclass(frozen=True)
class Step:
    """One measurement.

    Args:
        name: Unique in its part.
        run: Measures. Returns what `json.dumps` takes; its "aims" are those of `aim`.
        minutes: Expected on an H100. A step that does not fit the time left is not begun.
        needs: Why this machine cannot run it, or `None`.
    """

    name: str
    run: Callable[[Setting], dict[str, Any]]
    minutes: float
    needs: Callable[[Setting], str | None] = nothing_missing


def aim(
    value: float, *, at_most: float | None = None, at_least: float | None = None
) -> dict[str, Any]:
    """A measured value, its limit, and whether it was reached; NaN never is.

    A step returns them by name: `{"aims": {"prefill over LLaMA": aim(1.03, at_most=1.05)}, ...}`.
    """
    limits = {"at most": at_most, "at least": at_least}
    reached = (at_most is None or value <= at_most) and (at_least is None or value >= at_least)
    given = {name: limit for name, limit in limits.items() if limit is not None}
    return {"value": value, **given, "reached": reached and not math.isnan(value)}


class Results:
    """The JSON file. It is written anew after each change; a run that ends early loses nothing."""

    def __init__(self, path: Path, machine: dict[str, Any], retry: Iterable[str] = ()):
        self.path = path
        found = read(path)
        if found is not None and not _same_machine(found["machine"], machine):
            path.replace(_other_name(path, found["machine"]))
            found = None
        self.content = found or {"machine": machine, "results": {}}

        for part, steps in self.content["results"].items():
            gone = {BEGUN, ERROR} if part in retry else {BEGUN}
            kept = {name: one for name, one in steps.items() if not gone & one.keys()}
            self.content["results"][part] = kept

    def of(self, part: str) -> dict[str, Any]:
        return self.content["results"].setdefault(part, {})

    def is_done(self, part: str, step: str) -> bool:
        return any(key in self.of(part).get(step, {}) for key in (RESULT, ERROR))

    def put(self, part: str, step: str, outcome: dict[str, Any]) -> None:
        self.of(part)[step] = outcome
        write(self.path, self.content)


def _same_machine(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(one.get(name) == other.get(name) for name in ("device", "tiny"))


def _other_name(path: Path, machine: dict[str, Any]) -> Path:
    """A free name beside `path` for the results of another machine."""
    words = "".join(c if c.isalnum() else "-" for c in str(machine.get("device", "other")).lower())
    names = (f"{path.stem}.{words}{number or ''}{path.suffix}" for number in range(1000))
    return next(new for name in names if not (new := path.with_name(name)).exists())


def run(
    parts: Mapping[str, list[Step]],
    setting: Setting,
    minutes: float,
    path: Path,
    retry: bool = True,
) -> dict[str, Any]:
    """Run the steps that the file does not have yet, one after the other, `in_order`.

    A step's error is its result, and the next one runs.

    Args:
        parts: Name -> steps.
        minutes: Time for all of them.
        retry: Also run the steps whose outcome was an error.

    Returns:
        The content of the file.

    Raises:
        DeviceLost: If the device computes nothing after an error; the file has the error.
    """
    end = time.monotonic() + 60 * minutes
    results = Results(path, machine(setting), parts if retry else ())
    before = None
    for part, step in in_order(parts):
        if results.is_done(part, step.name):
            continue
        left = (end - time.monotonic()) / 60
        if (why := _cannot(step, setting, left)) is not None:
            results.put(part, step.name, {NOT_RUN: why})
            continue
        if before not in (None, part):
            release(setting)
        before = part
        print(f"{part}: {step.name} ...", flush=True)
        results.put(part, step.name, {BEGUN: time.time(), "minutes": _expected(step, setting)})
        outcome = attempt(step, setting)
        results.put(part, step.name, outcome)
        print("\n".join(f"  {line}" for line in lines_of(outcome)), flush=True)
        if ERROR in outcome and not _answers(setting):
            raise DeviceLost(f"{part}: {step.name}")
    return results.content


def in_order(parts: Mapping[str, list[Step]]) -> list[tuple[str, Step]]:
    """The short steps of all parts as they are listed, then the long ones, the shortest first."""
    steps = [(part, step) for part, listed in parts.items() for step in listed]
    return sorted(steps, key=lambda one: one[1].minutes if one[1].minutes > SHORT else 0.0)


class DeviceLost(RuntimeError):
    """The device computes nothing any more in this process."""


def _cannot(step: Step, setting: Setting, left: float) -> str | None:
    if left <= 0 or (not setting.tiny and step.minutes > left):
        return f"no time: it takes about {step.minutes:g} minutes, {max(left, 0):.1f} were left"
    try:
        return step.needs(setting)
    except Exception as error:  # a question about what is installed may fail itself
        return f"cannot check whether it can run: {in_words(error)}"


def _expected(step: Step, setting: Setting) -> float:
    """Minutes; nobody knows them of another device."""
    return step.minutes if setting.device.type == "cuda" else max(step.minutes, 10.0)


def attempt(step: Step, setting: Setting) -> dict[str, Any]:
    """Run a step. Returns its result, or its error as text."""
    start = time.perf_counter()
    try:
        result = step.run(setting)
        json.dumps(result)  # what JSON does not take is an error of this step alone
        outcome: dict[str, Any] = {RESULT: result}
    except Exception as error:
        outcome = {ERROR: in_words(error), "where": traceback.format_exc()[-2000:]}
    if ERROR in outcome:
        release(setting)
    return {**outcome, "seconds": round(time.perf_counter() - start, 2)}


def in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"


def release(setting: Setting) -> None:
    """Free the memory that earlier steps held."""
    from . import models

    models.forget()
    torch.compiler.reset()
    gc.collect()
    if setting.device.type == "cuda":
        try:
            torch.cuda.empty_cache()
        except RuntimeError:  # after a fatal error of the device
            return


def _answers(setting: Setting) -> bool:
    """Whether the device still computes; after a fault in a kernel it refuses all work."""
    try:
        return bool(torch.ones(1, device=setting.device).sum().item() == 1)
    except RuntimeError:
        return False


# What is measured.


def synchronize(setting: Setting) -> None:
    if setting.device.type == "cuda":
        torch.cuda.synchronize(setting.device)


def clock(setting: Setting) -> Callable[[Run], float]:
    """How to take the seconds of one run: by events on a GPU, by the clock elsewhere."""
    if setting.device.type != "cuda":
        return timing.seconds

    def by_events(run: Run) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(setting.device)
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000

    return by_events


def time_of(run: Run, setting: Setting, rounds: int = 10, warmup: int = 3) -> float:
    """Median seconds of a run."""
    taken = timing.in_turns({"": run}, *_turns(setting, rounds, warmup), clock(setting))
    return statistics.median(taken[""])


def compare(
    runs: Mapping[str, Run], base: str, setting: Setting, rounds: int = 10, warmup: int = 3
) -> dict[str, dict[str, float]]:
    """As `timing.compare`: A B A B, by the clock of the device."""
    return timing.compare(runs, base, *_turns(setting, rounds, warmup), clock(setting))


def _turns(setting: Setting, rounds: int, warmup: int) -> tuple[int, int]:
    """A try of the steps measures nothing that counts."""
    return (2, 1) if setting.tiny else (rounds, warmup)


def peak_memory(run: Run, setting: Setting) -> int | None:
    """Bytes of the largest allocation on the GPU during a run, what was there before included;
    `None` on a CPU.
    """
    if setting.device.type != "cuda":
        run()
        return None
    torch.cuda.synchronize(setting.device)
    torch.cuda.reset_peak_memory_stats(setting.device)
    run()
    torch.cuda.synchronize(setting.device)
    return torch.cuda.max_memory_allocated(setting.device)


@cache
def bandwidth(setting: Setting) -> float:
    """Bytes a second between the device's memory and its units: a copy (read and written), or a sum
    (read alone), whichever is faster.
    """
    size = 2**24 if setting.tiny else 2**32
    source = torch.ones(size, dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)
    numbers = source.view(torch.float32)
    copied = 2 * size / time_of(lambda: target.copy_(source), setting)
    read = size / time_of(lambda: numbers.sum(), setting)
    return max(copied, read)


@cache
def matmul_rate(setting: Setting) -> float:
    """Operations a second of a product of two large matrices of random numbers."""
    size = 256 if setting.tiny else 8192
    a, b = (torch.randn(size, size, device=setting.device, dtype=setting.dtype) for _ in range(2))
    return 2 * size**3 / time_of(lambda: a @ b, setting)


def machine(setting: Setting) -> dict[str, Any]:
    """What the steps run on, as the JSON file tells it."""
    facts = {
        "device": timing.processor(),
        "tiny": setting.tiny,
        "dtype": str(setting.dtype).removeprefix("torch."),
        **timing.machine(),
        "bandwidth": bandwidth(setting),
        "matmul rate": matmul_rate(setting),
    }
    if setting.device.type == "cuda":
        properties = torch.cuda.get_device_properties(setting.device)
        facts |= {
            "device": properties.name,
            "memory": properties.total_memory,
            "driver": _driver(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return facts


def _driver() -> str | None:
    version = Path("/proc/driver/nvidia/version")
    try:
        return version.read_text(encoding="utf-8").splitlines()[0]
    except OSError:
        return None


@contextmanager
def exact_float32() -> Iterator[None]:
    """Products of float32 in float32: no TF32."""
    precision, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn
    torch.set_float32_matmul_precision("highest")
    try:
        with cudnn.flags(enabled=cudnn.enabled, benchmark=cudnn.benchmark, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
