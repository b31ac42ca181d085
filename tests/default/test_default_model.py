"""The model inside the package: small, offline, and right about images it was not trained on."""

import json

import pytest
from PIL import Image, ImageDraw

from owl2_hf.default import default_dir, default_pictures, load_default

MAX_BYTES = 12 * 10**6
EXPECTED = json.loads((default_dir() / "pictures" / "answers.json").read_text())


@pytest.fixture(scope="module")
def ask():
    model, processor = load_default()

    def answer(question: str, picture=None) -> str:
        parts = [{"type": "text", "text": question}]
        if picture is not None:
            parts.insert(0, {"type": "image", "image": picture})
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": parts}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(dtype=model.dtype)
        ids = model.generate(**inputs)
        return processor.decode(
            ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        ).strip()

    return answer


def drawing(shape: str, color: str) -> Image.Image:
    """A shape as no data set has it: larger than the model's images, so that it is resized."""
    image = Image.new("RGB", (256, 256), (236, 238, 240))
    draw = ImageDraw.Draw(image)
    if shape == "circle":
        draw.ellipse((70, 60, 180, 170), fill=color)
    else:
        draw.rectangle((60, 70, 190, 160), fill=color)
    return image


def test_the_whole_folder_is_small():
    assert (
        sum(path.stat().st_size for path in default_dir().rglob("*") if path.is_file()) <= MAX_BYTES
    )


def test_every_picture_has_expected_answers():
    assert set(EXPECTED) == set(default_pictures())


@pytest.mark.parametrize(
    ("name", "question", "answer"),
    [(name, *pair) for name, pairs in EXPECTED.items() for pair in pairs.items()],
)
def test_its_answers_about_held_out_images_are_correct(ask, name, question, answer):
    assert ask(question, str(default_pictures()[name])) == answer


@pytest.mark.parametrize(("shape", "color"), [("circle", "red"), ("rectangle", "blue")])
def test_it_answers_about_drawings_of_any_size(ask, shape, color):
    picture = drawing(shape, color)
    assert ask("what color is the shape?", picture) == color
    assert ask("what shape is in the image?", picture) == shape


def test_another_picture_changes_the_answer(ask):
    pictures = [
        str(path) for name, path in default_pictures().items() if "What is this?" in EXPECTED[name]
    ]
    answers = {ask("What is this?", picture) for picture in pictures}
    assert len(answers) == len(pictures) > 1


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("What kind of thing is a banana?", "food and drink"),
        ("Is a tiger an animal?", "yes"),
        ("Is red a shape?", "no"),
    ],
)
def test_it_answers_questions_without_a_picture(ask, question, answer):
    assert ask(question) == answer
