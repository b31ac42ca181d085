"""Read rows of images from folders, globs, lists, tar files and data sets of `datasets`.

This is one file because every source of images gives the same rows.
"""

import glob
import io
import os
import re
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..processing.image_processing_mplug_owl2 import MAX_FILE_BYTES
from ..training.data import import_datasets
from ..training.messages import Place, locate_picture
from .frames import VIDEO_SUFFIXES, image_suffixes, is_video_path
from .tables import csv_columns, import_parquet, parquet_schema, read_csv, read_parquet

LISTS = (".csv", ".parquet")
TARS = (".tar", ".tar.gz", ".tgz")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Member:
    """A file inside a tar file: `size` bytes from byte `offset` on."""

    path: str
    offset: int
    size: int

    def read(self) -> bytes:
        with Path(self.path).open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


@dataclass(frozen=True)
class HubFile:
    """A file of a data set on the Hub, by its `hf://` address."""

    url: str

    def read(self) -> bytes:
        import fsspec

        with fsspec.open(self.url, "rb") as file:
            return file.read(MAX_FILE_BYTES + 1)  # one byte more, to detect a file over the limit


@dataclass(frozen=True)
class Row:
    """One image of a data set.

    Args:
        name: What the output calls it.
        image: A path, URL, bytes, PIL image, `Member` or `HubFile`; or what is wrong with it.
        values: The row's other columns.
    """

    name: str
    image: Any
    values: Mapping[str, Any] = field(default_factory=dict)


class Source:
    """Rows in an order that does not change.

    Args:
        columns: Names of the rows' other columns -> their Arrow types, `None` for text.
    """

    columns: Mapping[str, Any] = {}

    def __iter__(self) -> Iterator[Row]:
        raise NotImplementedError

    def count(self) -> int | None:
        """The number of rows, `None` where only reading all of them tells."""
        return sum(1 for _ in self)


class Files(Source):
    """A file, or the images (for task "video" the videos) of a folder and of the folders in it."""

    def __init__(self, path: str, is_video: bool):
        self.path = path
        self.suffixes = VIDEO_SUFFIXES if is_video else image_suffixes()
        what = "videos" if is_video else "images"
        if Path(path).is_dir():
            if next(iter(self), None) is None:
                raise ValueError(
                    f"{path} and its folders contain no {what}: expected files named "
                    f"{', '.join(self.suffixes[:6])}, ...; for tar files, pass {path}/*.tar."
                )
        elif is_video_path(path) and not is_video:
            raise ValueError(
                f"{path} is a video: choose --task video for a score of each video, or leave out "
                "--out for a score of each frame."
            )

    def __iter__(self) -> Iterator[Row]:
        if not Path(self.path).is_dir():
            yield Row(self.path, self.path)
            return
        for folder, folders, files in os.walk(self.path, onerror=_raise):
            folders.sort()
            for name in sorted(files):
                if name.lower().endswith(self.suffixes):
                    path = os.path.join(folder, name)  # noqa: PTH118  # a Path would drop "./"
                    yield Row(path, path)


class Listing(Source):
    """A CSV or Parquet file with a column of images."""

    def __init__(self, path: str, column: str, place: Place):
        self.path, self.column, self.place = Path(path), column, place
        if self.path.suffix.lower() == ".csv":
            names: dict[str, Any] = dict.fromkeys(csv_columns(self.path))
        else:
            names = _without_bytes(parquet_schema(self.path), column)
        if column not in names:
            raise ValueError(
                f"{path}: expected the column {column}, got {', '.join(names) or 'none'}; choose "
                "one with --column."
            )
        self.columns = {name: kind for name, kind in names.items() if name != column}

    def __iter__(self) -> Iterator[Row]:
        numbered = (
            read_csv(self.path, [[self.column]])
            if self.path.suffix.lower() == ".csv"
            else read_parquet(self.path, [self.column, *self.columns])
        )
        for number, row in numbered:
            fallback = f"{self.path}: row {number}"
            if isinstance(row, ValueError):
                yield Row(fallback, row)
            else:
                yield row_of(row, self.column, self.columns, self.place, fallback)

    def count(self) -> int | None:
        if self.path.suffix.lower() == ".csv":
            return sum(1 for _ in read_csv(self.path, [[self.column]]))
        return import_parquet(self.path).parquet.read_metadata(self.path).num_rows


class DataSet(Source):
    """A data set of the package `datasets`: a folder that it saved, the id of one on the Hub, or
    the object itself.

    Args:
        parts: Name of each split -> its rows.
    """

    def __init__(self, name: str, parts: Mapping[str, Any], column: str, place: Place):
        from datasets import Image as ImageFeature

        self.name, self.column, self.place = name, column, place
        self.has_splits, self.parts = len(parts) > 1, {}
        for split, rows in parts.items():
            if rows.features is None:  # the columns of a stream are known after its first row
                rows = rows._resolve_features()
            if column not in rows.features:
                names = ", ".join(rows.features)
                raise ValueError(
                    f"{name}: expected the column {column}, got {names}; choose one with --column."
                )
            if isinstance(rows.features[column], ImageFeature):  # decoded by the worker processes
                rows = rows.cast_column(column, ImageFeature(decode=False))
            kinds = _without_bytes(rows.features.arrow_schema, column)
            self.columns = {key: kind for key, kind in kinds.items() if key != column}
            self.parts[split] = rows.select_columns([column, *self.columns])
        if self.has_splits:
            self.columns = {"split": None, **self.columns}

    def __iter__(self) -> Iterator[Row]:
        for split, rows in self.parts.items():
            for number, row in enumerate(rows):
                fallback = f"{self.name}[{split}]#{number}"
                row = {"split": split, **row} if self.has_splits else row
                path = (
                    row[self.column].get("path") if isinstance(row[self.column], Mapping) else None
                )
                # Images that are files on the Hub; files of another data set are not fetched.
                if path and f"hf://datasets/{self.name}@" in path and not row[self.column]["bytes"]:
                    values = {key: row.get(key) for key in self.columns}
                    yield Row(path, HubFile(path), values)
                    continue
                yield row_of(row, self.column, self.columns, self.place, fallback)

    def count(self) -> int | None:
        parts = self.parts.values()
        return sum(map(len, parts)) if all(hasattr(rows, "__len__") for rows in parts) else None


class Tar(Source):
    """The images of a tar file, as WebDataset has them: `shard.tar/000123.jpg`."""

    def __init__(self, path: str):
        self.path, self.suffixes = path, image_suffixes()

    def __iter__(self) -> Iterator[Row]:
        try:
            with tarfile.open(self.path) as file:
                # Workers can read from an offset only if the file is not compressed.
                is_plain = isinstance(file.fileobj, io.BufferedReader)
                for info in file:
                    file.members = []  # type: ignore[attr-defined]  # else it keeps every header
                    if info.isreg() and info.name.lower().endswith(self.suffixes):
                        name = f"{self.path}/{info.name.removeprefix('./')}"
                        yield Row(name, self._image(file, info, is_plain))
                if is_plain:
                    _check_end(file)
        except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
            yield Row(self.path, ValueError(f"{self.path} is damaged: {error}."))

    def _image(self, file: tarfile.TarFile, info: tarfile.TarInfo, is_plain: bool) -> Any:
        if info.size > MAX_FILE_BYTES:
            return ValueError(f"it has {info.size:,} bytes, the limit is {MAX_FILE_BYTES:,}.")
        if is_plain:
            return Member(self.path, info.offset_data, info.size)
        member = file.extractfile(info)
        return b"" if member is None else member.read()

    def count(self) -> int | None:
        return super().count() if self.path.lower().endswith(".tar") else None


def open_sources(
    names: Sequence[Any],
    column: str = "image",
    split: str | None = None,
    image_folder: str | Path | None = None,
    allow_outside: bool = False,
    is_video: bool = False,
) -> list[Source]:
    """What is to be scored.

    Args:
        names: Files, folders, globs, `.csv` and `.parquet` lists, `.tar` files, folders that
            `datasets` saved, ids of data sets on the Hub; also data sets of `datasets` themselves.
        column: Of lists and data sets, the one that holds the image.
        split: Of data sets; all of them if not given.
        image_folder, allow_outside: As in `owl2_hf.training.data.load_rows`.
        is_video: Videos count, not images.

    Raises:
        ValueError: If something is not there, holds no images, or lacks the column.
    """
    if image_folder is not None and not Path(image_folder).is_dir():
        raise ValueError(f"the image folder {str(image_folder)!r} does not exist.")
    sources: list[Source] = []
    for name in names:
        if not isinstance(name, (str, Path)):
            place = Place(image_folder, allow_outside or image_folder is None)
            sources.append(DataSet("rows", _parts(name, split, "rows"), column, place))
            continue
        for path in _matches(str(name)):
            start = Path(path).parent if Path(path).is_file() else path
            place = Place(image_folder or start, allow_outside)
            if not Path(path).exists() or _is_saved(Path(path)):
                parts = _parts(_load(path, split), split, path)
                sources.append(DataSet(path, parts, column, place))
            elif path.lower().endswith(LISTS):
                sources.append(Listing(path, column, place))
            elif path.lower().endswith(TARS):
                if is_video:
                    raise ValueError(f"{path}: videos in tar files are not supported; unpack it.")
                sources.append(Tar(path))
            else:
                sources.append(Files(path, is_video))
    return sources


def all_columns(sources: Sequence[Source]) -> dict[str, Any]:
    """The columns of all sources, in the order in which they appear.

    Raises:
        ValueError: If two sources have columns of one name and different types.
    """
    found: dict[str, Any] = {}
    for source in sources:
        for name, kind in source.columns.items():
            if found.setdefault(name, kind) != kind:
                known, new = (str(one or "text") for one in (found[name], kind))
                raise ValueError(
                    f"column {name!r} holds {known} in one source and {new} in another: score "
                    "them into separate files."
                )
    return found


def _matches(name: str) -> list[str]:
    """The files of a glob in order; else the name itself, if there may be something behind it."""
    if Path(name).exists():
        return [name]
    if glob.has_magic(name):
        if not (found := sorted(glob.glob(name, recursive=True))):  # noqa: PTH207
            raise ValueError(f"no file matches {name}.")
        return found
    known = (*LISTS, *TARS, *image_suffixes(), *VIDEO_SUFFIXES)
    if not _HUB_ID.fullmatch(name) or name.lower().endswith(known):
        raise ValueError(f"{name!r} does not exist.")
    return [name]


def _is_saved(path: Path) -> bool:
    """Whether `datasets` saved this folder."""
    return any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _load(name: str, split: str | None) -> Any:
    datasets = import_datasets(name)
    if Path(name).exists():
        return datasets.load_from_disk(name)
    try:
        return datasets.load_dataset(name, split=split, streaming=True)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{name!r} does not exist, neither here nor as a data set on the Hub: {error}"
        ) from None


def _parts(rows: Any, split: str | None, name: str) -> dict[str, Any]:
    """Name of each split that is wanted -> its rows."""
    if not isinstance(rows, Mapping):
        own = getattr(rows, "split", None)
        rows = {str(own or split or "rows"): rows}
    if split is None:
        return dict(rows)
    if split not in rows:
        raise ValueError(f"{name} has no split {split!r}, only {', '.join(map(repr, rows))}.")
    return {split: rows[split]}


def row_of(
    row: Mapping[str, Any], column: str, columns: Mapping[str, Any], place: Place, fallback: str
) -> Row:
    """A row of a list or data set.

    Args:
        column, columns: The one that holds the image, and those to keep.
        fallback: The name where the image has no path.
    """
    image = row[column]
    path = image.get("path") if isinstance(image, Mapping) else image
    is_name = isinstance(path, (str, Path)) and str(path) and not str(path).startswith("data:")
    name = str(path) if is_name else fallback
    values = {key: row.get(key) for key in columns}
    try:
        return Row(name, locate_picture(image, place), values)
    except ValueError as error:
        return Row(name, error, values)


def _without_bytes(schema: Any, column: str) -> dict[str, Any]:
    """Name -> Arrow type, without columns of bytes beside the image: other images, sounds."""
    from pyarrow import types

    def holds_bytes(kind: Any) -> bool:
        if types.is_binary(kind) or types.is_large_binary(kind):
            return True
        return any(holds_bytes(kind.field(index).type) for index in range(kind.num_fields))

    return {one.name: one.type for one in schema if one.name == column or not holds_bytes(one.type)}


def _check_end(file: tarfile.TarFile) -> None:
    """Behind the last header there are zeros, or nothing; at anything else tarfile stops without a
    word.
    """
    file.fileobj.seek(file.offset)
    if file.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
        raise tarfile.ReadError(f"expected a header at byte {file.offset:,}, got none")


def _raise(error: OSError) -> None:
    raise error
