"""Read rows of training data from files and the `datasets` library, and check them.

This is one file because rows are found, read and checked by the same rules.
"""

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, get_worker_info

from ..processing.image_processing_mplug_owl2 import FORMATS, MAX_IMAGE_PIXELS, open_image
from .messages import ORIGIN, UNREADABLE, pictures_of, to_messages

Row = dict[str, Any]

ROWS_OF_A_WORKER = 256


class JsonLines(Sequence[Row]):
    """Rows of a file with one JSON object a line; only the places of the lines are kept in
    memory.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)

    @cached_property
    def _places(self) -> np.ndarray:
        """(rows, 2) line number and first byte of each row."""
        return np.fromiter((place for *place, _ in self._lines()), dtype=np.dtype((np.int64, 2)))

    def _lines(self) -> Iterator[tuple[int, int, bytes]]:
        """Number, counted from 1, first byte and content of every line that is not blank."""
        start = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, start, line
                start += len(line)

    def numbered(self) -> Iterator[tuple[int, Row | ValueError]]:
        """Line number and row, or what is wrong with it."""
        for number, _, line in self._lines():
            try:
                yield number, _parse(line)
            except ValueError as error:
                yield number, error

    def __len__(self) -> int:
        return len(self._places)

    def number_of(self, index: int) -> int:
        """The line of a row, counted from 1."""
        return int(self._places[index, 0])

    def __iter__(self) -> Iterator[Row]:
        for number, row in self.numbered():
            if isinstance(row, ValueError):
                raise ValueError(f"{self.path}, line {number}: {row}") from None
            yield row

    def __getitem__(self, index: Any) -> Any:
        number, start = self._places[index]
        with self.path.open("rb") as file:
            file.seek(start)
            line = file.readline()
        try:
            return _parse(line)
        except ValueError as error:
            raise ValueError(f"{self.path}, line {number}: {error}") from None


def _parse(line: bytes) -> Row:
    try:
        return json.loads(line.rstrip())
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON at column {error.colno}: {error.msg}.") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON: {error}.") from None


class Rows(Dataset[Row]):
    """Rows by index, each with where it and its images come from.

    Args:
        name: Of the source, for messages about a row.
        skip_bad: A row that cannot be read stays, as one that `to_messages` refuses.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        place: Row | None = None,
        name: str | None = None,
        skip_bad: bool = False,
    ):
        self.rows, self.place, self.name, self.skip_bad = rows, place, name, skip_bad

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        try:
            row = self.rows[index]
        except (ValueError, OSError) as error:
            if not self.skip_bad:
                raise
            row = {UNREADABLE: str(error)}
        return _with_place(row, self.place, self.name, self.number_of(index))

    def number_of(self, index: int) -> int:
        """What a row is called in messages, counted from 1: its line in a file of lines."""
        return (
            self.rows.number_of(index)
            if isinstance(self.rows, JsonLines)
            else range(len(self))[index] + 1
        )


class RowStream(IterableDataset[Row]):
    """Rows one after another, as `Rows` has them; the workers of a DataLoader share them out."""

    def __init__(
        self,
        rows: Iterable[Row],
        place: Row | None = None,
        name: str | None = None,
        skip_bad: bool = False,
    ):
        self.rows, self.place, self.name, self.skip_bad = rows, place, name, skip_bad

    def __iter__(self) -> Iterator[Row]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        rows = itertools.islice(self._numbered(), first, None, step)
        return (_with_place(row, self.place, self.name, number) for number, row in rows)

    def _numbered(self) -> Iterator[tuple[int, Row]]:
        if not isinstance(self.rows, JsonLines) or not self.skip_bad:
            yield from enumerate(self.rows, 1)
            return
        for number, row in self.rows.numbered():
            yield number, {UNREADABLE: str(row)} if isinstance(row, ValueError) else row


def _with_place(
    row: Row, place: Row | None, name: str | None = None, number: int | None = None
) -> Row:
    if place is None or not isinstance(row, Mapping):
        return row
    return {**row, **place} if name is None else {**row, **place, ORIGIN: f"{name}: row {number}"}


def load_rows(
    source: Any,
    image_folder: str | Path | None = None,
    split: str = "train",
    streaming: bool = False,
    allow_outside: bool = False,
    skip_bad: bool = False,
) -> Any:
    """Rows of training data, by index or as a stream, as PyTorch's DataLoader takes them.

    Args:
        source: A file of LLaVA's list or of one JSON object a line, a folder that `datasets` saved
            or reads, the id of a data set on the Hub, or rows: a list, `datasets.Dataset` or
            `datasets.IterableDataset`.
        image_folder: What relative paths of images start from; for a file its own folder if not
            given.
        split: Split of a folder or a Hub data set that has several.
        streaming: Read the rows one after another.
        allow_outside: Rows may name images outside the folder and http(s) URLs. Rows that are given
            as they are, and without a folder, may do so anyway.
        skip_bad: A row that cannot be read is no error here, but one that `to_messages` refuses, as
            bad rows are.

    Raises:
        ValueError: If there is no such source, or it is of another kind.
    """
    if image_folder is not None and not Path(image_folder).is_dir():
        raise ValueError(f"there is no image folder {str(image_folder)!r}.")
    rows: Any = source
    if isinstance(source, (str, Path)):
        path = Path(source)
        if path.is_file():
            rows = read_rows(path)
            image_folder = path.parent if image_folder is None else image_folder
        else:
            rows = _load_datasets(source, split, streaming)
    place = None
    if isinstance(source, (str, Path)) or image_folder is not None:
        place = {"image_folder": image_folder and str(image_folder), "allow_outside": allow_outside}
    name = str(source) if isinstance(source, (str, Path)) else None
    if isinstance(rows, Mapping):
        raise ValueError(
            f"expected rows, got splits {', '.join(map(str, rows))}: choose one of them."
        )
    if not hasattr(rows, "__iter__") and not hasattr(rows, "__getitem__"):
        raise ValueError(
            f"expected a path, the id of a data set or rows, got {type(source).__name__}."
        )
    # Of `datasets`, which shares itself out to workers.
    if isinstance(rows, IterableDataset) and hasattr(rows, "map"):
        return rows if place is None else rows.map(_with_place, fn_kwargs={"place": place})
    if streaming or not hasattr(rows, "__getitem__"):
        return RowStream(rows, place, name, skip_bad)
    if not len(rows):
        raise ValueError(
            f"{source if isinstance(source, (str, Path)) else 'the data set'} holds no rows."
        )
    return Rows(rows, place, name, skip_bad)


def read_rows(path: Path) -> Sequence[Row]:
    """One JSON list, or one object a line; the first character tells which."""
    with path.open("rb") as file:
        first = next((line for line in file if line.strip()), b"").lstrip(b"\xef\xbb\xbf \t\r\n")[
            :1
        ]
    if path.suffix == ".jsonl" or first == b"{":
        return JsonLines(path)
    if first != b"[":
        raise ValueError(f"{path}: expected a JSON list of rows, or one JSON object a line.")
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None


def import_datasets(needed_for: str | Path) -> Any:
    """The package `datasets`.

    Raises:
        ValueError: If it is not installed.
    """
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"{needed_for} needs the package datasets: pip install 'owl2_hf[train]'."
        ) from None
    return datasets


def is_saved(path: Path) -> bool:
    """Whether `datasets` saved this folder."""
    return any(
        (path / name).is_file() for name in ("dataset_info.json", "state.json", "dataset_dict.json")
    )


def _load_datasets(source: str | Path, split: str, streaming: bool) -> Any:
    path = Path(source)
    if not path.is_dir() and (
        path.suffix in (".json", ".jsonl") or str(source).count("/") > 1 or path.is_absolute()
    ):
        raise ValueError(f"there is no file or folder {str(source)!r}.")
    datasets = import_datasets(source)
    if not is_saved(path):
        return datasets.load_dataset(str(source), split=split, streaming=streaming)
    loaded = datasets.load_from_disk(str(path))
    if isinstance(loaded, Mapping):
        if split not in loaded:
            raise ValueError(f"{path} has no split {split!r}, only {', '.join(map(repr, loaded))}.")
        loaded = loaded[split]
    return loaded.to_iterable_dataset() if streaming else loaded


@dataclass
class BadRow:
    """A row that cannot be learned from: its number, counted from 1 (of a file of lines the line),
    its id and why.
    """

    row: int
    id: str | None
    reason: str


@dataclass
class DataReport:
    """What a data set holds; the counts behind `bad` are of its good rows."""

    rows: int = 0
    bad: list[BadRow] = field(default_factory=list)
    text_only: int = 0
    images: int = 0
    turns: int = 0
    answers: int = 0
    tokens_longest: int | None = None
    tokens_mean: float | None = None
    truncated: int | None = None
    without_labels: int | None = None

    def add(self, messages: list[dict[str, Any]]) -> None:
        pictures = len(pictures_of(messages))
        self.images += pictures
        self.text_only += not pictures
        self.turns += len(messages)
        self.answers += sum(message["role"] == "assistant" for message in messages)

    def summary(self) -> str:
        """The counts, in lines."""
        lines = [
            f"{self.rows:,} rows, {len(self.bad):,} bad, {self.text_only:,} text only; "
            f"{self.images:,} images, {self.turns:,} turns, {self.answers:,} answers"
        ]
        if self.tokens_longest is not None:
            lines.append(
                f"tokens of a row: longest {self.tokens_longest:,}, mean {self.tokens_mean:,.1f}"
            )
        if self.truncated is not None:
            lines.append(
                f"{self.truncated:,} rows would be truncated, {self.without_labels:,} have no "
                "label then"
            )
        return "\n".join(lines)


def check_rows(
    source: Any,
    image_folder: str | Path | None = None,
    processor: Any = None,
    max_length: int | None = None,
    split: str = "train",
    streaming: bool = False,
    open_images: bool = True,
    allow_outside: bool = False,
    on_row: Callable[[int], None] | None = None,
) -> DataReport:
    """Look at every row, without stopping at a bad one.

    Args:
        source, image_folder, split, streaming, allow_outside: as in `load_rows`.
        processor: Also counts tokens, and with `max_length` the rows that truncation shortens or
            leaves unlabelled.
        open_images: Decode every image; without a processor `False` only sees whether its file is
            there.
        on_row: Called with the number of rows seen so far.

    Raises:
        ValueError: If the source as a whole cannot be read.
    """
    from .collator import Collator

    report = DataReport()
    collator = None if processor is None else Collator(processor, max_length)
    lengths: list[int] = []
    for number, row in _numbered(load_rows(source, image_folder, split, streaming, allow_outside)):
        report.rows += 1
        try:
            if isinstance(row, Exception):
                raise row
            messages = to_messages(row)
            if collator is not None:
                [encoded] = collator.encode([{"messages": messages}])
                collator.truncate(encoded)
                lengths.append(len(encoded))
            elif open_images:
                _open(messages)
            report.add(messages)
        except (ValueError, OSError) as error:
            report.bad.append(_bad_row(number, row, error))
        if on_row is not None:
            on_row(report.rows)
    if collator is not None:
        report.tokens_longest = max(lengths, default=0)
        report.tokens_mean = sum(lengths) / max(len(lengths), 1)
    if collator is not None and max_length is not None:
        report.truncated, report.without_labels = (
            collator.counts["truncated"],
            collator.counts["without_labels"],
        )
    return report


def look_over(
    rows: Any, num_workers: int = 0, first: int = 0, step: int = 1, decode: bool = False
) -> list[BadRow]:
    """Rows that cannot be learned from, as far as the headers of their images tell.

    Args:
        rows: `Rows`, or others by index that tell the `number_of` each.
        num_workers: Processes that look; none for a few rows.
        first, step: Look at every `step`-th row from index `first` on.
        decode: Decode every image, which takes longer and finds all that is wrong with it.
    """
    share = Subset(_Verdicts(rows, decode), range(first, len(rows), step))
    num_workers = min(num_workers, len(share) // ROWS_OF_A_WORKER)
    loader = DataLoader(
        share, batch_size=ROWS_OF_A_WORKER, num_workers=num_workers, collate_fn=list
    )
    return [verdict for batch in loader for verdict in batch if verdict is not None]


class _Verdicts(Dataset[Any]):
    """What is wrong with each row, `None` where nothing is."""

    def __init__(self, rows: Any, decode: bool):
        self.rows, self.decode = rows, decode

    def __getitem__(self, index: int) -> BadRow | None:
        row: Any = {}
        try:
            row = self.rows[index]
            messages = to_messages(row)
            if self.decode:
                _open(messages)
            for picture in pictures_of(messages):
                _look_at(picture)
        except (ValueError, OSError) as error:
            return _bad_row(self.rows.number_of(index), row, error)
        return None


def _look_at(picture: Any) -> None:
    """Refuse an image whose header alone says that it cannot be opened; nothing is fetched."""
    if isinstance(picture, Image.Image) or (
        isinstance(picture, str) and picture.startswith("http")
    ):
        return
    if isinstance(picture, bytes) or not picture.startswith("data:"):
        try:
            with Image.open(
                BytesIO(picture) if isinstance(picture, bytes) else picture, formats=FORMATS
            ) as opened:
                if opened.width * opened.height <= MAX_IMAGE_PIXELS:
                    return
        except Exception:  # a damaged file makes decoders raise almost anything; below it is named
            pass
    open_image(picture)


def _bad_row(number: int, row: Any, error: Exception) -> BadRow:
    identity = row.get("id") if isinstance(row, Mapping) else None
    return BadRow(number, None if identity is None else str(identity), str(error))


def _open(messages: list[dict[str, Any]]) -> None:
    for picture in pictures_of(messages):
        if isinstance(picture, Image.Image):
            picture.load()
        else:
            open_image(picture)


def _numbered(rows: Any) -> Iterator[tuple[int, Any]]:
    """Number, counted from 1, and row, or the error that reading it gives."""
    content = getattr(rows, "rows", rows)
    if isinstance(content, JsonLines):
        for number, row in content.numbered():
            yield number, _with_place(row, rows.place)  # type: ignore[arg-type]
    elif isinstance(rows, Rows):
        for index in range(len(rows)):
            try:
                row = rows[index]
            except (ValueError, OSError) as error:
                row = error  # type: ignore[assignment]
            yield index + 1, row
    else:
        yield from enumerate(rows, 1)


__all__ = [
    "BadRow",
    "DataReport",
    "JsonLines",
    "RowStream",
    "Rows",
    "check_rows",
    "load_rows",
    "look_over",
    "to_messages",
]
