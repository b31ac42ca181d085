"""Read rows of training data from JSON files, by index or as a stream."""

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from .messages import ORIGIN, UNREADABLE

Row = dict[str, Any]


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
        return with_place(row, self.place, self.name, self.number_of(index))

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
        return (with_place(row, self.place, self.name, number) for number, row in rows)

    def _numbered(self) -> Iterator[tuple[int, Row]]:
        if not isinstance(self.rows, JsonLines) or not self.skip_bad:
            yield from enumerate(self.rows, 1)
            return
        for number, row in self.rows.numbered():
            yield number, {UNREADABLE: str(row)} if isinstance(row, ValueError) else row


def with_place(
    row: Row, place: Row | None, name: str | None = None, number: int | None = None
) -> Row:
    if place is None or not isinstance(row, Mapping):
        return row
    return {**row, **place} if name is None else {**row, **place, ORIGIN: f"{name}: row {number}"}


def read_rows(path: Path) -> Sequence[Row]:
    """One JSON list, or one object a line; the first character tells which."""
    with path.open("rb") as file:
        first = next((line for line in file if line.strip()), b"").lstrip(b"\xef\xbb\xbf \t\r\n")[
            :1
        ]
    if path.suffix == ".jsonl" or first == b"{":
        return JsonLines(path)
    if first != b"[":
        raise ValueError(f"{path}: expected a JSON list of rows, or one JSON object per line.")
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
