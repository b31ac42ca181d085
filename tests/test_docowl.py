"""DocOwl 1.5: the H-Reducer in place of the abstractor, and documents cut into crops of their shape."""

import copy

import pytest
import torch

from owl2_hf.modeling.conversion_mplug_owl2 import to_ours

from .conversion.conftest import command
from .test_golden import GoldenSet, assert_close, text_logits


@pytest.fixture(scope="module")
def converted(golden_dir, tmp_path_factory):
    target = tmp_path_factory.mktemp("docowl") / "converted"
    command("convert", golden_dir("H1") / "hf", target)
    return target


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def golden(request, golden_dir, converted):
    return GoldenSet(golden_dir("H1"), converted, request.param)


@pytest.mark.parametrize("name", ["c1_one_image", "c2_three_crops"])
@torch.no_grad()
def test_vision_and_h_reducer_give_the_originals_numbers(golden, name):
    case = golden.case(name)
    seen = {}
    reducer = golden.model.model.h_reducer
    hooks = [
        reducer.reducer_before.register_forward_hook(lambda _, args, out: seen.update(before=out)),
        reducer.reducer.register_forward_hook(lambda _, args, out: seen.update(input=args[0], reducer=out)),
    ]
    features = golden.model.get_image_features(case["images"], output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    assert_close(features.last_hidden_state, case["vision_last_hidden_state"])
    assert_close(torch.stack(features.hidden_states), case["vision_hidden_states"])
    assert_close(seen["input"], case["connector_reducer_input"])
    assert_close(torch.nn.functional.gelu(seen["before"]), case["connector_reducer_before"])
    assert_close(seen["reducer"], case["connector_reducer"])
    assert_close(torch.stack(features.pooler_output), case["connector_output"])
    assert features.abstractor_hidden_states is None


@pytest.mark.parametrize("name", ["c1_one_image", "c2_three_crops", "c2b_adjacent", "c3_text_only", "c4_batch2"])
@torch.no_grad()
def test_language_model_gives_the_originals_numbers(golden, name):
    case = golden.case(name)
    output = golden.model(**golden.inputs(case), output_hidden_states=True)
    assert_close(text_logits(golden, output), case["logits"])
    assert_close(torch.stack(output.hidden_states), case["hidden_states"])


@pytest.mark.parametrize("name", ["c1_one_image", "c3_text_only"])
@torch.no_grad()
def test_attentions_and_cache_are_the_originals(golden, name):
    case = golden.case(name)
    model = copy.deepcopy(golden.model)
    model.set_attn_implementation("eager")
    output = model(**golden.inputs(case), output_attentions=True, use_cache=True)
    assert_close(torch.stack(output.attentions), case["attentions"])
    assert_close(torch.stack([layer.keys for layer in output.past_key_values.layers]), case["past_keys"])
    assert_close(torch.stack([layer.values for layer in output.past_key_values.layers]), case["past_values"])


@torch.no_grad()
def test_several_crops_behind_one_marker(golden):
    case = golden.case("c9_images_5d")
    run = case["images"].shape[1] * golden.config.num_image_tokens
    output = golden.model(**golden.inputs(case, tokens_per_marker=run))
    assert_close(text_logits(golden, output), case["logits"])


@torch.no_grad()
def test_ten_crops_reach_beyond_the_trained_length(golden):
    case = golden.case("c11_ten_crops_beyond_max_positions")
    output = golden.model(**golden.inputs(case), logits_to_keep=8)
    assert_close(text_logits(golden, output), case["last_logits"])


@pytest.mark.parametrize("name", ["c5_labels_one_image", "c5b_labels_batch2", "c5d_labels_ragged"])
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
    expected = {key.removeprefix("grad."): tensor for key, tensor in case.items() if key.startswith("grad.")}
    assert len(expected) >= 10 and any("vision2text" in key for key in expected)
    for key, tensor in expected.items():
        for name, gradient in to_ours(key, tensor, golden.config):
            assert_close(ours[name], gradient)
    norms = golden.cases["c7_grads"]["grad_norms_all"]
    for key, norm in norms.items():
        if "vision2text" in key:
            gradient = ours[key.replace("vision2text", "h_reducer").replace("before.0", "before")]
            assert (gradient is None) == (norm is None), key
            assert norm is None or abs(gradient.norm().item() / norm - 1) < 1e-5, key


def test_the_norm_nobody_applies_gets_zeros_in_training(golden):
    model = copy.deepcopy(golden.model).train()
    model(**golden.inputs(golden.case("c5_labels_one_image"))).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert not model.model.h_reducer.ln_q.weight.grad.any()


@pytest.mark.parametrize("name", ["c6_generate_one_image", "c6b_generate_three_crops", "c6c_generate_text"])
def test_greedy_generation_gives_the_originals_ids_and_scores(golden, name):
    case = golden.case(name)
    num_new = case["new_ids"].shape[1]
    output = golden.model.generate(
        **golden.inputs(case),
        max_new_tokens=num_new,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert output.sequences[:, -num_new:].tolist() == case["new_ids"].tolist()
    assert_close(torch.stack(output.logits, dim=1)[..., : golden.config.output_vocab_size], case["scores"])
