"""`pipeline("image-text-to-text")` and Auto classes, with the package installed and without remote
code.
"""

import base64
import copy
import json

import pytest
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForPreTraining,
    AutoProcessor,
    AutoTokenizer,
    pipeline,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor

import owl2_hf
from owl2_hf.default import default_dir
from owl2_hf.processing.processing_mplug_owl2 import Decoded

QUESTION = {"type": "text", "text": "What is this?"}


@pytest.fixture(scope="module")
def pipe():
    return pipeline("image-text-to-text", model=str(default_dir()))


@pytest.fixture(scope="module")
def pictures():
    return list(owl2_hf.default_pictures().values())


def ask(pipe, part, **kwargs):
    messages = [{"role": "user", "content": [part, QUESTION]}]
    return pipe(text=messages, return_full_text=False, **kwargs)[0]["generated_text"]


def test_auto_classes_know_the_model():
    folder = default_dir()
    assert type(AutoConfig.from_pretrained(folder)) is owl2_hf.MplugOwl2Config
    assert type(AutoModel.from_pretrained(folder)) is owl2_hf.MplugOwl2Model
    for auto_class in (
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForMultimodalLM,
        AutoModelForPreTraining,
    ):
        assert type(auto_class.from_pretrained(folder)) is owl2_hf.MplugOwl2ForConditionalGeneration
    assert type(AutoProcessor.from_pretrained(folder)) is owl2_hf.MplugOwl2Processor
    assert type(AutoImageProcessor.from_pretrained(folder)) is owl2_hf.MplugOwl2ImageProcessor
    assert AutoTokenizer.from_pretrained(folder)("USER: hi").input_ids[0] == 1


def test_every_form_of_a_picture_gets_the_same_answer(pipe, pictures):
    path = pictures[0]
    encoded = base64.b64encode(path.read_bytes()).decode()
    answers = {
        ask(pipe, part)
        for part in (
            {"type": "image", "image": Image.open(path)},
            {"type": "image", "path": str(path)},
            {"type": "image", "url": str(path)},
            {"type": "image", "base64": encoded},
            {"type": "image", "url": f"data:image/png;base64,{encoded}"},
            {"type": "image_url", "image_url": {"url": str(path)}},
        )
    }
    assert len(answers) == 1
    raw = pipe(
        images=Image.open(path),
        text="USER: <|image|>What is this? ASSISTANT:",
        return_full_text=False,
    )
    assert {raw[0]["generated_text"]} == answers


def test_text_without_pictures(pipe):
    output = pipe(
        text=[{"role": "user", "content": [{"type": "text", "text": "Hello!"}]}],
        return_full_text=False,
    )
    assert output[0]["generated_text"].strip()


def test_a_batch_answers_as_one_by_one(pipe, pictures):
    chats = [
        [{"role": "user", "content": [{"type": "image", "path": str(path)}, QUESTION]}]
        for path in pictures
    ]
    together = pipe(text=chats, batch_size=3, return_full_text=False)
    alone = [pipe(text=chat, return_full_text=False) for chat in chats]
    assert [answer[0]["generated_text"] for answer in together] == [
        answer[0]["generated_text"] for answer in alone
    ]


def test_answers_begin_without_a_space(pipe, pictures):
    part = {"type": "image", "path": str(pictures[0])}
    chat = [{"role": "user", "content": [part, QUESTION]}]
    answer = ask(pipe, part)
    assert answer == "banana"
    whole = pipe(text=chat)[0]["generated_text"]
    assert whole == [*chat, {"role": "assistant", "content": "banana"}]
    assert (
        copy.deepcopy(whole) == whole
        and type(copy.deepcopy(answer)) is str
        and json.dumps(answer) == '"banana"'
    )
    second = [*whole, {"role": "user", "content": [QUESTION]}]
    rendered = pipe.processor.apply_chat_template(second)
    assert "ASSISTANT: banana" in rendered
    together = pipe(text=[chat, second], batch_size=2, return_full_text=False)
    assert (
        together[0][0]["generated_text"] == "banana" and together[1][0]["generated_text"][0] != " "
    )


def test_raw_prompts_and_prefills_keep_their_spaces(pipe, pictures):
    prompt, image = "USER: <|image|>What is this? ASSISTANT:", Image.open(pictures[0])
    assert pipe(images=image, text=prompt)[0]["generated_text"] == f"{prompt} banana"
    assert pipe(images=image, text=prompt, return_full_text=False)[0]["generated_text"] == "banana"
    chat = [
        {"role": "user", "content": [{"type": "image", "image": image}, QUESTION]},
        {"role": "assistant", "content": [{"type": "text", "text": "ba"}]},
    ]
    (prefilled,) = pipe.processor.tokenizer.batch_decode(
        pipe.model.generate(
            **pipe.processor.apply_chat_template(
                chat,
                continue_final_message=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
        ),
        skip_special_tokens=True,
    )
    ending = prefilled.partition("ASSISTANT: ")[2]
    assert pipe(text=chat)[0]["generated_text"][-1]["content"][-1]["text"] == ending


def test_an_answer_sliced_from_its_prompt_has_no_leading_space():
    text = Decoded("USER: a ASSISTANT: b c")
    answer = text[len("USER: a ASSISTANT:") :]
    assert answer == "b c" and "USER: a ASSISTANT:" + answer == text and "> " + answer == "> b c"
    assert text[len("USER: a ASSISTANT: b") :] == " c" and text[3] == "R" and text[:5] == "USER:"


def test_a_broken_picture_is_named(pipe, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"broken\.png"):
        ask(pipe, {"type": "image", "path": str(tmp_path / "broken.png")})
