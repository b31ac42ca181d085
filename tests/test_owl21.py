"""mPLUG-Owl2.1, whose decoder is Qwen's: the original's numbers, names and tokenizer."""

import pytest
import torch

from owl2_hf.conversion import convert
from owl2_hf.modeling.conversion_mplug_owl2 import (
    to_ours,
)

from .test_golden import GoldenSet, assert_close, text_logits


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
    return GoldenSet(source, converted, request.param)


@pytest.mark.parametrize("name", ["c1_one_image", "c2_two_images"])
@torch.no_grad()
def test_vision_and_abstractor_give_the_originals_numbers(golden, name):
    case = golden.case(name)
    embeddings = golden.model.model.vision_tower.embeddings
    assert_close(embeddings._positions()[0], case["vision_interpolated_position_embedding"])
    assert_close(embeddings(case["images"]), case["vision_embeddings"])
    features = golden.model.get_image_features(case["images"], output_hidden_states=True)
    assert_close(features.last_hidden_state, case["vision_last_hidden_state"])
    assert_close(torch.stack(features.hidden_states), case["vision_hidden_states"])
    assert_close(torch.stack(features.abstractor_hidden_states[1:]), case["abstractor_layer_outputs"])
    assert_close(torch.stack(features.pooler_output), case["abstractor_last_hidden_state"])


@pytest.mark.parametrize(
    "name",
    ["c1_one_image", "c2_two_images", "c2b_adjacent_leading", "c3_text_only", "c3b_text_only_dummy_image", "c4_batch2"],
)
@torch.no_grad()
def test_language_model_gives_the_originals_numbers(golden, name):
    case = golden.case(name)
    output = golden.model(**golden.inputs(case), output_hidden_states=True)
    assert_close(text_logits(golden, output), case["logits"])
    assert_close(torch.stack(output.hidden_states), case["hidden_states"])


@pytest.mark.parametrize("name", ["c1_one_image", "c3_text_only"])
@torch.no_grad()
def test_the_cache_is_the_originals(golden, name):
    case = golden.case(name)
    layers = golden.model(**golden.inputs(case), use_cache=True).past_key_values.layers
    # Upstream: positions stand before heads.
    assert_close(torch.stack([layer.keys for layer in layers]).transpose(2, 3), case["past_keys"])
    assert_close(torch.stack([layer.values for layer in layers]).transpose(2, 3), case["past_values"])


@pytest.mark.parametrize("name", ["c5_labels_one_image", "c5d_labels_ragged"])
@torch.no_grad()
def test_loss_is_the_originals(golden, name):
    case = golden.case(name)
    inputs = golden.inputs(case)
    output = golden.model(**inputs)
    assert_close(output.loss, case["loss"])
    mask = inputs["attention_mask"].bool()
    assert_close(text_logits(golden, output)[mask], case["logits"][mask])


def test_gradients_are_the_originals(golden):
    case = golden.case("c7_grads")
    golden.model.zero_grad()
    golden.model(**golden.inputs(case)).loss.backward()
    ours = {name: parameter.grad for name, parameter in golden.model.named_parameters()}
    compared = 0
    for key, expected in case.items():
        if key.startswith("grad."):
            for name, gradient in to_ours(key.removeprefix("grad."), expected, golden.config):
                assert_close(ours[name], gradient, floor=1e-2)
                compared += 1
    assert compared >= 20


@pytest.mark.parametrize("name", ["c6_generate_one_image", "c6b_generate_two_images", "c6c_generate_text"])
def test_greedy_generation_gives_the_originals_ids_and_scores(golden, name):
    case = golden.case(name)
    new_ids = case["new_ids"]
    output = golden.model.generate(
        **golden.inputs(case),
        max_new_tokens=new_ids.shape[1],
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert output.sequences[:, -new_ids.shape[1] :].tolist() == new_ids.tolist()
    scores = torch.stack(output.logits, dim=1)[..., : golden.config.output_vocab_size]
    assert_close(scores, case["scores"])


@pytest.mark.parametrize("name", ["c11_near_seq_length", "x12_beyond_seq_length"])
@torch.no_grad()
def test_long_prompts_give_the_originals_numbers(golden, name):
    case = golden.case(name)
    count = case["last_logits"].shape[1]
    output = golden.model(**golden.inputs(case), logits_to_keep=count)
    assert_close(text_logits(golden, output), case["last_logits"])
