"""`python -m benchmarks.gpu`: its parts scoring, generation and training, with tiny shapes on a
CPU.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks import report
from benchmarks.gpu import (
    generation,
    models,
    operations,
    outcomes,
    processors,
    scoring,
    trained,
    training,
)
from benchmarks.gpu.frame import Setting
from owl2_hf.modeling import MplugOwl2ForConditionalGeneration
from owl2_hf.scoring.dataset import Summary
from owl2_hf.training.recipe import load_recipe

ROOT = Path(__file__).parents[2]
TINY = Setting(torch.device("cpu"), tiny=True)
POSITIONS = 64  # of a row that is trained on
NUM_TEXT = 39  # tokens of OneAlign's prompt
RECIPES = ("LoRA", "stage 2", "visual branch")


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    """The JSON file of the command."""
    file = tmp_path_factory.mktemp("gpu") / "gpu.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "scoring", "generation", "training"]
    command += ["--device", "cpu", "--tiny", "--json", str(file)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    return json.loads(file.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def rate(content):
    return content["machine"]["matmul rate"]


@pytest.fixture
def result(content):
    return lambda part, step: content["results"][part][step]["result"]


def decoder_weights(config):
    """Linear weights of the decoder that a text token passes, without the head."""
    text = config.text_config
    width, inner = text.hidden_size, text.intermediate_size
    return text.num_hidden_layers * (4 * width * width + 3 * width * inner)


def test_prepared_images_are_held_against_the_matrix_products_alone(result, rate):
    found = result("scoring", "prepared images")
    config = models.config(TINY)
    assert found["positions"] == NUM_TEXT + config.num_image_tokens
    sizes = found["by batch size"]
    assert list(sizes) == ["1", "2"]
    for one in sizes.values():
        flops = one["FLOPs per image"]
        decoder = 2 * decoder_weights(config) * found["positions"]
        assert decoder < flops < 1.5 * decoder and flops == sizes["1"]["FLOPs per image"]
        roofline = one["images per second, roofline"]
        assert roofline == pytest.approx(rate / flops)
        share = one["share of the roofline"]
        assert share == pytest.approx(one["images per second"] / roofline)
    [aim] = found["aims"].values()
    assert aim["at least"] == 0.5 and not aim["reached"]
    fastest = max(sizes.values(), key=lambda one: one["images per second"])
    assert aim["value"] == fastest["share of the roofline"]


def test_the_way_from_a_file_to_a_score_is_told_in_parts(result):
    found = result("scoring", "where the time goes")
    taken = found["seconds per image"]
    assert all(value > 0 for value in taken.values())
    assert list(taken)[:3] == ["decode", "prepare", "copy to the device"]
    whole = taken["vision, language and scores"]
    # Each is part of the whole; a busy machine may take long for any of them.
    assert 0.1 * whole < taken["vision"] + taken["language"] < 10 * whole
    assert all(share > 0 for share in found["share of the roofline"].values())


def test_jpeg_files_are_scored_with_workers_and_without(result):
    found = result("scoring", "JPEG files")
    runs = {(run["batch size"], run["workers"]): run for run in found["runs"]}
    assert list(runs) == [(2, 0), (2, 1), (8, 1)]
    assert [run["images"] for run in runs.values()] == [4, 4, 16]
    prepared = found["prepared images per second, batches of 2"]
    for run in runs.values():
        assert run["over prepared"] == pytest.approx(run["images per second"] / prepared)
    [aim] = found["aims"].values()
    assert aim["at least"] == 0.9 and aim["value"] == runs[2, 1]["over prepared"]


def test_workers_that_end_are_an_error_of_their_own_run(monkeypatch):
    def score_files(scorer, count, workers, setting):
        if workers:
            raise RuntimeError("DataLoader worker is killed by signal: Bus error.")
        return 1.0

    monkeypatch.setattr(scoring, "score_files", score_files)
    found = scoring.end_to_end(TINY)
    errors = [run.get("error", "").partition(":")[0] for run in found["runs"]]
    assert errors == ["", "RuntimeError", "RuntimeError"]
    assert found["runs"][0]["images per second"] == 4
    [aim] = found["aims"].values()
    assert not aim["reached"]


def test_an_image_without_a_score_is_an_error(monkeypatch):
    monkeypatch.setattr(scoring, "score_dataset", lambda *args, **kwargs: Summary(3, 1, 0))
    with pytest.raises(RuntimeError, match=r"expected scores of 3 images, got Summary\(rows=3, er"):
        scoring.score_files(None, 3, 0, TINY)


@pytest.mark.parametrize(("step", "answers"), [("owl2-hf describe", 1), ("pipeline, 32 chats", 32)])
def test_tokens_behind_the_first_are_decoding_alone(result, step, answers):
    found = result("generation", step)
    assert (found["answers"], found["tokens of an answer"]) == (answers, 5)
    shown, whole = found["shown"], found["seconds of the whole"]
    first = shown["seconds to the first token"]
    assert first > 0
    assert shown["tokens per second"] == pytest.approx(answers * 4 / (whole - first))


def test_the_server_answers_32_clients_at_a_time(content):
    outcome = content["results"]["generation"]["server, 32 clients"]
    if "not run" in outcome:
        pytest.skip(outcome["not run"])
    shown = outcome["result"]["shown"]
    for clients in (1, 32):
        kind = f"chats, {clients} at a time"
        requests = shown[f"{kind}: requests per second"]
        assert shown[f"{kind}: tokens per second"] == pytest.approx(4 * requests)
        median, largest = (
            shown[f"{kind}: seconds to the first token, {which}"] for which in ("median", "largest")
        )
        assert 0 < median <= largest < clients / requests
    assert shown["scores, 32 at a time: requests per second"] > 0


def test_an_answer_that_ends_early_is_an_error():
    with pytest.raises(RuntimeError, match="expected 3 words, got 2: 'a b'"):
        generation.check_length("a b", 3)


def test_a_server_that_is_not_installed_is_a_reason(monkeypatch):
    import owl2_hf

    monkeypatch.delattr(owl2_hf, "serving", raising=False)
    monkeypatch.delitem(sys.modules, "owl2_hf.serving", raising=False)
    monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: False)
    assert "pip install 'owl2_hf[serve]'" in generation.lacks_server(TINY)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_training_step_is_told_by_time_tokens_and_mfu(result, rate, recipe):
    with_it, without = (
        result("training", f"{recipe}, {how} gradient checkpointing") for how in ("with", "without")
    )
    for found in (with_it, without):
        assert (found["decoder layers"], found["positions"], found["images"]) == (2, POSITIONS, 4)
        seconds = found["step seconds"]
        assert found["tokens per second"] == pytest.approx(POSITIONS / seconds)
        assert found["MFU"] == pytest.approx(found["FLOPs"] / seconds / rate)
        assert found["peak memory"] is None and found["FLOPs"] > 0
    # What checkpointing computes a second time is no part of the model's work.
    assert with_it["FLOPs"] == without["FLOPs"]


def test_lora_runs_through_the_trainer_itself(content):
    outcome = content["results"]["training"]["LoRA through the Trainer"]
    if "not run" in outcome:
        pytest.skip(outcome["not run"])
    found = outcome["result"]
    assert (found["positions"], found["images"], found["steps"]) == (POSITIONS, 4, 12)
    ratio = found["step seconds"] / found["step alone, seconds"]
    assert found["shown"] == {"time over the step alone": pytest.approx(ratio)}
    assert found["loss"] > 1


def test_each_recipe_trains_what_it_names(result):
    model = models.build(MplugOwl2ForConditionalGeneration, models.config(TINY), TINY)
    trained = {
        name: result("training", f"{name}, with gradient checkpointing")["trained parameters"]
        for name in RECIPES
    }
    assert trained["stage 2"] == model.num_parameters()
    visual = [
        parameter.numel()
        for name, parameter in model.named_parameters()
        if "visual_" in name and "vision_tower" not in name
    ]
    assert trained["visual branch"] == sum(visual)
    text = model.config.text_config
    ends = 4 * 2 * text.hidden_size + 3 * (text.hidden_size + text.intermediate_size)
    rank = load_recipe("lora").adapter.r
    assert trained["LoRA"] == rank * text.num_hidden_layers * ends


def test_lora_takes_turns_with_the_same_lora_on_llama(result):
    for how in ("with", "without"):
        found = result("training", f"LoRA, {how} gradient checkpointing")
        llama = found["LLaMA"]
        assert llama["trained parameters"] == found["trained parameters"]
        config = models.config(TINY)
        head = config.text_config.hidden_size * config.text_config.vocab_size
        # Forward, and backward to the inputs: frozen weights have no gradients.
        frozen = 4 * (decoder_weights(config) + head) * POSITIONS
        assert 0.75 * frozen < llama["FLOPs"] < 1.25 * frozen
        assert llama["FLOPs"] < found["FLOPs"]
        [aim] = found["aims"].values()
        assert aim["at most"] == 1.06
        assert aim["value"] == found["over LLaMA"]["ours, images encoded before"]["ratio"]


def test_qlora_runs_where_bitsandbytes_is_installed(content):
    for how in ("with", "without"):
        outcome = content["results"]["training"][f"QLoRA, {how} gradient checkpointing"]
        if find_spec("bitsandbytes") is None:
            assert "pip install 'owl2_hf[qlora]'" in outcome["not run"]
        else:
            assert outcome["result"]["weights"] == "4bit"


def test_a_step_changes_what_trains_and_nothing_else():
    one = trained.ours(load_recipe("visual-branch"), TINY)
    before = {name: value.clone() for name, value in one.model.named_parameters()}
    one.step()
    changed = {
        name for name, value in one.model.named_parameters() if not value.equal(before[name])
    }
    assert changed and all("visual_" in name for name in changed)


def test_encoded_images_take_the_place_of_pixels():
    one = trained.ours(load_recipe("lora"), TINY)
    given = trained.encode(one)
    one.model.eval()
    with torch.no_grad():
        expected = one.model(**one.batch).loss
        assert one.model(**{**one.batch, **given}).loss.allclose(expected, rtol=1e-3)
    one.model.train()
    whole, decoder = operations.count(one.step), operations.count(lambda: one.step(**given))
    assert decoder < whole


def test_further_layers_add_what_the_second_adds():
    needs = training.Needs(flops=(10, 13), peaks=(100, 120))
    assert [needs.flops_of(count) for count in (1, 2, 32)] == [10, 13, 103]
    assert [needs.layers_in(memory, 32) for memory in (50, 119, 120, 175, 1e9)] == [1, 1, 2, 4, 32]
    assert training.Needs((10, 13), (None, None)).layers_in(0, 32) == 32


def test_fewer_layers_are_trained_where_memory_does_not_suffice(monkeypatch):
    asked = []

    def measure_layers(recipe, checkpointing, setting, num_layers, needs, base):
        asked.append(num_layers)
        if num_layers > 3:
            raise torch.OutOfMemoryError
        return {"decoder layers": num_layers}

    needs = training.Needs((1, 2), (10, 20))
    monkeypatch.setattr(training, "probe", lambda *args: needs)
    monkeypatch.setattr(training, "measure_layers", measure_layers)
    monkeypatch.setattr(training, "free_memory", lambda setting: 75.0)
    full = Setting(TINY.device)
    assert training.measure("instruct", True, full) == {"decoder layers": 3}
    assert asked == [7, 5, 3]


def test_attention_is_no_part_of_the_count_on_a_cpu_but_products_are():
    linear = nn.Linear(5, 7, bias=False)
    assert operations.count(lambda: linear(torch.ones(3, 5))) == 2 * 3 * 5 * 7


def test_every_token_of_a_greedy_answer_is_a_word():
    loaded = processors.load(TINY)
    inputs = loaded.processor(text="USER: hello ASSISTANT:", return_tensors="pt")
    ids = loaded.model.generate(**inputs, do_sample=False, max_new_tokens=12)
    answer = loaded.processor.decode(ids[0, inputs["input_ids"].shape[1] :])
    assert len(answer.split()) == 12


def test_shown_numbers_are_printed_and_in_the_table():
    outcome = {"result": {"shown": {"tokens per second": 1234.567}}, "seconds": 1}
    assert outcomes.lines_of(outcome) == ["tokens per second: 1,235"]
    assert report.gpu_rows("LoRA", outcome) == [["LoRA", "tokens per second", "1,235", "", ""]]
