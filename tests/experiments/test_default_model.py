"""The training of the embedded default model, a few steps of it, on pictures made up here."""

import argparse
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.trainer_callback import TrainerCallback

from experiments.default_model import train
from experiments.default_model.data import Emoji

PAIRS = [
    [
        ("what shape is in the image?", "circle"),
        ("what is the color of the circle?", "red"),
        ("is it red?", "yes"),
    ],
    [("what color is the shape?", "blue"), ("is it red?", "no")],
]
LETTERS = "abcdefghijklmnop"


@pytest.fixture
def data(monkeypatch):
    names = [f"{first}{second} thing" for first in LETTERS for second in LETTERS]
    emoji = [
        Emoji(name, "animals and nature", "animal-mammal", "", True, i % 20 == 7)
        for i, name in enumerate(names)
    ]
    generator = torch.Generator().manual_seed(0)

    def random_pixels(*shape: int) -> torch.Tensor:
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)

    styles = {style: random_pixels(len(emoji), 4, 64, 64) for style in {*train.STYLES, "twitter"}}
    shapes = random_pixels(len(PAIRS), 3, 64, 64)
    monkeypatch.setattr(train, "load_emoji", lambda: emoji)
    monkeypatch.setattr(
        train, "load_style", lambda style: (styles[style], torch.ones(len(emoji), dtype=torch.bool))
    )
    monkeypatch.setattr(train, "load_easy_vqa", lambda part: (shapes, PAIRS))


def arguments(folder, steps: int) -> argparse.Namespace:
    values = {
        "vision_steps": 2,
        "decay_steps": 650,
        "lr": 1e-3,
        "vocab_size": 420,
        "save_every": 1,
        "log_every": 1,
    }
    return argparse.Namespace(out=folder, steps=steps, seed=3, threads=1, **values)


class Interrupt(TrainerCallback):
    """Ends a run after a step, as a signal would but for the checkpoint."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def test_an_interrupted_run_ends_as_a_whole_one_does(data, tmp_path):
    train.run(arguments(tmp_path / "whole", 4))
    begun = train.build_trainer(arguments(tmp_path / "parts", 4))
    begun.add_callback(Interrupt(3))
    begun.train()
    assert begun.state.global_step == 3
    train.run(arguments(tmp_path / "parts", 4))
    first, second = (
        load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "parts")
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_saved_model_loads_with_the_auto_classes(data, tmp_path):
    trainer = train.run(arguments(tmp_path, 3))
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    assert not any("classifier" in name for name in model.state_dict())
    assert model.config.image_token_id == processor.image_token_id
    trained = trainer.model.state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, trained[name].bfloat16().to(weight.dtype)), name
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "bfloat16"


def test_first_the_vision_encoder_learns_alone(data, tmp_path):
    trainer = train.build_trainer(arguments(tmp_path, 4))
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.add_callback(Interrupt(2))
    trainer.train()
    changed = {
        name
        for name, value in trainer.model.state_dict().items()
        if not torch.equal(value, before[name])
    }
    assert changed
    assert all(name.startswith(("model.vision_tower.", "classifier.encoded.")) for name in changed)
