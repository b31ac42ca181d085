"""mPLUG-Owl2.1, whose decoder is Qwen's: the original's numbers, names and tokenizer."""

import base64
import json
import random
import re
import shutil
from itertools import pairwise

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from owl2_hf.conversion import ConversionError, convert
from owl2_hf.conversion.verify import verify
from owl2_hf.hub import checked_names
from owl2_hf.modeling import (
    MplugOwl2Config,
    MplugOwl2ForConditionalGeneration,
    MplugOwl2Model,
    MplugOwl21Config,
)
from owl2_hf.modeling.conversion_mplug_owl2 import to_ours
from owl2_hf.processing import MplugOwl2Processor
from owl2_hf.processing.tokenization_mplug_owl2 import QWEN_CONTROL_TOKENS, load_tokenizer
from owl2_hf.scoring import Preset, Scorer

from ..conversion.conftest import (
    assert_names_are_covered,
    assert_same_bits,
    command,
    edit_config,
    load_state,
    read_shards,
)
from ..original import GoldenSet, expand_markers, pad
from ..test_golden import assert_close, text_logits
from ..test_remote_code import ask_a_stranger


@pytest.fixture(scope="module")
def source(golden_dir):
    return golden_dir("Q1")


@pytest.fixture(scope="module")
def converted(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("owl21") / "converted"
    convert(source / "hf", folder)
    return folder


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def golden(request, source, converted):
    return GoldenSet(source, converted, attn_implementation=request.param)


@pytest.mark.parametrize("name", ["c1_one_image", "c2_two_images"])
@torch.no_grad()
def test_positions_of_patches_are_interpolated_as_in_the_original(golden, name):
    case = golden.case(name)
    embeddings = golden.model.model.vision_tower.embeddings
    assert_close(embeddings._positions()[0], case["vision_interpolated_position_embedding"])
    assert_close(embeddings(case["images"]), case["vision_embeddings"])


def test_a_batch_generates_what_each_prompt_does_alone(golden):
    """Upstream: cached batches fail with images."""
    cases = [golden.case(name) for name in ("c6_generate_one_image", "c6c_generate_text")]
    rows = [
        expand_markers(case["input_ids"], golden.config)["input_ids"][0].tolist() for case in cases
    ]
    output = golden.model.generate(
        **pad(rows), pixel_values=cases[0]["images"], max_new_tokens=10, do_sample=False
    )
    assert output[:, -10:].tolist() == torch.cat([case["new_ids"] for case in cases]).tolist()


@torch.no_grad()
def test_decoding_beyond_the_trained_length_keeps_the_base_of_the_prompt(golden):
    """Upstream: the keys in the cache were rotated by it."""
    ids = golden.case("x12_beyond_seq_length")["input_ids"]
    prompt = golden.model(input_ids=ids, use_cache=True)
    step = golden.model(
        input_ids=ids[:, :1], past_key_values=prompt.past_key_values, use_cache=True
    )
    whole = golden.model(input_ids=torch.cat([ids, ids[:, :1]], dim=1), logits_to_keep=1)
    # Both prompts need the base of a length between 512 and 1024.
    assert_close(text_logits(golden, step)[:, -1:], text_logits(golden, whole))

    cache = golden.model(input_ids=ids[:, :512], use_cache=True).past_key_values
    golden.model(input_ids=ids[:, 512:513], past_key_values=cache, use_cache=True)
    plain = golden.model.train()(input_ids=ids[:, :513], use_cache=True).past_key_values
    golden.model.eval()
    assert_close(cache.layers[0].keys, plain.layers[0].keys)


@torch.no_grad()
def test_each_prompt_of_a_batch_is_read_by_its_own_length(golden):
    ids = golden.case("x12_beyond_seq_length")["input_ids"]
    short = torch.nn.functional.pad(ids[:, :500], (24, 0))
    mask = torch.ones(2, 524, dtype=torch.long)
    mask[1, :24] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    batch = golden.model(
        input_ids=torch.cat([ids, short]), attention_mask=mask, position_ids=positions
    )
    for row, alone in enumerate((ids, ids[:, :500])):
        assert_close(
            batch.logits[row, -8:], golden.model(input_ids=alone, logits_to_keep=8).logits[0]
        )


def test_long_prompts_are_not_rescaled_in_training(golden):
    ids = golden.case("x12_beyond_seq_length")["input_ids"]
    config = MplugOwl2Config.from_dict(golden.config.to_dict())
    config.text_config.rope_dynamic_ntk_length = config.text_config.log_n_length = None
    config._attn_implementation = golden.config._attn_implementation
    plain = MplugOwl2ForConditionalGeneration(config).train()
    plain.load_state_dict(golden.model.state_dict())
    with torch.no_grad():
        expected = plain(input_ids=ids).logits
        assert_close(golden.model.train()(input_ids=ids).logits, expected)
        assert (golden.model.eval()(input_ids=ids).logits - expected).abs().max() > 0.1


def test_direct_loading_gives_the_bits_of_the_converted_folder(source, converted, caplog):
    direct, info = MplugOwl2ForConditionalGeneration.from_pretrained(
        source / "hf", output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same_bits(load_state(converted), direct.state_dict())
    assert type(AutoModel.from_pretrained(source / "hf")) is MplugOwl2Model
    by_name = AutoModelForImageTextToText.from_pretrained(source / "hf")
    assert_same_bits(direct.state_dict(), by_name.state_dict())
    assert "instantiate a model of type" not in caplog.text
    one, other = (
        which.from_pretrained(source / "hf").to_dict()
        for which in (MplugOwl2Config, MplugOwl21Config)
    )
    assert one == other
    config = AutoConfig.from_pretrained(source / "hf").to_dict()
    saved = AutoConfig.from_pretrained(converted).to_dict()
    assert saved["model_type"] == "mplug_owl2"
    assert config["text_config"] == {
        **saved["text_config"],
        "dtype": config["text_config"].get("dtype"),
    }


def test_info_knows_the_model(source, converted):
    for folder in (source / "hf", converted):
        assert '"tokens per image": 9' in command("info", folder, "--json").output


def test_there_and_back_gives_the_originals_bits_and_settings(source, converted, tmp_path):
    convert(converted, tmp_path / "back", to="original")
    expected = read_shards(source / "hf")
    assert_same_bits(expected, load_file(tmp_path / "back" / "model.safetensors"))
    before, after = (
        json.loads((folder / "config.json").read_text())
        for folder in (source / "hf", tmp_path / "back")
    )
    parts = ("visual_config", "transformers_version")
    assert {
        key: value for key, value in before.items() if key not in parts
    }.items() <= after.items()
    convert(tmp_path / "back", tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_text() == (
        converted / "config.json"
    ).read_text()


def test_save_pretrained_writes_both_layouts(source, converted, tmp_path):
    expected = read_shards(source / "hf")
    for number, folder in enumerate((source / "hf", converted)):
        model = AutoModelForImageTextToText.from_pretrained(folder)
        original, native = tmp_path / f"original{number}", tmp_path / f"native{number}"
        model.save_pretrained(original, save_original_format=True)
        assert_same_bits(expected, load_file(original / "model.safetensors"))
        assert_same_bits(model.state_dict(), load_state(original))
        model.save_pretrained(native)
        assert load_file(native / "model.safetensors").keys() == model.state_dict().keys()
        assert json.loads((native / "config.json").read_text())["model_type"] == "mplug_owl2"
        assert_same_bits(model.state_dict(), load_state(native))


def test_settings_that_the_originals_code_lacks_are_refused_with_to_original(converted, tmp_path):
    for number, (change, message) in enumerate(
        [
            ({"rope_dynamic_ntk_length": 256}, "does not support"),
            ({"attention_out_bias": True}, "attention_out_bias|lacks"),
            ({"hidden_act": "gelu"}, "hidden_act"),
        ]
    ):
        folder = tmp_path / f"changed{number}"
        shutil.copytree(converted, folder)
        config = json.loads((folder / "config.json").read_text())
        config["text_config"].update(change)
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ConversionError, match=message):
            convert(folder, tmp_path / f"back{number}", to="original")


def test_the_vocabulary_is_that_of_the_weights(source, converted, tmp_path):
    for number, vocab_size in enumerate((None, 500)):
        folder = tmp_path / f"source{number}"
        shutil.copytree(source / "hf", folder, copy_function=shutil.copyfile)
        folder.chmod(0o755)
        edit_config(folder, vocab_size=vocab_size)
        convert(folder, tmp_path / f"target{number}")
        assert_same_bits(load_state(converted), load_state(tmp_path / f"target{number}"))
    direct = AutoModelForImageTextToText.from_pretrained(tmp_path / "source1")
    model = AutoModelForImageTextToText.from_pretrained(converted)
    num_tokens = model.config.output_vocab_size
    assert direct.config.output_vocab_size == num_tokens < direct.config.image_token_id == 500
    ids = torch.tensor([[5, 6, 7]])
    logits, expected = direct(ids).logits, model(ids).logits
    torch.testing.assert_close(logits[..., :num_tokens], expected[..., :num_tokens], rtol=0, atol=0)
    assert logits[..., num_tokens:].max() < expected[..., :num_tokens].min()
    shutil.copytree(source / "hf", tmp_path / "fewer", copy_function=shutil.copyfile)
    edit_config(tmp_path / "fewer", vocab_size=num_tokens - 100)
    with pytest.raises(ValueError, match=r"other shapes than config\.json describes.*vocab_size"):
        AutoModelForImageTextToText.from_pretrained(tmp_path / "fewer")
    config = AutoConfig.from_pretrained(tmp_path / "source0")
    assert (config.image_token_id, config.text_config.eos_token_id) == (151851, 151643)


@pytest.mark.parametrize(
    ("name", "value"), [("multiway", False), ("rotary_pct", 0.5), ("intermediate_size", 175)]
)
def test_settings_of_another_decoder_are_errors(source, tmp_path, name, value):
    (tmp_path / "config.json").write_bytes((source / "hf" / "config.json").read_bytes())
    edit_config(tmp_path, **{name: value})
    with pytest.raises(ValueError, match=name):
        AutoConfig.from_pretrained(tmp_path)


def test_fields_beyond_llamas_are_saved_only_where_they_say_something():
    assert "modality_specific_norms" not in MplugOwl2Config().to_dict()["text_config"]
    assert "modality_specific_projections" not in MplugOwl2Config().to_diff_dict()["text_config"]
    with pytest.raises(StrictDataclassError, match="modality_specific_projections must be"):
        MplugOwl2Config(text_config={"modality_specific_projections": ["v"]})
    with pytest.raises(StrictDataclassError, match="rope_type 'default'"):
        MplugOwl2Config(
            text_config={
                "rope_dynamic_ntk_length": 16,
                "rope_scaling": {"rope_type": "linear", "factor": 2.0},
            }
        )


# What the published config.json says; the sizes of the vision side are inferred.
PUBLISHED = {
    "model_type": "mplug_owl2_1",
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "kv_channels": 128,
    "layer_norm_epsilon": 1e-6,
    "max_position_embeddings": 8192,
    "multiway": True,
    "no_bias": True,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "seq_length": 2048,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "visual_config": {
        "visual_model": {
            "hidden_size": 1664,
            "intermediate_size": 8192,
            "num_hidden_layers": 48,
            "num_attention_heads": 16,
            "image_size": 448,
            "patch_size": 14,
            "hidden_act": "gelu",
            "use_cls_token": False,
            "use_post_layernorm": False,
        },
        "visual_abstractor": {
            "hidden_size": 1664,
            "encoder_hidden_size": 1664,
            "intermediate_size": 2816,
            "num_learnable_queries": 64,
            "grid_size": 32,
            "use_cls_token": False,
        },
    },
}


def test_the_names_cover_the_published_model(golden_dir):
    config = MplugOwl2Config.from_dict(json.loads(json.dumps(PUBLISHED)))
    keys = golden_dir("Q1").parents[1] / "spec" / "keys" / "owl21.json"
    assert_names_are_covered(config, keys)


def test_parameter_names_of_the_other_model_are_unknown(golden_dir):
    owl21 = MplugOwl2Config.from_dict(json.loads(json.dumps(PUBLISHED)))
    for config, key in (
        (owl21, "model.norm.weight"),
        (MplugOwl2Config(), "transformer.ln_f.weight"),
    ):
        with pytest.raises(KeyError):
            dict(to_ours(key, torch.zeros(4096), config))


TEXT = (
    "the image shows a caf\u00e9 with tables and chairs, 12 people; USER: ASSISTANT: \u7f8a\u99dd"
)
WORDS = [*TEXT.split(), "\n"]


@pytest.fixture(scope="module")
def ranks():
    """A small vocabulary: all bytes, then pieces as training would merge them."""
    ranks = {bytes([byte]): byte for byte in reversed(range(256))}
    text = [word.encode() for word in WORDS] + [b" " + word.encode() for word in WORDS]
    words = [[bytes([byte]) for byte in word] for word in text]
    while len(ranks) < 320:
        pairs = [pair for word in words for pair in pairwise(word)]
        left, right = max(sorted(set(pairs)), key=pairs.count)
        ranks[left + right] = len(ranks)
        words = [merge(word, ranks) for word in words]
    return ranks


def merge(parts, ranks):
    """Neighbours that make the piece of the lowest rank, the first such pair first, until none make
    one.
    """
    while len(parts) > 1:
        rank, index = min(
            (ranks.get(a + b, 10**9), index) for index, (a, b) in enumerate(pairwise(parts))
        )
        if rank == 10**9:
            break
        parts = [*parts[:index], parts[index] + parts[index + 1], *parts[index + 2 :]]
    return parts


def simple_ids(text, ranks):
    """Qwen's tokenizer in a few lines, for text without control tokens in ASCII and letters."""
    pattern = PRETOKENIZE_REGEX.replace(r"\p{L}", r"[^\W\d_]").replace(
        r"[^\r\n[^\W\d_]\p{N}]", r"(?:[^\w\r\n]|_)"
    )
    pattern = pattern.replace(r"[^\s[^\W\d_]\p{N}]", r"(?:[^\s\w]|_)").replace(r"\p{N}", r"\d")
    ids = []
    for word in re.findall(pattern.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)|", ""), text):
        piece = word.encode()
        ids += [
            ranks[part]
            for part in ([piece] if piece in ranks else merge([bytes([b]) for b in piece], ranks))
        ]
    return ids


def write_vocabulary(ranks, folder):
    path = folder / "qwen.tiktoken"
    lines = [f"{base64.b64encode(piece).decode()} {rank}" for piece, rank in ranks.items()]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_ids_are_those_of_the_ranks(ranks, tmp_path):
    tokenizer, legacy = load_tokenizer(write_vocabulary(ranks, tmp_path))
    draw = random.Random(0)
    for _ in range(200):
        text = "".join(
            draw.choice([*WORDS, " ", "  ", "\n", "x", "_", "9", "..."])
            for _ in range(draw.randrange(12))
        )
        ids = tokenizer(text).input_ids
        assert ids == simple_ids(text, ranks), text
        assert tokenizer.decode(ids) == text
    assert legacy and tokenizer.bos_token is None
    assert tokenizer("cafe\u0301").input_ids == tokenizer("caf\u00e9").input_ids


def test_control_tokens_stand_behind_the_ranks(ranks, tmp_path):
    tokenizer, _ = load_tokenizer(write_vocabulary(ranks, tmp_path))
    assert tokenizer.convert_tokens_to_ids(list(QWEN_CONTROL_TOKENS)) == list(range(320, 528))
    assert tokenizer("a<|im_end|>\n<|extra_204|>").input_ids == [
        ranks[b"a"],
        322,
        ranks[b"\n"],
        527,
    ]
    assert (
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
        tokenizer.convert_tokens_to_ids("<|image|>"),
    ) == (
        320,
        320,
        528,
    )
    assert tokenizer("</s>").input_ids == simple_ids("</s>", ranks)
    assert tokenizer("<\ufdd0|im_end|>\ufdd1").input_ids == simple_ids("<|im_end|>", ranks)
    wider, _ = load_tokenizer(tmp_path, num_text_tokens=600)
    assert wider.convert_tokens_to_ids("<|image|>") == 600 and len(wider) == 601
    assert wider("<|reserved_550|>").input_ids == simple_ids("<|reserved_550|>", ranks)
    wider.save_pretrained(tmp_path / "saved")
    again = type(wider).from_pretrained(tmp_path / "saved")
    text = "the image<|image|> <|endoftext|>x"
    assert again(text).input_ids == wider(text).input_ids


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("IQ== 0 1\n", "line 1"),
        ("!! 0\n", "line 1"),
        ("IQ== 1\n", "each once"),
        ("IQ== 0\n", "every byte"),
    ],
)
def test_a_broken_vocabulary_is_an_error(tmp_path, content, message):
    (tmp_path / "qwen.tiktoken").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path)


@pytest.fixture
def talking(source, ranks, tmp_path):
    """The original's folder with a tokenizer, and weights for all of its tokens and a few rows
    more.
    """
    folder = tmp_path / "talking"
    folder.mkdir()
    for name in ("config.json", "preprocessor_config.json", "generation_config.json"):
        (folder / name).write_bytes((source / "hf" / name).read_bytes())
    tensors = read_shards(source / "hf")
    for key in ("transformer.wte.weight", "lm_head.weight"):
        tensors[key] = torch.randn(560, 64, generator=torch.Generator().manual_seed(1))
    torch.save(tensors, folder / "pytorch_model.bin")
    edit_config(folder, vocab_size=560)
    write_vocabulary(ranks, folder)
    return folder


def test_a_folder_with_a_tokenizer_converts_verifies_and_comes_back(talking, tmp_path):
    target = tmp_path / "converted"
    report = convert(talking, target)
    assert report.tokenizer == "talking"
    verify(target, against=talking)
    processor, direct = (
        AutoProcessor.from_pretrained(target),
        AutoProcessor.from_pretrained(talking),
    )
    assert (
        type(direct) is MplugOwl2Processor
        and processor.image_token_id == direct.image_token_id == 560
    )
    picture, text = Image.new("RGB", (50, 30), "red"), "USER: <|image|>the image ASSISTANT:"
    before, after = (
        one(text=text, images=picture, return_tensors="pt") for one in (direct, processor)
    )
    assert all(torch.equal(before[key], after[key]) for key in before)
    model = AutoModelForImageTextToText.from_pretrained(target)
    assert model.generation_config.eos_token_id == model.generation_config.pad_token_id == 320
    convert(target, tmp_path / "back", to="original")
    assert (tmp_path / "back" / "qwen.tiktoken").read_bytes() == (
        talking / "qwen.tiktoken"
    ).read_bytes()
    assert_same_bits(load_state(target), load_state(tmp_path / "back"))
    tokenizer = AutoProcessor.from_pretrained(tmp_path / "back").tokenizer
    assert tokenizer(text).input_ids == processor.tokenizer(text).input_ids
    assert "qwen.tiktoken" in checked_names(target)  # the folder may be published as it is
    convert(tmp_path / "back", target, dtype="float16", overwrite=True)
    (target / "qwen.tiktoken").write_text("stale")
    convert(tmp_path / "back", target, overwrite=True)
    assert (target / "qwen.tiktoken").read_bytes() == (talking / "qwen.tiktoken").read_bytes()


def test_level_words_score_pictures(talking, ranks, tmp_path):
    """Behind other words a level has a space, which is part of its piece."""
    convert(talking, tmp_path / "converted")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "converted")
    processor = AutoProcessor.from_pretrained(tmp_path / "converted")
    prompt = "USER: <|image|>the image ASSISTANT:"
    words = [piece.decode()[1:] for piece in ranks if re.fullmatch(rb" [a-z]+", piece)][-2:]
    found = Scorer(model, processor, Preset({"quality": prompt}, tuple(words), (1.0, 0.0)))(
        [Image.new("RGB", size, "red") for size in ((50, 30), (20, 40))]
    )
    for one, size in zip(found, ((50, 30), (20, 40)), strict=True):
        image = Image.new("RGB", size, "red")
        inputs = processor(text=prompt, images=image, image_aspect_ratio="pad", return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs).logits[0, -1]
        assert one.logits == pytest.approx(
            [float(logits[ranks[f" {word}".encode()]]) for word in words], rel=1e-5
        )


def test_remote_code_without_the_package_gives_the_same_logits(talking, tmp_path):
    convert(talking, tmp_path / "converted")
    Image.new("RGB", (50, 30), "red").save(tmp_path / "red.png")
    prompt = "USER: <|image|>the image ASSISTANT:"
    found = ask_a_stranger(tmp_path / "converted", str(tmp_path / "red.png"), prompt, tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "converted")
    processor = AutoProcessor.from_pretrained(tmp_path / "converted")
    inputs = processor(text=prompt, images=str(tmp_path / "red.png"), return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs).logits[0, -1]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_turns_are_joined_by_plain_text(talking):
    processor = MplugOwl2Processor.from_original(talking)
    chat = [
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "text", "text": "What<|im_end|>?"}],
        },
        {"role": "assistant", "content": "An image."},
        {"role": "user", "content": "More"},
    ]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    plain = prompt.replace("\ufdd0", "")
    assert plain == "USER: <|image|>What<|im_end|>? ASSISTANT: An image.</s>USER: More ASSISTANT:"
    ids = processor.tokenizer(prompt).input_ids
    assert 322 not in ids and ids[-len(processor.tokenizer(" ASSISTANT:").input_ids) :]


def test_a_vocabulary_that_does_not_fit_the_weights_is_an_error(source, ranks, tmp_path):
    with pytest.raises(
        ConversionError, match="a tokenizer with 409 tokens, as the weights have, got 528"
    ):
        convert(source / "hf", tmp_path / "target", tokenizer=write_vocabulary(ranks, tmp_path))


@pytest.fixture(scope="module")
def decoder(golden_dir):
    """The decoder's weights alone, in the original's names, and the tensors of a few cases."""
    folder = golden_dir("Q")
    config = MplugOwl2Config.from_dict(json.loads((folder / "config.json").read_text()))
    model = MplugOwl2ForConditionalGeneration(config).eval()
    weights = {}
    for key, tensor in load_file(folder / "decoder.safetensors").items():
        weights.update(to_ours(key, tensor, config))
    lost, unknown = model.load_state_dict(weights, strict=False)
    assert not unknown and not any(
        name.startswith(("lm_head", "model.language_model")) for name in lost
    )
    return model, load_file(folder / "cases.safetensors")


@torch.no_grad()
def test_the_decoder_alone_gives_the_originals_numbers(decoder):
    model, cases = decoder
    picture = {key.removeprefix("c1_one_image/"): tensor for key, tensor in cases.items()}
    inputs = {
        "inputs_embeds": picture["prep_inputs_embeds"],
        "mm_token_type_ids": picture["modality_indicators"],
    }
    output = model(**inputs, output_hidden_states=True)
    assert_close(output.logits[..., :409], picture["logits"])
    assert_close(torch.stack(output.hidden_states), picture["hidden_states"])
    text = model(input_ids=cases["c3_text_only/input_ids"]).logits[..., :409]
    assert_close(text, cases["c3_text_only/logits"])
    beyond = model(input_ids=cases["x12_beyond_seq_length/input_ids"], logits_to_keep=16).logits[
        ..., :409
    ]
    assert_close(beyond, cases["x12_beyond_seq_length/last_logits"])
