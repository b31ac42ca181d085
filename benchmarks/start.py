"""Time to start: `import owl2_hf` against `import transformers` alone, and `owl2-hf --help`.

Each run is a process of its own and the three kinds take turns, so that a busy machine slows all of
them:

    python -m benchmarks.start --repeats 9 --json results.json

Seconds of the wall clock count what a user waits for, seconds of the CPU are steadier where other
programs run.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from .timing import write

COMMANDS = {
    "python": [sys.executable, "-c", ""],
    "import transformers": [sys.executable, "-c", "import transformers"],
    "import owl2_hf": [sys.executable, "-c", "import owl2_hf"],
    "owl2-hf --help": [sys.executable, "-m", "owl2_hf", "--help"],
}
BASE = "import transformers"


def time_process(command: list[str]) -> dict[str, float]:
    """Seconds of the wall clock and of the CPU that a process takes from its start to its end."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command} failed with status {process.returncode}")
    return {"wall": time.perf_counter() - start, "cpu": usage.ru_utime + usage.ru_stime}


def summarize(
    runs: list[dict[str, float]], base: list[dict[str, float]]
) -> dict[str, dict[str, float]]:
    """Median, spread (largest less smallest) and ratio of the medians to those of `base`, by
    clock.
    """
    summary = {}
    for clock in runs[0]:
        seconds = [run[clock] for run in runs]
        median = statistics.median(seconds)
        ratio = median / statistics.median(run[clock] for run in base)
        summary[clock] = {"median": median, "spread": max(seconds) - min(seconds), "ratio": ratio}
    return summary


def run(repeats: int = 9) -> dict[str, dict]:
    """Command -> summary of its runs, after one of each that fills the caches."""
    for command in COMMANDS.values():
        time_process(command)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in COMMANDS}
    for _ in range(repeats):
        for name, command in COMMANDS.items():
            runs[name].append(time_process(command))
    return {name: {**summarize(runs[name], runs[BASE]), "runs": runs[name]} for name in COMMANDS}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results = run(arguments.repeats)
    print(f"{'':20} {'clock':>5} {'median s':>9} {'spread s':>9} {'of ' + BASE:>22}")
    for name, summary in results.items():
        for clock in ("wall", "cpu"):
            values = summary[clock]
            print(
                f"{name:20} {clock:>5} {values['median']:9.3f} {values['spread']:9.3f} "
                f"{values['ratio']:22.2f}"
            )
    write(arguments.json, arguments, results)


if __name__ == "__main__":
    main()
