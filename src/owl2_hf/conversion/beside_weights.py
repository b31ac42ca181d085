"""Write the files beside the weights of a conversion: configuration, processor, settings."""

import json
import shutil
from pathlib import Path

import torch
from transformers import GenerationConfig
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import CONFIG_NAME, PROCESSOR_NAME, logging

from ..modeling.loading_mplug_owl2 import original_generation_config
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
from .original_config import original_config, save_original_processor
from .reading import ConversionError
from .scorers import fit_processor
from .sources import Source, model_class

logger = logging.get_logger(__name__)


def write_around_ours(
    source: Source, folder: Path, tokenizer: str | Path | None, scorer: Preset | None
) -> tuple[str | None, MplugOwl2Processor | None]:
    """All but the weights and the preset; returns where the tokenizer came from, and the
    processor.
    """
    with torch.device("meta"):
        model = model_class(source.config)(source.config)
    model.config.architectures = [type(model).__name__]
    # The code with which the folder loads without this package.
    custom_object_save(model, folder)
    model.config.save_pretrained(folder)
    generation = generation_config(source)
    generation.save_pretrained(folder)
    origin = tokenizer or (source.folder if has_tokenizer(source.folder) else None)
    if origin is None:
        expected = f"{', '.join(TOKENIZER_FILES[:-1])} or {TOKENIZER_FILES[-1]}"
        logger.warning(
            f"{str(source.folder)!r} has no {expected}, so the converted folder has no processor: "
            "convert again with --tokenizer PATH."
        )
        return None, None
    processor = load_processor(source, tokenizer)
    if scorer is not None:
        fit_processor(processor, scorer)
    processor.save_pretrained(folder)
    if source.config.is_owl21 and generation.eos_token_id is None:
        # Upstream: no configuration names the EOS token, but the tokenizer has it.
        generation.eos_token_id = generation.pad_token_id = processor.tokenizer.eos_token_id
        generation.save_pretrained(folder)
    if (vocabulary := vocabulary_file(Path(origin))) is not None:
        shutil.copyfile(vocabulary, folder / _vocabulary_name(vocabulary))  # to convert back
    return Path(origin).name, processor


def write_around_original(
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
            f"{str(source.folder)!r} has no tokenizer, so the target has none: add one with "
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
                f"{str(origin)!r} has no {name}, which the original's code needs: choose one "
                "with --tokenizer PATH."
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
    # Tokens of Q-Scorer that its base model lacks.
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
            f"expected a tokenizer with {config.image_token_id} tokens, as the weights have, got "
            f"{processor.image_token_id} in {tokenizer or source.folder}."
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
        logger.warning(f"{printable(str(error))}; the token ids of config.json are used instead.")
        given = {}
    return original_generation_config(source.config, given)
