"""Write sharded safetensors files one tensor at a time, without holding a shard in memory."""

import json
import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

# https://huggingface.co/docs/safetensors: names of the element types in a file's header.
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}

_FLUSHED_AT = 2**29  # bytes


class ShardWriter:
    """Writes the tensors of a plan in any order, each to its place. Use as a context manager.

    The format puts names, types and places of all tensors in front of them, so they are planned
    before the first comes.

    Args:
        folder: Where the files go.
        plan: Name -> tensor of the final shape and dtype, on the meta device; its order is the
            order in the files.
        max_shard_size: Upper bound of one file, as in `save_pretrained`.

    Raises:
        ValueError: If a tensor has a dtype that safetensors cannot hold.
    """

    def __init__(self, folder: Path, plan: Mapping[str, Tensor], max_shard_size: str | int = "5GB"):
        self.folder = folder
        self.plan = dict(plan)
        self.split = split_torch_state_dict_into_shards(self.plan, max_shard_size=max_shard_size)
        self._places: dict[str, tuple[str, int]] = {}
        self._files: dict[str, BinaryIO] = {}
        self._open_files = ExitStack()
        self._missing = set(self.plan)
        self._flushing: Future[None] | None = None
        self._num_waiting = 0

    def __enter__(self) -> "ShardWriter":
        self._flusher = self._open_files.enter_context(ThreadPoolExecutor(max_workers=1))
        for name, keys in self.split.filename_to_tensors.items():
            self._files[name] = self._open_files.enter_context((self.folder / name).open("wb"))
            self._write_header(name, keys)
        return self

    def __exit__(self, exception_type: Any, *details: Any) -> None:
        self._open_files.close()
        if exception_type is None:
            if self._flushing is not None:
                self._flushing.result()  # raises disk errors that only the flush saw
            assert not self._missing, f"never written: {sorted(self._missing)[:3]}"
            self._write_index()

    def _write_header(self, name: str, keys: list[str]) -> None:
        # Wider elements first: every tensor starts at a multiple of its element's size.
        ordered = sorted(keys, key=lambda key: -self.plan[key].element_size())
        header: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt"}}
        end = 0
        for key in ordered:
            tensor = self.plan[key]
            if tensor.dtype not in _DTYPES:
                raise ValueError(
                    f"tensor {key!r} has dtype {tensor.dtype}, which safetensors cannot hold."
                )
            start, end = end, end + tensor.numel() * tensor.element_size()
            header[key] = {
                "dtype": _DTYPES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [start, end],
            }
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        for key in ordered:
            self._places[key] = name, 8 + len(encoded) + header[key]["data_offsets"][0]
        self._files[name].write(len(encoded).to_bytes(8, "little") + encoded)

    def write(self, key: str, tensor: Tensor) -> None:
        """Put one tensor, of the planned shape and dtype, in its place."""
        planned = self.plan[key]
        assert tensor.shape == planned.shape and tensor.dtype == planned.dtype, (
            f"{key} has another shape or dtype than planned"
        )
        name, start = self._places[key]
        file = self._files[name]
        file.seek(start)
        file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self._missing.discard(key)
        self._flush(file, tensor.numel() * tensor.element_size())

    def _flush(self, file: BinaryIO, num_bytes: int) -> None:
        """Now and then, beside the writing, so that little is left for the end."""
        self._num_waiting += num_bytes
        if self._num_waiting >= _FLUSHED_AT and (self._flushing is None or self._flushing.done()):
            if self._flushing is not None:
                self._flushing.result()
            self._flushing = self._flusher.submit(os.fsync, file.fileno())
            self._num_waiting = 0

    def _write_index(self) -> None:
        if self.split.is_sharded:
            index = {"metadata": self.split.metadata, "weight_map": self.split.tensor_to_filename}
            (self.folder / SAFE_WEIGHTS_INDEX_NAME).write_text(
                json.dumps(index, indent=2, sort_keys=True) + "\n"
            )
