"""The original's evaluation prompts, and the model as lmms-eval sees it."""

from importlib.metadata import entry_points
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import owl2_hf
from owl2_hf.evaluation import EVALUATIONS
from owl2_hf.modeling.scoring_mplug_owl2 import own_preset


def test_prompts_are_the_originals():
    assert EVALUATIONS["vqa"].fill(question="What is it?") == (
        "USER: <|image|>What is it? Answer the question using a single word or phrase. ASSISTANT: "
    )
    assert EVALUATIONS["caption"].fill() == (
        "USER: <|image|>Provide a one-sentence caption for the provided image. ASSISTANT: "
    )
    assert EVALUATIONS["mme"].fill(question="Is it {red}? Please answer yes or no.") == (
        "USER: <|image|>Is it {red}?\nAnswer the question using a single word or phrase. ASSISTANT: "
    )
    assert (
        EVALUATIONS["mmbench"]
        .fill(hint="H", question="Q", options="A. x")
        .startswith("USER: <|image|>H\nQ\nA. x\nAns")
    )
    assert [name for name, one in EVALUATIONS.items() if one.ending == "ASSISTANT:"] == [
        "mmmu",
        "mmmu-open",
        "qbench",
    ]
    with pytest.raises(ValueError, match="the prompt needs 'question', got"):
        EVALUATIONS["vqa"].fill(text="?")


def test_mmmus_questions_say_where_their_pictures_stand():
    asked = {"question": "Is <image 2> like <image 1>?", "options": "A. {x}\nB. <image 7>"}
    choice = EVALUATIONS["mmmu"]
    assert choice.fill(**asked) == (
        "USER: Is <|image|> like <|image|>?\nA. {x}\nB. <|image|>\n"
        "Answer with the option\u2019s letter from the given choices directly. ASSISTANT:"
    )
    assert choice.picture_numbers(**asked) == [2, 1, 7]
    assert EVALUATIONS["mmmu-open"].fill(question="<image 1> How many?") == (
        "USER: <|image|> How many?\nAnswer the question using a single word or phrase. ASSISTANT:"
    )
    assert choice.generation_kwargs() == {
        "do_sample": False,
        "num_beams": 1,
        "max_new_tokens": 20,
        "min_new_tokens": 1,
    }
    assert "<image 1>" in EVALUATIONS["vqa"].fill(question="What does <image 1> mean?")
    assert EVALUATIONS["vqa"].picture_numbers(question="What does <image 1> mean?") == []


def test_settings_go_straight_into_generate():
    model, processor = owl2_hf.load_default()
    picture = str(next(iter(owl2_hf.default_pictures().values())))
    for name, evaluation in EVALUATIONS.items():
        question = "<image 1> What is this?" if name.startswith("mmmu") else "What is this?"
        prompt = evaluation.fill(question=question, hint="", options="")
        inputs = processor(text=prompt, images=picture, return_tensors="pt")
        settings = evaluation.generation_kwargs()
        output = model.generate(**inputs, **settings)
        new = output.shape[1] - inputs["input_ids"].shape[1]
        assert settings.get("min_new_tokens", 1) <= new <= settings["max_new_tokens"]


def test_the_entry_point_is_there():
    (found,) = [
        entry for entry in entry_points(group="lmms_eval.models") if entry.name == "owl2_hf"
    ]
    assert found.value == "owl2_hf.integrations.lmms_eval:manifest"


@pytest.fixture
def lmms():
    pytest.importorskip("lmms_eval", reason="lmms-eval is not installed")
    from owl2_hf.integrations import lmms_eval as lmms

    return lmms


def test_lmms_eval_gets_the_answers_of_the_pipeline(lmms):
    pictures = [Image.open(path) for path in list(owl2_hf.default_pictures().values())[:3]]
    docs = [{"image": picture} for picture in pictures]
    kwargs = {"until": ["\n"], "max_new_tokens": 6}
    requests = [
        SimpleNamespace(
            args=("What is this?", kwargs, lambda doc: [doc["image"]], index, "task", "test")
        )
        for index in range(3)
    ]
    model = lmms.Owl2("default", batch_size=2)
    model.task_dict = {"task": {"test": docs}}
    answers = model.generate_until(requests)
    loaded, processor = owl2_hf.load_default()
    for picture, answer in zip(pictures, answers, strict=True):
        inputs = processor(
            text="USER: <|image|>What is this? ASSISTANT:", images=picture, return_tensors="pt"
        )
        output = loaded.generate(**inputs, max_new_tokens=6, do_sample=False)[
            0, inputs["input_ids"].shape[1] :
        ]
        assert answer == processor.decode(output, skip_special_tokens=True).strip()
    scored = [
        SimpleNamespace(
            args=("What is this?", answers[0], lambda doc: [doc["image"]], 0, "task", "test")
        )
    ]
    ((log_probability, is_greedy),) = model.loglikelihood(scored)
    assert is_greedy and log_probability < 0


def test_lmms_eval_knows_the_models_of_the_package_and_names_what_is_missing(lmms):
    scorer = lmms.Owl2("default-scorer").model
    assert own_preset(scorer) is not None
    with pytest.raises(ValueError, match="model 'no such': the folder does not exist"):
        lmms.Owl2("no such")


def test_pictures_stand_where_the_question_marks_them(lmms):
    def place(question, *pictures):
        return lmms._place(question, list(pictures), "*")

    assert place("What is it?", "a", "b") == ("**What is it?", ["a", "b"])
    assert place("<image> or <image>?", "a", "b") == ("* or *?", ["a", "b"])
    assert place("<image 3>, <image 1>, <image 3>?", "a", "c") == ("*, *, *?", ["c", "a", "c"])
    assert place("What is <image>?", "a", "b") == ("**What is <image>?", ["a", "b"])
    assert place("What is <image>?") == ("What is <image>?", [])


def test_the_originals_ending_comes_with_its_settings(lmms):
    request = SimpleNamespace(
        args=("<image 1> What?", {}, lambda doc: [doc["image"]], 0, "task", "test")
    )
    for prompt, ending in ((None, "ASSISTANT:"), ("vqa", "ASSISTANT: "), ("mmmu", "ASSISTANT:")):
        model = lmms.Owl2("default", prompt=prompt)
        model.task_dict = {"task": {"test": [{"image": Image.new("RGB", (9, 9))}]}}
        text, pictures = model._prompt(request)
        assert text == f"USER: <|image|> What? {ending}" and len(pictures) == 1


def test_settings_of_a_task_win(lmms):
    until, merged = lmms._generation(
        {"until": "\n", "max_new_tokens": 3, "temperature": 0}, {"max_new_tokens": 60}
    )
    assert until == ["\n"] and merged == {"do_sample": False, "max_new_tokens": 3}
    assert lmms._cut(" banana\nUSER: ", ["\n"]) == "banana"
    with pytest.raises(ValueError, match="expected a prompt of vqa"):
        lmms.Owl2("default", prompt="none")
    assert torch.is_tensor(lmms.Owl2("default").model.lm_head.weight)
