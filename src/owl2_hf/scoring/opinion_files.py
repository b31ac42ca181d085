"""Read numbered rows from files and data sets of opinions."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..training.data import import_datasets, is_saved
from ..training.messages import Place
from ..training.rows import JsonLines, read_rows
from .opinion import IMAGE_KEYS, MOS_KEYS, Row
from .tables import read_csv, read_parquet

Numbered = tuple[int, Row | ValueError]
# DeQA-Score keeps opinions and the splits of a data set in two files.
_MOS_FILE, _SPLIT_FILE = "mos.json", "split.json"


def name_of(source: Any) -> str:
    return str(source) if isinstance(source, (str, Path)) else "opinions"


def place_of(source: Any, image_folder: str | Path | None, allow_outside: bool) -> Place:
    if image_folder is not None and not Path(image_folder).is_dir():
        raise ValueError(f"the image folder {str(image_folder)!r} does not exist.")
    if not isinstance(source, (str, Path)):
        return Place(image_folder, allow_outside or image_folder is None)
    path = Path(source)
    if image_folder is None and path.exists():
        image_folder = path if path.is_dir() else path.parent
    return Place(image_folder, allow_outside)


def mos_file(path: Path) -> Path | None:
    """DeQA-Score's mos.json, named itself or by its folder."""
    file = path / _MOS_FILE if path.is_dir() else path
    return file if file.name == _MOS_FILE and file.is_file() else None


def numbered_rows(source: Any) -> Iterator[Numbered]:
    """Number and row, or what is wrong with it."""
    if not isinstance(source, (str, Path)):
        yield from _numbered(source)
        return
    path = Path(source)
    if (file := mos_file(path)) is not None:
        yield from _rows_of_two_files(file)
    elif path.suffix.lower() == ".csv" and path.is_file():
        yield from read_csv(path, (IMAGE_KEYS, MOS_KEYS))
    elif path.suffix.lower() == ".parquet" and path.is_file():
        yield from read_parquet(path)
    elif path.is_file():
        yield from _numbered(read_rows(path))
    else:
        yield from _numbered(_rows_of_datasets(path, str(source)))


def _numbered(rows: Any) -> Iterator[Numbered]:
    if isinstance(rows, JsonLines):
        yield from rows.numbered()
    elif isinstance(rows, Mapping):  # splits of a data set
        number = 0
        for split, own in rows.items():
            for row in own:
                number += 1
                yield number, {"split": split, **row}
    else:
        yield from enumerate(rows, 1)


def _rows_of_two_files(path: Path) -> Iterator[Numbered]:
    """DeQA-Score's mos.json: image -> MOS, or MOS and std; split.json beside it: part -> names of
    files.
    """
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
                    f"{split_file}: {str(name)!r} is in {parts[str(name)]!r} and in {split!r}: "
                    "keep it in one split."
                )
    for number, (image, opinion) in enumerate(moses.items(), 1):
        part = parts.get(image, parts.get(image.rpartition("/")[2]))
        # As in the released code, images without a split are skipped.
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
        raise ValueError(f"{source!r} does not exist.")
    datasets = import_datasets(source)
    if is_saved(path):
        return datasets.load_from_disk(str(path))
    return datasets.load_dataset(source)
