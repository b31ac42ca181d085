"""Small checkpoints of the family's scorers, and a process that cannot import the package."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
from transformers import AutoProcessor

import owl2_hf
from owl2_hf.conversion import convert
from owl2_hf.scoring import Scorer

from ..test_docs import place  # noqa: F401

ENDINGS = ("photo.jpg", "other.jpg", "third.jpg")
NAMES = ("scorer.json", "decision.json", "decision_template.jinja")


def edit(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.fixture(scope="module")
def originals(place):  # noqa: F811
    """Small checkpoints in the original's layout, as the published scorers tell what they are."""
    for name in ("one-align", "deqa"):
        convert(place / "path" / "to" / name, place / "original" / name, to="original")
    edit(place / "original" / "one-align", _name_or_path="q-future/one-align")
    edit(place / "original" / "deqa", level_ids=[1, 2, 3, 4, 5], softkl_loss=True)
    return place / "original"


@pytest.fixture(scope="module")
def converted(place, originals):  # noqa: F811
    for name in ("one-align", "deqa"):
        convert(originals / name, place / "converted" / name)
    return place / "converted"


@pytest.fixture(scope="module")
def paths(place):  # noqa: F811
    return [str(place / name) for name in ENDINGS]


@pytest.fixture(scope="module")
def loaded(converted):
    """OneAlign's small stand-in, its processor, and its scorer."""
    folder = converted / "one-align"
    model = owl2_hf.MplugOwl2ForConditionalGeneration.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    return model, processor, Scorer(model, processor, "one-align")


def ask_a_stranger(script, tmp_path, *arguments):
    """What a process prints that cannot import the package."""
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path),
        "HF_MODULES_CACHE": str(tmp_path / "m"),
    }
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])
