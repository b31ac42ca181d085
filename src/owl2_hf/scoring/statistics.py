"""How well scores agree with people's opinions: correlations, errors, distances, intervals.

Sources: VQEG's final report on objective models (2000) for the logistic fit; DeQA-Score
(arXiv:2501.11561) for the fit's start and for distances of distributions; Efron and Tibshirani, An
Introduction to the Bootstrap (1993), chapter 13. N: images.
"""

import importlib
import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Values = NDArray[np.float64]
_TINY = 1e-8  # as in DeQA-Score's code
_MAX_CALLS = 10_000


def plcc(scores: ArrayLike, mos: ArrayLike) -> float:
    """Pearson's linear correlation; NaN where one side does not vary.

    Q-Align reports it as it is; DeQA-Score after `LogisticFit`, here `plcc_fitted`.

    Args:
        scores, mos: (N,).
    """
    first, second = _pair(scores, mos)
    first, second = first - first.mean(), second - second.mean()
    spread = np.sqrt((first @ first) * (second @ second))
    return float(np.clip(first @ second / spread, -1, 1)) if spread > 0 else float("nan")


def srcc(scores: ArrayLike, mos: ArrayLike) -> float:
    """Spearman's rank correlation: Pearson's of the ranks, ties sharing their mean rank.

    Args:
        scores, mos: (N,).
    """
    first, second = _pair(scores, mos)
    return plcc(_ranks(first), _ranks(second))


def krcc(scores: ArrayLike, mos: ArrayLike) -> float:
    """Kendall's rank correlation, tau-b.

    Args:
        scores, mos: (N,).
    """
    first, second = _pair(scores, mos)
    return float(_scipy("stats").kendalltau(first, second).statistic)


@dataclass(frozen=True)
class LogisticFit:
    """(b1 - b2) / (1 + exp(-(x - b3) / b4)) + b2: scores on the scale of the opinions.

    Args:
        parameters: b1 to b4; NaN where no fit was found.
    """

    parameters: tuple[float, float, float, float]

    def __call__(self, scores: ArrayLike) -> Values:
        """(N,) scores -> (N,) on the scale of the opinions."""
        return _logistic(np.asarray(scores, dtype=np.float64), *self.parameters)


def logistic_fit(scores: ArrayLike, mos: ArrayLike) -> LogisticFit:
    """The least squares fit, from max MOS, min MOS, mean score and a quarter of the scores'
    standard deviation.

    Args:
        scores, mos: (N,).
    """
    first, second = _pair(scores, mos)
    none = LogisticFit((float("nan"),) * 4)
    optimize = _scipy("optimize")
    if len(first) < 4 or first.std() == 0:
        return none
    start = [second.max(), second.min(), first.mean(), first.std() / 4]
    try:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the parameters' covariance, which is not used
            found, _ = optimize.curve_fit(_logistic, first, second, p0=start, maxfev=_MAX_CALLS)
    except (RuntimeError, ValueError):  # no convergence
        return none
    b1, b2, b3, b4 = map(float, found)
    return LogisticFit((b1, b2, b3, b4))


def plcc_fitted(scores: ArrayLike, mos: ArrayLike) -> float:
    """Pearson's correlation after `logistic_fit`.

    Args:
        scores, mos: (N,).
    """
    return plcc(logistic_fit(scores, mos)(scores), mos)


def rmse(scores: ArrayLike, mos: ArrayLike) -> float:
    """Root of the mean squared error; it says something where both have one scale.

    Args:
        scores, mos: (N,).
    """
    first, second = _pair(scores, mos)
    return float(np.sqrt(np.mean((first - second) ** 2)))


def rmse_fitted(scores: ArrayLike, mos: ArrayLike) -> float:
    """Root of the mean squared error after `logistic_fit`, in units of the opinions.

    Args:
        scores, mos: (N,).
    """
    return rmse(logistic_fit(scores, mos)(scores), mos)


def gaussian_kl(
    mean: ArrayLike, std: ArrayLike, other_mean: ArrayLike, other_std: ArrayLike
) -> Values:
    """KL(N(mean, std) || N(other)), of each image.

    DeQA-Score puts the opinions first and the prediction second. The small numbers are those of its
    code.

    Args:
        mean, std, other_mean, other_std: (N,) each.
    """
    mean, std, other_mean, other_std = _arrays(mean, std, other_mean, other_std)
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled = (std**2 + (mean - other_mean) ** 2) / (2 * other_std**2 + _TINY)
        return np.log(other_std / (std + _TINY)) + scaled - 0.5


def gaussian_js(
    mean: ArrayLike, std: ArrayLike, other_mean: ArrayLike, other_std: ArrayLike
) -> Values:
    """Mean KL to the Gaussian between the two, whose variance is the mean of theirs; of each image.

    Args:
        mean, std, other_mean, other_std: (N,) each.
    """
    mean, std, other_mean, other_std = _arrays(mean, std, other_mean, other_std)
    middle = ((mean + other_mean) / 2, np.sqrt((std**2 + other_std**2) / 2))
    return (gaussian_kl(mean, std, *middle) + gaussian_kl(other_mean, other_std, *middle)) / 2


def gaussian_wasserstein(
    mean: ArrayLike, std: ArrayLike, other_mean: ArrayLike, other_std: ArrayLike
) -> Values:
    """2-Wasserstein distance of two Gaussians, of each image.

    Args:
        mean, std, other_mean, other_std: (N,) each.
    """
    mean, std, other_mean, other_std = _arrays(mean, std, other_mean, other_std)
    return np.sqrt((mean - other_mean) ** 2 + (std - other_std) ** 2)


def bootstrap_interval(
    statistic: Callable[..., float],
    *columns: ArrayLike,
    images: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    samples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of a statistic, by drawing images with replacement.

    Args:
        statistic: Takes the columns and gives one number.
        columns: (N,) each, a row an image.
        images: What image each row is of, where an image has several rows: these are drawn
            together.
        confidence: Share of the draws within the interval.
        samples: Draws.
        seed: Of the draws.

    Returns:
        Lower and upper end; NaN where the statistic is NaN in every draw.
    """
    arrays = _arrays(*columns)
    rows = (
        _rows_of_images(images)
        if images is not None
        else [np.array([row]) for row in range(len(arrays[0]))]
    )
    is_single = all(len(own) == 1 for own in rows)
    firsts = np.concatenate(rows)
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(samples):
        drawn = generator.integers(len(rows), size=len(rows))
        chosen = firsts[drawn] if is_single else np.concatenate([rows[index] for index in drawn])
        found.append(statistic(*(column[chosen] for column in arrays)))
    values = np.array(found, dtype=np.float64)
    values = values[np.isfinite(values)]
    if not len(values):
        return float("nan"), float("nan")
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _rows_of_images(images: Sequence[Hashable]) -> list[NDArray[np.int64]]:
    rows: dict[Hashable, list[int]] = {}
    for row, image in enumerate(images):
        rows.setdefault(image, []).append(row)
    return [np.array(own) for own in rows.values()]


def _logistic(x: Values, b1: float, b2: float, b3: float, b4: float) -> Values:
    with np.errstate(over="ignore"):
        return (b1 - b2) / (1 + np.exp(-(x - b3) / b4)) + b2


def _ranks(values: Values) -> Values:
    """(N,) ranks from 1; ties have the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[place]


def _arrays(*columns: ArrayLike) -> list[Values]:
    return [np.asarray(column, dtype=np.float64) for column in columns]


def _pair(scores: ArrayLike, mos: ArrayLike) -> tuple[Values, Values]:
    first, second = _arrays(scores, mos)
    if first.shape != second.shape or first.ndim != 1 or len(first) < 2:
        raise ValueError(
            f"expected equally many scores and opinions, at least two, got {first.shape} and "
            f"{second.shape}."
        )
    return first, second


def _scipy(part: str) -> Any:
    try:
        return importlib.import_module(f"scipy.{part}")
    except ImportError:
        raise ValueError("this needs scipy: pip install 'owl2_hf[scoring]'.") from None
