"""Time of LoRA with `Owl2Trainer`, from image files and text, over the step alone.

Beside the step, a run reads and prepares images in worker processes, copies the batch to the
device, and looks whether loss and gradients are finite.
"""

import statistics
import time
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import TrainerCallback, TrainingArguments

from owl2_hf.training.collator import Collator
from owl2_hf.training.loading import make_trainable
from owl2_hf.training.recipe import load_recipe
from owl2_hf.training.trainer import Owl2Trainer

from .frame import Setting, synchronize, time_of
from .processors import load, make_files
from .trained import NUM_IMAGES, Training, num_positions

NUM_STEPS = 12
SKIPPED = 3  # first steps, which wait for the workers to begin


class Clock(TrainerCallback):
    """When each step has ended on the device."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.ends: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        synchronize(self.setting)
        self.ends.append(time.perf_counter())

    def seconds(self) -> float:
        """Median of a step."""
        ends = self.ends[SKIPPED:]
        return statistics.median(end - start for start, end in pairwise(ends))


def row_of(files: list[Path], num_words: int) -> dict[str, Any]:
    """A conversation about images; its answer is longer than a row may be."""
    images = [{"type": "image", "path": str(file)} for file in files]
    answer = {"type": "text", "text": " ".join(["image"] * num_words)}
    return {
        "messages": [
            {"role": "user", "content": [*images, {"type": "text", "text": "What is this?"}]},
            {"role": "assistant", "content": [answer]},
        ]
    }


def through_the_trainer(setting: Setting) -> dict[str, Any]:
    recipe, loaded = load_recipe("lora"), load(setting)
    model = make_trainable(loaded.model, recipe)
    workers = 0 if setting.tiny else recipe.trainer["dataloader_num_workers"]
    with TemporaryDirectory() as folder:
        files = make_files(Path(folder) / "files", NUM_IMAGES, setting)
        row = row_of(files, num_positions(setting))
        collator = Collator(loaded.processor, num_positions(setting))
        batch = {name: value.to(setting.device) for name, value in collator([row]).items()}
        alone = Training(model, batch, setting)
        alone.checkpoint()
        base = time_of(alone.step, setting, rounds=5, warmup=2)
        changed = {
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 1,
            "max_steps": NUM_STEPS,
            "save_strategy": "no",
            "dataloader_num_workers": workers,
            "use_cpu": setting.device.type == "cpu",
            "remove_unused_columns": False,
            "report_to": "none",
            "disable_tqdm": True,
        }
        clock = Clock(setting)
        trainer = Owl2Trainer(
            model=model,
            args=TrainingArguments(folder, **{**recipe.trainer, **changed}),
            train_dataset=NUM_STEPS * [row],
            data_collator=collator,
            callbacks=[clock],
        )
        loss = trainer.train().training_loss
    return {
        "positions": batch["input_ids"].shape[1],
        "images": NUM_IMAGES,
        "workers": workers,
        "steps": len(clock.ends),
        "loss": loss,
        "step alone, seconds": base,
        "step seconds": clock.seconds(),
        "shown": {"time over the step alone": clock.seconds() / base},
    }
