"""Batches: the original's ids, labels and pixels, and truncation that never cuts an image."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from owl2_hf.modeling import MplugOwl2Config, MplugOwl2ForConditionalGeneration
from owl2_hf.processing import MplugOwl2ImageProcessor, MplugOwl2Processor
from owl2_hf.processing.processing_mplug_owl2 import QWEN_CHAT_TEMPLATE
from owl2_hf.processing.tokenization_mplug_owl2 import load_tokenizer, qwen_tokenizer
from owl2_hf.training.collator import Collator
from owl2_hf.training.data import Rows, check_rows

from ..original import MARKER, expand_markers
from .conftest import llava as row

GOLDEN = Path(__file__).parents[1] / "golden"
RED, WIDE = Image.new("RGB", (5, 5), "red"), Image.new("RGB", (40, 10), "blue")
# Upstream: what its `--version v1` puts in front of every training conversation, and inference does
# not.
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def make(tokenizer=None, legacy=True, num_image_tokens=3, **kwargs):
    if tokenizer is None:
        tokenizer, _ = load_tokenizer(GOLDEN / "T" / "tiny.model")
    image_processor = MplugOwl2ImageProcessor(size={"height": 14, "width": 14}, **kwargs)
    template = QWEN_CHAT_TEMPLATE if tokenizer.bos_token is None else None
    return MplugOwl2Processor(
        image_processor, tokenizer, template, num_image_tokens=num_image_tokens, legacy=legacy
    )


def make_docowl():
    return make(image_aspect_ratio="anchors", num_image_tokens=4)


def make_qwen():
    return make(qwen_tokenizer({bytes([byte]): byte for byte in range(256)}))


def with_system(conversations):
    return [{"from": "system", "value": SYSTEM}, *conversations]


def learned(processor, batch, index=0):
    labels = batch["labels"][index]
    return processor.tokenizer.decode(labels[labels != -100])


# The original


def labels_file(golden_dir, name):
    """All recorded cases, or the few that the repository ships."""
    path = golden_dir("T") / f"train_labels_{name}.json"
    if not path.is_file():
        pytest.skip(f"{path.name} is not here; OWL2_HF_GOLDEN names the folder that holds it")
    return json.loads(path.read_text())["cases"]


# The original masks these samples as a whole, by a count of its own that does not fit
# ("tokenization mismatch").
MASKED_BY_A_BUG = {"answer_contains_assistant": "he said ASSISTANT: yes</s>"}
# It does the same with these, which have nothing to learn; here they are refused.
REFUSED = {"empty_answer"}
# With legacy=False transformers 4.31 split `USER` behind `</s>` otherwise than every later version
# does.
OTHER_IDS = {
    ("llama2", False): {"image_two_rounds", "image_three_rounds_unicode", "text_two_rounds"}
}


@pytest.mark.parametrize("legacy", [True, False], ids=["legacy", "not legacy"])
@pytest.mark.parametrize("tokenizer", ["tiny", "llama2"])
def test_ids_and_labels_are_the_originals(golden_dir, tokenizer, legacy):
    cases = labels_file(golden_dir, f"{tokenizer}_legacy_{str(legacy).lower()}")
    source = GOLDEN / "T" / "tiny.model"
    if tokenizer == "llama2":
        source = GOLDEN.parents[2] / "shared" / "assets" / "llama_tokenizer" / "tokenizer.model"
        if not source.is_file():
            pytest.skip("LLaMA-2's tokenizer is not ours to ship and not here")
    processor = make(load_tokenizer(source)[0], legacy)
    collator = Collator(processor)
    for case in cases:
        name, turns = case["name"], case["conversations"]
        sample = {
            "id": name,
            "conversations": with_system(turns) if case["version"] == "v1" else turns,
        }
        if case["has_image"]:
            sample["image"] = RED
        if name in REFUSED:
            with pytest.raises(ValueError, match=f"row '{name}': answer 1 is empty"):
                collator([sample])
            continue
        batch = collator([sample])
        ids, labels = original(case, processor)
        got_ids, got_labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
        if name in OTHER_IDS.get((tokenizer, legacy), ()):
            us, user = processor.tokenizer.convert_tokens_to_ids(["US", "USER"])
            ids, labels = merge_user(ids, labels, us, user)
        assert got_ids == ids, name
        if name in MASKED_BY_A_BUG:
            assert set(labels) == {-100}
            assert learned(processor, batch) == MASKED_BY_A_BUG[name]
        else:
            assert got_labels == labels, name


def original(case, processor):
    ids, labels = [], []
    for token, label in zip(case["input_ids"], case["labels"], strict=True):
        run = processor.num_image_tokens if token == MARKER else 1
        ids += [processor.image_token_id if token == MARKER else token] * run
        labels += [label] * run
    return ids, labels


def merge_user(ids, labels, us, user):
    """`US`, `ER` behind `</s>` as the one token `USER`."""
    places = [index for index, token in enumerate(ids) if token == us and ids[index - 1] == 2]
    assert places
    drop = {index + 1 for index in places}
    ids = [user if index in places else token for index, token in enumerate(ids)]
    return tuple(
        [value for index, value in enumerate(values) if index not in drop]
        for values in (ids, labels)
    )


@pytest.mark.parametrize("mode", ["pad", "square"])
def test_batches_are_the_originals(golden_dir, mode):
    folder = golden_dir("G") / "train_data"
    if not folder.is_dir():
        pytest.skip(
            "the original's batches are not here; OWL2_HF_GOLDEN names the folder that holds them"
        )
    processor = MplugOwl2Processor.from_original(golden_dir("G") / "mplug_owl2_base")
    # Upstream: anything but "pad" goes through CLIP's own preprocessing in training, which cuts the
    # centre.
    processor.image_processor.image_aspect_ratio = "pad" if mode == "pad" else "crop"
    rows = json.loads((folder / "data.json").read_text())
    rows = [{**sample, "conversations": with_system(sample["conversations"])} for sample in rows]
    collator, tensors = (
        Collator(processor, image_folder=folder),
        load_file(folder / "batches.safetensors"),
    )
    for case in json.loads((folder / "batches.json").read_text())[mode]["batches"]:
        batch = collator([rows[index] for index in case["indices"]])
        recorded = {
            key: tensors[f"{case['name']}/{key}"]
            for key in ("input_ids", "labels", "attention_mask", "images")
        }
        images = recorded.pop("images")
        for key, value in expand_markers(config=processor, **recorded).items():
            assert torch.equal(batch[key], value), (case["name"], key)
        # It made black ones for the others.
        with_image = ["image" in rows[index] for index in case["indices"]]
        assert torch.equal(batch["pixel_values"], images[with_image])


# Labels


LLAMA, DOCOWL = make(), make_docowl()


@pytest.mark.parametrize("make", [make, lambda: make(legacy=False), make_qwen, make_docowl])
def test_labels_are_the_answers_and_their_ends(make):
    processor = make()
    batch = Collator(processor)(
        [
            row(
                "<image> a </s> ASSISTANT: b",
                "A dog.",
                "And <image>?",
                " A </s> cat",
                image=[RED, WIDE],
            ),
            row("q", "羊 a"),
        ]
    )
    first, second = (learned(processor, batch, index).replace(" ", "") for index in (0, 1))
    assert (first, second) == ("Adog.</s>A</s>cat</s>", "羊a</s>")
    assert (batch["labels"][batch["mm_token_type_ids"].bool()] == -100).all()
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()


def test_a_picture_inside_an_answer_is_not_learned():
    batch = Collator(LLAMA)(
        [row("Which?", "this <image> one", "and?", "<image> that", image=[RED, WIDE])]
    )
    assert learned(LLAMA, batch).replace(" ", "") == "thisone</s>that</s>"
    assert batch["mm_token_type_ids"].sum() == 6


@pytest.mark.parametrize("make", [make, make_docowl])
def test_one_call_processes_the_pictures_of_all_rows(make):
    processor = make()
    collator = Collator(processor)
    rows = [
        row("<image> a", "b", image=RED),
        row("c", "d"),
        row("<image>, <image>", "e", image=[WIDE, RED]),
    ]
    together, alone = collator(rows), [collator([sample]) for sample in rows]
    pixels = torch.cat([batch["pixel_values"] for batch in alone if "pixel_values" in batch])
    assert torch.equal(together["pixel_values"], pixels)
    for index, batch in enumerate(alone):
        length = batch["input_ids"].shape[1]
        for key in ("input_ids", "labels", "attention_mask", "mm_token_type_ids"):
            assert torch.equal(together[key][index, :length], batch[key][0])
    assert "pixel_values" not in alone[1]


def test_frames_of_a_video_follow_one_another():
    batch = Collator(make())([row("<video> a", "b", video=[RED, WIDE, RED])])
    assert batch["pixel_values"].shape[0] == 3
    assert batch["mm_token_type_ids"].sum() == 9


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding(side):
    rows = [row("a", "b"), row("a longer question", "with an answer")]
    batch = Collator(make(), padding_side=side, pad_to_multiple_of=32)(rows)
    assert batch["input_ids"].shape[1] % 32 == 0
    assert {value.dtype for value in batch.values()} == {torch.long}
    for index in range(2):
        mask = batch["attention_mask"][index].bool()
        assert mask.sum() < len(mask)
        assert mask.tolist() == sorted(mask.tolist(), reverse=side == "right")
        assert (batch["input_ids"][index][~mask] == 0).all()
        assert torch.equal(
            batch["input_ids"][index][mask], Collator(make())([rows[index]])["input_ids"][0]
        )


# Truncation


PART = st.sampled_from(["<image>", "<image>", "some words", "text, more text"])


@settings(deadline=None, max_examples=60)
@given(
    processor=st.sampled_from([LLAMA, DOCOWL]),
    turns=st.lists(st.lists(PART, max_size=3).map(" ".join), min_size=1, max_size=3),
    shapes=st.lists(st.sampled_from([RED, WIDE]), min_size=9, max_size=9),
    max_length=st.integers(1, 120),
)
def test_truncation_never_cuts_a_picture(processor, turns, shapes, max_length):
    count = sum(turn.count("<image>") for turn in turns)
    pictures = shapes[:count]
    sample = row(*[value for turn in turns for value in (turn, "the answer")], image=pictures)
    whole, cut = Collator(processor)([sample]), Collator(processor, max_length)([sample])
    length, full = cut["input_ids"].shape[1], whole["input_ids"].shape[1]
    for key in ("input_ids", "labels", "mm_token_type_ids"):
        assert torch.equal(cut[key], whole[key][:, :length])
    squares = len(cut.get("pixel_values", ()))
    assert cut["mm_token_type_ids"].sum() == squares * processor.num_image_tokens
    crops = [
        processor.image_processor.num_crops(picture.height, picture.width) for picture in pictures
    ]
    assert squares in [sum(crops[:number]) for number in range(len(crops) + 1)]
    if squares:
        assert torch.equal(cut["pixel_values"], whole["pixel_values"][:squares])
    if length < min(max_length, full):  # then an image begins here that does not fit
        run = next(
            sum(crops[: number + 1]) - squares
            for number in range(len(crops))
            if sum(crops[:number]) == squares
        )
        positions = (
            whole["mm_token_type_ids"][0]
            .nonzero()
            .flatten()[squares * processor.num_image_tokens :]
        )
        assert positions[0] == length
        assert positions[run * processor.num_image_tokens - 1] >= max_length
    else:
        assert length == min(max_length, full)


def test_a_picture_that_just_fits_stays():
    sample = row("<image>", "b", image=RED)
    positions = Collator(LLAMA)([sample])["mm_token_type_ids"][0].nonzero().flatten()
    last = int(positions[-1])
    assert Collator(LLAMA, last + 1)([sample])["input_ids"].shape[1] == last + 1
    assert Collator(LLAMA, last)([sample])["input_ids"].shape[1] == int(positions[0])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_truncated_and_unlabelled_rows_are_counted_in_all_workers(num_workers):
    rows = [row("a " * 30, "b"), row("a", "b " * 30), row("a", "b")]
    collator = Collator(LLAMA, max_length=30)
    for _ in DataLoader(Rows(2 * rows), batch_size=1, collate_fn=collator, num_workers=num_workers):
        pass
    assert collator.counts == {"rows": 6, "truncated": 4, "without_labels": 2, "skipped": 0}
    report = check_rows(rows, processor=LLAMA, max_length=30)
    assert (report.truncated, report.without_labels) == (2, 1)


def test_the_collator_can_be_pickled():
    sample = row("<image> a", "b", image=RED)
    collator = Collator(LLAMA, 50)
    copied = pickle.loads(pickle.dumps(collator))  # noqa: S301
    assert all(
        torch.equal(value, copied([sample])[key]) for key, value in collator([sample]).items()
    )


def test_a_batch_without_a_label_has_loss_zero():
    config = MplugOwl2Config(
        text_config={"vocab_size": 1088, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
                     "num_attention_heads": 2},
        vision_config={"hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                       "image_size": 14, "patch_size": 7},
        abstractor_config={"num_hidden_layers": 1, "num_attention_heads": 2, "num_learnable_queries": 2,
                           "hidden_size": 12, "intermediate_size": 16},
        image_token_id=LLAMA.image_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    model = MplugOwl2ForConditionalGeneration(config)
    rows = [row("a", "b"), row("a", "c d e")]
    empty, full = Collator(LLAMA, max_length=5)(rows), Collator(LLAMA)(rows)
    assert (empty["labels"] == -100).all()
    for kwargs in ({}, {"num_items_in_batch": torch.tensor(0)}, {"num_items_in_batch": 0}):
        loss = model(**empty, **kwargs).loss
        loss.backward()
        assert loss == 0
    assert all(
        not parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None
    )
    output = model(**full)
    mean = torch.nn.functional.cross_entropy(
        output.logits[:, :-1].flatten(0, 1), full["labels"][:, 1:].flatten()
    )
    assert torch.allclose(output.loss, mean, rtol=1e-6)
    num_labels = full["labels"][:, 1:].ne(-100).sum()
    assert torch.allclose(
        model(**full, num_items_in_batch=2 * num_labels).loss, mean / 2, rtol=1e-6
    )


# What cannot be learned from


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (row("a", "", id="x"), "row 'x': answer 1 is empty"),
        (row("a", ""), "row number 2 of the batch: answer 1 is empty"),
        (row("<image>", "b", id=3, image=b"no image"), "row 3: bytes: it is not an image"),
        (row("<image>", "b", id="x", image="no.png"), "row 'x': the image"),
    ],
)
def test_a_bad_row_is_named(sample, message):
    with pytest.raises(ValueError, match=message):
        Collator(LLAMA)([row("a", "b"), sample])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"padding_side": "top"}, "padding_side must be 'right' or 'left', got 'top'"),
        ({"max_length": 0}, "max_length must be at least 1, got 0"),
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of must be at least 1, got 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Collator(LLAMA, **options)


def test_bad_rows_are_left_out_counted_and_named(tmp_path, caplog):
    (tmp_path / "broken.png").write_bytes(b"no image")
    RED.save(tmp_path / "red.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "red.png").read_bytes()[:-30])
    good = [row("<image> a", "b", image=RED), row("c", "d")]
    broken, cut = (
        row("<image> a", "b", id=name, image=f"{name}.png") for name in ("broken", "cut")
    )
    collator = Collator(LLAMA, image_folder=tmp_path, skip_bad=True)
    batch, expected = collator([good[0], broken, good[1], cut]), Collator(LLAMA)(good)
    assert batch.keys() == expected.keys()
    assert all(torch.equal(batch[key], expected[key]) for key in expected)
    assert collator.counts["skipped"] == 2 and collator.counts["rows"] == 2
    assert all(f"row '{name}': '" in caplog.text for name in ("broken", "cut"))
    assert caplog.text.count("The row is skipped.") == 2


def test_a_batch_of_bad_rows_alone_has_nothing_to_learn():
    batch = Collator(LLAMA, skip_bad=True)([row("a", ""), row("b", "")])
    assert batch["labels"].tolist() == [[-100, -100]] and "pixel_values" not in batch
    with pytest.raises(ValueError, match="answer 1 is empty"):
        Collator(LLAMA)([row("a", ""), row("b", "")])
