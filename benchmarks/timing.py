"""Run two measurements in turns, A B A B, and summarise them."""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

Run = Callable[[], object]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def seconds(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def in_turns(
    runs: Mapping[str, Run], rounds: int, warmup: int = 1, clock: Callable[[Run], float] = seconds
) -> dict[str, list[float]]:
    """Name -> seconds of each of its runs, which take turns, so that a busy moment strikes all
    alike.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(warmup + rounds):
        for name, run in runs.items():
            taken = clock(run)
            if turn >= warmup:
                times[name].append(taken)
    return times


def compare(
    runs: Mapping[str, Run],
    base: str,
    rounds: int,
    warmup: int = 1,
    clock: Callable[[Run], float] = seconds,
) -> dict[str, dict[str, float]]:
    """Name -> median seconds, and median and quartiles of its time over that of `base` in the same
    turn.
    """
    times = in_turns(runs, rounds, warmup, clock)
    return {name: summarize(taken, times[base]) for name, taken in times.items()}


def peak_memory() -> int:
    """Bytes of the largest resident set of this process.

    Not `ru_maxrss`: on Linux a process starts with that of the one that started it.
    """
    return _status("VmHWM")


def resident_memory() -> int:
    """Bytes of the resident set of this process."""
    return _status("VmRSS")


def _status(field: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition(f"{field}:")[2].split()[0]) * 1024


def summarize(taken: list[float], base: list[float]) -> dict[str, float]:
    ratios = [one / other for one, other in zip(taken, base, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {
        "seconds": statistics.median(taken),
        "ratio": statistics.median(ratios),
        "low": low,
        "high": high,
    }


def parser(description: str | None, rounds: int) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--rounds", type=int, default=rounds, help="turns that are measured")
    made.add_argument("--json", type=Path, help="where to write the results")
    return made


def write(path: Path | None, args: argparse.Namespace, results: Any) -> None:
    """The results with what they were measured on."""
    if path is None:
        return
    settings = {
        name: value
        for name, value in vars(args).items()
        if name in ("threads", "rounds", "repeats")
    }
    content = {"machine": {**settings, **machine()}, "results": results}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def machine() -> dict[str, Any]:
    """What this process runs on."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "torch": version("torch"),
        "transformers": version("transformers"),
    }


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


def row(name: str, result: Mapping[str, float], limit: float | None = None) -> str:
    """One line of a table."""
    spread = f"{result['low']:.3f} to {result['high']:.3f}"
    text = f"  {name:34} {result['seconds']:9.4f} s  {result['ratio']:6.3f}  {spread}"
    return text if limit is None else f"{text}  (at most {limit})"
