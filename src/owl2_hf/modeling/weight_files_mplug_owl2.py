"""Read untrusted weight files safely: map their tensors into memory and never run code.

PyTorch maps a record of an archive at the length that the pickle beside it asks for. If the record
is shorter, PyTorch reads into the next record without an error. So the length of every record is
checked first.
"""

import io
import json
import pickle
import struct
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch.serialization import safe_globals

_MAX_INDEX_BYTES = 64 * 2**20
_LOCAL_HEADER = 30  # bytes of a record's header, before its name
# Name of a storage class in a pickle -> bytes of one element.
_WIDTHS = {
    "UntypedStorage": 1,
    **dict.fromkeys(
        ("BoolStorage", "ByteStorage", "CharStorage", "QInt8Storage", "QUInt8Storage"), 1
    ),
    **dict.fromkeys(("HalfStorage", "BFloat16Storage", "ShortStorage"), 2),
    **dict.fromkeys(("FloatStorage", "IntStorage", "QInt32Storage"), 4),
    **dict.fromkeys(("DoubleStorage", "LongStorage", "ComplexFloatStorage"), 8),
    "ComplexDoubleStorage": 16,
}


def read_weights(path: Path, allowed: Sequence[Any] = ()) -> dict[str, Any]:
    """What one file holds, memory-mapped where its format allows: a tensor is read when it is used.

    Args:
        path: safetensors, or a pickle, which is read without running anything that it names.
        allowed: Stand-ins for what a pickle may name beside tensors, as
            `torch.serialization.safe_globals` takes them.

    Raises:
        ValueError: If the file is damaged, or holds more than tensors.
    """
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, not a dictionary
        is_archive = check_archive(path)
        with safe_globals(list(allowed)), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    except _DamageError as error:
        raise ValueError(str(error)) from None
    except MemoryError:
        raise ValueError(f"{path} does not fit in memory.") from None
    except Exception as error:  # broken files raise almost any error
        raise ValueError(
            f"{path} cannot be read as weights: {_why_unreadable(path, error)}."
        ) from None
    if not isinstance(loaded, dict):
        raise ValueError(f"{path}: expected a dictionary of tensors, got {type(loaded).__name__}.")
    return loaded


def read_weight_map(index: Path) -> dict[str, Any]:
    """Which tensor an index places in which file; nobody has looked at the names yet.

    Raises:
        ValueError: If it is no index, or names a tensor twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key, value in pairs:
            if key in values:
                raise ValueError(f"it names {key[:512]!r} twice")
            values[key] = value
        return values

    try:
        if index.stat().st_size > _MAX_INDEX_BYTES:
            raise ValueError(f"it is larger than {_MAX_INDEX_BYTES >> 20} MiB")
        weight_map = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=unique)[
            "weight_map"
        ]
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError("its weight_map is not an object with entries")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{index} is not a weight index: {error}") from None
    return weight_map


class _DamageError(ValueError):
    """What is wrong with a file is known, and said."""


def check_archive(path: Path) -> bool:
    """Whether the file is a zip archive, as PyTorch writes them.

    Raises:
        ValueError: If it is one, but a record in it is compressed, there twice, or not as long as
            its tensors need.
    """
    if not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            entries = archive.infolist()
            if len({entry.filename for entry in entries}) < len(entries):
                raise _DamageError(
                    f"{path} has two records of one name: it was not written by PyTorch."
                )
            for entry in entries:
                if (
                    entry.compress_type != zipfile.ZIP_STORED
                    or entry.compress_size != entry.file_size
                ):
                    raise _DamageError(f"{path} is compressed: it was not written by PyTorch.")
            _check_places(path, file, entries, archive.start_dir)
            # As in PyTorch, the first record's folder is the folder of all.
            folder = entries[0].filename.partition("/")[0]
            entry = archive.getinfo(f"{folder}/data.pkl")
            # Not with zipfile, which checks checksums: PyTorch can be set to write none.
            file.seek(record_start(file, entry))
            storages = _StorageReader(file.read(entry.file_size)).read_sizes()
    except _DamageError:
        raise
    except Exception as error:  # broken directories and pickles raise almost any error
        raise _DamageError(
            f"{path} cannot be read as weights: {_why_unreadable(path, error)}."
        ) from None
    sizes = {entry.filename: entry.file_size for entry in entries}
    for key, (count, width) in storages.items():
        name = f"{folder}/data/{key}"
        if name not in sizes:
            raise _DamageError(
                f"{path} is damaged: it has no record {name!r}, which its tensors need."
            )
        if sizes[name] // width != count:
            raise _DamageError(
                f"{path} is damaged: its tensors need {count * width} bytes of the record "
                f"{name!r}, which has {sizes[name]}."
            )
    return True


def _check_places(path: Path, file: BinaryIO, entries: list[zipfile.ZipInfo], end: int) -> None:
    """Records lie one behind the other, each as long as the directory at the end of the archive
    says.
    """
    for entry in sorted(entries, key=lambda entry: -entry.header_offset):
        if record_start(file, entry) + entry.file_size > end:
            raise _DamageError(f"{path} is damaged: its record {entry.filename!r} is cut off.")
        end = entry.header_offset


def record_start(file: BinaryIO, entry: zipfile.ZipInfo) -> int:
    """Where a record's bytes begin; its own header may be padded, unlike its entry in the archive's
    directory.

    Raises:
        zipfile.BadZipFile: There is no header.
    """
    file.seek(entry.header_offset)
    header = file.read(_LOCAL_HEADER)
    if len(header) < _LOCAL_HEADER or not header.startswith(b"PK\x03\x04"):
        raise zipfile.BadZipFile(f"no record at {entry.header_offset}")
    return entry.header_offset + _LOCAL_HEADER + sum(struct.unpack("<HH", header[26:]))


class _Inert:
    """Takes the place of whatever a pickle names: built from anything, kept nowhere."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass

    def extend(self, values: Any) -> None:
        pass

    def add(self, value: Any) -> None:
        pass


# Python's unpickler stores what it reads in a dictionary. The one in C allocates as much memory as
# a file asks for.
class _StorageReader(pickle._Unpickler):
    """Reads from a pickle of `torch.save` how long each storage is; nothing that the pickle names
    is looked up.
    """

    def __init__(self, content: bytes):
        super().__init__(io.BytesIO(content))
        self.sizes: dict[str, tuple[int, int]] = {}  # record -> number of elements, bytes of each

    def read_sizes(self) -> dict[str, tuple[int, int]]:
        self.load()
        return self.sizes

    def find_class(self, module: str, name: str) -> type:
        return type(name, (_Inert,), {})

    def persistent_load(self, pid: Any) -> Any:
        kind, storage, key, _, count = pid
        size = (count, _WIDTHS[storage.__name__])
        if (
            kind not in ("storage", b"storage")
            or type(count) is not int
            or self.sizes.setdefault(key, size) != size
        ):
            raise pickle.UnpicklingError("expected a storage of PyTorch")
        return _Inert()


def _why_unreadable(path: Path, error: Exception) -> str:
    """PyTorch's own words would advise to load the file unsafely."""
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`"
    if not start:
        return "it is empty"
    if start.lstrip()[:1] == b"<":
        return "it is a web page, not the file itself; download it again"
    if isinstance(error, SafetensorError):
        return f"it is damaged or cut off ({error})"
    return f"it is damaged, or contains more than tensors ({type(error).__name__})"
