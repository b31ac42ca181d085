"""Limits of one request (image pixels, context length), and the socket that servers listen on."""

import socket
from collections.abc import Sequence
from functools import cached_property

from PIL import Image

from .modeling.generation_mplug_owl2 import room_for_answer
from .modeling.modeling_mplug_owl2 import MplugOwl2ForConditionalGeneration
from .processing.image_processing_mplug_owl2 import open_image
from .processing.processing_mplug_owl2 import MplugOwl2Processor


def open_pictures(
    files: Sequence[bytes], max_pixels: int, names: Sequence[str] | None = None
) -> list[Image.Image]:
    """The files decoded.

    Args:
        max_pixels: Limit for the pixels of all images together: each takes memory that a small file
            does not betray.
        names: What to call the images in an error; "image 1 of 2" if not given.

    Raises:
        ValueError: If an image is broken, or they are too large. The message says which.
    """
    pictures: list[Image.Image] = []
    for index, file in enumerate(files):
        try:
            pictures.append(
                open_image(
                    file, max_pixels - sum(picture.width * picture.height for picture in pictures)
                )
            )
        except ValueError as error:
            name = names[index] if names else f"image {index + 1} of {len(files)}"
            raise ValueError(f"{name}: {str(error).removeprefix('bytes: ')}") from None
    return pictures


class Context:
    """The positions that a model has for messages and answer.

    Args:
        model: An `MplugOwl2ForConditionalGeneration`.
        processor: Its processor.
    """

    def __init__(
        self, model: MplugOwl2ForConditionalGeneration, processor: MplugOwl2Processor
    ) -> None:
        self._config = model.config
        self.size = model.config.get_text_config().max_position_embeddings
        self.num_image_tokens = processor.num_image_tokens
        self._tokenizer = processor.tokenizer

    @cached_property
    def longest_token(self) -> int:
        """Characters of the longest token."""
        return max(map(len, self._tokenizer.get_vocab()))

    def check(self, num_pictures: int, num_characters: int) -> None:
        """Refuse what cannot fit, before images are opened and text is cut into tokens.

        Raises:
            ValueError: If it is longer than the context.
        """
        if num_pictures * self.num_image_tokens + num_characters / self.longest_token > self.size:
            raise ValueError(
                f"the messages are longer than the context of {self.size} tokens; shorten them."
            )

    def room(self, num_prompt_tokens: int) -> int:
        """Tokens that an answer may have.

        Raises:
            ValueError: If there is none left.
        """
        return room_for_answer(self._config, num_prompt_tokens)


def bind(host: str, port: int) -> socket.socket:
    """Open a socket at an address.

    Servers call it before they load the model, so that a port in use is reported at once.

    Raises:
        OSError: If the address cannot be had.
    """
    family, _, _, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise OSError(
            f"cannot serve at {host} port {port}: {error.strerror}; choose another --port."
        ) from None
    return sock


def url_of(host: str, port: int) -> str:
    """The address of a page or server as a browser takes it."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
