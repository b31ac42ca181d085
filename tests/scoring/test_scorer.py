"""Scores by level words: the sum itself, batches, presets, and the command."""

import copy
import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from typer.testing import CliRunner

import owl2_hf
from owl2_hf.cli import app
from owl2_hf.processing.tokenization_mplug_owl2 import load_tokenizer, qwen_tokenizer
from owl2_hf.scoring import (
    PRESETS,
    Preset,
    Scorer,
    _token_id,
    crop_boxes,
    custom_preset,
    expand_paths,
    score_each,
    score_paths,
)

PROMPT = "USER: <|image|>Is it red? ASSISTANT:"
YES_NO = Preset(
    {"quality": PROMPT, "video": PROMPT}, ("yes", "no"), (1.0, 0.0), "resize", (0.0, 1.0)
)


@pytest.fixture(scope="module")
def default():
    model, processor = owl2_hf.load_default(dtype=torch.float32)
    return model, processor


@pytest.fixture(scope="module")
def pictures():
    return [str(path) for path in list(owl2_hf.default_pictures().values())[:5]]


def test_a_score_is_the_expected_value_of_the_levels(default, pictures):
    model, processor = default
    preset = Preset({"quality": PROMPT}, ("yes", "no", "red"), (1.0, 0.25, 0.0), "pad", (1.0, 5.0))
    (found,) = Scorer(model, processor, preset)(pictures[0])
    inputs = processor(
        text=PROMPT, images=pictures[0], image_aspect_ratio="pad", return_tensors="pt"
    )
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1]
    ids = processor.tokenizer.convert_tokens_to_ids(["▁yes", "▁no", "▁red"])
    probs = logits[ids].softmax(-1)
    values = torch.tensor([5.0, 2.0, 1.0])
    assert found.logits == pytest.approx(logits[ids].tolist(), abs=1e-5)
    assert found.probs == pytest.approx(probs.tolist(), abs=1e-6)
    assert found.score == pytest.approx(float(probs @ values), abs=1e-5)
    assert found.std == pytest.approx(
        math.sqrt(float(probs @ (values - probs @ values) ** 2)), abs=1e-4
    )
    assert found.levels == ("yes", "no", "red") and found.scale == (1.0, 5.0)


def test_a_batch_scores_as_one_by_one(default, pictures):
    model, processor = default
    together = Scorer(model, processor, YES_NO, batch_size=3)(pictures)
    alone = [Scorer(model, processor, YES_NO)(picture)[0] for picture in pictures]
    assert len(together) == 5
    for one, other in zip(together, alone, strict=True):
        assert one.logits == pytest.approx(other.logits, abs=2e-5)
        assert one.score == pytest.approx(other.score, abs=1e-5)


def test_videos_of_different_lengths_score_as_one_by_one(default, pictures):
    model, processor = default
    videos = [pictures[:3], pictures[3:4], pictures[1:]]
    scorer = Scorer(model, processor, YES_NO)
    for one, video in zip(scorer(videos, task="video"), videos, strict=True):
        (other,) = scorer(video, task="video")
        assert one.logits == pytest.approx(other.logits, abs=2e-5)
    prompt = PROMPT.replace("<|image|>", "<|image|>" * 3)
    inputs = processor(text=prompt, images=pictures[:3], return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1]
    assert scorer(pictures[:3], task="video")[0].logits[0] == pytest.approx(
        float(logits[processor.tokenizer.convert_tokens_to_ids("▁yes")]), abs=2e-5
    )


def test_the_scale_stretches_scores_and_deviations(default, pictures):
    model, processor = default
    (unit,) = Scorer(model, processor, YES_NO)(pictures[0])
    (stars,) = Scorer(model, processor, YES_NO, scale=(1.0, 5.0))(pictures[0])
    assert stars.score == pytest.approx(1 + 4 * unit.score) and stars.std == pytest.approx(
        4 * unit.std
    )


def test_words_of_a_group_are_averaged_before_the_softmax(default, pictures):
    groups = (("yes", "red"), ("no", "blue"))
    single = Preset({"quality": PROMPT}, (*groups[0], *groups[1]), (1.0, 1.0, 0.0, 0.0))
    (words,) = Scorer(*default, single)(pictures[0])
    (found,) = Scorer(*default, Preset({"quality": PROMPT}, groups, (1.0, 0.0)))(pictures[0])
    assert found.logits == pytest.approx(
        [sum(words.logits[:2]) / 2, sum(words.logits[2:]) / 2], abs=1e-5
    )
    assert found.levels == ("yes", "no")


def test_prompts_are_those_of_the_released_models():
    align = PRESETS["one-align"].prompts
    assert align["quality"] == (
        "USER: How would you rate the quality of this image?\n<|image|>\nASSISTANT: The quality of the image is"
    )
    assert align["aesthetics"].endswith("The aesthetics of the image is")
    assert align["video"].startswith("USER: How would you rate the quality of this video?")
    assert PRESETS["deqa"].prompts["quality"] == align["quality"]
    assert (
        PRESETS["q-instruct"].prompts["quality"]
        == "USER: <|image|>Rate the quality of the image.\nASSISTANT: "
    )
    assert [preset.image_aspect_ratio for preset in PRESETS.values()] == [
        "pad",
        "pad",
        "crop",
        "crop",
    ]
    assert PRESETS["q-instruct-boost"].levels[1] == ("average", "medium", "acceptable")


def test_the_presets_words_have_llamas_ids(golden_dir):
    source = golden_dir("A").parents[1] / "assets" / "llama_tokenizer" / "tokenizer.model"
    if not source.is_file():
        pytest.skip("LLaMA-2's tokenizer is not ours to ship and not here")
    tokenizer, _ = load_tokenizer(source)
    expected = {
        "excellent": 15129,
        "good": 1781,
        "fair": 6534,
        "poor": 6460,
        "bad": 4319,
        "average": 6588,
    }
    assert {word: _token_id(tokenizer, word) for word in expected} == expected
    for preset in PRESETS.values():
        for level in preset.levels:
            for word in (level,) if isinstance(level, str) else level:
                _token_id(tokenizer, word)


def test_inputs_that_cannot_be_scored_are_refused(default, pictures):
    model, processor = default
    with pytest.raises(ValueError, match="expected a preset of one-align, deqa"):
        Scorer(model, processor, "best")
    with pytest.raises(
        ValueError, match="the level 'excellent' is not one token of this vocabulary"
    ):
        Scorer(model, processor)
    with pytest.raises(ValueError, match="expected a task of quality, video, got 'beauty'"):
        Scorer(model, processor, YES_NO)(pictures, task="beauty")
    with pytest.raises(ValueError, match="a value for each of two or more levels"):
        Preset({"quality": PROMPT}, ("yes", "no"), (1.0,))
    with pytest.raises(ValueError, match=r"must contain <\|image\|> once"):
        Preset({"quality": "Is it?"})
    with pytest.raises(ValueError, match="batch_size of at least 1"):
        Scorer(model, processor, YES_NO, batch_size=0)
    with pytest.raises(ValueError, match="at least one frame of each video"):
        Scorer(model, processor, YES_NO)([[]], task="video")
    (found,) = score_each(Scorer(model, processor, YES_NO), [[]], task="video")
    assert "at least one frame" in str(found)


def test_scores_of_a_model_that_gives_nan_are_an_error(default, pictures):
    model = copy.deepcopy(default[0])
    model.lm_head.weight.data.fill_(math.nan)
    with pytest.raises(ValueError, match="the model's logits are not finite"):
        Scorer(model, default[1], YES_NO)(pictures[0])


def test_a_level_is_the_word_behind_other_words():
    """Qwen's tokenizer has pieces with and without the space in front."""
    pieces = [bytes([byte]) for byte in range(256)] + [b"go", b"od", b" go", b" good"]
    tokenizer = qwen_tokenizer({piece: rank for rank, piece in enumerate(pieces)})
    assert _token_id(tokenizer, "good") == 259
    with pytest.raises(ValueError, match="the level 'bad' is not one token"):
        _token_id(tokenizer, "bad")


def test_a_broken_picture_costs_no_other_its_score(default, pictures, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    scorer = Scorer(*default, YES_NO, batch_size=2)
    found = list(
        score_each(scorer, [pictures[0], tmp_path / "broken.png", pictures[1], "missing.png"])
    )
    assert [isinstance(one, ValueError) for one in found] == [False, True, False, True]
    assert "broken.png" in str(found[1])
    assert found[2].logits == pytest.approx(scorer(pictures[1])[0].logits, abs=2e-5)


def test_a_picture_that_pil_has_not_read_yet_costs_no_other_its_score(default, pictures, tmp_path):
    content = Path(pictures[1]).read_bytes()
    (tmp_path / "half.png").write_bytes(content[: len(content) // 2])
    with Image.open(tmp_path / "half.png") as half:
        found = list(score_each(Scorer(*default, YES_NO), [pictures[0], half]))
    assert found[0].score == pytest.approx(Scorer(*default, YES_NO)(pictures[0])[0].score, abs=1e-5)
    assert isinstance(found[1], ValueError)


def test_pictures_score_the_same_in_every_form(default, pictures):
    scorer = Scorer(*default, YES_NO)
    with Image.open(pictures[0]) as opened:
        picture = opened.convert("RGB")
    array = np.asarray(picture)
    tensor = torch.from_numpy(array.transpose(2, 0, 1).copy())
    (expected,) = scorer(pictures[0])
    forms = [
        Path(pictures[0]),
        Path(pictures[0]).read_bytes(),
        picture,
        array,
        tensor,
        np.stack([array, array]),
    ]
    for form in forms:
        for found in scorer(form):
            assert found.logits == pytest.approx(expected.logits, abs=2e-5)
    assert len(scorer(forms[-1])) == 2 and scorer([]) == []
    video = scorer([picture, picture], task="video")
    assert scorer(forms[-1], task="video")[0].logits == pytest.approx(video[0].logits, abs=2e-5)
    assert len(scorer([forms[-1], [picture]], task="video")) == 2


def test_folders_are_their_pictures_or_one_video(tmp_path):
    for name in ("b.png", "a.jpg"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    assert expand_paths([str(tmp_path)])[0] == [str(tmp_path / "a.jpg"), str(tmp_path / "b.png")]
    names, sources = expand_paths([str(tmp_path)], is_video=True)
    assert names == [str(tmp_path)] and len(sources[0]) == 2
    (tmp_path / "clip.MP4").write_bytes(b"")
    assert expand_paths([str(tmp_path)], is_video=True)[0] == [str(tmp_path / "clip.MP4")]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="contains no images"):
        expand_paths([str(tmp_path / "empty")])


def test_crops_cover_the_image_at_its_own_resolution():
    assert crop_boxes(100, 80, 448) == [(0, 0, 100, 80)]
    assert crop_boxes(448, 449, 448) == [(0, 0, 448, 448), (0, 1, 448, 449)]
    for width, height in ((3840, 2160), (1000, 30), (449, 897)):
        covered = np.zeros((height, width), dtype=int)
        boxes = crop_boxes(width, height, 448)
        for left, top, right, bottom in boxes:
            assert (right - left, bottom - top) == (min(448, width), min(448, height))
            covered[top:bottom, left:right] += 1
        assert covered.shape == (height, width) and covered.min() == 1
        assert len(boxes) == math.ceil(width / 448) * math.ceil(height / 448)


def test_a_score_over_crops_is_that_of_their_mean_probabilities(default, pictures):
    model, processor = default
    side = dict(processor.image_processor.size)["height"]
    squares = [Image.open(picture).convert("RGB").resize((side, side)) for picture in pictures[:2]]
    both = Image.new("RGB", (2 * side, side))
    for index, square in enumerate(squares):
        both.paste(square, (index * side, 0))
    alone = Scorer(model, processor, YES_NO)(squares)
    (found,) = Scorer(model, processor, YES_NO, batch_size=1, crops=True)(both)
    assert abs(alone[0].score - alone[1].score) > 0.01
    assert found.score == pytest.approx(sum(one.score for one in alone) / 2, abs=1e-5)
    assert sum(found.probs) == pytest.approx(1)
    mean = [sum(pair) / 2 for pair in zip(alone[0].probs, alone[1].probs, strict=True)]
    assert found.probs == pytest.approx(mean, abs=1e-5)
    assert Scorer(model, processor, YES_NO, crops=True)(squares)[1].score == pytest.approx(
        alone[1].score, abs=1e-5
    )
    with pytest.raises(ValueError, match="expected crops of images, got task 'video'"):
        Scorer(model, processor, YES_NO, crops=True)([squares], task="video")


def test_aesthetic_is_another_word_for_aesthetics(default, pictures):
    scorer = Scorer(*default, Preset({"aesthetics": PROMPT}, ("yes", "no"), (1.0, 0.0)))
    assert scorer(pictures[0], task="aesthetic") == scorer(pictures[0], task="aesthetics")


def test_levels_and_prompts_of_ones_own():
    preset = custom_preset(
        "one-align", "quality", "USER: <|image|>\\nGood? ASSISTANT:", ["yes", " maybe", "no"]
    )
    assert preset.levels == ("yes", "maybe", "no") and preset.values == (1.0, 0.5, 0.0)
    assert preset.prompts == {"quality": "USER: <|image|>\nGood? ASSISTANT:"}


@pytest.fixture(scope="module")
def folder(default, tmp_path_factory):
    target = tmp_path_factory.mktemp("scoring") / "model"
    for part in default:
        part.save_pretrained(target)
    return target


def run(folder, *arguments):
    own = ["--model", str(folder), "--levels", "yes,no", "--prompt", PROMPT]
    return CliRunner().invoke(app, ["score", *map(str, arguments), *own])


def test_the_command_prints_json_and_csv(folder, default, pictures, tmp_path):
    result = run(folder, *pictures[:2], "--json", "--scale", "0-1")
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    preset = Preset({"quality": PROMPT}, ("yes", "no"), (1.0, 0.0), "pad", (0.0, 1.0))
    expected = Scorer(*default, preset)(pictures[:2])
    assert [line["score"] for line in lines] == pytest.approx(
        [one.score for one in expected], abs=1e-4
    )
    assert [line["image"] for line in lines] == pictures[:2] and lines[0]["scale"] == [0.0, 1.0]
    odd = tmp_path / 'a "b", c.png'
    odd.write_bytes(Path(pictures[0]).read_bytes())
    table = list(csv.DictReader(run(folder, odd, pictures[1], "--csv").stdout.splitlines()))
    assert [row["image"] for row in table] == [str(odd), pictures[1]]
    assert set(table[0]) == {"image", "score", "std", "yes", "no"}
    assert float(table[0]["yes"]) + float(table[0]["no"]) == pytest.approx(1, abs=1e-5)
    both = run(folder, pictures[0], "--csv", "--json")
    assert both.exit_code == 2 and "use --json or --csv" in both.stderr and not both.stdout
    assert "of 1 to 5" in run(folder, pictures[0]).stdout


def test_the_command_names_a_broken_picture_and_scores_the_rest(folder, pictures, tmp_path):
    Image.open(pictures[0]).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"broken")
    Image.open(pictures[1]).save(tmp_path / "c.png")
    result = run(folder, tmp_path)
    assert result.exit_code == 1
    assert len(result.stdout.splitlines()) == 2
    errors = [line for line in result.stderr.splitlines() if line.startswith("owl2-hf: ")]
    assert len(errors) == 1 and "b.png" in errors[0]


def test_odd_names_are_escaped_for_people_and_whole_for_programs(folder, pictures, tmp_path):
    odd = tmp_path / "a\x1b]0;owned\x07\nb.png"
    odd.write_bytes(Path(pictures[0]).read_bytes())
    bad = tmp_path / "c\nowl2-hf: forged.png"
    bad.write_bytes(b"broken")
    result = run(folder, tmp_path)
    assert result.exit_code == 1
    assert result.stdout.endswith(f"  {tmp_path}/a\\x1b]0;owned\\x07\\nb.png\n")
    (error,) = [line for line in result.stderr.split("\n") if line.startswith("owl2-hf: ")]
    assert error.startswith(f"owl2-hf: {tmp_path}/c\\nowl2-hf: forged.png: ")
    assert json.loads(run(folder, odd, "--json").stdout)["image"] == str(odd)
    (row,) = csv.DictReader(run(folder, odd, "--csv").stdout.splitlines(True))
    assert row["image"] == str(odd)


def test_an_empty_folder_costs_no_other_its_score(folder, default, pictures, tmp_path):
    (tmp_path / "empty").mkdir()
    result = run(folder, pictures[0], tmp_path / "empty", pictures[1], "--json")
    assert result.exit_code == 1
    assert [json.loads(line)["image"] for line in result.stdout.splitlines()] == pictures[:2]
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("owl2-hf: ")]
    assert error.startswith(f"owl2-hf: {tmp_path / 'empty'} contains no images")


def test_images_are_opened_no_sooner_than_their_batch_is_scored(default, pictures, tmp_path):
    paths = [str(tmp_path / name) for name in ("a.png", "b.png")]
    Image.open(pictures[0]).save(paths[0])
    found = score_paths(Scorer(*default, YES_NO, batch_size=1), paths)
    assert next(found)[0] == paths[0]
    Image.open(pictures[1]).save(paths[1])
    assert not isinstance(next(found)[1], ValueError)


def test_files_are_read_as_the_originals_read_them_where_that_is_asked_for(
    folder, default, pictures, tmp_path
):
    exif = Image.Exif()
    exif[0x0112] = 3
    path = tmp_path / "turned.png"
    Image.open(pictures[0]).save(path, exif=exif)
    preset = Preset({"quality": PROMPT}, ("yes", "no"), (1.0, 0.0), "pad")
    (expected,) = Scorer(*default, preset)(Image.open(path))
    (upright,) = Scorer(*default, preset)(path)
    assert abs(expected.score - upright.score) > 1e-4
    scorer = Scorer(*default, preset, original_reading=True)
    for found in (scorer(path)[0], *score_each(scorer, [path])):
        assert found.score == pytest.approx(expected.score, abs=1e-6)
    line = json.loads(run(folder, path, "--original-reading", "--json").stdout)
    assert line["score"] == pytest.approx(expected.score, abs=1e-5)
    assert json.loads(run(folder, path, "--json").stdout)["score"] == pytest.approx(
        upright.score, abs=1e-5
    )


def test_the_command_scores_crops(folder, default, pictures, tmp_path):
    Image.open(pictures[0]).resize((300, 200)).save(tmp_path / "a.png")
    result = run(folder, tmp_path / "a.png", "--crops", "--json")
    preset = Preset({"quality": PROMPT}, ("yes", "no"), (1.0, 0.0), "pad")
    (expected,) = Scorer(*default, preset, crops=True)(tmp_path / "a.png")
    assert json.loads(result.stdout)["score"] == pytest.approx(expected.score, abs=1e-5)
    assert expected.score != Scorer(*default, preset)(tmp_path / "a.png")[0].score


def test_the_auto_classes_load_what_scores(folder, pictures):
    model, processor = (
        AutoModelForImageTextToText.from_pretrained(folder),
        AutoProcessor.from_pretrained(folder),
    )
    assert 0 <= Scorer(model.eval(), processor, YES_NO)(pictures[0])[0].score <= 1
