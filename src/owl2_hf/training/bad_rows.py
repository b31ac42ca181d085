"""Find the rows that training cannot use."""

from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from PIL import Image
from torch.utils.data import DataLoader, Dataset, Subset

from ..processing.image_processing_mplug_owl2 import FORMATS, MAX_IMAGE_PIXELS, open_image
from .messages import pictures_of, to_messages

ROWS_OF_A_WORKER = 256


@dataclass
class BadRow:
    """A row that cannot be learned from: its number, counted from 1 (of a file of lines the line),
    its id and why.
    """

    row: int
    id: str | None
    reason: str


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
                open_all(messages)
            for picture in pictures_of(messages):
                _look_at(picture)
        except (ValueError, OSError) as error:
            return bad_row(self.rows.number_of(index), row, error)
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
        except Exception:  # damaged files raise almost any error; it is reported below
            pass
    open_image(picture)


def bad_row(number: int, row: Any, error: Exception) -> BadRow:
    identity = row.get("id") if isinstance(row, Mapping) else None
    return BadRow(number, None if identity is None else str(identity), str(error))


def open_all(messages: list[dict[str, Any]]) -> None:
    for picture in pictures_of(messages):
        if isinstance(picture, Image.Image):
            picture.load()
        else:
            open_image(picture)
