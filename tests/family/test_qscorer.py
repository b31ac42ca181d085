"""Q-Scorer's checkpoints, made up in their layout, against its steps computed by hand."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoProcessor,
)

from owl2_hf.modeling import MplugOwl2ForConditionalGeneration, MplugOwl2ForSequenceClassification

from ..conversion.conftest import command, edit_config, read_shards
from ..original import pad

TOKENS = [f"<score{i}>" for i in range(1, 6)]
# 64 is the width of the language model: two of the layers add their input.
WIDTHS = [
    64,
    24,
    24,
    16,
]
PROMPT = "USER: How would you rate the quality of this image?\n<|image|>\nASSISTANT: The quality of the image is"


def save(source: Path, folder: Path, **tensors) -> dict[str, torch.Tensor]:
    """A small original with five more tokens and Q-Scorer's head, as its merging script leaves
    one.
    """
    generator = torch.Generator().manual_seed(0)
    state = read_shards(source)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = torch.cat(
            [state[name], torch.randn(5, state[name].shape[1], generator=generator)]
        )
    sizes = [state["lm_head.weight"].shape[1], *WIDTHS]
    shapes = {
        f"model.{i}.linear": shape for i, shape in enumerate(zip(WIDTHS, sizes, strict=False))
    }
    for name, shape in {**shapes, "output_layer": (1, 16)}.items():
        state[f"deepmlp.{name}.weight"] = torch.randn(shape, generator=generator) / 4
        state[f"deepmlp.{name}.bias"] = torch.randn(shape[0], generator=generator)
    state.update(tensors)
    folder.mkdir()
    torch.save(state, folder / "pytorch_model.bin")
    config = json.loads((source / "config.json").read_text())
    config |= {"vocab_size": 1005, "deepmlp_hidden_dims": WIDTHS, "score_tokens": TOKENS}
    config |= {"score_token_id": [1004, 1003, 1002, 1001, 1000], "image_aspect_ratio": "pad"}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (folder / name).write_bytes((source / name).read_bytes())
    (folder / "added_tokens.json").write_text(
        json.dumps({token: 1000 + i for i, token in enumerate(TOKENS)})
    )
    return state


@pytest.fixture(scope="module")
def source(golden_dir):
    return golden_dir("A") / "hf"


@pytest.fixture(scope="module")
def checkpoint(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("qscorer") / "merged"
    return folder, save(source, folder)


@pytest.fixture(scope="module")
def model(checkpoint):
    return AutoModelForSequenceClassification.from_pretrained(checkpoint[0]).eval()


def rows(model) -> tuple[list[list[int]], torch.Tensor]:
    """Prompts of different lengths, each with an image; and the images."""
    run = [model.config.image_token_id] * model.config.num_image_tokens
    side = model.config.vision_config.image_size
    ids = [[1, 20, *run, 30, 31, 32], [1, *run, 40], [1, 7, 8, 9, 10, *run, 11, 12]]
    return ids, torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def by_hand(state, source, ids, image) -> tuple[torch.Tensor, int]:
    """Q-Scorer's steps for one prompt: the likeliest token is appended, the MLP reads the state
    there.
    """
    causal = MplugOwl2ForConditionalGeneration.from_pretrained(source).eval()
    image_id = causal.config.image_token_id
    is_image = torch.tensor([ids]).gt(1004)
    plain = torch.tensor([ids]).masked_fill(is_image, 0)
    for step in range(2):
        embeds = state["model.embed_tokens.weight"][plain]
        embeds[is_image] = causal.get_image_features(image[None]).pooler_output[0]
        hidden = causal.model(
            inputs_embeds=embeds, mm_token_type_ids=is_image.long()
        ).last_hidden_state[0, -1]
        if step == 0:
            token = (state["lm_head.weight"] @ hidden).argmax()
            plain = torch.cat([plain, token.view(1, 1)], dim=1)
            is_image = nn.functional.pad(is_image, (0, 1))
    assert image_id == 1000  # of the model without the five tokens
    for i in range(len(WIDTHS)):
        weight, bias = (
            state[f"deepmlp.model.{i}.linear.weight"],
            state[f"deepmlp.model.{i}.linear.bias"],
        )
        output = torch.clamp(weight @ hidden + bias, min=0)
        hidden = output + hidden if len(output) == len(hidden) else output
    return state["deepmlp.output_layer.weight"] @ hidden + state["deepmlp.output_layer.bias"], int(
        token
    )


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_scores_are_those_of_its_steps_by_hand(model, checkpoint, source, side):
    ids, images = rows(model)
    expected = [
        by_hand(checkpoint[1], source, row, image) for row, image in zip(ids, images, strict=True)
    ]
    assert len({token for _, token in expected}) > 1
    inputs = {**pad(ids, side=side), "pixel_values": images}
    inputs["mm_token_type_ids"] = inputs["input_ids"].eq(model.config.image_token_id).long()
    found = model(**inputs).logits
    assert found.shape == (3, 1)
    torch.testing.assert_close(
        found, torch.stack([score for score, _ in expected]), rtol=1e-4, atol=1e-4
    )
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    torch.testing.assert_close(
        model(**inputs, position_ids=positions).logits, found, rtol=1e-4, atol=1e-4
    )
    for row, image, score in zip(ids, images, found, strict=True):
        alone = model(input_ids=torch.tensor([row]), pixel_values=image[None]).logits[0]
        torch.testing.assert_close(alone, score, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_rows_that_pad_the_table_are_no_answer(model, checkpoint, source, tmp_path):
    ids, images = rows(model)
    inputs = {"input_ids": torch.tensor(ids[:1]), "pixel_values": images[:1]}
    hidden = model.model(**inputs).last_hidden_state[0, -1]
    head = -(1 + torch.arange(1005)[:, None]) * hidden / hidden.norm() ** 2  # logits -1, -2, ...
    state = save(source, tmp_path / "made", **{"lm_head.weight": head})
    found = (
        MplugOwl2ForSequenceClassification.from_pretrained(tmp_path / "made")
        .eval()(**inputs)
        .logits
    )
    expected, token = by_hand(state, source, ids[0], images[0])
    assert token == 0
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_it_is_saved_and_loaded_in_both_layouts(model, checkpoint, tmp_path):
    model.save_pretrained(tmp_path / "ours")
    again, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids, images = rows(model)
    inputs = {**pad(ids), "pixel_values": images}
    torch.testing.assert_close(again.eval()(**inputs).logits, model(**inputs).logits)
    loaded, info = AutoModelForSequenceClassification.from_pretrained(
        checkpoint[0], output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    loaded.save_pretrained(tmp_path / "original", save_original_format=True)
    saved = load_file(tmp_path / "original" / "model.safetensors")
    computed = ("pos_embed", "inv_freq")
    expected = {
        name: tensor for name, tensor in checkpoint[1].items() if not name.endswith(computed)
    }
    assert all(torch.equal(saved[name], tensor) for name, tensor in expected.items())


def test_it_trains_with_checkpointing_and_a_regression(model, checkpoint):
    trained = AutoModelForSequenceClassification.from_pretrained(checkpoint[0]).train()
    trained.gradient_checkpointing_enable()
    ids, images = rows(trained)
    trained(**pad(ids), pixel_values=images, labels=torch.tensor([1.0, 3.0, 5.0])).loss.backward()
    assert trained.config.problem_type == "regression"
    without = {name for name, parameter in trained.named_parameters() if parameter.grad is None}
    assert without == {"lm_head.weight"}  # the choice of a token has no gradient


def test_inputs_embeds_are_refused(model):
    with pytest.raises(
        ValueError, match=r"Q-Scorer needs the whole prompt: pass input_ids and no cache"
    ):
        model(inputs_embeds=torch.zeros(1, 3, 64))


@pytest.mark.parametrize("widths", [[64, 0], ["64"], 64])
def test_invalid_layer_widths_are_refused(checkpoint, widths):
    config = AutoConfig.from_pretrained(checkpoint[0])
    config.deepmlp_hidden_dims = widths
    with pytest.raises(
        ValueError, match=r"deepmlp_hidden_dims: expected a list of layer widths, got .*; correct"
    ):
        MplugOwl2ForSequenceClassification(config)


@pytest.mark.parametrize(
    "ids", [{"<score1>": [1]}, {"<score1>": 7}, {TOKENS[i]: 1001 + i for i in range(5)}]
)
def test_added_tokens_that_are_not_behind_the_pieces_are_left_aside(checkpoint, tmp_path, ids):
    shutil.copytree(checkpoint[0], tmp_path / "made")
    (tmp_path / "made" / "added_tokens.json").write_text(json.dumps(ids))
    assert AutoProcessor.from_pretrained(tmp_path / "made").image_token_id == 1000


def test_it_is_not_loaded_as_a_model_that_answers(checkpoint):
    with pytest.raises(
        ValueError, match=r"'score\.\S+': it is the head of MplugOwl2ForSequenceClassification"
    ):
        AutoModelForCausalLM.from_pretrained(checkpoint[0])


@torch.no_grad()
def test_its_processor_knows_the_added_tokens(model, checkpoint, tmp_path):
    processor = AutoProcessor.from_pretrained(checkpoint[0])
    assert processor.tokenizer.convert_tokens_to_ids(TOKENS) == list(range(1000, 1005))
    assert processor.image_token_id == model.config.image_token_id == 1005
    assert processor.image_processor.image_aspect_ratio == "pad"
    inputs = processor(text=PROMPT, images=Image.new("RGB", (30, 20), "red"), return_tensors="pt")
    assert model(**inputs).logits.isfinite().all()
    processor.save_pretrained(tmp_path)
    assert (
        AutoProcessor.from_pretrained(tmp_path)(text="a<score2>b").input_ids
        == processor(text="a<score2>b").input_ids
    )


@pytest.mark.parametrize("layout", ["original", "ours"])
@torch.no_grad()
def test_a_fine_tune_is_merged_and_keeps_head_and_tokens(golden_dir, tmp_path, layout):
    """The released form: an adapter, and beside it all that was trained, on the base model."""
    golden, plain = golden_dir("G"), tmp_path / "plain"
    base = golden / "mplug_owl2_base"
    command("convert", golden / "mplug_owl2_lora", plain, "--base", base, "--to", "original")
    torch.save(load_file(plain / "model.safetensors"), plain / "pytorch_model.bin")
    state = save(plain, tmp_path / "merged")

    tune = tmp_path / "tune"
    shutil.copytree(golden / "mplug_owl2_lora", tune)
    for file in tune.iterdir():
        file.chmod(0o644)
    others = torch.load(tune / "non_lora_trainables.bin", weights_only=True)
    new = ("deepmlp.", "model.embed_tokens.", "lm_head.")
    others |= {
        f"base_model.model.{name}": tensor for name, tensor in state.items() if name.startswith(new)
    }
    torch.save(others, tune / "non_lora_trainables.bin")
    edit_config(tune, vocab_size=1005)
    if layout == "ours":
        command("convert", base, tmp_path / "base")
        base = tmp_path / "base"
    command("convert", tune, tmp_path / "target", "--base", base)

    expected = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    found, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "target", output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids, images = rows(expected)
    inputs = {**pad(ids), "pixel_values": images}
    torch.testing.assert_close(found.eval()(**inputs).logits, expected(**inputs).logits)
    processor = AutoProcessor.from_pretrained(tmp_path / "target")
    assert processor.tokenizer.convert_tokens_to_ids(TOKENS) == list(range(1000, 1005))
    assert processor.image_processor.image_aspect_ratio == "pad"
    command("verify", tmp_path / "target")


@torch.no_grad()
def test_a_merged_checkpoint_is_converted_there_and_back(model, checkpoint, tmp_path):
    command("convert", checkpoint[0], tmp_path / "ours")
    command("verify", tmp_path / "ours", "--against", checkpoint[0])
    command("convert", tmp_path / "ours", tmp_path / "back", "--to", "original")
    for file in ("tokenizer.model", "conversion_report.json"):  # as save_pretrained leaves a folder
        (tmp_path / "ours" / file).unlink()
    command("convert", tmp_path / "ours", tmp_path / "half", "--dtype", "bfloat16")
    assert AutoProcessor.from_pretrained(tmp_path / "half").image_token_id == 1005
    ids, images = rows(model)
    inputs = {**pad(ids), "pixel_values": images}
    for folder in ("ours", "back"):
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path / folder).eval()
        torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits)
