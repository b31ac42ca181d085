"""What is learned from opinions: levels and soft labels, as the originals make them."""

import json

import pytest

from owl2_hf.scoring.labels import hard_level, normalize_opinion, soft_label, two_levels

WORDS = ("excellent", "good", "fair", "poor", "bad")


@pytest.fixture(scope="module")
def cases(golden_dir):
    return json.loads((golden_dir("L") / "cases.json").read_text())


def mean(label):
    return sum(value * prob for value, prob in zip(range(len(label), 0, -1), label, strict=True))


def test_levels_are_those_of_the_original_also_at_their_bounds(cases):
    for case in [*cases["soft_labels"], *cases["levels_at_bounds"]]:
        assert WORDS[hard_level(case["mos"], case["min_mos"], case["max_mos"])] == case["level"], (
            case
        )


def test_soft_labels_are_those_of_the_original(cases):
    assert {case["binary"] for case in cases["soft_labels"]} == {True, False}
    assert {case["density"] for case in cases["soft_labels"]} == {"pdf", "cdf"}
    for case in cases["soft_labels"]:
        own = (case["mos"], case["std"], case["min_mos"], case["max_mos"])
        assert normalize_opinion(*own) == pytest.approx((case["mos_norm"], case["std_norm"]))
        assert soft_label(*own, case["density"]) == pytest.approx(case["level_probs"], abs=1e-9), (
            case
        )


@pytest.mark.parametrize("num_levels", [2, 3, 5, 7])
@pytest.mark.parametrize("density", ["pdf", "cdf"])
@pytest.mark.parametrize("std", [0.0, 4.0, 19.0])
def test_a_soft_label_of_any_number_of_levels_sums_to_one_and_keeps_the_mean(
    num_levels, density, std
):
    for mos in (0.0, 13.0, 50.0, 71.5, 100.0):
        label = soft_label(mos, std, 0.0, 100.0, density, num_levels)
        assert len(label) == num_levels and min(label) >= 0
        # Where a negative share is cut off, the sum moves.
        assert sum(label) == pytest.approx(1, abs=0.05)
        assert mean(label) == pytest.approx(1 + (num_levels - 1) * mos / 100, abs=0.1)


def test_levels_cut_the_range_into_equal_parts():
    assert [hard_level(mos, 0, 1, 2) for mos in (0, 0.5, 0.51, 1)] == [1, 1, 0, 0]
    assert [hard_level(mos, 1, 4, 3) for mos in (1, 2, 2.01, 3, 3.01, 4)] == [2, 2, 1, 1, 0, 0]


def test_two_levels_share_what_lies_between_them():
    assert two_levels(3.25) == pytest.approx((0, 0.25, 0.75, 0, 0), abs=1e-7)
    assert two_levels(1, 3) == pytest.approx((0, 0, 1), abs=1e-7) and two_levels(
        3, 3
    ) == pytest.approx((1, 0, 0), abs=1e-7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3.0, 1.0, 2.0, 2.0), "got 2 to 2"),
        ((6.0, 1.0, 1.0, 5.0), "expected a MOS from 1 to 5, got 6"),
        ((float("nan"), 1.0, 1.0, 5.0), "got nan"),
        ((3.0, -1.0, 1.0, 5.0), "at least 0, got -1"),
        ((3.0, 1.0, 1.0, 5.0, "pmf"), "pdf or cdf, got 'pmf'"),
        ((3.0, 1.0, 1.0, 5.0, "pdf", 1), "two or more levels, got 1"),
    ],
)
def test_opinions_that_make_no_label_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        soft_label(*arguments)
