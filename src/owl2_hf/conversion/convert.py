"""Convert a checkpoint of the original, in any layout, for transformers, or back.

Tensors are read, checked, renamed and written one at a time. The folder appears when it is
complete.

This is one file because every layout goes through the same steps.
"""

import functools
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import CONFIG_NAME, PROCESSOR_NAME, logging

from ..modeling.configuration_mplug_owl2 import MplugOwl2Config
from ..modeling.conversion_mplug_owl2 import original_key, to_original
from ..modeling.loading_mplug_owl2 import original_generation_config
from ..modeling.modeling_mplug_owl2_abstractor import image_position_table, query_position_table
from ..modeling.presets_mplug_owl2 import Preset
from ..printing import printable
from ..processing import MplugOwl2Processor
from ..processing.tokenization_mplug_owl2 import (
    QWEN_VOCABULARY,
    SENTENCEPIECE_VOCABULARY,
    TOKENIZER_FILES,
    has_tokenizer,
    read_json,
)
from .card import write_card
from .lora import LoraSource, is_lora, save_adapter
from .megatron import MegatronSource, is_megatron
from .original_config import original_config, save_original_processor
from .reading import DTYPES, ConversionError, has_weights, is_finite, sha256
from .scorers import find_preset, fit_processor, write_preset
from .sources import HuggingFaceSource, OnFile, Source, expected_tensors, model_class, read_config
from .staging import check_apart, staged_folder
from .writing import ShardWriter

logger = logging.get_logger(__name__)

TARGETS = ("ours", "original", "adapter")
_TABLES = {"q_pos_embed": query_position_table, "k_pos_embed": image_position_table}
_COMPUTED = "the model computes it"
_SHARD_SIZE = "5GB"


@dataclass
class ConversionReport:
    """The result of a conversion, also written to conversion_report.json beside the weights.

    The report can be published: it holds folder names without their parent folders. It does not
    depend on the time, so equal conversions give equal files.
    """

    source: str
    layout: str
    target: str
    to: str
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    num_tensors_read: int = 0
    num_tensors: int = 0
    num_parameters: int = 0
    dtype: str = ""
    dropped: dict[str, str] = field(default_factory=dict)
    rebuilt: list[str] = field(default_factory=list)
    casts: dict[str, int] = field(default_factory=dict)
    nonfinite: dict[str, int] = field(default_factory=dict)
    tokenizer: str | None = None
    scorer: str | None = None
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def is_noop(self) -> bool:
        """The source is in this package's format already: nothing was written."""
        return not self.files

    def summary(self) -> str:
        """One line for people."""
        if self.to == "adapter":
            return f"a PEFT adapter from {self.layout}"
        tokenizer = "no tokenizer" if self.tokenizer is None else f"tokenizer from {self.tokenizer}"
        return (
            f"{self.num_parameters:,} parameters in {self.num_tensors} tensors, {self.dtype}, from "
            f"{self.layout}; {len(self.dropped)} dropped, {len(self.rebuilt)} rebuilt; {tokenizer}"
            + (f"; scores as {self.scorer}" if self.scorer else "")
        )


def open_source(source: str | Path, base: str | Path | None = None) -> Source:
    """Recognise the layout of a checkpoint by the files in its folder.

    Args:
        source: The original's Hugging Face layout, Megatron's, a LoRA fine-tune, or this package's
            format.
        base: For a LoRA fine-tune, the model that it was trained on. For Megatron, a folder with
            config.json and tokenizer.

    Raises:
        ConversionError: If the layout is not recognised, or files are missing.
    """
    folder, base_folder = Path(source), Path(base) if base is not None else None
    for given in (folder, base_folder):
        if given is not None and not given.is_dir():
            raise ConversionError(f"{given} is not a folder: expected the folder of a checkpoint.")
    if is_lora(folder):
        if base_folder is None:
            raise ConversionError(
                f"{folder} holds a LoRA fine-tune: give the model that it was trained on with "
                "--base."
            )
        return LoraSource(folder, open_source(base_folder))
    if not has_weights(folder) and is_megatron(folder):
        return MegatronSource(folder, base_folder)
    if base_folder is not None:
        raise ConversionError(
            f"{folder} needs no --base: it holds neither a LoRA fine-tune nor Megatron's ranks."
        )
    return HuggingFaceSource(folder, *read_config(folder))


def convert(
    source: str | Path,
    target: str | Path,
    *,
    to: str = "ours",
    base: str | Path | None = None,
    tokenizer: str | Path | None = None,
    preset: str | None = None,
    dtype: str | None = None,
    max_shard_size: str | int = _SHARD_SIZE,
    allow_nonfinite: bool = False,
    overwrite: bool = False,
    on_file: Callable[[str], None] = lambda name: None,
) -> ConversionReport:
    """Convert a checkpoint to another layout.

    Args:
        source: Folder of the checkpoint, in any layout that `open_source` recognises.
        target: Folder to make; it must not exist, or be empty.
        to: "ours" for transformers, "original" for the original's code, "adapter" for PEFT (LoRA
            fine-tunes only).
        base: See `open_source`.
        tokenizer: File or folder to read the tokenizer from, if the source has none.
        preset: Name in `owl2_hf.scoring.PRESETS`, if the source does not say which scorer it is.
        dtype: "float32", "float16" or "bfloat16"; The sin-cos tables keep their dtype. Default:
            every tensor keeps its dtype.
        max_shard_size: Largest size of one weight file, as in `save_pretrained`.
        allow_nonfinite: Convert NaN and infinite values, and report them, instead of raising an
            error.
        overwrite: Replace a model in `target`, after the new folder is complete.
        on_file: Called with the name of each source file before the file is read.

    Raises:
        ConversionError: If the source is incomplete, not recognised or broken.
        ValueError: If the target is in use, or an option does not fit the source.
    """
    _check_options(to, dtype, tokenizer, max_shard_size)
    check_apart(Path(target), *(Path(folder) for folder in (source, base) if folder is not None))
    opened = open_source(source, base)
    report = ConversionReport(_plain_name(source), opened.layout, _plain_name(target), to)
    is_ours = isinstance(opened, HuggingFaceSource) and not opened.is_original
    if (
        is_ours
        and to == "ours"
        and dtype is None
        and tokenizer is None
        and preset is None
        and max_shard_size == _SHARD_SIZE
    ):
        return report
    scorer, report.scorer = find_preset(opened, preset)
    with staged_folder(Path(target), overwrite) as folder:
        if to == "adapter":
            files = _write_adapter(opened, folder)
            hashes, processor = {file: sha256(file) for file in files}, None
        else:
            conversion = _Conversion(opened, report, DTYPES.get(dtype or ""), allow_nonfinite)
            if to == "original":
                # What it has no word for is refused before anything is written.
                original_config(opened.config)
            with _hashing(opened.files) as waiting:
                conversion.write(
                    folder, to == "original", max_shard_size, lambda file: on_file(file.name)
                )
                hashes = {file: found.result() for file, found in waiting.items()}
            write_around = _write_around_original if to == "original" else _write_around_ours
            report.tokenizer, processor = write_around(opened, folder, tokenizer, scorer)
        if scorer is not None and not write_preset(folder, scorer, processor, bool(preset)):
            report.scorer = scorer = None
        report.files = {
            name: {"sha256": hashes[file], "bytes": file.stat().st_size}
            for file, name in _file_names(hashes).items()
        }
        report.versions = {
            name: version(name) for name in ("owl2_hf", "torch", "transformers", "safetensors")
        }
        (folder / "conversion_report.json").write_text(json.dumps(vars(report), indent=2) + "\n")
        if to == "ours":
            facts = _facts(report, opened.config)
            write_card(folder, facts, _has_published_sizes(opened.config), scorer)
    return report


def _check_options(
    to: str, dtype: str | None, tokenizer: str | Path | None, max_shard_size: str | int
) -> None:
    if to not in TARGETS:
        raise ValueError(f"expected one of {', '.join(TARGETS)} to convert to, got {to!r}.")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"expected a dtype of {', '.join(DTYPES)}, got {dtype!r}.")
    if not re.fullmatch(r"0*[1-9]\d*([KMGT]B)?", str(max_shard_size), re.IGNORECASE):
        raise ValueError(f"expected a max_shard_size such as 500MB or 5GB, got {max_shard_size!r}.")
    if to == "adapter" and (dtype, tokenizer, max_shard_size) != (None, None, _SHARD_SIZE):
        raise ValueError(
            "an adapter keeps its types and has no tokenizer and no shards: leave these options "
            "out."
        )


def _plain_name(folder: str | Path) -> str:
    """A folder's own name, fit for a report and a card."""
    return re.sub(r"[^\w.+@ -]", "_", Path(folder).resolve().name)


@contextmanager
def _hashing(files: list[Path]) -> Iterator[dict[Path, Future[str]]]:
    """SHA-256 of each file, computed beside the conversion; reading ahead also brings the files
    into memory for it.
    """
    background = ThreadPoolExecutor(max_workers=1)
    try:
        yield {file: background.submit(sha256, file) for file in files}
    finally:
        background.shutdown(cancel_futures=True)


def _facts(report: ConversionReport, config: MplugOwl2Config) -> dict[str, str]:
    side = config.vision_config.image_size
    is_docowl = config.connector_type == "h_reducer"
    return {
        **(
            {"Model": "DocOwl 1.5, with an H-Reducer where mPLUG-Owl2 has its visual abstractor"}
            if is_docowl
            else {}
        ),
        "Converted from": f"`{report.source}`, {report.layout}",
        "Parameters": f"{report.num_parameters:,} in {report.num_tensors} tensors, {report.dtype}",
        "Dropped, because the model computes them": f"{len(report.dropped)} tensors",
        "Rebuilt, because the source lacked them": f"{len(report.rebuilt)} sin-cos tables",
        "Language model": f"{config.text_config.num_hidden_layers} layers of width {config.text_config.hidden_size}",
        "Context length": f"{config.text_config.max_position_embeddings} positions",
        "Crop of an image"
        if is_docowl
        else "Picture": f"{side} x {side} pixels, {config.num_image_tokens} positions",
        "Tokenizer": "none in the source"
        if report.tokenizer is None
        else f"from `{report.tokenizer}`",
        **({"Scores as": report.scorer} if report.scorer else {}),
        "Converted with": ", ".join(f"{name} {number}" for name, number in report.versions.items()),
    }


def _has_published_sizes(config: MplugOwl2Config) -> bool:
    published = MplugOwl2Config()
    return config.connector_type == published.connector_type and all(
        getattr(getattr(config, part), size) == getattr(getattr(published, part), size)
        for part in ("text_config", "vision_config", "abstractor_config")
        for size in ("hidden_size", "intermediate_size", "num_hidden_layers")
    )


def _file_names(files: Iterable[Path]) -> dict[Path, str]:
    """Names for a report: with the folder just above where files of several folders were read."""
    # Links of a cache keep their own names.
    parents = {file: file.parent.resolve() for file in files}
    is_one = len(set(parents.values())) == 1
    return {
        file: file.name if is_one else f"{parent.name}/{file.name}"
        for file, parent in parents.items()
    }


class _Conversion:
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
            self.config.tie_word_embeddings = False  # as transformers decides, too
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
            raise ConversionError(f"{where}: the configuration has no place for it (as {name}).")
        if tensor.shape != expected[name].shape:
            shapes = f"expected shape {tuple(expected[name].shape)} by the configuration, got {tuple(tensor.shape)}"
            raise ConversionError(f"{where}: {shapes}.")
        if name in seen:
            raise ConversionError(f"{where}: it came before, as {seen[name]}.")
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
                f"{self.source.files[0].parent} lacks {len(lost)} parameters of the model that its "
                f"configuration describes: {keys}{', ...' if len(lost) > 3 else ''}."
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
            yield name, _TABLES[name.rpartition(".")[2]](self.config.abstractor_config)

    def _checked_cast(self, where: str, name: str, tensor: Tensor) -> Tensor:
        was_finite = is_finite(tensor)
        if not was_finite:
            count = int((~tensor.isfinite()).sum())
            if not self.allow_nonfinite:
                raise ConversionError(
                    f"{where}: {count} values are NaN or infinite; --allow-nonfinite converts them."
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
            f"{folder.parent} has {free:,} bytes free, the weights need {needed:,}."
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


def _write_adapter(source: Source, folder: Path) -> list[Path]:
    """Returns the files that it was read from."""
    if not isinstance(source, LoraSource):
        raise ConversionError(
            f"{source.folder} is {source.layout}: only a LoRA fine-tune becomes an adapter."
        )
    save_adapter(source, folder)
    return source.own_files


def _write_around_ours(
    source: Source, folder: Path, tokenizer: str | Path | None, scorer: Preset | None
) -> tuple[str | None, MplugOwl2Processor | None]:
    """All but the weights and the preset; returns where the tokenizer came from, and the
    processor.
    """
    with torch.device("meta"):
        model = model_class(source.config)(source.config)
    model.config.architectures = [type(model).__name__]
    # The code that lets others load the folder without this package.
    custom_object_save(model, folder)
    model.config.save_pretrained(folder)
    generation = generation_config(source)
    generation.save_pretrained(folder)
    origin = tokenizer or (source.folder if has_tokenizer(source.folder) else None)
    if origin is None:
        expected = f"{', '.join(TOKENIZER_FILES[:-1])} or {TOKENIZER_FILES[-1]}"
        logger.warning(
            f"{str(source.folder)!r} has no {expected}: the converted folder has no processor. "
            "Convert again with --tokenizer PATH to give it one."
        )
        return None, None
    processor = load_processor(source, tokenizer)
    if scorer is not None:
        fit_processor(processor, scorer)
    processor.save_pretrained(folder)
    if source.config.is_owl21 and generation.eos_token_id is None:
        # Upstream: no configuration names the token that ends a text; the tokenizer knows it.
        generation.eos_token_id = generation.pad_token_id = processor.tokenizer.eos_token_id
        generation.save_pretrained(folder)
    if (vocabulary := vocabulary_file(Path(origin))) is not None:
        shutil.copyfile(vocabulary, folder / _vocabulary_name(vocabulary))  # for the way back
    return Path(origin).name, processor


def _write_around_original(
    source: Source, folder: Path, tokenizer: str | Path | None, scorer: Preset | None
) -> tuple[str | None, None]:
    """As for our format; the original's code has no processor, and its folder gets the preset
    alone.
    """
    config = original_config(source.config)
    generation_config(source).save_pretrained(folder)
    origin = tokenizer or (source.folder if has_tokenizer(source.folder) else None)
    if origin is None:
        logger.warning(
            f"{str(source.folder)!r} has no tokenizer: the target has none. Give one with "
            "--tokenizer PATH."
        )
    else:
        processor = load_processor(source, tokenizer)
        if processor.image_processor.image_aspect_ratio == "pad":
            config["image_aspect_ratio"] = "pad"
        vocabulary = vocabulary_file(Path(origin))
        name = QWEN_VOCABULARY if source.config.is_owl21 else SENTENCEPIECE_VOCABULARY
        if vocabulary is None or _vocabulary_name(vocabulary) != name:
            logger.warning(
                f"{str(origin)!r} has no {name}, as the original's code needs: give one with "
                "--tokenizer PATH."
            )
            vocabulary = Path(origin) / "tokenizer.json" if Path(origin).is_dir() else Path(origin)
        save_original_processor(processor, vocabulary, folder)
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return None if origin is None else Path(origin).name, None


def load_processor(source: Source, tokenizer: str | Path | None) -> MplugOwl2Processor:
    """The processor of a source, checked against its weights.

    Args:
        tokenizer: Where to read the tokenizer from, where not from the source.
    """
    config = source.config
    # Q-Scorer's, which the processor of its base does not have.
    added = getattr(config, "score_tokens", None) or ()
    processor = None
    try:
        if tokenizer is None and (source.folder / PROCESSOR_NAME).is_file():
            processor = MplugOwl2Processor.from_pretrained(source.folder, trust_remote_code=False)
        if processor is None or (added and processor.image_token_id != config.image_token_id):
            processor = MplugOwl2Processor.from_original(
                source.folder,
                tokenizer,
                config.num_image_tokens,
                config.vision_config.image_size,
                num_text_tokens=config.output_vocab_size,
                added_tokens=added,
            )
    except (ValueError, OSError, TypeError, KeyError, AttributeError) as error:
        raise ConversionError(f"{source.folder}: its processor cannot be read: {error}") from None
    if (
        getattr(config, "image_aspect_ratio", None) == "pad"
        and config.connector_type == "abstractor"
    ):
        processor.image_processor.image_aspect_ratio = "pad"
    if processor.image_token_id != config.image_token_id:
        raise ConversionError(
            f"the tokenizer of {tokenizer or source.folder} has {processor.image_token_id} tokens, "
            f"the weights {config.image_token_id}."
        )
    return processor


def vocabulary_file(origin: Path) -> Path | None:
    """tokenizer.model or qwen.tiktoken of a folder, or the file itself."""
    names = (SENTENCEPIECE_VOCABULARY, QWEN_VOCABULARY)
    paths = [origin / name for name in names] if origin.is_dir() else [origin]
    return next(
        (path for path in paths if path.suffix in (".model", ".tiktoken") and path.is_file()), None
    )


def _vocabulary_name(vocabulary: Path) -> str:
    return QWEN_VOCABULARY if vocabulary.suffix == ".tiktoken" else SENTENCEPIECE_VOCABULARY


def generation_config(source: Source) -> GenerationConfig:
    """The source's, as far as it is known and sound."""
    try:
        given = read_json(source.folder / "generation_config.json")
    except ValueError as error:
        logger.warning(f"{printable(str(error))}; the tokens of config.json are taken instead.")
        given = {}
    return original_generation_config(source.config, given)
