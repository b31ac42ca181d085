"""The images and opinions of the bundled scorer, and its training for a few steps, from sources
made up here.
"""

import json

import numpy as np
import pytest
from PIL import Image

from experiments.default_scorer import data, degrade, evaluate, install, make, start
from owl2_hf.default_scorer import default_scorer_dir
from owl2_hf.scoring import level_id

SIDE = data.SIDE


def textured(seed: int, side: int = 200, mode: str = "RGB") -> Image.Image:
    """An image with edges of all sizes."""
    generator = np.random.default_rng(seed)
    pixels = np.zeros((side, side, len(mode)))
    for scale in (4, 10, 25):
        coarse = generator.integers(0, 256, (side // scale + 1, side // scale + 1, len(mode)))
        pixels += coarse.repeat(scale, 0).repeat(scale, 1)[:side, :side] / 3
    if mode == "RGBA":
        pixels[..., 3] = 255
    return Image.fromarray(pixels.astype(np.uint8), mode)


def sources(tmp_path, part: str) -> data.Sources:
    drawings = []
    for number in range(3):
        drawings.append(tmp_path / part / f"{part}{number}.png")
        drawings[-1].parent.mkdir(exist_ok=True)
        textured(number, mode="RGBA").save(drawings[-1])
    return data.Sources(
        {f"{part}-photo{number}": textured(10 + number) for number in range(3)},
        {f"{part}-emoji{number}": textured(20 + number, 64, "RGBA") for number in range(3)},
        tuple(drawings),
    )


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """Images and opinions of made-up sources: 20 to train on, 12 in each part that is held out."""
    monkeypatch.setattr(
        data, "load_sources", lambda test: sources(tmp_path, "test" if test else "train")
    )
    data.write_all(tmp_path / "data", 20, 12)
    return tmp_path / "data"


@pytest.mark.parametrize("kind", degrade.KINDS)
def test_amount_0_keeps_the_image_and_more_takes_more_of_it(kind):
    image = textured(0, SIDE)
    original = np.asarray(image, dtype=float)

    def distance(amount: float) -> float:
        found = degrade.degrade(image, kind, amount, np.random.default_rng(0))
        assert found.size == image.size and found.mode == "RGB"
        return float(np.abs(np.asarray(found, dtype=float) - original).mean())

    distances = [distance(amount) for amount in (0, 0.25, 0.5, 0.75, 1)]
    assert distances[0] == 0
    assert distances == sorted(distances) and len(set(distances)) == 5


def test_opinions_fall_with_the_amount_and_stay_on_the_scale():
    generator = np.random.default_rng(0)
    amounts = (0, 0.25, 0.5, 0.75, 1)
    found = np.array(
        [[degrade.simulate_opinions(a, generator) for _ in range(50)] for a in amounts]
    )
    mos, std = found[..., 0], found[..., 1]
    assert (np.diff(mos.mean(1)) < -0.5).all()
    assert mos.min() >= 1 and mos.max() <= 5
    assert 0.5 < std[2].mean() < 0.9  # people's own error, and the rounding to whole levels


def test_the_mean_opinion_is_the_expected_one_away_from_the_ends():
    generator = np.random.default_rng(0)
    found = [degrade.simulate_opinions(0.5, generator)[0] for _ in range(400)]
    assert np.mean(found) == pytest.approx(degrade.expected_opinion(0.5), abs=0.05)


def test_parts_share_no_source_and_held_out_kinds_are_never_trained_on(folder):
    rows = {part: data.read_rows(folder, part) for part in ("train", *evaluate.PARTS)}
    assert [len(own) for own in rows.values()] == [20, 12, 12]
    used = {
        part: {n for row in own for n in row["sources"].split(";")} for part, own in rows.items()
    }
    assert all(used.values())
    assert not used["train"] & (used["unseen images"] | used["unseen kinds"])
    kinds = {part: {row["kind"] for row in own} for part, own in rows.items()}
    assert kinds["train"] == kinds["unseen images"] == set(degrade.TRAINED)
    assert kinds["unseen kinds"] == set(degrade.UNSEEN)
    for row in (row for own in rows.values() for row in own):
        with Image.open(folder / row["image"]) as image:
            assert image.size == (SIDE, SIDE) and image.mode == "RGB" and image.format == "PNG"


def test_photographs_are_in_one_part():
    assert not set(data.TRAIN_PHOTOS) & set(data.TEST_PHOTOS)


def test_names_that_differ_in_a_number_are_in_one_part():
    assert len({data.is_test(f"home{number}") for number in range(20)}) == 1
    shares = [data.is_test(f"{a}{b}") for a in "abcdefghijklmnop" for b in "abcdefghijklmnop"]
    assert 0.1 < np.mean(shares) < 0.3


def test_the_same_seed_gives_the_same_images(folder, tmp_path):
    first = folder / "train/00003.png"
    before, table = first.read_bytes(), (folder / data.FILE).read_text()
    data.write_all(tmp_path / "again", 20, 12)
    assert (tmp_path / "again/train/00003.png").read_bytes() == before
    assert (tmp_path / "again" / data.FILE).read_text() == table
    data.write_all(tmp_path / "other", 20, 12, seed=1)
    assert (tmp_path / "other" / data.FILE).read_text() != table


def test_sharpness_falls_with_blur_and_baselines_read_the_files(folder):
    image = textured(0, SIDE)
    blurred = degrade.degrade(image, "blur", 0.5, np.random.default_rng(0))
    assert data.sharpness(blurred) < 0.5 * data.sharpness(image)
    rows = data.read_rows(folder, "unseen images")
    sizes = evaluate.simple_numbers(folder, rows)["file size"]
    assert sizes.tolist() == [len((folder / row["image"]).read_bytes()) for row in rows]


def test_correlations_of_baselines_lose_their_sign():
    rows = [{"mos": str(4 - n % 4), "kind": "blur" if n < 4 else "noise"} for n in range(8)]
    values = {"it": np.arange(8.0) % 4}
    assert evaluate.agreement(rows, values, signed=True)["all"]["it"]["srcc"] == -1
    found = evaluate.agreement(rows, values, signed=False)
    assert set(found) == {"all", "blur", "noise"}
    assert all(own["it"] == {"srcc": 1, "plcc": 1} for own in found.values())


def test_the_start_has_level_words_as_single_tokens_and_keeps_other_text():
    model, processor = start.make_start(0)
    tokenizer = processor.tokenizer
    ids = [level_id(tokenizer, word) for word in start.LEVELS]
    assert len(set(ids)) == 5 and max(ids) < model.config.output_vocab_size
    old = start.load_default()[1].tokenizer
    text = "USER: What is this? ASSISTANT: a red apple"
    assert tokenizer(text).input_ids == old(text).input_ids
    assert processor.image_token_id == model.config.image_token_id == len(tokenizer) - 1
    assert model.config.vision_config.image_size == SIDE


def test_a_seed_is_made_measured_and_installed(folder, tmp_path, monkeypatch):
    made, target = tmp_path / "made", tmp_path / "target"
    made.mkdir()
    folder.rename(made / "data")
    make.make_seed(made / "7", made / "data", seed=7, steps=1)
    target.mkdir()
    (target / "README.md").write_text(f"Before\n{install.BEGIN}\nold\n{install.END}\nafter\n")
    textured(5, 512).save(tmp_path / "astronaut.png")
    monkeypatch.setattr(install, "SAMPLE", "astronaut.png")
    monkeypatch.setattr(install, "fetch", lambda package: tmp_path)
    install.install(made, 7, target)
    results = json.loads((target / make.RESULTS).read_text())
    assert results["images"] == {"train": 20, "unseen images": 12, "unseen kinds": 12}
    assert set(results["scorer"]["7"]) == set(evaluate.PARTS)
    assert json.loads((target / "scorer.json").read_text())["levels"] == list(start.LEVELS)
    assert json.loads((target / "config.json").read_text())["dtype"] == "float32"
    card = (target / "README.md").read_text()
    assert card.startswith("Before\n") and card.endswith("after\n") and "old" not in card
    number = results["scorer"]["7"]["unseen kinds"]["all"]["scorer"]["srcc"]
    assert f"| unseen kinds | all | {number:.3f} /" in card
    with pytest.raises(ValueError, match=r"results of the seeds \[7\], not of 0"):
        install.install(made, 0, target)


def test_the_numbers_in_the_card_are_the_stored_ones():
    results = json.loads((default_scorer_dir() / make.RESULTS).read_text())
    card = (default_scorer_dir() / "README.md").read_text()
    table = card.partition(install.BEGIN)[2].partition(install.END)[0].strip().splitlines()
    assert table == install.result_lines(results)
    assert f"{results['images']['train']:,} images of" in card
