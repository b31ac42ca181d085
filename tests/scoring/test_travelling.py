"""Scores travel with the weights: the published call, with the package and without it."""

import json

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor
from typer.testing import CliRunner

import owl2_hf
from owl2_hf.cli import app
from owl2_hf.conversion import ConversionError, convert
from owl2_hf.conversion.verify import verify
from owl2_hf.hub import push
from owl2_hf.scoring import PRESETS, Preset, Scorer, custom_preset
from owl2_hf.scoring.decision import scorer_files
from owl2_hf.scoring.presets import load_preset, own_preset

from .conftest import NAMES, ask_a_stranger, edit

# The call as Q-Align's and DeQA-Score's READMEs have it, where `import owl2_hf` fails.
STRANGER = """
    import json, sys
    sys.modules["owl2_hf"] = None
    import torch
    from PIL import Image
    from transformers import AutoModelForCausalLM
    folder, *paths = sys.argv[1:]
    model = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, attn_implementation="eager", torch_dtype=torch.float32, device_map="auto"
    )
    assert "transformers_modules" in type(model).__module__
    images = [Image.open(path) for path in paths]
    scores = [model.score(images)]
    if "one-align" in folder:
        scores.append(model.score(images, task_="quality", input_="image"))
        scores.append(model.score(images, task_="aesthetics", input_="image"))
        scores.append(model.score([images, images[:1]], task_="quality", input_="video"))
    for found in scores:
        assert isinstance(found, torch.Tensor) and found.ndim == 1 and not found.requires_grad
    print(json.dumps([found.tolist() for found in scores]))
"""


@pytest.mark.parametrize("name", ["one-align", "deqa"])
def test_the_published_call_gives_the_scorers_numbers_without_the_package(
    converted, paths, tmp_path, name
):
    found = ask_a_stranger(STRANGER, tmp_path, converted / name, *paths)
    model = AutoModelForCausalLM.from_pretrained(converted / name, attn_implementation="eager")
    scorer = Scorer(model, AutoProcessor.from_pretrained(converted / name), name)
    expected = [scorer(paths)]
    if name == "one-align":
        expected += [
            scorer(paths, "quality"),
            scorer(paths, "aesthetics"),
            scorer([paths, paths[:1]], "video"),
        ]
    assert len(found) == len(expected)
    for scores, own in zip(found, expected, strict=True):
        assert scores == pytest.approx([one.score for one in own], abs=1e-6)
    # Another image, and another task, has another score.
    assert len({score for scores in found[1:] or found for score in scores}) == sum(
        map(len, found[1:] or found)
    )


def test_the_published_call_gives_the_scorers_numbers_with_the_package(loaded, paths):
    model, _, scorer = loaded
    images = [Image.open(path) for path in paths]
    expected = [one.score for one in scorer(images)]
    scores = model.score(images, task_="quality", input_="image")
    assert scores.dtype == torch.float32 and scores.device == model.device
    assert scores.tolist() == torch.tensor(expected).tolist()
    assert model.score(images, batch_size=2).tolist() == pytest.approx(expected, abs=1e-6)
    assert model.score(images[0]).tolist() == pytest.approx(expected[:1], abs=1e-6)
    assert model.score([]).shape == (0,)
    video = scorer([images], "video")[0].score
    assert model.score([images], input_="video").tolist() == pytest.approx([video])
    assert model.score(images, input_="video").tolist() == pytest.approx([video])
    aesthetics = [one.score for one in scorer(images, "aesthetics")]
    assert model.score(images, task_="aesthetic").tolist() == pytest.approx(aesthetics)


def test_every_pair_of_task_and_medium_has_the_published_prompt(loaded, paths):
    model, processor, _ = loaded
    for task in ("quality", "aesthetics"):
        for medium in ("image", "video"):
            prompt = (
                f"USER: How would you rate the {task} of this {medium}?\n<|image|>\n"
                f"ASSISTANT: The {task} of the {medium} is"
            )
            scorer = Scorer(model, processor, Preset({"own": prompt}))
            expected = [one.score for one in scorer([paths[:2], paths[2:]], "own")]
            found = model.score([paths[:2], paths[2:]], task_=task, input_=medium)
            assert found.tolist() == pytest.approx(expected, abs=1e-6)


def test_scores_keep_no_graph_and_the_processor_is_loaded_once(loaded, paths, monkeypatch):
    model = loaded[0]
    model.score(paths[:1])
    monkeypatch.setattr(AutoProcessor, "from_pretrained", lambda *a, **k: pytest.fail("again"))
    assert not model.score(paths[:1]).requires_grad


def test_inputs_that_cannot_be_scored_are_refused(loaded, converted, paths, tmp_path):
    model, processor, _ = loaded
    for arguments, message in (
        ({"task_": "beauty"}, "a task_ of quality, aesthetics, got 'beauty'"),
        ({"task_": "video"}, "for videos, pass input_='video'"),
        ({"input_": "text"}, "expected input_ 'image' or 'video', got 'text'"),
        ({"batch_size": 0}, "batch_size of at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            model.score(paths, **arguments)
    deqa = owl2_hf.MplugOwl2ForConditionalGeneration.from_pretrained(converted / "deqa")
    with pytest.raises(ValueError, match="no prompt for videos: pass input_='image'"):
        deqa.score([paths], input_="video")
    assert deqa.score([paths]).shape == (1,)
    with pytest.raises(ValueError, match="at least one frame"):
        model.score([[]], input_="video")
    model.save_pretrained(tmp_path / "bare")
    bare = owl2_hf.MplugOwl2ForConditionalGeneration.from_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match=r"needs the processor of the model's folder, but .*bare"):
        bare.score(paths)
    assert bare.score(paths, processor=processor).tolist() == pytest.approx(
        model.score(paths).tolist()
    )
    fresh = owl2_hf.MplugOwl2ForConditionalGeneration(model.config)
    fresh.name_or_path = ""
    with pytest.raises(ValueError, match="this model was not loaded from a folder"):
        fresh.score(paths)


def test_convert_writes_what_the_checkpoint_is(converted):
    for name in ("one-align", "deqa"):
        folder = converted / name
        assert load_preset(str(folder)) == PRESETS[name]
        assert {*NAMES} <= {path.name for path in folder.iterdir()}
        mode = AutoProcessor.from_pretrained(folder).image_processor.image_aspect_ratio
        assert mode == "pad"
        report = json.loads((folder / "conversion_report.json").read_text())
        assert report["scorer"].startswith(f"{name}, by ")
        card = ModelCard.load(folder / "README.md")
        assert "image-quality-assessment" in card.data.tags
        assert (
            'model.score([Image.open("photo.jpg")], task_="quality", input_="image")' in card.text
        )


CODE = 'def score(self, images):\n    words = ["excellent", "good"]\nraise RuntimeError("ran")\n'


@pytest.mark.parametrize(
    ("config", "code", "expected"),
    [
        ({}, None, None),
        ({"_name_or_path": "/data/mplug-owl2-llama2-7b"}, None, None),
        ({"_name_or_path": "teowu/q-instruct-plus-one-align"}, None, None),
        ({"_name_or_path": "q-future/q-align-aesthetic"}, None, "one-align"),
        ({"_name_or_path": "teowu/mplug_owl2_7b_448_qinstruct_preview_v0.1"}, None, "q-instruct"),
        ({"level_prefix": [1, 2]}, CODE, "deqa"),
        ({}, CODE, "one-align"),
        ({}, f"{CODE}def chat(self, prompt):\n", None),
    ],
)
def test_a_scorer_is_known_by_what_its_folder_holds(
    place,
    originals,
    tmp_path,
    config,
    code,
    expected,
):
    source = tmp_path / "source"
    source.mkdir()
    for path in (originals / "one-align").iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    edit(source, **{"_name_or_path": "", **config})
    if code is not None:
        (source / "modeling_mplug_owl2.py").write_text(code)
    report = convert(source, tmp_path / "target")
    assert load_preset(str(tmp_path / "target")) == (expected and PRESETS[expected])
    assert (report.scorer or "None").partition(",")[0] == str(expected)
    mode = AutoProcessor.from_pretrained(tmp_path / "target").image_processor.image_aspect_ratio
    assert mode == ("pad" if expected in ("one-align", "deqa") else "resize")
    # The pipeline leaves images as the processor makes them.
    assert (tmp_path / "target" / "decision.json").exists() == (mode == "pad")


def test_the_preset_may_be_told_and_comes_back(place, converted, tmp_path):
    source = place / "path" / "to" / "owl2"
    assert convert(source, tmp_path / "noop").is_noop
    result = CliRunner().invoke(
        app, ["convert", str(source), str(tmp_path / "told"), "--preset", "deqa"]
    )
    assert result.exit_code == 0 and "scores as deqa, as told" in result.stdout
    assert load_preset(str(tmp_path / "told")) == PRESETS["deqa"]
    convert(tmp_path / "told", tmp_path / "original", to="original")
    edit(tmp_path / "original", _name_or_path="q-future/one-align")
    report = convert(tmp_path / "original", tmp_path / "again")
    assert report.scorer == "its scorer.json"
    assert load_preset(str(tmp_path / "again")) == PRESETS["deqa"]
    result = CliRunner().invoke(
        app, ["convert", str(source), str(tmp_path / "bad"), "--preset", "best"]
    )
    assert result.exit_code == 1 and "expected a preset of one-align, deqa" in result.stderr
    assert not (tmp_path / "bad").exists()


def test_words_that_the_vocabulary_lacks_are_an_error_where_the_preset_is_told(
    golden_dir, tmp_path, caplog
):
    source = golden_dir("A") / "hf"
    with pytest.raises(ConversionError, match="--preset: the level 'excellent' is not one token"):
        convert(source, tmp_path / "told", preset="one-align")
    assert not (tmp_path / "told").exists()


def test_scorer_command_and_card_take_the_preset_from_the_folder(
    converted, paths, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "mine"
    folder.mkdir()
    for path in (converted / "one-align").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    words = ("good", "fair", "bad")
    own = custom_preset("one-align", "quality", "USER: <|image|>Is it\\ngood? ASSISTANT:", words)
    for name, text in scorer_files(own, AutoProcessor.from_pretrained(folder)).items():
        (folder / name).write_text(text)
    model = AutoModelForCausalLM.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    assert own_preset(model) == own
    expected = [one.score for one in Scorer(model, processor, own)(paths)]
    other = [one.score for one in Scorer(model, processor, "one-align")(paths)]
    assert [one.score for one in Scorer(model, processor)(paths)] == expected != other
    assert model.score(paths).tolist() == pytest.approx(expected)
    result = CliRunner().invoke(app, ["score", *paths, "--model", str(folder), "--json"])
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["score"] for line in lines] == pytest.approx(expected)
    assert lines[0]["levels"] == list(words)
    # What was saved again scores as before, and says so to others.
    model.save_pretrained(tmp_path / "again")
    processor.save_pretrained(tmp_path / "again")
    assert all((tmp_path / "again" / name).is_file() for name in NAMES)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert again.score(paths).tolist() == pytest.approx(expected)


@pytest.mark.parametrize(("name", "shown"), [("deqa", "deqa"), ("owl2", "one-align")])
def test_the_web_page_begins_with_the_models_own_preset(place, converted, name, shown):
    pytest.importorskip("gradio", reason="gradio is not installed")
    from owl2_hf.demo import build_page

    folder = converted / name if name == "deqa" else place / "path" / "to" / name
    model = owl2_hf.MplugOwl2ForConditionalGeneration.from_pretrained(folder)
    page = build_page(model, AutoProcessor.from_pretrained(folder), name)
    blocks = page.get_config_file()["components"]
    (preset,) = [one["props"] for one in blocks if one["props"].get("label") == "Preset"]
    assert preset["value"] == shown and len(preset["choices"]) == len(PRESETS)
    model.name_or_path = str(converted / "nowhere")
    assert own_preset(model) is None


def test_a_card_shows_the_call_that_runs(converted, place, monkeypatch, capsys):
    text = ModelCard.load(converted / "one-align" / "README.md").text
    code = text.partition("## Scores")[2].partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(place)
    exec(compile(code.replace("path/or/id", "converted/one-align"), "README.md", "exec"), {})
    (score,) = json.loads(capsys.readouterr().out)
    assert 1 < score < 5


def test_a_folder_without_preset_scores_as_before(place, paths):
    folder = place / "path" / "to" / "owl2"
    assert not (folder / "scorer.json").exists()
    model, processor = (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoProcessor.from_pretrained(folder),
    )
    expected = Scorer(model, processor, "one-align")(paths)
    assert Scorer(model, processor)(paths) == expected
    assert model.score(paths).tolist() == torch.tensor([one.score for one in expected]).tolist()


def test_an_adapter_is_asked_as_it_was_trained(place, paths, tmp_path):
    peft = pytest.importorskip("peft")
    base = place / "path" / "to" / "owl2"
    model = owl2_hf.MplugOwl2ForConditionalGeneration.from_pretrained(base)
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(
        tmp_path / "adapter"
    )
    own = custom_preset("deqa", levels=["good", "poor"])
    (tmp_path / "adapter" / "scorer.json").write_text(own.to_json())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    expected = Scorer(model, AutoProcessor.from_pretrained(base), own)(paths)
    assert model.score(paths).tolist() == pytest.approx([one.score for one in expected])


def test_a_damaged_preset_is_refused(converted, paths, tmp_path):
    folder = tmp_path / "spoiled"
    folder.mkdir()
    for path in (converted / "deqa").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    assert any(
        "asks for quality in 5 levels, and the vocabulary" in check for check in verify(folder)
    )
    assert {*NAMES} <= {name for name, _ in push(folder, "me/deqa", dry_run=True).files}
    template = (folder / "decision_template.jinja").read_text()
    (folder / "decision_template.jinja").write_text(template.replace("rate", "love"))
    for check in (lambda: verify(folder), lambda: push(folder, "me/deqa", dry_run=True)):
        with pytest.raises(ValueError, match=r"decision_template\.jinja does not match"):
            check()
    (folder / "decision_template.jinja").write_text(template)
    (folder / "scorer.json").write_text('{"levels": 3}')
    model = AutoModelForCausalLM.from_pretrained(folder)
    for check in (
        lambda: verify(folder),
        lambda: push(folder, "me/deqa", dry_run=True),
        lambda: model.score(paths),
        lambda: Scorer(model, None),
    ):
        with pytest.raises(ValueError, match=r"scorer\.json is not a valid scorer preset"):
            check()
    (folder / "scorer.json").unlink()
    with pytest.raises(ValueError, match=r"has decision\.json without scorer\.json"):
        push(folder, "me/deqa", dry_run=True)
