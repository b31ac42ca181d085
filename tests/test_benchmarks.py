"""What the benchmarks measure on."""

import json
import sys
from pathlib import Path

import pytest
import torch

from owl2_hf.conversion import convert
from owl2_hf.modeling import MplugOwl2Config, MplugOwl2ForConditionalGeneration

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.full_size import make, original_shapes
from benchmarks.start import summarize, time_process


def test_the_full_size_checkpoint_has_the_published_keys(golden_dir):
    keys = golden_dir("A").parents[1] / "spec" / "keys" / "owl2.json"
    if not keys.is_file():
        pytest.skip("the key list of the published model is not here")
    published = {key: torch.Size(shape) for key, (shape, _) in json.loads(keys.read_text()).items()}
    assert original_shapes(MplugOwl2Config()) == {
        key: shape for key, shape in published.items() if not key.endswith("_pos_embed")
    }


def test_a_small_one_of_its_kind_converts(golden_dir, tmp_path):
    config = MplugOwl2Config.from_pretrained(golden_dir("A") / "hf")
    make(tmp_path / "source", config)
    assert (tmp_path / "source" / "pytorch_model-4-of-4.bin").is_file()
    report = convert(tmp_path / "source", tmp_path / "target")
    assert report.dtype == "bfloat16" and len(report.rebuilt) == 4
    assert MplugOwl2ForConditionalGeneration.from_pretrained(tmp_path / "target").dtype == torch.bfloat16


def test_starting_times_are_medians_over_those_of_the_base():
    runs = [{"wall": 1.0}, {"wall": 4.0}, {"wall": 2.0}]
    base = [{"wall": 5.0}, {"wall": 4.0}, {"wall": 3.0}]
    assert summarize(runs, base) == {"wall": {"median": 2.0, "spread": 3.0, "ratio": 0.5}}


def test_a_process_is_timed_from_its_start_to_its_end():
    slept = time_process([sys.executable, "-c", "import time; time.sleep(0.2)"])
    assert slept["wall"] > 0.2 and 0 < slept["cpu"] < slept["wall"]
    with pytest.raises(SystemExit, match="failed with status"):
        time_process([sys.executable, "-c", "raise SystemExit(3)"])
