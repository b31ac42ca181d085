"""Conversion of folders in Hugging Face's layouts: to this package's format, to other dtypes, and
back.
"""

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from owl2_hf.conversion import ConversionError, convert
from owl2_hf.modeling import MplugOwl2Config, MplugOwl2ForConditionalGeneration
from owl2_hf.modeling.conversion_mplug_owl2 import (
    FUSED,
    RENAMED,
    merge_query_key_value,
    original_key,
    split_query_key_value,
    to_original,
    to_ours,
)

from .conftest import (
    NORM,
    assert_same_bits,
    command,
    drop,
    edit,
    edit_config,
    load_state,
    put,
    read_shards,
    refused,
)


def test_the_table_is_one_to_one():
    targets = [target for target in RENAMED.values() if target is not None]
    targets += [target for triple in FUSED.values() for target in triple]
    assert len(targets) == len(set(targets))
    assert not set(RENAMED) & set(FUSED)


def test_the_table_covers_the_published_model(golden_dir):
    """Every tensor of the published 7B model has its place, by name and shape, every place is
    filled, and back.
    """
    keys = golden_dir("A").parents[1] / "spec" / "keys" / "owl2.json"
    if not keys.is_file():
        pytest.skip("the key list of the published model is not here")
    config = MplugOwl2Config()
    with torch.device("meta"):
        expected = {
            key: value.shape
            for key, value in MplugOwl2ForConditionalGeneration(config).state_dict().items()
        }
        published = {
            key: torch.Size(shape) for key, (shape, _) in json.loads(keys.read_text()).items()
        }
        converted = {}
        for key, shape in published.items():
            converted.update(to_ours(key, torch.empty(shape), config))
    assert {name: value.shape for name, value in converted.items()} == expected
    back = {}
    for name in converted:
        key, parts = original_key(name)
        back[key] = to_original(key, {part: converted[part] for part in parts}, config).shape
    assert back == {key: shape for key, shape in published.items() if "inv_freq" not in key}


def test_fused_projections_are_interleaved_head_by_head():
    heads, head_dim, width = 3, 2, 6
    labels = torch.tensor(
        [
            [head * 100 + part * 10 + d for d in range(head_dim)]
            for head in range(heads)
            for part in range(3)
        ]
    )
    fused = labels.reshape(-1, 1).expand(-1, width)
    query, key, value = split_query_key_value(fused, heads)
    assert query[:, 0].tolist() == [0, 1, 100, 101, 200, 201]
    assert key[:, 0].tolist() == [10, 11, 110, 111, 210, 211]
    assert value[:, 0].tolist() == [20, 21, 120, 121, 220, 221]
    assert torch.equal(merge_query_key_value([query, key, value], heads), fused)


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
def test_honest_oddities_of_pickles_are_read(source, tmp_path, legacy_format):
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_dtype_of_the_weights_is_kept(source, tmp_path, dtype):
    edit(
        source,
        lambda tensors: tensors.update({key: value.to(dtype) for key, value in tensors.items()}),
    )
    report = convert(source, tmp_path / "target")
    assert MplugOwl2ForConditionalGeneration.from_pretrained(tmp_path / "target").dtype == dtype
    assert report.dtype == str(dtype).removeprefix("torch.") and not report.casts


def test_a_dtype_is_cast_on_request_but_not_the_tables(source, tmp_path):
    command("convert", source, tmp_path / "target", "--dtype", "bfloat16")
    before = load_state(source)
    after = load_file(tmp_path / "target" / "model.safetensors")
    for key, tensor in before.items():
        expected = tensor if key.endswith("_pos_embed") else tensor.bfloat16()
        assert after[key].dtype == expected.dtype and torch.equal(after[key], expected), key
    report = json.loads((tmp_path / "target" / "conversion_report.json").read_text())
    assert report["casts"] == {"float32 -> bfloat16": len(before) - 4}
    assert json.loads((tmp_path / "target" / "config.json").read_text())["dtype"] == "bfloat16"


def test_values_too_large_for_a_dtype_are_refused(source, tmp_path):
    edit(source, put(NORM, torch.full((64,), 1e5)))
    line = refused("convert", source, tmp_path / "target", "--dtype", "float16")
    assert "'model.norm.weight': its values are too large for float16" in line
    assert not (tmp_path / "target").exists()


def test_tables_are_rebuilt_and_rotary_buffers_dropped(source, tmp_path):
    reference = convert(source, tmp_path / "reference")
    rotary = "model.layers.0.self_attn.rotary_emb.inv_freq"

    def without_tables(tensors):
        for key in [key for key in tensors if key.endswith("_pos_embed")]:
            del tensors[key]
        tensors[rotary] = torch.ones(8)

    edit(source, without_tables)
    report = convert(source, tmp_path / "target")
    assert report.rebuilt and not reference.rebuilt
    assert report.dropped[rotary] == "the model computes it"
    assert_same_bits(load_state(tmp_path / "reference"), load_state(tmp_path / "target"))


def test_tables_rounded_by_training_are_kept(source, tmp_path):
    key = "model.visual_abstractor.encoder.layers.0.crossattention.attention.q_pos_embed"
    edit(source, lambda tensors: tensors.update({key: tensors[key].bfloat16()}))
    convert(source, tmp_path / "target")
    kept = load_file(tmp_path / "target" / "model.safetensors")[
        "model.visual_abstractor.layers.0.cross_attn.q_pos_embed"
    ]
    assert kept.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            drop("model.layers.1.self_attn.k_proj.multiway.1.weight"),
            r"lacks 1 parameters.*layers\.1.*k_proj\.multiway\.1",
        ),
        (
            put("model.layers.0.mlp.extra.weight", torch.ones(2)),
            r"'model\.layers\.0\.mlp\.extra\.weight'.*no such",
        ),
        (put("model.layers.9.mlp.up_proj.weight", torch.ones(2)), "configuration has no place"),
        (put(NORM, torch.ones(63)), r"'model\.norm\.weight': expected shape \(64,\).*got \(63,\)"),
        (
            put("model.layers.0.mlp.up_proj.weight", torch.ones(64, 96)),
            r"expected shape \(\d+, 64\).*got \(64, 96\)",
        ),
        (
            put("model.embed_tokens.weight", torch.ones(999, 64)),
            r"expected 1000 rows \(vocab_size\), got 999",
        ),
        (
            put("model.embed_tokens.weight", torch.tensor(1.0)),
            "expected 1000 rows .* got a single number",
        ),
        (
            put(
                "model.vision_model.encoder.layers.0.self_attn.query_key_value.bias", torch.ones(9)
            ),
            "expected 144 rows",
        ),
        (put(NORM, torch.full((64,), float("nan"))), "64 values are NaN or infinite"),
        (put(NORM, torch.tensor([float("inf")] + [1.0] * 63)), "1 values are NaN or infinite"),
        (
            put(NORM, torch.ones(64, dtype=torch.long)),
            r"floating-point weights of .*, got torch\.int64",
        ),
        (
            put(NORM, torch.ones(64, dtype=torch.complex64)),
            r"floating-point weights of .*, got torch\.complex64",
        ),
        (
            put(NORM, torch.ones(64).to_sparse()),
            "expected a dense tensor with values, got a sparse_coo one",
        ),
        (put(NORM, [1.0]), "expected a tensor, got list"),
        (put(7, torch.ones(64)), "expected names of tensors, got 7"),
        (put("x" * 600, torch.ones(64)), "expected names of tensors, got 'xxx"),
    ],
)
def test_a_wrong_tensor_is_named_and_nothing_is_left(source, tmp_path, change, message):
    edit(source, change)
    with pytest.raises(ConversionError, match=message) as caught:
        convert(source, tmp_path / "target")
    assert str(source) in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_nan_and_infinity_pass_on_request_and_are_counted(source, tmp_path):
    edit(source, put(NORM, torch.tensor([float("nan"), float("inf")] + [1.0] * 62)))
    assert "--allow-nonfinite" in refused("convert", source, tmp_path / "target")
    command("convert", source, tmp_path / "target", "--allow-nonfinite")
    report = json.loads((tmp_path / "target" / "conversion_report.json").read_text())
    assert report["nonfinite"] == {"model.language_model.norm.weight": 2}


def test_a_tensor_in_two_files_is_refused(source, tmp_path):
    tensors = torch.load(source / "pytorch_model.bin", weights_only=True)
    (source / "pytorch_model.bin").unlink()
    shard(tensors, source, 2, "pytorch_model-{}-of-{}.bin", torch.save)
    second = torch.load(source / "pytorch_model-2-of-2.bin", weights_only=True)
    key = next(iter(torch.load(source / "pytorch_model-1-of-2.bin", weights_only=True)))
    torch.save({**second, key: tensors[key]}, source / "pytorch_model-2-of-2.bin")
    with pytest.raises(
        ConversionError, match=r"-2-of-2\.bin, tensor .*: it came before, as .*-1-of-2\.bin"
    ):
        convert(source, tmp_path / "target")


def test_the_source_must_be_a_checkpoint_of_the_original(source, tmp_path):
    assert "is not a folder" in refused("convert", tmp_path / "nowhere", tmp_path / "target")
    edit_config(source, hidden_size=65)
    assert "hidden size (65)" in refused("convert", source, tmp_path / "target")
    edit_config(source, model_type="llama")
    assert (
        "expected model_type 'mplug_owl2' or 'mplug_owl2_1' or 'mplug_docowl', got 'llama'"
        in refused("convert", source, tmp_path / "target")
    )
    (source / "config.json").write_text("{")
    assert "not valid JSON" in refused("convert", source, tmp_path / "target")
    (source / "config.json").unlink()
    assert "config.json is missing" in refused("convert", source, tmp_path / "target")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"hidden_size": 2**31}, "hidden_size is 2147483648"),
        ({"vocab_size": -1}, "vocab_size is -1"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"num_hidden_layers": 2}, "configuration has no place"),
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


def test_what_only_fits_another_machine_is_not_carried_over(source, tmp_path):
    edit_config(
        source,
        attn_implementation="flash_attention_2",
        quantization_config={"quant_method": "bitsandbytes"},
    )
    command("convert", source, tmp_path / "target")
    kept = json.loads((tmp_path / "target" / "config.json").read_text())
    assert not {"attn_implementation", "quantization_config", "_attn_implementation"} & kept.keys()


def test_deep_json_is_refused(source, tmp_path):
    (source / "config.json").write_text('{"a":' * 5000 + "1" + "}" * 5000)
    assert "config.json is not valid JSON" in refused("convert", source, tmp_path / "target")


@pytest.mark.parametrize("is_same", [True, False])
def test_a_head_that_is_said_to_be_tied_is_compared(source, tmp_path, is_same):
    def tie(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone() + (not is_same)

    edit(source, tie)
    edit_config(source, tie_word_embeddings=True)
    command("convert", source, tmp_path / "target")
    assert (
        json.loads((tmp_path / "target" / "config.json").read_text())["tie_word_embeddings"]
        is is_same
    )
    assert ("lm_head.weight" in load_file(tmp_path / "target" / "model.safetensors")) is not is_same
    direct, converted = load_state(source), load_state(tmp_path / "target")
    assert torch.equal(direct["lm_head.weight"], converted["lm_head.weight"])
    command("verify", tmp_path / "target", "--against", source)


def test_mixed_types_lose_nothing_on_loading(source, tmp_path):
    def halve(tensors):
        for key in list(tensors)[::2]:
            tensors[key] = tensors[key].bfloat16()

    edit(source, halve)
    command("convert", source, tmp_path / "target")
    assert_same_bits(load_state(source), load_state(tmp_path / "target"))


def test_a_tokenizer_can_be_given_later(golden_dir, source, tmp_path):
    command("convert", source, tmp_path / "without")
    tokenizer = golden_dir("A") / "hf" / "tokenizer.model"
    command("convert", tmp_path / "without", tmp_path / "with", "--tokenizer", tokenizer)
    assert AutoProcessor.from_pretrained(tmp_path / "with").num_image_tokens == 9
    assert_same_bits(load_state(tmp_path / "without"), load_state(tmp_path / "with"))


@pytest.mark.parametrize("size", ["abc", "0", "-1GB", "5GiB"])
def test_a_shard_size_is_a_size(source, tmp_path, size):
    assert "expected a max_shard_size" in refused(
        "convert", source, tmp_path / "target", f"--max-shard-size={size}"
    )


def test_a_tokenizer_json_goes_there_and_back(golden_dir, tmp_path):
    command("convert", golden_dir("A") / "hf", tmp_path / "ours")
    (tmp_path / "ours" / "tokenizer.model").unlink()
    command("convert", tmp_path / "ours", tmp_path / "original", "--to", "original")
    command("convert", tmp_path / "original", tmp_path / "again")
    before, after = (AutoProcessor.from_pretrained(tmp_path / name) for name in ("ours", "again"))
    assert before(text="Hello</s> there")["input_ids"] == after(text="Hello</s> there")["input_ids"]


@pytest.mark.parametrize(
    ("key", "value"),
    [("image_mean", [1]), ("image_std", [0, 0, 0]), ("image_std", "x"), ("resample", "bicubic")],
)
def test_preprocessing_that_cannot_work_is_refused(golden_dir, tmp_path, key, value):
    source = tmp_path / "source"
    shutil.copytree(golden_dir("A") / "hf", source)
    path = source / "preprocessor_config.json"
    path.chmod(0o644)
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    line = refused("convert", source, tmp_path / "target")
    assert "preprocessor_config.json" in line and key in line


def test_generation_settings_are_taken_as_far_as_they_are_sound(golden_dir, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(golden_dir("A") / "hf", source)
    path = source / "generation_config.json"
    path.chmod(0o644)
    for content in (
        '{"min_p": 0.1, "custom_generate": "evil/repo", "temperature": "hot", "max_new_tokens": 7}',
        "{",
        "[]",
    ):
        path.write_text(content)
        command("convert", source, tmp_path / "target", "--overwrite")
        saved = json.loads((tmp_path / "target" / "generation_config.json").read_text())
        assert (
            saved["eos_token_id"] == 2
            and not {"min_p", "custom_generate", "temperature"} & saved.keys()
        )


def test_a_source_without_weights_is_refused(source, tmp_path):
    (source / "pytorch_model.bin").unlink()
    with pytest.raises(ConversionError, match="holds no weights"):
        convert(source, tmp_path / "target")


def test_options_that_make_no_sense_are_refused(source, tmp_path):
    assert "needs no --base" in refused("convert", source, tmp_path / "target", "--base", source)
    assert "only a LoRA fine-tune becomes" in refused(
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


def test_the_family_keeps_its_settings(golden_dir, tmp_path):
    """DeQA-Score's training writes keys of its own; Q-Align's configurations lack the newer
    switches.
    """
    source = tmp_path / "source"
    shutil.copytree(golden_dir("A") / "hf", source)
    (source / "config.json").chmod(0o644)
    config = json.loads((source / "config.json").read_text())
    for part, names in (
        ("visual_model", ("use_cls_token", "use_post_layernorm")),
        ("visual_abstractor", ("use_cls_token", "add_v2t_pos_emb")),
    ):
        for name in names:
            del config["visual_config"][part][name]
    extra = {
        "level_prefix": [1, 2],
        "weight_softkl": 1.0,
        "softkl_loss": True,
        "image_aspect_ratio": "pad",
    }
    auto_map = {"AutoModelForCausalLM": "modeling_mplug_owl2.MPLUGOwl2LlamaForCausalLM"}
    (source / "config.json").write_text(
        json.dumps({**config, **extra, "attention_dropout": 0.0, "auto_map": auto_map})
    )
    (source / "modeling_mplug_owl2.py").write_text("raise RuntimeError('ran')\n")
    command("convert", source, tmp_path / "target")
    kept = json.loads((tmp_path / "target" / "config.json").read_text())
    assert {key: kept[key] for key in extra} == extra
    assert "MPLUGOwl2LlamaForCausalLM" not in json.dumps(kept)
    assert "RuntimeError('ran')" not in (tmp_path / "target" / "modeling_mplug_owl2.py").read_text()
    assert (
        AutoProcessor.from_pretrained(tmp_path / "target").image_processor.image_aspect_ratio
        == "pad"
    )
    convert(golden_dir("A") / "hf", tmp_path / "plain")
    assert_same_bits(load_state(tmp_path / "plain"), load_state(tmp_path / "target"))


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
        (None, {"image_token_id": 5}, "no image_token_id 5: it would read 1000"),
        (
            "abstractor_config",
            {"block_norm_eps": 1e-3},
            "no block_norm_eps 0.001: it would read 1e-05",
        ),
        (
            "text_config",
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}},
            "rope",
        ),
    ],
)
def test_what_the_original_has_no_word_for_does_not_go_back(
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


def test_token_ids_stay_exact_over_three_rounds_of_saving(golden_dir, tmp_path):
    source = golden_dir("A") / "hf"
    command("convert", source, tmp_path / "0")
    for before, after in itertools.pairwise(["0", "1", "2", "3"]):
        AutoProcessor.from_pretrained(tmp_path / before).save_pretrained(tmp_path / after)
    direct, last = (
        AutoProcessor.from_pretrained(source),
        AutoProcessor.from_pretrained(tmp_path / "3"),
    )
    prompts = json.loads((Path(__file__).parents[1] / "golden" / "T" / "ids.json").read_text())[
        "prompts"
    ]
    for text in prompts.values():
        if "<|image|>" not in text:
            assert last(text=text)["input_ids"] == direct(text=text)["input_ids"]


def test_settings_of_sampling_that_do_nothing_are_left_out(golden_dir, tmp_path):
    """transformers 5 refuses to save them; LLaMA-2's own files hold them."""
    source = tmp_path / "source"
    shutil.copytree(golden_dir("A") / "hf", source)
    (source / "generation_config.json").chmod(0o644)
    (source / "generation_config.json").write_text(
        json.dumps({"temperature": 0.9, "top_p": 0.6, "max_length": 4096})
    )
    command("convert", source, tmp_path / "target")
    saved = json.loads((tmp_path / "target" / "generation_config.json").read_text())
    assert "temperature" not in saved and saved["max_length"] == 4096
