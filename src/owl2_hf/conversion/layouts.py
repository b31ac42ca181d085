"""Recognise the layout of a checkpoint."""

from pathlib import Path

from .lora import LoraSource, is_lora
from .megatron import MegatronSource, is_megatron
from .reading import ConversionError, has_weights
from .sources import HuggingFaceSource, Source, read_config


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
                f"{folder} is a LoRA fine-tune: choose the model that it was trained on with "
                "--base."
            )
        return LoraSource(folder, open_source(base_folder))
    if not has_weights(folder) and is_megatron(folder):
        return MegatronSource(folder, base_folder)
    if base_folder is not None:
        raise ConversionError(
            f"{folder} is neither a LoRA fine-tune nor a Megatron checkpoint: leave --base out."
        )
    return HuggingFaceSource(folder, *read_config(folder))
