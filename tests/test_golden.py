"""Numbers of the original, reproduced by its own weights through the shipped conversion: the whole
family.

H1 is DocOwl 1.5 and Q1 mPLUG-Owl2.1; their own peculiarities are in test_docowl.py and
test_owl21.py.
"""

import copy
import json

import pytest
import torch

from owl2_hf.conversion import convert
from owl2_hf.modeling.conversion_mplug_owl2 import to_ours

from .conftest import find_golden
from .original import GoldenSet

SETS = ["A", "B", "C", "C2", "S", "H1", "Q1"]
TOLERANCE = 1e-5  # largest error over the largest number


def cases(*names):
    """Runs a test for each set with each of its cases of these names; a set that is not here is
    skipped once.
    """
    pairs = []
    for set_name in SETS:
        folder = find_golden(set_name)
        listed = folder / "cases.json" if folder else None
        known = (
            json.loads(listed.read_text())["cases"] if listed and listed.is_file() else names[:1]
        )
        pairs += [
            ((set_name, attention), name)
            for attention in ("eager", "sdpa")
            for name in names
            if name in known
        ]
    ids = ["-".join((*params, name)) for params, name in pairs]
    return pytest.mark.parametrize(("golden", "name"), pairs, indirect=["golden"], ids=ids)


@pytest.fixture(scope="module")
def converted_sets(tmp_path_factory, golden_dir):
    folders = {}

    def get(name):
        if name not in folders:
            source = golden_dir(name)
            if not (source / "hf").is_dir():
                pytest.skip(
                    f"golden set {name} is not here as a whole; OWL2_HF_GOLDEN names the folder "
                    "that holds it"
                )
            target = tmp_path_factory.mktemp(name) / "converted"
            convert(source / "hf", target)
            folders[name] = source, target
        return folders[name]

    return get


@pytest.fixture(scope="module")
def golden(request, converted_sets):
    name, attn_implementation = request.param
    return GoldenSet(*converted_sets(name), attn_implementation=attn_implementation)


def assert_close(actual, expected, floor=0.0):
    expected = expected.to(actual.dtype)
    assert actual.shape == expected.shape
    error = (actual - expected).abs().max() / expected.abs().max().clamp_min(floor)
    assert error < TOLERANCE, f"relative error {error:.2e}"


def text_logits(golden, output):
    return output.logits[..., : golden.config.output_vocab_size]


def eager_copy(model):
    """The same weights with the attention that shows its weights."""
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    return model


@cases("c1_one_image", "c2_two_images", "c2_three_crops")
@torch.no_grad()
def test_vision_and_connector_give_the_originals_numbers(golden, name):
    case = golden.case(name)
    features = golden.model.get_image_features(case["images"], output_hidden_states=True)
    assert_close(features.last_hidden_state, case["vision_last_hidden_state"])
    assert_close(torch.stack(features.hidden_states), case["vision_hidden_states"])
    if golden.config.connector_type == "h_reducer":
        assert_close(torch.stack(features.pooler_output), case["connector_output"])
        assert features.abstractor_hidden_states is None
    else:
        assert_close(torch.stack(features.pooler_output), case["abstractor_last_hidden_state"])
        assert_close(
            torch.stack(features.abstractor_hidden_states[1:]), case["abstractor_layer_outputs"]
        )
    if "vision_attentions" in case:
        features = eager_copy(golden.model).get_image_features(
            case["images"], output_attentions=True
        )
        assert_close(torch.stack(features.attentions), case["vision_attentions"])
        assert (
            len(features.abstractor_attentions) == golden.config.abstractor_config.num_hidden_layers
        )


@cases(
    "c1_one_image",
    "c2_two_images",
    "c2_three_crops",
    "c2b_adjacent",
    "c2b_adjacent_leading",
    "c2c_image_last",
    "c3_text_only",
    "c3b_text_only_dummy_image",
    "c4_batch2",
)
@torch.no_grad()
def test_language_model_gives_the_originals_numbers(golden, name):
    case = golden.case(name)
    output = golden.model(**golden.inputs(case), output_hidden_states=True)
    assert_close(text_logits(golden, output), case["logits"])
    assert_close(torch.stack(output.hidden_states), case["hidden_states"])


@cases("c1_one_image", "c3_text_only")
@torch.no_grad()
def test_attentions_and_cache_are_the_originals(golden, name):
    case = golden.case(name)
    layers = golden.model(**golden.inputs(case), use_cache=True).past_key_values.layers
    for kind, tensors in (
        ("keys", [one.keys for one in layers]),
        ("values", [one.values for one in layers]),
    ):
        cached = torch.stack(tensors)
        # Upstream: in mPLUG-Owl2.1 positions stand before heads.
        assert_close(
            cached.transpose(2, 3) if golden.config.is_owl21 else cached, case[f"past_{kind}"]
        )
    if "attentions" in case:
        output = eager_copy(golden.model)(**golden.inputs(case), output_attentions=True)
        assert_close(torch.stack(output.attentions), case["attentions"])


@torch.no_grad()
@cases("c9_images_5d")
def test_several_frames_behind_one_marker(golden, name):
    case = golden.case(name)
    frames = case["images"].shape[1]
    output = golden.model(
        **golden.inputs(case, tokens_per_marker=frames * golden.config.num_image_tokens)
    )
    assert_close(text_logits(golden, output), case["logits"])


@cases(
    "c11_beyond_max_positions",
    "c11_ten_crops_beyond_max_positions",
    "c11_near_seq_length",
    "x12_beyond_seq_length",
)
@torch.no_grad()
def test_long_prompts_give_the_originals_numbers(golden, name):
    case = golden.case(name)
    output = golden.model(**golden.inputs(case), logits_to_keep=case["last_logits"].shape[1])
    assert_close(text_logits(golden, output), case["last_logits"])


@cases("c5_labels_one_image", "c5b_labels_batch2", "c5c_labels_right_padded", "c5d_labels_ragged")
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@torch.no_grad()
def test_loss_is_the_originals(golden, name, training):
    case = golden.case(name)
    golden.model.train(training)
    inputs = golden.inputs(case)
    # The original feeds a text-only row an image that nobody looks at.
    if name == "c5d_labels_ragged":
        num_pictures = int((case["input_ids"] == -200).sum())
        inputs["pixel_values"] = inputs["pixel_values"][:num_pictures]
    output = golden.model(**inputs)
    assert_close(output.loss, case["loss"])
    mask = inputs["attention_mask"].bool()
    assert_close(text_logits(golden, output)[mask], case["logits"][mask])


@cases("c7_grads")
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_gradients_are_the_originals(golden, name, training):
    case = golden.case(name)
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
            # The floor is for key biases: softmax cancels them, so their gradients are rounding
            # noise.
            assert_close(ours[name], gradient, floor=0.0 if golden.name == "H1" else 1e-2)
            compared += 1
    assert compared >= (10 if golden.name == "H1" else 20)


@cases(
    "c6_generate_one_image",
    "c6b_generate_two_images",
    "c6b_generate_three_crops",
    "c6c_generate_text",
    "c6d_generate_batch2",
)
def test_greedy_generation_gives_the_originals_ids_and_scores(golden, name):
    case = golden.case(name)
    output = golden.model.generate(
        **golden.inputs(case),
        max_new_tokens=10 if golden.name in ("H1", "Q1") else 12,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert torch.stack(output.logits).shape[0] == case["new_ids"].shape[1]
    assert output.sequences[:, -case["new_ids"].shape[1] :].tolist() == case["new_ids"].tolist()
    scores = torch.stack(output.logits, dim=1)[..., : golden.config.output_vocab_size]
    assert_close(scores, case["scores"])


@cases("c6e_beam3")
def test_beam_search_gives_the_originals_ids(golden, name):
    case = golden.case(name)
    inputs = golden.inputs(case)
    new_ids = case["new_ids"]
    output = golden.model.generate(
        **inputs, max_new_tokens=new_ids.shape[1], num_beams=3, do_sample=False
    )
    assert output[:, inputs["input_ids"].shape[1] :].tolist() == new_ids.tolist()


@cases("c12_bf16", "c12_fp16")
@torch.no_grad()
def test_half_precision_stays_near_the_originals(golden, name):
    case = golden.case(name)
    dtype = {"c12_bf16": torch.bfloat16, "c12_fp16": torch.float16}[name]
    if "input_ids" not in case:
        case = {**golden.case("c5_labels_one_image"), **case}
    reference = golden.case("c5_labels_one_image")["logits"]
    output = copy.deepcopy(golden.model).to(dtype)(**golden.inputs(case))
    error = (text_logits(golden, output).float() - reference).abs().max()
    # The original's own distance to its float32 run, with as much again for another order of
    # rounding.
    assert error < 2 * golden.cases[name]["max_abs_diff_to_fp32"] + 1e-3
