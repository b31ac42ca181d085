"""What the documentation shows runs as it stands, with a small model at the place of the named
one.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers.modeling_outputs import BaseModelOutputWithPooling

import owl2_hf
from owl2_hf.processing import MplugOwl2ImageProcessor, MplugOwl2Processor
from owl2_hf.processing.tokenization_mplug_owl2 import llama_tokenizer, load_tokenizer
from owl2_hf.scoring import PRESETS, Scorer
from owl2_hf.scoring.comparison import COMPARE2SCORE

from .test_videos import make_video

DOCS = Path(__file__).parents[1] / "docs"
BLOCKS = re.findall(
    r"## (.*?)\n.*?```python\n(.*?)```", (DOCS / "coming-from.md").read_text(), re.DOTALL
)


def with_words(words):
    """The small tokenizer of the tests, where each of the words is one token."""
    tokenizer, _ = load_tokenizer(Path(__file__).parent / "golden" / "T" / "tiny.model")
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    vocab, merges = dict(model["vocab"]), []
    vocab.pop("<|image|>", None)
    for word in words:
        piece = "▁"
        for letter in word:
            merges.append((piece, letter))
            piece += letter
            for new in (letter, piece):
                vocab.setdefault(new, len(vocab))
    merges += [tuple(merge) for merge in model["merges"] if tuple(merge) not in merges]
    return llama_tokenizer(vocab, merges)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder where `path/to/...` and the images are."""
    folder = tmp_path_factory.mktemp("docs")
    words = {
        word
        for preset in (*PRESETS.values(), COMPARE2SCORE)
        for word in preset.levels
        if isinstance(word, str)
    }
    tokenizer = with_words(sorted(words))
    num_tokens = len(tokenizer) - 1
    config = owl2_hf.MplugOwl2Config(
        text_config={
            "vocab_size": -(-len(tokenizer) // 64) * 64,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 512,
        },
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
        },
        abstractor_config={
            "num_learnable_queries": 3,
            "hidden_size": 16,
            "intermediate_size": 20,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        },
        image_token_id=num_tokens,
        output_vocab_size=num_tokens,
    )
    torch.manual_seed(0)
    model = owl2_hf.MplugOwl2ForConditionalGeneration(config)
    image_processor = MplugOwl2ImageProcessor(size={"height": 28, "width": 28})
    processor = MplugOwl2Processor(image_processor, tokenizer, num_image_tokens=4)
    for name in ("one-align", "deqa", "owl2"):
        model.save_pretrained(folder / "path" / "to" / name)
        processor.save_pretrained(folder / "path" / "to" / name)
    for name, colour in (("photo", "red"), ("other", "green"), ("third", "blue")):
        Image.new("RGB", (40, 30), colour).save(folder / f"{name}.jpg")
    make_video(folder / "clip.mp4", 30, 10)
    return folder


# Pages whose examples need more than files around them -> the file of the tests that run them.
RUN_ELSEWHERE = {
    "adapters.md": "training/test_adapters.py",
    "analysis.md": "test_docs.py",
    "check.md": "checks/test_check.py",
    "classification.md": "training/test_trl.py",
    "coming-from.md": "test_docs.py",
    "compressed.md": "compression/test_quantize.py",
    "demo.md": "demo/test_page.py",
    "export.md": "test_export.py",
    "performance.md": "test_docs.py",
    "rewards.md": "serving/test_scores.py",
    "scale-out.md": "modeling/test_scale_out.py",
    "score-datasets.md": "scoring/test_dataset.py",
    "scoring.md": "test_docs.py",
    "serving.md": "serving/test_server.py",
    "training.md": "training/test_run.py",
}


def examples(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


PAGES = {page.name for page in DOCS.glob("*.md") if examples(page)}


def test_every_page_with_examples_is_run():
    assert set(RUN_ELSEWHERE) <= PAGES
    for name, file in RUN_ELSEWHERE.items():
        assert f'"{name}"' in (Path(__file__).parent / file).read_text(encoding="utf-8"), name


@pytest.mark.parametrize("name", sorted(PAGES - set(RUN_ELSEWHERE)))
def test_the_examples_of_a_page_run_one_after_the_other(place, monkeypatch, capsys, name):
    monkeypatch.chdir(place)
    (place / "images").mkdir(exist_ok=True)
    Image.new("RGB", (8, 6)).save(place / "images" / "a.png")
    turns = [{"from": "human", "value": "<image>What is it?"}, {"from": "gpt", "value": "red"}]
    (place / "train.json").write_text(json.dumps(2 * [{"image": "a.png", "conversations": turns}]))
    names: dict = {}
    for block in examples(DOCS / name):
        exec(compile(block, name, "exec"), names)
    assert capsys.readouterr().out.strip() or "loss" in names


def test_every_section_has_a_new_call():
    assert [name for name, _ in BLOCKS] == re.findall(
        r"^## (.*)", (DOCS / "coming-from.md").read_text(), re.MULTILINE
    )


@pytest.mark.parametrize(("name", "code"), BLOCKS, ids=[name for name, _ in BLOCKS])
def test_the_new_call_runs(place, monkeypatch, capsys, name, code):
    monkeypatch.chdir(place)
    exec(compile(code, f"coming-from.md, {name}", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_the_analysis_runs_as_shown(place, monkeypatch, capsys):
    import shlex

    from typer.testing import CliRunner

    from owl2_hf.cli import app

    monkeypatch.chdir(place)
    page = (DOCS / "analysis.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(compile(code, "analysis.md", "exec"), {})
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "given",
        "unrelated",
        "none",
    ]
    (command,) = re.findall(r"\$ owl2-hf (analyze .*)", page)
    result = CliRunner().invoke(
        app,
        [
            *shlex.split(command),
            *["--model", "path/to/owl2", "--without", "path/to/owl2", "--max-new-tokens", "4"],
        ],
    )
    assert result.exit_code == 0, result.output
    written = {path.name for path in (place / "analysis").iterdir()}
    assert set(re.findall(r"`([\w]+\.(?:png|json))`", page)) <= written


def test_the_page_on_scoring_runs_from_an_image_to_a_model_card(
    place, tmp_path, monkeypatch, capsys
):
    pytest.importorskip("scipy", reason="scipy is not installed")
    import shlex

    from huggingface_hub import ModelCard
    from typer.testing import CliRunner

    from owl2_hf.cli import app

    for path in place.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "FOLDER_OF_IMAGES").mkdir()
    Image.new("RGB", (8, 6)).save(tmp_path / "FOLDER_OF_IMAGES" / "a.png")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    page = (DOCS / "scoring.md").read_text(encoding="utf-8")
    ran = []
    for kind, block in re.findall(r"```(python|yaml|console)\n(.*?)```", page, re.DOTALL):
        if kind == "python":
            exec(compile(block, "scoring.md", "exec"), names)
        elif kind == "yaml":
            Path("mine.yaml").write_text(block, encoding="utf-8")
        else:
            (command,) = re.findall(r"\$ owl2-hf (.*)", block)
            result = CliRunner().invoke(app, shlex.split(command))
            assert result.exit_code == 0, result.output
            ran.append(command.split()[0])
    assert [name for name in ran if name != "score"] == ["data", "train", "evaluate-scores"]
    assert names["report"][""].statistics["srcc"].value > 0.8
    assert names["after"] > names["before"] + 0.1
    card = ModelCard.load("runs/scorer/README.md")
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert found["srcc"] == pytest.approx(names["report"][""].statistics["srcc"].value, abs=1e-6)
    assert "| SRCC | " in card.text and "ASSISTANT: The quality of the image is" in card.text
    assert Path("agreement.png").is_file() and Path("again.png").is_file()
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    monkeypatch.chdir("runs")
    Image.new("RGB", (8, 6)).save("photo.jpg")
    capsys.readouterr()
    exec(compile(code, "README.md", "exec"), {})
    (score,) = json.loads(capsys.readouterr().out)
    assert 1 <= score <= 5


def test_the_presets_run_through_the_command(place, monkeypatch):
    from typer.testing import CliRunner

    from owl2_hf.cli import app

    monkeypatch.chdir(place)
    result = CliRunner().invoke(
        app, ["score", "photo.jpg", "other.jpg", "--model", "path/to/one-align", "--csv"]
    )
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[0] == "image,score,std,excellent,good,fair,poor,bad"


def test_scores_of_batches_are_those_of_single_pictures_with_every_preset(place):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(place / "path/to/one-align").eval()
    processor = AutoProcessor.from_pretrained(place / "path/to/one-align")
    pictures = [str(place / f"{name}.jpg") for name in ("photo", "other", "third")]
    for name in ("one-align", "deqa", "q-instruct"):
        together = Scorer(model, processor, name)(pictures)
        alone = [Scorer(model, processor, name)(picture)[0] for picture in pictures]
        assert [one.score for one in together] == pytest.approx(
            [one.score for one in alone], abs=1e-5
        )


def test_the_examples_of_the_page_on_performance_run():
    pytest.importorskip("torchao")
    names: dict = {}
    for block in re.findall(
        r"```python\n(.*?)```", (DOCS / "performance.md").read_text(encoding="utf-8"), re.DOTALL
    ):
        exec(compile(block, "performance.md", "exec"), names)
    said = [message["content"] for message in names["chat"] if message["role"] == "assistant"]
    assert said[0].strip() == "banana" and len(said) == 3
    assert (
        type(names["model"].model.language_model.layers[0].mlp.up_proj.weight).__name__
        == "Int8Tensor"
    )


def test_every_test_that_the_page_on_reliability_names_exists():
    page = (DOCS / "reliability.md").read_text(encoding="utf-8")
    rows = [
        line
        for line in page.splitlines()
        if line.startswith("| ") and not line.startswith(("| case", "| ---"))
    ]
    for row in rows:
        file = None
        for named, name in re.findall(
            r"`([\w/]*(?:\.py)?)::(\w+)`", row.rpartition("|")[0].rpartition(" | ")[2]
        ):
            file = named or file
            assert f"def test_{name}(" in (Path(__file__).parent / file).read_text(
                encoding="utf-8"
            ), f"{file}::{name}"
        assert file is not None, row


@pytest.fixture
def encoded():
    """The default model, its processor, and how many images each call of the vision encoder
    took.
    """
    calls: list[int] = []
    model, processor = owl2_hf.load_default(dtype=torch.float32)
    model.model.vision_tower.register_forward_pre_hook(
        lambda module, args: calls.append(len(args[0]))
    )
    return model, processor, calls


def question(text, picture=None):
    image = (
        [{"type": "image", "image": str(owl2_hf.default_pictures()[picture])}] if picture else []
    )
    return {"role": "user", "content": [*image, {"type": "text", "text": text}]}


def test_a_picture_of_an_earlier_turn_is_not_encoded_again(encoded):
    model, processor, calls = encoded
    options = {
        "add_generation_prompt": True,
        "tokenize": True,
        "return_dict": True,
        "return_tensors": "pt",
    }
    first, second = list(owl2_hf.default_pictures())[:2]
    chat, features = [], []
    for asked in (
        question("What is it?", first),
        question("Is it an animal?"),
        question("And this?", second),
    ):
        chat.append(asked)
        inputs = processor.apply_chat_template(chat, **options)
        expected = model.generate(**inputs)
        new = inputs.pop("pixel_values")[len(features) :]
        calls.clear()
        if len(new):
            features += model.get_image_features(new).pooler_output
        known = {"image": BaseModelOutputWithPooling(pooler_output=features)}
        assert model.generate(**inputs, mm_encoder_outputs=known).equal(expected)
        assert calls == [len(new)] * bool(len(new))
        answer = processor.decode(
            expected[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        chat.append({"role": "assistant", "content": answer})


def test_pictures_in_one_call_are_encoded_as_one_by_one(encoded):
    model, processor, calls = encoded
    pictures = [str(path) for path in list(owl2_hf.default_pictures().values())[:3]]
    pixels = processor.image_processor(pictures, return_tensors="pt").pixel_values
    together = model.get_image_features(pixels).pooler_output
    assert calls == [3]
    for one, features in zip(pixels, together, strict=True):
        torch.testing.assert_close(model.get_image_features(one[None]).pooler_output[0], features)


def test_the_page_on_installing_names_every_extra_and_the_wheel():
    project = (DOCS.parent / "pyproject.toml").read_text(encoding="utf-8")
    page = (DOCS / "install.md").read_text(encoding="utf-8")
    extras = re.findall(
        r"^([a-z]+) = \[",
        project.partition("[project.optional-dependencies]")[2].partition("\n[")[0],
        re.M,
    )
    assert set(re.findall(r"^\| `(\w+)`", page, re.M)) == set(extras) - {"dev", "docs"}
    (version,) = re.findall(r'^version = "(.*)"', project, re.M)
    assert set(re.findall(r"owl2_hf-(.*?)-py3", page)) == {version}
