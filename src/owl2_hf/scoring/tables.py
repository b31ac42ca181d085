"""Rows of CSV and Parquet files."""

import csv
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

Numbered = tuple[int, Mapping[str, Any] | ValueError]


def import_parquet(needed_for: str | Path) -> Any:
    """`pyarrow`, with `pyarrow.parquet`.

    Raises:
        ValueError: If it is not installed.
    """
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{needed_for} needs pyarrow: pip install 'owl2_hf[scoring]'.") from None
    return pyarrow


def csv_columns(path: Path) -> list[str]:
    """The names in the first line.

    Raises:
        ValueError: If the file is not UTF-8, or no CSV.
    """
    with open_csv(path) as file:
        return [name.strip() for name in next(csv.reader(file, strict=True), [])]


def read_csv(path: Path, expected: Sequence[Sequence[str]]) -> Iterator[Numbered]:
    """Line and row, or what is wrong with it.

    Args:
        expected: Of each of these groups of names one must be a column.

    Raises:
        ValueError: If such a column is missing, or the file is no CSV in UTF-8.
    """
    names = csv_columns(path)
    if not all(set(names) & set(group) for group in expected):
        wanted = " and ".join(group[0] for group in expected)
        columns = "column" if len(expected) == 1 else "columns"
        raise ValueError(
            f"{path}: expected the {columns} {wanted}, got {', '.join(names) or 'none'}."
        )
    with open_csv(path) as file:
        reader = csv.DictReader(file, strict=True)
        reader.fieldnames = names if reader.fieldnames else None  # the first line is read
        last = reader.line_num
        for row in reader:
            number, last = last + 1, reader.line_num
            if None in row or None in row.values():
                count = len(names) + len(row.get(None) or ()) - list(row.values()).count(None)
                yield number, ValueError(f"expected {len(names)} values, got {count}.")
            else:
                yield number, row


@contextmanager
def open_csv(path: Path) -> Iterator[TextIO]:
    """The text of a CSV file, and errors that name the file.

    Raises:
        ValueError: If it is not UTF-8, or what is read of it is no CSV.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield file
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8: save it as UTF-8.") from None
    except csv.Error as error:
        raise ValueError(f"{path} is not a CSV file: {error}.") from None


def parquet_schema(path: Path) -> Any:
    """The columns of a Parquet file, a `pyarrow.Schema`.

    Raises:
        ValueError: pyarrow is not installed, or the file is no Parquet.
    """
    pyarrow = import_parquet(path)
    with _parquet_errors(path, pyarrow):
        return pyarrow.parquet.read_schema(path)


def read_parquet(path: Path, columns: Sequence[str] | None = None) -> Iterator[Numbered]:
    """Number, counted from 1, and row.

    Args:
        columns: Those to read; all if not given.

    Raises:
        ValueError: pyarrow is not installed, or the file is no Parquet.
    """
    pyarrow = import_parquet(path)
    number = 0
    with _parquet_errors(path, pyarrow), pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield number, row


@contextmanager
def _parquet_errors(path: Path, pyarrow: Any) -> Iterator[None]:
    """Errors that name the file."""
    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a Parquet file: {error}") from None
