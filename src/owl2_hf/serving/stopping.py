"""Stop strings: end an answer before a given string, also in a streamed answer."""

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Any


def find_stop(text: str, stops: Sequence[str]) -> int:
    """Where the first stop string begins; the length of the text where there is none."""
    return min((start for stop in stops if (start := text.find(stop)) >= 0), default=len(text))


def num_withheld(text: str, stops: Sequence[str]) -> int:
    """Characters at the end of a text that could be the beginning of a stop string."""
    lengths = (
        length for stop in stops for length in range(1, len(stop)) if text.endswith(stop[:length])
    )
    return max(lengths, default=0)


class StopFilter:
    """A queue of pieces of text and, at the end, other items; without the first stop string and
    what follows it.
    """

    def __init__(self, queue: asyncio.Queue[Any], stops: Sequence[str]) -> None:
        self.queue, self.stops = queue, stops
        self.withheld, self.has_stopped = "", False
        self.ready: deque[Any] = deque()

    async def get(self) -> Any:
        while not self.ready:
            self._take(await self.queue.get())
        return self.ready.popleft()

    def get_nowait(self) -> Any:
        while not self.ready:
            self._take(self.queue.get_nowait())
        return self.ready.popleft()

    def _take(self, item: Any) -> None:
        if not isinstance(item, str):
            self.ready.extend([self.withheld, item] if self.withheld else [item])
            return
        if self.has_stopped:
            return
        text = self.withheld + item
        end = find_stop(text, self.stops)
        self.has_stopped = end < len(text)
        if not self.has_stopped:
            end -= num_withheld(text, self.stops)
        self.withheld = "" if self.has_stopped else text[end:]
        if end:
            self.ready.append(text[:end])
