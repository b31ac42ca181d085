"""The exported vision side computes what torch computes, for any number of images."""

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModel
from typer.testing import CliRunner

import owl2_hf
from owl2_hf import export
from owl2_hf.cli import app

from .conversion.test_direct_loading import docowl, owl21

onnxruntime = pytest.importorskip(
    "onnxruntime", reason="needs onnxruntime: pip install 'owl2_hf[export]'"
)
pytest.importorskip("onnxscript", reason="needs onnxscript: pip install 'owl2_hf[export]'")
DOCS = Path(__file__).parents[1] / "docs"
LARGEST = 1e-4  # difference to torch; values are below 10


def run(*arguments):
    return CliRunner().invoke(app, ["export", *map(str, arguments)])


@pytest.mark.parametrize("kind", ["default", "docowl", "owl21"])
def test_the_file_computes_what_torch_computes(kind, tmp_path):
    source = {"default": lambda folder: "default", "docowl": docowl, "owl21": owl21}[kind](tmp_path)
    result = run(source, tmp_path / "vision.onnx", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout.splitlines()[-1])["difference"] < LARGEST
    folder = owl2_hf.default.default_dir() if kind == "default" else source
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    session = onnxruntime.InferenceSession(tmp_path / "vision.onnx")
    side = model.config.vision_config.image_size
    for num_images in (1, 2, 5):
        images = torch.randn(num_images, 3, side, side)
        with torch.no_grad():
            expected = torch.stack(model.get_image_features(images).pooler_output)
        (found,) = session.run(None, {"pixel_values": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0, atol=LARGEST)


def test_a_file_that_is_there_is_kept(tmp_path):
    (tmp_path / "vision.onnx").write_text("mine")
    result = run("default", tmp_path / "vision.onnx")
    assert result.exit_code == 1 and "exists: remove it, or choose another name." in result.stderr
    assert (tmp_path / "vision.onnx").read_text() == "mine"


def test_a_file_that_computes_something_else_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "TOLERANCE", 1e-12)
    result = run("default", tmp_path / "vision.onnx")
    assert result.exit_code == 1 and re.search(
        r"vision\.onnx differs from torch by \S+: do not use it", result.stderr
    )


def test_the_page_runs_as_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for part in owl2_hf.load_default():
        part.save_pretrained("path/to/owl2")
    for name in ("photo", "other"):
        Image.new("RGB", (9, 7), "red").save(f"{name}.jpg")
    page = (DOCS / "export.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"\$ owl2-hf export (.*)", page)
    assert run(*command.split()).exit_code == 0
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(compile(block, "export.md", "exec"), {})
    assert capsys.readouterr().out.strip().endswith("(2, 9, 160)")
