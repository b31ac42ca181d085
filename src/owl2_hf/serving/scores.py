"""`POST /v1/score`: score images. Waiting images of all requests are batched together."""

import asyncio
import json
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from fastapi import HTTPException, Request
from starlette.datastructures import UploadFile
from transformers import BatchFeature
from transformers.cli.serving.utils import GenerateManager
from transformers.utils import logging

from ..limits import open_pictures
from ..scoring import Preset, Score, Scorer, custom_preset
from .pictures import is_http, read_pictures
from .requests import MAX_IMAGES, MAX_LEVELS, ScoreOptions, ScoreRequest, parse
from .threads import in_thread

logger = logging.get_logger(__name__)

FAILED = "scoring failed; the server's log says why."
FILE_FIELDS = ("images", "image")
JSON_EXPECTED = (
    "expected a JSON object with Content-Type: application/json, or multipart/form-data."
)


@dataclass(eq=False)
class _Waiting:
    """An image that was read and made ready."""

    scorer: Scorer
    task: str
    inputs: BatchFeature
    future: "Future[Score]" = field(default_factory=Future)

    def goes_with(self, other: "_Waiting") -> bool:
        return self.task == other.task and self.scorer.preset == other.scorer.preset


class Batcher:
    """Scores on the model's thread, in forward passes of at most `batch_size` images.

    Whatever has come in by the time that the model is free makes the next batch; nothing waits for
    more to come.
    """

    def __init__(self, generator: GenerateManager, batch_size: int) -> None:
        self.generator, self.batch_size = generator, batch_size
        self._waiting: deque[_Waiting] = deque()
        self._lock = threading.Lock()

    def submit(self, scorer: Scorer, task: str, inputs: BatchFeature) -> "asyncio.Future[Score]":
        """The score of one image, once the model is free; not computed if the future is cancelled
        before.

        Args:
            inputs: What `scorer.prepare` made of the image.
        """
        one = _Waiting(scorer, task, inputs)
        with self._lock:
            self._waiting.append(one)
        self.generator.submit(self._run)
        future = asyncio.wrap_future(one.future)
        future.add_done_callback(lambda done: self._forget(one) if done.cancelled() else None)
        return future

    def _run(self) -> None:
        """One forward pass, for those that wait longest; of as many calls as images the last find
        none left.
        """
        batch = self._take()
        if not batch:
            return
        try:
            inputs = {
                name: torch.cat([one.inputs[name] for one in batch]) for name in batch[0].inputs
            }
            scores = batch[0].scorer.score_prepared(inputs)
        except Exception as error:
            logger.error("scoring failed", exc_info=error)
            for one in batch:
                one.future.set_exception(RuntimeError(FAILED))
            return
        for one, score in zip(batch, scores, strict=True):
            one.future.set_result(score)

    def _take(self) -> list[_Waiting]:
        with self._lock:
            first = self._waiting[0] if self._waiting else None
            batch = [one for one in self._waiting if first is not None and one.goes_with(first)]
            batch = batch[: self.batch_size]
            for one in batch:
                self._waiting.remove(one)
        return [one for one in batch if one.future.set_running_or_notify_cancel()]

    def _forget(self, one: _Waiting) -> None:
        with self._lock:
            if one in self._waiting:
                self._waiting.remove(one)


class ScoreHandler:
    """Answers `POST /v1/score` with the model of the chat handler.

    Args:
        chat: The `ChatHandler`, whose limits, locks and thread count for both.
        preset: Of requests that name none.
    """

    def __init__(self, chat: Any, preset: Preset) -> None:
        self.chat, self.preset = chat, preset
        batch_size = chat.settings.batch_size
        self.batcher = Batcher(chat.generator, batch_size)
        # Limits the prepared images in memory to two batches: one in the model, and the next.
        self.room = asyncio.Semaphore(2 * batch_size)

    async def handle_request(self, request: Request) -> dict[str, Any]:
        """The answer; `HTTPException` where there is none."""
        try:
            options, files = await self._read(request)
            self.chat.check_name(options.model)
            async with self.chat.turn:  # threads share the tokenizer's padding settings
                scorer = await in_thread(self._scorer, options)
            scores = await self._score(scorer, options.task, files)
        except ValueError as error:
            raise HTTPException(400, str(error)) from None
        return {
            "object": "list",
            "model": self.chat.name,
            "task": options.task,
            "scale": list(scorer.preset.scale),
            "levels": list(scorer.levels),
            "data": [
                {
                    "object": "score",
                    "index": index,
                    "score": found.score,
                    "std": found.std,
                    "probs": list(found.probs),
                }
                for index, found in enumerate(scores)
            ],
        }

    async def _read(self, request: Request) -> tuple[ScoreOptions, list[bytes]]:
        """What is asked, and the files of the images."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind == "multipart/form-data":
            return await _read_form(request)
        if kind != "application/json":
            raise ValueError(JSON_EXPECTED)
        try:
            body = json.loads(await request.body())
        except (ValueError, RecursionError):
            raise ValueError(JSON_EXPECTED) from None
        asked = parse(ScoreRequest, body)
        async with self.chat.downloads if any(map(is_http, asked.images)) else nullcontext():
            files = await in_thread(
                read_pictures, asked.images, self.chat.settings.allow_image_urls
            )
        return asked, files

    def _scorer(self, options: ScoreOptions) -> Scorer:
        """Who scores."""
        if options.task == "video":
            raise ValueError(
                "task: expected a task for images; score the frames of a video as images."
            )
        preset = custom_preset(options.preset or self.preset, levels=options.levels)
        try:
            return Scorer(self.chat.model, self.chat.processor, preset)
        except ValueError as error:  # this model's vocabulary lacks a word
            raise ValueError(f"levels: {error}") from None

    async def _score(self, scorer: Scorer, task: str, files: Sequence[bytes]) -> list[Score]:
        """The scores of a request's images, which are read one by one while earlier ones are in the
        model.
        """
        left, futures = self.chat.settings.max_image_pixels, []
        try:
            for index, file in enumerate(files, start=1):
                await self.room.acquire()
                try:
                    async with self.chat.turn:
                        inputs, num_pixels = await in_thread(
                            _prepare, scorer, task, file, left, f"image {index} of {len(files)}"
                        )
                except BaseException:
                    self.room.release()
                    raise
                left -= num_pixels
                futures.append(self.batcher.submit(scorer, task, inputs))
                futures[-1].add_done_callback(self._leave)
            return list(await asyncio.gather(*futures))
        finally:
            for future in futures:
                future.cancel()

    def _leave(self, future: "asyncio.Future[Score]") -> None:
        self.room.release()
        if not future.cancelled():
            future.exception()  # marks it as retrieved, so that asyncio logs nothing


def _prepare(scorer: Scorer, task: str, file: bytes, max_pixels: int, name: str) -> tuple[Any, int]:
    """The model's inputs for one image, and its pixels."""
    [image] = open_pictures([file], max_pixels, [name])
    return scorer.prepare([image], task), image.width * image.height


async def _read_form(request: Request) -> tuple[ScoreOptions, list[bytes]]:
    files: list[bytes] = []
    fields: dict[str, Any] = {}
    async with request.form(max_files=MAX_IMAGES, max_fields=MAX_LEVELS + 3) as form:
        for name, value in form.multi_items():
            if (name in FILE_FIELDS) != isinstance(value, UploadFile):
                expected = "files" if name in FILE_FIELDS else "text"
                raise ValueError(f"{name[:100]!r}: expected {expected}.")
            if isinstance(value, UploadFile):
                files.append(await value.read())
            elif name == "levels":
                fields.setdefault(name, []).append(value)
            else:
                fields[name] = value
    if not files:
        raise ValueError("images: expected at least one file.")
    return parse(ScoreOptions, fields), files
