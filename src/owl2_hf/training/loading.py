"""Load the model of a recipe: quantise it, add its adapter, freeze what does not train."""

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    PreTrainedModel,
)

from ..naming import naming_model, place
from ..processing.processing_mplug_owl2 import MplugOwl2Processor
from .adapters import add_adapter
from .components import freeze_all_but
from .recipe import Recipe
from .resolution import set_image_size

if TYPE_CHECKING:  # only adapters need peft
    from peft import PeftModel


def load_for_training(recipe: Recipe) -> "tuple[PreTrainedModel | PeftModel, MplugOwl2Processor]":
    """The model of a recipe, with its adapter and with what it says frozen, and the processor."""
    source = place(recipe.model)
    if not source:
        raise ValueError("the recipe has no model: set it to a folder, a Hub id or default.")
    quantization = _quantization(recipe)
    with naming_model(source):
        processor = AutoProcessor.from_pretrained(source)
        model = AutoModelForImageTextToText.from_pretrained(
            source,
            dtype=getattr(torch, recipe.dtype),
            attn_implementation=recipe.attn_implementation,
            **quantization,
        )
    if recipe.image_size is not None:
        model = set_image_size(model, processor, recipe.image_size)
    return make_trainable(model, recipe), processor


def make_trainable(model: PreTrainedModel, recipe: Recipe) -> "PreTrainedModel | PeftModel":
    """Add the adapter of a recipe to a loaded model, and freeze what does not train."""
    trained: PreTrainedModel | PeftModel = model
    if recipe.adapter is not None:
        trained = add_adapter(model, recipe.adapter, recipe.quantization is not None)
    freeze_all_but(trained, recipe.trains if recipe.adapter is None else "adapters")
    model.config.use_cache = False
    return trained


def checkpoint_activations(model: PreTrainedModel, settings: dict[str, Any] | None = None) -> None:
    """Turn gradient checkpointing on.

    Args:
        settings: Of `torch.utils.checkpoint`, for example `{"use_reentrant": False}`.
    """
    # Older releases of transformers have only the second name, newer ones warn about it.
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)(settings)


def nf4() -> BitsAndBytesConfig:
    """Quantization of QLoRA (arXiv:2305.14314): NF4, doubly quantised."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def _quantization(recipe: Recipe) -> dict[str, Any]:
    if recipe.quantization is None:
        return {}
    if find_spec("bitsandbytes") is None:
        raise ValueError(
            f"quantization: {recipe.quantization} needs bitsandbytes: pip install "
            "'owl2_hf[qlora]', or use the recipe lora, which does not quantise."
        )
    if recipe.quantization == "8bit":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    return {"quantization_config": nf4()}
