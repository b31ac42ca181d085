"""Weight-only quantisation: what it touches, what it costs in numbers, and that it is saved."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, TorchAoConfig
from transformers.quantizers.quantizers_utils import should_convert_module

from owl2_hf.default import default_dir
from owl2_hf.modeling.modeling_mplug_owl2 import UNQUANTIZED, MplugOwl2ForConditionalGeneration, _spare_vision_side

from .original import pad
from .test_modeling_mplug_owl2 import RUN, pictures, tiny_config

torchao = pytest.importorskip("torchao", reason="needs torchao: pip install 'owl2_hf[quantization]'")
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


def test_what_is_named_is_left_alone_instead(whole):
    config = TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=["model.language_model", "lm_head"])
    model = AutoModelForImageTextToText.from_pretrained(default_dir(), dtype=torch.bfloat16, quantization_config=config)
    names = quantized_names(model)
    assert names and all(name.startswith(("model.vision_tower.", "model.visual_abstractor.")) for name in names)


def test_logits_with_a_picture_stay_close(whole, int8):
    config = whole.config
    ids = torch.tensor([[1, 20, *[config.image_token_id] * config.num_image_tokens, 30, 40, 50]])
    side = config.vision_config.image_size
    pixels = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        expected, got = (model(ids, pixel_values=pixels).logits[..., :1000] for model in (whole, int8))
    assert 0 < (got - expected).float().norm() < 0.05 * expected.float().norm()


def test_a_quantised_model_is_saved_and_loads_alike(int8, tmp_path):
    int8.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert quantized_names(again) == quantized_names(int8)
    ids = torch.tensor([[1, 20, 30, 40]])
    with torch.no_grad():
        assert torch.equal(again(ids).logits, int8(ids).logits)


@pytest.mark.parametrize("given", [BitsAndBytesConfig(load_in_4bit=True), {"load_in_8bit": True}], ids=["4bit", "8bit"])
def test_bitsandbytes_is_told_the_same(given):
    skipped = _spare_vision_side(given).llm_int8_skip_modules
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
        filter_fn=lambda module, name: isinstance(module, nn.Linear) and should_convert_module(name, UNQUANTIZED),
    )
    got = model(**inputs, pixel_values=pictures(1)).logits[..., :90]
    assert 0 < (got - expected).norm() < 0.1 * expected.norm()
