"""Dtypes, tables and values of a conversion, and tensors that are wrong."""

import json

import pytest
import torch
from safetensors.torch import load_file

from owl2_hf.conversion import ConversionError, convert
from owl2_hf.modeling import MplugOwl2ForConditionalGeneration

from .conftest import (
    NORM,
    assert_same_bits,
    command,
    drop,
    edit,
    edit_config,
    load_state,
    put,
    refused,
)


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
        (
            put("model.layers.9.mlp.up_proj.weight", torch.ones(2)),
            "model of config.json has no such parameter",
        ),
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


@pytest.mark.parametrize("is_same", [True, False])
def test_a_head_marked_as_tied_is_kept_if_it_differs(source, tmp_path, is_same):
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
