"""`python -m benchmarks.gpu`: every step on the CPU with tiny shapes, and what becomes of failures."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks import report
from benchmarks.gpu import decoder, frame, golden, models, outcomes, parity, watch
from benchmarks.gpu.frame import Setting, Step, aim

ROOT = Path(__file__).parents[2]
TINY = Setting(torch.device("cpu"), tiny=True)


def command(*arguments, **environment):
    """Run `python -m benchmarks.gpu`."""
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def results(path):
    return json.loads(path.read_text())["results"]


@pytest.fixture(scope="module")
def full_run(tmp_path_factory):
    """A run of all steps of two parts, and its file."""
    path = tmp_path_factory.mktemp("gpu") / "gpu.json"
    done = command(
        "--device", "cpu", "--tiny", "--minutes", 30, "--json", path, "parity", "decoder"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done, path


def test_every_step_runs_on_a_cpu(full_run):
    done, path = full_run
    found = results(path)
    for part, steps in (("parity", parity.STEPS), ("decoder", decoder.STEPS)):
        assert found[part].keys() == {step.name for step in steps}
        for name, outcome in found[part].items():
            assert len({"result", "not run"} & outcome.keys()) == 1, (name, outcome)
            assert name in done.stdout
    why = found["parity"]["float32, sdpa, efficient"]["not run"]
    assert why == "EFFICIENT_ATTENTION is a kernel for GPUs"


def test_numbers_are_the_originals_under_each_attention(full_run):
    found = results(full_run[1])["parity"]
    for name in ("eager", "sdpa", "sdpa, math", "flex_attention"):
        result = found[f"float32, {name}"]["result"]
        assert result["aims"]["largest error"]["reached"]
        assert result["sets"]["A"]["numbers compared"] >= (30 if name != "flex_attention" else 5)
    aims = found["float32, sdpa"]["result"]["aims"]
    assert aims["answers with other ids"] == {"value": 0, "at most": 0, "reached": True}
    assert found["bfloat16, sdpa"]["result"]["aims"].popitem()[1]["reached"]
    checks = found["owl2-hf check, float32"]["result"]
    assert checks["checks"]["logits"] == "ok"
    assert checks["aims"]["checks that failed"]["reached"]


def test_decoders_are_compared_eager_and_compiled(full_run):
    found = results(full_run[1])["decoder"]
    for name in ("prefill, 64 text + 4 images, eager", "decode, batch 8, eager"):
        result = found[name]["result"]
        assert result["llama"]["ratio"] == 1 and result["ours"]["seconds"] > 0
        assert result["aims"]["time over LLaMA's"]["value"] == result["ours"]["ratio"]
    for name in ("prefill, 512 text + 4 images, compiled", "decode, batch 1, compiled"):
        aims = found[name]["result"]["aims"]
        assert aims["recompiles"]["value"] == aims["graph breaks"]["value"] == 0
        assert 0 < aims["difference from eager"]["value"] < 0.05
    whole = found["decode, batch 1, compiled, all layers"]["result"]
    assert whole["time over reading"] == pytest.approx(
        whole["ours"]["seconds"] / decoder.TOKENS / whole["seconds of reading"]
    )


def test_weights_and_tables_are_made_on_the_device():
    config = models.config(Setting(torch.device("meta"), tiny=True))
    made = models.build(type(models.owl2(TINY)), config, Setting(torch.device("meta"), tiny=True))
    assert all(one.is_meta for one in [*made.parameters(), *made.buffers()])


def test_a_second_run_repeats_nothing(full_run):
    _, path = full_run
    before = results(path)
    done = command("--device", "cpu", "--tiny", "--json", path, "parity", "decoder")
    assert done.returncode == 0 and " ...\n" not in done.stdout
    assert results(path) == before


def test_without_time_nothing_runs_and_the_file_says_so(tmp_path):
    path = tmp_path / "gpu.json"
    done = command("--device", "cpu", "--tiny", "--minutes", 0, "--json", path, "decoder")
    assert done.returncode == 0
    found = results(path)["decoder"]
    assert len(found) == len(decoder.STEPS)
    assert all(one["not run"].startswith("no time: it takes about") for one in found.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cpu"], "add --tiny"),
        (["nonsense"], "expected parts of parity, decoder"),
        (["--device", "cuda:99", "decoder"], "device 'cuda:99' cannot be used"),
        (["--device", "cpu", "--tiny", "--json", __file__], "move it away"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments, message):
    before = Path(__file__).read_text()
    done = command(*arguments)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert Path(__file__).read_text() == before


def steps_of(calls, *names):
    """Steps that note their calls; the one named `broken` fails."""

    def step(name):
        def call(setting):
            calls.append(name)
            if name == "broken":
                raise RuntimeError("no such kernel")
            return {"aims": {"ratio": aim(1.0, at_most=1.05)}}

        return Step(name, call, minutes=0.1)

    return [step(name) for name in names]


def test_a_broken_step_is_recorded_and_the_rest_runs(tmp_path, capsys):
    calls, path = [], tmp_path / "gpu.json"
    parts = {"one": steps_of(calls, "first", "broken", "last"), "two": steps_of(calls, "other")}
    frame.run(parts, TINY, 1, path)
    assert calls == ["first", "broken", "last", "other"]
    found = results(path)
    assert found["one"]["broken"]["error"] == "RuntimeError: no such kernel"
    assert found["one"]["last"]["result"]["aims"]["ratio"]["reached"]
    assert "error: RuntimeError: no such kernel" in capsys.readouterr().out
    frame.run(parts, TINY, 1, path)
    assert calls[4:] == ["broken"], "what failed runs again, and nothing else"
    frame.run(parts, TINY, 1, path, retry=False)
    assert len(calls) == 5


def test_long_steps_wait_for_the_short_ones_of_all_parts():
    def step(name, minutes):
        return Step(name, dict, minutes)

    parts = {"one": [step("a", 0.2), step("b", 1), step("c", 0.1)], "two": [step("d", 0.5)]}
    assert [step.name for _, step in frame.in_order(parts)] == ["a", "c", "d", "b"]


def test_a_lost_device_ends_the_process_after_the_error_is_written(tmp_path, monkeypatch):
    calls, path = [], tmp_path / "gpu.json"
    parts = {"one": steps_of(calls, "broken", "last")}
    monkeypatch.setattr(frame, "_answers", lambda setting: False)
    with pytest.raises(frame.DeviceLost, match="one: broken"):
        frame.run(parts, TINY, 1, path)
    assert "error" in results(path)["one"]["broken"]


def test_results_of_another_device_are_kept_beside(tmp_path):
    path = tmp_path / "gpu.json"
    other = {"machine": {"device": "NVIDIA H100", "tiny": True}, "results": {"one": {}}}
    outcomes.write(path, other)
    frame.run({"one": steps_of([], "first")}, TINY, 1, path)
    assert json.loads((tmp_path / "gpu.nvidia-h100.json").read_text()) == other
    assert "result" in results(path)["one"]["first"]


DIES = """
import os, sys, time
from pathlib import Path
from benchmarks.gpu.outcomes import BEGUN, RESULT, read, write
path, minutes = Path(sys.argv[1]), float(sys.argv[2])
content = read(path)
steps = content["results"]["one"]
if "first" not in steps:
    time.sleep(1)  # what an earlier run began is older than this process
    steps["first"] = {BEGUN: time.time(), "minutes": minutes}
    write(path, content)
    if minutes < 0:
        time.sleep(60)
    os.abort()
assert "--retry" not in sys.argv
steps["last"] = {RESULT: {}}
write(path, content)
"""


@pytest.mark.parametrize(
    ("minutes", "reason"),
    [(1, "the process ended with status -6"), (-0.5, "it was stopped after 0.0 minutes")],
    ids=["it dies", "it hangs"],
)
def test_a_process_that_is_lost_costs_one_step(tmp_path, minutes, reason):
    path = tmp_path / "gpu.json"
    killed = {"begun": 0.0, "minutes": 0.1}
    outcomes.write(path, {"machine": {}, "results": {"one": {}, "two": {"before": killed}}})
    start = time.monotonic()
    worker = [sys.executable, "-c", DIES, str(path), str(minutes)]
    assert watch.watch(worker, path, minutes=1) == 0
    assert results(path)["one"] == {"first": {"error": reason}, "last": {"result": {}}}
    assert results(path)["two"] == {"before": killed}
    assert time.monotonic() - start < 50


def test_missing_golden_numbers_are_told(tmp_path, monkeypatch):
    monkeypatch.setenv("OWL2_HF_GOLDEN", str(tmp_path))
    assert parity.STEPS[0].needs(TINY).startswith(f"golden numbers not found at {tmp_path};")
    monkeypatch.delenv("OWL2_HF_GOLDEN")
    assert golden.find("A") is not None


def test_a_wrong_number_is_seen(monkeypatch):
    load = golden.load

    def spoiled(*arguments):
        numbers = load(*arguments)
        with torch.no_grad():
            numbers.model.lm_head.weight[5] += 1e-3
        return numbers

    monkeypatch.setattr(golden, "load", spoiled)
    aims = parity.exact(parity.SDPA, TINY, sets=("A",))["aims"]
    assert not aims["largest error"]["reached"]


def test_the_models_have_the_published_shape():
    whole = Setting(torch.device("meta"))
    ours, llama = models.owl2(whole), models.llama(whole)
    models.forget()
    assert sum(one.numel() for one in ours.parameters()) == 8_198_383_616
    theirs = {f"model.language_model.{name}" for name, _ in llama.model.named_parameters()}
    text = {name for name, _ in ours.named_parameters() if "language_model" in name}
    assert theirs == {name for name in text if "visual_" not in name}
    prompt = models.inputs(TINY, batch=2, text=10, images=2)
    assert prompt["input_ids"].shape == (2, 10 + 2 * 9) and len(prompt["pixel_values"]) == 4


def test_nan_reaches_no_aim():
    assert aim(1.0, at_most=1)["reached"] and not aim(1.1, at_most=1)["reached"]
    assert aim(0.7, at_least=0.6)["reached"] and not aim(float("nan"), at_most=1)["reached"]


def test_the_page_has_a_row_for_each_aim():
    result = {"aims": {"ratio": aim(1.2, at_most=1.05), "share": aim(0.7, at_least=0.6)}}
    assert report.gpu_rows("a step", {"result": result, "seconds": 1}) == [
        ["a step", "ratio", "1.2", "at most 1.05", "no"],
        ["", "share", "0.7", "at least 0.6", "yes"],
    ]
    assert report.gpu_rows("other", {"not run": "no a|b"}) == [
        ["other", "not run: no a\\|b", "", "", ""]
    ]


def test_the_page_says_that_no_run_exists_or_shows_it(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert report.gpu() == report.NO_GPU
    frame.run({"one": steps_of([], "first")}, TINY, 1, tmp_path / "gpu.json")
    page = report.gpu()
    assert "**One**" in page and "| first | ratio | 1 | at most 1.05 | yes |" in page
