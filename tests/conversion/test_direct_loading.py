"""Checkpoints in the original's layout, loaded by transformers without converting them first."""

import base64
import io
import json
import os
import pickle
import re
import traceback

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    pipeline,
)

from owl2_hf.conversion import convert
from owl2_hf.modeling import MplugOwl2Config, MplugOwl2ForConditionalGeneration, MplugOwl2Model
from owl2_hf.processing.tokenization_mplug_owl2 import has_tokenizer

from ..modeling.test_modeling_mplug_owl2 import tiny_config
from .conftest import (
    assert_same_bits,
    command,
    drop,
    edit,
    edit_config,
    load_state,
    read_shards,
    refused,
)


@pytest.mark.parametrize("name", ["A", "B", "C", "C2", "S"])
def test_parameters_are_those_of_the_converted_folder(golden_dir, tmp_path, name):
    source = golden_dir(name) / "hf"
    command("convert", source, tmp_path / "converted")
    direct, info = MplugOwl2ForConditionalGeneration.from_pretrained(
        source, output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same_bits(load_state(tmp_path / "converted"), direct.state_dict())


def save_as_original(config, folder):
    """A model of the family, made anew, in the original's layout."""
    torch.manual_seed(0)
    MplugOwl2ForConditionalGeneration(config).save_pretrained(folder / "ours")
    convert(folder / "ours", folder / "original", to="original")
    return folder / "original"


def docowl(folder):
    tiny = tiny_config(vocab_size=128)
    config = MplugOwl2Config(
        vision_config={**tiny.vision_config.to_dict(), "image_size": 28},
        text_config=tiny.text_config.to_dict(),
        image_token_id=90,
        output_vocab_size=90,
        connector_type="h_reducer",
    )
    return save_as_original(config, folder)


def owl21(folder, **text):
    decoder = {
        "vocab_size": 128,
        "modality_specific_projections": ["q", "k", "v"],
        "modality_specific_norms": False,
        "num_key_value_heads": 6,
        "attention_bias": True,
        "attention_out_bias": False,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
        **text,
    }
    return save_as_original(tiny_config(**decoder), folder)


MADE = {"docowl": docowl, "owl21": owl21}


def published_layout(golden_dir, name, tmp_path):
    if name in MADE:
        return MADE[name](tmp_path)
    folder = golden_dir(name)
    return folder / "mplug_owl2_base" if name == "G" else folder / "hf"


def without_names(config):
    """Settings without those that only saving gives: the folder's name, and what the model's class
    is called.
    """
    return {
        key: value
        for key, value in config.to_dict().items()
        if key not in ("_name_or_path", "architectures")
    }


@pytest.mark.parametrize("name", ["A", "B", "C", "C2", "G", "H1", "Q1", "S", *MADE])
def test_everything_is_as_in_the_converted_folder(golden_dir, tmp_path, name):
    source = published_layout(golden_dir, name, tmp_path)
    target = tmp_path / "converted"
    convert(source, target)
    direct, converted = (
        AutoModelForImageTextToText.from_pretrained(folder) for folder in (source, target)
    )
    assert_same_bits(direct.state_dict(), converted.state_dict())
    assert without_names(direct.config) == without_names(converted.config)
    assert direct.generation_config.to_dict() == converted.generation_config.to_dict()
    one, other = (AutoConfig.from_pretrained(folder) for folder in (source, target))
    assert without_names(one) == without_names(other)
    config = direct.config
    ids = torch.tensor([[5, 6, *[config.image_token_id] * config.num_image_tokens, 7, 8]])
    side = config.vision_config.image_size
    pixels = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    answers = [
        model.generate(input_ids=ids, pixel_values=pixels, max_new_tokens=8)
        for model in (direct, converted)
    ]
    assert answers[0].tolist() == answers[1].tolist()
    if not has_tokenizer(source):
        return
    one, other = (AutoProcessor.from_pretrained(folder) for folder in (source, target))
    before, after = (processor.image_processor.to_dict() for processor in (one, other))
    assert before == {key: value for key, value in after.items() if key != "auto_map"}
    assert one.chat_template == other.chat_template
    for attribute in ("legacy", "num_image_tokens", "image_token_id"):
        assert getattr(one, attribute) == getattr(other, attribute)
    for attribute in ("special_tokens_map", "model_max_length", "padding_side"):
        assert getattr(one.tokenizer, attribute) == getattr(other.tokenizer, attribute)
    assert one.tokenizer.get_vocab() == other.tokenizer.get_vocab()


def test_owl21_ends_its_answers_also_where_no_file_says_how(tmp_path):
    """The published config.json names neither a vocabulary nor the token that ends a text."""
    source = owl21(tmp_path)
    (source / "generation_config.json").unlink()
    edit_config(source, vocab_size=None)
    model = AutoModelForImageTextToText.from_pretrained(source)
    assert model.generation_config.eos_token_id == model.generation_config.pad_token_id == 151643
    edit_config(source, vocab_size=90)
    assert (
        AutoModelForImageTextToText.from_pretrained(source).generation_config.eos_token_id is None
    )
    pieces = [f"{base64.b64encode(bytes([byte])).decode()} {byte}" for byte in range(70)]
    (source / "qwen.tiktoken").write_text("\n".join(pieces) + "\n\n")
    model = AutoModelForImageTextToText.from_pretrained(source)
    assert model.generation_config.eos_token_id == model.generation_config.pad_token_id == 70
    with torch.no_grad():
        hidden = model.model(input_ids=torch.tensor([[5, 6]])).last_hidden_state[0, -1]
    model.lm_head.weight.data[70] = 100 * hidden  # so that it is the next token
    assert model.generate(input_ids=torch.tensor([[5, 6]]), max_new_tokens=9).tolist() == [
        [5, 6, 70]
    ]


def test_generation_settings_that_are_given_or_broken_do_not_spoil_direct_loading(
    golden_dir, source
):
    (source / "generation_config.json").write_text("{")
    model = AutoModelForImageTextToText.from_pretrained(source)
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (2, 0)
    given = {
        "do_sample": False,
        "temperature": 0.2,
        "max_new_tokens": 7,
        "eos_token_id": [2, 9],
        "pad_token_id": "x",
    }
    (source / "generation_config.json").write_text(json.dumps(given))
    settings = AutoModelForImageTextToText.from_pretrained(source).generation_config
    assert (settings.max_new_tokens, settings.eos_token_id, settings.pad_token_id) == (7, [2, 9], 0)
    assert settings.temperature is None
    settings.max_new_tokens = 3
    own = AutoModelForImageTextToText.from_pretrained(source, generation_config=settings)
    assert own.generation_config.max_new_tokens == 3
    assert not hasattr(AutoModel.from_pretrained(source), "generation_config")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_without_position_tables_load_directly(source, tmp_path, dtype):
    def halve(tensors):
        for key in list(tensors):
            if key.endswith("_pos_embed"):
                del tensors[key]
            else:
                tensors[key] = tensors[key].to(dtype)

    edit(source, halve)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(
        json.dumps({**config, "torch_dtype": str(dtype).removeprefix("torch.")})
    )
    command("convert", source, tmp_path / "converted")
    assert_same_bits(load_state(tmp_path / "converted"), load_state(source))


def test_every_auto_class_and_the_pipeline_take_the_originals_folder(golden_dir):
    source = golden_dir("A") / "hf"
    assert type(AutoModel.from_pretrained(source)) is MplugOwl2Model
    pipe = pipeline("image-text-to-text", model=str(source))
    cases = json.loads((golden_dir("A") / "e2e" / "e2e.json").read_text())
    picture = golden_dir("A") / "e2e" / "e0.png"
    parts = [{"type": "image", "image": str(picture)}, {"type": "text", "text": "What is this?"}]
    answer = pipe(
        text=[{"role": "user", "content": parts}], max_new_tokens=4, return_full_text=False
    )
    assert isinstance(answer[0]["generated_text"], str) and cases


def test_the_processor_of_the_originals_folder_is_the_converted_ones(golden_dir, tmp_path):
    source = golden_dir("A") / "hf"
    command("convert", source, tmp_path / "converted")
    direct, converted = (
        AutoProcessor.from_pretrained(source),
        AutoProcessor.from_pretrained(tmp_path / "converted"),
    )
    before, after = direct.image_processor.to_dict(), converted.image_processor.to_dict()
    assert before == {key: value for key, value in after.items() if key != "auto_map"}
    assert (direct.legacy, direct.num_image_tokens) == (
        converted.legacy,
        converted.num_image_tokens,
    )
    text, picture = (
        "USER: <|image|>What?</s> is ASSISTANT:",
        str(golden_dir("A") / "e2e" / "e0.png"),
    )
    before, after = (
        processor(text=text, images=picture, return_tensors="pt")
        for processor in (direct, converted)
    )
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_the_tokenizer_of_a_converted_folder_needs_no_sentencepiece_file(golden_dir, tmp_path):
    command("convert", golden_dir("A") / "hf", tmp_path / "converted")
    with_file = AutoTokenizer.from_pretrained(tmp_path / "converted")("Hello</s> there").input_ids
    (tmp_path / "converted" / "tokenizer.model").unlink()
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "converted")("Hello</s> there").input_ids
        == with_file
    )


def test_models_go_back_to_the_originals_layout_through_save_pretrained(golden_dir, tmp_path):
    source = golden_dir("A") / "hf"
    command("convert", source, tmp_path / "ours")
    for folder in (source, tmp_path / "ours"):
        model = AutoModelForImageTextToText.from_pretrained(folder)
        model.save_pretrained(tmp_path / "original", save_original_format=True)
        saved = load_file(tmp_path / "original" / "model.safetensors")
        expected = {
            key: tensor for key, tensor in read_shards(source).items() if "inv_freq" not in key
        }
        assert_same_bits(expected, saved)
        assert_same_bits(model.state_dict(), load_state(tmp_path / "original"))
        model.save_pretrained(tmp_path / "native")
        assert (
            load_file(tmp_path / "native" / "model.safetensors").keys() == model.state_dict().keys()
        )


def test_a_missing_parameter_is_an_error(source, tmp_path):
    edit(source, drop("model.layers.1.self_attn.k_proj.multiway.1.weight"))
    with pytest.raises(
        ValueError, match=r"lacks 1 parameters.*layers\.1\.self_attn\.visual_k_proj\.weight"
    ):
        AutoModelForImageTextToText.from_pretrained(source)
    edit(source, drop("model.vision_model.encoder.layers.0.self_attn.query_key_value.weight"))
    with pytest.raises(ValueError, match="lacks 4 parameters"):
        AutoModel.from_pretrained(source)


def test_an_index_that_leaves_the_folder_is_refused(source, tmp_path):
    tensors = torch.load(source / "pytorch_model.bin", weights_only=True)
    (source / "pytorch_model.bin").rename(tmp_path / "outside.bin")
    for name in ("../outside.bin", str(tmp_path / "outside.bin")):
        index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, name)}
        (source / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match="expected a weight file in the same folder"):
            AutoModelForImageTextToText.from_pretrained(source)


def test_a_missing_head_is_made_anew_as_in_transformers(golden_dir, tmp_path):
    MplugOwl2Model.from_pretrained(golden_dir("A") / "hf").save_pretrained(tmp_path)
    _, info = MplugOwl2ForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {"lm_head.weight"}


def test_untied_tables_are_padded_with_zeros(golden_dir):
    model = AutoModelForImageTextToText.from_pretrained(golden_dir("A") / "hf")
    for table in (model.lm_head.weight, model.get_input_embeddings().weight):
        assert table.shape[0] == 1024 and not table[1000:].any()
    config = MplugOwl2Config.from_pretrained(golden_dir("A") / "hf")
    assert (config.image_token_id, config.output_vocab_size) == (1000, 1000)


def test_weights_may_be_offloaded_to_the_disk(golden_dir, tmp_path):
    """The steps of the mapping also run where weights are not in memory."""
    source = golden_dir("A") / "hf"
    places = {
        "model.vision_tower": "disk",
        "model.visual_abstractor": "cpu",
        "model.language_model": "cpu",
        "lm_head": "disk",
    }
    model = AutoModelForImageTextToText.from_pretrained(
        source, device_map=places, offload_folder=tmp_path
    ).eval()
    plain = AutoModelForImageTextToText.from_pretrained(source).eval()
    processor = AutoProcessor.from_pretrained(source)
    inputs = processor(
        text="<|image|>What?", images=str(golden_dir("A") / "e2e" / "e0.png"), return_tensors="pt"
    )
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, plain(**inputs).logits)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "visual_v_proj", "lm_head"]])
def test_peft_adapters_work_on_the_originals_folder(golden_dir, tmp_path, targets):
    source = golden_dir("A") / "hf"
    model = AutoModelForImageTextToText.from_pretrained(source)
    adapted = get_peft_model(
        model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    ).eval()
    adapted.save_pretrained(tmp_path)
    ids = torch.arange(3, 12).unsqueeze(0)
    with torch.no_grad():
        expected = adapted(input_ids=ids).logits
        again = PeftModel.from_pretrained(
            AutoModelForImageTextToText.from_pretrained(source), tmp_path
        ).eval()
        assert torch.equal(again(input_ids=ids).logits, expected)
        plain = AutoModelForImageTextToText.from_pretrained(source).eval()
        info = plain.load_adapter(str(tmp_path))
        assert not info.missing_keys and not info.unexpected_keys
        assert torch.equal(plain(input_ids=ids).logits, expected)


@pytest.mark.parametrize(
    ("key", "shape", "words"),
    [
        ("score_head.weight", (1, 24), "head of another task"),
        ("model.score.weight", (1, 24), "head of another task"),
        ("model.layers.9.mlp.up_proj.weight", (64, 24), "has fewer layers"),
        ("model.layers.0.mlp.up_proj.bias", (64,), "or layers without it"),
        ("model.vision2text.vit_eos", (1, 1, 24), "DocOwl 1.5's connector"),
        ("model.hr_compressor.compressor_eos", (1, 1, 24), "DocOwl2, which is not supported"),
        (
            "base_model.model.lm_head.lora_A.weight",
            (2, 24),
            "an adapter, load that with load_adapter",
        ),
    ],
)
def test_an_unknown_tensor_is_an_error(source, key, shape, words):
    edit(source, lambda tensors: tensors.update({key: torch.ones(shape)}))
    for load in (AutoModelForImageTextToText.from_pretrained, AutoModel.from_pretrained):
        with pytest.raises(
            ValueError, match=f"has 1 tensors that .* does not have, the first is .*{words}"
        ):
            load(source)
        _, info = load(source, output_loading_info=True)
        assert len(info["unexpected_keys"]) == 1


def test_tensors_that_transformers_ignores_raise_no_error(source, tmp_path):
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit(source, lambda tensors: tensors.update({buffer: torch.ones(2)}))
    AutoModelForImageTextToText.from_pretrained(source).save_pretrained(tmp_path / "ours")
    for folder in (source, tmp_path / "ours"):
        assert type(AutoModel.from_pretrained(folder)) is MplugOwl2Model  # without the head
    state = load_file(tmp_path / "ours" / "model.safetensors")
    config = AutoConfig.from_pretrained(source)
    for given in (state, {**state, "score_head.weight": torch.ones(1)}):
        model = MplugOwl2ForConditionalGeneration.from_pretrained(
            None, config=config, state_dict=dict(given)
        )
        assert_same_bits(state, model.state_dict())


def test_weights_of_the_other_original_are_called_so(source, tmp_path):
    edit_config(source, model_type="mplug_owl2_1")
    with pytest.raises(
        ValueError,
        match=r"has weights of mPLUG-Owl2 \(such as 'model\..*config\.json is for mPLUG-Owl2\.1",
    ):
        AutoModelForImageTextToText.from_pretrained(source)
    assert "parameter of mPLUG-Owl2, but config.json is for mPLUG-Owl2.1" in refused(
        "convert", source, tmp_path / "out"
    )
    other = owl21(tmp_path)
    edit_config(other, model_type="mplug_owl2")
    with pytest.raises(ValueError, match=r"has weights of mPLUG-Owl2\.1 \(such as 'transformer\."):
        AutoModelForImageTextToText.from_pretrained(other)
    assert "parameter of mPLUG-Owl2.1, but config.json is for mPLUG-Owl2" in refused(
        "convert", other, tmp_path / "out"
    )


@pytest.mark.parametrize(
    "name", ["num_attention_heads", "num_key_value_heads", "hidden_size", "num_hidden_layers"]
)
@pytest.mark.parametrize(
    ("value", "words"), [(0, "at least 1, got 0"), (-1, "at least 1"), (10**9, "at most 1")]
)
def test_sizes_that_no_model_has_are_refused_before_it_is_built(source, name, value, words):
    edit_config(source, **{name: value})
    with pytest.raises(ValueError, match=f"text_config: {name} must be {words}"):
        AutoModelForImageTextToText.from_pretrained(source)


def test_an_index_that_names_a_tensor_twice_says_which(source, tmp_path):
    (source / "pytorch_model.bin").rename(source / "pytorch_model-1-of-1.bin")
    entry = '"model.norm.weight": "pytorch_model-1-of-1.bin"'
    (source / "pytorch_model.bin.index.json").write_text(f'{{"weight_map": {{{entry}, {entry}}}}}')
    with pytest.raises(
        ValueError, match=r"index\.json is not a weight index: it names 'model\.norm\.weight' twice"
    ):
        AutoModelForImageTextToText.from_pretrained(source)
    assert "it names 'model.norm.weight' twice" in refused("convert", source, tmp_path / "target")


BROKEN = {
    "empty": (lambda content: b"", "it is empty"),
    "lfs": (
        lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "a Git LFS pointer",
    ),
    "page": (lambda content: b"<!DOCTYPE html><html></html>", "a web page"),
    "half": (lambda content: content[: len(content) // 2], "it is damaged"),
    "malicious": (
        lambda content: pickle.dumps({"a": Bomb()}),
        "damaged, or contains more than tensors",
    ),
    "archive": (lambda content: saved({"a": Bomb()}), "damaged, or contains more than tensors"),
}


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


@pytest.mark.parametrize("is_sharded", [False, True])
@pytest.mark.parametrize(
    ("name", "kind"),
    [("pytorch_model.bin", kind) for kind in BROKEN]
    + [("model.safetensors", kind) for kind in ("empty", "lfs", "page", "half")],
)
def test_a_broken_weight_file_is_named(source, tmp_path, monkeypatch, name, kind, is_sharded):
    monkeypatch.chdir(tmp_path)
    tensors = torch.load(source / "pytorch_model.bin", weights_only=True)
    (source / "pytorch_model.bin").unlink()
    file = source / name
    if is_sharded:
        file = source / name.replace(".", "-00001-of-00001.")
        (source / f"{name}.index.json").write_text(
            json.dumps({"weight_map": dict.fromkeys(tensors, file.name)})
        )
    if name.endswith(".bin"):
        torch.save(tensors, file)
    else:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file)
    change, words = BROKEN[kind]
    file.write_bytes(change(file.read_bytes()))
    for dtype in ("auto", torch.float32):
        with pytest.raises(
            ValueError, match=f"{re.escape(str(file))} cannot be read as weights: .*{words}"
        ) as caught:
            AutoModelForImageTextToText.from_pretrained(source, dtype=dtype)
        shown = "".join(traceback.format_exception(caught.value))
        assert "weights_only" not in shown
    for arguments in (
        ("score", tmp_path / "a.png", "--model", source),
        ("describe", tmp_path / "a.png", "--model", source),
    ):
        Image.new("RGB", (28, 28)).save(tmp_path / "a.png")
        line = refused(*arguments)
        assert words in line and "weights_only" not in line and "unexpected" not in line
    assert not (tmp_path / "ran").exists()
