"""The arguments of transformers' Trainer that a recipe gives."""

from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from .recipe import Recipe

# Arguments of the Trainer that this package needs and a recipe must not change.
_FIXED: dict[str, Any] = {
    "remove_unused_columns": False,
    "prediction_loss_only": True,
    # Ranks cannot split the batches of an IterableDataset by rows, because pixel_values has one row
    # per image, not per example.
    "accelerator_config": {"dispatch_batches": False, "split_batches": False},
    "logging_nan_inf_filter": False,
}


def training_arguments(recipe: Recipe) -> TrainingArguments:
    """The `trainer` section of a recipe, with what this package needs.

    Raises:
        ValueError: If the section contradicts that, or transformers refuses it.
    """
    # YAML reads a bare `no` as False.
    given = {
        key: "no" if key.endswith("_strategy") and value is False else value
        for key, value in recipe.trainer.items()
    }
    fixed = {**_FIXED, "prediction_loss_only": recipe.scores is None}
    for name, value in fixed.items():
        if given.get(name, value) != value:
            raise ValueError(f"trainer.{name} must be {value}, got {given[name]}.")
    if given.get("deepspeed") in ("zero2", "zero3"):
        given["deepspeed"] = str(Path(__file__).parent / "deepspeed" / f"{given['deepspeed']}.json")
    defaults = {
        "report_to": "none",
        "logging_first_step": True,
        "use_cpu": not torch.accelerator.is_available(),
    }
    try:
        arguments = TrainingArguments(
            output_dir=recipe.output_dir, **{**defaults, **given, **fixed}
        )
        if recipe.data.streaming and arguments.max_steps <= 0:
            raise ValueError(
                "data.streaming needs trainer.max_steps, because a stream has no length."
            )
    except (TypeError, ValueError, ImportError) as error:
        raise ValueError(f"trainer: {error}") from None
    return arguments
