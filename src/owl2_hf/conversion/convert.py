"""Convert a checkpoint of the original into a folder that transformers loads.

The target is built beside its final place and renamed at the end: a folder of that name is always a whole one.
"""

import json
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, logging

from ..modeling.configuration_mplug_owl2 import MplugOwl2Config
from ..modeling.modeling_mplug_owl2 import MplugOwl2ForConditionalGeneration
from ..modeling.modeling_mplug_owl2_abstractor import image_position_table, query_position_table
from .key_map import to_ours
from .tokenizer import has_tokenizer, load_processor, read_json

logger = logging.get_logger(__name__)

_WEIGHT_FILE = re.compile(r"(pytorch_)?model(-\d+-of-\d+)?\.(bin|safetensors)")


class ConversionError(ValueError):
    """The source is not what it should be; the message names the file, the tensor, and what was expected."""


@dataclass
class ConversionReport:
    """What a conversion did, for people and programs."""

    source: str
    target: str
    num_tensors: int = 0
    num_parameters: int = 0
    dtype: str = ""
    dropped: list[str] = field(default_factory=list)
    rebuilt: list[str] = field(default_factory=list)
    tokenizer: str | None = None


def convert(
    source: str | Path,
    target: str | Path,
    tokenizer: str | Path | None = None,
    max_shard_size: str | int = "5GB",
    on_file: Callable[[str], None] | None = None,
) -> ConversionReport:
    """Convert a folder in the original Hugging Face layout.

    Args:
        source: Folder with config.json and the weights, pickled shards or safetensors.
        target: Folder to make; it must not exist, or be empty.
        tokenizer: File or folder to read the tokenizer from where the source has none.
        max_shard_size: Upper bound of one target file, as in `save_pretrained`.
        on_file: Called with the name of each source file before it is read.

    Raises:
        ConversionError: The source is incomplete, unknown or broken, or the target is in use.
    """
    source, target = Path(source), Path(target)
    _check_target(source, target)
    config = read_config(source)
    files = weight_files(source)
    report = ConversionReport(str(source), str(target))

    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        state_dict = _read_weights(files, config, report, on_file)
        _save_weights(state_dict, staging, max_shard_size)
        _save_configuration(config, source, staging)
        report.tokenizer = _save_processor(config, source, tokenizer, staging)
        # Folders are named without what lies above them: the report may be published.
        written = {**vars(report), "source": source.name, "target": target.name}
        (staging / "conversion_report.json").write_text(json.dumps(written, indent=2) + "\n")
        staging.chmod(0o755)
        if target.exists():
            target.rmdir()
        staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return report


def _check_target(source: Path, target: Path) -> None:
    if not source.is_dir():
        raise ConversionError(f"{source} is not a folder: the source must be a checkpoint folder.")
    if target.resolve() == source.resolve() or source.resolve() in target.resolve().parents:
        raise ConversionError(f"{target} is the source or lies inside it; choose a folder of its own.")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConversionError(f"{target} exists and is not an empty folder; remove it or choose another.")


def read_config(source: Path) -> MplugOwl2Config:
    """Our configuration from an original folder's config.json."""
    path = source / "config.json"
    if not path.is_file():
        raise ConversionError(f"{path} is missing: the source must be a checkpoint folder with a config.json.")
    try:
        values = read_json(path)
    except ValueError as error:
        raise ConversionError(str(error)) from None
    if (found := values.get("model_type")) != "mplug_owl2":
        raise ConversionError(f"{path}: expected model_type 'mplug_owl2', got {found!r}; nothing was converted.")
    if "visual_config" not in values:
        raise ConversionError(f"{path} is already in this package's format: nothing to convert.")
    # Remote code that the source names is neither run nor carried over.
    values.pop("auto_map", None)
    try:
        return MplugOwl2Config.from_dict(values)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise ConversionError(f"{path}: {error.__cause__ or error}") from None


def weight_files(source: Path) -> list[Path]:
    """The files that hold the weights, in order; safetensors where both forms are there."""
    for index_name, single_name in (
        ("model.safetensors.index.json", "model.safetensors"),
        ("pytorch_model.bin.index.json", "pytorch_model.bin"),
    ):
        index = source / index_name
        if index.is_file():
            return _indexed_files(index)
        if (source / single_name).is_file():
            return [source / single_name]
    raise ConversionError(
        f"{source} holds no weights: expected pytorch_model.bin, model.safetensors, or shards with their index."
    )


def _indexed_files(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConversionError(f"{index} is not a weight index: {error!r}") from None
    for name in names:
        # The name is checked, not the resolved path: honest caches are made of links that leave their folder.
        if not _WEIGHT_FILE.fullmatch(name):
            raise ConversionError(f"{index} names {name!r}, which is not a weight file of this folder.")
        if not (index.parent / name).is_file():
            raise ConversionError(f"{index} names {name!r}, which is missing.")
    return [index.parent / name for name in names]


def read_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """The named tensors of one file. A pickle is read without running anything that it holds."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118, a handle of safetensors is not iterable
                    yield key, tensors.get_tensor(key)
            return
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # PyTorch's own words would advise to load the file unsafely.
        raise ConversionError(
            f"{path} cannot be read as weights ({type(error).__name__}): it is damaged, or holds more than tensors."
        ) from None
    if not isinstance(loaded, dict):
        raise ConversionError(f"{path}: expected a dictionary of tensors, got {type(loaded).__name__}.")
    yield from loaded.items()


def _read_weights(
    files: list[Path], config: MplugOwl2Config, report: ConversionReport, on_file: Callable[[str], None] | None
) -> dict[str, Tensor]:
    with torch.device("meta"):
        expected = MplugOwl2ForConditionalGeneration(config).state_dict()
    state_dict: dict[str, Tensor] = {}
    dtypes: Counter[torch.dtype] = Counter()
    for file in files:
        if on_file is not None:
            on_file(file.name)
        for key, tensor in read_tensors(file):
            where = f"{file}, tensor {key!r}"
            if not isinstance(tensor, Tensor):
                raise ConversionError(f"{where}: expected a tensor, got {type(tensor).__name__}.")
            try:
                converted = dict(to_ours(key, tensor, config))
            except KeyError:
                raise ConversionError(f"{where}: mPLUG-Owl2 has no such parameter.") from None
            except ValueError as error:
                raise ConversionError(f"{where}: {error}.") from None
            if not converted:
                report.dropped.append(key)
            for name, value in converted.items():
                _check_tensor(where, name, value, expected, state_dict)
                state_dict[name] = value.contiguous()
                dtypes[value.dtype] += value.numel()
    _rebuild_missing(state_dict, expected, config, report)
    config.dtype = dtypes.most_common(1)[0][0]
    report.dtype = str(config.dtype).removeprefix("torch.")
    report.num_tensors = len(state_dict)
    report.num_parameters = sum(value.numel() for value in state_dict.values())
    return state_dict


def _check_tensor(where: str, name: str, value: Tensor, expected: dict[str, Tensor], seen: dict[str, Tensor]) -> None:
    if name not in expected:
        raise ConversionError(f"{where}: the configuration has no place for it (as {name}).")
    if value.shape != expected[name].shape:
        raise ConversionError(
            f"{where}: expected shape {tuple(expected[name].shape)} by the configuration, got {tuple(value.shape)}."
        )
    if not value.is_floating_point():
        raise ConversionError(f"{where}: expected floating-point weights, got {value.dtype}.")
    if not value.isfinite().all():
        raise ConversionError(f"{where}: {int((~value.isfinite()).sum())} values are NaN or infinite.")
    if name in seen and not torch.equal(seen[name], value):
        raise ConversionError(f"{where}: came twice with different values.")


def _rebuild_missing(
    state_dict: dict[str, Tensor], expected: dict[str, Tensor], config: MplugOwl2Config, report: ConversionReport
) -> None:
    """The released weights lack the abstractor's sin-cos tables; anything else that is missing is an error."""
    missing = [key for key in expected if key not in state_dict]
    if config.tie_word_embeddings and "lm_head.weight" in missing:
        missing.remove("lm_head.weight")
    lost = [key for key in missing if not key.endswith("_pos_embed")]
    if lost:
        raise ConversionError(f"the source lacks {len(lost)} parameters, the first as {lost[0]} in our names.")
    tables = {"q_pos_embed": query_position_table, "k_pos_embed": image_position_table}
    for key in missing:
        state_dict[key] = tables[key.rsplit(".", 1)[1]](config.abstractor_config)
    report.rebuilt = missing


def _save_weights(state_dict: dict[str, Tensor], folder: Path, max_shard_size: str | int) -> None:
    split = split_torch_state_dict_into_shards(state_dict, max_shard_size=max_shard_size)
    for name, keys in split.filename_to_tensors.items():
        save_file({key: state_dict[key] for key in keys}, folder / name, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _save_configuration(config: MplugOwl2Config, source: Path, folder: Path) -> None:
    """config.json, generation_config.json and the remote code that lets others load the folder without this package."""
    with torch.device("meta"):
        model = MplugOwl2ForConditionalGeneration(config)
    model.config.architectures = [type(model).__name__]
    custom_object_save(model, folder)
    model.config.save_pretrained(folder)
    try:
        generation = GenerationConfig.from_pretrained(source)
    except OSError:
        text = config.text_config
        generation = GenerationConfig(bos_token_id=text.bos_token_id, eos_token_id=text.eos_token_id)
    if generation.pad_token_id is None:
        generation.pad_token_id = 0
    generation.save_pretrained(folder)


def _save_processor(config: MplugOwl2Config, source: Path, tokenizer: str | Path | None, folder: Path) -> str | None:
    """The processor, from the source or else from `tokenizer`; returns where the tokenizer came from."""
    origin = tokenizer or (source if has_tokenizer(source) else None)
    if origin is None:
        logger.warning(
            f"{source} has no tokenizer.model or tokenizer.json: the converted folder has no processor. Convert again "
            "with --tokenizer PATH to give it one."
        )
        return None
    try:
        processor = load_processor(source, config.num_image_tokens, config.vision_config.image_size, tokenizer=origin)
    except ValueError as error:
        raise ConversionError(str(error)) from None
    if processor.image_token_id != config.image_token_id:
        raise ConversionError(
            f"the tokenizer of {origin} has {processor.image_token_id} tokens, the weights {config.image_token_id}."
        )
    processor.save_pretrained(folder)
    return Path(origin).name
