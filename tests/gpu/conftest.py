"""Rows, inputs and settings of the tests that run on a GPU and, with the same code, on a CPU."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import owl2_hf


@pytest.fixture(autouse=True)
def full_float32(device: str) -> Iterator[None]:
    """No TF32, which rounds the inputs of float32 products to 10 bits."""
    settings = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [one.allow_tf32 for one in settings]
    for one in settings:
        one.allow_tf32 = False
    yield
    for one, value in zip(settings, before, strict=True):
        one.allow_tf32 = value


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A file of rows: with an image, without one, and with two."""
    lines = []
    for index, (name, path) in enumerate(owl2_hf.default_pictures().items()):
        shutil.copy(path, tmp_path / f"{index}.png")
        images = [[f"{index}.png"], [], [f"{index}.png", "0.png"]][index % 3]
        parts = [{"type": "image"} for _ in images] + [{"type": "text", "text": "What is it?"}]
        answer = [{"type": "text", "text": name}]
        messages = [
            {"role": "user", "content": parts},
            {"role": "assistant", "content": answer},
        ]
        lines.append(json.dumps({"id": name, "messages": messages, "images": images}) + "\n")
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    return tmp_path / "rows.jsonl"


@pytest.fixture
def settings(rows: Path, tmp_path: Path, device: str) -> Callable[..., list[str]]:
    """Settings of a short run of a recipe on the device."""

    def make(**trainer: object) -> list[str]:
        values = {
            "max_steps": 3,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 1,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
            "logging_steps": 1,
            "save_strategy": "no",
            "dataloader_num_workers": 0,
            "disable_tqdm": True,
            "use_cpu": device == "cpu",
            **trainer,
        }
        return [
            "model=default",
            f"data.train={rows}",
            "data.max_length=128",
            f"output_dir={tmp_path / 'run'}",
            *(f"trainer.{name}={json.dumps(value)}" for name, value in values.items()),
        ]

    return make
