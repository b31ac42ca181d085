"""One model for all visitors of the page: it answers, scores and analyses, one thing after the
other.
"""

import io
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty
from typing import Any

import torch
from PIL import Image
from transformers import TextIteratorStreamer

from ..analysis import analyze
from ..conversation import with_images
from ..limits import Context, open_pictures
from ..modeling import MplugOwl2ForConditionalGeneration
from ..processing.image_processing_mplug_owl2 import MAX_IMAGE_PIXELS
from ..processing.processing_mplug_owl2 import MplugOwl2Processor
from ..scoring import Preset, Score, Scorer

MAX_ANALYZED_TOKENS = 64
POLL_SECONDS = 0.25  # how often to check that the visitor is still connected


@dataclass(frozen=True)
class DemoSettings:
    """Limits of the page.

    Args:
        max_image_pixels: Pixels of all images of one chat, or analysis, together; of one image that
            is scored.
        max_new_tokens: Longest answer, in tokens; visitors may ask for less.
    """

    max_image_pixels: int = MAX_IMAGE_PIXELS
    max_new_tokens: int = 1024

    def __post_init__(self) -> None:
        for name in ("max_image_pixels", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")


class ModelWorker:
    """A model, its processor and the limits that hold for everybody.

    Args:
        model: An `MplugOwl2ForConditionalGeneration`, on the device where it is to run.
        processor: Its processor.
        name: What the page calls it.

    Raises:
        ValueError: If it is another family's model.
    """

    def __init__(
        self,
        model: MplugOwl2ForConditionalGeneration,
        processor: MplugOwl2Processor,
        name: str,
        settings: DemoSettings | None = None,
    ) -> None:
        if not isinstance(model, MplugOwl2ForConditionalGeneration):
            raise ValueError(
                f"{name}: expected an MplugOwl2ForConditionalGeneration, got "
                f"{type(model).__name__}."
            )
        self.model, self.processor, self.name, self.settings = (
            model,
            processor,
            name,
            settings or DemoSettings(),
        )
        self.context = Context(model, processor)
        # An analysis changes the model while it runs, so nothing else may run then.
        self._turn = threading.Lock()
        self._is_closed = threading.Event()

    def answer(
        self,
        messages: Sequence[dict[str, Any]],
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
    ) -> Iterator[str]:
        """The answer so far, again and again while it grows; closing the iterator ends the
        generation.

        Args:
            messages: As `to_messages` makes them.
            max_new_tokens: Longest answer, as far as settings and context allow.
            temperature: 0 for the likeliest token every time.
            top_p: Share of the probability that tokens are sampled from.

        Raises:
            ValueError: If an image cannot be used, or the messages are too long.
        """
        inputs = self._prepare(messages)
        room = self.context.room(inputs["input_ids"].shape[1])
        sampling = (
            {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {}
        )
        options: dict[str, Any] = {"do_sample": False, **sampling, "num_beams": 1}
        options["max_new_tokens"] = min(max_new_tokens, self.settings.max_new_tokens, room)
        is_left = threading.Event()
        streamer = TextIteratorStreamer(
            self.processor.tokenizer,
            skip_prompt=True,
            timeout=POLL_SECONDS,
            skip_special_tokens=True,
        )
        failures: list[Exception] = []

        def stops(input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            return torch.full((len(input_ids),), self._ends(is_left), device=input_ids.device)

        def generate() -> None:
            try:
                with self._turn:
                    if not self._ends(is_left):
                        self.model.generate(
                            **inputs, **options, streamer=streamer, stopping_criteria=[stops]
                        )
            except Exception as error:
                failures.append(error)
            finally:
                streamer.text_queue.put(streamer.stop_signal)

        threading.Thread(target=generate, daemon=True).start()
        try:
            yield from _growing(streamer)
        finally:
            is_left.set()
        if failures:
            raise failures[0]

    def score(
        self,
        paths: Sequence[str],
        preset: Preset,
        task: str,
        scale: tuple[float, float] | None = None,
    ) -> Iterator[tuple[str, Score | ValueError]]:
        """Name and score of each image, or what is wrong with it.

        Args:
            scale: Lowest and highest score, where not the preset's.

        Raises:
            ValueError: If a level is not one token of the model's vocabulary, or the preset has no
                such task.
        """
        scorer = Scorer(self.model, self.processor, preset, scale, batch_size=1)
        for path in paths:
            found: Score | ValueError
            try:
                pictures = self._open([path])
                with self._turn:
                    found = scorer(pictures, task)[0]
            except ValueError as error:
                found = error
            yield Path(path).name, found

    def analyze(
        self, paths: Sequence[str], question: str
    ) -> tuple[list[str], dict[str, Image.Image]]:
        """What the model attends to, as `owl2-hf analyze` finds it.

        Args:
            paths: The image, and one that has nothing to do with the question, if that is to be
                compared.

        Returns:
            Lines of a summary, and figures by name.

        Raises:
            ValueError: If there are more or fewer images, one cannot be used, or there is no
                question.
        """
        if len(paths) not in (1, 2):
            raise ValueError(
                f"expected one image and at most one unrelated image, got {len(paths)}."
            )
        if not question.strip():
            raise ValueError("the question is empty: write one about the image.")
        self.context.check(len(paths[:1]), len(question))
        given, *unrelated = self._open(paths)
        from ..analysis.plots import draw

        with self._turn:
            found = analyze(
                self.model,
                self.processor,
                given,
                question,
                unrelated=unrelated[0] if unrelated else None,
                max_new_tokens=min(MAX_ANALYZED_TOKENS, self.settings.max_new_tokens),
                name=self.name,
            )
            return found.summary(), {
                Path(file).stem: _image(figure) for file, figure in draw(found).items()
            }

    def close(self, seconds: float) -> bool:
        """End answers under way; `False` if the model is still at work when the time is over."""
        self._is_closed.set()
        return self._turn.acquire(timeout=seconds)

    def _ends(self, is_left: threading.Event) -> bool:
        return is_left.is_set() or self._is_closed.is_set()

    def _open(self, paths: Sequence[str]) -> list[Image.Image]:
        try:
            files = [Path(path).read_bytes() for path in paths]
        except OSError:
            raise ValueError(
                "an uploaded image no longer exists: start a new chat and upload it again."
            ) from None
        return open_pictures(
            files, self.settings.max_image_pixels, [Path(path).name for path in paths]
        )

    def _prepare(self, messages: Sequence[dict[str, Any]]) -> Any:
        """The model's inputs."""
        parts = [part for message in messages for part in message["content"]]
        paths = [part["image"] for part in parts if part["type"] == "image"]
        self.context.check(
            len(paths), sum(len(part["text"]) for part in parts if part["type"] == "text")
        )
        inputs = self.processor.apply_chat_template(
            with_images(messages, self._open(paths)),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        return inputs.to(self.model.device)


def _growing(streamer: TextIteratorStreamer) -> Iterator[str]:
    """The text so far, at least every `POLL_SECONDS`: only between two of them can a visitor be
    told to have gone.
    """
    text = ""
    while True:
        try:
            text += next(streamer)
        except StopIteration:
            return
        except Empty:
            pass
        yield text


def _image(figure: Any) -> Image.Image:
    """A figure of matplotlib as an image."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return Image.open(file)
