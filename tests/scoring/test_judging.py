"""A scorer against opinions: the table, its intervals, several data sets, splits, the plot, and the
command.
"""

import csv
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import owl2_hf
from owl2_hf.cli import app
from owl2_hf.scoring import Preset, Scorer, evaluate, load_opinions, statistics
from owl2_hf.scoring.judging import Evaluation
from owl2_hf.scoring.opinions import Opinion, opinions_of

pytest.importorskip("scipy", reason="scipy is not installed")

PROMPT = "USER: <|image|>Is it red? ASSISTANT:"
YES_NO = Preset({"quality": PROMPT}, ("yes", "no"), (1.0, 0.0), "resize", (0.0, 1.0))
NUM_IMAGES = 24


@pytest.fixture(scope="module")
def scorer():
    return Scorer(*owl2_hf.load_default(dtype=torch.float32), YES_NO)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judging")
    generator = np.random.default_rng(0)
    rows = [["image", "mos", "std", "split", "dataset"]]
    for index in range(NUM_IMAGES):
        colour = tuple(generator.integers(0, 256, 3).tolist())
        Image.new("RGB", (16, 16), colour).save(folder / f"{index}.png")
        split = "train" if index % 3 else "test"
        rows.append(
            [f"{index}.png", f"{colour[0] / 51:.3f}", 0.4, split, "one" if index % 2 else "two"]
        )
    with (folder / "opinions.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder


@pytest.fixture(scope="module")
def report(scorer, folder) -> Evaluation:
    return evaluate(scorer, folder / "opinions.csv", splits=5, samples=40)


def test_each_statistic_is_that_of_the_scores_and_the_opinions(scorer, folder, report):
    opinions = load_opinions(folder / "opinions.csv")
    expected = scorer([row.image for row in opinions])
    assert [score for _, score in report.scored] == expected
    for dataset in ("one", "two"):
        own = [index for index, row in enumerate(opinions) if row.dataset == dataset]
        scores, mos = [expected[i].score for i in own], [opinions.rows[i].mos for i in own]
        found = report[dataset].statistics
        assert report[dataset].images == NUM_IMAGES / 2
        for name in ("srcc", "krcc", "plcc", "plcc_fitted", "rmse_fitted"):
            assert found[name].value == pytest.approx(
                getattr(statistics, name)(scores, mos), nan_ok=True
            ), name
        low, high = opinions.ranges[dataset]
        people = [[1 + (m - low) / (high - low) for m in mos], [0.4 / (high - low)] * len(own)]
        model = [[1 + expected[i].score for i in own], [expected[i].std for i in own]]
        assert found["wasserstein"].value == pytest.approx(
            statistics.gaussian_wasserstein(*people, *model).mean(), abs=1e-5
        )
        assert found["kl"].value == pytest.approx(
            statistics.gaussian_kl(*people, *model).mean(), rel=1e-3
        )
        assert found["srcc"].low <= found["srcc"].value <= found["srcc"].high
    assert report.means["srcc"] == pytest.approx(
        np.mean([report[name].statistics["srcc"].value for name in ("one", "two")])
    )


def test_the_median_is_that_of_random_fifths_and_the_same_each_time(scorer, folder, report):
    again = evaluate(scorer, folder / "opinions.csv", splits=5, samples=40)
    assert again.to_dict() == report.to_dict()
    other = evaluate(scorer, folder / "opinions.csv", splits=5, samples=40, seed=1)
    assert other["one"].statistics["plcc"].value == report["one"].statistics["plcc"].value
    assert other["one"].statistics["plcc"].median != report["one"].statistics["plcc"].median


def test_scores_that_are_the_opinions_agree_with_them():
    class Oracle:
        batch_size = 4

        def open_image(self, image):
            return image

        def __call__(self, images, task):
            from owl2_hf.scoring import Score

            values = [image.getpixel((0, 0))[0] / 51 for image in images]
            return [
                Score(value, 0.5, (0.5, 0.5), ("a", "b"), (0.0, 0.0), (0.0, 5.0))
                for value in values
            ]

    rows = [
        Opinion(Image.new("RGB", (2, 2), (value, 0, 0)), value / 5.1, row=value)
        for value in range(0, 255, 17)
    ]
    found = evaluate(Oracle(), opinions_of("rows", rows), samples=20)[""].statistics
    assert set(found) == {"srcc", "krcc", "plcc", "plcc_fitted", "rmse_fitted"}, (
        "no deviations, no distances"
    )
    for name in ("srcc", "krcc", "plcc"):
        assert (found[name].value, found[name].low) == pytest.approx((1, 1))
    assert found["plcc_fitted"].value > 0.999 and found["rmse_fitted"].value < 1


def test_an_image_that_cannot_be_read_costs_no_other_its_part(scorer, folder, tmp_path):
    rows = list(load_opinions(folder / "opinions.csv"))
    (tmp_path / "broken.png").write_bytes(b"no image")
    broken = Opinion(str(tmp_path / "broken.png"), 3.0, dataset="one", row=99)
    report = evaluate(scorer, opinions_of("rows", [*rows, broken]), samples=10)
    assert [opinion.row for opinion, _ in report.failed] == [99] and report[
        "one"
    ].images == NUM_IMAGES / 2
    with pytest.raises(
        ValueError, match="'one': expected two or more images that can be scored, got 0; row 99"
    ):
        evaluate(scorer, opinions_of("rows", [broken]), samples=10)
    with pytest.raises(
        ValueError, match="splits of at least 0 and samples of at least 1, got -1 and 10"
    ):
        evaluate(scorer, opinions_of("rows", rows), splits=-1, samples=10)


def test_nan_is_null_in_json():
    from owl2_hf.scoring.judging import Estimate, Judgement

    report = Evaluation([Judgement("", 2, {"plcc": Estimate(math.nan, math.nan, 1.0)})])
    own = {"value": None, "low": None, "high": 1.0, "median": None}
    assert report.to_dict()["datasets"] == {"": {"images": 2, "plcc": own}} and report.to_dict()[
        "means"
    ] == {"plcc": None}


@pytest.fixture(scope="module")
def model(scorer, tmp_path_factory):
    target = tmp_path_factory.mktemp("judging-model") / "model"
    for part in (scorer.model, scorer.processor):
        part.save_pretrained(target)
    return target


def run(model, data, *arguments):
    own = ["--levels", "yes,no", "--prompt", PROMPT, "--samples", "20"]
    return CliRunner().invoke(
        app, ["evaluate-scores", str(model), str(data), *own, *map(str, arguments)]
    )


def test_the_command_prints_a_table_json_or_csv_and_draws(model, folder, tmp_path):
    result = run(
        model,
        folder / "opinions.csv",
        "--split",
        "train",
        "--plot",
        tmp_path / "plot.png",
        "--splits",
        2,
    )
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert (
        lines[0] == "one: 8 images"
        and lines[1].split()[0] == "srcc"
        and "median of 2 splits" in lines[1]
    )
    assert "mean of 2 data sets" in lines
    with Image.open(tmp_path / "plot.png") as plot:
        assert plot.size[0] > 2 * 400
    found = json.loads(run(model, folder / "opinions.csv", "--json").stdout)
    assert (
        found["datasets"]["one"]["images"] == 12
        and found["datasets"]["one"]["srcc"]["median"] is None
    )
    table = list(csv.DictReader(run(model, folder / "opinions.csv", "--csv").stdout.splitlines()))
    assert [row["dataset"] for row in table] == ["two", "one"]
    assert float(table[1]["krcc"]) == pytest.approx(
        found["datasets"]["one"]["krcc"]["value"], abs=1e-5
    )
    assert float(table[1]["krcc_low"]) <= float(table[1]["krcc"]) <= float(table[1]["krcc_high"])


def test_the_command_says_what_is_wrong_in_one_line(model, folder, tmp_path):
    def errors(*arguments):
        result = run(model, *arguments)
        assert result.exit_code == 1
        return [line for line in result.stderr.splitlines() if line.startswith("owl2-hf: ")]

    assert errors(tmp_path / "lost.csv") == [f"owl2-hf: '{tmp_path / 'lost.csv'}' does not exist."]
    assert "no row has split 'val'" in errors(folder / "opinions.csv", "--split", "val")[0]
    assert (
        "expected a plot file that ends in one of"
        in errors(folder / "opinions.csv", "--plot", tmp_path / "a.docx")[0]
    )
    assert (
        "does not exist" in errors(folder / "opinions.csv", "--plot", tmp_path / "no" / "a.png")[0]
    )
    rows = [{"image": str(folder / f"{index}.png"), "mos": index} for index in range(5)]
    (folder / "broken.png").write_bytes(b"no image")
    (folder / "rows.json").write_text(json.dumps([*rows, {"image": "broken.png", "mos": 2}]))
    (line,) = errors(folder / "rows.json")
    assert line.startswith(f"owl2-hf: {folder / 'rows.json'}: row 6: ") and "broken.png" in line
    both = run(model, folder / "opinions.csv", "--csv", "--json")
    assert both.exit_code == 2 and "use --json or --csv" in both.stderr


def test_a_card_does_not_replace_another_one(model, folder, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    result = run(model, folder / "opinions.csv", "--card", tmp_path / "README.md")
    assert (
        result.exit_code == 1 and "README.md already exists: choose another name" in result.stderr
    )
    assert (tmp_path / "README.md").read_text() == "mine"
    result = run(model, folder / "opinions.csv", "--card", tmp_path / "no" / "README.md")
    assert result.exit_code == 1 and "does not exist" in result.stderr


def test_a_card_shows_each_data_set(model, folder, tmp_path):
    from huggingface_hub import ModelCard

    assert (
        run(
            model, folder / "opinions.csv", "--split", "train", "--card", tmp_path / "README.md"
        ).exit_code
        == 0
    )
    card = ModelCard.load(tmp_path / "README.md")
    assert (
        "| | one (8 images) | two (8 images) |" in card.text
        and "opinions.csv, part train" in card.text
    )
    assert {result.dataset_name for result in card.data.eval_results} == {"one", "two"}
    assert PROMPT in card.text and "yes, no" in card.text
