"""Write a table part by part, so that an interrupted run can continue.

Beside `OUT.csv` stands the folder `OUT.csv.parts` until the last row is there. It holds files of
some hundred rows each, which appear whole or not at all. The name of a file is its place in the
data set and a digest of its rows: what is there is not computed again, and what belongs to another
list is not taken for it. At the end the parts become one file, in the order of the data set.
"""

import csv
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .sources import Row
from .tables import import_parquet

SETTINGS, LOCK, NEW = "settings.json", "lock", ".new"
SUFFIXES = (".csv", ".parquet")
ROWS_OF_A_GROUP = 65536  # in the final Parquet file


class Table:
    """The parts of one output file.

    Args:
        out: A `.csv` or `.parquet` file.
        columns: Name -> Arrow type, `None` for text, of every column in order.
        rounded: Names of the columns that CSV shows with six decimals.

    Raises:
        ValueError: If the name tells no kind, two columns have one name, or pyarrow is not
            installed.
    """

    def __init__(
        self, out: str | Path, columns: Sequence[tuple[str, Any]], rounded: Sequence[str] = ()
    ):
        self.out, self.names, self.rounded = Path(out), [name for name, _ in columns], rounded
        self.folder = self.out.with_name(self.out.name + ".parts")
        check_kind(self.out)
        twice = sorted({name for name in self.names if self.names.count(name) > 1})
        if twice:
            raise ValueError(
                f"two columns of the output have the name {twice[0]!r}: rename one in the input."
            )
        self.is_csv = self.out.suffix.lower() == ".csv"
        if not self.is_csv:
            self.pyarrow = import_parquet(self.out)
            string = self.pyarrow.string()
            self.schema = self.pyarrow.schema([(name, kind or string) for name, kind in columns])

    def begin(self, settings: Mapping[str, Any], overwrite: bool) -> None:
        """Make the folder, or see that the one that is there was begun with the same settings.

        Raises:
            ValueError: If the output is there already, another process writes it, or its parts were
                begun with other settings.
        """
        if self.out.exists() and not overwrite and not self.folder.exists():
            raise ValueError(
                f"{self.out} already exists: choose another name, or overwrite it (--overwrite)."
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(self.folder / LOCK)  # the system releases it if the process is killed
        try:
            self.lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(
                f"another process is writing {self.out}: wait for it, or choose another name."
            ) from None
        for file in self.folder.iterdir() if overwrite else ():
            if file.name != LOCK:
                file.unlink()
        file, wanted = self.folder / SETTINGS, json.loads(json.dumps(settings, default=str))
        if not file.exists():
            _write(file, lambda path: path.write_text(json.dumps(wanted, indent=1) + "\n"))
            return
        found = json.loads(file.read_text())
        changed = [name for name in wanted if found.get(name) != wanted[name]]
        if changed:
            raise ValueError(
                f"{self.folder} was started with another {', '.join(changed)}: use the same, "
                "choose another name, or start again (--overwrite)."
            )

    def part(self, index: int, rows: Sequence[Row]) -> Path:
        """The file of these rows, the `index`-th of the data set."""
        digest = hashlib.sha256()
        for row in rows:
            text = json.dumps([row.name, dict(row.values)], default=str)
            digest.update(text.encode() + b"\n")
        return self.folder / f"{index:09}-{digest.hexdigest()[:16]}{self.out.suffix.lower()}"

    def write_part(self, part: Path, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write a part; a run that ends meanwhile leaves none."""
        if self.is_csv:
            texts = ([self._text(name, row.get(name)) for name in self.names] for row in rows)
            _write(part, lambda path: self._write_csv(path, texts))
            return
        values = [{name: _plain(row.get(name)) for name in self.names} for row in rows]
        table = self.pyarrow.Table.from_pylist(values, schema=self.schema)
        _write(part, lambda path: self.pyarrow.parquet.write_table(table, path))

    def finish(self, parts: Sequence[Path]) -> tuple[int, int]:
        """Join the parts, in this order, and remove their folder.

        Returns:
            The number of rows, and of those that have an error.

        Raises:
            ValueError: If a part is not there.
        """
        missing = [part for part in parts if not part.exists()]
        if missing:
            raise ValueError(
                f"{len(missing):,} of {len(parts):,} parts are not in {self.folder}: all processes "
                "must write to the same folder, and see the same files."
            )
        counts = [0, 0]
        join = self._join_csv if self.is_csv else self._join_parquet
        _write(self.out, lambda path: join(path, parts, counts))
        shutil.rmtree(self.folder)
        return counts[0], counts[1]

    def _join_csv(self, path: Path, parts: Sequence[Path], counts: list[int]) -> None:
        def rows() -> Iterator[list[str]]:
            error = self.names.index("error")
            for part in parts:
                with part.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
                    reader = csv.reader(file)
                    next(reader)
                    for row in reader:
                        counts[0] += 1
                        counts[1] += bool(row[error])
                        yield row

        self._write_csv(path, rows())

    def _join_parquet(self, path: Path, parts: Sequence[Path], counts: list[int]) -> None:
        parquet, tables = self.pyarrow.parquet, []
        with parquet.ParquetWriter(path, self.schema) as writer:
            for index, part in enumerate(parts, 1):
                tables.append(parquet.read_table(part, schema=self.schema))
                counts[0] += len(tables[-1])
                counts[1] += len(tables[-1]) - tables[-1]["error"].null_count
                if index == len(parts) or sum(map(len, tables)) >= ROWS_OF_A_GROUP:
                    writer.write_table(self.pyarrow.concat_tables(tables))
                    tables.clear()

    def _write_csv(self, path: Path, rows: Iterable[Sequence[Any]]) -> None:
        # File names that are not UTF-8 keep their bytes.
        with path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(self.names)
            table.writerows(rows)

    def _text(self, name: str, value: Any) -> Any:
        if name in self.rounded and value is not None:
            return f"{value:.6f}"
        return json.dumps(value, default=str) if isinstance(value, (list, dict)) else value


def check_kind(out: str | Path) -> None:
    """See that the name of an output file tells its kind.

    Raises:
        ValueError: If it does not.
    """
    if Path(out).suffix.lower() not in SUFFIXES:
        raise ValueError(f"expected an output file named .csv or .parquet, got {str(out)!r}.")


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file that appears whole, also after the power fails."""
    new = path.with_name(path.name + NEW)
    write(new)
    with new.open("rb+") as file:
        os.fsync(file.fileno())
    new.replace(path)


def _plain(value: Any) -> Any:
    """Parquet holds UTF-8 alone: other bytes of a file's name are written as \\xNN."""
    if not isinstance(value, str):
        return value
    return value.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
