"""Read untrusted weights: find their files in a folder, and refuse damaged tensors and files."""

import hashlib
import re
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..modeling.weight_files_mplug_owl2 import read_weight_map, read_weights, record_start

_WEIGHT_FILE = re.compile(r"(pytorch_)?model(-\d+-of-\d+)?\.(bin|safetensors)")
_MAX_NAME_LENGTH = 512
_BLOCK = 2**23
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Names of the dtypes that weights can be converted to.
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class ConversionError(ValueError):
    """The source is not what it should be; the message names the file, the tensor, and what was
    expected.
    """


def has_weights(folder: Path) -> bool:
    """Whether a folder holds weights in one of Hugging Face's layouts."""
    names = ("model.safetensors", "pytorch_model.bin")
    return any(
        (folder / name).exists() or (folder / f"{name}.index.json").exists() for name in names
    )


def weight_files(folder: Path) -> dict[Path, set[str] | None]:
    """The files that hold the weights, in order; safetensors where both forms are there.

    Returns:
        For each file the tensors that the index places in it, `None` where there is no index.

    Raises:
        ConversionError: If there are none, or the index names what it must not name.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        # As in transformers, the single file comes first.
        if (folder / name).exists():
            return {_existing(folder / name): None}
        if (folder / f"{name}.index.json").exists():
            return _indexed_files(folder / f"{name}.index.json")
    raise ConversionError(
        f"{folder} contains no weights: expected pytorch_model.bin, model.safetensors, or shards "
        "with their index."
    )


def _indexed_files(index: Path) -> dict[Path, set[str] | None]:
    placed: dict[str, set[str]] = {}
    for key, name in _read_weight_map(index).items():
        # The name is checked, not the resolved path, because the files of a Hub cache are links to
        # other folders.
        if not isinstance(name, str) or not _WEIGHT_FILE.fullmatch(name):
            raise ConversionError(
                f"{index} names {name!r}: expected a weight file in the same folder."
            )
        placed.setdefault(name, set()).add(key)
    return {
        _existing(index.parent / name, f"{index} names {name!r}, which"): placed[name]
        for name in _natural(placed)
    }


def _read_weight_map(index: Path) -> dict[str, Any]:
    try:
        return read_weight_map(_existing(index))
    except ValueError as error:
        raise ConversionError(str(error)) from None


def _natural(names: Sequence[str] | dict[str, Any]) -> list[str]:
    """Shard 2 before shard 10, whether or not the numbers are padded with zeros."""
    return sorted(
        names,
        key=lambda name: [
            int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)
        ],
    )


def _existing(path: Path, words: str | None = None) -> Path:
    if not path.is_file():
        raise ConversionError(
            f"{words or path} {'is not a file' if path.exists() else 'does not exist'}."
        )
    return path


def read_tensors(path: Path, allowed: Sequence[Any] = ()) -> dict[str, Any]:
    """As `read_weights`.

    Raises:
        ConversionError: If the file is damaged, or holds more than tensors.
    """
    try:
        return read_weights(path, allowed)
    except ValueError as error:
        raise ConversionError(str(error)) from None


def check_tensor(where: str, tensor: Any, meta: bool = False) -> Tensor:
    """The value again, if it is a plain floating-point tensor.

    Args:
        where: File and tensor, for errors.
        meta: Give its shape and dtype alone, on the meta device.

    Raises:
        ConversionError: If it is something else.
    """
    if not isinstance(tensor, Tensor):
        raise ConversionError(f"{where}: expected a tensor, got {type(tensor).__name__}.")
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta or tensor.is_nested:
        kind = "quantized" if tensor.is_quantized else str(tensor.layout).removeprefix("torch.")
        raise ConversionError(
            f"{where}: expected a dense tensor with values, got a {kind} one on {tensor.device}."
        )
    if tensor.dtype not in _DTYPES:
        raise ConversionError(
            f"{where}: expected floating-point weights of 16, 32 or 64 bits, got {tensor.dtype}."
        )
    return tensor.detach().to("meta") if meta else tensor.detach()


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite; many times faster than a look at each: both come through
    the bounds.
    """
    return not tensor.numel() or all(bool(bound.isfinite()) for bound in torch.aminmax(tensor))


def describe(path: Path, key: Any) -> str:
    """How errors name a tensor: quoted, since nobody vouches for the name."""
    if not isinstance(key, str) or len(key) > _MAX_NAME_LENGTH:
        raise ConversionError(f"{path}: expected names of tensors, got {repr(key)[:80]}.")
    return f"{path}, tensor {key!r}"


def sha256(path: Path) -> str:
    """Hash of one file, which is checked for damage on the way where its format carries checksums.

    Raises:
        ConversionError: If a checksum is wrong.
    """
    digest = hashlib.sha256()
    records = _Records(path)
    block = bytearray(_BLOCK)
    position = 0
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            view = memoryview(block)[:count]
            digest.update(view)
            records.update(position, view)
            position += count
    return digest.hexdigest()


class _Records:
    """Checksums of the records of a zip archive, from one walk over its bytes; nothing for other
    files.
    """

    def __init__(self, path: Path):
        self.path = path
        # Start, end, entry; in reverse order.
        self._waiting: list[tuple[int, int, zipfile.ZipInfo]] = []
        self._found = 0
        if path.suffix == ".safetensors" or not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            for entry in archive.infolist():
                if entry.CRC:  # PyTorch can be set to write no checksums
                    start = record_start(file, entry)
                    self._waiting.append((start, start + entry.file_size, entry))
        self._waiting.sort(key=lambda record: -record[0])

    def update(self, position: int, view: memoryview) -> None:
        end = position + len(view)
        while self._waiting and self._waiting[-1][0] < end:
            first, last, entry = self._waiting[-1]
            self._found = zlib.crc32(view[max(first - position, 0) : last - position], self._found)
            if last > end:
                return
            if self._found != entry.CRC:
                name = repr(entry.filename)
                raise ConversionError(
                    f"{self.path} is damaged: the checksum of its record {name} is wrong."
                )
            self._waiting.pop()
            self._found = 0
