"""Scores on answers that were counted by hand, and the small model of the package."""

import json
import math

import pytest
import torch
from PIL import Image

from experiments.small import evaluate
from experiments.small.data import row
from owl2_hf.default import default_dir

ROWS = [
    row([("is it red?", "yes")], "a.png"),
    row([("what is it?", "red circle")], "a.png"),
    row([("is it red?", "no")], "b.png"),
    row([("is it blue?", "no")], "c.png"),
]


def test_accuracy_ignores_case_and_a_full_stop_alone():
    assert evaluate.accuracy(["Yes.", "red circle", "no way", "yes"], ROWS) == 0.5


def test_token_f1_counts_words():
    # 1, 2 * 1 / (1 + 2), 0, 2 * 1 / (2 + 1)
    assert evaluate.token_f1(["yes", "circle", "yes", "no no"], ROWS) == pytest.approx(
        (1 + 2 / 3 + 0 + 2 / 3) / 4
    )


def test_question_prior_is_the_accuracy_of_one_answer_per_question():
    assert evaluate.question_prior(ROWS, {"is it red?": "no", "what is it?": "red circle"}) == 0.5


def test_swapped_rows_keep_their_questions_and_lose_their_pictures():
    other = evaluate.swapped(ROWS)
    assert [one["images"] for one in other] == [["b.png"], ["b.png"], ["c.png"], ["a.png"]]
    assert [one["messages"] for one in other] == [one["messages"] for one in ROWS]


def test_a_limit_picks_evenly_spaced_rows():
    assert evaluate.thinned(list(range(10)), 4) == [0, 2, 5, 7]
    assert evaluate.thinned(ROWS, 99) == evaluate.thinned(ROWS, None) == ROWS


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, color in (("a", "red"), ("b", "blue"), ("c", "green")):
        Image.new("RGB", (64, 64), color).save(folder / f"{name}.png")
    return evaluate.Model(default_dir(), folder, batch_size=3)


def log_likelihoods(model, ids):
    """Of tokens 1 to T - 1 of one sequence of T ids."""
    with torch.no_grad():
        scores = model.model(input_ids=ids).logits[0].log_softmax(-1)
    return [scores[t - 1, ids[0, t]].item() for t in range(1, ids.shape[1])]


def test_the_perplexity_of_answers_leaves_out_questions_and_ends(model):
    pairs = [("What kind of thing is a banana?", "food and drink"), ("Is red a shape?", "no")]
    losses = []
    for question, answer in pairs:
        prompt = model.processor.tokenizer(
            f"USER: {question} ASSISTANT:", return_tensors="pt"
        ).input_ids
        ids = model.processor.tokenizer(
            f"USER: {question} ASSISTANT: {answer}", return_tensors="pt"
        ).input_ids
        losses += log_likelihoods(model, ids)[prompt.shape[1] - 1 :]
    expected = math.exp(-sum(losses) / len(losses))
    assert model.answer_perplexity([row([pair]) for pair in pairs], "meanings") == pytest.approx(
        expected, rel=1e-4
    )


def test_the_perplexity_of_text_does_not_depend_on_padding(model):
    sentences = ["is it a small red circle?", "what is this?", "a cat"]
    losses = [
        loss
        for one in sentences
        for loss in log_likelihoods(
            model, model.processor.tokenizer(one, return_tensors="pt").input_ids
        )
    ]
    expected = math.exp(-sum(losses) / len(losses))
    assert model.text_perplexity(sentences, "sentences") == pytest.approx(expected, rel=1e-4)


def test_evaluate_writes_every_score(model, capsys):
    folder = model.data
    lines = "".join(json.dumps(one) + "\n" for one in ROWS)
    for name in ("easy_vqa", *(f"captions.{kind}" for kind in evaluate.CAPTION_FILES)):
        (folder / f"{name}.test.jsonl").write_text(lines)
    (folder / "easy_vqa.prior.json").write_text('{"is it red?": "yes"}')
    (folder / "text.test.jsonl").write_text(json.dumps(row([("Is red a shape?", "no")])) + "\n")
    (folder / "sentences.test.txt").write_text("what is this?\n")
    results = evaluate.evaluate(default_dir(), folder, limit=2)
    assert (
        results["easy-VQA"]["questions"] == 2 and results["easy-VQA"]["question-only prior"] == 0.5
    )
    assert {"accuracy", "picture swapped", "token F1"} <= set(results["captions, unseen-style"])
    assert all(value > 1 for value in results["text"].values())
    printed = capsys.readouterr()
    assert printed.out == "" and "easy-VQA: 2 of 2" in printed.err
