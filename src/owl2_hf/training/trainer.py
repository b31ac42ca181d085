"""transformers' Trainer for this family: learning rates by component, and a stop where numbers end.

The loop, accumulation, precision, sharding, checkpoints and resuming are transformers' own.
"""

import itertools
import json
import math
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .components import Parameters, count_parameters, parameter_groups

MAX_NAMED_ROWS = 16


class NonFiniteError(ValueError):
    """The loss or a gradient is NaN or infinite."""


class Owl2Trainer(Trainer):
    """A Trainer whose learning rates differ by component.

    Args:
        learning_rates: Component -> learning rate, where not that of the arguments.
        vision_layer_decay: As in `parameter_groups`.
        args, kwargs: As `Trainer` takes them.

    Raises:
        NonFiniteError: In training, before the step would change a parameter.
    """

    def __init__(
        self,
        *args: Any,
        learning_rates: Mapping[str, float] | None = None,
        vision_layer_decay: float | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self._rates, self._vision_layer_decay = dict(learning_rates or {}), vision_layer_decay
        # What the collator calls the rows of this step.
        self._rows: deque[list[str]] = deque(maxlen=self.args.gradient_accumulation_steps)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            target = self.model if model is None else model
            kind, kwargs = self.get_optimizer_cls_and_kwargs(self.args, target)
            if taken := {"params", "model", "optimizer_dict"} & set(kwargs):
                raise ValueError(
                    f"optimizer {self.args.optim} makes its own groups of parameters ({', '.join(taken)}), so learning "
                    "rates by component would not apply: choose another, for instance adamw_torch."
                )
            kwargs["params"] = parameter_groups(
                target,
                self.args.learning_rate,
                self._rates,
                self._vision_layer_decay,
                self.args.weight_decay,
                self.get_decay_parameter_names(target),
            )
            self.optimizer_cls_and_kwargs = (kind, kwargs)
        return super().create_optimizer(model)

    def _prepare_inputs(self, inputs: Any) -> Any:
        self._rows.append(inputs.pop("rows", []))
        return super()._prepare_inputs(inputs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self._check_finite("loss", loss)
        return loss

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        norm = super()._get_grad_norm(*args, **kwargs)
        if self.accelerator.scaler is None:  # float16 scales its loss down where gradients overflow
            self._check_finite("gradient norm", norm)
        return norm

    def _check_finite(self, name: str, value: Any) -> None:
        if math.isfinite(value):
            return
        last = last_checkpoint(Path(self.args.output_dir))
        kept = f"the last checkpoint, {last}, is kept: go on from it" if last else "there is no checkpoint yet: begin"
        names = list(itertools.chain(*self._rows))
        rows = f": {', '.join(names[:MAX_NAMED_ROWS])}{', ...' if len(names) > MAX_NAMED_ROWS else ''}" if names else ""
        raise NonFiniteError(
            f"the {name} is {float(value)} in step {self.state.global_step + 1}, which was not applied; {kept} with a "
            "lower learning rate, a longer warm-up or bfloat16 instead of float16, and check the rows of this step"
            f"{rows}."
        )


class RunRecord(TrainerCallback):
    """Keeps a run's settings beside each of its checkpoints, and tells what trains before the first step.

    Args:
        files: Name -> text of what is written into a checkpoint.
        on_parameters: Called once with the components and their learning rates.
    """

    def __init__(self, files: Mapping[str, str], on_parameters: Callable[[list[Parameters]], None]):
        self.files, self.on_parameters = files, on_parameters

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.is_world_process_zero:
            self.on_parameters(count_parameters(model, optimizer.param_groups))

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.write(Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")

    def write(self, folder: Path) -> None:
        """Write the files into a folder."""
        for name, text in self.files.items():
            (folder / name).write_text(text, encoding="utf-8")


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end; a run may have died within one."""
    found = [
        path
        for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if path.name.rpartition("-")[2].isdigit() and _is_complete(path)
    ]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _is_complete(checkpoint: Path) -> bool:
    """The trainer's state is the last file of a checkpoint."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True
