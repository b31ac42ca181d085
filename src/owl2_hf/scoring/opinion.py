"""One opinion, a set of opinions, and how a row of a file becomes an opinion."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..training.messages import Place, locate_picture

Row = Mapping[str, Any]
MOS_KEYS = ("mos", "gt_score")
IMAGE_KEYS = ("image", "img_path", "video")
# Q-Align's training files have the MOS only there.
_MOS_OF_ID = re.compile(r".*->(-?\d+(?:\.\d+)?)", re.DOTALL)


@dataclass(frozen=True)
class Opinion:
    """People's opinion of one image.

    Args:
        image: A path, URL, PIL image or bytes; also the path of a video.
        mos: Mean opinion score.
        std: Standard deviation of the opinions, on the same scale.
        split: Split of the data set, for example `train`.
        dataset: Name of the data set.
        row: Row number in the source, from 1. In CSV and JSON lines files, the line number.
        level_probs: Soft label from the file, best level first.
        answer: Answer from the file, which names the level.
        reference: Name of the undistorted image that this image was made from.
    """

    image: Any
    mos: float
    std: float | None = None
    split: str | None = None
    dataset: str = ""
    row: int = 0
    level_probs: tuple[float, ...] | None = None
    answer: str | None = None
    reference: str | None = None


@dataclass(frozen=True)
class Opinions:
    """The opinions from one source.

    Args:
        name: Name of the source, for messages.
        rows: In the order of the source.
        ranges: Data set -> lowest and highest MOS over all splits.
    """

    name: str
    rows: tuple[Opinion, ...]
    ranges: dict[str, tuple[float, float]]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Opinion]:
        return iter(self.rows)

    def select(self, split: str | None) -> "Opinions":
        """Return the rows of one split; all rows for `None`. The ranges stay those of all splits.

        Raises:
            ValueError: If no row belongs to the split.
        """
        if split is None:
            return self
        rows = tuple(row for row in self.rows if row.split == split)
        if not rows:
            known = (
                ", ".join(sorted({repr(row.split) for row in self.rows if row.split is not None}))
                or "none"
            )
            raise ValueError(f"{self.name}: no row has split {split!r}; the file has {known}.")
        return replace(self, rows=rows)

    def by_dataset(self) -> dict[str, tuple[Opinion, ...]]:
        """Return name of each data set -> its rows, in order."""
        found: dict[str, list[Opinion]] = {}
        for row in self.rows:
            found.setdefault(row.dataset, []).append(row)
        return {name: tuple(rows) for name, rows in found.items()}


def opinions_of(name: str, rows: Sequence[Opinion]) -> Opinions:
    """Make `Opinions` of rows, with the range of each data set.

    Raises:
        ValueError: If there are no rows.
    """
    if not rows:
        raise ValueError(f"{name} has no rows.")
    moses: dict[str, list[float]] = {}
    for row in rows:
        moses.setdefault(row.dataset, []).append(row.mos)
    return Opinions(
        name, tuple(rows), {dataset: (min(found), max(found)) for dataset, found in moses.items()}
    )


def to_opinion(row: Row, number: int, place: Place) -> Opinion:
    """Make an `Opinion` of one row.

    Raises:
        ValueError: If a field is missing, or a value is not a number.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"expected an object with 'image' and 'mos', got {type(row).__name__}.")
    image, mos = _first(row, IMAGE_KEYS), mos_of(row)
    if image is None or mos is None:
        missing = "image" if image is None else "mos"
        raise ValueError(
            f"expected a value of {missing!r}, got keys: {', '.join(map(str, row)) or 'none'}."
        )
    std = row.get("std")
    std = None if std in (None, "") else _number(std, "std")
    if std is not None and std < 0:
        raise ValueError(f"expected a 'std' of at least 0, got {std:g}.")
    return Opinion(
        locate_picture(image, place),
        _number(mos, "mos"),
        std,
        text_of(row.get("split")),
        text_of(row.get("dataset")) or "",
        number,
        _level_probs(row.get("level_probs")),
        _answer(row.get("conversations")),
        text_of(row.get("reference")),
    )


def mos_of(row: Row) -> Any:
    """Return the MOS. Files of Q-Align may give it only in the id."""
    mos = _first(row, MOS_KEYS)
    if mos is None and row.get("conversations") is not None:
        match = _MOS_OF_ID.fullmatch(str(row.get("id")))
        return match and match[1]
    return mos


def _first(row: Row, keys: Iterable[str]) -> Any:
    return next((row[key] for key in keys if row.get(key) not in (None, "")), None)


def _number(value: Any, name: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"expected a number as {name!r}, got {value!r}.")
    return number


def text_of(value: Any) -> str | None:
    return None if value in (None, "") else str(value)


def _level_probs(value: Any) -> tuple[float, ...] | None:
    if value is None:
        return None
    if not isinstance(value, (list, tuple)) or len(value) < 2:
        raise ValueError(f"expected a list of probabilities as 'level_probs', got {value!r}.")
    probs = tuple(_number(prob, "level_probs") for prob in value)
    # DeQA-Score clips negative probabilities to 0: some of its sums are 0.97.
    if min(probs) < 0 or not 0.9 < sum(probs) < 1.1:
        raise ValueError(f"expected 'level_probs' of at least 0 that sum to 1, got {value!r}.")
    return probs


def _answer(turns: Any) -> str | None:
    """The last turn of LLaVA's conversation, if there is one."""
    last = turns[-1] if isinstance(turns, (list, tuple)) and turns else None
    return (
        text_of(last.get("value"))
        if isinstance(last, Mapping) and last.get("from") == "gpt"
        else None
    )
