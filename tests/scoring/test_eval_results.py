"""Results of an evaluation in the Hub's `.eval_results`, from Python and by the command."""

import shutil
from datetime import datetime, timezone

import pytest
import torch
import yaml
from huggingface_hub import parse_eval_result_entries

import owl2_hf
from owl2_hf.scoring.eval_results import write_eval_results
from owl2_hf.scoring.judging import Estimate, Evaluation, Judgement

from .test_judging import folder, run  # noqa: F401 (a fixture)

pytest.importorskip("scipy", reason="scipy is not installed")

BENCHMARK = "tester/photos"
OPTIONS = ["--preset", "one-align", "--prompt", "USER: <|image|>Is it red? ASSISTANT:"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved")
    for part in owl2_hf.load_default(dtype=torch.float32):
        part.save_pretrained(path)
    return path


@pytest.fixture
def model(saved, tmp_path):
    """A folder of its own for each test, as the files are written into it."""
    return shutil.copytree(saved, tmp_path / "model")


def report(*datasets, srcc=0.8, **values):
    estimates = {
        name: Estimate(value, value - 0.1, value + 0.05)
        for name, value in {"srcc": srcc, "plcc": 0.7, **values}.items()
    }
    return Evaluation([Judgement(name, 1200, estimates) for name in datasets or [""]])


def judge(model, opinions, *options):
    return run(
        model, opinions, *OPTIONS, "--levels", "yes,no", "--hub-benchmark", BENCHMARK, *options
    )


def test_the_entries_are_those_that_huggingface_hub_reads(tmp_path):
    file = write_eval_results(tmp_path, report(), BENCHMARK, notes="task quality")
    assert file == tmp_path / ".eval_results" / "tester--photos.yaml"
    first, second = parse_eval_result_entries(yaml.safe_load(file.read_text()))
    assert (first.dataset_id, first.task_id, first.value) == (BENCHMARK, "srcc", 0.8)
    assert (second.task_id, second.value) == ("plcc", 0.7)
    assert first.notes == "1,200 images, 95 % interval 0.7000 to 0.8500; task quality"
    assert first.date == datetime.now(timezone.utc).date().isoformat()


def test_a_task_of_the_benchmark_may_have_another_name_than_the_statistic(tmp_path):
    tasks = ["overall=plcc", "rank=srcc"]
    file = write_eval_results(tmp_path, report(), BENCHMARK, tasks)
    entries = parse_eval_result_entries(yaml.safe_load(file.read_text()))
    assert {entry.task_id: entry.value for entry in entries} == {"overall": 0.7, "rank": 0.8}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"benchmark": "no/such/id"}, "Repo id must be in the form"),
        ({"tasks": ["srcc", "srcc"]}, "expected TASK=STATISTIC, each task once .* got 'srcc'"),
        ({"tasks": ["=srcc"]}, "expected TASK=STATISTIC, each task once"),
        ({"tasks": ["accuracy"]}, "a statistic of srcc, krcc, plcc, .* got 'accuracy'"),
        ({"tasks": ["kl"]}, "task 'kl': kl is not defined for these opinions and scores"),
        ({"report": report("one", "two")}, r"one data set .* got 2 \('one', 'two'\)"),
        ({"report": report(srcc=float("nan"))}, "task 'srcc': srcc is not defined"),
        ({"folder": "lost"}, "expected the folder of a model .* got 'lost'"),
    ],
)
def test_invalid_results_raise_an_error_and_write_no_files(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        write_eval_results(
            **{"folder": tmp_path, "report": report(), "benchmark": BENCHMARK, **arguments}
        )
    assert not any(tmp_path.iterdir())


def test_the_command_writes_them_into_the_folder_of_the_model(model, folder):  # noqa: F811
    import csv

    rows = list(csv.DictReader((folder / "opinions.csv").open()))
    own = folder / "own.csv"
    with own.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["image", "mos"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    result = judge(model, own, "--json")
    assert result.exit_code == 0, result.stderr
    [file] = (model / ".eval_results").iterdir()
    statistics = yaml.safe_load(result.stdout)["datasets"][""]
    entries = parse_eval_result_entries(yaml.safe_load(file.read_text()))
    found = {entry.task_id: entry.value for entry in entries}
    assert found == {
        name: pytest.approx(statistics[name]["value"], abs=1e-6) for name in ("srcc", "plcc")
    }
    again = judge(model, own)
    assert again.exit_code == 1 and "tester--photos.yaml already exists" in again.stderr
    assert not again.stdout  # nothing was scored


def test_the_command_says_before_it_scores_that_a_benchmark_is_one_data_set(model, folder):  # noqa: F811
    result = judge(model, folder / "opinions.csv")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "expected opinions of one data set for the benchmark tester/photos, got 2" in (
        result.stderr
    )
