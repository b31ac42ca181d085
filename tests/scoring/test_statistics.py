"""Agreement of scores with opinions: the original's numbers, scipy's, and intervals."""

import itertools
import json
import math

import numpy as np
import pytest

from owl2_hf.scoring import statistics
from owl2_hf.scoring.statistics import (
    LogisticFit,
    bootstrap_interval,
    gaussian_js,
    gaussian_kl,
    gaussian_wasserstein,
    krcc,
    logistic_fit,
    plcc,
    plcc_fitted,
    rmse,
    rmse_fitted,
    srcc,
)

scipy_stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")


@pytest.fixture(scope="module")
def case(golden_dir):
    found = json.loads((golden_dir("L") / "cases.json").read_text())["evaluation"]
    return {
        key: np.array(value) if isinstance(value, list) else value for key, value in found.items()
    }


def test_correlations_are_those_of_the_original(case):
    assert srcc(case["pred"], case["mos"]) == pytest.approx(case["srcc"], abs=1e-9)
    assert plcc(case["pred"], case["mos"]) == pytest.approx(case["plcc"], abs=1e-9)
    assert plcc_fitted(case["pred"], case["mos"]) == pytest.approx(case["plcc_after_fit"], abs=1e-6)
    fitted = logistic_fit(case["pred"], case["mos"])(case["pred"])
    assert srcc(fitted, case["mos"]) == pytest.approx(case["srcc_after_fit"], abs=1e-9)
    assert rmse_fitted(case["pred"], case["mos"]) == pytest.approx(
        np.sqrt(np.mean((fitted - case["mos"]) ** 2))
    )


def test_distances_of_distributions_are_those_of_the_original(case):
    own = (case["mos_norm"], case["mos_std"], case["pred"], case["pred_std"])
    assert gaussian_kl(*own).mean() == pytest.approx(case["kl"], abs=1e-9)
    assert gaussian_js(*own).mean() == pytest.approx(case["js"], abs=1e-9)
    assert gaussian_wasserstein(*own).mean() == pytest.approx(case["wasserstein"], abs=1e-9)


def test_ranks_with_ties_agree_with_scipy():
    generator = np.random.default_rng(3)
    scores, mos = generator.integers(0, 6, size=(2, 40))
    assert srcc(scores, mos) == pytest.approx(scipy_stats.spearmanr(scores, mos).statistic)
    assert krcc(scores, mos) == pytest.approx(scipy_stats.kendalltau(scores, mos).statistic)
    assert plcc(scores, mos) == pytest.approx(scipy_stats.pearsonr(scores, mos).statistic)
    assert rmse([1.0, 2.0], [1.0, 5.0]) == pytest.approx(math.sqrt(4.5))


def test_the_fit_finds_the_curve_that_the_opinions_lie_on():
    scores = np.linspace(1, 5, 31)
    fit = logistic_fit(scores, 20 + 70 / (1 + np.exp(-(scores - 2.8) / 0.4)))
    assert sorted(fit.parameters[:2]) == pytest.approx([20, 90], abs=1e-3)
    assert fit.parameters[2:] == pytest.approx([2.8, 0.4], abs=1e-5)
    assert plcc(fit(scores), scores) < plcc(scores, scores)


def test_constant_values_have_no_correlation():
    assert all(
        math.isnan(statistic([3.0] * 5, [1, 2, 3, 4, 5]))
        for statistic in (srcc, krcc, plcc, plcc_fitted)
    )
    assert math.isnan(plcc_fitted([1, 2, 3], [1, 2, 3])), "four parameters need four images"
    assert bootstrap_interval(plcc, [3.0] * 5, [1, 2, 3, 4, 5], samples=9) == pytest.approx(
        (np.nan, np.nan), nan_ok=True
    )


def test_scores_and_opinions_come_in_pairs():
    with pytest.raises(
        ValueError, match=r"equally many scores and opinions, at least two, got \(3,\) and \(2,\)"
    ):
        srcc([1, 2, 3], [1, 2])
    with pytest.raises(ValueError, match="at least two"):
        plcc([1], [1])


def test_an_interval_covers_the_truth_as_often_as_it_says():
    truth, covered = 0.6, 0
    for seed in range(60):
        first, noise = np.random.default_rng(seed).normal(size=(2, 80))
        low, high = bootstrap_interval(
            plcc, first, truth * first + math.sqrt(1 - truth**2) * noise, samples=200
        )
        covered += low <= truth <= high
    assert 50 <= covered <= 60


def test_an_interval_is_the_same_each_time_and_draws_rows_of_an_image_together():
    first, noise = np.random.default_rng(0).normal(size=(2, 50))
    second = first + noise
    single = bootstrap_interval(srcc, first, second, samples=100)
    assert single == bootstrap_interval(srcc, first, second, samples=100)
    assert single != bootstrap_interval(srcc, first, second, samples=100, seed=1)
    four_times = [np.tile(column, 4) for column in (first, second)]
    together = bootstrap_interval(srcc, *four_times, images=list(range(50)) * 4, samples=100)
    assert together == pytest.approx(single, abs=1e-9)
    apart = bootstrap_interval(srcc, *four_times, samples=100)
    assert apart[1] - apart[0] < 0.7 * (single[1] - single[0])


def test_without_scipy_the_error_names_the_extra(monkeypatch):
    def refuse(name):
        raise ImportError(name)

    monkeypatch.setattr(statistics.importlib, "import_module", refuse)
    with pytest.raises(ValueError, match=r"needs scipy: pip install 'owl2_hf\[scoring\]'"):
        krcc([1, 2], [1, 2])
    assert srcc([1, 2, 3], [1, 2, 3]) == 1


def test_the_logistic_fit_goes_from_its_lower_to_its_upper_limit():
    fit = LogisticFit((5.0, 1.0, 3.0, 0.5))
    expected = [1.0, 1 + 4 / (1 + math.e), 3.0, 5 - 4 / (1 + math.e), 5.0]
    np.testing.assert_allclose(fit([-50.0, 2.5, 3.0, 3.5, 50.0]), expected)


def test_an_interval_leaves_as_much_out_below_as_above():
    numbers = itertools.count()
    found = bootstrap_interval(lambda column: next(numbers), [1.0, 2.0], samples=1001)
    assert found == pytest.approx((25.0, 975.0))
