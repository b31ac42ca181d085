"""Whether the tests notice a wrong formula: `make mutations`, or `python -m tests.mutations [part
of a file's name]`.

Every mutation of the list is made in a copy of the sources, and the test that it names must fail
there. A mutation that the test lets pass is a survivor; the exit code is 1 if there is one.
"""

import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

from .cases import MUTATIONS, Mutation

ROOT = Path(__file__).parents[2]
SECONDS = 300  # for one test, on a machine that is busy
# Imported once for all tests. Neither owl2_hf nor tests: each process takes them from its own copy.
PRELOADED = [
    "numpy",
    "pytest",
    "safetensors.torch",
    "torch",
    "transformers.generation.utils",
    "transformers.models.llama.modeling_llama",
    "transformers.processing_utils",
    "transformers.trainer",
]


def run_tests(tree: str, tests: list[str], results: Connection) -> None:
    """Run tests of a copy of the sources, and send the names of those that passed, failed and were
    skipped.
    """
    import pytest

    for name in [name for name in sys.modules if name.partition(".")[0] in ("owl2_hf", "tests")]:
        del sys.modules[name]
    sys.path[:0] = [tree, f"{tree}/src"]
    os.chdir(tree)
    outcomes: dict[str, list[str]] = {"passed": [], "failed": [], "skipped": []}

    class Outcomes:
        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.when == "call" or report.outcome != "passed":
                outcomes[report.outcome].append(report.nodeid.partition("[")[0])

    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests], plugins=[Outcomes()])
    import owl2_hf

    assert Path(owl2_hf.__file__).is_relative_to(tree), owl2_hf.__file__
    results.send((int(code), outcomes))


def outcomes_of(tree: Path, tests: Sequence[str]) -> tuple[int, dict[str, list[str]]]:
    """Exit code of pytest and tests by outcome, from a process of its own; -1 if it broke down or
    took too long.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=run_tests, args=(str(tree), list(tests), sender))
    process.start()
    sender.close()
    try:
        if receiver.poll(SECONDS):
            return receiver.recv()
    except EOFError:
        pass
    finally:
        process.kill()
        process.join()
    return -1, {}


def copy_sources(folder: Path) -> Path:
    """What the tests need, without what they write."""
    tree = folder / "owl2_hf"
    for name in ("src", "tests", "docs", "experiments", "benchmarks"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "model_card.md", "README.md"):
        shutil.copy(ROOT / name, tree / name)
    return tree


def survives(mutation: Mutation, tree: Path) -> str | None:
    """`None` where the named test fails with the mutation, as it should; else what happened in its
    place.
    """
    file = tree / "src" / "owl2_hf" / mutation.file
    original = file.read_text(encoding="utf-8")
    if original.count(mutation.old) != 1:
        return f"its text occurs {original.count(mutation.old)} times"
    file.write_text(original.replace(mutation.old, mutation.new), encoding="utf-8")
    try:
        code, outcomes = outcomes_of(tree, [mutation.test])
    finally:
        file.write_text(original, encoding="utf-8")
    if code == 1 and outcomes["failed"]:
        return None
    return "SURVIVED" if code == 0 else f"pytest ended with {code}, so nothing is known"


def main(part: str = "") -> int:
    chosen = [mutation for mutation in MUTATIONS if part in mutation.file]
    sys.dont_write_bytecode = True
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        tree = copy_sources(Path(folder))
        tests = sorted({mutation.test for mutation in chosen})
        code, outcomes = outcomes_of(tree, tests)
        lost = set(tests) - set(outcomes.get("passed", []))
        if code != 0 or lost:
            print(f"without any mutation these tests do not pass: {', '.join(sorted(lost))}")
            return 1
        survivors = 0
        for number, mutation in enumerate(chosen, 1):
            start = time.monotonic()
            reason = survives(mutation, tree)
            survivors += reason is not None
            shown = f"{mutation.file}: {mutation.old.strip().splitlines()[0]}"
            took = time.monotonic() - start
            print(
                f"{number:3}/{len(chosen)} {reason or 'killed':8} {took:5.1f} s  {shown}",
                flush=True,
            )
    print(f"{len(chosen) - survivors} of {len(chosen)} mutations were noticed, {survivors} not")
    return 1 if survivors else 0
