"""Read published data sets of opinions from their unpacked folders.

Every MOS is such that more is better: opinions that count distortions are turned round.
"""

import csv
import math
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

from transformers.utils import logging

from ..training.messages import Place, locate_picture
from .opinion import Opinion, Opinions, opinions_of
from .tables import open_csv

logger = logging.get_logger(__name__)

Row = Mapping[str, str]
_SHEET = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"
# CSIQ's names of distortions in its table -> folder and part of the file's name.
_CSIQ = {
    "noise": ("awgn", "AWGN"),
    "awgn": ("awgn", "AWGN"),
    "blur": ("blur", "BLUR"),
    "contrast": ("contrast", "contrast"),
    "fnoise": ("fnoise", "fnoise"),
    "jpeg": ("jpeg", "JPEG"),
    "jpeg2000": ("jpeg2000", "jpeg2000"),
}
_MAX_BYTES = 2**28  # of an unpacked workbook: the published ones are a hundred times smaller
# Some files of these can no longer be downloaded: missing ones are skipped.
_INCOMPLETE = ("ava", "lsvq")
_KONIQ_SETS = {"training": "train", "validation": "val", "test": "test"}


def read_benchmark(
    name: str,
    root: str | Path,
    split: str | None = None,
    on_bad: Callable[[str], None] | None = None,
) -> Opinions:
    """Opinions of a published data set.

    Args:
        name: One of `BENCHMARKS`.
        root: Its folder, as it was unpacked.
        split: Only rows of this part, where the data set names parts.
        on_bad: As in `load_opinions`.

    Raises:
        ValueError: If there is no such data set, or the folder does not hold it. The message says
            what is missing.
    """
    folder, rows, missing = Path(root), [], 0
    for number, row in benchmark_rows(name, root):
        if isinstance(row, ValueError):
            if on_bad is None:
                raise ValueError(f"{name}: row {number}: {row} {_LAYOUTS[name]}") from None
            on_bad(f"{name}: row {number}: {row}")
        elif row is None:
            missing += 1
        else:
            rows.append(row)
    if missing and rows:
        logger.warning(
            f"{name}: {missing:,} of {missing + len(rows):,} files are missing in {folder} and "
            "skipped."
        )
    if not rows:
        raise ValueError(f"{name}: all {missing:,} files are missing in {folder}; {_LAYOUTS[name]}")
    return opinions_of(f"{name} ({folder})", rows).select(split)


def benchmark_rows(
    name: str, root: str | Path
) -> Iterator[tuple[int, Opinion | ValueError | None]]:
    """Number and opinion of each row, or what is wrong with its file; `None` if it may be missing.

    Raises:
        ValueError: If there is no such data set, or its tables are not in the folder or damaged.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"expected a benchmark of {', '.join(BENCHMARKS)}, got {name!r}.")
    folder = Path(root)
    if not folder.is_dir():
        raise ValueError(f"{name}: the folder {str(root)!r} does not exist.")
    place = Place(folder, is_open=False)
    for row in BENCHMARKS[name](folder):
        try:
            image = locate_picture(str(Path(row.image).absolute()), place)
            yield row.row, replace(row, image=image)
        except ValueError as error:
            may_miss = name in _INCOMPLETE and "does not exist" in str(error)
            yield row.row, None if may_miss else error


def _koniq(root: Path) -> Iterator[Opinion]:
    """KonIQ-10k: mean and deviation of the five counts, from 1 to 5; its own parts where the file
    has them.
    """
    path = _find(
        root, "koniq", "koniq10k_distributions_sets.csv", "koniq10k_scores_and_distributions.csv"
    )
    images = _find(root, "koniq", "1024x768", "512x384", "images")
    for number, row in _csv(path):
        mos, std = _of_counts(
            [_number(path, number, row, f"c{level}") for level in range(1, 6)], path, number
        )
        part = _KONIQ_SETS.get(row.get("set") or "")
        yield Opinion(
            str(images / _text(path, number, row, "image_name")), mos, std, part, "koniq", number
        )


def _spaq(root: Path) -> Iterator[Opinion]:
    """SPAQ: MOS from 0 to 100, without deviations."""
    path = _find(
        root,
        "spaq",
        *(
            f"{folder}MOS and Image attribute scores{kind}"
            for folder in ("Annotations/", "annotations/", "")
            for kind in (".xlsx", ".csv")
        ),
    )
    images = _find(root, "spaq", "TestImage", "img", "images")
    for number, row in _table(path, "Image name", "MOS"):
        name = _text(path, number, row, "Image name")
        yield Opinion(
            str(images / name), _number(path, number, row, "MOS"), None, None, "spaq", number
        )


def _kadid(root: Path) -> Iterator[Opinion]:
    """KADID-10k: `dmos` from 1 to 5, of which more is better in spite of its name, and its
    variance.
    """
    path, images = _find(root, "kadid", "dmos.csv"), _find(root, "kadid", "images")
    for number, row in _csv(path):
        mos = _number(path, number, row, "dmos")
        variance = _number(path, number, row, "var")
        if variance < 0:
            raise ValueError(
                f"{path}: row {number}: expected a 'var' of at least 0, got {variance:g}."
            )
        std = math.sqrt(variance)
        image = str(images / _text(path, number, row, "dist_img"))
        yield Opinion(image, mos, std, None, "kadid", number, reference=row.get("ref_img"))


def _livec(root: Path) -> Iterator[Opinion]:
    """LIVE-Challenge: MOS from 0 to 100 with deviations; the seven images that trained people are
    left out.
    """
    try:
        from scipy.io import loadmat
    except ImportError:
        raise ValueError("livec needs scipy: pip install 'owl2_hf[scoring]'.") from None
    images = _find(root, "livec", "Images")
    columns = []
    for name in ("AllImages_release", "AllMOS_release", "AllStdDev_release"):
        path = _find(root, "livec", f"Data/{name}.mat")
        try:
            columns.append(loadmat(path)[name].ravel())
        except Exception as error:  # damaged files raise almost any error
            raise ValueError(
                f"{path} is not a MATLAB file with {name} ({type(error).__name__})."
            ) from None
    for number, (image, mos, std) in enumerate(zip(*columns, strict=True), 1):
        name = str(image.ravel()[0]) if hasattr(image, "ravel") else str(image)
        if not re.match(r"t\d+\.", name):
            yield Opinion(str(images / name), float(mos), float(std), None, "livec", number)


def _agiqa(root: Path) -> Iterator[Opinion]:
    """AGIQA-3K: quality from 0 to 5 with deviations; how well an image fits its prompt is not
    read.
    """
    path = _find(root, "agiqa", "data.csv")
    images = _find(root, "agiqa", "images", "AGIQA-3K", ".")
    for number, row in _csv(path):
        mos, std = (
            _number(path, number, row, "mos_quality"),
            _number(path, number, row, "std_quality"),
        )
        yield Opinion(
            str(images / _text(path, number, row, "name")), mos, std, None, "agiqa", number
        )


def _csiq(root: Path) -> Iterator[Opinion]:
    """CSIQ: 1 - DMOS, from 0 to 1, with deviations."""
    path = _find(root, "csiq", "csiq.DMOS.xlsx", "csiq.DMOS.csv")
    images = _find(root, "csiq", "dst_imgs", "dst_imgs_all")
    for number, row in _table(path, "image", "dst_type", "dst_lev", "dmos_std", "dmos"):
        kind = re.sub(r"\s", "", _text(path, number, row, "dst_type")).lower()
        if kind not in _CSIQ:
            raise ValueError(
                f"{path}: row {number}: expected a dst_type of {', '.join(_CSIQ)}, got {kind!r}."
            )
        folder, part = _CSIQ[kind]
        source = _text(path, number, row, "image").removesuffix(".0")
        name = f"{source}.{part}.{int(_number(path, number, row, 'dst_lev'))}.png"
        image = images / folder / name if (images / folder).is_dir() else images / name
        mos, std = 1 - _number(path, number, row, "dmos"), _number(path, number, row, "dmos_std")
        yield Opinion(str(image), mos, std, None, "csiq", number, reference=source)


def _ava(root: Path) -> Iterator[Opinion]:
    """AVA: mean and deviation of the counts of 1 to 10."""
    path, images = _find(root, "ava", "AVA.txt"), _find(root, "ava", "images", "image")
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            values = line.split()
            if not values:
                continue
            if len(values) < 12 or not all(value.isdigit() for value in values[:12]):
                raise ValueError(
                    f"{path}: row {number}: expected an index, an image and ten counts, got "
                    f"{line[:60]!r}."
                )
            mos, std = _of_counts([float(value) for value in values[2:12]], path, number)
            yield Opinion(str(images / f"{values[1]}.jpg"), mos, std, None, "ava", number)


def _lsvq(root: Path) -> Iterator[Opinion]:
    """LSVQ: videos with a MOS from 0 to 100; parts train, test and test-1080p."""
    tables = {
        "train": "LSVQ_whole_train.csv",
        "test": "LSVQ_whole_test.csv",
        "test-1080p": "LSVQ_whole_test_1080p.csv",
    }
    found = {part: root / name for part, name in tables.items() if (root / name).is_file()}
    if not found:  # the variance, as its authors publish it
        found = {"": _find(root, "lsvq", "labels_train_test.csv", *tables.values())}
        if (root / "labels_test_1080p.csv").is_file():
            found["test-1080p"] = root / "labels_test_1080p.csv"
    for part, path in found.items():
        for number, row in _csv(path):
            name = _text(path, number, row, "name")
            video = root / (name if name.endswith(".mp4") else f"{name}.mp4")
            own = part or (
                "test" if row.get("is_test", "").lower() in ("true", "1", "1.0") else "train"
            )
            yield Opinion(str(video), _number(path, number, row, "mos"), None, own, "lsvq", number)


BENCHMARKS: dict[str, Callable[[Path], Iterable[Opinion]]] = {
    "koniq": _koniq,
    "spaq": _spaq,
    "kadid": _kadid,
    "livec": _livec,
    "agiqa": _agiqa,
    "csiq": _csiq,
    "ava": _ava,
    "lsvq": _lsvq,
}
_LAYOUTS = {
    "koniq": "expected koniq10k_distributions_sets.csv or koniq10k_scores_and_distributions.csv, and 1024x768/ or "
    "512x384/.",
    "spaq": "expected Annotations/MOS and Image attribute scores.xlsx (or .csv), and TestImage/.",
    "kadid": "expected dmos.csv and images/.",
    "livec": "expected Data/AllImages_release.mat, AllMOS_release.mat and AllStdDev_release.mat there, and Images/.",
    "agiqa": "expected data.csv, and the images beside it or in images/.",
    "csiq": "expected csiq.DMOS.xlsx, and dst_imgs/ with a folder of each distortion, or dst_imgs_all/.",
    "ava": "expected AVA.txt and images/ with NUMBER.jpg.",
    "lsvq": "expected LSVQ_whole_train.csv, LSVQ_whole_test.csv, LSVQ_whole_test_1080p.csv or labels_train_test.csv, "
    "and the videos beside them.",
}


def _find(root: Path, name: str, *choices: str) -> Path:
    """The first of some files or folders that is there."""
    for choice in choices:
        if (root / choice).exists():
            return root / choice
    raise ValueError(f"{name}: {choices[0]} does not exist in {root}; {_LAYOUTS[name]}")


def _csv(path: Path) -> Iterator[tuple[int, Row]]:
    """Line and row of each record."""
    with open_csv(path) as file:
        reader = csv.DictReader(file)
        for row in reader:
            yield (
                reader.line_num,
                {str(key).strip(): str(value).strip() for key, value in row.items()},
            )


def _table(path: Path, *names: str) -> Iterator[tuple[int, Row]]:
    """Rows of a CSV, or of the first sheet of a workbook that has a row with these names."""
    if path.suffix.lower() == ".csv":
        yield from _csv(path)
        return
    try:
        with zipfile.ZipFile(path) as archive:
            sheets = list(_sheets(archive))
    except (
        zipfile.BadZipFile,
        KeyError,
        IndexError,
        ValueError,
        ElementTree.ParseError,
        OSError,
    ) as error:
        raise ValueError(
            f"{path} is not a readable Excel workbook ({type(error).__name__})."
        ) from None
    for rows in sheets:
        for place, (_, head) in enumerate(rows):
            if set(names) <= set(head.values()):
                for number, cells in rows[place + 1 :]:
                    row = {title: cells.get(column, "") for column, title in head.items()}
                    if row[names[0]] != "":
                        yield number, row
                return
    raise ValueError(f"{path}: expected the columns {' and '.join(names)} in a sheet, got none.")


def _sheets(archive: zipfile.ZipFile) -> Iterator[list[tuple[int, dict[str, str]]]]:
    """Rows of each sheet: number, and text of each cell by its column."""
    shared: list[str] = []
    if sum(entry.file_size for entry in archive.infolist()) > _MAX_BYTES:
        raise ValueError("too large")
    if "xl/sharedStrings.xml" in archive.namelist():
        items = ElementTree.fromstring(archive.read("xl/sharedStrings.xml")).findall(f"{_SHEET}si")
        shared = ["".join(text.text or "" for text in item.iter(f"{_SHEET}t")) for item in items]
    for name in sorted(
        name for name in archive.namelist() if re.fullmatch(r"xl/worksheets/[^/]+\.xml", name)
    ):
        rows = []
        for index, row in enumerate(
            ElementTree.fromstring(archive.read(name)).iter(f"{_SHEET}row"), 1
        ):
            cells = {}
            for cell in row.findall(f"{_SHEET}c"):
                value = "".join(text.text or "" for text in cell.iter(f"{_SHEET}v"))
                if cell.get("t") == "s" and value:
                    value = shared[int(value)]
                elif cell.get("t") == "inlineStr":
                    value = "".join(text.text or "" for text in cell.iter(f"{_SHEET}t"))
                cells[re.sub(r"\d", "", cell.get("r") or "")] = value.strip()
            rows.append((int(row.get("r") or index), cells))
        yield rows


def _text(path: Path, number: int, row: Row, name: str) -> str:
    if not row.get(name):
        raise ValueError(
            f"{path}: row {number}: expected a value of {name!r}, got columns: {', '.join(row)}."
        )
    return row[name]


def _number(path: Path, number: int, row: Row, name: str) -> float:
    text = _text(path, number, row, name)
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{path}: row {number}: expected a number as {name!r}, got {text!r}.")
    return value


def _of_counts(counts: list[float], path: Path, number: int) -> tuple[float, float]:
    """Mean and standard deviation of votes for 1, 2, and so on."""
    total = sum(counts)
    if not total > 0:
        raise ValueError(
            f"{path}: row {number}: expected counts that sum to more than 0, got {counts}."
        )
    mean = sum(value * count for value, count in enumerate(counts, 1)) / total
    return mean, math.sqrt(
        sum(count * (value - mean) ** 2 for value, count in enumerate(counts, 1)) / total
    )
