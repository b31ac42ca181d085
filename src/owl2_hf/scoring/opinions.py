"""People's opinions of images, as files have them.

A row names an image (or video) and its mean opinion score, `mos`. It may hold the standard
deviation of the opinions, `std`, the part of the data set that it belongs to, `split`, the data
set, `dataset`, and the image that it was made of, `reference`.

Files of Q-Align and DeQA-Score are read as they are: `gt_score` is the MOS there, or the number
behind the arrow of an `id` such as `a.jpg->3.5`. The image may be `img_path`, `level_probs` is the
soft label, and the answer names the level.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from ..processing.image_processing_mplug_owl2 import open_image
from ..training.data import BadRow, JsonLines, read_rows
from ..training.messages import Place, locate_picture, to_messages
from .frames import is_video_path, read_frames
from .tables import read_csv, read_parquet

Row = Mapping[str, Any]
Numbered = tuple[int, Row | ValueError]

_MOS = ("mos", "gt_score")
_IMAGE = ("image", "img_path", "video")
# Q-Align's files to train on have the MOS there alone.
_MOS_OF_ID = re.compile(r".*->(-?\d+(?:\.\d+)?)", re.DOTALL)
# DeQA-Score keeps opinions and the parts of a data set in two files.
_MOS_FILE, _SPLIT_FILE = "mos.json", "split.json"


@dataclass(frozen=True)
class Opinion:
    """What people think of one image.

    Args:
        image: A path, URL, PIL image or bytes; also the path of a video.
        mos: Mean opinion score.
        std: Standard deviation of the opinions, on the same scale.
        split: Part of the data set, for instance `train`.
        dataset: Name of the data set.
        row: Its number in the source, counted from 1; in files of lines the line.
        level_probs: A soft label that the file gives, best level first.
        answer: An answer that the file gives; it names the level.
        reference: Name of the image that this one was made of.
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
    """Opinions of one source.

    Args:
        name: Of the source, for messages.
        rows: In the order of the source.
        ranges: Data set -> lowest and highest MOS, of all parts.
    """

    name: str
    rows: tuple[Opinion, ...]
    ranges: dict[str, tuple[float, float]]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Opinion]:
        return iter(self.rows)

    def select(self, split: str | None) -> "Opinions":
        """The rows of one part, with the ranges of all; all rows for `None`.

        Raises:
            ValueError: No row belongs to it.
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
        """Name of each data set -> its rows, in the order in which they appear."""
        found: dict[str, list[Opinion]] = {}
        for row in self.rows:
            found.setdefault(row.dataset, []).append(row)
        return {name: tuple(rows) for name, rows in found.items()}


def load_opinions(
    source: Any,
    image_folder: str | Path | None = None,
    split: str | None = None,
    allow_outside: bool = False,
    on_bad: Callable[[str], None] | None = None,
) -> Opinions:
    """Opinions from a file, a folder, a data set of the Hub, or rows.

    Args:
        source: A `.csv`, `.parquet`, `.json` or `.jsonl` file; a folder with DeQA-Score's mos.json and split.json; a
            folder that `datasets` saved; the id of a data set on the Hub; a published data set with its folder, such as
            `koniq:path/to/koniq`; or rows.
        image_folder: Where relative paths of images start; the folder of the file if not given.
        split: Only rows of this part.
        allow_outside: As in `owl2_hf.training.data.load_rows`.
        on_bad: Called with what is wrong with a bad row, which is left out then.

    Raises:
        ValueError: The source cannot be read, or without `on_bad` a row; the message names both.
    """
    from .benchmarks import read_benchmark

    if (benchmark := _benchmark(source)) is not None:
        return read_benchmark(*benchmark, split, on_bad)
    place, name = _place(source, image_folder, allow_outside), _name(source)
    rows = []
    for number, row in _rows(source):
        try:
            if isinstance(row, ValueError):
                raise row
            rows.append(_opinion(row, number, place))
        except ValueError as error:
            message = f"{name}: row {number}: {error}"
            if on_bad is None:
                raise ValueError(message) from None
            on_bad(message)
    return opinions_of(name, rows).select(split)


def opinions_of(name: str, rows: Sequence[Opinion]) -> Opinions:
    """Opinions of these rows, with the range of each data set.

    Raises:
        ValueError: There are no rows.
    """
    if not rows:
        raise ValueError(f"{name} holds no rows.")
    moses: dict[str, list[float]] = {}
    for row in rows:
        moses.setdefault(row.dataset, []).append(row.mos)
    return Opinions(
        name, tuple(rows), {dataset: (min(found), max(found)) for dataset, found in moses.items()}
    )


def is_opinions(source: str | Path) -> bool:
    """Whether a file or folder holds opinions, by its kind or its first rows; what is not here does not.

    A published data set with its folder, such as `koniq:path/to/koniq`, does.
    """
    if _benchmark(source) is not None:
        return True
    path = Path(source)
    if path.suffix.lower() in (".csv", ".parquet") or _mos_file(path) is not None:
        return True
    try:
        first = [row for _, row in islice(_rows(source), 10)] if path.exists() else []
    except ValueError:
        return False
    return any(_mos(row) is not None for row in first if isinstance(row, Mapping))


@dataclass
class Counts:
    """Opinions of one data set: rows, range and mean of the MOS, deviations missing or 0, rows of each part."""

    rows: int
    low: float
    high: float
    mean: float
    without_std: int
    zero_std: int
    splits: dict[str, int]


@dataclass
class OpinionReport:
    """What a file of opinions holds.

    Args:
        rows: In all.
        bad: Rows that cannot be used, and why; a row whose image, or whose reference, is also in
            another part of its data set is one.
        duplicates: Rows whose image an earlier row of the same part has.
        datasets: Counts of the good rows.
        left_out: Files of a published data set that are not there, of which no copy is complete.
    """

    rows: int = 0
    bad: list[BadRow] = field(default_factory=list)
    duplicates: list[BadRow] = field(default_factory=list)
    datasets: dict[str, Counts] = field(default_factory=dict)
    left_out: int = 0

    def summary(self) -> str:
        """The counts, in lines."""
        lines = [
            f"{self.rows:,} rows of opinions, {len(self.bad):,} bad, {len(self.duplicates):,} duplicates"
        ]
        for name, own in self.datasets.items():
            parts = ", ".join(f"{count:,} {split}" for split, count in own.splits.items())
            lines.append(
                f"{name or 'opinions'}: {own.rows:,} rows{f' ({parts})' if parts else ''}, MOS {own.low:g} to "
                f"{own.high:g}, mean {own.mean:.4g}; std is missing in {own.without_std:,} and 0 in {own.zero_std:,}"
            )
        if self.left_out:
            lines.append(f"{self.left_out:,} files are not there: they are left out")
        return "\n".join(lines)


def check_opinions(
    source: Any,
    image_folder: str | Path | None = None,
    open_images: bool = True,
    allow_outside: bool = False,
    on_row: Callable[[int], None] = lambda rows: None,
) -> OpinionReport:
    """Look at every opinion, without stopping at a bad one.

    The same image is found under any name, by the content of its file; without `open_images` by its path.

    Args:
        source, image_folder, allow_outside: As in `load_opinions`, a published data set too.
        open_images: Decode every image; else only see whether its file is there.
        on_row: Called with the number of rows seen so far.

    Raises:
        ValueError: The source as a whole cannot be read.
    """
    name, report = _name(source), OpinionReport()
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
                        f"its image {_shown(opinion.image)} is that of row {first.row}.",
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
                good[0].row, None, "every MOS is the same: there is nothing to learn or to judge."
            )
        )
    return report


def _each_opinion(
    source: Any, image_folder: str | Path | None, allow_outside: bool
) -> Iterator[tuple[int, Any, Opinion | ValueError | None]]:
    """Number, row, and opinion or what is wrong with it; `None` for a file that may be missing."""
    from .benchmarks import benchmark_rows

    if (benchmark := _benchmark(source)) is not None:
        yield from ((number, None, found) for number, found in benchmark_rows(*benchmark))
        return
    place = _place(source, image_folder, allow_outside)
    for number, row in _rows(source):
        try:
            if isinstance(row, ValueError):
                raise row
            opinion = _opinion(row, number, place)
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
            "leave it in one part."
        )


def _benchmark(source: Any) -> tuple[str, str] | None:
    """Name and folder of a published data set, of a text such as `koniq:path/to/koniq`."""
    from .benchmarks import BENCHMARKS

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


def _opinion(row: Row, number: int, place: Place) -> Opinion:
    """One row.

    Raises:
        ValueError: It lacks something, or a number is none.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"expected an object with 'image' and 'mos', got {type(row).__name__}.")
    image, mos = _first(row, _IMAGE), _mos(row)
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
        _text(row.get("split")),
        _text(row.get("dataset")) or "",
        number,
        _level_probs(row.get("level_probs")),
        _answer(row.get("conversations")),
        _text(row.get("reference")),
    )


def _first(row: Row, keys: Iterable[str]) -> Any:
    return next((row[key] for key in keys if row.get(key) not in (None, "")), None)


def _mos(row: Row) -> Any:
    """The MOS, or in a file of Q-Align's without one what the id says."""
    mos = _first(row, _MOS)
    if mos is None and row.get("conversations") is not None:
        match = _MOS_OF_ID.fullmatch(str(row.get("id")))
        return match and match[1]
    return mos


def _number(value: Any, name: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"expected a number as {name!r}, got {value!r}.")
    return number


def _text(value: Any) -> str | None:
    return None if value in (None, "") else str(value)


def _level_probs(value: Any) -> tuple[float, ...] | None:
    if value is None:
        return None
    if not isinstance(value, (list, tuple)) or len(value) < 2:
        raise ValueError(f"expected a list of probabilities as 'level_probs', got {value!r}.")
    probs = tuple(_number(prob, "level_probs") for prob in value)
    # DeQA-Score cuts off negative shares: some sums are 0.97.
    if min(probs) < 0 or not 0.9 < sum(probs) < 1.1:
        raise ValueError(f"expected 'level_probs' of at least 0 that sum to 1, got {value!r}.")
    return probs


def _answer(turns: Any) -> str | None:
    """The last turn of LLaVA's conversation, if there is one."""
    last = turns[-1] if isinstance(turns, (list, tuple)) and turns else None
    return (
        _text(last.get("value"))
        if isinstance(last, Mapping) and last.get("from") == "gpt"
        else None
    )


def _id(row: Any) -> str | None:
    return _text(row.get("id")) if isinstance(row, Mapping) else None


def _name(source: Any) -> str:
    return str(source) if isinstance(source, (str, Path)) else "opinions"


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


def _place(source: Any, image_folder: str | Path | None, allow_outside: bool) -> Place:
    if image_folder is not None and not Path(image_folder).is_dir():
        raise ValueError(f"there is no image folder {str(image_folder)!r}.")
    if not isinstance(source, (str, Path)):
        return Place(image_folder, allow_outside or image_folder is None)
    path = Path(source)
    if image_folder is None and path.exists():
        image_folder = path if path.is_dir() else path.parent
    return Place(image_folder, allow_outside)


def _mos_file(path: Path) -> Path | None:
    """DeQA-Score's mos.json, named itself or by its folder."""
    file = path / _MOS_FILE if path.is_dir() else path
    return file if file.name == _MOS_FILE and file.is_file() else None


def _rows(source: Any) -> Iterator[Numbered]:
    """Number and row, or what is wrong with it."""
    if not isinstance(source, (str, Path)):
        yield from _numbered(source)
        return
    path = Path(source)
    if (mos_file := _mos_file(path)) is not None:
        yield from _rows_of_two_files(mos_file)
    elif path.suffix.lower() == ".csv" and path.is_file():
        yield from read_csv(path, (_IMAGE, _MOS))
    elif path.suffix.lower() == ".parquet" and path.is_file():
        yield from read_parquet(path)
    elif path.is_file():
        yield from _numbered(read_rows(path))
    else:
        yield from _numbered(_rows_of_datasets(path, str(source)))


def _numbered(rows: Any) -> Iterator[Numbered]:
    if isinstance(rows, JsonLines):
        yield from rows.numbered()
    elif isinstance(rows, Mapping):  # parts of a data set
        number = 0
        for split, own in rows.items():
            for row in own:
                number += 1
                yield number, {"split": split, **row}
    else:
        yield from enumerate(rows, 1)


def _rows_of_two_files(path: Path) -> Iterator[Numbered]:
    """DeQA-Score's mos.json: image -> MOS, or MOS and std; split.json beside it: part -> names of files."""
    moses = _json(path)
    split_file = path.with_name(_SPLIT_FILE)
    splits = _json(split_file) if split_file.is_file() else None
    parts: dict[str, str] = {}
    for split, names in (splits or {}).items():
        if not isinstance(names, list):
            raise ValueError(
                f"{split_file}: expected a list of files as {split!r}, got {type(names).__name__}."
            )
        for name in names:
            if parts.setdefault(str(name), split) != split:
                raise ValueError(
                    f"{split_file}: {str(name)!r} is in {parts[str(name)]!r} and in {split!r}."
                )
    for number, (image, opinion) in enumerate(moses.items(), 1):
        part = parts.get(image, parts.get(image.rpartition("/")[2]))
        # As in the released code, images of no part are left out.
        if splits is None or part is not None:
            own = opinion if isinstance(opinion, Mapping) else {"mos": opinion}
            yield number, {**own, "image": image, "split": part}


def _json(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: expected an object, got {type(content).__name__}.")
    return content


def _rows_of_datasets(path: Path, source: str) -> Any:
    """All parts of a data set that `datasets` saved or finds on the Hub."""
    if not path.is_dir() and (path.suffix or source.count("/") > 1 or path.is_absolute()):
        raise ValueError(f"there is no file or folder {source!r}.")
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"{source} needs the package datasets: pip install 'owl2_hf[train]'."
        ) from None
    if any(
        (path / name).is_file() for name in ("dataset_info.json", "state.json", "dataset_dict.json")
    ):
        return datasets.load_from_disk(str(path))
    return datasets.load_dataset(source)
