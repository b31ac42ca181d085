"""Which files stop a push, and which must be there."""

import json
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

import owl2_hf
from owl2_hf.hub import push

from .conftest import make_shards, refused

PACKAGE = Path(owl2_hf.__file__).parent


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
    message = refused(
        folder, r"contains files that must not be published.*Remove them from the folder"
    )
    assert (
        "Pickles, which can run code on loading (convert writes safetensors): optimizer.pt, "
        "weights.bin" in message
    )
    assert "Files named like secrets: .env, id_rsa.pub" in message
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
    refused(folder, f"named like secrets: {name}")


def test_a_pickle_under_another_name_is_refused(folder):
    (folder / "model.safetensors").write_bytes(pickle.dumps({"a": 1}, protocol=2))
    with zipfile.ZipFile(folder / "adapter_model.safetensors", "w") as archive:
        archive.writestr("data.pkl", b"")
    refused(folder, r"archives under another name.*adapter_model\.safetensors, model\.safetensors")


def test_safetensors_may_begin_with_the_bytes_of_a_pickle(folder):
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
    refused(folder, r"Damaged weight files, truncated or not safetensors: model\.safetensors")


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_links_are_followed_only_inside_the_folder_and_the_hub_cache(folder, tmp_path):
    blob = tmp_path / "hub" / "models--a--b" / "blobs" / "123"
    blob.parent.mkdir(parents=True)
    (folder / "config.json").rename(blob)
    (folder / "config.json").symlink_to(blob)
    (folder / "NOTICE").symlink_to("README.md")
    assert push(folder, "tester/owl", dry_run=True).files[2] == ("config.json", blob.stat().st_size)
    (tmp_path / "outside").write_text("x")
    (folder / "LICENSE").symlink_to(tmp_path / "outside")
    (folder / "LICENSE.md").symlink_to("nowhere")
    refused(folder, r"Links to other folders or to missing files: LICENSE, LICENSE\.md")


def test_damaged_images_and_programs_are_not_pushed(folder):
    path = folder / "pictures" / "one.png"
    path.write_bytes(b"\x7fELF" + bytes(100))
    refused(folder, r"Programs under another name: pictures/one\.png")
    for content in (b"\x89PNG", b"text", b"GIF89a"):
        path.write_bytes(content)
        refused(folder, r"one\.png is not a complete PNG image \(")
    Image.new("RGB", (2, 2)).save(path, "JPEG")
    refused(folder, r"one\.png is not a complete PNG image \(")


def test_a_shard_that_is_missing_or_stale_is_refused(folder):
    last = make_shards(folder)[1]
    content = (folder / last).read_bytes()
    (folder / last).unlink()
    refused(folder, f"incomplete, {last} is missing")
    (folder / last).write_bytes(content)
    (folder / "model.safetensors").write_bytes(content)
    refused(folder, r"model\.safetensors is not named in")
    (folder / "model.safetensors.index.json").write_text("{}")
    refused(folder, "expected a weight_map, got None")


def test_an_adapter_needs_no_other_weights_but_a_model_does(folder):
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    refused(folder, r"incomplete, model\.safetensors is missing")
    (folder / "adapter_model.safetensors").write_bytes(weights)
    assert push(folder, "tester/owl", dry_run=True).files


def test_remote_code_is_the_package_s_own_and_whole(folder):
    ours = PACKAGE / "modeling" / "configuration_mplug_owl2.py"
    config = {
        "model_type": "mplug_owl2",
        "auto_map": {"AutoConfig": "configuration_mplug_owl2.MplugOwl2Config"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, r"the code files configuration_mplug_owl2\.py")
    (folder / ours.name).write_bytes(ours.read_bytes())
    sibling = ours.with_name("compatibility_mplug_owl2.py")
    refused(folder, r"the code files compatibility_mplug_owl2\.py")
    (folder / sibling.name).write_bytes(sibling.read_bytes())
    assert push(folder, "tester/owl", dry_run=True).files
    (folder / ours.name).write_bytes(ours.read_bytes() + b"import os\n")
    refused(folder, r"configuration_mplug_owl2\.py differs from the package's file")
    (folder / ours.name).write_bytes(ours.read_bytes())
    config["auto_map"]["AutoConfig"] = "someone/else--configuration_mplug_owl2.MplugOwl2Config"
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, "the code files someone/else--configuration_mplug_owl2.py")


def test_a_folder_of_another_model_is_refused(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    refused(folder, "expected model_type 'mplug_owl2' in config.json, got 'llama'")
    (folder / "config.json").write_text("[]")
    refused(folder, "expected a JSON object, got list")
    (folder / "config.json").write_text("{")
    refused(folder, r"config\.json is not valid JSON")
    (folder / "config.json").unlink()
    refused(folder, r"expected a model folder with a config\.json, got none")
