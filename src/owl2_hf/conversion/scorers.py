"""Recognise the scorer in a checkpoint by its files, without running its code."""

import re
from pathlib import Path

from transformers.utils import CONFIG_NAME, logging

from ..modeling.presets_mplug_owl2 import PRESET_FILE, PRESETS, Preset, read_preset
from ..processing import MplugOwl2Processor
from ..processing.tokenization_mplug_owl2 import read_json
from ..scoring.decision import scorer_files
from .lora import LoraSource
from .reading import ConversionError
from .sources import Source, model_class

logger = logging.get_logger(__name__)

# Settings that DeQA-Score's training leaves in config.json.
_DEQA_SETTINGS = {"level_ids", "level_prefix", "softkl_loss"}
# `_name_or_path` of the published checkpoints: their name when they were saved.
_NAMES = {
    "one-align": re.compile(r"(one|q)[-_]?align"),
    "deqa": re.compile(r"deqa"),
    "q-instruct": re.compile(r"q[-_]?instruct"),
}
_CODE_FILE = "modeling_mplug_owl2.py"


def find_preset(source: Source, name: str | None = None) -> tuple[Preset | None, str | None]:
    """How a checkpoint scores, and how that is known; two `None` for one that is no scorer, as far
    as can be seen.

    Args:
        name: What it is, where that is told.

    Raises:
        ConversionError: If there is no preset of that name, the model cannot score, or its
            scorer.json is damaged.
    """
    can_score = hasattr(model_class(source.config), "score")
    if name is not None:
        if name not in PRESETS:
            raise ConversionError(f"expected a preset of {', '.join(PRESETS)}, got {name!r}.")
        if not can_score:
            raise ConversionError(
                f"{source.folder} scores with its own head and has no preset: leave --preset out."
            )
        return PRESETS[name], f"{name}, as told"
    folders = [source.folder]
    if isinstance(source, LoraSource):
        folders.insert(0, source.own_files[0].parent)
    for folder in folders if can_score else ():
        if (folder / PRESET_FILE).is_file():
            try:
                return read_preset(folder / PRESET_FILE), f"its {PRESET_FILE}"
            except ValueError as error:
                raise ConversionError(str(error)) from None
        found, reason = _recognise(folder)
        if found is not None:
            return PRESETS[found], f"{found}, by {reason}"
    return None, None


def _recognise(folder: Path) -> tuple[str | None, str]:
    path = folder / CONFIG_NAME
    values = read_json(path) if path.is_file() else {}
    if left := sorted(_DEQA_SETTINGS & values.keys()):
        return "deqa", f"{', '.join(left)} in its config.json"
    last = str(values.get("_name_or_path") or "").rstrip("/").rpartition("/")[2].lower()
    names = [name for name, pattern in _NAMES.items() if pattern.search(last)]
    if len(names) == 1:
        return names[0], "_name_or_path in its config.json"
    code = folder / _CODE_FILE
    if "visual_config" in values and code.is_file():
        text = code.read_text(encoding="utf-8", errors="replace")
        # Co-Instruct has OneAlign's code and a chat method.
        if "def score(" in text and "excellent" in text and "def chat(" not in text:
            return "one-align", f"the code of {_CODE_FILE}"
    return None, ""


def fit_processor(processor: MplugOwl2Processor, preset: Preset) -> None:
    """Images become square as a scorer's do, also in a chat; what a scorer only cuts for scores
    stays.
    """
    if preset.image_aspect_ratio == "pad":
        processor.image_processor.image_aspect_ratio = "pad"


def write_preset(
    folder: Path, preset: Preset, processor: MplugOwl2Processor | None, is_told: bool
) -> bool:
    """Write what says how the model scores; whether it was written.

    Args:
        is_told: The preset was asked for, so that words which the vocabulary lacks are an error.

    Raises:
        ConversionError: If a level word is not one token of the vocabulary.
    """
    try:
        files = scorer_files(preset, processor)
    except ValueError as error:
        if is_told:
            raise ConversionError(f"--preset: {error}") from None
        logger.warning(f"It looks like a scorer, but {error} No {PRESET_FILE} was written.")
        return False
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return True
