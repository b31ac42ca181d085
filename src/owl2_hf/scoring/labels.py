"""What a model learns from opinions of one image: a level word, or a probability of each level.

Levels stand best first, as in `Preset.levels`; of K levels the best is worth K and the last 1.

Sources: Q-Align (arXiv:2312.17090, section 3.2) for hard levels; DeQA-Score (arXiv:2501.11561,
section 3.2) and its released code for soft labels.
"""

import math
from collections.abc import Sequence

_WIDER = 1e-8  # added to both ends of an interval, as in the released code
MIN_STD = 0.2  # in levels: narrower Gaussians cannot be told apart
MAX_SHIFT = 0.1  # in levels: largest error of a soft label's mean
DENSITIES = ("pdf", "cdf")


def normalize_opinion(
    mos: float, std: float, low: float, high: float, num_levels: int = 5
) -> tuple[float, float]:
    """Mean and standard deviation on the levels' scale, from 1 to K.

    m = (K - 1) (MOS - low) / (high - low) + 1 and s = (K - 1) std / (high - low).

    Args:
        mos, std: On the data set's own scale.
        low, high: Lowest and highest MOS of the data set.

    Raises:
        ValueError: If the range is empty, or the MOS is outside it.
    """
    _check(mos, low, high, num_levels)
    return (num_levels - 1) * (mos - low) / (high - low) + 1, (num_levels - 1) * std / (high - low)


def hard_level(mos: float, low: float, high: float, num_levels: int = 5) -> int:
    """The level of a MOS among K equal intervals, 0 for the best; a MOS between two intervals has
    the worse level.

    Raises:
        ValueError: As for `normalize_opinion`.
    """
    _check(mos, low, high, num_levels)
    for index in range(1, num_levels):
        if mos <= low + index / num_levels * (high - low) + _WIDER:
            return num_levels - index
    return 0


def soft_label(
    mos: float, std: float, low: float, high: float, density: str = "pdf", num_levels: int = 5
) -> tuple[float, ...]:
    """The probability of each level, best first, whose mean is the MOS.

    The Gaussian of the opinions at the levels, p, becomes max(alpha p + beta, 0) with the alpha and
    beta that make the sum 1 and the mean m. Where s is below 0.2, or the mean is still off by more
    than 0.1, the two neighbouring levels share the probability: `two_levels`.

    Args:
        mos, std, low, high: As for `normalize_opinion`.
        density: `pdf` takes the Gaussian at each level (DeQA-Score for KonIQ and KADID), `cdf` its
            mass within half a level on both sides (DeQA-Score for SPAQ, whose deviations are
            small).

    Raises:
        ValueError: As for `normalize_opinion`; the density is unknown, or the deviation negative.
    """
    if density not in DENSITIES:
        raise ValueError(f"expected a density of {' or '.join(DENSITIES)}, got {density!r}.")
    if not std >= 0:
        raise ValueError(f"expected a standard deviation of at least 0, got {std}.")
    mean, deviation = normalize_opinion(mos, std, low, high, num_levels)
    if deviation < MIN_STD:
        return two_levels(mean, num_levels)
    values = range(num_levels, 0, -1)
    if density == "pdf":
        raw = [_density((value - mean) / deviation) / deviation for value in values]
    else:
        raw = [
            _mass((value + 0.5 - mean) / deviation) - _mass((value - 0.5 - mean) / deviation)
            for value in values
        ]
    middle = (num_levels + 1) / 2
    total = sum(raw)
    alpha = (mean - middle) / (_mean(raw) - middle * total + 1e-9)
    beta = (1 - alpha * total) / num_levels
    label = tuple(max(alpha * prob + beta, 0.0) for prob in raw)
    return label if abs(_mean(label) - mean) <= MAX_SHIFT else two_levels(mean, num_levels)


def two_levels(mean: float, num_levels: int = 5) -> tuple[float, ...]:
    """Linear interpolation between the two levels beside a mean from 1 to K, best level first."""
    below = min(max(math.ceil(mean - _WIDER) - 1, 1), num_levels - 1)
    label = [0.0] * num_levels
    share = (mean - below + _WIDER) / (1 + 2 * _WIDER)
    label[num_levels - below], label[num_levels - below - 1] = 1 - share, share
    return tuple(label)


def _mean(label: Sequence[float]) -> float:
    return sum(value * prob for value, prob in zip(range(len(label), 0, -1), label, strict=True))


def _density(z: float) -> float:
    return math.exp(-z * z / 2) / math.sqrt(2 * math.pi)


def _mass(z: float) -> float:
    return (1 + math.erf(z / math.sqrt(2))) / 2


def _check(mos: float, low: float, high: float, num_levels: int) -> None:
    if num_levels < 2:
        raise ValueError(f"expected two or more levels, got {num_levels}.")
    if not low < high:
        raise ValueError(
            f"expected a range of MOS from low to high, got {low:g} to {high:g}: all opinions "
            "have the same MOS."
        )
    if not low - _WIDER <= mos <= high + _WIDER:
        raise ValueError(f"expected a MOS from {low:g} to {high:g}, got {mos:g}.")
