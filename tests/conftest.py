"""Fixtures shared by the tests."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).parent
WIDER_SETS = Path(os.environ.get("OWL2_HF_GOLDEN", HERE.parent.parent / "shared" / "golden"))


@pytest.fixture(scope="session")
def golden_dir() -> Callable[[str], Path]:
    """Folder of a set of the original's numbers: the wider copy where there is one, else what the repository ships."""

    def find(name: str) -> Path:
        for root in (WIDER_SETS, HERE / "golden"):
            if (root / name).is_dir():
                return root / name
        pytest.skip(f"golden set {name} is not here; OWL2_HF_GOLDEN names the folder that holds it")

    return find
