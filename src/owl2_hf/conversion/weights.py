"""Convert weights: plan the files, then check, cast and write each tensor."""

import functools
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..modeling.configuration_mplug_owl2 import MplugOwl2Config
from ..modeling.conversion_mplug_owl2 import original_key, to_original
from ..modeling.modeling_mplug_owl2_abstractor import image_position_table, query_position_table
from .reading import ConversionError, is_finite
from .report import ConversionReport
from .sources import OnFile, Source, expected_tensors
from .writing import ShardWriter

_TABLES = {"q_pos_embed": query_position_table, "k_pos_embed": image_position_table}
_COMPUTED = "the model computes it"


class WeightConversion:
    """One pass over a source that only looks, and one that writes."""

    def __init__(
        self,
        source: Source,
        report: ConversionReport,
        dtype: torch.dtype | None,
        allow_nonfinite: bool,
    ):
        self.source = source
        self.config = source.config
        self.report = report
        self.dtype = dtype
        self.allow_nonfinite = allow_nonfinite
        if self.config.tie_word_embeddings and not _is_tied(source):
            self.config.tie_word_embeddings = False  # as in transformers
        self.plan = self._plan()

    def _plan(self) -> dict[str, Tensor]:
        """Our name -> shape and final dtype; all that can be known to be wrong without reading
        values is found here.
        """
        expected = expected_tensors(self.config)
        plan: dict[str, Tensor] = {}
        seen: dict[str, str] = {}
        casts: Counter[str] = Counter()
        for piece in self.source.read(meta=True):
            self.report.num_tensors_read += 1
            if not piece.tensors:
                self.report.dropped[piece.key] = _COMPUTED
            for name, tensor in piece.tensors:
                if name == "lm_head.weight" and self.config.tie_word_embeddings:
                    self.report.dropped[piece.key] = "tied to the embeddings"
                    continue
                self._check(piece.where, name, tensor, expected, seen)
                dtype = self._target_dtype(name, tensor)
                if dtype != tensor.dtype:
                    casts[f"{_name_of(tensor.dtype)} -> {_name_of(dtype)}"] += 1
                plan[name] = tensor.to(dtype)
        self._add_missing(plan, expected)
        self.config.dtype = _common_dtype(plan)
        self.report.casts = dict(casts)
        self.report.dtype = _name_of(self.config.dtype)
        self.report.num_parameters = sum(tensor.numel() for tensor in plan.values())
        return plan

    def _check(
        self,
        where: str,
        name: str,
        tensor: Tensor,
        expected: dict[str, Tensor],
        seen: dict[str, str],
    ) -> None:
        if name not in expected:
            raise ConversionError(
                f"{where}: the model of config.json has no such parameter ({name})."
            )
        if tensor.shape != expected[name].shape:
            shapes = f"expected shape {tuple(expected[name].shape)} by the configuration, got {tuple(tensor.shape)}"
            raise ConversionError(f"{where}: {shapes}.")
        if name in seen:
            raise ConversionError(
                f"{where}: expected each tensor once, got it also in {seen[name]}."
            )
        seen[name] = where

    def _target_dtype(self, name: str, tensor: Tensor) -> torch.dtype:
        return tensor.dtype if self.dtype is None or _is_table(name) else self.dtype

    def _add_missing(self, plan: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
        """The released weights lack the abstractor's sin-cos tables; anything else that is missing
        is an error.
        """
        missing = [name for name in expected if name not in plan]
        if lost := [name for name in missing if not _is_table(name)]:
            keys = ", ".join(repr(original_key(name, self.config)[0]) for name in lost[:3])
            raise ConversionError(
                f"{self.source.files[0].parent} lacks {len(lost)} parameters of the model of "
                f"config.json: {keys}{', ...' if len(lost) > 3 else ''}."
            )
        plan.update({name: expected[name].to(torch.float32) for name in missing})
        self.report.rebuilt = missing

    def write(
        self, folder: Path, as_original: bool, max_shard_size: str | int, on_file: OnFile
    ) -> None:
        plan = _original_plan(self.plan, self.config) if as_original else self.plan
        self.report.num_tensors = len(plan)
        _check_space(folder, plan)
        tensors = self._tensors(on_file)
        if as_original:
            tensors = _to_original(tensors, self.config)
        with ShardWriter(folder, plan, max_shard_size) as writer:
            for name, tensor in tensors:
                writer.write(name, tensor)

    def _tensors(self, on_file: OnFile) -> Iterator[tuple[str, Tensor]]:
        for piece in self.source.read(on_file):
            for name, tensor in piece.tensors:
                if name in self.plan:
                    yield name, self._checked_cast(piece.where, name, tensor)
        for name in self.report.rebuilt:
            abstractor = self.config.abstractor_config
            assert abstractor is not None  # an H-Reducer has no tables
            yield name, _TABLES[name.rpartition(".")[2]](abstractor)

    def _checked_cast(self, where: str, name: str, tensor: Tensor) -> Tensor:
        was_finite = is_finite(tensor)
        if not was_finite:
            count = int((~tensor.isfinite()).sum())
            if not self.allow_nonfinite:
                raise ConversionError(
                    f"{where}: {count} values are NaN or infinite; --allow-nonfinite keeps them."
                )
            self.report.nonfinite[name] = count
        dtype = self.plan[name].dtype
        if tensor.dtype == dtype:
            return tensor
        cast = tensor.to(dtype)
        if was_finite and not is_finite(cast):
            raise ConversionError(
                f"{where}: its values are too large for {_name_of(dtype)}; choose another dtype."
            )
        return cast


def _is_table(name: str) -> bool:
    """Whether it is one of the sin-cos tables, which can be computed."""
    return name.rpartition(".")[2] in _TABLES


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _common_dtype(plan: dict[str, Tensor]) -> torch.dtype:
    """What all parameters fit in without loss; the tables are no parameters."""
    dtypes = {tensor.dtype for name, tensor in plan.items() if not _is_table(name)}
    return functools.reduce(torch.promote_types, dtypes)


def _is_tied(source: Source) -> bool:
    """Whether the head's weights are the embeddings', or absent."""
    tables: dict[str, Tensor] = {}
    names = ("lm_head.weight", "model.language_model.embed_tokens.weight")
    for piece in source.read():
        tables.update({name: tensor for name, tensor in piece.tensors if name in names})
        if len(tables) == len(names):
            return torch.equal(*tables.values())
    return True


def _check_space(folder: Path, plan: dict[str, Tensor]) -> None:
    needed = sum(tensor.numel() * tensor.element_size() for tensor in plan.values())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ConversionError(
            f"expected {needed:,} bytes free in {folder.parent}, got {free:,}: free some space, "
            "or choose another target."
        )


def _original_plan(plan: dict[str, Tensor], config: MplugOwl2Config) -> dict[str, Tensor]:
    converted: dict[str, Tensor] = {}
    for name in plan:
        try:
            key, parts = original_key(name, config)
        except KeyError:
            raise ConversionError(f"the original's code has no parameter {name}.") from None
        if key not in converted:
            converted[key] = to_original(key, {part: plan[part] for part in parts}, config)
    return converted


def _to_original(
    tensors: Iterator[tuple[str, Tensor]], config: MplugOwl2Config
) -> Iterator[tuple[str, Tensor]]:
    """What the original keeps in one tensor waits until all of it is there."""
    waiting: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors:
        key, parts = original_key(name, config)
        found = waiting.setdefault(key, {})
        found[name] = tensor if len(parts) == 1 else tensor.clone()
        if len(found) == len(parts):
            yield key, to_original(key, waiting.pop(key), config)
