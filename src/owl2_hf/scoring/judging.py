"""Evaluate a scorer on people's opinions: correlations, errors, intervals, and a plot."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .labels import normalize_opinion
from .opinions import Opinion, Opinions, load_opinions
from .paths import score_each
from .scorer import Score, Scorer
from .statistics import (
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

# Statistics of scores and MOS.
AGREEMENT: dict[str, Callable[..., float]] = {"srcc": srcc, "krcc": krcc, "plcc": plcc}
# After the logistic fit: the statistic with its own fit, and the same for scores that are already
# fitted. RMSE needs the fit, which brings scores into units of the MOS. Intervals reuse the fit of
# all images, because a fit for each bootstrap sample takes minutes.
FITTED: dict[str, tuple[Callable[..., float], Callable[..., float]]] = {
    "plcc_fitted": (plcc_fitted, plcc),
    "rmse_fitted": (rmse_fitted, rmse),
}
# Distances between the Gaussians of opinions and predictions, on the scale of the levels.
DISTANCES = {"kl": gaussian_kl, "js": gaussian_js, "wasserstein": gaussian_wasserstein}
TEST_SHARE = 0.2  # of the images, in each random split


@dataclass(frozen=True)
class Estimate:
    """A statistic: its value, its confidence interval, and its median over splits, if requested."""

    value: float
    low: float
    high: float
    median: float | None = None


@dataclass(frozen=True)
class Judgement:
    """How well scores agree with the opinions of one data set.

    Args:
        dataset: Its name.
        images: How many images were scored.
        statistics: Name -> estimate, for the names in `AGREEMENT` and `FITTED`. If the opinions
            have standard deviations, also those in `DISTANCES`.
    """

    dataset: str
    images: int
    statistics: dict[str, Estimate]


@dataclass
class Evaluation:
    """How well a scorer agrees with opinions.

    Args:
        judgements: One for each data set.
        scored: Every opinion with the score of its image.
        failed: Opinions whose image could not be scored, with the error.
        splits: Number of random splits that the medians are taken over.
    """

    judgements: list[Judgement] = field(default_factory=list)
    scored: list[tuple[Opinion, Score]] = field(default_factory=list)
    failed: list[tuple[Opinion, ValueError]] = field(default_factory=list)
    splits: int = 0

    def __getitem__(self, dataset: str) -> Judgement:
        return next(one for one in self.judgements if one.dataset == dataset)

    @property
    def means(self) -> dict[str, float]:
        """Return the mean over data sets of each statistic that all of them have."""
        names = [
            name
            for name in self.judgements[0].statistics
            if all(name in one.statistics for one in self.judgements)
        ]
        return {
            name: float(np.mean([one.statistics[name].value for one in self.judgements]))
            for name in names
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the results for JSON. NaN becomes `None`."""
        datasets = {
            one.dataset: {
                "images": one.images,
                **{
                    name: {key: _finite(value) for key, value in vars(own).items()}
                    for name, own in one.statistics.items()
                },
            }
            for one in self.judgements
        }
        means = {name: _finite(value) for name, value in self.means.items()}
        failed = [{"row": opinion.row, "reason": str(error)} for opinion, error in self.failed]
        return {"datasets": datasets, "means": means, "splits": self.splits, "failed": failed}

    def table(self) -> list[list[str]]:
        """Return rows for CSV: the column names, then one row for each data set."""
        columns = list(dict.fromkeys(name for one in self.judgements for name in one.statistics))
        ends = ["", "_low", "_high", *(["_median"] if self.splits else [])]
        rows = [["dataset", "images", *(name + end for name in columns for end in ends)]]
        for one in self.judgements:
            values = []
            for name in columns:
                own = one.statistics.get(name)
                found = (own.value, own.low, own.high, own.median) if own else (None,) * 4
                values += ["" if value is None else f"{value:.6f}" for value in found[: len(ends)]]
            rows.append([one.dataset, str(one.images), *values])
        return rows

    def lines(self) -> list[str]:
        """Return the results as lines of text."""
        lines = []
        for one in self.judgements:
            lines.append(f"{one.dataset or 'opinions'}: {one.images:,} images")
            for name, own in one.statistics.items():
                median = (
                    ""
                    if own.median is None
                    else f"   median of {self.splits} splits {own.median:.4f}"
                )
                lines.append(
                    f"  {name:12} {own.value:8.4f}   {own.low:.4f} to {own.high:.4f}{median}"
                )
        if len(self.judgements) > 1:
            lines.append(f"mean of {len(self.judgements)} data sets")
            lines += [f"  {name:12} {value:8.4f}" for name, value in self.means.items()]
        return lines

    def plot(self, file: str | Path) -> None:
        """Draw the opinions over the scores, with the logistic fit, one panel for each data set.

        Raises:
            ValueError: See `check_plot`.
        """
        check_plot(file)
        from matplotlib.figure import Figure

        count = len(self.judgements)
        figure = Figure(figsize=(5 * min(count, 3), 4.2 * -(-count // 3)), layout="constrained")
        panels = figure.subplots(-(-count // 3), min(count, 3), squeeze=False).flat
        for axes, one in zip(panels, self.judgements, strict=False):
            pairs = [
                (score.score, opinion.mos)
                for opinion, score in self.scored
                if opinion.dataset == one.dataset
            ]
            scores, mos = map(np.array, zip(*pairs, strict=True))
            axes.scatter(scores, mos, s=10, alpha=0.5, linewidths=0)
            line = np.linspace(scores.min(), scores.max(), 200)
            axes.plot(line, logistic_fit(scores, mos)(line), color="black")
            found = {name: one.statistics[name].value for name in ("srcc", "plcc_fitted")}
            title = f"SRCC {found['srcc']:.3f}, PLCC after the fit {found['plcc_fitted']:.3f}"
            axes.set_title(
                f"{one.dataset}\n{title}" if one.dataset else title,
                fontsize="medium",
                parse_math=False,
            )
            axes.set_xlabel("score")
            axes.set_ylabel("mean opinion score")
        for axes in list(panels):
            axes.set_visible(False)
        figure.savefig(file, dpi=120)


def evaluate(
    scorer: Scorer,
    opinions: Any,
    task: str = "quality",
    splits: int = 0,
    samples: int = 1000,
    seed: int = 0,
    on_image: Callable[[int], None] = lambda images: None,
) -> Evaluation:
    """Score the images of a set of opinions, and compare the scores with the opinions.

    Args:
        opinions: `Opinions`, or what `load_opinions` takes.
        task: A task of the scorer's preset.
        splits: Also report the median of each statistic over this many random samples of 20 % of
            the images.
        samples: Bootstrap samples for the confidence intervals.
        seed: Seed for the splits and the bootstrap.
        on_image: Called with the number of images scored so far.

    Raises:
        ValueError: If the opinions cannot be read, or too few images can be scored.
    """
    if splits < 0 or samples < 1:
        raise ValueError(
            f"expected splits of at least 0 and samples of at least 1, got {splits} and {samples}."
        )
    krcc([0.0, 1.0], [0.0, 1.0])  # fails before the images are scored if scipy is missing
    if not isinstance(opinions, Opinions):
        opinions = load_opinions(opinions)
    report = Evaluation(splits=splits)
    found = score_each(scorer, [row.image for row in opinions], task)
    for number, (opinion, score) in enumerate(zip(opinions, found, strict=True), 1):
        if isinstance(score, ValueError):
            report.failed.append((opinion, score))
        else:
            report.scored.append((opinion, score))
        on_image(number)
    for dataset in opinions.by_dataset():
        pairs = [(opinion, score) for opinion, score in report.scored if opinion.dataset == dataset]
        if len(pairs) < 2:
            name = f"data set {dataset!r}" if dataset else opinions.name
            first = (
                f"; row {report.failed[0][0].row}: {report.failed[0][1]}" if report.failed else ""
            )
            raise ValueError(
                f"{name}: expected two or more images that can be scored, got {len(pairs)}{first}"
            )
        report.judgements.append(
            _judge(dataset, pairs, opinions.ranges[dataset], splits, samples, seed)
        )
    return report


def check_plot(file: str | Path) -> None:
    """Check that a plot can be written to a file.

    Raises:
        ValueError: If matplotlib is not installed, the folder does not exist, or the file type is
            not supported.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise ValueError("a plot needs matplotlib: pip install 'owl2_hf[scoring]'.") from None
    kinds = FigureCanvasBase.get_supported_filetypes()
    if not Path(file).parent.is_dir():
        raise ValueError(f"the folder {str(Path(file).parent)!r} for the plot does not exist.")
    if Path(file).suffix.lower()[1:] not in kinds:
        raise ValueError(
            f"expected a plot file that ends in one of {', '.join(sorted(kinds))}, got "
            f"{str(file)!r}."
        )


def _judge(
    dataset: str,
    pairs: Sequence[tuple[Opinion, Score]],
    bounds: tuple[float, float],
    splits: int,
    samples: int,
    seed: int,
) -> Judgement:
    images = [
        opinion.image if isinstance(opinion.image, str) else index
        for index, (opinion, _) in enumerate(pairs)
    ]
    estimate = partial(_estimate, splits=splits, samples=samples, seed=seed)
    scores, mos = [score.score for _, score in pairs], [opinion.mos for opinion, _ in pairs]
    statistics = {
        name: estimate(statistic, [scores, mos], images) for name, statistic in AGREEMENT.items()
    }
    fitted = logistic_fit(scores, mos)(scores)
    for name, (statistic, of_fitted) in FITTED.items():
        statistics[name] = estimate(
            statistic, [scores, mos], images, drawn=(of_fitted, [fitted, mos])
        )
    spread = [
        (image, *pair) for image, pair in zip(images, pairs, strict=True) if pair[0].std is not None
    ]
    if spread and bounds[0] < bounds[1]:
        known = [image for image, _, _ in spread]
        given = np.array(
            [_of_people(opinion, bounds, len(score.levels)) for _, opinion, score in spread]
        )
        predicted = np.array([_of_model(score) for _, _, score in spread])
        for name, distance in DISTANCES.items():
            statistics[name] = estimate(_mean, [distance(*given.T, *predicted.T)], known)
    return Judgement(dataset, len(pairs), statistics)


def _of_people(
    opinion: Opinion, bounds: tuple[float, float], num_levels: int
) -> tuple[float, float]:
    assert opinion.std is not None
    return normalize_opinion(opinion.mos, opinion.std, *bounds, num_levels)


def _of_model(score: Score) -> tuple[float, float]:
    """Mean and standard deviation of a score, on the levels' scale."""
    low, high = score.scale
    step = (high - low) / (len(score.levels) - 1)
    return (score.score - low) / step + 1, score.std / step


def _mean(values: ArrayLike) -> float:
    return float(np.asarray(values, dtype=np.float64).mean())


def _estimate(
    statistic: Callable[..., float],
    columns: Sequence[ArrayLike],
    images: Sequence[Any],
    splits: int,
    samples: int,
    seed: int,
    drawn: tuple[Callable[..., float], Sequence[ArrayLike]] | None = None,
) -> Estimate:
    """The estimate of a statistic of columns (N,); `drawn` has what its interval is of, where not
    the same.
    """
    of_draw, own = drawn or (statistic, columns)
    low, high = bootstrap_interval(of_draw, *own, images=images, samples=samples, seed=seed)
    median = None
    if splits:
        arrays = [np.asarray(column, dtype=np.float64) for column in columns]
        found = [
            statistic(*(array[rows] for array in arrays))
            for rows in _test_parts(images, splits, seed)
        ]
        median = float(np.median(found))
    return Estimate(statistic(*columns), low, high, median)


def _test_parts(images: Sequence[Any], splits: int, seed: int) -> list[np.ndarray]:
    """Rows of a random fifth of the images, two at least, for each split."""
    names = list(dict.fromkeys(images))
    place = {name: index for index, name in enumerate(names)}
    of_rows = np.array([place[image] for image in images])
    generator = np.random.default_rng(seed)
    count = max(round(TEST_SHARE * len(names)), 2)
    return [
        np.flatnonzero(np.isin(of_rows, generator.permutation(len(names))[:count]))
        for _ in range(splits)
    ]


def _finite(value: float | None) -> float | None:
    return value if value is not None and np.isfinite(value) else None
