"""The exported vision side computes what torch computes, for any number of images."""

import dataclasses
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


def test_existing_files_are_not_overwritten(tmp_path):
    (tmp_path / "vision.onnx").write_text("mine")
    result = run("default", tmp_path / "vision.onnx")
    assert (
        result.exit_code == 1
        and "already exists: choose another name, or remove it." in result.stderr
    )
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


def test_a_scorers_file_gives_the_scorers_scores_for_any_number_of_images(tmp_path):
    file = tmp_path / "scorer.onnx"
    result = run("default-scorer", file, "--scorer", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["difference"] < 1e-5  # stdout is JSON alone
    assert [path.name for path in tmp_path.iterdir()] == ["scorer.onnx"]
    scorer = owl2_hf.load_default_scorer()
    scorer.model.float()
    session = onnxruntime.InferenceSession(file)
    assert [one.name for one in session.get_inputs()] == ["pixel_values"]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (5, 70, 90, 3), generator=generator, dtype=torch.uint8)
    images = [Image.fromarray(one.numpy()) for one in noise]
    images[3:] = [Image.open(path) for path in owl2_hf.default_scorer_images().values()]
    for count in (1, 2, 5):
        expected = scorer(images[:count])
        pixels = scorer.prepare(images[:count])["pixel_values"].float().numpy()
        scores, levels = session.run(["scores", "level_logits"], {"pixel_values": pixels})
        assert scores.tolist() == pytest.approx([one.score for one in expected], abs=1e-5)
        for own, one in zip(levels, expected, strict=True):
            assert own.tolist() == pytest.approx(list(one.logits), abs=1e-4)


def test_a_scorers_file_asks_as_it_is_told(tmp_path):
    preset = owl2_hf.scoring.presets.load_preset(str(owl2_hf.default_scorer.default_scorer_dir()))
    model, processor = owl2_hf.load_default_scorer().model, owl2_hf.load_default_scorer().processor
    prompts = {"quality": preset.prompts["quality"], "other": "<|image|> good or bad:"}
    for part in (model, processor):
        part.save_pretrained(tmp_path / "scorer")
    changed = dataclasses.replace(preset, prompts=prompts, scale=(0.0, 100.0))
    (tmp_path / "scorer" / "scorer.json").write_text(changed.to_json())
    result = run(tmp_path / "scorer", tmp_path / "a.onnx", "--scorer", "--task", "other", "--json")
    assert result.exit_code == 0, result.output
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx")
    image = next(iter(owl2_hf.default_scorer_images().values()))
    scorer = owl2_hf.scoring.Scorer(model.float(), processor, changed)
    pixels = scorer.prepare([str(image)])["pixel_values"].float().numpy()
    (found,) = session.run(["scores"], {"pixel_values": pixels})
    assert found.tolist() == pytest.approx([scorer(str(image), "other")[0].score], abs=1e-3)
    assert abs(found[0] - scorer(str(image))[0].score) > 1  # the task counts


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        ("default", ["--scorer"], "it has no scorer.json: choose a preset with --preset"),
        ("default-scorer", ["--scorer", "--task", "beauty"], "expected a task of quality"),
        ("default-scorer", ["--scorer", "--task", "video"], "whose prompt has one image"),
    ],
)
def test_models_that_cannot_be_exported_as_a_scorer_are_named(model, options, words, tmp_path):
    result = run(model, tmp_path / "scorer.onnx", *options)
    assert result.exit_code == 1 and words in result.stderr, result.output
    assert not list(tmp_path.iterdir())


def test_options_of_scores_are_refused_without_a_scorer(tmp_path):
    result = run("default", tmp_path / "vision.onnx", "--task", "other")
    assert result.exit_code == 2 and "--task and --preset need --scorer" in result.stderr


def test_a_scorers_file_that_computes_something_else_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "TOLERANCE", 1e-12)
    result = run("default-scorer", tmp_path / "scorer.onnx", "--scorer")
    assert result.exit_code == 1 and "differs from torch by" in result.stderr
