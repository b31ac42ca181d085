"""What the benchmarks measure on."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from owl2_hf.conversion import convert
from owl2_hf.modeling import MplugOwl2Config, MplugOwl2ForConditionalGeneration

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks import processor, timing
from benchmarks.full_size import make, original_shapes
from benchmarks.full_size_speed import passed_weights
from benchmarks.growth import fit
from benchmarks.report import PAGE, PAGES, TABLES, render
from benchmarks.start import summarize, time_process
from benchmarks.timing import in_turns
from benchmarks.timing import summarize as summarize_turns


def test_the_full_size_checkpoint_has_the_published_keys(golden_dir):
    keys = golden_dir("A").parents[1] / "spec" / "keys" / "owl2.json"
    if not keys.is_file():
        pytest.skip("the key list of the published model is not here")
    published = {key: torch.Size(shape) for key, (shape, _) in json.loads(keys.read_text()).items()}
    assert original_shapes(MplugOwl2Config()) == {
        key: shape for key, shape in published.items() if not key.endswith("_pos_embed")
    }


def test_a_small_generated_checkpoint_converts(golden_dir, tmp_path):
    config = MplugOwl2Config.from_pretrained(golden_dir("A") / "hf")
    make(tmp_path / "source", config)
    assert (tmp_path / "source" / "pytorch_model-4-of-4.bin").is_file()
    report = convert(tmp_path / "source", tmp_path / "target")
    assert report.dtype == "bfloat16" and len(report.rebuilt) == 4
    assert (
        MplugOwl2ForConditionalGeneration.from_pretrained(tmp_path / "target").dtype
        == torch.bfloat16
    )


def test_starting_times_are_medians_over_those_of_the_base():
    runs = [{"wall": 1.0}, {"wall": 4.0}, {"wall": 2.0}]
    base = [{"wall": 5.0}, {"wall": 4.0}, {"wall": 3.0}]
    assert summarize(runs, base) == {"wall": {"median": 2.0, "spread": 3.0, "ratio": 0.5}}


def test_a_process_is_timed_from_its_start_to_its_end():
    slept = time_process([sys.executable, "-c", "import time; time.sleep(0.2)"])
    assert slept["wall"] > 0.2 and 0 < slept["cpu"] < slept["wall"]
    with pytest.raises(SystemExit, match="failed with status"):
        time_process([sys.executable, "-c", "raise SystemExit(3)"])


def test_ratios_are_taken_turn_by_turn():
    taken = summarize_turns([2.0, 30.0, 4.0], [1.0, 10.0, 4.0])
    assert taken == {"seconds": 4.0, "ratio": 2.0, "low": 1.0, "high": 3.0}


def test_runs_take_turns_and_warm_up_is_left_out():
    order = []
    times = in_turns(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=2, warmup=1
    )
    assert order == ["a", "b"] * 3 and {name: len(taken) for name, taken in times.items()} == {
        "a": 2,
        "b": 2,
    }


def test_a_fit_finds_the_curve_that_was_put_in():
    lengths = [100, 300, 1000, 2000]
    times = [(5 + 20 * n / 1000 + 3 * (n / 1000) ** 2) / 1000 for n in lengths]
    assert fit(lengths, times) == pytest.approx([5, 20, 3])


def test_bytes_of_a_token_are_those_of_the_text_branch_and_the_head(golden_dir):
    model = MplugOwl2ForConditionalGeneration.from_pretrained(golden_dir("A") / "hf")
    text = model.config.text_config
    width, inner = text.hidden_size, text.intermediate_size
    keys = text.num_key_value_heads * text.head_dim
    layer = 2 * width * width + 2 * width * keys + 3 * width * inner + 2 * width
    expected = text.num_hidden_layers * layer + width + width * text.vocab_size
    assert sum(weight.numel() for weight in passed_weights(model)) == expected


@pytest.mark.parametrize("name", ["bfloat16", "int8", "int4"])
def test_the_models_of_full_size_decoding_are_one_model_rounded(name):
    pytest.importorskip("torchao", reason="needs torchao: pip install 'owl2_hf[quantization]'")
    from benchmarks import full_size_decode as decoding

    whole, model = (decoding.build(one, 2, 256, 2) for one in ("bfloat16", name))
    ours, theirs = (decoding.Decoder(one, 20) for one in (model, whole))
    text, expected = decoding.text_of(theirs, 4, [])
    chosen, logits = decoding.text_of(ours, 4, text)
    assert len(text) == len(chosen) == 4 and expected.shape == (4, 32000)
    found = decoding.agreement(expected, logits)
    assert found["logit error"] < {"bfloat16": 1e-6, "int8": 0.05, "int4": 0.5}[name]
    ours.prompt()
    for _ in range(3):
        ours.measured_step()
    assert ours.cache.get_seq_length() == 20
    num_weights = 2 * (4 * 256**2 + 3 * 256 * 512)
    others = (5 * 256 + 32064 * 256) * 2  # norms and head, in 16 bits
    num_bytes = sum(weight.nbytes for weight in decoding.passed_weights(model)) - others
    low, high = {"bfloat16": (2, 2), "int8": (1, 1.03), "int4": (0.5, 0.55)}[name]
    assert low * num_weights <= num_bytes <= high * num_weights


def test_the_peak_of_a_process_is_not_that_of_the_one_that_started_it():
    code = "from benchmarks.timing import peak_memory; print(peak_memory())"
    alone, large = (_peak_of_a_child(code, megabytes) for megabytes in (0, 600))
    assert alone > 10e6 and large == pytest.approx(alone, rel=0.1)
    assert timing.peak_memory() > 100e6


def _peak_of_a_child(code: str, megabytes: int) -> float:
    """What `code` prints in a child of a process that filled so much memory."""
    parent = f"""
import subprocess, sys
filled = b"1" * ({megabytes} * 2**20)
print(subprocess.run([sys.executable, "-c", {code!r}], check=True, capture_output=True, text=True).stdout)
"""
    done = subprocess.run(
        [sys.executable, "-c", parent],
        check=True,
        capture_output=True,
        text=True,
        cwd=PAGE.parents[1],
    )
    return float(done.stdout)


def test_pictures_and_prompts_are_measured(monkeypatch):
    monkeypatch.setattr(processor, "SIZES", ("40 x 31", "31 x 40", "33 x 33"))
    monkeypatch.setattr(processor, "REPEATS", 1)
    monkeypatch.setattr(processor, "NUM_PROMPTS", 3)
    found = processor.pictures(rounds=1)
    assert list(found) == ["40 x 31", "31 x 40", "33 x 33"] and all(
        one["same pixels"] for one in found.values()
    )
    assert processor.prompts(rounds=1)["ours"]["ratio"] > 0
    assert processor.peak("ours", (40, 31)) > 0


@pytest.mark.parametrize("file", PAGES, ids=lambda file: file.stem)
def test_the_pages_say_what_was_measured(file):
    page = file.read_text(encoding="utf-8")
    assert set(re.findall(r"<!-- table: (\w+) -->", page)) <= TABLES.keys()
    assert render(page) == page
