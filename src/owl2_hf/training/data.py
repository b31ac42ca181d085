"""Load rows of training data from a file, a folder, the Hub or memory, and check them."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.utils.data import IterableDataset

from ..processing.processing_mplug_owl2 import MplugOwl2Processor
from .bad_rows import BadRow, bad_row, look_over, open_all
from .messages import pictures_of, to_messages
from .rows import JsonLines, Rows, RowStream, read_rows, with_place


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
        raise ValueError(f"the image folder {str(image_folder)!r} does not exist.")
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
    # A stream of `datasets` splits itself between workers.
    if isinstance(rows, IterableDataset) and hasattr(rows, "map"):
        return rows if place is None else rows.map(with_place, fn_kwargs={"place": place})
    if streaming or not hasattr(rows, "__getitem__"):
        return RowStream(rows, place, name, skip_bad)
    if not len(rows):
        raise ValueError(
            f"{source if isinstance(source, (str, Path)) else 'the data set'} has no rows."
        )
    return Rows(rows, place, name, skip_bad)


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
        raise ValueError(f"{str(source)!r} does not exist.")
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
                f"tokens per row: longest {self.tokens_longest:,}, mean {self.tokens_mean:,.1f}"
            )
        if self.truncated is not None:
            lines.append(
                f"{self.truncated:,} rows would be truncated, {self.without_labels:,} of them "
                "without a label left"
            )
        return "\n".join(lines)


def check_rows(
    source: Any,
    image_folder: str | Path | None = None,
    processor: MplugOwl2Processor | None = None,
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
                open_all(messages)
            report.add(messages)
        except (ValueError, OSError) as error:
            report.bad.append(bad_row(number, row, error))
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


def _numbered(rows: Any) -> Iterator[tuple[int, Any]]:
    """Number, counted from 1, and row, or the error that reading it gives."""
    content = getattr(rows, "rows", rows)
    if isinstance(content, JsonLines):
        for number, row in content.numbered():
            yield number, with_place(row, rows.place)  # type: ignore[arg-type]
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
