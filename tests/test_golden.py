"""Numbers of the original, reproduced by its own weights through the shipped conversion."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file

from owl2_hf.conversion import convert
from owl2_hf.modeling import MplugOwl2ForConditionalGeneration
from owl2_hf.modeling.conversion_mplug_owl2 import to_ours

from .original import expand_markers

SETS = ["A", "B", "C", "C2", "S"]
TOLERANCE = 1e-5  # largest error over the largest number


class GoldenSet:
    def __init__(self, folder, converted, attn_implementation):
        self.model = MplugOwl2ForConditionalGeneration.from_pretrained(
            converted, attn_implementation=attn_implementation
        ).eval()
        self.config = self.model.config
        self.tensors = load_file(folder / "cases.safetensors")
        self.cases = json.loads((folder / "cases.json").read_text())["cases"]

    def case(self, name):
        if name not in self.cases:
            pytest.skip(f"this set has no case {name}")
        prefix = name + "/"
        return {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}

    def inputs(self, case, **kwargs):
        inputs = expand_markers(
            case["input_ids"], self.config, case.get("labels"), case.get("attention_mask"), **kwargs
        )
        if "images" in case and (inputs["input_ids"] == self.config.image_token_id).any():
            inputs["pixel_values"] = case["images"].reshape(-1, *case["images"].shape[-3:])
        return inputs


@pytest.fixture(scope="module")
def converted_sets(tmp_path_factory, golden_dir):
    folders = {}

    def get(name):
        if name not in folders:
            source = golden_dir(name)
            target = tmp_path_factory.mktemp(name) / "converted"
            convert(source / "hf", target)
            folders[name] = source, target
        return folders[name]

    return get


@pytest.fixture(scope="module", params=[(s, a) for s in SETS for a in ("eager", "sdpa")], ids="-".join)
def golden(request, converted_sets):
    name, attn_implementation = request.param
    return GoldenSet(*converted_sets(name), attn_implementation)


def assert_close(actual, expected, floor=0.0):
    expected = expected.to(actual.dtype)
    assert actual.shape == expected.shape
    error = (actual - expected).abs().max() / expected.abs().max().clamp_min(floor)
    assert error < TOLERANCE, f"relative error {error:.2e}"


def text_logits(golden, output):
    return output.logits[..., : golden.config.output_vocab_size]


@pytest.mark.parametrize("name", ["c1_one_image", "c2_two_images"])
def test_vision_and_abstractor_give_the_originals_numbers(golden, name):
    case = golden.case(name)
    golden.model.set_attn_implementation("eager")
    features = golden.model.get_image_features(case["images"], output_hidden_states=True, output_attentions=True)
    assert_close(features.last_hidden_state, case["vision_last_hidden_state"])
    assert_close(torch.stack(features.hidden_states), case["vision_hidden_states"])
    assert_close(torch.stack(features.attentions), case["vision_attentions"])
    assert_close(torch.stack(features.abstractor_hidden_states[1:]), case["abstractor_layer_outputs"])
    assert_close(torch.stack(features.pooler_output), case["abstractor_last_hidden_state"])
    assert len(features.abstractor_attentions) == golden.config.abstractor_config.num_hidden_layers


@pytest.mark.parametrize(
    "name", ["c1_one_image", "c2_two_images", "c2b_adjacent_leading", "c2c_image_last", "c3_text_only", "c4_batch2"]
)
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
    golden.model.set_attn_implementation("eager")
    output = golden.model(**golden.inputs(case), output_attentions=True, use_cache=True)
    assert_close(torch.stack(output.attentions), case["attentions"])
    assert_close(torch.stack([layer.keys for layer in output.past_key_values.layers]), case["past_keys"])
    assert_close(torch.stack([layer.values for layer in output.past_key_values.layers]), case["past_values"])


@torch.no_grad()
def test_several_frames_behind_one_marker(golden):
    case = golden.case("c9_images_5d")
    frames = case["images"].shape[1]
    output = golden.model(**golden.inputs(case, tokens_per_marker=frames * golden.config.num_image_tokens))
    assert_close(text_logits(golden, output), case["logits"])


@torch.no_grad()
def test_prompt_beyond_the_trained_length(golden):
    case = golden.case("c11_beyond_max_positions")
    output = golden.model(**golden.inputs(case), logits_to_keep=4)
    assert_close(text_logits(golden, output), case["last_logits"])


@pytest.mark.parametrize(
    "name", ["c5_labels_one_image", "c5b_labels_batch2", "c5c_labels_right_padded", "c5d_labels_ragged"]
)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@torch.no_grad()
def test_loss_is_the_originals(golden, name, training):
    case = golden.case(name)
    golden.model.train(training)
    inputs = golden.inputs(case)
    if name == "c5d_labels_ragged":  # The original feeds a text-only row a picture that nobody looks at.
        num_pictures = int((case["input_ids"] == -200).sum())
        inputs["pixel_values"] = inputs["pixel_values"][:num_pictures]
    output = golden.model(**inputs)
    assert_close(output.loss, case["loss"])
    mask = inputs["attention_mask"].bool()
    assert_close(text_logits(golden, output)[mask], case["logits"][mask])


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_gradients_are_the_originals(golden, training):
    case = golden.case("c7_grads")
    golden.model.train(training)
    golden.model.zero_grad()
    golden.model(**golden.inputs(case)).loss.backward()
    ours = {name: parameter.grad for name, parameter in golden.model.named_parameters()}
    compared = 0
    for key, expected in case.items():
        if not key.startswith("grad."):
            continue
        # The conversion is linear, so it maps gradients as it maps weights.
        for name, gradient in to_ours(key.removeprefix("grad."), expected, golden.config):
            # The floor is for key biases: softmax cancels them, so their gradients are rounding noise.
            assert_close(ours[name], gradient, floor=1e-2)
            compared += 1
    assert compared >= 20


@pytest.mark.parametrize(
    "name", ["c6_generate_one_image", "c6b_generate_two_images", "c6c_generate_text", "c6d_generate_batch2"]
)
def test_greedy_generation_gives_the_originals_ids_and_scores(golden, name):
    case = golden.case(name)
    output = golden.model.generate(
        **golden.inputs(case),
        max_new_tokens=12,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert torch.stack(output.logits).shape[0] == case["new_ids"].shape[1]
    assert output.sequences[:, -case["new_ids"].shape[1] :].tolist() == case["new_ids"].tolist()
    scores = torch.stack(output.logits, dim=1)[..., : golden.config.output_vocab_size]
    assert_close(scores, case["scores"])


def test_beam_search_gives_the_originals_ids(golden):
    case = golden.case("c6e_beam3")
    inputs = golden.inputs(case)
    new_ids = case["new_ids"]
    output = golden.model.generate(**inputs, max_new_tokens=new_ids.shape[1], num_beams=3, do_sample=False)
    assert output[:, inputs["input_ids"].shape[1] :].tolist() == new_ids.tolist()


@pytest.mark.parametrize(("name", "dtype"), [("c12_bf16", torch.bfloat16), ("c12_fp16", torch.float16)])
@torch.no_grad()
def test_half_precision_stays_near_the_originals(golden, name, dtype):
    case = golden.case(name)
    if "input_ids" not in case:
        case = {**golden.case("c5_labels_one_image"), **case}
    reference = golden.case("c5_labels_one_image")["logits"]
    output = copy.deepcopy(golden.model).to(dtype)(**golden.inputs(case))
    error = (text_logits(golden, output).float() - reference).abs().max()
    # The original's own distance to its float32 run, with as much again for another order of rounding.
    assert error < 2 * golden.cases[name]["max_abs_diff_to_fp32"] + 1e-3
