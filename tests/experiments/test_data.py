"""The files of the experiments, from sources made up here."""

import json
import random

import pytest
import torch
from PIL import Image

from experiments.default_model.data import Emoji
from experiments.small import data

NAMES = ("cat", "dog", "bison", "red apple", "pear")
PAIRS = [
    [
        ("what shape is in the image?", "circle"),
        ("what is the color of the circle?", "red"),
        ("is it red?", "yes"),
    ],
    [("what color is the shape?", "blue"), ("is it red?", "no")],
    [("is it red?", "no"), ("what shape is present?", "triangle")],
]
INDEX = """  1 A licence.
dwarf n 1 1 ~ 1 1 {dwarf}
bison n 1 1 ~ 1 1 {bison}
rare n 1 1 ~ 1 0 {dwarf}
two_words n 1 1 ~ 1 1 {dwarf}
whole n 2 1 ~ 2 1 {whole} {dwarf}
"""
GLOSSES = {
    "dwarf": 'a plant that is atypically small; "the dwarf stands in the garden behind the old house of stone"',
    "bison": "a large animal",
    "whole": 'an assemblage of parts; "how big is that part"; "the team is a unit"',
}


@pytest.fixture
def sources(monkeypatch, tmp_path):
    folder = tmp_path / "wordnet/usr/share/wordnet"
    folder.mkdir(parents=True)
    lines, offsets = b"", {}
    for word, gloss in GLOSSES.items():
        offsets[word] = f"{len(lines):08d}"
        lines += f"{len(lines):08d} 03 n 01 {word} 0 000 | {gloss}  \n".encode()
    (folder / "data.noun").write_bytes(lines)
    (folder / "index.noun").write_text(INDEX.format(**offsets))
    emoji = [
        Emoji(name, "animals and nature", "animal-mammal", f"{i}.png", True, name == "bison")
        for i, name in enumerate(NAMES)
    ]
    generator = torch.Generator().manual_seed(0)

    def random_pixels(*shape: int) -> torch.Tensor:
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)

    there = torch.tensor([True, True, True, True, False])
    monkeypatch.setattr(data, "fetch", lambda package: tmp_path / package)
    monkeypatch.setattr(data, "load_emoji", lambda: emoji)
    monkeypatch.setattr(
        data, "load_style", lambda style: (random_pixels(len(emoji), 4, 64, 64), there)
    )
    monkeypatch.setattr(
        data, "load_easy_vqa", lambda part: (random_pixels(len(PAIRS), 3, 64, 64), PAIRS)
    )
    monkeypatch.setattr("experiments.default_model.data.text_only_test", lambda emoji: [])
    monkeypatch.setattr(data, "NUM_TEST", 1)


@pytest.fixture
def files(sources, tmp_path):
    data.write_all(tmp_path / "out", 0)
    return {
        path.stem: data.read_rows(path) for path in (tmp_path / "out").glob("*.jsonl")
    }, tmp_path / "out"


def turns(row):
    return [(message["role"], message["content"][-1]["text"]) for message in row["messages"]]


def test_every_row_is_a_conversation_whose_pictures_are_there(files):
    rows, folder = files
    for one in (one for own in rows.values() for one in own):
        parts = [part["type"] for message in one["messages"] for part in message["content"]]
        assert parts.count("image") == len(one.get("images", []))
        assert [message["role"] for message in one["messages"]] == ["user", "assistant"] * (
            len(one["messages"]) // 2
        )
        for path in one.get("images", []):
            assert (
                Image.open(folder / path).size == (64, 64)
                and Image.open(folder / path).mode == "RGB"
            )


def test_training_has_no_held_out_name_style_or_view(files):
    rows, _ = files
    training = rows["captions.train"] + rows["instruct.train"]
    assert not any("bison" in text for one in training for _, text in turns(one))
    used = {path for one in training for path in one.get("images", [])}
    tested = {
        path
        for name, own in rows.items()
        if "test" in name
        for one in own
        for path in one.get("images", [])
    }
    assert used and tested and not used & tested
    assert not any("twitter" in path for path in used)


def test_each_caption_file_holds_what_it_is_named_after(files):
    rows, _ = files
    answers = {
        name: [turns(one)[1][1] for one in own]
        for name, own in rows.items()
        if name.startswith("captions")
    }
    assert sorted(answers["captions.seen.test"]) == sorted(["cat", "dog", "red apple"] * 3)
    assert answers["captions.unseen-style.test"] == ["cat", "dog", "red apple"]
    assert answers["captions.unseen-names.test"] == ["bison"] * 4
    assert sorted(answers["captions.train"]) == sorted(
        ["cat", "dog", "red apple"] * 9 + ["red circle"]
    )


def test_the_prior_is_the_commonest_training_answer(files):
    assert json.loads((files[1] / "easy_vqa.prior.json").read_text())["is it red?"] == "no"


def test_meanings_are_the_first_ones_of_common_single_words(sources):
    found = {word: (meaning, examples) for word, meaning, examples in data.load_meanings()}
    assert set(found) == {"dwarf", "bison", "whole"}
    assert found["whole"] == (
        "an assemblage of parts",
        ["how big is that part", "the team is a unit"],
    )


def test_words_of_the_test_are_not_in_training(files):
    rows, folder = files
    trained = {
        text for one in rows["instruct.train"] if "images" not in one for _, text in turns(one)
    }
    ((_, question), (_, meaning)) = turns(rows["text.test"][0])
    assert len(trained) == 2 and meaning not in trained
    assert question.removeprefix("What does ").removesuffix(" mean?") not in " ".join(trained)
    assert (folder / "sentences.test.txt").read_text().startswith("the dwarf stands in the garden")


def test_the_same_seed_gives_the_same_files(sources, tmp_path):
    def text(folder, seed):
        torch.manual_seed(0)
        data.write_all(folder, seed)
        return (folder / "instruct.train.jsonl").read_text()

    assert text(tmp_path / "a", 0) == text(tmp_path / "b", 0) != text(tmp_path / "c", 1)


def test_a_view_keeps_the_ground_white_and_all_of_the_drawing():
    drawn = data.view(Image.new("RGB", (64, 64), "black"), True, random.Random(0))
    left, top, right, bottom = drawn.convert("L").point(lambda value: 255 - value).getbbox()
    assert drawn.size == (64, 64) and right - left == bottom - top
    assert 48 <= right - left <= 64
