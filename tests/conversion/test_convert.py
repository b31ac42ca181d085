"""Conversion of folders in Hugging Face's layouts: to this package's format, to other dtypes, and
back.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from owl2_hf.conversion import ConversionError, convert
from owl2_hf.modeling import MplugOwl2Config, MplugOwl2ForConditionalGeneration

from .conftest import (
    NORM,
    assert_same_bits,
    command,
    edit_config,
    load_state,
    read_shards,
    refused,
)


def shard(tensors, folder, count, name, save):
    """The same tensors in `count` files with an index."""
    folder.mkdir(exist_ok=True)
    weight_map = {}
    keys = list(tensors)
    for index in range(count):
        part = keys[index::count]
        file = name.format(index + 1, count)
        save({key: tensors[key].contiguous() for key in part}, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    kind = "model.safetensors" if name.endswith("safetensors") else "pytorch_model.bin"
    (folder / f"{kind}.index.json").write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
    )


@pytest.mark.parametrize(
    ("name", "save"),
    [
        ("pytorch_model-{}-of-{}.bin", torch.save),
        ("pytorch_model-{:05}-of-{:05}.bin", torch.save),
        ("model-{:05}-of-{:05}.safetensors", save_file),
    ],
    ids=["bare numbers", "padded numbers", "safetensors"],
)
def test_every_form_of_the_files_gives_the_same_bits(source, tmp_path, name, save):
    command("convert", source, tmp_path / "one")
    tensors = torch.load(source / "pytorch_model.bin", weights_only=True)
    (source / "pytorch_model.bin").unlink()
    shard(tensors, source, 11, name, save)
    command("convert", source, tmp_path / "shards", "--max-shard-size", "200KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 5
    assert_same_bits(load_state(tmp_path / "one"), load_state(tmp_path / "shards"))


@pytest.mark.parametrize("legacy_format", [False, True])
def test_unusual_but_safe_pickles_convert(source, tmp_path, legacy_format):
    command("convert", source, tmp_path / "plain")

    def odd(tensors):
        table = torch.cat([tensors["lm_head.weight"], tensors["lm_head.weight"]])
        tensors["lm_head.weight"] = table[: len(table) // 2]  # part of a larger storage
        tensors["model.layers.0.mlp.up_proj.weight"] = (
            tensors["model.layers.0.mlp.up_proj.weight"].t().contiguous().t()
        )
        tensors[NORM] = torch.nn.Parameter(tensors[NORM])

    path = source / "pytorch_model.bin"
    tensors = torch.load(path, weights_only=True)
    odd(tensors)
    torch.save(tensors, path, _use_new_zipfile_serialization=not legacy_format)
    command("convert", source, tmp_path / "odd")
    assert_same_bits(
        load_file(tmp_path / "plain" / "model.safetensors"),
        load_file(tmp_path / "odd/model.safetensors"),
    )


def test_links_of_a_hub_cache_are_followed(source, tmp_path):
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for file in list(source.iterdir()):
        file.rename(blobs / file.name)
        file.symlink_to(blobs / file.name)
    command("convert", source, tmp_path / "target")
    assert (tmp_path / "target" / "model.safetensors").is_file()


def test_a_tensor_in_two_files_is_refused(source, tmp_path):
    tensors = torch.load(source / "pytorch_model.bin", weights_only=True)
    (source / "pytorch_model.bin").unlink()
    shard(tensors, source, 2, "pytorch_model-{}-of-{}.bin", torch.save)
    second = torch.load(source / "pytorch_model-2-of-2.bin", weights_only=True)
    key = next(iter(torch.load(source / "pytorch_model-1-of-2.bin", weights_only=True)))
    torch.save({**second, key: tensors[key]}, source / "pytorch_model-2-of-2.bin")
    with pytest.raises(
        ConversionError,
        match=r"-2-of-2\.bin, tensor .*: expected each tensor once, got it also in .*-1-of-2\.bin",
    ):
        convert(source, tmp_path / "target")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers from 1 to 1000, got 1000000000"),
        ({"hidden_size": 2**31}, "hidden_size from 1 to 1048576, got 2147483648"),
        ({"vocab_size": -1}, "vocab_size from 1 to 1048576, got -1"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"num_hidden_layers": 2}, "model of config.json has no such parameter"),
        ({"num_hidden_layers": 4}, "lacks"),
        ({"visual_config": {"visual_model": {}}}, "visual_config must hold"),
        ({"visual_config": []}, "visual_config must hold"),
        ({"hidden_size": "wide"}, "hidden_size"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(source, tmp_path, values, message):
    edit_config(source, **values)
    assert message in refused("convert", source, tmp_path / "target")
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize(
    "values",
    [
        {"hidden_act": "no_such_function"},
        {"rope_scaling": {"type": "evil"}},
        {"rope_theta": "x"},
        {"pad_token_id": 99999},
        {"torch_dtype": "load"},
        {"save_pretrained": "x"},
        {"vocab_size": None},
    ],
)
def test_settings_that_no_model_has_end_in_one_line(source, tmp_path, values):
    edit_config(source, **values)
    assert f"{source}/config.json: " in refused("convert", source, tmp_path / "target")


def test_deep_json_is_refused(source, tmp_path):
    (source / "config.json").write_text('{"a":' * 5000 + "1" + "}" * 5000)
    assert "config.json is not valid JSON" in refused("convert", source, tmp_path / "target")


@pytest.mark.parametrize("size", ["abc", "0", "-1GB", "5GiB"])
def test_a_shard_size_is_a_size(source, tmp_path, size):
    assert "expected a max_shard_size" in refused(
        "convert", source, tmp_path / "target", f"--max-shard-size={size}"
    )


def test_options_that_make_no_sense_are_refused(source, tmp_path):
    assert "leave --base out" in refused("convert", source, tmp_path / "target", "--base", source)
    assert "expected a LoRA fine-tune" in refused(
        "convert", source, tmp_path / "target", "--to", "adapter"
    )
    with pytest.raises(
        ValueError, match="expected one of ours, original, adapter to convert to, got 'theirs'"
    ):
        convert(source, tmp_path / "target", to="theirs")
    with pytest.raises(
        ValueError, match="expected a dtype of float32, float16, bfloat16, got 'int8'"
    ):
        convert(source, tmp_path / "target", dtype="int8")


def test_our_own_format_is_left_alone(golden_dir, tmp_path):
    command("convert", golden_dir("A") / "hf", tmp_path / "ours")
    result = command("convert", tmp_path / "ours", tmp_path / "again")
    assert "already: nothing to convert" in result.stdout
    assert not (tmp_path / "again").exists()
    command("convert", tmp_path / "ours", tmp_path / "half", "--dtype", "float16")
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "half").dtype == torch.float16
    assert AutoProcessor.from_pretrained(tmp_path / "half").num_image_tokens == 9


@pytest.mark.parametrize("name", ["A", "B", "C", "C2", "S"])
def test_there_and_back_is_bit_exact(golden_dir, tmp_path, name):
    source = golden_dir(name) / "hf"
    command("convert", source, tmp_path / "ours")
    command(
        "convert",
        tmp_path / "ours",
        tmp_path / "original",
        "--to",
        "original",
        "--max-shard-size",
        "300KB",
    )
    assert len(list((tmp_path / "original").glob("model-*.safetensors"))) > 1
    back = {}
    for file in (tmp_path / "original").glob("*.safetensors"):
        back.update(load_file(file))
    expected = {key: tensor for key, tensor in read_shards(source).items() if "inv_freq" not in key}
    assert_same_bits(expected, {key: back[key] for key in expected})
    assert all(key.endswith("_pos_embed") for key in back.keys() - expected.keys())
    command("convert", tmp_path / "original", tmp_path / "again")
    assert_same_bits(load_state(tmp_path / "ours"), load_state(tmp_path / "again"))
    before, after = (
        json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("ours", "again")
    )
    assert before == after


def test_the_way_back_writes_what_the_originals_code_reads(golden_dir, tmp_path):
    source = golden_dir("A") / "hf"
    command("convert", source, tmp_path / "ours")
    command("convert", tmp_path / "ours", tmp_path / "original", "--to", "original")
    written = {
        name: json.loads((tmp_path / "original" / name).read_text())
        for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json")
    }
    read = {name: json.loads((source / name).read_text()) for name in written}
    # The original dumps defaults of transformers 4 into the parts of its configuration; they say
    # nothing.
    for part in ("visual_model", "visual_abstractor"):
        mine, theirs = (values["config.json"]["visual_config"][part] for values in (written, read))
        assert {key: mine[key] for key in theirs.keys() & mine.keys()} == {
            key: theirs[key] for key in theirs.keys() & mine
        }
        assert {
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "layer_norm_eps",
            "model_type",
        } <= mine.keys()
    flat = {
        key: value
        for key, value in read["config.json"].items()
        if key not in ("visual_config", "_name_or_path")
    }
    assert {key: written["config.json"].get(key) for key in flat} == flat
    preprocessing = read["preprocessor_config.json"]
    assert {
        key: written["preprocessor_config.json"].get(key) for key in preprocessing
    } == preprocessing
    assert (tmp_path / "original" / "tokenizer.model").read_bytes() == (
        source / "tokenizer.model"
    ).read_bytes()
    assert written["tokenizer_config.json"]["legacy"] == read["tokenizer_config.json"].get(
        "legacy", True
    )


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        (None, {"image_token_id": 5}, "image_token_id 5, only 1000"),
        (
            "abstractor_config",
            {"block_norm_eps": 1e-3},
            "block_norm_eps 0.001, only 1e-05",
        ),
        (
            "text_config",
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}},
            "rope",
        ),
    ],
)
def test_settings_that_the_original_lacks_are_refused_with_to_original(
    golden_dir, tmp_path, part, values, message
):
    command("convert", golden_dir("A") / "hf", tmp_path / "ours")
    if part is not None:
        config = json.loads((tmp_path / "ours" / "config.json").read_text())
        values = {part: {**config[part], **values}}
    edit_config(tmp_path / "ours", **values)
    assert message in refused(
        "convert", tmp_path / "ours", tmp_path / "original", "--to", "original"
    )
    assert not (tmp_path / "original").exists()


def test_fresh_models_go_there_and_back(tmp_path, golden_dir):
    """Rows without a token are zeros from the start, since the original has none of them."""
    command("convert", golden_dir("A") / "hf", tmp_path / "ours")
    config = MplugOwl2Config.from_pretrained(tmp_path / "ours")
    model = MplugOwl2ForConditionalGeneration(config)
    model.save_pretrained(tmp_path / "fresh")
    command("convert", tmp_path / "fresh", tmp_path / "original", "--to", "original")
    command("convert", tmp_path / "original", tmp_path / "again")
    assert_same_bits(model.state_dict(), load_state(tmp_path / "again"))


def test_a_converted_folder_holds_all_that_others_need(golden_dir, tmp_path):
    source = golden_dir("A") / "hf"
    command("convert", source, tmp_path / "target")
    names = {path.name for path in (tmp_path / "target").iterdir()}
    assert names >= {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "conversion_report.json",
        "generation_config.json",
        "model.safetensors",
        "modeling_mplug_owl2.py",
        "processing_mplug_owl2.py",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer.model",
    }
    assert not any(name.startswith(".") for name in names)
    card = (tmp_path / "target" / "README.md").read_text()
    assert "| Parameters | 362,016 in 133 tensors, float32 |" in card
    assert "<!-- facts -->" not in card


def test_the_report_says_what_was_done(golden_dir, tmp_path):
    import hashlib

    source = golden_dir("A") / "hf"
    printed = json.loads(command("convert", source, tmp_path / "target", "--json").stdout)
    report = json.loads((tmp_path / "target" / "conversion_report.json").read_text())
    assert printed == report
    shards = sorted(source.glob("*.bin"))
    assert list(report["files"]) == [path.name for path in shards]
    for path in shards:
        assert report["files"][path.name]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert report["num_tensors_read"] == len(read_shards(source))
    assert set(report["versions"]) == {"owl2_hf", "torch", "transformers", "safetensors"}
    assert str(tmp_path) not in json.dumps(report)


def test_equal_conversions_give_equal_files(golden_dir, tmp_path):
    for name in ("first", "second"):
        command("convert", golden_dir("A") / "hf", tmp_path / name / "model")
    files = [
        sorted(path.relative_to(tmp_path / name) for path in (tmp_path / name).rglob("*"))
        for name in ("first", "second")
    ]
    assert files[0] == files[1]
    for file in files[0]:
        if (tmp_path / "first" / file).is_file():
            assert (tmp_path / "first" / file).read_bytes() == (
                tmp_path / "second" / file
            ).read_bytes(), file
