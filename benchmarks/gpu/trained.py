"""Models in training: made ready as a shipped recipe says, and stepping as the Trainer does.

A step is a forward under bfloat16 autocast, a backward, clipped gradients, and fused AdamW.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from transformers import LlamaForCausalLM

from owl2_hf.modeling import MplugOwl2ForConditionalGeneration
from owl2_hf.modeling.loading_mplug_owl2 import UNQUANTIZED
from owl2_hf.training.adapters import LORA_PRESETS, lora_config
from owl2_hf.training.loading import checkpoint_activations, make_trainable, nf4
from owl2_hf.training.recipe import Recipe

from . import models
from .frame import Setting

NUM_IMAGES = 4  # of a row
MAX_GRAD_NORM = 1.0  # the Trainer's default


class Training:
    """A model that trains on one batch, again and again."""

    def __init__(self, model: nn.Module, batch: Mapping[str, Any], setting: Setting):
        self.model, self.batch, self.device = model.train(), batch, setting.device
        self.parameters = [one for one in model.parameters() if one.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5, fused=True)

    def step(self, **inputs: Any) -> None:
        """One optimizer step.

        Args:
            inputs: In the place of those of the batch; `None` leaves one out.
        """
        with torch.autocast(self.device.type, torch.bfloat16):
            loss = self.model(**{**self.batch, **inputs}).loss
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def checkpoint(self) -> None:
        """Keep no activations but those between layers, from now on."""
        base = self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model
        checkpoint_activations(base, {"use_reentrant": False})


def num_positions(setting: Setting) -> int:
    return 64 if setting.tiny else 2048


def ours(recipe: Recipe, setting: Setting, num_layers: int | None = None) -> Training:
    """The model as `owl2_hf.training.run` makes it ready, with random weights."""
    config = models.config(setting, num_layers)
    model = models.build(MplugOwl2ForConditionalGeneration, config, setting)
    if recipe.quantization is not None:
        quantise(model, setting)
    else:
        model = model.to(getattr(torch, recipe.dtype))
    model = make_trainable(model, recipe)
    num_text = num_positions(setting) - NUM_IMAGES * config.num_image_tokens
    batch = models.inputs(setting, 1, num_text, NUM_IMAGES)
    return Training(model, with_labels(batch), setting)


def llama(recipe: Recipe, setting: Setting, num_layers: int | None = None) -> Training:
    """LLaMA of the same shape with the same adapter, and as many positions of text."""
    assert recipe.adapter is not None
    model = models.build(LlamaForCausalLM, models.llama_config(setting, num_layers), setting)
    adapter = lora_config(**dataclasses.asdict(recipe.adapter))
    adapter.target_modules = set(LORA_PRESETS[recipe.adapter.preset].leaves)
    model = get_peft_model(model.to(getattr(torch, recipe.dtype)), adapter)
    model.config.use_cache = False
    batch = models.inputs(setting, 1, num_positions(setting), 0)
    return Training(model, with_labels({"input_ids": batch["input_ids"]}), setting)


def with_labels(batch: dict[str, Any]) -> dict[str, Any]:
    """Every position is learned from; the model itself leaves the visual ones out."""
    ids = batch["input_ids"]
    return {**batch, "attention_mask": torch.ones_like(ids), "labels": ids}


def quantise(model: nn.Module, setting: Setting) -> None:
    """Quantise in place what `from_pretrained` would."""
    from bitsandbytes.nn import Linear4bit, Params4bit
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    weights = dict(model.named_parameters())
    replace_with_bnb_linear(model, UNQUANTIZED, nf4())  # by modules without data
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            whole = weights[f"{name}.weight"].data
            settings = {**vars(module.weight), "requires_grad": False}
            module.weight = Params4bit(whole, **settings).to(setting.device)
    model.is_loaded_in_4bit = True


@torch.no_grad()
def encode(training: Training) -> dict[str, Any]:
    """What a step takes in the place of pixels."""
    with torch.autocast(training.device.type, torch.bfloat16):
        model = training.model.get_base_model()
        features = model.get_image_features(training.batch["pixel_values"])
    return {"pixel_values": None, "mm_encoder_outputs": {"image": features}}
