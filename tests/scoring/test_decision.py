"""transformers' pipeline("decision") and its server score with converted scorers."""

import pytest
import transformers
from PIL import Image

from owl2_hf.scoring import PRESETS, Preset
from owl2_hf.scoring.decision import decision_files

from .conftest import NAMES, ask_a_stranger

LOWEST_FIRST = ["bad", "poor", "fair", "good", "excellent"]
QUESTION = {"type": "score", "criteria": LOWEST_FIRST}
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
needs_decisions = pytest.mark.skipif(
    not hasattr(transformers, "DecisionPipeline"),
    reason="this release of transformers has no pipeline('decision')",
)


def test_decision_files_are_written_only_for_supported_presets():
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
