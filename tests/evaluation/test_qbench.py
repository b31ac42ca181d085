"""Q-Bench's questions: how they are read, asked and counted, and the same through lmms-eval."""

import json

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import owl2_hf
from owl2_hf.cli import app
from owl2_hf.evaluation.qbench import Answer, QBenchReport, evaluate_qbench, load_questions

ROWS = [
    ("a.png", "How is it?", ["Low", "High", "Low"], "Low", 2, 0),
    ("b.png", "Is it {red}?", ["Yes", "No"], "No", 0, 3),
    ("a.png", "What is it?", ["A cat", "A dog", "Noise", "A car"], "A car", 1, 1),
]


def row(image, question, candidates, correct, kind, concern):
    return {
        "img_path": image,
        "question": question,
        "candidates": candidates,
        "correct_ans": correct,
        "type": kind,
        "concern": concern,
    }


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for name, colour in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (40, 24), colour).save(tmp_path / "images" / name)
    write(tmp_path, [row(*one) for one in ROWS])
    return tmp_path


def write(folder, rows):
    (folder / "llvisionqa_dev.json").write_text(json.dumps(rows))


@pytest.fixture(scope="module")
def default():
    return owl2_hf.load_default(dtype=torch.float32)


def test_a_question_is_asked_as_the_scripts_ask_it(folder):
    first, second, third = load_questions(folder)
    assert first.prompt == (
        "USER: The input image:<|image|>How is it?\nA. Low\nB. High\nC. Low\n"
        "Answer with the option's letter from the given choices directly.\n ASSISTANT:"
    )
    assert "Is it {red}?\nA. Yes\nB. No\nAnswer" in second.prompt
    assert [one.correct for one in (first, second, third)] == ["C", "B", "D"]
    assert (third.kind, third.concern) == ("what", "others")
    assert first.image == str(folder / "images" / "a.png")


def test_an_answer_counts_if_it_holds_the_letter(folder):
    questions = load_questions(folder)
    texts = ("A or C.", "b", "D. A car")
    report = QBenchReport([Answer(*pair) for pair in zip(questions, texts, strict=True)], samples=9)
    found = report.accuracies()
    assert found["overall"]["all questions"].value == pytest.approx(2 / 3)
    assert found["overall"]["all questions"].questions == 3
    assert {name: one.value for name, one in found["type"].items()} == {
        "yes-or-no": 0.0,
        "what": 1.0,
        "how": 1.0,
    }
    assert list(found["concern"]) == ["distortion", "others", "in-context others"]
    assert found["concern"]["in-context others"].value == 0.0
    # Two of the three questions are of one image: they are drawn together.
    low, high = found["overall"]["all questions"].low, found["overall"]["all questions"].high
    assert (low, high) == (0.0, 1.0)


def test_a_model_that_knows_the_right_letters_is_told_from_one_that_does_not(folder, monkeypatch):
    model, processor = owl2_hf.load_default(dtype=torch.float32)
    questions = load_questions(folder)
    letters = {"How is it?": "C", "Is it {red}?": "A", "What is it?": "D"}

    def generate(input_ids, pixel_values, max_new_tokens, **kwargs):
        assert kwargs["do_sample"] is False and pixel_values.shape[0] == len(input_ids)
        texts = processor.batch_decode(input_ids)
        known = [
            next(letter for text, letter in letters.items() if text in prompt) for prompt in texts
        ]
        new = torch.tensor([processor.tokenizer(letter).input_ids[-1:] for letter in known])
        return torch.cat([input_ids, new], 1)

    monkeypatch.setattr(model, "generate", generate)
    report = evaluate_qbench(model, processor, questions, batch_size=2, samples=5)
    assert [answer.text for answer in report.answers] == ["C", "A", "D"]
    assert report.accuracies()["overall"]["all questions"].value == pytest.approx(2 / 3)


def test_a_batch_answers_as_single_questions_do(folder, default):
    questions = load_questions(folder)
    several, single = (
        evaluate_qbench(*default, questions, batch_size=size, samples=1) for size in (3, 1)
    )
    assert [one.text for one in several.answers] == [one.text for one in single.answers]
    assert all(one.text for one in single.answers)


def test_images_are_cut_as_the_scripts_cut_them(folder, default):
    model, processor = default
    seen = []

    class Watched:
        device, config = model.device, model.config

        def generate(self, **inputs):
            seen.append(inputs["pixel_values"])
            return inputs["input_ids"]

    wide = Image.new("RGB", (60, 20), "red")
    wide.paste((0, 0, 255), (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned, for those who look
    wide.save(folder / "images" / "a.png", exif=exif)
    evaluate_qbench(Watched(), processor, load_questions(folder)[:1], samples=1)
    with Image.open(folder / "images" / "a.png") as image:
        middle = image.convert("RGB").crop((20, 0, 40, 20))
    expected = processor.image_processor(middle, return_tensors="pt")["pixel_values"]
    assert torch.equal(seen[0][..., 5:-5], expected[..., 5:-5])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"correct_ans": "Medium"}, "row 2: 'correct_ans' 'Medium' is not among the candidates"),
        ({"correct_ans": None}, "row 2: expected 'correct_ans'.*use the split dev, which has it"),
        ({"candidates": ["Yes"]}, "row 2: expected a list of 2 to 4 'candidates'"),
        ({"img_path": "../b.png"}, "row 2: '../b.png' is outside"),
        ({"img_path": "c.png"}, "row 2: the image"),
        ({"question": 3}, "row 2: expected texts as 'img_path' and 'question'"),
    ],
)
def test_a_bad_row_is_named(folder, change, message):
    rows = [row(*one) for one in ROWS]
    rows[1] |= change
    write(folder, rows)
    with pytest.raises(ValueError, match=message):
        load_questions(folder)


def test_the_command_prints_accuracies_by_type_and_concern(folder):
    command = ["evaluate-scores", "default", "--benchmark", "qbench", "--root", str(folder)]
    result = CliRunner().invoke(app, [*command, "--samples", "5"])
    assert result.exit_code == 0, result.output
    names = ("all questions", "yes-or-no", "how", "distortion", "in-context others")
    assert all(name in result.stdout for name in names)
    whole = json.loads(CliRunner().invoke(app, [*command, "--json", "--samples", "5"]).stdout)
    assert [one["correct_choice"] for one in whole["answers"]] == ["C", "B", "D"]
    assert whole["accuracy"]["type"]["what"]["questions"] == 1
    table = CliRunner().invoke(app, [*command, "--csv", "--samples", "5"]).stdout.splitlines()
    assert table[0].startswith("group,name,questions,accuracy") and len(table) == 1 + 1 + 3 + 3
    (folder / "images" / "b.png").write_bytes(b"broken")
    broken = CliRunner().invoke(app, [*command, "--samples", "5"])
    assert broken.exit_code == 1 and "2 questions" in broken.stdout
    assert "row 2" in broken.stderr and "b.png" in broken.stderr


def test_the_command_says_what_is_wrong_in_one_line(folder):
    command = ["evaluate-scores", "default", "--benchmark", "qbench", "--root", str(folder)]
    refused = CliRunner().invoke(app, [*command, "--levels", "a,b", "--plot", "x.png"])
    assert refused.exit_code == 2 and "leave out --levels, --plot" in refused.stderr
    missing = CliRunner().invoke(app, [*command, "--split", "test"])
    assert missing.exit_code == 1 and "llvisionqa_test.json" in missing.stderr
    assert len(missing.stderr.strip().splitlines()) == 1


def test_lmms_eval_asks_and_counts_its_own_task(default):
    """The task's own functions, on a document of its layout."""
    pytest.importorskip("lmms_eval", reason="lmms-eval is not installed")
    from types import SimpleNamespace

    from lmms_eval.tasks.qbench import utils

    from owl2_hf.integrations import lmms_eval as lmms

    doc = {
        "id": 7,
        "image": Image.new("RGBA", (30, 20), "red"),
        "question": "How is it?",
        **dict(zip([f"option{n}" for n in range(4)], ["Low", "High", "N/A", "N/A"], strict=True)),
        "question_type": 2,
        "question_concern": 3,
        "correct_choice": "B",
    }
    asked = {"pre_prompt": "", "post_prompt": "Answer with the option's letter.\n"}
    text = utils.q_bench_doc_to_text(doc, asked)
    generation = {"max_new_tokens": 32, "temperature": 0, "do_sample": False, "until": ["\n\n"]}
    model = lmms.Owl2("default")
    model.task_dict = {"qbench_dev": {"dev": [doc]}}
    request = SimpleNamespace(
        args=(text, generation, utils.q_bench_doc_to_visual, 0, "qbench_dev", "dev")
    )
    prompt, images = model._prompt(request)
    assert prompt == (
        "USER: <|image|>How is it?\nA. Low\nB. High\nAnswer with the option's letter.\n ASSISTANT:"
    )
    assert [image.mode for image in images] == ["RGB"]
    (answer,) = model.generate_until([request])
    assert answer
    counted = utils.q_bench_process_results(doc, ["B"])["qbench_acc"]
    assert counted["parsed_pred"] == counted["answer"] == "B"
