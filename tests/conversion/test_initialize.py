"""New models from stock ones: what they compute at the start is what their sources compute."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from owl2_hf import MplugOwl2ForConditionalGeneration, MplugOwl2Processor
from owl2_hf.conversion.initialize import initialize
from owl2_hf.conversion.stock_vision import resize_position_table

LLAMAS_TOKENIZER = Path(__file__).parents[1] / "golden" / "A" / "hf" / "tokenizer.model"
REAL = os.environ.get("OWL2_HF_SMOLLM2")
TEXTS = (
    "A cat sat on the mat.",
    "  Two spaces, a\ttab,\nand a line; 12,345!",
    "caf\u00e9 na\u00efve \u7f8a\u99dd \U0001f999 isn't it?",
    " leading and trailing ",
)
VIT = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
}


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE, as SmolLM2 and LLaMA 3 have, without a pad token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        [*TEXTS, "USER: What is this? ASSISTANT: A cat and a mat."] * 3, trainer
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|im_end|>"
    )


@torch.no_grad()
def shaken(model: torch.nn.Module) -> torch.nn.Module:
    """Every parameter at random, also norms and biases, which start as ones and zeros."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def save_language(folder: Path, tokenizer: PreTrainedTokenizerFast | None = None, **kwargs) -> Path:
    """A small LLaMA with odd sizes; LLaMA's tokenizer unless another is given."""
    sizes = {
        "hidden_size": 40,
        "intermediate_size": 52,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    options = {
        "num_key_value_heads": 2,
        "head_dim": 12,
        "max_position_embeddings": 512,
        "rms_norm_eps": 3e-5,
    }
    rope = {"rope_type": "default", "rope_theta": 5e4}
    vocab_size = 1000 if tokenizer is None else len(tokenizer)
    config = LlamaConfig(
        **{**sizes, **options, "vocab_size": vocab_size, "rope_parameters": rope, **kwargs}
    )
    torch.manual_seed(0)
    shaken(LlamaForCausalLM(config)).save_pretrained(folder)
    if tokenizer is None:
        shutil.copyfile(LLAMAS_TOKENIZER, folder / "tokenizer.model")
    else:
        tokenizer.save_pretrained(folder)
    return folder


def save_clip(folder: Path, **kwargs) -> Path:
    config = CLIPVisionConfig(**{**VIT, "intermediate_size": 96, **kwargs})
    shaken(CLIPVisionModel(config)).save_pretrained(folder)
    return folder


def save_dinov2(folder: Path, **kwargs) -> Path:
    shaken(Dinov2Model(Dinov2Config(**{**VIT, "mlp_ratio": 2, **kwargs}))).save_pretrained(folder)
    return folder


def load(folder: Path) -> MplugOwl2ForConditionalGeneration:
    return MplugOwl2ForConditionalGeneration.from_pretrained(folder).eval()


@torch.no_grad()
def encoded(model: MplugOwl2ForConditionalGeneration, pixels: Tensor) -> Tensor:
    return model.model.vision_tower(pixels).last_hidden_state


@torch.no_grad()
def assert_same_logits(
    language: LlamaForCausalLM,
    model: MplugOwl2ForConditionalGeneration,
    input_ids: Tensor,
    atol: float,
):
    """Without indicators, with the text's, with the images', and both in turns; returns the largest
    difference.
    """
    num_ids = language.config.vocab_size
    expected = language(input_ids).logits
    mixed = torch.arange(input_ids.shape[1]).remainder(3).eq(1).long().expand_as(input_ids)
    largest = 0.0
    for indicators in (None, torch.zeros_like(input_ids), torch.ones_like(input_ids), mixed):
        got = model(input_ids, mm_token_type_ids=indicators).logits[..., :num_ids]
        kept = torch.arange(num_ids) != model.config.image_token_id
        torch.testing.assert_close(got[..., kept], expected[..., kept], atol=atol, rtol=0)
        largest = max(largest, float((got - expected)[..., kept].abs().max()))
    return largest


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return save_language(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.mark.parametrize(
    "options", [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}]
)
def test_the_logits_of_a_new_model_are_the_language_models_whatever_the_indicators(
    tmp_path, clip, options
):
    source = save_language(tmp_path / "llama", **options)
    initialize(source, tmp_path / "new", clip)
    language, model = LlamaForCausalLM.from_pretrained(source).eval(), load(tmp_path / "new")
    input_ids = torch.randint(0, 500, (2, 23), generator=torch.Generator().manual_seed(0))
    assert_same_logits(language, model, input_ids, atol=1e-5)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == bool(
        options.get("tie_word_embeddings")
    )


def test_every_field_of_the_language_models_configuration_carries_over(tmp_path, llama, clip):
    rope = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }
    source = save_language(
        tmp_path / "llama", rope_parameters={**rope, "original_max_position_embeddings": 64}
    )
    initialize(source, tmp_path / "new", clip)
    language, text = LlamaConfig.from_pretrained(source), load(tmp_path / "new").config.text_config
    own = {
        "vocab_size",
        "model_type",
        "architectures",
        "dtype",
        "tie_word_embeddings",
        "transformers_version",
    }
    for name in set(language.to_dict()) - own:
        assert getattr(text, name) == getattr(language, name), name


def test_the_table_has_the_placeholder_behind_the_ids_and_zeros_up_to_a_multiple_of_64(tmp_path):
    tokenizer = byte_level_tokenizer()
    report = initialize(
        save_language(tmp_path / "llama", tokenizer), tmp_path / "new", save_clip(tmp_path / "clip")
    )
    model, num_ids = load(tmp_path / "new"), len(tokenizer)
    assert (model.config.image_token_id, model.config.output_vocab_size) == (num_ids, num_ids)
    for table in (model.get_input_embeddings().weight, model.lm_head.weight):
        assert len(table) == -(-(num_ids + 1) // 64) * 64
        assert not table[num_ids:].any()
    assert report.num_parameters == model.num_parameters()
    assert not [note for note in report.notes if "placeholder" in note]


@pytest.mark.parametrize(("num_ids", "num_rows"), [(384, 384), (300, 384), (321, 384)])
def test_a_tokenizer_of_another_length_than_the_table_puts_the_placeholder_where_it_counts_to(
    tmp_path, num_ids, num_rows
):
    tokenizer = byte_level_tokenizer()
    assert len(tokenizer) == 320
    source = save_language(tmp_path / "llama", tokenizer, vocab_size=num_ids)
    report = initialize(source, tmp_path / "new", save_clip(tmp_path / "clip"))
    model = load(tmp_path / "new")
    assert (model.config.image_token_id, model.config.output_vocab_size) == (320, num_ids)
    assert len(model.get_input_embeddings().weight) == num_rows
    assert "differ in length" in report.notes[-1]
    assert_same_logits(
        LlamaForCausalLM.from_pretrained(source).eval(),
        model,
        torch.arange(24).view(1, -1),
        atol=1e-5,
    )


def test_the_vision_encoder_is_clips_with_its_last_norm_on_every_position(tmp_path, llama, clip):
    initialize(llama, tmp_path / "new", clip)
    pixels, vision = torch.randn(2, 3, 28, 28), CLIPVisionModel.from_pretrained(clip).eval()
    with torch.no_grad():
        expected = vision.post_layernorm(vision(pixels).last_hidden_state)
    torch.testing.assert_close(encoded(load(tmp_path / "new"), pixels), expected, atol=1e-5, rtol=0)


def test_the_vision_encoder_of_a_whole_clip_is_taken(tmp_path, llama):
    text = CLIPTextConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        vocab_size=50,
    )
    whole = shaken(
        CLIPModel(
            CLIPConfig(
                text_config=text, vision_config=CLIPVisionConfig(**VIT, intermediate_size=96)
            )
        )
    )
    whole.save_pretrained(tmp_path / "clip")
    initialize(llama, tmp_path / "new", tmp_path / "clip")
    pixels = torch.randn(1, 3, 28, 28)
    with torch.no_grad():
        expected = whole.vision_model.post_layernorm(whole.vision_model(pixels).last_hidden_state)
    torch.testing.assert_close(encoded(load(tmp_path / "new"), pixels), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "options", [{}, {"qkv_bias": False, "layerscale_value": 0.1, "use_mask_token": False}]
)
def test_the_vision_encoder_is_dinov2s_with_its_scales_folded(tmp_path, llama, options):
    source = save_dinov2(tmp_path / "dinov2", **options)
    initialize(llama, tmp_path / "new", source)
    pixels, model = torch.randn(2, 3, 28, 28), load(tmp_path / "new")
    with torch.no_grad():
        expected = Dinov2Model.from_pretrained(source).eval()(pixels).last_hidden_state
    torch.testing.assert_close(encoded(model, pixels), expected, atol=1e-5, rtol=0)
    assert not [name for name in model.state_dict() if "pre_layernorm" in name]


def test_dinov2s_pictures_are_normalised_as_it_knows_them_and_as_its_folder_says(tmp_path, llama):
    source = save_dinov2(tmp_path / "dinov2")
    initialize(llama, tmp_path / "new", source)
    known = MplugOwl2Processor.from_pretrained(tmp_path / "new").image_processor
    assert tuple(known.image_mean) == (0.485, 0.456, 0.406)
    assert tuple(known.image_std) == (0.229, 0.224, 0.225)
    assert known.size["height"] == 28
    settings = {"image_mean": [0.1, 0.2, 0.3], "do_center_crop": True}
    (source / "preprocessor_config.json").write_text(json.dumps(settings))
    initialize(llama, tmp_path / "other", source)
    assert list(
        MplugOwl2Processor.from_pretrained(tmp_path / "other").image_processor.image_mean
    ) == [0.1, 0.2, 0.3]


@pytest.mark.parametrize("save", [save_clip, save_dinov2])
def test_another_picture_size_interpolates_the_positions_as_the_vision_model_does(
    tmp_path, llama, save
):
    source = save(tmp_path / "vit")
    initialize(llama, tmp_path / "new", source, image_size=56)
    pixels, model = torch.randn(1, 3, 56, 56), load(tmp_path / "new")
    with torch.no_grad():
        if save is save_clip:
            vision = CLIPVisionModel.from_pretrained(source).eval()
            expected = vision.post_layernorm(
                vision(pixels, interpolate_pos_encoding=True).last_hidden_state
            )
        else:
            expected = Dinov2Model.from_pretrained(source).eval()(pixels).last_hidden_state
    torch.testing.assert_close(encoded(model, pixels), expected, atol=1e-5, rtol=0)
    assert model.config.abstractor_config.grid_size == 8


def test_a_position_table_of_the_same_side_stays_as_it_is():
    table = torch.randn(1, 17, 8)
    assert torch.equal(resize_position_table(table, 4, 4), table)


def test_a_ramp_of_positions_stays_a_ramp_away_from_the_borders():
    rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    table = torch.stack([rows, columns], dim=-1).reshape(1, 256, 2)
    table = torch.cat([torch.full((1, 1, 2), 7.0), table], dim=1)
    resized = resize_position_table(table, 16, 32)
    assert resized.shape == (1, 1025, 2)
    assert torch.equal(resized[:, 0], table[:, 0])
    places = (torch.arange(32.0) + 0.5) / 2 - 0.5
    grid = resized[0, 1:].reshape(32, 32, 2)
    inner = slice(4, -4)
    # Two new patches are one old one. In between, the cubic kernel leaves a line by up to 3/64 of a
    # step.
    torch.testing.assert_close(grid[6:-4, :, 0] - grid[4:-6, :, 0], torch.ones(22, 32))
    torch.testing.assert_close(grid[:, 6:-4, 1] - grid[:, 4:-6, 1], torch.ones(32, 22))
    assert (grid[inner, :, 0] - places[inner, None]).abs().max() < 0.05
    assert (grid[:, inner, 1] - places[None, inner]).abs().max() < 0.05


def test_a_position_table_keeps_its_dtype_and_must_have_the_named_side():
    assert resize_position_table(torch.randn(1, 17, 8).bfloat16(), 4, 6).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"shape \(1, 26, width\).*got \(1, 17, 8\)"):
        resize_position_table(torch.randn(1, 17, 8), 5, 6)


@pytest.mark.parametrize("kind", ["llama", "byte-level"])
def test_the_tokenizer_keeps_the_language_models_ids_through_three_rounds_of_saving(
    tmp_path, clip, kind
):
    own = byte_level_tokenizer() if kind == "byte-level" else None
    source = save_language(tmp_path / "llama", own)
    if own is None:
        from sentencepiece import SentencePieceProcessor

        pieces = SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
        expected = [[1, *pieces.encode(text)] for text in TEXTS]
    else:
        expected = [AutoTokenizer.from_pretrained(source)(text).input_ids for text in TEXTS]
    initialize(source, tmp_path / "0", clip)
    for round_ in range(3):
        processor = MplugOwl2Processor.from_pretrained(tmp_path / str(round_))
        assert [processor(text=text)["input_ids"][0] for text in TEXTS] == expected
        processor.save_pretrained(tmp_path / str(round_ + 1))


def test_the_names_of_control_tokens_in_a_message_are_text_for_a_byte_level_tokenizer(
    tmp_path, clip
):
    own = byte_level_tokenizer()
    own.add_tokens([AddedToken("<|sep|>", special=True, normalized=True)])
    initialize(save_language(tmp_path / "llama", own), tmp_path / "new", clip)
    processor = MplugOwl2Processor.from_pretrained(tmp_path / "new")
    chat = [
        {"role": "user", "content": "<|im_end|><|sep|><|image|>"},
        {"role": "assistant", "content": "Yes."},
    ]
    encoded_chat = processor.apply_chat_template(chat, tokenize=True, return_dict=True)
    special = {own.eos_token_id, processor.image_token_id, own.convert_tokens_to_ids("<|sep|>")}
    assert [index for index in encoded_chat["input_ids"][0] if index in special] == [
        own.eos_token_id
    ]
    assert (
        processor.decode(encoded_chat["input_ids"][0])
        == "USER: <|im_end|><|sep|><|image|> ASSISTANT: Yes.<|im_end|>"
    )
    # This tokenizer begins no text with a token of its own, so a token in front is the user's.
    assert processor(text=own.bos_token + "a")["input_ids"][0][0] == own.bos_token_id


def test_a_llama_with_tokens_of_its_own_keeps_them(tmp_path, clip):
    source = save_language(tmp_path / "first")
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_tokens(["<|im_start|>"], special_tokens=True)
    source = save_language(tmp_path / "llama", tokenizer)
    initialize(source, tmp_path / "new", clip)
    processor = MplugOwl2Processor.from_pretrained(tmp_path / "new")
    assert processor.image_token_id == len(tokenizer)
    text = "Hello <|im_start|>you, cat"
    assert processor(text=text)["input_ids"][0] == tokenizer(text).input_ids


@pytest.mark.parametrize("kind", ["llama", "byte-level"])
def test_a_new_model_generates_from_a_picture_and_a_batch(tmp_path, clip, kind):
    own = byte_level_tokenizer() if kind == "byte-level" else None
    initialize(
        save_language(tmp_path / "llama", own),
        tmp_path / "new",
        clip,
        num_queries=5,
        num_abstractor_layers=1,
    )
    model, processor = load(tmp_path / "new"), MplugOwl2Processor.from_pretrained(tmp_path / "new")
    picture = Image.fromarray(
        np.random.default_rng(0).integers(0, 255, (40, 30, 3), dtype=np.uint8)
    )
    prompts = ["USER: <|image|>What is this? ASSISTANT:", "USER: Say something. ASSISTANT:"]
    inputs = processor(images=[picture], text=prompts, padding=True, return_tensors="pt")
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 6
    generated = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    new = generated[:, inputs["input_ids"].shape[1] :]
    assert new.shape[1] >= 1
    assert (new != processor.image_token_id).all()
    assert (new < model.config.output_vocab_size).all()


def test_without_a_vision_model_a_small_fresh_one_is_made_that_the_seed_decides(tmp_path, llama):
    first = initialize(llama, tmp_path / "first", image_size=56, num_abstractor_layers=1, seed=3)
    state = torch.get_rng_state()
    initialize(llama, tmp_path / "second", image_size=56, num_abstractor_layers=1, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second")]
    assert weights[0] == weights[1]
    vision = load(tmp_path / "first").config.vision_config
    assert (vision.hidden_size, vision.num_hidden_layers, vision.image_size) == (384, 12, 56)
    assert first.vision is None
    assert "fresh" in first.summary()


def test_another_seed_gives_another_abstractor_and_the_same_language_model(tmp_path, llama, clip):
    found = []
    for seed in (0, 1):
        initialize(llama, tmp_path / str(seed), clip, seed=seed)
        found.append(load(tmp_path / str(seed)).state_dict())
    equal = {name.split(".")[1] for name in found[0] if torch.equal(found[0][name], found[1][name])}
    assert equal >= {"language_model", "vision_tower"}
    name = "model.visual_abstractor.query_embeds"
    assert not torch.equal(found[0][name], found[1][name])


def test_the_sizes_of_the_abstractor_follow_the_vision_encoder(tmp_path, llama):
    source = save_clip(tmp_path / "clip", hidden_size=192, num_attention_heads=3)
    initialize(llama, tmp_path / "new", source, num_queries=7, num_abstractor_layers=2)
    config = load(tmp_path / "new").config.abstractor_config
    assert (config.hidden_size, config.intermediate_size, config.num_attention_heads) == (
        192,
        528,
        3,
    )
    assert (config.num_learnable_queries, config.num_hidden_layers, config.grid_size) == (7, 2, 4)


def test_the_dtype_is_the_language_models_unless_another_is_asked_for(tmp_path, llama, clip):
    half = tmp_path / "half"
    shutil.copytree(llama, half)
    LlamaForCausalLM.from_pretrained(llama, dtype=torch.bfloat16).save_pretrained(half)
    for source, asked, expected in (
        (half, None, "bfloat16"),
        (half, "float32", "float32"),
        (llama, "float16", "float16"),
    ):
        report = initialize(source, tmp_path / "new", clip, dtype=asked, overwrite=True)
        model = MplugOwl2ForConditionalGeneration.from_pretrained(tmp_path / "new", dtype="auto")
        assert report.dtype == expected
        assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, expected)}
        values = json.loads((tmp_path / "new" / "config.json").read_text())
        parts = (values, *(values[f"{part}_config"] for part in ("vision", "abstractor", "text")))
        assert {part.get("dtype", expected) for part in parts} == {expected}


def test_generation_stops_where_the_language_model_did_and_where_the_template_ends_an_answer(
    tmp_path, clip
):
    source = save_language(tmp_path / "llama", byte_level_tokenizer())
    settings = {
        "eos_token_id": [0],
        "temperature": 0.6,
        "top_p": 0.9,
        "do_sample": False,
        "max_new_tokens": 9,
    }
    (source / "generation_config.json").write_text(json.dumps(settings))
    report = initialize(source, tmp_path / "new", clip)
    generation = load(tmp_path / "new").generation_config
    assert (generation.eos_token_id, generation.pad_token_id, generation.max_new_tokens) == (
        [0, 1],
        1,
        9,
    )
    assert "pad_token" in report.notes[0]


def test_models_other_than_llama_are_refused(tmp_path, clip):
    MistralConfig(hidden_size=32).save_pretrained(tmp_path / "mistral")
    with pytest.raises(ValueError, match=r"model_type 'llama', got 'mistral'"):
        initialize(tmp_path / "mistral", tmp_path / "new", clip)
    assert not (tmp_path / "new").exists()


def test_a_quantized_llama_is_refused(tmp_path, llama, clip):
    config = json.loads((llama / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="is quantized"):
        initialize(tmp_path / "llama", tmp_path / "new", clip)


def test_a_language_model_without_tokenizer_is_refused_by_what_is_missing(tmp_path, clip):
    source = save_language(tmp_path / "llama")
    (source / "tokenizer.model").unlink()
    with pytest.raises(
        ValueError, match=r"has no tokenizer: expected a tokenizer\.json or a tokenizer\.model"
    ):
        initialize(source, tmp_path / "new", clip)


def test_a_broken_tokenizer_is_refused(tmp_path, clip):
    source = save_language(tmp_path / "llama")
    (source / "tokenizer.model").unlink()
    (source / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="its tokenizer cannot be loaded"):
        initialize(source, tmp_path / "new", clip)


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path, clip):
    tokenizer = byte_level_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no eos_token"):
        initialize(save_language(tmp_path / "llama", tokenizer), tmp_path / "new", clip)


def test_a_vocabulary_with_gaps_is_refused(tmp_path, clip):
    source = save_language(tmp_path / "llama", byte_level_tokenizer(), vocab_size=512)
    values = json.loads((source / "tokenizer.json").read_text())
    last = max(values["model"]["vocab"], key=values["model"]["vocab"].get)
    unused = "not a piece"
    values["model"]["vocab"][last] += 1
    values["model"]["vocab"].update({unused: values["model"]["vocab"][last] + 1})
    (source / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="gaps in its ids"):
        initialize(source, tmp_path / "new", clip)


def test_weights_that_are_missing_are_refused(tmp_path, llama, clip):
    from safetensors.torch import load_file, save_file

    source = tmp_path / "llama"
    shutil.copytree(llama, source)
    state = load_file(source / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError,
        match=r"lacks 1 parameters of its model, the first is model\.layers\.1\.mlp\.up_proj",
    ):
        initialize(source, tmp_path / "new", clip)
    assert not (tmp_path / "new").exists()


def test_siglip_is_refused(tmp_path, llama):
    sizes = {**VIT, "intermediate_size": 96}
    SiglipVisionModel(SiglipVisionConfig(**sizes)).save_pretrained(tmp_path / "siglip")
    with pytest.raises(
        ValueError,
        match=r"expected a ViT with a class token.*not SigLIP.*got 'siglip_vision_model'",
    ):
        initialize(llama, tmp_path / "new", tmp_path / "siglip")


def test_a_dinov2_with_swiglu_is_refused(tmp_path, llama):
    source = save_dinov2(tmp_path / "dinov2", use_swiglu_ffn=True)
    with pytest.raises(ValueError, match=r"expected a DINOv2 with an MLP.*use_swiglu_ffn"):
        initialize(llama, tmp_path / "new", source)


def test_sizes_that_do_not_fit_are_refused(tmp_path, llama, clip):
    with pytest.raises(
        ValueError, match=r"image_size \(30\) must be a multiple of patch_size \(7\)"
    ):
        initialize(llama, tmp_path / "new", clip, image_size=30)
    with pytest.raises(ValueError, match="at least one patch, got 0"):
        initialize(llama, tmp_path / "new", clip, image_size=0)
    with pytest.raises(ValueError, match="num_learnable_queries must be at least 1, got 0"):
        initialize(llama, tmp_path / "new", clip, num_queries=0)
    source = save_clip(tmp_path / "clip", hidden_size=130, num_attention_heads=2)
    with pytest.raises(ValueError, match=r"multiple of 4.*got 130"):
        initialize(llama, tmp_path / "new", source)


def test_a_target_in_use_and_an_unknown_dtype_are_refused(tmp_path, llama, clip):
    with pytest.raises(ValueError, match="overlap: choose another target"):
        initialize(llama, llama, clip, overwrite=True)
    with pytest.raises(
        ValueError, match="expected a dtype of float32, float16, bfloat16, got 'int8'"
    ):
        initialize(llama, tmp_path / "new", clip, dtype="int8")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        initialize(llama, tmp_path / "full", clip)


@pytest.mark.skipif(REAL is None, reason="OWL2_HF_SMOLLM2 names no folder of a SmolLM2-135M")
def test_a_real_smollm2_keeps_its_logits_and_its_ids(tmp_path, clip):
    assert REAL is not None
    initialize(REAL, tmp_path / "new", clip, dtype="float32")
    language = AutoModelForCausalLM.from_pretrained(REAL, dtype=torch.float32).eval()
    model, processor = load(tmp_path / "new"), MplugOwl2Processor.from_pretrained(tmp_path / "new")
    own = AutoTokenizer.from_pretrained(REAL)
    for text in TEXTS:
        assert processor(text=text)["input_ids"][0] == own(text).input_ids
    inputs = own(
        "The capital of France is Paris, and the capital of Italy is Rome.", return_tensors="pt"
    )
    # Logits are up to 30; float32 sums of 576 products in another order differ in the fifth digit
    # behind the point.
    largest = assert_same_logits(language, model, inputs["input_ids"], atol=1e-3)
    prompt = own("The capital of France is", return_tensors="pt")["input_ids"]
    expected = language.generate(prompt, max_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(prompt, max_new_tokens=8, do_sample=False), expected)
    print(f"largest difference of logits: {largest:.2e}; {own.decode(expected[0])!r}")  # noqa: T201
