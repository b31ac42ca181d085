"""`owl2-hf verify` says ok only of a folder that is."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from .conftest import command, edit_config, refused


@pytest.fixture
def converted(golden_dir, tmp_path):
    command("convert", golden_dir("A") / "hf", tmp_path / "converted")
    return tmp_path / "converted"


def test_a_good_folder_is_ok(converted, golden_dir):
    result = command("verify", converted, "--against", golden_dir("A") / "hf")
    assert result.stdout.splitlines()[-1] == "ok"
    assert "133 tensors equal the source's, bit for bit" in result.stdout
    assert "logits of a prompt with an image equal the source's, to " in result.stdout
    checks = json.loads(command("verify", converted, "--json").stdout)
    assert checks["ok"] is True and len(checks["checks"]) == 5


def test_other_layouts_are_compared_too(golden_dir, tmp_path):
    golden = golden_dir("F")
    command("convert", golden / "megatron_iter", tmp_path / "F", "--base", golden / "tiny_config")
    result = command(
        "verify",
        tmp_path / "F",
        "--against",
        golden / "megatron_iter",
        "--base",
        golden / "tiny_config",
    )
    assert "946 tensors equal the source's, bit for bit; 12 tables are computed" in result.stdout
    assert "logits were not compared" in result.stdout
    golden = golden_dir("G")
    command(
        "convert", golden / "mplug_owl2_lora", tmp_path / "G", "--base", golden / "mplug_owl2_base"
    )
    command(
        "verify",
        tmp_path / "G",
        "--against",
        golden / "mplug_owl2_lora",
        "--base",
        golden / "mplug_owl2_base",
    )
    line = refused("verify", tmp_path / "G", "--against", golden / "mplug_owl2_base")
    assert "its values differ from" in line


def change(converted, function):
    path = converted / "model.safetensors"
    tensors = load_file(path)
    function(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


NORM = "model.language_model.norm.weight"


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda tensors: tensors.pop(NORM), f"lacks 1 parameters, the first is {NORM}"),
        (
            lambda tensors: tensors.update({"extra": torch.ones(1)}),
            "'extra': the model of config.json has no such parameter",
        ),
        (lambda tensors: tensors.update({NORM: torch.ones(5)}), r"expected shape (64,), got (5,)"),
        (lambda tensors: tensors[NORM].fill_(float("nan")), "NaN or infinite"),
    ],
)
def test_wrong_weights_are_named(converted, function, message):
    change(converted, function)
    assert message in refused("verify", converted)


def test_one_changed_value_shows_against_the_source(converted, golden_dir):
    def nudge(tensors):
        tensors[NORM][3] += 1e-6

    change(converted, nudge)
    command("verify", converted)
    line = refused("verify", converted, "--against", golden_dir("A") / "hf")
    assert "'model.norm.weight': its values differ from model.language_model.norm.weight" in line


def test_a_setting_that_changes_the_logits_is_found(converted, golden_dir):
    config = json.loads((converted / "config.json").read_text())
    config["text_config"]["rms_norm_eps"] = 0.1
    (converted / "config.json").write_text(json.dumps(config))
    line = refused("verify", converted, "--against", golden_dir("A") / "hf")
    assert "the logits of a prompt with an image differ from the source's by up to" in line


def test_a_processor_that_does_not_fit_is_named(converted):
    path = converted / "processor_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "num_image_tokens": 65}))
    assert "expected the positions of an image 9 of the model, got 65" in refused(
        "verify", converted
    )
    path.write_text("{")
    assert "cannot be loaded" in refused("verify", converted)


def test_a_tokenizer_that_does_not_fit_is_named(converted):
    path = converted / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["decoder"]["decoders"][0]["content"] = "_"
    path.write_text(json.dumps(tokenizer))
    assert "the tokenizer: expected" in refused("verify", converted)


def test_a_configuration_that_does_not_fit_is_named(converted):
    config = json.loads((converted / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 4
    edit_config(converted, **config)
    assert "lacks" in refused("verify", converted)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("modeling_mplug_owl2.py", "raise SystemExit(7)", "differs from the package's file"),
        ("chat_template.jinja", "{% if %}", "chat template cannot be rendered"),
        ("chat_template.jinja", "{{ 'Hi' }}", "got 'Hi'"),
        ("tokenizer_config.json", "[]", "cannot be loaded"),
        ("processor_config.json", "[]", "cannot be loaded"),
        ("generation_config.json", "{", "generation_config.json"),
    ],
)
def test_spoiled_files_beside_the_weights_are_named(converted, name, content, message):
    (converted / name).write_text(content)
    assert message in refused("verify", converted)


def test_code_that_a_folder_names_does_not_run(converted, tmp_path):
    (converted / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    for name in ("tokenizer_config.json", "processor_config.json"):
        values = json.loads((converted / name).read_text())
        auto_map = {
            "AutoTokenizer": ["evil.T", "evil.T"],
            "AutoProcessor": "evil.P",
            "AutoImageProcessor": "evil.I",
        }
        (converted / name).write_text(
            json.dumps({**values, "auto_map": auto_map, "tokenizer_class": "T"})
        )
    refused("verify", converted)
    assert not (tmp_path / "ran").exists()


def test_only_our_format_is_verified(golden_dir, tmp_path):
    assert "convert it first" in refused("verify", golden_dir("A") / "hf")
    assert "is not a folder" in refused("verify", tmp_path / "nowhere")
