"""Read and check files of people's opinions of images.

A row names an image (or video) and its mean opinion score, `mos`. Optional columns are the standard
deviation of the opinions, `std`; the split of the data set, `split`; the name of the data set,
`dataset`; and the undistorted image that the image was made from, `reference`.

Files of Q-Align and DeQA-Score can be read without changes. There the MOS is `gt_score`, or the
number after the arrow of an `id` such as `a.jpg->3.5`. The image may be in `img_path`,
`level_probs` is the soft label, and the answer names the level.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from ..processing.image_processing_mplug_owl2 import open_image
from ..training.bad_rows import BadRow
from ..training.messages import to_messages
from .benchmarks import BENCHMARKS, benchmark_rows, read_benchmark
from .frames import is_video_path, read_frames
from .opinion import Opinion, Opinions, mos_of, opinions_of, text_of, to_opinion
from .opinion_files import mos_file, name_of, numbered_rows, place_of

__all__ = [
    "Counts",
    "Opinion",
    "OpinionReport",
    "Opinions",
    "check_opinions",
    "is_opinions",
    "load_opinions",
    "opinions_of",
]


def load_opinions(
    source: Any,
    image_folder: str | Path | None = None,
    split: str | None = None,
    allow_outside: bool = False,
    on_bad: Callable[[str], None] | None = None,
) -> Opinions:
    """Load opinions from a file, a folder, a data set on the Hub, or rows.

    Args:
        source: A `.csv`, `.parquet`, `.json` or `.jsonl` file; a folder with DeQA-Score's mos.json
            and split.json; a folder saved by `datasets`; the id of a data set on the Hub; a
            published data set and its folder, such as `koniq:path/to/koniq`; or rows.
        image_folder: Folder that relative image paths start from. Default: the folder of the file.
        split: Load only the rows of this split.
        allow_outside: See `owl2_hf.training.data.load_rows`.
        on_bad: Called with the error of each bad row, which is then left out.

    Raises:
        ValueError: If the source cannot be read, or, without `on_bad`, if a row is bad. The message
            names the source and the row.
    """

    if (benchmark := _benchmark(source)) is not None:
        return read_benchmark(*benchmark, split, on_bad)
    place, name = place_of(source, image_folder, allow_outside), name_of(source)
    rows = []
    for number, row in numbered_rows(source):
        try:
            if isinstance(row, ValueError):
                raise row
            rows.append(to_opinion(row, number, place))
        except ValueError as error:
            message = f"{name}: row {number}: {error}"
            if on_bad is None:
                raise ValueError(message) from None
            on_bad(message)
    return opinions_of(name, rows).select(split)


def is_opinions(source: str | Path) -> bool:
    """Return whether a source holds opinions, by its file type or its first rows.

    Return `False` for a source that is not on this machine.

    Return `True` for a published data set and its folder, such as `koniq:path/to/koniq`.
    """
    if _benchmark(source) is not None:
        return True
    path = Path(source)
    if path.suffix.lower() in (".csv", ".parquet") or mos_file(path) is not None:
        return True
    try:
        first = [row for _, row in islice(numbered_rows(source), 10)] if path.exists() else []
    except ValueError:
        return False
    return any(mos_of(row) is not None for row in first if isinstance(row, Mapping))


@dataclass
class Counts:
    """Counts of one data set: rows, range and mean of the MOS, deviations, and splits."""

    rows: int
    low: float
    high: float
    mean: float
    without_std: int
    zero_std: int
    splits: dict[str, int]


@dataclass
class OpinionReport:
    """The result of checking a file of opinions.

    Args:
        rows: Number of rows.
        bad: Rows that cannot be used, and why. A row is also bad if its image or its reference is
            in another split of the data set.
        duplicates: Rows whose image is also in an earlier row of the same split.
        datasets: Counts of the good rows.
        left_out: Missing files of a published data set. No published copy has all of them.
    """

    rows: int = 0
    bad: list[BadRow] = field(default_factory=list)
    duplicates: list[BadRow] = field(default_factory=list)
    datasets: dict[str, Counts] = field(default_factory=dict)
    left_out: int = 0

    def summary(self) -> str:
        """Return the counts as lines of text."""
        lines = [
            f"{self.rows:,} rows of opinions, {len(self.bad):,} bad, {len(self.duplicates):,} "
            "duplicates"
        ]
        for name, own in self.datasets.items():
            parts = ", ".join(f"{count:,} {split}" for split, count in own.splits.items())
            lines.append(
                f"{name or 'opinions'}: {own.rows:,} rows{f' ({parts})' if parts else ''}, MOS "
                f"{own.low:g} to {own.high:g}, mean {own.mean:.4g}; std is missing in "
                f"{own.without_std:,} and 0 in {own.zero_std:,}"
            )
        if self.left_out:
            lines.append(f"{self.left_out:,} files are missing and skipped")
        return "\n".join(lines)


def check_opinions(
    source: Any,
    image_folder: str | Path | None = None,
    open_images: bool = True,
    allow_outside: bool = False,
    on_row: Callable[[int], None] = lambda rows: None,
) -> OpinionReport:
    """Check every row of opinions, without stopping at a bad one.

    Duplicate images are found by the content of the file, under any name. Without `open_images`
    they are found by path.

    Args:
        source, image_folder, allow_outside: See `load_opinions`.
        open_images: Decode every image. `False`: only check that the files exist.
        on_row: Called with the number of rows seen so far.

    Raises:
        ValueError: If the source as a whole cannot be read.
    """
    name, report = name_of(source), OpinionReport()
    good: list[Opinion] = []
    seen: dict[tuple[str, Any], Opinion] = {}
    references: dict[tuple[str, Any], Opinion] = {}
    for number, row, opinion in _each_opinion(source, image_folder, allow_outside):
        if opinion is None:
            report.left_out += 1
            continue
        report.rows += 1
        try:
            if isinstance(opinion, ValueError):
                raise opinion
            if open_images:
                _open(opinion.image)
            key = (opinion.dataset, _identity(opinion.image, open_images))
            first = seen.setdefault(key, opinion)
            _check_parts(first, opinion, f"its image {_shown(opinion.image)}")
            if opinion.reference is not None:
                same = references.setdefault((opinion.dataset, opinion.reference), opinion)
                _check_parts(same, opinion, f"its reference {opinion.reference!r}")
            if first is not opinion:
                report.duplicates.append(
                    BadRow(
                        number,
                        _id(row),
                        f"its image {_shown(opinion.image)} is also in row {first.row}.",
                    )
                )
            good.append(opinion)
        except (ValueError, OSError) as error:
            report.bad.append(BadRow(number, _id(row), str(error)))
        on_row(report.rows)
    for dataset, own in opinions_of(name, good).by_dataset().items() if good else ():
        report.datasets[dataset] = _count(own)
    if len(good) > 1 and not any(
        low < high for low, high in opinions_of(name, good).ranges.values()
    ):
        report.bad.append(
            BadRow(
                good[0].row,
                None,
                "every MOS is the same: there is nothing to learn or to evaluate.",
            )
        )
    return report


def _each_opinion(
    source: Any, image_folder: str | Path | None, allow_outside: bool
) -> Iterator[tuple[int, Any, Opinion | ValueError | None]]:
    """Number, row, and opinion or what is wrong with it; `None` for a file that may be missing."""

    if (benchmark := _benchmark(source)) is not None:
        yield from ((number, None, found) for number, found in benchmark_rows(*benchmark))
        return
    place = place_of(source, image_folder, allow_outside)
    for number, row in numbered_rows(source):
        try:
            if isinstance(row, ValueError):
                raise row
            opinion = to_opinion(row, number, place)
            if row.get("conversations") is not None:
                to_messages(row, place.folder, place.is_open)
            yield number, row, opinion
        except ValueError as error:
            yield number, row, error


def _check_parts(first: Opinion, opinion: Opinion, what: str) -> None:
    """Refuse what is in two parts."""
    if first.split != opinion.split:
        raise ValueError(
            f"{what} is in {opinion.split!r} here and in {first.split!r} in row {first.row}: "
            "keep it in one split."
        )


def _benchmark(source: Any) -> tuple[str, str] | None:
    """Name and folder of a published data set, of a text such as `koniq:path/to/koniq`."""

    name, colon, root = str(source).partition(":") if isinstance(source, str) else ("", "", "")
    return (name, root) if colon and name in BENCHMARKS else None


def _count(rows: Sequence[Opinion]) -> Counts:
    splits: dict[str, int] = {}
    for row in rows:
        if row.split is not None:
            splits[row.split] = splits.get(row.split, 0) + 1
    moses = [row.mos for row in rows]
    stds = [row.std for row in rows]
    return Counts(
        len(rows),
        min(moses),
        max(moses),
        sum(moses) / len(moses),
        stds.count(None),
        stds.count(0.0),
        splits,
    )


def _id(row: Any) -> str | None:
    return text_of(row.get("id")) if isinstance(row, Mapping) else None


def _shown(image: Any) -> str:
    return repr(image) if isinstance(image, str) else "(not a file)"


def _open(image: Any) -> None:
    if is_video_path(image):
        read_frames(image)
    elif isinstance(image, Image.Image):
        image.load()
    else:
        open_image(image)


def _identity(image: Any, by_content: bool) -> Any:
    if isinstance(image, Image.Image):
        return sha256(image.tobytes()).digest()
    if isinstance(image, bytes):
        return sha256(image).digest()
    if by_content and Path(image).is_file():
        return sha256(Path(image).read_bytes()).digest()
    return image
