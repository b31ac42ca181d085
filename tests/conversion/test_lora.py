"""LoRA fine-tunes of the original's training code: merged, or as an adapter of today's PEFT."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from owl2_hf.conversion.lora import load_non_lora
from owl2_hf.modeling import MplugOwl2ForConditionalGeneration

from ..original import expand_markers
from .conftest import assert_same_bits, command, halve, load_state, refused, rewrite


@pytest.fixture
def golden(golden_dir):
    return golden_dir("G")


@pytest.fixture
def tune(golden, tmp_path):
    """A copy of the fine-tune under a name that says nothing."""
    folder = tmp_path / "a-name"
    shutil.copytree(golden / "mplug_owl2_lora", folder)
    for file in folder.iterdir():
        file.chmod(0o644)
    return folder


def check_numbers(model, golden):
    cases = load_file(golden / "cases.safetensors")
    inputs = expand_markers(cases["merged_fp32/input_ids"], model.config)
    inputs["pixel_values"] = cases["merged_fp32/images"].reshape(-1, 3, 28, 28)
    with torch.no_grad():
        logits = model(**inputs).logits[..., :1000]
    expected = cases["merged_fp32/logits"]
    assert (logits - expected).abs().max() / expected.abs().max() < 1e-5
    new_ids = cases["merged_fp32_generate/new_ids"]
    output = model.generate(**inputs, max_new_tokens=new_ids.shape[1], do_sample=False)
    assert output[:, inputs["input_ids"].shape[1] :].tolist() == new_ids.tolist()


@pytest.mark.parametrize("base_layout", ["original", "ours"])
def test_a_merged_fine_tune_gives_the_originals_numbers(golden, tune, tmp_path, base_layout):
    base = golden / "mplug_owl2_base"
    if base_layout == "ours":
        command("convert", base, tmp_path / "base")
        base = tmp_path / "base"
    command("convert", tune, tmp_path / "target", "--base", base)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "target").eval()
    check_numbers(model, golden)
    expected = load_file(golden / "cases.safetensors")[
        "merged_weight/model.layers.0.self_attn.k_proj.multiway.1.weight"
    ]
    merged = model.model.language_model.layers[0].self_attn.visual_k_proj.weight
    assert (merged - expected).abs().max() < 1e-6
    assert (
        AutoProcessor.from_pretrained(tmp_path / "target").image_processor.image_aspect_ratio
        == "pad"
    )


def test_an_adapter_for_peft_gives_the_originals_numbers(golden, tune, tmp_path):
    command("convert", golden / "mplug_owl2_base", tmp_path / "base")
    command("convert", tune, tmp_path / "adapter", "--base", tmp_path / "base", "--to", "adapter")
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "conversion_report.json",
        "non_lora_trainables.safetensors",
    }
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
    load_non_lora(model, tmp_path / "adapter")
    adapted = PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    loaded = {key: value for key, value in adapted.state_dict().items() if "lora_" in key}
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(loaded) == len(saved) == 36
    assert all(
        torch.equal(loaded[key.replace(".weight", ".default.weight")], value)
        for key, value in saved.items()
    )
    check_numbers(adapted, golden)
    check_numbers(adapted.merge_and_unload(), golden)


def test_the_merged_fine_tune_goes_to_the_originals_layout_too(golden, tune, tmp_path):
    base = golden / "mplug_owl2_base"
    command("convert", tune, tmp_path / "merged", "--base", base)
    command("convert", tune, tmp_path / "original", "--base", base, "--to", "original")
    assert_same_bits(load_state(tmp_path / "merged"), load_state(tmp_path / "original"))
    assert (
        json.loads((tmp_path / "original" / "config.json").read_text())["image_aspect_ratio"]
        == "pad"
    )


def test_the_names_of_q_aligns_training_are_read(golden, tune, tmp_path):
    """It strips PEFT's prefix on saving, and trains the vision side beside the adapter."""
    others = torch.load(tune / "non_lora_trainables.bin", weights_only=True)
    stripped = {key.removeprefix("base_model.model."): value for key, value in others.items()}
    torch.save(stripped, tune / "non_lora_trainables.bin")
    command("convert", tune, tmp_path / "stripped", "--base", golden / "mplug_owl2_base")
    command(
        "convert",
        golden / "mplug_owl2_lora",
        tmp_path / "target",
        "--base",
        golden / "mplug_owl2_base",
    )
    assert_same_bits(load_state(tmp_path / "target"), load_state(tmp_path / "stripped"))
    key = "base_model.model.model.vision_model.encoder.layers.0.self_attn.query_key_value.weight"
    base = MplugOwl2ForConditionalGeneration.from_pretrained(golden / "mplug_owl2_base")
    torch.save({key: torch.full((96, 32), 0.5)}, tune / "non_lora_trainables.bin")
    command("convert", tune, tmp_path / "vision", "--base", golden / "mplug_owl2_base")
    changed = load_state(tmp_path / "vision")
    assert (changed["model.vision_tower.layers.0.self_attn.v_proj.weight"] == 0.5).all()
    untouched = "model.visual_abstractor.visual_fc.weight"
    assert torch.equal(changed[untouched], base.state_dict()[untouched])


def test_a_lora_update_of_a_fused_projection_is_split(golden, tune, tmp_path):
    torch.manual_seed(0)
    module = "model.vision_model.encoder.layers.0.self_attn.query_key_value"
    down, up = torch.randn(4, 32), torch.randn(96, 4)
    adapter = {
        f"base_model.model.{module}.lora_A.weight": down,
        f"base_model.model.{module}.lora_B.weight": up,
    }
    torch.save(adapter, tune / "adapter_model.bin")
    (tune / "non_lora_trainables.bin").unlink()
    command(
        "convert",
        tune,
        tmp_path / "target",
        "--base",
        golden / "mplug_owl2_base",
        "--to",
        "original",
    )
    merged = load_file(tmp_path / "target" / "model.safetensors")[f"{module}.weight"]
    command("convert", golden / "mplug_owl2_base", tmp_path / "base")
    command("convert", tmp_path / "base", tmp_path / "plain", "--to", "original")
    plain = load_file(tmp_path / "plain" / "model.safetensors")[f"{module}.weight"]
    torch.testing.assert_close(merged, plain + 2.0 * up @ down)
    command("convert", tune, tmp_path / "adapter", "--base", tmp_path / "base", "--to", "adapter")
    model = PeftModel.from_pretrained(
        AutoModelForImageTextToText.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    )
    attention = model.merge_and_unload().model.vision_tower.layers[0].self_attn
    reloaded = load_state(tmp_path / "target")
    for part in "qkv":
        expected = reloaded[f"model.vision_tower.layers.0.self_attn.{part}_proj.weight"]
        torch.testing.assert_close(getattr(attention, f"{part}_proj").weight.data, expected)


def settings(tune, **values):
    path = tune / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"peft_type": "IA3"}, "expected peft_type 'LORA', got 'IA3'"),
        ({"use_dora": True}, "expected use_dora False, got True"),
        ({"fan_in_fan_out": True}, "expected fan_in_fan_out False"),
        ({"r": 8}, "expected r 4, the rows of lora_A of model.layers.0.self_attn.q_proj, got 8"),
        ({"rank_pattern": {r"(\w+\.?)+#": 4}}, "expected names of modules in rank_pattern"),
        ({"rank_pattern": [4]}, "expected names of modules in rank_pattern"),
        ({"alpha_pattern": {"up_proj": None}}, "expected a positive alpha_pattern of up_proj"),
        ({"lora_alpha": float("nan")}, "expected a positive lora_alpha, got 'nan'"),
        ({"init_lora_weights": "pissa"}, "expected init_lora_weights True"),
        ({"r": 0}, "expected a positive r, got '0'"),
        ({"lora_alpha": "many"}, "expected a positive lora_alpha, got 'many'"),
    ],
)
def test_settings_that_would_change_the_sum_are_refused(golden, tune, tmp_path, values, message):
    settings(tune, **values)
    assert message in refused(
        "convert", tune, tmp_path / "target", "--base", golden / "mplug_owl2_base"
    )


@pytest.mark.parametrize(
    ("values", "factor"), [({"use_rslora": True}, 4.0), ({"alpha_pattern": {"up_proj": 2}}, 0.5)]
)
def test_the_scale_follows_the_settings(golden, tune, tmp_path, values, factor):
    (tune / "non_lora_trainables.bin").unlink()
    settings(tune, **values)
    command("convert", tune, tmp_path / "target", "--base", golden / "mplug_owl2_base")
    adapter = torch.load(tune / "adapter_model.bin", weights_only=True)
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_{}.weight"
    base = load_state(golden / "mplug_owl2_base")[
        "model.language_model.layers.1.mlp.up_proj.weight"
    ]
    expected = base + factor * adapter[name.format("B")] @ adapter[name.format("A")]
    merged = load_state(tmp_path / "target")["model.language_model.layers.1.mlp.up_proj.weight"]
    torch.testing.assert_close(merged, expected)
    command("convert", golden / "mplug_owl2_base", tmp_path / "base")
    command("convert", tune, tmp_path / "adapter", "--base", tmp_path / "base", "--to", "adapter")
    model = PeftModel.from_pretrained(
        AutoModelForImageTextToText.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    )
    torch.testing.assert_close(
        model.merge_and_unload().model.language_model.layers[1].mlp.up_proj.weight.data, merged
    )


def test_relative_and_absolute_folders_go_together(golden, tune, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command("convert", tune.name, "target", "--base", golden / "mplug_owl2_base")
    names = json.loads((tmp_path / "target" / "conversion_report.json").read_text())["files"]
    assert "a-name/adapter_model.bin" in names and not any("tmp" in name for name in names)


def test_options_that_an_adapter_cannot_have_are_refused(golden, tune, tmp_path):
    arguments = ["--base", golden / "mplug_owl2_base", "--to", "adapter", "--dtype", "float16"]
    assert "leave out --dtype" in refused("convert", tune, tmp_path / "target", *arguments)


def test_a_sum_too_large_for_the_base_names_the_fine_tune(golden, tune, tmp_path):
    command("convert", golden / "mplug_owl2_base", tmp_path / "base", "--dtype", "float16")
    others = torch.load(tune / "non_lora_trainables.bin", weights_only=True)
    others["base_model.model.model.norm.weight"] = torch.full((48,), 1e6)
    torch.save(others, tune / "non_lora_trainables.bin")
    line = refused(
        "convert", tune, tmp_path / "target", "--base", tmp_path / "base", "--allow-nonfinite"
    )
    assert "a-name: the merged model.language_model.norm.weight is too large" in line


def test_position_tables_of_a_fine_tune_may_be_missing_in_the_base(golden, tune, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(golden / "mplug_owl2_base", base)
    key = "model.visual_abstractor.encoder.layers.0.crossattention.attention.q_pos_embed"
    for file in base.glob("*.bin"):
        file.chmod(0o644)
        tensors = torch.load(file, weights_only=True)
        torch.save(
            {name: value for name, value in tensors.items() if not name.endswith("_pos_embed")},
            file,
        )
    index = base / "pytorch_model.bin.index.json"
    index.chmod(0o644)
    weight_map = json.loads(index.read_text())["weight_map"]
    kept = {name: file for name, file in weight_map.items() if not name.endswith("_pos_embed")}
    index.write_text(json.dumps({"weight_map": kept}))
    others = torch.load(tune / "non_lora_trainables.bin", weights_only=True)
    torch.save(
        {**others, f"base_model.model.{key}": torch.full((4, 32), 0.25)},
        tune / "non_lora_trainables.bin",
    )
    command("convert", tune, tmp_path / "target", "--base", base)
    table = load_state(tmp_path / "target")[
        "model.visual_abstractor.layers.0.cross_attn.q_pos_embed"
    ]
    assert (table == 0.25).all()


def test_a_fine_tune_needs_its_base_and_its_adapter(golden, tune, tmp_path):
    assert "choose the model that it was trained on with --base" in refused(
        "convert", tune, tmp_path / "target"
    )
    (tune / "adapter_model.bin").unlink()
    assert "contains no adapter" in refused(
        "convert", tune, tmp_path / "target", "--base", golden / "mplug_owl2_base"
    )


@pytest.mark.parametrize(
    ("key", "tensor", "message"),
    [
        (
            "model.layers.0.self_attn.q_proj.lora_A.weight",
            torch.ones(4, 47),
            "do not fit a weight of (48, 48)",
        ),
        (
            "model.layers.0.self_attn.q_proj.lora_A.weight",
            torch.full((4, 48), float("nan")),
            "NaN or infinite",
        ),
        ("model.layers.0.self_attn.q_proj.magnitude", torch.ones(48), "expected lora_A and lora_B"),
        (
            "model.layers.0.mlp.extra.lora_A.weight",
            torch.ones(4, 48),
            "expected a pair of lora_A and lora_B",
        ),
        (
            "model.layers.5.mlp.up_proj.lora_A.weight",
            torch.ones(4, 48),
            "expected a pair of lora_A and lora_B",
        ),
    ],
)
def test_a_wrong_update_is_named(golden, tune, tmp_path, key, tensor, message):
    adapter = torch.load(tune / "adapter_model.bin", weights_only=True)
    torch.save({**adapter, f"base_model.model.{key}": tensor}, tune / "adapter_model.bin")
    line = refused("convert", tune, tmp_path / "target", "--base", golden / "mplug_owl2_base")
    assert message in line and "adapter_model.bin" in line


def test_a_wrong_weight_beside_the_adapter_is_named(golden, tune, tmp_path):
    others = torch.load(tune / "non_lora_trainables.bin", weights_only=True)
    key = "base_model.model.model.norm.weight"
    for tensor, message in [
        (torch.ones(47), "expected shape (48,), got (47,)"),
        ("text", "expected a tensor, got str"),
    ]:
        torch.save({**others, key: tensor}, tune / "non_lora_trainables.bin")
        line = refused("convert", tune, tmp_path / "target", "--base", golden / "mplug_owl2_base")
        assert message in line and repr(key) in line


@pytest.mark.parametrize("name", ["adapter_model.bin", "non_lora_trainables.bin"])
def test_a_record_that_is_too_short_is_refused(golden, tune, tmp_path, name):
    rewrite(tune / name, halve(1))
    line = refused("convert", tune, tmp_path / "target", "--base", golden / "mplug_owl2_base")
    assert f"{name} is damaged: its tensors need" in line
