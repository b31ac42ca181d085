"""Fixtures shared by the tests."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

# Tests that a shell runs in its background ignore Ctrl-C, and their processes would do so, too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

HERE = Path(__file__).parent
WIDER_SETS = Path(os.environ.get("OWL2_HF_GOLDEN", HERE.parent.parent / "shared" / "golden"))


def find_golden(name: str) -> Path | None:
    """Folder of a set of the original's numbers: the wider copy where there is one, else what the
    repository ships.
    """
    return next(
        (root / name for root in (WIDER_SETS, HERE / "golden") if (root / name).is_dir()), None
    )


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked `gpu` need one."""
    if item.get_closest_marker("gpu") is None:
        return
    import torch

    if not torch.cuda.is_available():
        pytest.skip(f"needs a CUDA device, and torch {torch.__version__} finds none")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where a test of tests/gpu runs: each on the CPU, and on a GPU with the mark `gpu`."""
    return request.param


@pytest.fixture(scope="session")
def golden_dir() -> Callable[[str], Path]:
    """As `find_golden`; a set that is not here skips the test."""

    def find(name: str) -> Path:
        if (folder := find_golden(name)) is not None:
            return folder
        pytest.skip(f"golden set {name} is not here; OWL2_HF_GOLDEN names the folder that holds it")

    return find
