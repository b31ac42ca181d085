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


@pytest.fixture(scope="session")
def golden_dir() -> Callable[[str], Path]:
    """As `find_golden`; a set that is not here skips the test."""

    def find(name: str) -> Path:
        if (folder := find_golden(name)) is not None:
            return folder
        pytest.skip(f"golden set {name} is not here; OWL2_HF_GOLDEN names the folder that holds it")

    return find
