"""A folder that may be published, a stand-in for the Hub, and how to push one to the other."""

import json

import numpy as np
import pytest
from huggingface_hub import constants
from PIL import Image
from safetensors.numpy import save_file

from owl2_hf.hub import push

from ..stand_in_hub import TOKEN, StandInHub

CARD = """---
library_name: transformers
pipeline_tag: image-text-to-text
license: apache-2.0
tags: [mplug-owl2]
---

# A model

![an image](pictures/one.png)
"""


@pytest.fixture
def hub(monkeypatch):
    """A stand-in that huggingface_hub in this process takes for the Hub."""
    with StandInHub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield server


@pytest.fixture
def folder(tmp_path):
    """The smallest folder that may go; its weights mean nothing."""
    folder = tmp_path / "model"
    (folder / "pictures").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "mplug_owl2", "text_config": {}}))
    (folder / "README.md").write_text(CARD)
    Image.new("RGB", (2, 2)).save(folder / "pictures" / "one.png")
    save_file({"a": np.zeros(3, dtype=np.float32)}, folder / "model.safetensors")
    return folder


def send(folder, repo_id="tester/owl", **kwargs):
    return push(folder, repo_id, token=TOKEN, **kwargs)


def make_shards(folder):
    (folder / "model.safetensors").unlink(missing_ok=True)
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for name in names:
        save_file({name: np.zeros(3, dtype=np.float32)}, folder / name)
    index = {"metadata": {}, "weight_map": {name: name for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return names


def refused(folder, match):
    with pytest.raises(ValueError, match=match) as caught:
        push(folder, "tester/owl", dry_run=True)
    return str(caught.value)
