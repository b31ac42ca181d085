"""Cache prepared images on disk, so that later epochs do not decode them again.

Kept is the square of S x S pixels that the image processor makes of an image, in 8 bits. Given
this square, the image processor leaves its pixels as they are: a batch is the same to the bit, with
and without the cache.

A cache has a folder for each setting of the image processor. Each process that prepares images
appends to a file of its own there, and reads the files of all. So ranks and workers need no locks.
A record counts if its checksum fits; what a killed process left unfinished is prepared again.
"""

import json
import os
import uuid
import zlib
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import Image
from transformers.utils import logging

from ..processing.image_processing_mplug_owl2 import MplugOwl2ImageProcessor
from ..scoring.crops import side_of

logger = logging.get_logger(__name__)

MARK = "image-cache.json"
SETTINGS = "settings.json"
_FORMAT = {"format": "owl2_hf image cache", "version": 1}
_SUFFIX = ".squares"


class ImageCache:
    """Opens images for a collator, each from the cache where it is there.

    Files are known by path, size and time of their last change, bytes by their content. URLs and
    images that are open already are not kept.

    Args:
        folder: Where the cache is, or shall be; empty or a cache.
        image_processor: What makes squares of images, with its settings as they are now.

    Raises:
        ValueError: If the folder holds something else, or the settings make no single square of an
            image.
    """

    def __init__(self, folder: str | Path, image_processor: MplugOwl2ImageProcessor):
        if image_processor.image_aspect_ratio == "anchors" or not image_processor.do_resize:
            raise ValueError(
                "image_cache needs an image processor that makes one square of each image; this "
                "model's makes crops, or does not resize. Leave image_cache out."
            )
        self._processor = image_processor
        self._side = side_of(image_processor)
        # Other versions may resample differently.
        releases = {"pillow": PIL.__version__, "owl2_hf": version("owl2_hf")}
        settings = json.dumps(
            {**image_processor.to_dict(), **releases}, sort_keys=True, default=str
        )
        _claim(Path(folder))
        self.folder = Path(folder) / sha256(settings.encode()).hexdigest()[:16]
        self.folder.mkdir(parents=True, exist_ok=True)
        _write_whole(self.folder / SETTINGS, settings)
        self._record = np.dtype(
            [
                ("key", np.uint8, 32),
                ("checksum", "<u4"),
                ("pixels", np.uint8, (self._side, self._side, 3)),
            ]
        )
        self._maps: dict[str, np.ndarray] = {}  # file -> its records
        # Key -> file and number of each record: two processes may have written the same image.
        self._places: dict[bytes, list[tuple[str, int]]] = {}
        self._writer: tuple[int, Any] | None = None  # process and its file
        self._is_full = False

    def __getstate__(self) -> dict[str, Any]:
        """What a process that is spawned gets: it maps the files itself, and writes one of its
        own.
        """
        return {**self.__dict__, "_maps": {}, "_places": {}, "_writer": None}

    def fetch_images(self, images: Any) -> Any:
        """The same nesting, with every file and bytes opened and made square.

        Args:
            images: As `fetch_images` of the image processor takes them.
        """
        if isinstance(images, (list, tuple)):
            return [self.fetch_images(image) for image in images]
        key = _key(images)
        if key is None:
            return self._processor.fetch_images(images)
        pixels = self._find(key)
        if pixels is None:
            image = self._processor.fetch_images(images)
            [square] = self._processor(image, do_rescale=False, do_normalize=False)["pixel_values"]
            pixels = np.ascontiguousarray(np.asarray(square).transpose(1, 2, 0))  # (S, S, 3)
            self._append(key, pixels)
        return Image.fromarray(pixels)

    def _find(self, key: bytes) -> np.ndarray | None:
        """The pixels (S, S, 3) of an image, `None` if no whole record has them."""
        if key not in self._places:
            self._look_for_records()
        places = self._places.pop(key, [])
        for name, number in reversed(places):
            record = self._maps[name][number]
            pixels = np.array(record["pixels"])
            if _checksum(key, pixels) == record["checksum"]:
                self._places[key] = [(name, number)]
                return pixels
        if places:
            logger.warning(
                f"{self.folder / places[-1][0]}: record {places[-1][1] + 1} is damaged; the image "
                "is prepared again."
            )
        return None

    def _look_for_records(self) -> None:
        """Map what this and other processes wrote since the last time."""
        for entry in sorted(os.scandir(self.folder), key=lambda entry: entry.name):
            if not entry.name.endswith(_SUFFIX):
                continue
            known = len(self._maps.get(entry.name, ()))
            # An incomplete record, also of a killed process, is not counted.
            count = entry.stat().st_size // self._record.itemsize
            if count <= known:
                continue
            records = np.memmap(entry.path, self._record, mode="r", shape=(count,))
            self._maps[entry.name] = records
            for number, key in enumerate(np.array(records["key"][known:]), known):
                self._places.setdefault(key.tobytes(), []).append((entry.name, number))

    def _append(self, key: bytes, pixels: np.ndarray) -> None:
        """Add a record to the file of this process; a full disk ends the writing, not the run."""
        if self._is_full:
            return
        record = np.zeros((), self._record)
        record["key"] = np.frombuffer(key, np.uint8)
        record["checksum"] = _checksum(key, pixels)
        record["pixels"] = pixels
        try:
            if self._writer is None or self._writer[0] != os.getpid():  # workers are forks
                path = self.folder / f"{uuid.uuid4().hex}{_SUFFIX}"
                self._writer = (os.getpid(), path.open("ab", buffering=0))
            data = record.tobytes()
            if self._writer[1].write(data) != len(data):
                raise OSError("no space left on the disk")
        except OSError as error:
            self._is_full = True
            logger.warning(
                f"image_cache: cannot write to {self.folder} ({error}); the run continues "
                "without caching more images."
            )


def _key(image: Any) -> bytes | None:
    """What an image is known by; `None` for one that is not kept."""
    if isinstance(image, bytes):
        return sha256(b"bytes\0" + image).digest()
    if not isinstance(image, (str, Path)):
        return None
    path = Path(image)
    try:
        status = path.stat()
    except (OSError, ValueError):  # a URL, a data URL, or no file: the image processor says so
        return None
    name = f"{path.absolute()}\0{status.st_size}\0{status.st_mtime_ns}"
    return sha256(b"file\0" + os.fsencode(name)).digest()


def _checksum(key: bytes, pixels: np.ndarray) -> int:
    return zlib.crc32(pixels.data, zlib.crc32(key))


def _claim(folder: Path) -> None:
    """Make a folder a cache, unless it is one.

    Raises:
        ValueError: If it is a file, holds something else, or is a cache of another version.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"image_cache: {folder} is a file: expected a folder.")
    mark = folder / MARK
    folder.mkdir(parents=True, exist_ok=True)
    is_used = any(not entry.name.endswith(".part") for entry in os.scandir(folder))
    if is_used and not mark.exists():  # checked last, because another rank may have created both
        raise ValueError(
            f"image_cache: {folder} contains other files and no {MARK}: choose an empty folder "
            "or a cache."
        )
    if not mark.exists():
        _write_whole(mark, json.dumps(_FORMAT))
    try:
        found = json.loads(mark.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if found != _FORMAT:
        raise ValueError(
            f"image_cache: {mark} is damaged or of another version: remove the folder, or choose "
            "another one."
        )


def _write_whole(path: Path, text: str) -> None:
    """Write a file that others never see in part."""
    part = path.with_name(f"{uuid.uuid4().hex}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


__all__ = ["ImageCache"]
