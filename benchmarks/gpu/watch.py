"""Run the steps in their own process, so that a crash costs only one step."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from .outcomes import BEGUN, ERROR, read, write

LOST = 75  # exit status of a process whose device refuses all work: another one goes on
GRACE = 30.0  # seconds that a step may run beyond the time for all


def watch(command: list[str], path: Path, minutes: float) -> int:
    """Run `command` until all steps have an outcome.

    A process that dies, or hangs in a step, is replaced; that step's outcome is an error.

    Args:
        command: Runs the steps that the file does not have. `--until T` is added, the end
            in seconds as `time.time` tells it, and for the first process `--retry`: it also runs
            what ended in an error before.

    Returns:
        The exit status of the last process.
    """
    end = time.time() + 60 * minutes
    retry = ["--retry"]
    while True:
        limit = end + GRACE if end > time.time() else float("inf")
        process = subprocess.Popen(
            [*command, *retry, "--until", f"{end:.3f}"], start_new_session=True
        )
        retry, start = [], time.time()
        try:
            reason = _wait(process, path, start, limit)
        finally:
            _kill(process)
        if process.returncode == 0:
            return 0
        reason = reason or f"the process ended with status {process.returncode}"
        if not _give_up(path, start, reason) and process.returncode != LOST:
            return process.returncode


def _wait(process: "subprocess.Popen[bytes]", path: Path, start: float, end: float) -> str:
    """Wait for the end of a process. Returns why it must be stopped, or nothing."""
    while True:
        try:
            process.wait(timeout=0.5)
            return ""
        except subprocess.TimeoutExpired:
            pass
        if time.time() > end:
            return "it was stopped: no time was left for all steps"
        for _, _, begun in _begun(path, start):
            allowed = 3 * begun["minutes"] + 1.5
            if time.time() - begun[BEGUN] > 60 * allowed:
                return f"it was stopped after {allowed:.1f} minutes"


def _begun(path: Path, start: float) -> Iterator[tuple[str, str, dict[str, float]]]:
    """Part, step and outcome of what was begun since `start`, not by a run that was killed."""
    content = read(path) or {"results": {}}
    for part, steps in content["results"].items():
        for name, outcome in steps.items():
            if outcome.get(BEGUN, 0.0) >= start:
                yield part, name, outcome


def _give_up(path: Path, start: float, reason: str) -> bool:
    """Record the step that was running as an error. Returns whether there was one."""
    failed = list(_begun(path, start))
    content = read(path) or {"results": {}}
    for part, name, _ in failed:
        content["results"][part][name] = {ERROR: reason}
    if failed:
        write(path, content)
    return bool(failed)


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """End the process and those that it started, such as a compiler's."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
