"""Compressed folders load to what was saved, lose little, and may be published.

The tests of llmcompressor need an environment with the transformers release that it supports.
"""

import json
import re
import subprocess
import sys
from importlib import util
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from typer.testing import CliRunner

import owl2_hf
from owl2_hf.cli import app
from owl2_hf.compression import rounding
from owl2_hf.compression.losses import Findings, Losses
from owl2_hf.default import default_dir
from owl2_hf.default_scorer import default_scorer_dir, default_scorer_images
from owl2_hf.scoring import Scorer

TOOLS = {
    tool: pytest.mark.skipif(util.find_spec(tool) is None, reason=f"needs {tool}")
    for tool in ("torchao", "llmcompressor")
}
BY = [pytest.param(tool, marks=mark) for tool, mark in TOOLS.items()]
DOCS = Path(__file__).parents[2] / "docs"
IMAGES = [str(path) for path in default_scorer_images().values()]
# A scorer's largest change of a score, on two images: measured 0.0124 (int8 by llmcompressor).
LARGEST = 0.05


def run(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def quantize(*arguments):
    result = run("quantize", *arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout.splitlines()[-1])


def scores(folder):
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    return [one.score for one in Scorer(model, processor)(IMAGES)]


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("to", ["int8", "int4", "fp8"])
def test_a_scorer_is_rounded_saved_loaded_and_may_be_pushed(to, by, tmp_path):
    folder = tmp_path / f"scorer-{to}"
    report = quantize("default-scorer", folder, "--to", to, "--by", by)
    assert report["matrices"] == 27 and report["group_size"] == (16 if to == "int4" else None)
    assert report["num_bytes"] == (folder / "model.safetensors").stat().st_size
    assert report["num_bytes"] < 0.9 * report["bytes_before"]
    losses = report["losses"]
    assert 0 < losses["mean change of a score"] <= losses["largest change of a score"] < LARGEST
    whole, after = scores(default_scorer_dir()), scores(folder)
    changes = [abs(one - other) for one, other in zip(whole, after, strict=True)]
    assert max(changes) == pytest.approx(losses["largest change of a score"], abs=1e-6)
    result = run("push", folder, f"me/scorer-{to}", "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    names = {name for name, _ in json.loads(result.stdout)["files"]}
    assert {"scorer.json", "decision.json", "NOTICE", "README.md"} <= names
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "apache-2.0" and {to, by} <= set(card.data.tags)
    assert f"by {losses['largest change of a score']:.4f} at most" in card.text
    settings = json.loads((folder / "config.json").read_text())
    assert settings["dtype"] == "bfloat16" and settings["quantization_config"]


@pytest.mark.parametrize("by", BY)
def test_llmcompressor_alone_packs_int4_into_half(by, tmp_path):
    sizes = {
        to: quantize("default-scorer", tmp_path / to, "--to", to, "--by", by)["num_bytes"]
        for to in ("int8", "int4")
    }
    assert (sizes["int4"] < sizes["int8"]) == (by == "llmcompressor")


@pytest.mark.parametrize("by", BY)
def test_the_decoder_alone_is_rounded(by, tmp_path):
    quantize("default", tmp_path / "int8", "--by", by)
    whole = owl2_hf.load_default(dtype=torch.bfloat16)[0]
    saved = AutoModelForImageTextToText.from_pretrained(tmp_path / "int8").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "int8")
    rounding._logits(saved, processor, IMAGES[0])  # compressed-tensors unpacks at the first run
    layers = dict(saved.named_modules())
    for name, linear in whole.named_modules():
        if not isinstance(linear, nn.Linear):
            continue
        weight = layers[name].weight
        weight = weight.dequantize() if hasattr(weight, "dequantize") else weight
        is_same = torch.equal(weight.to(torch.bfloat16), linear.weight)
        assert is_same != name.startswith("model.language_model.layers."), name


@TOOLS["torchao"]
def test_a_chat_model_tells_how_many_answers_stay(tmp_path):
    image = str(next(iter(owl2_hf.default_pictures().values())))
    asked = ["--image", image, "--question", "What is this?", "-q", "Is it an animal?"]
    report = quantize("default", tmp_path / "int8", *asked)
    assert report["losses"] == {"answers": 2, "same answers": 2}
    card = (tmp_path / "int8" / "README.md").read_text()
    assert "1 images, 2 questions about each" in card and "2 of 2 greedy answers" in card


@TOOLS["torchao"]
def test_opinions_tell_what_a_scorer_loses(tmp_path):
    pytest.importorskip("scipy")
    rows = [f"{name}.png,{mos}" for name, mos in (("a", 1), ("b", 3), ("c", 5))]
    (tmp_path / "opinions.csv").write_text("\n".join(["image,mos", *rows]))
    sharp = Image.open(IMAGES[0]).convert("RGB")
    for name, share in (("a", 4), ("b", 2), ("c", 1)):
        small = sharp.resize((sharp.width // share, sharp.height // share))
        small.resize(sharp.size).save(tmp_path / f"{name}.png")
    data = ["--data", tmp_path / "opinions.csv"]
    losses = quantize("default-scorer", tmp_path / "fp8", "--to", "fp8", *data)["losses"]
    assert losses["images"] == 3 and set(losses["SRCC"]) == {"before", "after"}
    assert losses["PLCC"]["before"] != losses["PLCC"]["after"]
    card = (tmp_path / "fp8" / "README.md").read_text()
    row = f"| PLCC | {losses['PLCC']['before']:.4f} | {losses['PLCC']['after']:.4f} |"
    assert row in card and "3 images of opinions.csv, compared with" in card
    (tmp_path / "b.png").write_text("broken")
    result = run("quantize", "default-scorer", tmp_path / "again", *data)
    assert result.exit_code == 1 and "row 3" in result.stderr
    assert not (tmp_path / "again").exists()


def test_answers_and_scores_that_changed_are_counted():
    answers = Losses("", Findings(["a", "b", "c"]), Findings(["a", "x", "c"]), False)
    assert answers.to_dict() == {"answers": 3, "same answers": 2}
    found = Losses("", Findings([1.0, 3.0]), Findings([1.5, 2.0]), True).to_dict()
    assert found["mean change of a score"] == 0.75 and found["largest change of a score"] == 1


MISTAKES = {
    "a size that does not divide": (
        ["--to", "int4", "--group-size", "64"],
        "widths 160, 432, got 64",
    ),
    "a size that cannot be packed": (
        ["--to", "int4", "--group-size", "12"],
        "multiple of 8, got 12",
    ),
    "a size for int8": (["--group-size", "16"], "only int4 has a group size, got int8"),
    "no such data": (["--data", "nowhere.csv"], "nowhere.csv"),
    "no such image": (["--image", "nowhere.png"], "nowhere.png"),
}


@TOOLS["torchao"]
@pytest.mark.parametrize(("options", "words"), MISTAKES.values(), ids=list(MISTAKES))
def test_a_mistake_is_told_in_one_line(options, words, tmp_path):
    result = run("quantize", "default-scorer", tmp_path / "out", *options)
    assert result.exit_code == 1 and words in result.stderr, result.stderr
    assert "Traceback" not in result.output and not (tmp_path / "out").exists()


@TOOLS["torchao"]
def test_models_that_cannot_be_quantised_are_refused(tmp_path):
    target = tmp_path / "out"
    quantize("default-scorer", tmp_path / "int8")
    result = run("quantize", tmp_path / "int8", target)
    assert result.exit_code == 1 and "quantised already" in result.stderr
    result = run("quantize", "default", target, "--data", _opinions(tmp_path))
    assert result.exit_code == 1 and "opinions need a scorer" in result.stderr
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    result = run("quantize", "default", tmp_path / "full")
    assert result.exit_code == 1 and "is not empty" in result.stderr
    classifier = tmp_path / "classifier"
    classes = owl2_hf.MplugOwl2ForSequenceClassification.from_pretrained(default_dir())
    classes.save_pretrained(classifier)
    AutoProcessor.from_pretrained(default_dir()).save_pretrained(classifier)
    result = run("quantize", classifier, target)
    assert (
        result.exit_code == 1
        and "it is the head of MplugOwl2ForSequenceClassification" in result.stderr
    )
    assert not target.exists()


def _opinions(folder: Path) -> Path:
    Image.new("RGB", (9, 9)).save(folder / "one.png")
    (folder / "opinions.csv").write_text("image,mos\none.png,1\none.png,2\n")
    return folder / "opinions.csv"


def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "llmcompressor", None)
    result = run("quantize", "default", tmp_path / "out", "--by", "llmcompressor")
    assert result.exit_code == 1 and "in an environment of its own" in result.stderr


@TOOLS["torchao"]
def test_a_folder_that_computes_something_else_is_not_kept(tmp_path, monkeypatch):
    real = rounding._save

    def damaged(model, *arguments):
        with torch.no_grad():
            model.model.language_model.norm.weight.mul_(1.5)
        real(model, *arguments)

    monkeypatch.setattr(rounding, "_save", damaged)
    result = run("quantize", "default", tmp_path / "out")
    assert result.exit_code == 1 and "other results than before saving" in result.stderr
    assert not (tmp_path / "out").exists()


def test_compressed_tensors_adds_no_step_before_embedding_tables():
    """The reader of compressed-tensors would add one there, and it loses tensors without a
    scale.
    """
    for kind in ("mplug_owl2", "mplug_docowl", "mplug_owl2_1"):
        sources = [
            source
            for one in get_checkpoint_conversion_mapping(kind)
            if any(
                type(step).__name__ == "PadVocabulary" for step in getattr(one, "operations", ())
            )
            for source in one.source_patterns
        ]
        assert sources and not any(source.rpartition(".")[2] == "weight" for source in sources)


@TOOLS["torchao"]
def test_the_folder_scores_without_this_package(tmp_path):
    folder = tmp_path / "int8"
    report = quantize("default-scorer", folder)
    assert report["to"] == "int8"
    (block,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    Image.open(IMAGES[0]).convert("RGB").save(tmp_path / "photo.png")
    code = block.replace("photo.jpg", "photo.png")
    guard = "import sys; sys.modules['owl2_hf'] = None\n"
    done = subprocess.run(
        [sys.executable, "-c", guard + code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == pytest.approx(scores(folder)[:1], abs=1e-5)


@TOOLS["torchao"]
def test_the_page_runs_as_shown(tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    monkeypatch.chdir(tmp_path)
    Image.open(IMAGES[0]).convert("RGB").save("photo.jpg")
    page = (DOCS / "compressed.md").read_text(encoding="utf-8")
    names: dict = {}
    for kind, block in re.findall(r"```(console|python)\n(.*?)```", page, re.DOTALL):
        if kind == "python":
            exec(compile(block, "compressed.md", "exec"), names)
            continue
        for command in re.findall(r"^\$ owl2-hf (.*)", block, re.MULTILINE):
            result = run(*command.split())
            assert result.exit_code == 0, result.output
    assert names["report"].group_size == 16
    assert names["scores"] == pytest.approx(scores(default_scorer_dir())[:1], abs=0.2)  # a JPEG
    (shown,) = re.findall(r"^scorer-int8: (.*)", page, re.MULTILINE)
    text = Path("scorer-int8/README.md").read_text(encoding="utf-8")
    assert shown in text  # the sizes of the page are the folder's
