"""The losses of scorers: values and gradients of the original's functions, and what they refuse."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from owl2_hf.scoring.losses import (
    LossWeights,
    fidelity_loss,
    in_level_loss,
    level_kl,
    level_logits,
    level_positions,
    level_scores,
    pair_loss,
    preference,
    rest_loss,
    total_loss,
)

CASES = ("one", "four", "ragged")


@pytest.fixture(scope="module")
def golden(golden_dir):
    folder = golden_dir("L")
    return json.loads((folder / "cases.json").read_text()), load_file(folder / "cases.safetensors")


def of_case(golden, name):
    case, tensors = golden[0][name], golden[1]
    logits, labels = tensors[f"{name}/logits"], tensors[f"{name}/labels"]
    positions = level_positions(labels, case["level_prefix"])
    return (
        case,
        logits,
        labels,
        positions,
        {key: tensors[f"{name}/{key}"] for key in tensors_of(tensors, name)},
    )


def tensors_of(tensors, name):
    return [key.partition("/")[2] for key in tensors if key.startswith(f"{name}/")]


@pytest.mark.parametrize("name", CASES)
def test_losses_of_single_images_are_those_of_the_original(golden, name):
    case, logits, labels, positions, tensors = of_case(golden, name)
    found = level_logits(logits, positions)
    kl = level_kl(found, case["level_ids"], tensors["level_probs"])
    rest = rest_loss(logits, labels, positions)
    assert float(kl) == pytest.approx(case["kl"], abs=1e-5)
    assert float(rest + kl) == pytest.approx(case["cross_entropy_without_level_plus_kl"], abs=1e-5)
    assert float(in_level_loss(found, case["level_ids"])) == pytest.approx(
        case["in_level"], abs=1e-6
    )


@pytest.mark.parametrize("name", CASES)
def test_scores_over_the_levels_and_over_the_vocabulary_are_those_of_the_original(golden, name):
    case, logits, _, positions, tensors = of_case(golden, name)
    found = level_logits(logits, positions)
    for ending, over_vocabulary in (("", False), ("_open", True)):
        scores, stds = level_scores(found, case["level_ids"], over_vocabulary=over_vocabulary)
        torch.testing.assert_close(scores, tensors[f"scores{ending}"])
        torch.testing.assert_close(stds, tensors[f"stds{ending}"])


def test_the_slope_of_kl_is_the_difference_of_the_probabilities(golden):
    case, logits, _, positions, tensors = of_case(golden, "four")
    found = level_logits(logits, positions).requires_grad_()
    level_kl(found, case["level_ids"], tensors["level_probs"]).backward()
    expected = found.detach().softmax(-1)
    expected[:, case["level_ids"]] -= tensors["level_probs"]
    torch.testing.assert_close(found.grad, expected / 4)


def test_the_loss_of_the_rest_leaves_the_level_alone(golden):
    _, logits, labels, positions, _ = of_case(golden, "ragged")
    logits = logits.clone().requires_grad_()
    rest_loss(logits, labels, positions).backward()
    rows = torch.arange(len(labels))
    assert not logits.grad[rows, positions - 1].any()
    assert (
        logits.grad[rows, positions - 2].any(-1).all()
        and logits.grad[rows, positions].any(-1).all()
    )
    only_level = torch.full_like(labels, -100).scatter(1, positions[:, None], 3)
    assert float(rest_loss(logits.detach(), only_level, positions)) == 0


@pytest.mark.parametrize("is_fixed", [True, False])
def test_the_fidelity_loss_and_its_gradient_are_those_of_the_original(golden, is_fixed):
    cases, tensors = golden
    pair = {key: tensors[f"pair/{key}"] for key in tensors_of(tensors, "pair")}
    first = pair["pred_a"].clone().requires_grad_()
    loss = pair_loss(
        (first, pair["pred_b"]),
        (pair["gt_a"], pair["gt_b"]),
        (pair["gt_std_a"], pair["gt_std_b"]),
        None if is_fixed else (pair["pred_std_a"], pair["pred_std_b"]),
    )
    loss.backward()
    assert loss.item() == pytest.approx(cases["pair"][f"fidelity_fix_std_{is_fixed}"], abs=1e-6)
    torch.testing.assert_close(first.grad, pair[f"grad_pred_a_fix_std_{is_fixed}"])


@pytest.mark.parametrize("kind", ["fidelity", "bce"])
def test_pairs_without_deviations_are_those_of_the_original(golden, kind):
    cases, tensors = golden
    scores, mos = ([tensors[f"pair/{name}_{one}"] for one in "ab"] for name in ("pred", "gt"))
    assert float(pair_loss(scores, mos, kind=kind)) == pytest.approx(
        cases["pair"][f"binary_{kind}"], abs=1e-6
    )


def test_deviations_of_the_scores_are_detached_unless_told_otherwise(golden):
    tensors = golden[1]
    scores, mos, stds = (
        [tensors[f"pair/{name}_{one}"] for one in "ab"] for name in ("pred", "gt", "gt_std")
    )
    own = [tensors[f"pair/pred_std_{one}"].clone().requires_grad_() for one in "ab"]
    scores[0] = scores[0].clone().requires_grad_()
    pair_loss(scores, mos, stds, own).backward()
    assert own[0].grad is None
    pair_loss(scores, mos, stds, own, detach_score_stds=False).backward()
    assert own[0].grad.abs().sum() > 0


def test_a_preference_follows_the_normal_distribution():
    first, second = torch.tensor([3.0, 1.0]), torch.tensor([2.0, 1.0])
    expected = [0.5 * math.erfc(-1 / math.sqrt(2) / math.sqrt(2)), 0.5]
    assert preference(first, second, 2.0).tolist() == pytest.approx(expected)
    assert float(fidelity_loss(torch.tensor([0.3]), torch.tensor([0.3]))) == pytest.approx(
        0, abs=1e-6
    )


def test_the_parts_sum_with_their_weights():
    parts = {"pair": torch.tensor(0.5), "next_token": [torch.tensor(2.0), torch.tensor(4.0)]}
    parts |= {
        "kl": [torch.tensor(1.0), torch.tensor(3.0)],
        "in_level": [torch.tensor(0.2), torch.tensor(0.3)],
    }
    assert float(total_loss(**parts)) == pytest.approx(0.5 + 0.05 * (2 + 4 + 1 + 3))
    weights = LossWeights(pair=2.0, image=0.5, level=10.0, in_level=100.0)
    assert float(total_loss(**parts, weights=weights)) == pytest.approx(
        1 + 0.5 * (6 + 40) + 100 * 0.5
    )
    assert float(total_loss(0.0, parts["next_token"][:1], parts["kl"][:1])) == pytest.approx(
        0.05 * 3
    )


def test_the_mass_beside_the_levels_has_a_floor():
    logits = torch.zeros(2, 7)
    logits[:, 3] = 50.0
    assert float(in_level_loss(logits, [3, 4])) == pytest.approx(0.01)
    assert float(in_level_loss(logits, [1, 2])) == pytest.approx(1)


def test_a_level_may_open_the_answer():
    labels = torch.tensor([[-100, -100, 8, 2, -100], [-100, 9, 2, -100, -100]])
    assert level_positions(labels, []).tolist() == [2, 1]


def test_rows_without_a_level_are_refused():
    labels = torch.tensor([[-100, -100, 7, 11, 5], [-100, 7, 11, -100, -100], [7, 12, 5, 2, 2]])
    assert level_positions(labels[:1], [7, 11]).tolist() == [4]
    with pytest.raises(ValueError, match=r"2 of 3 rows have no level after the tokens \[7, 11\]"):
        level_positions(labels, [7, 11])
    with pytest.raises(ValueError, match="1 of 1 rows have no level"):
        level_positions(torch.full((1, 4), -100), [])
    with pytest.raises(ValueError, match="longer than the 3 tokens before the level, got 3"):
        level_positions(labels[:, :3], [1, 2, 3])
    with pytest.raises(ValueError, match="fidelity or bce, got 'hinge'"):
        pair_loss((labels, labels), (labels, labels), kind="hinge")
    with pytest.raises(ValueError, match="bce does not use standard deviations"):
        pair_loss((labels, labels), (labels, labels), (labels, labels), kind="bce")


def test_the_losses_train_in_a_loop_of_ones_own(golden):
    case, logits, labels, positions, tensors = of_case(golden, "four")
    head = torch.nn.Parameter(torch.zeros(logits.shape[-1]))
    before = None
    for _ in range(20):
        found = level_logits(logits + head, positions)
        loss = total_loss(
            0.0,
            [rest_loss(logits + head, labels, positions)],
            [level_kl(found, case["level_ids"], tensors["level_probs"])],
        )
        before = loss.item() if before is None else before
        (slope,) = torch.autograd.grad(loss, head)
        head.data -= 10 * slope
    assert loss.item() < 0.9 * before
