"""Make batches of rows of training data.

B: rows, L: positions of the longest row, S: side of an image's square.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import get_worker_info
from transformers.utils import logging

from ..processing.processing_mplug_owl2 import MplugOwl2Processor
from .image_cache import ImageCache
from .messages import ORIGIN, pictures_of, to_messages

logger = logging.get_logger(__name__)

IGNORED = -100
COUNTS = ("rows", "truncated", "without_labels", "skipped")
MAX_WORKERS = 256


class Collator:
    """Makes a batch of rows in any format of `to_messages`.

    Labels are the tokens that the chat template marks as generated: the answers with the `</s>`
    behind each. A row is truncated at its end, after its images took their positions; an image that
    does not fit as a whole is dropped, with all that follows it. A row without a label stays in the
    batch and adds nothing to the loss.

    Args:
        max_length: Most positions of a row; rows stay whole if not given.
        image_folder: What relative paths of images start from; the rows' own `image_folder` if not
            given.
        padding_side: "right" or "left".
        pad_to_multiple_of: L is a multiple of it.
        name_rows: The batch also holds "rows", what to call each row in an error: `Owl2Trainer`
            takes it out again.
        skip_bad: Leave out rows that cannot be learned from, count them, and warn about each. A
            batch of such rows alone is one row without a label.
        image_cache: Folder of an `ImageCache`, which keeps prepared images.

    Raises:
        ValueError: If a row cannot be learned from, and should not be left out. The message names
            it.
    """

    def __init__(
        self,
        processor: MplugOwl2Processor,
        max_length: int | None = None,
        image_folder: str | Path | None = None,
        padding_side: str = "right",
        pad_to_multiple_of: int | None = None,
        name_rows: bool = False,
        skip_bad: bool = False,
        image_cache: str | Path | None = None,
    ):
        if padding_side not in ("right", "left"):
            raise ValueError(f"padding_side must be 'right' or 'left', got {padding_side!r}.")
        for name, value in (("max_length", max_length), ("pad_to_multiple_of", pad_to_multiple_of)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        self.processor = processor
        self.max_length = max_length
        self.image_folder = image_folder
        self.padding_side = padding_side
        self.pad_to_multiple_of = pad_to_multiple_of
        self.name_rows = name_rows
        self.skip_bad = skip_bad
        self._cache = (
            None if image_cache is None else ImageCache(image_cache, processor.image_processor)
        )
        # Each DataLoader worker writes into its own row; row 0 is for the main process.
        self._counts = torch.zeros(MAX_WORKERS, len(COUNTS), dtype=torch.long).share_memory_()

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Rows (B) -> `input_ids`, `attention_mask`, `mm_token_type_ids` and `labels` (B, L).

        With images also `pixel_values` (squares, 3, S, S).
        """
        encoded = [self.truncate(row) for row in self.encode(rows)] or [self._nothing()]
        width = max(map(len, encoded))
        width += -width % (self.pad_to_multiple_of or 1)
        input_ids = [row.input_ids for row in encoded]
        batch: dict[str, Any] = {
            "input_ids": self._pad(input_ids, width, self.processor.tokenizer.pad_token_id or 0),
            "attention_mask": self._pad(map(torch.ones_like, input_ids), width, 0),
            "labels": self._pad([row.labels for row in encoded], width, IGNORED),
        }
        batch["mm_token_type_ids"] = batch["input_ids"].eq(self.processor.image_token_id).long()
        if squares := [square for row in encoded for square in row.squares]:
            batch["pixel_values"] = torch.from_numpy(np.stack(squares))
        if self.name_rows:
            batch["rows"] = [_name(row, number) for number, row in enumerate(rows, 1)]
        return batch

    @property
    def counts(self) -> dict[str, int]:
        """Rows so far, in all workers: learned from, truncated, without a label, and left out."""
        return dict(zip(COUNTS, self._counts.sum(0).tolist(), strict=True))

    def count_skipped(self, number: int) -> None:
        """Count rows that were left out before they came here."""
        self._count(skipped=number)

    def encode(self, rows: Sequence[dict[str, Any]]) -> list["EncodedRow"]:
        """Rows before truncation, without bad ones if these are skipped."""
        try:
            return self._encode(rows)
        except (ValueError, OSError):
            if not self.skip_bad:
                raise
        encoded = []
        for row in rows:
            try:
                encoded += self._encode([row])
            except (ValueError, OSError) as error:
                logger.warning(f"{error} The row is skipped.")
                self._count(skipped=1)
        return encoded

    def _encode(self, rows: Sequence[dict[str, Any]]) -> list["EncodedRow"]:
        """Rows whose images are processed in one call."""
        chats, crops = [], []
        for number, row in enumerate(rows, 1):
            with _naming(_place(row, number)):
                chat = self._open(to_messages(row, self.image_folder))
                chats.append(chat)
                crops.append(self._count_crops(chat))
        with _naming("rows " + ", ".join(_name(row, number) for number, row in enumerate(rows, 1))):
            # Before truncation, rows may be longer than the context.
            batch = self.processor.apply_chat_template(
                chats,
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
                processor_kwargs={
                    "padding": False,
                    "verbose": False,
                },
            )
        squares = iter(batch.get("pixel_values", ()))
        return [
            self._to_row(ids, mask, own, list(itertools.islice(squares, sum(own))))
            for ids, mask, own in zip(
                batch["input_ids"], batch["assistant_masks"], crops, strict=True
            )
        ]

    def truncate(self, row: "EncodedRow") -> "EncodedRow":
        """At most `max_length` positions, with whole images only; counts what becomes of the
        row.
        """
        length, num_squares = self._fitting(row)
        kept = EncodedRow(
            row.input_ids[:length], row.labels[:length], row.crops, row.squares[:num_squares]
        )
        # The first position is never predicted.
        is_unlabelled = bool(kept.labels[1:].eq(IGNORED).all())
        self._count(rows=1, truncated=len(kept) < len(row), without_labels=is_unlabelled)
        return kept

    def _count(self, **outcome: int) -> None:
        worker = get_worker_info()
        line = worker.id % (MAX_WORKERS - 1) + 1 if worker else 0
        self._counts[line] += torch.tensor([int(outcome.get(name, 0)) for name in COUNTS])

    def _nothing(self) -> "EncodedRow":
        """What stands for a batch without a row: two positions, nothing to learn."""
        input_ids = torch.full((2,), self.processor.tokenizer.pad_token_id or 0)
        return EncodedRow(input_ids, torch.full_like(input_ids, IGNORED), [], [])

    def _fitting(self, row: "EncodedRow") -> tuple[int, int]:
        """Positions and squares that `max_length` leaves."""
        length = len(row) if self.max_length is None else min(len(row), self.max_length)
        positions = row.input_ids.eq(self.processor.image_token_id).nonzero().flatten().tolist()
        num_squares = 0
        for num in row.crops:
            first, last = (
                count * self.processor.num_image_tokens
                for count in (num_squares, num_squares + num)
            )
            if positions[last - 1] >= length:
                return min(length, positions[first]), num_squares
            num_squares += num
        return length, num_squares

    def _open(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The messages with their images opened, so that an error names its row and sizes are
        known.
        """
        fetch = (self._cache or self.processor.image_processor).fetch_images
        return [
            {
                **message,
                "content": [
                    {**part, kind: fetch(part[kind])} if (kind := part["type"]) != "text" else part
                    for part in message["content"]
                ],
            }
            for message in messages
        ]

    def _count_crops(self, messages: list[dict[str, Any]]) -> list[int]:
        sizes = [(picture.height, picture.width) for picture in pictures_of(messages)]
        return [self.processor.image_processor.num_crops(*size) for size in sizes]

    def _to_row(
        self, ids: list[int], mask: list[int], crops: list[int], squares: list[np.ndarray]
    ) -> "EncodedRow":
        input_ids, is_label = torch.tensor(ids), torch.tensor(mask, dtype=torch.bool)
        is_label &= input_ids.ne(self.processor.image_token_id)
        return EncodedRow(input_ids, input_ids.masked_fill(~is_label, IGNORED), crops, squares)

    def _pad(self, rows: Iterable[Tensor], width: int, value: int) -> Tensor:
        """Rows of any length -> (B, width)."""
        missing = [(width - len(row), row) for row in rows]
        is_right = self.padding_side == "right"
        return torch.stack(
            [F.pad(row, (0, n) if is_right else (n, 0), value=value) for n, row in missing]
        )


@dataclass
class EncodedRow:
    """A row of L positions: `input_ids` and `labels` (L,), squares of each image, and all squares
    (3, S, S).
    """

    input_ids: Tensor
    labels: Tensor
    crops: list[int]
    squares: list[np.ndarray]

    def __len__(self) -> int:
        return len(self.input_ids)


def _name(row: Any, number: int) -> str:
    identity = row.get("id") if isinstance(row, dict) else None
    return f"number {number} of the batch" if identity is None else repr(identity)


def _place(row: Any, number: int) -> str:
    """Where a row stands, in a message about it."""
    if not isinstance(row, dict) or ORIGIN not in row:
        return f"row {_name(row, number)}"
    return row[ORIGIN] if row.get("id") is None else f"{row[ORIGIN]} (id {row['id']!r})"


@contextmanager
def _naming(name: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError) as error:
        raise ValueError(f"{name}: {error}") from error


__all__ = ["Collator", "EncodedRow"]
