"""Weight-only quantisation: what it touches, what it costs in numbers, and that it is saved."""

import json
import re

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    TorchAoConfig,
)
from transformers.quantizers.quantizers_utils import should_convert_module

from owl2_hf.conversion import convert
from owl2_hf.default import default_dir
from owl2_hf.modeling.loading_mplug_owl2 import UNQUANTIZED, spare_vision_side
from owl2_hf.modeling.modeling_mplug_owl2 import MplugOwl2ForConditionalGeneration
from owl2_hf.training.adapters import lora_config

from ..conversion.test_direct_loading import docowl, owl21
from ..original import pad
from .test_modeling_mplug_owl2 import RUN, pictures, tiny_config

torchao = pytest.importorskip(
    "torchao", reason="needs torchao: pip install 'owl2_hf[quantization]'"
)
from torchao.quantization import Int8WeightOnlyConfig  # noqa: E402


def quantized_names(model: nn.Module) -> set[str]:
    return {name for name, value in model.named_parameters() if type(value) is not nn.Parameter}


def decoder_linears(model: nn.Module) -> set[str]:
    prefix = "model.language_model."
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {f"{name}.weight" for name in linears if name.startswith(prefix)}


@pytest.fixture(scope="module")
def whole():
    return AutoModelForImageTextToText.from_pretrained(default_dir(), dtype=torch.bfloat16).eval()


@pytest.fixture(scope="module")
def int8():
    config = TorchAoConfig(Int8WeightOnlyConfig())
    return AutoModelForImageTextToText.from_pretrained(
        default_dir(), dtype=torch.bfloat16, quantization_config=config
    ).eval()


def test_the_decoders_projections_of_both_modalities_are_quantised_and_nothing_else(int8):
    names = quantized_names(int8)
    assert names == decoder_linears(int8)
    assert any("visual_k_proj" in name for name in names)


def int8_of(folder):
    config = TorchAoConfig(Int8WeightOnlyConfig())
    return AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=config
    ).eval()


@pytest.mark.parametrize("layout", ["A", "docowl"])
def test_the_originals_layout_is_quantised_as_the_converted_folder_is(golden_dir, tmp_path, layout):
    source = golden_dir("A") / "hf" if layout == "A" else docowl(tmp_path)
    convert(source, tmp_path / "converted")
    direct, converted = int8_of(source), int8_of(tmp_path / "converted")
    assert quantized_names(direct) == quantized_names(converted) == decoder_linears(direct)
    config, side = direct.config, direct.config.vision_config.image_size
    ids = torch.tensor([[5, 6, *[config.image_token_id] * config.num_image_tokens, 7]])
    pixels = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        one, other = (
            model(input_ids=ids, pixel_values=pixels).logits for model in (direct, converted)
        )
    assert torch.equal(one, other)


def test_owl21_in_the_originals_layout_is_to_be_converted_first(tmp_path):
    source = owl21(tmp_path)
    with pytest.raises(
        ValueError,
        match=r"mPLUG-Owl2\.1 in the original's layout cannot be quantised .* `owl2-hf convert`",
    ):
        int8_of(source)
    convert(source, tmp_path / "converted")
    model = int8_of(tmp_path / "converted")
    assert quantized_names(model) == decoder_linears(model)


def test_the_head_of_a_classifier_is_left_as_it_is(tmp_path):
    AutoModelForSequenceClassification.from_pretrained(default_dir()).save_pretrained(tmp_path)
    config = TorchAoConfig(Int8WeightOnlyConfig())
    model = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, dtype=torch.bfloat16, quantization_config=config
    )
    assert quantized_names(model) == decoder_linears(model)


def test_modules_to_not_convert_replaces_the_default(whole):
    config = TorchAoConfig(
        Int8WeightOnlyConfig(), modules_to_not_convert=["model.language_model", "lm_head"]
    )
    model = AutoModelForImageTextToText.from_pretrained(
        default_dir(), dtype=torch.bfloat16, quantization_config=config
    )
    names = quantized_names(model)
    assert names and all(
        name.startswith(("model.vision_tower.", "model.visual_abstractor.")) for name in names
    )


@pytest.mark.filterwarnings("ignore:Config Deprecation")
def test_explicit_names_of_modules_to_quantise_are_kept():
    one = r"re:model\.vision_tower\..*\.fc1"
    for names, is_spared in (
        ({one: Int8WeightOnlyConfig()}, False),
        ({"_default": Int8WeightOnlyConfig()}, True),
    ):
        config = TorchAoConfig(torchao.quantization.FqnToConfig(names))
        assert (spare_vision_side(config).modules_to_not_convert == UNQUANTIZED) == is_spared
        assert config.modules_to_not_convert is None


def test_saved_names_are_plain_for_readers_that_know_no_patterns(int8, tmp_path):
    int8.config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["quantization_config"][
        "modules_to_not_convert"
    ]
    assert all(re.fullmatch(r"[\w.]+", name) for name in saved)
    linears = {name for name, module in int8.named_modules() if isinstance(module, nn.Linear)}
    taken = {
        f"{name}.weight" for name in linears if not any(f".{one}." in f".{name}." for one in saved)
    }
    assert taken == quantized_names(int8)


def test_logits_with_a_picture_stay_close(whole, int8):
    config = whole.config
    ids = torch.tensor([[1, 20, *[config.image_token_id] * config.num_image_tokens, 30, 40, 50]])
    side = config.vision_config.image_size
    pixels = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        expected, got = (
            model(ids, pixel_values=pixels).logits[..., :1000] for model in (whole, int8)
        )
    assert 0 < (got - expected).float().norm() < 0.05 * expected.float().norm()


def test_a_quantised_model_is_saved_and_loads_alike(int8, tmp_path):
    int8.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert quantized_names(again) == quantized_names(int8)
    ids = torch.tensor([[1, 20, 30, 40]])
    with torch.no_grad():
        assert torch.equal(again(ids).logits, int8(ids).logits)


@pytest.mark.parametrize(
    "given", [BitsAndBytesConfig(load_in_4bit=True), {"load_in_8bit": True}], ids=["4bit", "8bit"]
)
def test_bitsandbytes_quantises_only_the_decoder(given):
    skipped = spare_vision_side(given).llm_int8_skip_modules
    model = MplugOwl2ForConditionalGeneration(tiny_config())
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    converted = {f"{name}.weight" for name in linears if should_convert_module(name, skipped)}
    assert converted == decoder_linears(model)
    assert not isinstance(given, BitsAndBytesConfig) or given.llm_int8_skip_modules is None


@torch.no_grad()
def test_pictures_go_through_the_layers_of_a_quantised_model():
    torch.manual_seed(0)
    model = MplugOwl2ForConditionalGeneration(tiny_config()).eval()
    inputs = pad([[1, 5, *RUN, 7]])
    expected = model(**inputs, pixel_values=pictures(1)).logits[..., :90]
    torchao.quantization.quantize_(
        model,
        Int8WeightOnlyConfig(),
        filter_fn=lambda module, name: (
            isinstance(module, nn.Linear) and should_convert_module(name, UNQUANTIZED)
        ),
    )
    got = model(**inputs, pixel_values=pictures(1)).logits[..., :90]
    # Twelve seeds gave 0.015 to 0.030; a visual token in the wrong branch gives 0.7 and more.
    assert 0 < (got - expected).norm() < 0.06 * expected.norm()


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_bitsandbytes_replaces_the_decoders_linears_alone(bits):
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'owl2_hf[qlora]'")
    config = BitsAndBytesConfig(**{bits: True})
    model = AutoModelForImageTextToText.from_pretrained(
        default_dir(), dtype=torch.bfloat16, quantization_config=config
    )
    modules = dict(model.named_modules())
    replaced = {
        f"{name}.weight"
        for name in modules
        if type(modules[name]).__module__.startswith("bitsandbytes")
    }
    assert replaced == decoder_linears(model)


def test_an_adapter_trains_over_int8_weights():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = TorchAoConfig(Int8WeightOnlyConfig())
    model = AutoModelForImageTextToText.from_pretrained(
        default_dir(), dtype=torch.bfloat16, quantization_config=config
    )
    adapted = peft.get_peft_model(model, lora_config(r=4, lora_alpha=4, lora_dropout=0.0))
    ids = torch.tensor([[1, 20, 30, 40]])
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(4):
        loss = adapted(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_agreement_with_float32_is_measured(monkeypatch):
    from benchmarks import quantized

    monkeypatch.setattr(
        quantized, "CONFIGS", {name: quantized.CONFIGS[name] for name in ("int8", "int4")}
    )
    model, asked = quantized.default_model()
    found = quantized.agreement(model, asked[:3])
    errors = {name: values["logit error"] for name, values in found["models"].items()}
    assert 0 < errors["bfloat16"] < errors["int8"] < errors["int4"] < 0.2
    assert found["prompts"] == 3 and found["models"]["bfloat16"]["same token"] == 1
