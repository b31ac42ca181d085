"""Scores travel with the weights: the published call, with the package and without it, and transformers' own door."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
import transformers
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
from owl2_hf.scoring.decision import decision_files, scorer_files
from owl2_hf.scoring.presets import load_preset, own_preset

from ..test_docs import place  # noqa: F401

ENDINGS = ("photo.jpg", "other.jpg", "third.jpg")
NAMES = ("scorer.json", "decision.json", "decision_template.jinja")
LOWEST_FIRST = ["bad", "poor", "fair", "good", "excellent"]
QUESTION = {"type": "score", "criteria": LOWEST_FIRST}
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
DECIDER = """
    import json, sys
    sys.modules["owl2_hf"] = None
    from transformers import pipeline
    folder, path = sys.argv[1:]
    decide = pipeline("decision", model=folder, trust_remote_code=True)
    levels = ["bad", "poor", "fair", "good", "excellent"]
    question = {"type": "score", "instructions": "quality", "criteria": levels}
    print(json.dumps(decide({"state": "img", "questions": {"q": question}, "assets": {"img": path}})["q"]["score"]))
"""
needs_decisions = pytest.mark.skipif(
    not hasattr(transformers, "DecisionPipeline"),
    reason="this release of transformers has no pipeline('decision')",
)


def edit(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.fixture(scope="module")
def originals(place):  # noqa: F811
    """Small checkpoints in the original's layout, as the published scorers tell what they are."""
    for name in ("one-align", "deqa"):
        convert(place / "path" / "to" / name, place / "original" / name, to="original")
    edit(place / "original" / "one-align", _name_or_path="q-future/one-align")
    edit(place / "original" / "deqa", level_ids=[1, 2, 3, 4, 5], softkl_loss=True)
    return place / "original"


@pytest.fixture(scope="module")
def converted(place, originals):  # noqa: F811
    for name in ("one-align", "deqa"):
        convert(originals / name, place / "converted" / name)
    return place / "converted"


@pytest.fixture(scope="module")
def paths(place):  # noqa: F811
    return [str(place / name) for name in ENDINGS]


@pytest.fixture(scope="module")
def loaded(converted):
    """OneAlign's small stand-in, its processor, and its scorer."""
    folder = converted / "one-align"
    model = owl2_hf.MplugOwl2ForConditionalGeneration.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    return model, processor, Scorer(model, processor, "one-align")


def ask_a_stranger(script, tmp_path, *arguments):
    """What a process prints that cannot import the package."""
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path),
        "HF_MODULES_CACHE": str(tmp_path / "m"),
    }
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


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


def test_what_cannot_be_scored_is_refused(loaded, converted, paths, tmp_path):
    model, processor, _ = loaded
    for arguments, message in (
        ({"task_": "beauty"}, "a task_ of quality, aesthetics, got 'beauty'"),
        ({"task_": "video"}, "videos are told by input_='video'"),
        ({"input_": "text"}, "expected input_ 'image' or 'video', got 'text'"),
        ({"batch_size": 0}, "batch_size of at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            model.score(paths, **arguments)
    deqa = owl2_hf.MplugOwl2ForConditionalGeneration.from_pretrained(converted / "deqa")
    with pytest.raises(ValueError, match="no prompt for videos: with input_='image' each list"):
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
    with pytest.raises(ValueError, match="this model was not loaded from one"):
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
    place,  # noqa: F811
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


def test_the_preset_may_be_told_and_comes_back(place, converted, tmp_path):  # noqa: F811
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
def test_the_web_page_begins_with_the_models_own_preset(place, converted, name, shown):  # noqa: F811
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


def test_a_card_shows_the_call_that_runs(converted, place, monkeypatch, capsys):  # noqa: F811
    text = ModelCard.load(converted / "one-align" / "README.md").text
    code = text.partition("## Scores")[2].partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(place)
    exec(compile(code.replace("path/or/id", "converted/one-align"), "README.md", "exec"), {})
    (score,) = json.loads(capsys.readouterr().out)
    assert 1 < score < 5


def test_a_folder_without_preset_scores_as_before(place, paths):  # noqa: F811
    folder = place / "path" / "to" / "owl2"
    assert not (folder / "scorer.json").exists()
    model, processor = (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoProcessor.from_pretrained(folder),
    )
    expected = Scorer(model, processor, "one-align")(paths)
    assert Scorer(model, processor)(paths) == expected
    assert model.score(paths).tolist() == torch.tensor([one.score for one in expected]).tolist()


def test_an_adapter_is_asked_as_it_was_trained(place, paths, tmp_path):  # noqa: F811
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
    assert any("asks for quality in 5 levels, whose words" in check for check in verify(folder))
    assert {*NAMES} <= {name for name, _ in push(folder, "me/deqa", dry_run=True).files}
    template = (folder / "decision_template.jinja").read_text()
    (folder / "decision_template.jinja").write_text(template.replace("rate", "love"))
    for check in (lambda: verify(folder), lambda: push(folder, "me/deqa", dry_run=True)):
        with pytest.raises(ValueError, match=r"decision_template\.jinja is not what follows"):
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
        with pytest.raises(ValueError, match=r"scorer\.json is no preset of a scorer"):
            check()
    (folder / "scorer.json").unlink()
    with pytest.raises(ValueError, match=r"has decision\.json without scorer\.json"):
        push(folder, "me/deqa", dry_run=True)


def test_the_preset_says_no_more_than_the_pipeline_can_do():
    assert set(decision_files(PRESETS["one-align"])) == set(NAMES[1:])
    assert decision_files(PRESETS["q-instruct-boost"]) == {}  # groups of words
    assert decision_files(Preset({"quality": "<|image|>"}, ("a", "b", "c"), (1.0, 0.9, 0.0))) == {}


@needs_decisions
def test_transformers_pipeline_gives_the_scorers_numbers(loaded, converted, paths):
    from transformers import pipeline

    scorer = loaded[2]
    decide = pipeline("decision", model=str(converted / "one-align"))
    tasks = ("quality", "aesthetics", "video")
    questions = {task: {**QUESTION, "instructions": task} for task in tasks} | {"plain": QUESTION}
    for path in paths:
        image = Image.open(path)
        answers = decide({"state": "img", "questions": questions, "assets": {"img": image}})
        for task in tasks:
            shown = [[image]] if task == "video" else [image]
            (expected,) = scorer(shown, task)
            assert 1 + answers[task]["score"] == pytest.approx(expected.score, abs=1e-5)
            assert list(answers[task]["probabilities"].values()) == pytest.approx(
                expected.probs[::-1], abs=1e-6
            )
        assert answers["plain"] == answers["quality"]
    frames = {
        name: Image.open(path)
        for name, path in zip(("img-1", "img-2", "img-3"), paths, strict=True)
    }
    request = {"state": {"id": 3, "frames": ["img-1", "img-2", "img-3"]}, "assets": frames}
    found = decide({**request, "questions": {"q": questions["video"]}})["q"]["score"]
    assert 1 + found == pytest.approx(scorer([paths], "video")[0].score, abs=1e-5)


@needs_decisions
def test_transformers_pipeline_refuses_what_would_give_another_number(converted, paths):
    from transformers import pipeline

    decide = pipeline("decision", model=str(converted / "one-align"))
    for state, question, message in (
        ("img", {**QUESTION, "criteria": LOWEST_FIRST[::-1]}, "the lowest first"),
        ("img", {**QUESTION, "criteria": LOWEST_FIRST[1:]}, "the lowest first"),
        ("img", {"type": "noul"}, "questions of type 'score'"),
        ("img", {**QUESTION, "instructions": "beauty"}, "one of .*aesthetics"),
        ("a text", QUESTION, "the state holds no image"),
    ):
        request = {"state": state, "questions": {"q": question}, "assets": {"img": paths[0]}}
        with pytest.raises(ValueError, match=message):
            decide(request)


@needs_decisions
def test_transformers_pipeline_scores_without_the_package(loaded, converted, paths, tmp_path):
    found = ask_a_stranger(DECIDER, tmp_path, converted / "one-align", paths[0])
    assert 1 + found == pytest.approx(loaded[2](paths[0])[0].score, abs=1e-5)


@needs_decisions
def test_transformers_server_scores_without_the_package(loaded, converted, paths, tmp_path):
    pytest.importorskip("fastapi", reason="transformers serve needs fastapi")
    pytest.importorskip("uvicorn", reason="transformers serve needs uvicorn")
    found = ask_a_stranger(SERVED, tmp_path, converted / "one-align", paths[0])
    assert found[0] == 200
    assert 1 + found[1]["answers"]["q"]["score"] == pytest.approx(
        loaded[2](paths[0])[0].score, abs=1e-5
    )
    assert found[2] == 400 and "the lowest first" in found[3]["detail"]


# The server's own loading and handler, in process.
SERVED = """
    import asyncio, base64, json, sys
    sys.modules["owl2_hf"] = None
    from fastapi import HTTPException
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.serving.systemone import SystemOneHandler
    from transformers.cli.serving.utils import GenerationState
    folder, path = sys.argv[1:]
    manager = ModelManager(trust_remote_code=True, device="cpu")
    handler = SystemOneHandler(manager, GenerationState())
    image = base64.b64encode(open(path, "rb").read()).decode()
    def ask(levels):
        body = {
            "model": folder,
            "state": "img",
            "questions": {"q": {"type": "score", "criteria": levels}},
            "assets": {"img": {"type": "image", "format": "jpg", "data_base64": image}},
        }
        try:
            response = asyncio.run(handler.handle_request(body, "1"))
            return response.status_code, json.loads(response.body)
        except HTTPException as error:
            return error.status_code, {"detail": error.detail}
    levels = ["bad", "poor", "fair", "good", "excellent"]
    print(json.dumps([*ask(levels), *ask(levels[1:])]), flush=True)
    import os
    os._exit(0)
"""
