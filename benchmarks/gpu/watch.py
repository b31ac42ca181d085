"""Runs the steps in a process of their own, so that whatever ends it costs one step alone."""

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
        command: Runs the steps that the file does not have. `--minutes N` is added, and for the
            first process `--retry`: it also runs what ended in an error before.

    Returns:
        The exit status of the last process.
    """
    end = time.monotonic() + 60 * minutes
    retry = ["--retry"]
    while True:
        left = max(end - time.monotonic(), 0.0)
        process = subprocess.Popen(
            [*command, *retry, "--minutes", f"{left / 60:.3f}"], start_new_session=True
        )
        retry = []
        try:
            reason = _wait(process, path, end + GRACE if left else float("inf"))
        finally:
            _kill(process)
        if process.returncode == 0:
            return 0
        failed = _give_up(path, reason or f"the process ended with status {process.returncode}")
        if not failed and process.returncode != LOST:
            return process.returncode


def _wait(process: "subprocess.Popen[bytes]", path: Path, end: float) -> str:
    """Wait for the end of a process. Returns why it must be stopped, or nothing."""
    while True:
        try:
            process.wait(timeout=0.5)
            return ""
        except subprocess.TimeoutExpired:
            pass
        for _, _, begun in _begun(path):
            allowed = 3 * begun["minutes"] + 1.5
            if time.monotonic() > end:
                return "it was stopped: the time for all steps was over"
            if time.time() - begun[BEGUN] > 60 * allowed:
                return f"it was stopped: no end after {allowed:.1f} minutes"


def _begun(path: Path) -> Iterator[tuple[str, str, dict[str, float]]]:
    content = read(path) or {"results": {}}
    for part, steps in content["results"].items():
        for name, outcome in steps.items():
            if BEGUN in outcome:
                yield part, name, outcome


def _give_up(path: Path, reason: str) -> list[str]:
    """Record the step that was running as an error. Returns its name."""
    failed = list(_begun(path))
    if failed:
        content = read(path) or {}
        for part, name, _ in failed:
            content["results"][part][name] = {ERROR: reason}
        write(path, content)
    return [name for _, name, _ in failed]


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """End the process and those that it started, such as a compiler's."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
