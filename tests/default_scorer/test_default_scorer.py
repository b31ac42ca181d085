"""The scorer inside the package: it loads, knows its levels, and ranks degraded images it was not
trained on.
"""

import csv
import io
import json
import re

import numpy as np
import pytest
from PIL import Image, ImageFilter
from typer.testing import CliRunner

import owl2_hf
from owl2_hf.cli import app
from owl2_hf.default import default_dir
from owl2_hf.default_scorer import default_scorer_dir, default_scorer_images
from owl2_hf.naming import DEFAULT_MODEL, DEFAULT_SCORER, place

MAX_BYTES = 12 * 10**6  # of both models together
RESULTS = json.loads((default_scorer_dir() / "results.json").read_text())
CARD = (default_scorer_dir() / "README.md").read_text()
LEVELS = ("excellent", "good", "fair", "poor", "bad")


@pytest.fixture(scope="module")
def scorer():
    return owl2_hf.load_default_scorer()


@pytest.fixture(scope="module")
def sharp() -> Image.Image:
    return Image.open(default_scorer_images()["astronaut"]).convert("RGB")


def noisy(image: Image.Image, std: float) -> Image.Image:
    pixels = np.asarray(image, dtype=float)
    pixels = pixels + np.random.default_rng(0).normal(0, std, pixels.shape)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def as_jpeg(image: Image.Image, quality: float) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=int(quality))
    return Image.open(file).convert("RGB")


def pale(image: Image.Image, share: float) -> Image.Image:
    mean = Image.new("RGB", image.size, tuple(np.asarray(image).mean((0, 1)).astype(int).tolist()))
    return Image.blend(mean, image, share)


def pixelated(image: Image.Image, block: float) -> Image.Image:
    size = (round(image.width / block), round(image.height / block))
    return image.resize(size, Image.Resampling.BOX).resize(image.size, Image.Resampling.NEAREST)


# Kind -> how it is made, some and much of it.
DEGRADATIONS = {
    "blur": (lambda image, std: image.filter(ImageFilter.GaussianBlur(std)), 1.4, 4),
    "noise": (noisy, 20, 60),
    "jpeg": (as_jpeg, 20, 4),
    "contrast": (pale, 0.5, 0.1),
    "pixelation": (pixelated, 3, 8),
}


@pytest.mark.parametrize("kind", DEGRADATIONS)
def test_sharp_scores_above_degraded_above_very_degraded(scorer, sharp, kind):
    make, some, much = DEGRADATIONS[kind]
    first, second, third = (
        found.score for found in scorer([sharp, make(sharp, some), make(sharp, much)])
    )
    assert first > second + 0.3 and second > third + 0.3


def test_it_was_trained_on_every_kind_that_is_tested_here():
    assert set(RESULTS["baselines"]["unseen images"]) == {"all", *DEGRADATIONS}


def test_it_knows_its_levels(scorer):
    assert scorer.levels == LEVELS
    assert scorer.preset.scale == (1, 5)


def test_both_models_together_are_small():
    files = [path for folder in (default_dir(), default_scorer_dir()) for path in folder.rglob("*")]
    assert sum(path.stat().st_size for path in files if path.is_file()) <= MAX_BYTES


def test_it_beats_every_baseline_on_unseen_images_with_every_seed():
    baselines = RESULTS["baselines"]["unseen images"]["all"].values()
    best = max(one["srcc"] for one in baselines)
    assert len(RESULTS["scorer"]) == 3
    for results in RESULTS["scorer"].values():
        assert results["unseen images"]["all"]["scorer"]["srcc"] > best + 0.1


def test_the_card_says_that_no_people_were_asked():
    assert "It was not trained on people's opinions" in CARD
    count = sum(p.numel() for p in owl2_hf.load_default_scorer().model.parameters())
    stated = float(re.search(r"([\d.]+) million parameters", CARD).group(1))
    assert stated == round(count / 1e6, 1)


def test_the_command_scores_without_a_model(scorer, tmp_path):
    for name, path in default_scorer_images().items():
        (tmp_path / f"{name}.png").write_bytes(path.read_bytes())
    found = CliRunner().invoke(app, ["score", str(tmp_path), "--csv"])
    assert found.exit_code == 0, found.output
    rows = {row["image"]: float(row["score"]) for row in csv.DictReader(io.StringIO(found.stdout))}
    expected = {
        str(tmp_path / f"{name}.png"): scorer(str(path))[0].score
        for name, path in default_scorer_images().items()
    }
    assert rows == pytest.approx(expected, abs=1e-4)
    assert rows[str(tmp_path / "astronaut.png")] > rows[str(tmp_path / "astronaut-blurred.png")] + 1


def test_the_command_without_images_scores_those_of_the_package():
    found = CliRunner().invoke(app, ["score", "--json"])
    assert found.exit_code == 0, found.output
    lines = [json.loads(line) for line in found.stdout.splitlines()]
    assert [line["image"] for line in lines] == [
        str(path) for path in default_scorer_images().values()
    ]


def test_the_bundled_scorer_has_a_name_for_every_command(tmp_path):
    assert place(DEFAULT_SCORER) == str(default_scorer_dir())
    assert place(DEFAULT_MODEL) == str(default_dir())
    assert place("some/model") == "some/model"
    with (tmp_path / "opinions.csv").open("w") as file:
        file.write("image,mos\n")
        for name, mos in (("astronaut", 5), ("astronaut-blurred", 2)):
            file.write(f"{name}.png,{mos}\n")
            (tmp_path / f"{name}.png").write_bytes(default_scorer_images()[name].read_bytes())
    command = ["evaluate-scores", "default-scorer", str(tmp_path / "opinions.csv"), "--json"]
    found = CliRunner().invoke(app, [*command, "--samples", "10"])
    assert found.exit_code == 0, found.output
    assert '"srcc"' in found.stdout and "default-scorer" not in found.stderr
