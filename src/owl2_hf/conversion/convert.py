"""Convert a checkpoint of the original, in any layout, for transformers, or back.

Tensors are read, checked, renamed and written one at a time. The folder appears when it is
complete.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from ..modeling.configuration_mplug_owl2 import MplugOwl2Config
from .beside_weights import write_around_original, write_around_ours
from .card import write_card
from .layouts import open_source
from .lora import LoraSource, save_adapter
from .original_config import original_config
from .reading import DTYPES, ConversionError, sha256
from .report import ConversionReport
from .scorers import find_preset, write_preset
from .sources import HuggingFaceSource, Source
from .staging import check_apart, staged_folder
from .weights import WeightConversion

TARGETS = ("ours", "original", "adapter")
_SHARD_SIZE = "5GB"


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
            conversion = WeightConversion(opened, report, DTYPES.get(dtype or ""), allow_nonfinite)
            if to == "original":
                # Settings that the original lacks raise an error before anything is written.
                original_config(opened.config)
            with _hashing(opened.files) as waiting:
                conversion.write(
                    folder, to == "original", max_shard_size, lambda file: on_file(file.name)
                )
                hashes = {file: found.result() for file, found in waiting.items()}
            write_around = write_around_original if to == "original" else write_around_ours
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
            "an adapter keeps its dtypes and has no tokenizer and no shards: leave out --dtype, "
            "--tokenizer and --max-shard-size."
        )


def _plain_name(folder: str | Path) -> str:
    """A folder's own name, fit for a report and a card."""
    return re.sub(r"[^\w.+@ -]", "_", Path(folder).resolve().name)


def _write_adapter(source: Source, folder: Path) -> list[Path]:
    """Returns the files that it was read from."""
    if not isinstance(source, LoraSource):
        raise ConversionError(
            f"{source.folder}: expected a LoRA fine-tune to convert to an adapter, got "
            f"{source.layout}."
        )
    save_adapter(source, folder)
    return source.own_files


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
    # Files in a Hub cache are links: keep the name of the link.
    parents = {file: file.parent.resolve() for file in files}
    is_one = len(set(parents.values())) == 1
    return {
        file: file.name if is_one else f"{parent.name}/{file.name}"
        for file, parent in parents.items()
    }


__all__ = ["TARGETS", "ConversionReport", "convert", "open_source"]
