"""Rows of training data, and images for them."""

import json

import pytest
from PIL import Image

from owl2_hf.training.messages import to_messages

RED, BLUE = Image.new("RGB", (5, 3), "red"), Image.new("RGB", (3, 5), "blue")


def llava(*values, **row):
    turns = [
        {"from": "gpt" if index % 2 else "human", "value": value}
        for index, value in enumerate(values)
    ]
    return {"conversations": turns, **row}


def chat(*contents, **row):
    turns = [
        {"role": "assistant" if i % 2 else "user", "content": content}
        for i, content in enumerate(contents)
    ]
    return {"messages": turns, **row}


def text(value):
    return {"type": "text", "text": value}


def image(value):
    return {"type": "image", "image": value}


def questions(row, **kwargs):
    return [
        message["content"] for message in to_messages(row, **kwargs) if message["role"] == "user"
    ]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "clip").mkdir()
    for name, picture in (
        ("a.png", RED),
        ("b.png", BLUE),
        ("clip/1.png", RED),
        ("clip/2.png", BLUE),
    ):
        picture.save(tmp_path / name)
    (tmp_path / "broken.png").write_bytes(b"no image")
    return tmp_path


ROWS = [llava(f"q{index}", "a", id=str(index)) for index in range(5)]


def write(path, rows):
    lines = path.suffix == ".jsonl"
    path.write_text("\n\n".join(map(json.dumps, rows)) if lines else json.dumps(rows, indent=1))
    return path
