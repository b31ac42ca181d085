"""Single formulas of the model, each against what it must give, without numbers of the original."""

import math

import numpy as np
import pytest
import torch

from owl2_hf.modeling import MplugOwl2ForConditionalGeneration, MplugOwl2VisionModel
from owl2_hf.modeling.configuration_mplug_owl2 import (
    MplugOwl2AbstractorConfig,
    MplugOwl2TextConfig,
    MplugOwl2VisionConfig,
)
from owl2_hf.modeling.modeling_mplug_owl2 import RESERVED_LOGIT
from owl2_hf.modeling.modeling_mplug_owl2_abstractor import image_position_table, sincos_table
from owl2_hf.modeling.modeling_mplug_owl2_text import (
    MplugOwl2NtkRotaryEmbedding,
    log_n_scale,
    prompt_lengths,
)

from .test_modeling_mplug_owl2 import tiny_config


def test_sines_and_cosines_have_frequencies_from_1_down_to_1_in_10000():
    table = sincos_table(np.array([0.0, 3.0]), 8)
    assert table.shape == (2, 8)
    np.testing.assert_allclose(table[0], [0, 0, 0, 0, 1, 1, 1, 1])
    for place in range(4):
        angle = 3.0 * 10000 ** (-place / 4)
        np.testing.assert_allclose(table[1, place], math.sin(angle), rtol=1e-6)
        np.testing.assert_allclose(table[1, 4 + place], math.cos(angle), rtol=1e-6)


def test_a_patch_has_its_column_in_the_first_half_and_its_row_in_the_second():
    config = MplugOwl2AbstractorConfig(
        hidden_size=8, encoder_hidden_size=8, num_attention_heads=2, grid_size=3
    )
    table = image_position_table(config)
    assert table.shape == (1 + 9, 8) and not table[0].any()  # the class token has no place
    row, column = 2, 1
    expected = np.concatenate([sincos_table([column], 4)[0], sincos_table([row], 4)[0]])
    np.testing.assert_allclose(table[1 + 3 * row + column].numpy(), expected, rtol=1e-6)


def test_positions_of_patches_are_read_at_the_centres_of_a_larger_table():
    config = MplugOwl2VisionConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=4,
        use_cls_token=False,
        position_grid_size=16,
    )
    embeddings = MplugOwl2VisionModel(config).embeddings
    rows = torch.arange(16.0)[:, None].expand(16, 16)
    with torch.no_grad():
        embeddings.position_embedding[:] = rows.flatten()[:, None]
        found = embeddings._positions().reshape(7, 7, 8)
    centres = (torch.arange(7.0) + 0.5) * 16 / 7 - 0.5
    expected = centres[:, None, None].expand(7, 7, 8)
    # Not exactly: torch's cubic does not keep a slope, and patches at the edge reach over it.
    torch.testing.assert_close(found[1:-1], expected[1:-1], rtol=0, atol=0.06)


@torch.no_grad()
def test_tokens_behind_a_cache_are_read_at_their_own_positions():
    torch.manual_seed(0)
    model = MplugOwl2ForConditionalGeneration(tiny_config()).eval()
    ids = torch.randint(1, 80, (2, 9))
    cache = model(ids[:, :6], use_cache=True).cache
    step = model(ids[:, 6:], cache=cache).logits
    torch.testing.assert_close(step, model(ids).logits[:, 6:], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_first_id_behind_the_vocabulary_is_reserved_whatever_the_placeholder_is():
    config = tiny_config()
    config.image_token_id = 40
    model = MplugOwl2ForConditionalGeneration(config).eval()
    logits = model(torch.tensor([[1, 5, 6]])).logits
    is_reserved = logits.eq(RESERVED_LOGIT).all(0).all(0)
    assert is_reserved.nonzero().flatten().tolist() == [40, *range(90, 96)]


@torch.no_grad()
def test_the_loss_is_the_mean_over_the_labels_that_something_predicts():
    model = MplugOwl2ForConditionalGeneration(tiny_config()).eval()
    ids = torch.tensor([[7, 5, 6, 8]])
    output = model(ids, labels=ids)  # nothing predicts the first one
    expected = torch.nn.functional.cross_entropy(output.logits[0, :-1], ids[0, 1:])
    torch.testing.assert_close(output.loss, expected)


def test_the_length_of_a_prompt_counts_its_first_position():
    positions = torch.tensor([[0, 1, 2, 3], [0, 0, 0, 1]])
    assert prompt_lengths(positions, None).tolist() == [[4], [2]]


@pytest.mark.parametrize(("length", "power"), [(16, 1), (17, 3), (32, 3), (33, 7), (64, 7)])
def test_the_rotary_base_grows_with_each_doubling_of_the_trained_length(length, power):
    config = MplugOwl2TextConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        rope_dynamic_ntk_length=16,
    )
    rotary = MplugOwl2NtkRotaryEmbedding(config=config)
    positions = torch.tensor([[5]])
    cosines, sines = rotary(torch.zeros(1, 1, 32), positions, torch.tensor([[length]]))
    base = config.rope_parameters["rope_theta"] * power ** (8 / 6)  # heads of width 8
    for place in range(4):
        angle = 5 * base ** (-place / 4)
        for half in (place, place + 4):
            assert cosines[0, 0, half].item() == pytest.approx(math.cos(angle), abs=1e-5)
            assert sines[0, 0, half].item() == pytest.approx(math.sin(angle), abs=1e-5)


def test_queries_beyond_the_trained_length_are_scaled_by_a_logarithm():
    scale = log_n_scale(torch.tensor([[0, 14, 15, 16, 255]]), 16, torch.float32)
    assert scale.shape == (1, 1, 5, 1)
    expected = [1.0, 1.0, 1.0, math.log(17) / math.log(16), 2.0]
    assert scale.flatten().tolist() == pytest.approx(expected, abs=1e-6)
