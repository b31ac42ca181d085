"""Processor, generation settings and code of a converted folder."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoProcessor

from owl2_hf.conversion import convert

from .conftest import (
    assert_same_bits,
    command,
    edit_config,
    load_state,
    refused,
)


def test_machine_settings_are_not_converted(source, tmp_path):
    edit_config(
        source,
        attn_implementation="flash_attention_2",
        quantization_config={"quant_method": "bitsandbytes"},
    )
    command("convert", source, tmp_path / "target")
    kept = json.loads((tmp_path / "target" / "config.json").read_text())
    assert not {"attn_implementation", "quantization_config", "_attn_implementation"} & kept.keys()


def test_a_tokenizer_can_be_given_later(golden_dir, source, tmp_path):
    command("convert", source, tmp_path / "without")
    tokenizer = golden_dir("A") / "hf" / "tokenizer.model"
    command("convert", tmp_path / "without", tmp_path / "with", "--tokenizer", tokenizer)
    assert AutoProcessor.from_pretrained(tmp_path / "with").num_image_tokens == 9
    assert_same_bits(load_state(tmp_path / "without"), load_state(tmp_path / "with"))


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
