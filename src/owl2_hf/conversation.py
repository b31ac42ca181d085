"""A conversation with a model about images, turn by turn.

Each image is opened once, when it is added, and encoded once, with the message that it belongs to.
Its features are kept for later turns.
"""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from transformers import TextStreamer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from .limits import Context
from .modeling import MplugOwl2ForConditionalGeneration
from .processing import MplugOwl2Processor

DEFAULT_MAX_NEW_TOKENS = 256  # if the model's generation config sets no limit

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Reply:
    """An answer, and the reason it ended.

    Args:
        ending: "complete", or what cut it off: "length" (`max_new_tokens`), "context" (the context
            is full) or "stopped" (`should_stop`).
    """

    text: str
    ending: Literal["complete", "length", "context", "stopped"]


@dataclass(frozen=True)
class OpenedImage:
    """An opened image and its source: an absolute path or a URL."""

    source: str
    image: Image.Image

    @classmethod
    def open(cls, source: str, processor: MplugOwl2Processor) -> "OpenedImage":
        """Open a path, an http(s) URL or a data URL.

        Raises:
            ValueError: If there is no such file, or it is not an image that the processor takes.
        """
        if source.startswith(("http://", "https://", "data:")):
            return cls(source, processor.image_processor.fetch_images(source))
        path = Path(source).expanduser() if source.startswith("~/") else Path(source)
        return cls(str(path.absolute()), processor.image_processor.fetch_images(path))


class Conversation:
    """Messages, the images in them, and the model that answers.

    Args:
        system: System prompt. It stays when the conversation is cleared.
        max_new_tokens: Longest answer, in tokens. Default: the model's setting, otherwise 256.
        temperature: Sampling temperature. 0 always takes the most likely token.
        top_p: Sample from the most likely tokens whose probabilities sum to this.

    Attributes:
        messages: The conversation so far, as `apply_chat_template` takes it. Images are named by
            path or URL.
        waiting: Images of the next message.
        file: File that the conversation was last saved to or loaded from.

    Raises:
        ValueError: If the model is of another family, or `top_p` would have no effect.
    """

    def __init__(
        self,
        model: MplugOwl2ForConditionalGeneration,
        processor: MplugOwl2Processor,
        system: str | None = None,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
    ) -> None:
        if not isinstance(model, MplugOwl2ForConditionalGeneration):
            got = type(model).__name__
            raise ValueError(f"expected an MplugOwl2ForConditionalGeneration, got a {got}.")
        if top_p != 1 and not temperature:
            raise ValueError(
                f"top_p={top_p} has no effect at temperature 0: set a temperature above 0 too."
            )
        self.model, self.processor, self.system = model, processor, system
        self.context = Context(model, processor)
        self.max_new_tokens = (
            max_new_tokens or model.generation_config.max_new_tokens or DEFAULT_MAX_NEW_TOKENS
        )
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p}
        self._options: dict[str, Any] = {
            **(sampling if temperature else {"do_sample": False}),
            "num_beams": 1,  # beam search cannot stream
        }
        self.clear()

    def clear(self) -> None:
        """Start a new conversation. The system prompt stays."""
        system = {"role": "system", "content": [{"type": "text", "text": self.system}]}
        self.messages: Messages = [system] if self.system else []
        self.waiting: list[OpenedImage] = []
        self.file: Path | None = None
        self._images: list[Image.Image] = []
        self._features: list[Tensor] = []  # (Q + 1, D) of each image, or of each of its crops

    def add_image(self, source: str) -> None:
        """Add an image to the next message.

        Args:
            source: A path, an http(s) URL or a data URL.

        Raises:
            ValueError: If it cannot be opened. The conversation stays as it is.
        """
        self.waiting.append(OpenedImage.open(source, self.processor))

    def ask(
        self,
        question: str,
        show: Callable[[str], None],
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Reply:
        """Answer a message with the waiting images.

        Args:
            show: Called with each new piece of the answer.
            should_stop: Called after each token; `True` stops the answer. The text so far stays in
                the conversation. If there is no text yet, the message is removed, and its images go
                with the next message.

        Raises:
            ValueError: If the conversation is longer than the context. After any error, the
                conversation is as it was before the message.
        """
        images = self.waiting
        self.waiting = []
        try:
            reply = self._ask(question, images, show, should_stop)
        except KeyboardInterrupt:
            self.waiting = images
            raise
        if not reply.text and reply.ending == "stopped":
            self.waiting = images
        return reply

    def _ask(
        self,
        question: str,
        images: list[OpenedImage],
        show: Callable[[str], None],
        should_stop: Callable[[], bool],
    ) -> Reply:
        parts = [{"type": "image", "image": image.source} for image in images]
        asked = {"role": "user", "content": [*parts, {"type": "text", "text": question}]}
        messages = [*self.messages, asked]
        opened = [*self._images, *(image.image for image in images)]
        inputs = self.processor.apply_chat_template(
            with_images(messages, opened),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(self.model.device)
        num_prompt = inputs["input_ids"].shape[1]
        try:
            room = self.context.room(num_prompt)
        except ValueError:
            raise ValueError(
                "the conversation is too long: expected at most "
                f"{self.context.size} tokens, the context of the model, got {num_prompt}. "
                "/clear starts a new conversation."
            ) from None
        features = self._encode(inputs.pop("pixel_values", None))
        if features:
            inputs["mm_encoder_outputs"] = {
                "image": BaseModelOutputWithPooling(pooler_output=features)
            }

        def stops(input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            return torch.full((len(input_ids),), should_stop(), device=input_ids.device)

        streamer = _Streamer(self.processor.tokenizer, show)
        limit = min(self.max_new_tokens, room)
        ids = self.model.generate(
            **inputs,
            **self._options,
            max_new_tokens=limit,
            streamer=streamer,
            stopping_criteria=[stops],
        )[0, num_prompt:]  # (tokens of the answer,)
        reply = Reply(streamer.text.strip(), self._ending(ids, limit, room, should_stop()))
        if reply.text or reply.ending != "stopped":
            answer = {"role": "assistant", "content": [{"type": "text", "text": reply.text}]}
            self.messages = [*messages, answer]
            self._images, self._features = list(map(self._place_holder, opened)), features
        return reply

    def _encode(self, pixel_values: Tensor | None) -> list[Tensor]:
        """The features of all images so far, of which only the new ones are encoded.

        Args:
            pixel_values: (N, 3, H, W), or `None` where there are no images.
        """
        if pixel_values is None or len(pixel_values) == len(self._features):
            return self._features
        with torch.no_grad():
            new = self.model.get_image_features(pixel_values[len(self._features) :])
        return [*self._features, *new.pooler_output]

    def _place_holder(self, image: Image.Image) -> Image.Image:
        """What is left of an image whose features are kept: its place in the prompt.

        An image of any size makes one square; but how many crops DocOwl makes depends on the shape.
        """
        settings = self.processor.image_processor
        is_one_square = settings.image_aspect_ratio != "anchors" and settings.do_resize
        return Image.new("RGB", (1, 1)) if is_one_square else image

    def _ending(
        self, ids: Tensor, limit: int, room: int, is_stopped: bool
    ) -> Literal["complete", "length", "context", "stopped"]:
        ends = self.model.generation_config.eos_token_id
        is_complete = len(ids) > 0 and int(ids[-1]) in (ends if isinstance(ends, list) else [ends])
        if is_complete:
            return "complete"
        if is_stopped:
            return "stopped"
        if len(ids) < limit:
            return "complete"  # by a stop string or a time limit of the generation config
        return "context" if limit == room else "length"

    def save(self, path: Path | None = None) -> Path:
        """Write the messages as JSON, and return the file.

        Args:
            path: File to write. Default: the file of the conversation, otherwise a new file named
                by the time.

        Raises:
            ValueError: If there are no messages yet, or the file exists and is not this
                conversation's.
            OSError: If it cannot be written.
        """
        if not any(message["role"] == "assistant" for message in self.messages):
            raise ValueError("there is nothing to save yet: ask something first.")
        path = (path or self.file or Path(f"chat-{datetime.now():%Y%m%d-%H%M%S}.json")).absolute()
        if path != self.file and path.exists():
            raise ValueError(f"{path} already exists: choose another name.")
        # The old file stays intact until the new one is complete.
        unfinished = path.with_name(f"{path.name}.{os.getpid()}")
        unfinished.write_text(json.dumps(self.messages, indent=1) + "\n", encoding="utf-8")
        unfinished.replace(path)
        self.file = path
        return path

    def load(self, path: Path) -> None:
        """Replace this conversation with a saved one.

        Raises:
            ValueError: If the file has no messages, or an image of theirs cannot be opened. This
                conversation stays as it is.
            OSError: If the file cannot be read.
        """
        messages = _read_messages(path)
        opened = [
            OpenedImage.open(part["image"], self.processor)
            for message in messages
            for part in message["content"]
            if part["type"] == "image"
        ]
        images = [one.image for one in opened]
        # Raises an error if these messages cannot be continued.
        self.processor.apply_chat_template(with_images(messages, images), tokenize=False)
        self.clear()
        self.messages, self._images, self.file = messages, images, path.absolute()


class _Streamer(TextStreamer):
    """Hands each piece of the answer on, and keeps the whole."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, show: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.show, self.text = show, ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        text = text if self.text else text.lstrip()
        if text:
            self.text += text
            self.show(text)


def with_images(messages: Sequence[dict[str, Any]], images: Iterable[Image.Image]) -> Messages:
    """The messages with opened images in place of their paths and URLs."""
    rest = iter(images)
    return [
        {
            **message,
            "content": [
                {**part, "image": next(rest)} if part["type"] == "image" else part
                for part in message["content"]
            ],
        }
        for message in messages
    ]


def _read_messages(path: Path) -> Messages:
    """The messages of a JSON file, each with a list of parts."""
    try:
        messages = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{path}: expected a list of messages, as /save writes it.")
    read: Messages = []
    for number, message in enumerate(messages, start=1):
        where = f"{path}: message {number}"
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ("system", "user", "assistant"):
            raise ValueError(f"{where}: expected role 'system', 'user' or 'assistant'.")
        content = message.get("content")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list) or not all(map(_is_part, parts)):
            raise ValueError(
                f"{where}: expected text, or parts {{'type': 'text', 'text': ...}} and "
                "{'type': 'image', 'image': PATH_OR_URL}."
            )
        read.append({"role": role, "content": parts})
    return read


def _is_part(part: Any) -> bool:
    kind = part.get("type") if isinstance(part, dict) else None
    return kind in ("text", "image") and isinstance(part.get(kind), str)
