"""`push` against a stand-in for the Hub: what arrives, and what a stranger loads from there."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from huggingface_hub import constants

import owl2_hf
from owl2_hf.hub import push

from ..stand_in_hub import TOKEN, StandInHub
from .conftest import CARD, make_shards, refused, send

PROMPT = "USER: <|image|>What is this? ASSISTANT:"
# Runs where `import owl2_hf` fails, knows the model by its id alone, and prints the last logits.
STRANGER = """
    import sys
    sys.modules["owl2_hf"] = None
    import torch
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor
    repo_id, image, prompt = sys.argv[1:]
    processor = AutoProcessor.from_pretrained(repo_id, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(repo_id, trust_remote_code=True, dtype=torch.float32).eval()
    assert "transformers_modules" in type(model).__module__
    with torch.no_grad():
        print(model(**processor(text=prompt, images=Image.open(image), return_tensors="pt")).logits[0, -1].tolist())
"""
PUSHER = """
    import sys
    from owl2_hf.hub import push
    report = push(sys.argv[1], sys.argv[2])
    print(report.url)
"""


def run(code, home, endpoint, *arguments, **environment):
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=home,
        env={
            **{
                name: value
                for name, value in os.environ.items()
                if not name.startswith(("HF_", "TRANSFORMERS_"))
            },
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(home / "hf"),
            "HF_HUB_DISABLE_XET": "1",
            **environment,
        },
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout.splitlines()[-1]


def test_a_pushed_model_gives_the_same_logits_without_the_package(tmp_path):
    folder = tmp_path / "saved"
    model, processor = owl2_hf.load_default(dtype=torch.float32)
    model.save_pretrained(folder, max_shard_size="4MB")
    processor.save_pretrained(folder)
    (folder / "README.md").write_text(CARD)
    picture = str(next(iter(owl2_hf.default_pictures().values())))
    with StandInHub() as server:
        url = run(PUSHER, tmp_path, server.endpoint, folder, "tester/owl", HF_TOKEN=TOKEN)
        assert url.startswith(f"{server.endpoint}/tester/owl/commit/")
        sent = server.repos["tester/owl"].files()
        assert set(sent) == {path.name for path in folder.iterdir()} | {".gitattributes"}
        assert all(sent[path.name] == path.read_bytes() for path in folder.iterdir())
        assert sum(name.endswith(".safetensors") for name in sent) > 1
        printed = run(
            STRANGER,
            tmp_path,
            server.endpoint,
            "tester/owl",
            picture,
            PROMPT,
            HF_HOME=str(tmp_path / "new"),
        )
    with torch.no_grad():
        expected = model(**processor(text=PROMPT, images=picture, return_tensors="pt")).logits[
            0, -1
        ]
    torch.testing.assert_close(torch.tensor(json.loads(printed)), expected, rtol=0, atol=1e-6)


def test_the_files_and_the_message_arrive(hub, folder):
    report = send(folder, commit_message="a first model")
    repo = hub.repos["tester/owl"]
    assert {
        name: len(data) for name, data in repo.files().items() if name != ".gitattributes"
    } == dict(report.files)
    assert repo.files()["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert repo.refs["main"][-1].message == "a first model"
    assert report.url == f"{hub.endpoint}/tester/owl/commit/{repo.refs['main'][-1].oid}"


def test_a_name_alone_goes_to_the_namespace_of_the_token(hub, folder):
    assert send(folder, "owl").repo_id == "tester/owl"
    assert "config.json" in hub.repos["tester/owl"].files()


@pytest.mark.parametrize(("private", "expected"), [(None, False), (False, False), (True, True)])
def test_private_reaches_the_server(hub, folder, private, expected):
    send(folder, private=private)
    assert hub.repos["tester/owl"].private is expected


def test_a_private_push_never_ends_in_a_public_repository(hub, folder):
    send(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "mplug_owl2", "secret": 1}))
    with pytest.raises(ValueError, match="expected a private repository, got a public one"):
        send(folder, private=True)
    assert b"secret" not in hub.repos["tester/owl"].files()["config.json"]


def test_a_revision_is_a_branch_that_is_made_once(hub, folder):
    for message in ("one", "two"):
        (folder / "NOTICE").write_text(message)
        send(folder, revision="v1", commit_message=message)
    repo = hub.repos["tester/owl"]
    assert set(repo.files()) == {".gitattributes"}
    assert [commit.message for commit in repo.refs["v1"]] == ["initial commit", "one", "two"]


@pytest.mark.parametrize("streamed", [False, True], ids=["one commit", "streamed"])
def test_a_pull_request_leaves_main_alone(hub, folder, monkeypatch, streamed):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", not streamed)
    hub.lfs = not streamed
    report = send(folder, create_pr=True)
    repo = hub.repos["tester/owl"]
    assert (("POST", "/api/models/tester/owl/discussions") in hub.requests) is streamed
    assert report.url == f"{hub.endpoint}/tester/owl/discussions/1"
    assert set(repo.files()) == {".gitattributes"}
    assert set(repo.files("refs/pr/1")) == {name for name, _ in report.files} | {".gitattributes"}


def test_a_pull_request_that_broke_off_is_resumed_by_its_ref(hub, folder):
    send(folder, create_pr=True)
    (folder / "NOTICE").write_text("later")
    send(folder, revision="refs/pr/1")
    assert set(hub.repos["tester/owl"].refs) == {"main", "refs/pr/1"}
    assert hub.repos["tester/owl"].files("refs/pr/1")["NOTICE"] == b"later"


def test_a_dry_run_lists_the_files_and_asks_nobody(hub, folder):
    report = push(folder, "tester/owl", dry_run=True)
    names = ["README.md", "config.json", "model.safetensors", "pictures/one.png"]
    assert report.files == [(name, (folder / name).stat().st_size) for name in names]
    assert report.url is None
    assert hub.requests == []


def test_results_of_evaluations_travel_with_the_model(hub, folder):
    results = folder / ".eval_results"
    results.mkdir()
    (results / "tester--photos.yaml").write_text("- value: 0.8\n")
    send(folder)
    assert hub.repos["tester/owl"].files()[".eval_results/tester--photos.yaml"]
    (results / "notes.txt").write_text("mine")
    refused(folder, r"Not part of a model of this package: \.eval_results/notes\.txt")


def test_a_second_push_of_the_same_files_makes_no_commit(hub, folder):
    urls = {send(folder).url, send(folder).url}
    assert len(urls) == 1
    assert len(hub.repos["tester/owl"].refs["main"]) == 2
    assert sum(method == "PUT" for method, _ in hub.requests) == 2


@pytest.mark.parametrize("streamed", [False, True], ids=["one commit", "streamed"])
def test_weights_of_the_model_before_do_not_stay_beside_the_new_ones(
    hub, folder, monkeypatch, streamed
):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", not streamed)
    hub.lfs = not streamed
    send(folder)
    shards = make_shards(folder)
    send(folder)
    there = set(hub.repos["tester/owl"].files())
    assert there >= {*shards, "model.safetensors.index.json", "README.md"}
    assert "model.safetensors" not in there


@pytest.mark.parametrize(
    ("status", "words"), [(401, "hf auth login"), (403, "no write permission"), (404, "no such")]
)
def test_a_refusal_of_the_hub_is_one_clear_line(hub, folder, status, words):
    hub.refusal = status
    with pytest.raises(
        ValueError, match=f"^tester/owl was not pushed: the Hub answered {status}, .*{words}"
    ) as caught:
        send(folder)
    assert "\n" not in str(caught.value)
    assert TOKEN not in str(caught.value)


def test_a_branch_name_that_the_hub_refuses_is_said_in_its_words(hub, folder):
    hub.refusal = 400
    with pytest.raises(ValueError, match="the Hub answered 400, not for you; correct"):
        send(folder, revision="no branch")


def test_without_a_token_no_request_is_sent(hub, folder, monkeypatch):
    monkeypatch.setattr("owl2_hf.hub.upload.get_token", lambda: None)
    with pytest.raises(ValueError, match=r"expected a token of the Hub, got none.*hf auth login"):
        push(folder, "tester/owl")
    assert hub.requests == []


def test_an_unreachable_hub_is_one_clear_line(folder, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ValueError, match=r"^tester/owl was not pushed: ConnectError: "):
        send(folder)


def test_a_card_that_the_hub_refuses_leaves_no_empty_repository(hub, folder):
    hub.card_errors = ['"license" must be one of these']
    with pytest.raises(
        ValueError, match=r"README\.md: the Hub refuses its metadata: .*must be one of these"
    ):
        send(folder)
    assert hub.repos == {}


def test_a_pull_request_to_a_branch_is_refused(folder):
    with pytest.raises(ValueError, match="expected create_pr or revision, got both"):
        send(folder, create_pr=True, revision="v1", dry_run=True)


def test_a_repo_id_that_cannot_be_one_is_refused(folder):
    with pytest.raises(ValueError, match="Repo id"):
        send(folder, "a/b/c", dry_run=True)
