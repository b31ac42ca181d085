"""`push` against a stand-in for the Hub: what arrives, what a stranger loads from there, what never
leaves.
"""

import json
import os
import pickle
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image, PngImagePlugin
from safetensors.numpy import save_file

import owl2_hf
from owl2_hf.hub import push

from .stand_in_hub import TOKEN, StandInHub

PACKAGE = Path(owl2_hf.__file__).parent
CARD = """---
library_name: transformers
pipeline_tag: image-text-to-text
license: apache-2.0
tags: [mplug-owl2]
---

# A model

![an image](pictures/one.png)
"""
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


def make_shards(folder):
    (folder / "model.safetensors").unlink(missing_ok=True)
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for name in names:
        save_file({name: np.zeros(3, dtype=np.float32)}, folder / name)
    index = {"metadata": {}, "weight_map": {name: name for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return names


def test_a_stranger_loads_what_was_pushed_by_its_id_and_gets_the_same_logits(tmp_path):
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
    ("status", "words"), [(401, "hf auth login"), (403, "may not write"), (404, "no such")]
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


def test_without_a_token_nothing_is_asked(hub, folder, monkeypatch):
    monkeypatch.setattr("owl2_hf.hub.get_token", lambda: None)
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


def refused(folder, match):
    with pytest.raises(ValueError, match=match) as caught:
        push(folder, "tester/owl", dry_run=True)
    return str(caught.value)


def test_every_file_that_stops_a_push_is_named_in_one_error(folder):
    for name in (
        "optimizer.pt",
        "weights.bin",
        ".env",
        "id_rsa.pub",
        "train.log",
        "try.ipynb",
        "config.json.bak",
    ):
        (folder / name).write_text("x")
    for name in (".git", ".cache", "runs"):
        (folder / name).mkdir()
    (folder / "pictures" / "two.png").write_bytes(b"\x89PNG")
    message = refused(folder, r"holds what must not be published.*Remove them from the folder")
    assert (
        "Pickles, which can run code on loading (convert writes safetensors): optimizer.pt, "
        "weights.bin" in message
    )
    assert "Files that are secrets by their names: .env, id_rsa.pub" in message
    assert (
        "Not part of a model of this package: .cache, .git, config.json.bak, runs, train.log, "
        "try.ipynb" in message
    )
    assert "Images that README.md does not show: pictures/two.png" in message


@pytest.mark.parametrize(
    "name", ["a.pem", "server.key", ".netrc", "token", "credentials.json", ".env.local"]
)
def test_names_of_secrets_are_refused(folder, name):
    (folder / name).write_text("x")
    refused(folder, f"secrets by their names: {name}")


def test_a_pickle_under_another_name_is_refused(folder):
    (folder / "model.safetensors").write_bytes(pickle.dumps({"a": 1}, protocol=2))
    with zipfile.ZipFile(folder / "adapter_model.safetensors", "w") as archive:
        archive.writestr("data.pkl", b"")
    refused(folder, r"archives under another name.*adapter_model\.safetensors, model\.safetensors")


def test_honest_weights_may_begin_like_a_pickle(folder):
    for size in range(8):
        save_file(
            {"a": np.zeros(1, dtype=np.float32)},
            folder / "model.safetensors",
            {"pad": "x" * (560 + 8 * size)},
        )
        content = (folder / "model.safetensors").read_bytes()
        if content[:2] == b"\x80\x02":
            break
    assert content[:2] == b"\x80\x02"
    assert push(folder, "tester/owl", dry_run=True).files


def test_weights_that_were_cut_short_are_refused(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-1])
    refused(folder, r"Damaged weight files, cut short or no safetensors: model\.safetensors")


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_links_go_only_where_they_are_honest(folder, tmp_path):
    blob = tmp_path / "hub" / "models--a--b" / "blobs" / "123"
    blob.parent.mkdir(parents=True)
    (folder / "config.json").rename(blob)
    (folder / "config.json").symlink_to(blob)
    (folder / "NOTICE").symlink_to("README.md")
    assert push(folder, "tester/owl", dry_run=True).files[2] == ("config.json", blob.stat().st_size)
    (tmp_path / "outside").write_text("x")
    (folder / "LICENSE").symlink_to(tmp_path / "outside")
    (folder / "LICENSE.md").symlink_to("nowhere")
    refused(folder, r"Links that lead out of the folder, or nowhere: LICENSE, LICENSE\.md")


@pytest.mark.parametrize(
    ("kind", "secret"),
    [
        ("a Hugging Face token", "hf_" + "a1B2" * 9),
        ("an AWS access key", "AKIA" + "A1B2" * 4),
        ("a private key", "-----BEGIN RSA " + "PRIVATE KEY-----"),
        ("a GitHub token", "ghp_" + "a1B2" * 9),
        ("an API key", "sk-" + "proj-a1B2" * 4),
    ],
)
@pytest.mark.parametrize("name", ["README.md", "generation_config.json", "NOTICE"])
def test_a_secret_in_a_text_is_refused_and_not_repeated(folder, name, kind, secret):
    text = CARD + secret if name == "README.md" else json.dumps({"a": secret})
    (folder / name).write_text(text)
    assert secret not in refused(folder, f"{name} seems to hold {kind}")


@pytest.mark.parametrize(
    "value", ["/home/me/owl", "/Users/me/owl", "C:\\models\\owl", "/root/x", "file:///tmp/x"]
)
def test_a_path_of_this_machine_in_a_config_is_refused_by_its_key(folder, value):
    (folder / "config.json").write_text(
        json.dumps({"model_type": "mplug_owl2", "text_config": {"from": value}})
    )
    assert value not in refused(
        folder, r"config\.json: text_config\.from is a path of a local machine"
    )


@pytest.mark.parametrize("value", ["/data/llama-7b", "../llama", "./a", "D:/models/a", "a/b/c"])
def test_a_local_path_as_the_name_of_a_model_is_refused(folder, value):
    (folder / "config.json").write_text(
        json.dumps({"model_type": "mplug_owl2", "text_config": {"_name_or_path": value}})
    )
    refused(folder, r"config\.json: text_config\._name_or_path is a path of a local machine")
    for fine in ("", "llama", "meta-llama/Llama-2-7b-hf"):
        (folder / "config.json").write_text(
            json.dumps({"model_type": "mplug_owl2", "_name_or_path": fine})
        )
        assert push(folder, "tester/owl", dry_run=True).files


@pytest.mark.parametrize(
    "key", ["wandb_api_key", "apikey", "hub_token", "AWS_SECRET_KEY", "password"]
)
def test_a_secret_is_known_by_its_key(folder, key):
    (folder / "config.json").write_text(
        json.dumps({"model_type": "mplug_owl2", "report": {key: "0123abcd"}})
    )
    assert "0123abcd" not in refused(folder, rf"config\.json: report\.{key} seems to be a secret")
    (folder / "config.json").write_text(
        json.dumps({"model_type": "mplug_owl2", key: None, "bos_token": "<s>"})
    )
    assert push(folder, "tester/owl", dry_run=True).files


@pytest.mark.parametrize(
    "text", ["see /home/me/owl", "`/Users/me`", "C:\\Users\\me", "cd /root/owl"]
)
@pytest.mark.parametrize("name", ["README.md", "NOTICE"])
def test_a_home_folder_in_a_text_is_refused_by_its_line(folder, name, text):
    (folder / name).write_text(f"{CARD}\n{text}\n")
    assert text not in refused(folder, rf"{name}: line 12 names a home folder")
    (folder / name).write_text(f"{CARD}\nhttps://host.org/home/x, ~/owl, path/home/owl, /tmp/owl\n")
    assert push(folder, "tester/owl", dry_run=True).files


def test_metadata_of_weights_keep_no_secrets(folder):
    def save(**metadata):
        save_file({"a": np.zeros(3, dtype=np.float32)}, folder / "model.safetensors", metadata)

    token = "hf_" + "a1B2" * 9
    save(format="pt", note=f"by {token}")
    assert token not in refused(folder, r"model\.safetensors seems to hold a Hugging Face token")
    save(wandb_api_key="abc")
    refused(folder, r"model\.safetensors: wandb_api_key in its metadata seems to be a secret")
    save(source="/home/me/owl")
    refused(folder, r"model\.safetensors: source in its metadata is a path of a local machine")
    save(format="pt")
    assert push(folder, "tester/owl", dry_run=True).files


def test_what_is_no_image_or_a_program_is_refused(folder):
    path = folder / "pictures" / "one.png"
    path.write_bytes(b"\x7fELF" + bytes(100))
    refused(folder, r"Programs under another name: pictures/one\.png")
    for content in (b"\x89PNG", b"text", b"GIF89a"):
        path.write_bytes(content)
        refused(folder, r"one\.png: expected a whole PNG image, got ")
    Image.new("RGB", (2, 2)).save(path, "JPEG")
    refused(folder, r"one\.png: expected a whole PNG image, got ")


@pytest.mark.parametrize("compressed", [False, True])
def test_texts_in_an_image_are_read(folder, compressed):
    path = folder / "pictures" / "one.png"
    token = "hf_" + "a1B2" * 9
    for text, match in (
        (f"by {token}", "one.png seems to hold a Hugging Face token"),
        ("/home/me/a", "holds a path"),
    ):
        info = PngImagePlugin.PngInfo()
        info.add_text("Comment", text, zip=compressed)
        Image.new("RGB", (2, 2)).save(path, pnginfo=info)
        assert token not in refused(folder, match)
    info = PngImagePlugin.PngInfo()
    info.add_text("Software", "paint", zip=compressed)
    Image.new("RGB", (2, 2)).save(path, pnginfo=info)
    assert push(folder, "tester/owl", dry_run=True).files


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_the_place_where_an_image_was_taken_is_not_published(folder, suffix):
    path = folder / "pictures" / f"two.{suffix}"
    (folder / "README.md").write_text(f"{CARD}![](pictures/{path.name})")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (2, 2)).save(path, exif=exif)
    assert push(folder, "tester/owl", dry_run=True).files
    exif.get_ifd(0x8825)[2] = (50.0, 1.0, 2.0)
    Image.new("RGB", (2, 2)).save(path, exif=exif)
    refused(folder, rf"two\.{suffix} tells the place where it was taken")
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:li exif:GPSLatitude="50,1N"/></x:xmpmeta>'
    if suffix == "jpg":
        Image.new("RGB", (2, 2)).save(path, xmp=xmp)
    else:
        info = PngImagePlugin.PngInfo()
        info.add_itxt("XML:com.adobe.xmp", xmp.decode(), zip=True)
        Image.new("RGB", (2, 2)).save(path, pnginfo=info)
    refused(folder, rf"two\.{suffix} tells the place where it was taken")


def test_web_addresses_and_vocabularies_are_no_local_paths(folder):
    (folder / "generation_config.json").write_text(
        json.dumps({"a": "https://host.org/home/x, a/tmp/b"})
    )
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"merges": ["/home/ x"]}}))
    assert push(folder, "tester/owl", dry_run=True).files


@pytest.mark.parametrize(
    ("lines", "match"),
    [
        (["tags: [a]"], "lacks library_name, pipeline_tag, license;"),
        (CARD.replace("apache-2.0", "other").splitlines()[1:5], "lacks license_name;"),
        (
            CARD.replace("image-text-to-text", "image-to-text").splitlines()[1:5],
            "expected pipeline_tag image-text-to",
        ),
        (["- a list"], "expected metadata in YAML"),
        (["a: [b"], "expected metadata in YAML"),
    ],
)
def test_a_card_without_what_the_hub_needs_is_refused(folder, lines, match):
    (folder / "README.md").write_text("\n".join(["---", *lines, "---", "![](pictures/one.png)"]))
    refused(folder, rf"README\.md: .*{match}")


def test_a_folder_without_a_card_is_refused(folder):
    (folder / "README.md").unlink()
    (folder / "pictures" / "one.png").unlink()
    refused(folder, r"README\.md is missing: expected a model card")


def test_a_shard_that_is_missing_or_stale_is_refused(folder):
    last = make_shards(folder)[1]
    content = (folder / last).read_bytes()
    (folder / last).unlink()
    refused(folder, f"not whole, {last} is missing")
    (folder / last).write_bytes(content)
    (folder / "model.safetensors").write_bytes(content)
    refused(folder, r"model\.safetensors is not among its weights")
    (folder / "model.safetensors.index.json").write_text("{}")
    refused(folder, "expected a weight_map, got None")


def test_an_adapter_needs_no_other_weights_but_a_model_does(folder):
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    refused(folder, r"not whole, model\.safetensors is missing")
    (folder / "adapter_model.safetensors").write_bytes(weights)
    assert push(folder, "tester/owl", dry_run=True).files


def test_remote_code_is_the_package_s_own_and_whole(folder):
    ours = PACKAGE / "modeling" / "configuration_mplug_owl2.py"
    config = {
        "model_type": "mplug_owl2",
        "auto_map": {"AutoConfig": "configuration_mplug_owl2.MplugOwl2Config"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, r"lacks code that it refers to: configuration_mplug_owl2\.py")
    (folder / ours.name).write_bytes(ours.read_bytes())
    sibling = ours.with_name("compatibility_mplug_owl2.py")
    refused(folder, r"lacks code that it refers to: compatibility_mplug_owl2\.py")
    (folder / sibling.name).write_bytes(sibling.read_bytes())
    assert push(folder, "tester/owl", dry_run=True).files
    (folder / ours.name).write_bytes(ours.read_bytes() + b"import os\n")
    refused(folder, r"configuration_mplug_owl2\.py differs from the package's file")
    (folder / ours.name).write_bytes(ours.read_bytes())
    config["auto_map"]["AutoConfig"] = "someone/else--configuration_mplug_owl2.MplugOwl2Config"
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, "lacks code that it refers to: someone/else--configuration_mplug_owl2.py")


def test_a_folder_of_another_model_is_refused(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    refused(folder, "expected model_type 'mplug_owl2' in config.json, got 'llama'")
    (folder / "config.json").write_text("[]")
    refused(folder, "expected a JSON object, got list")
    (folder / "config.json").write_text("{")
    refused(folder, r"config\.json: expected JSON, got an error")
    (folder / "config.json").unlink()
    refused(folder, r"expected a model folder with a config\.json, got none")
