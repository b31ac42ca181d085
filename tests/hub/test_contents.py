"""What stops a push inside a file: secrets, local paths, places."""

import json

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from safetensors.numpy import save_file

from owl2_hf.hub import push

from .conftest import CARD, refused


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
    assert secret not in refused(folder, f"{name} seems to contain {kind}")


@pytest.mark.parametrize(
    "value", ["/home/me/owl", "/Users/me/owl", "C:\\models\\owl", "/root/x", "file:///tmp/x"]
)
def test_a_path_of_this_machine_in_a_config_is_refused_by_its_key(folder, value):
    (folder / "config.json").write_text(
        json.dumps({"model_type": "mplug_owl2", "text_config": {"from": value}})
    )
    assert value not in refused(folder, r"config\.json: text_config\.from is a local path")


@pytest.mark.parametrize("value", ["/data/llama-7b", "../llama", "./a", "D:/models/a", "a/b/c"])
def test_a_local_path_as_the_name_of_a_model_is_refused(folder, value):
    (folder / "config.json").write_text(
        json.dumps({"model_type": "mplug_owl2", "text_config": {"_name_or_path": value}})
    )
    refused(folder, r"config\.json: text_config\._name_or_path is a local path")
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
    assert text not in refused(folder, rf"{name}: line 12 contains the path of a home folder")
    (folder / name).write_text(f"{CARD}\nhttps://host.org/home/x, ~/owl, path/home/owl, /tmp/owl\n")
    assert push(folder, "tester/owl", dry_run=True).files


def test_metadata_of_weights_keep_no_secrets(folder):
    def save(**metadata):
        save_file({"a": np.zeros(3, dtype=np.float32)}, folder / "model.safetensors", metadata)

    token = "hf_" + "a1B2" * 9
    save(format="pt", note=f"by {token}")
    assert token not in refused(folder, r"model\.safetensors seems to contain a Hugging Face token")
    save(wandb_api_key="abc")
    refused(folder, r"model\.safetensors: wandb_api_key in its metadata seems to be a secret")
    save(source="/home/me/owl")
    refused(folder, r"model\.safetensors: source in its metadata is a local path")
    save(format="pt")
    assert push(folder, "tester/owl", dry_run=True).files


@pytest.mark.parametrize("compressed", [False, True])
def test_texts_in_an_image_are_read(folder, compressed):
    path = folder / "pictures" / "one.png"
    token = "hf_" + "a1B2" * 9
    for text, match in (
        (f"by {token}", "one.png seems to contain a Hugging Face token"),
        ("/home/me/a", "contains a local path"),
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
    refused(folder, rf"two\.{suffix} contains the GPS position where it was taken")
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:li exif:GPSLatitude="50,1N"/></x:xmpmeta>'
    if suffix == "jpg":
        Image.new("RGB", (2, 2)).save(path, xmp=xmp)
    else:
        info = PngImagePlugin.PngInfo()
        info.add_itxt("XML:com.adobe.xmp", xmp.decode(), zip=True)
        Image.new("RGB", (2, 2)).save(path, pnginfo=info)
    refused(folder, rf"two\.{suffix} contains the GPS position where it was taken")


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
    refused(folder, r"README\.md does not exist: expected a model card")
