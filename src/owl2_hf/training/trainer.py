"""transformers' Trainer with learning rates by component, which stops at NaN and infinite values.

The loop, accumulation, precision, sharding, checkpoints and resuming are transformers' own.
"""

import itertools
import math
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..modeling.configuration_mplug_owl2 import MplugOwl2Config
from .checkpoints import last_checkpoint
from .components import Parameters, count_parameters, parameter_groups

logger = logging.get_logger(__name__)

MAX_NAMED_ROWS = 16


class NonFiniteError(ValueError):
    """The loss or a gradient is NaN or infinite."""


class Owl2Trainer(Trainer):
    """A Trainer whose learning rates differ by component, and that keeps what it trained when an
    error ends it.

    Args:
        learning_rates: Component -> learning rate, where not that of the arguments.
        vision_layer_decay: As in `parameter_groups`.
        args, kwargs: As `Trainer` takes them.

    Raises:
        NonFiniteError: In training, before the step would change a parameter.
    """

    compute_loss_func: Any
    control: TrainerControl

    def __init__(
        self,
        *args: Any,
        learning_rates: Mapping[str, float] | None = None,
        vision_layer_decay: float | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self._rates, self._vision_layer_decay = dict(learning_rates or {}), vision_layer_decay
        # Names of the rows of this step, from the collator.
        self._rows: deque[list[str]] = deque(maxlen=self.args.gradient_accumulation_steps)
        if self.args.label_smoothing_factor and self.compute_loss_func is None:
            self.label_smoother = None
            self.compute_loss_func = SmoothedLoss(
                self.model.config, self.args.label_smoothing_factor
            )
        self._progress = Progress()
        self.add_callback(self._progress)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            target = self.model if model is None else model
            kind, kwargs = self.get_optimizer_cls_and_kwargs(self.args, target)
            if taken := {"params", "model", "optimizer_dict"} & set(kwargs):
                raise ValueError(
                    f"optimizer {self.args.optim} makes its own parameter groups "
                    f"({', '.join(taken)}) and ignores learning rates by component: choose "
                    "another, for example adamw_torch."
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

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train. Differs from transformers: an error leaves a checkpoint of the last whole step."""
        try:
            return super().train(*args, **kwargs)
        except Exception:
            # With several processes, the others cannot save their parts here.
            if self.args.world_size == 1:
                self.keep_progress()
            raise

    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""
        *_, num_steps = self.set_initial_training_values(self.args, self.get_train_dataloader())
        return num_steps

    def keep_progress(self) -> None:
        """Write a checkpoint of the last whole step, unless there is one or the arguments want
        none.
        """
        progress, step = self._progress, self.state.global_step
        if not progress.is_whole or step == 0 or self.args.save_strategy == "no":
            return
        try:
            if progress.saved_step != step:
                self._save_checkpoint(self.model, trial=None)
                self.callback_handler.on_save(self.args, self.state, self.control)
            logger.warning(
                f"The run failed in step {step + 1}; {PREFIX_CHECKPOINT_DIR}-{step} has the "
                "state before it."
            )
        except Exception as error:  # the error that ended the run matters more
            logger.warning(
                f"The run failed in step {step + 1}, and no checkpoint of step {step} could be "
                f"saved: {error}"
            )

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # transformers checks whether the run is complete only after a step.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """Read the batches of one step.

        Differs from transformers: an error in the rows of one process ends all of them, together.
        """
        if self.args.world_size == 1:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        error = None
        try:
            batches = list(itertools.islice(epoch_iterator, num_batches))
        except Exception as raised:
            error = raised
        failed = self.accelerator.gather(torch.tensor([error is not None], device=device))
        if failed.any():
            self.keep_progress()
            if error is not None:
                raise error
            raise ValueError(
                f"process {int(failed.int().argmax())} failed to read its rows: see its error."
            )
        return super().get_batch_samples(iter(batches), num_batches, device)

    def _prepare_inputs(self, inputs: Any) -> Any:
        self._rows.append(inputs.pop("rows", []))
        return super()._prepare_inputs(inputs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self._check_finite("loss", loss)
        return loss

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        norm = super()._get_grad_norm(*args, **kwargs)
        # with float16, the scaler handles overflowing gradients
        if self.accelerator.scaler is None:
            self._check_finite("gradient norm", norm)
        return norm

    def _check_finite(self, name: str, value: Any) -> None:
        if math.isfinite(value):
            return
        if self.args.world_size == 1:  # in a run of several processes, only one may see it
            self.keep_progress()
        last = last_checkpoint(self.args.output_dir)
        kept = (
            f"resume from the last checkpoint, {last},"
            if last
            else "there is no checkpoint yet: start again"
        )
        names = list(itertools.chain(*self._rows))
        rows = (
            f": {', '.join(names[:MAX_NAMED_ROWS])}{', ...' if len(names) > MAX_NAMED_ROWS else ''}"
            if names
            else ""
        )
        raise NonFiniteError(
            f"the {name} is {float(value)} in step {self.state.global_step + 1}, which was not "
            f"applied; {kept} with a lower learning rate, a longer warm-up or bfloat16 instead of "
            f"float16, and check the rows of this step{rows}."
        )


class SmoothedLoss:
    """Loss with label smoothing (arXiv:1512.00567, section 7) over the ids that can be predicted.

    transformers' own smooths over all logits; those of reserved ids are -10,000 each, and their
    mean is not a loss. `Trainer(compute_loss_func=SmoothedLoss(model.config, 0.1))` takes it as
    well.

    Args:
        config: Of the model.
        factor: Share of the target that all ids have in common.
    """

    def __init__(self, config: MplugOwl2Config, factor: float):
        self.config, self.factor = config, factor

    def __call__(
        self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Logits (B, L, V) and labels (B, L) -> sum of the losses of T labels, over T or the number
        that is given.
        """
        targets = labels[:, 1:]
        is_learned = targets.ne(-100) & targets.ne(self.config.image_token_id)  # (B, L - 1)
        log_probs = outputs["logits"][:, :-1][is_learned].float().log_softmax(-1)  # (T, V)
        targets = targets[is_learned]  # (T,)
        ids = torch.arange(log_probs.shape[-1], device=log_probs.device)
        is_predicted = ids.ne(self.config.image_token_id)  # (V,)
        if self.config.output_vocab_size is not None:
            is_predicted &= ids.lt(self.config.output_vocab_size)
        hard = log_probs.gather(-1, targets[:, None]).sum()
        soft = log_probs[:, is_predicted].mean(-1).sum()
        count = torch.as_tensor(
            len(targets) if num_items_in_batch is None else num_items_in_batch
        ).clamp_min(1)
        return -((1 - self.factor) * hard + self.factor * soft) / count.to(hard.device)


class RunRecord(TrainerCallback):
    """Keeps a run's settings beside each of its checkpoints, and tells what trains before the first
    step.

    Args:
        files: Name -> text of what is written into a checkpoint.
        on_parameters: Called once with the components and their learning rates.
    """

    def __init__(self, files: Mapping[str, str], on_parameters: Callable[[list[Parameters]], None]):
        self.files, self.on_parameters = files, on_parameters

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero:
            self.on_parameters(count_parameters(model, optimizer.param_groups))

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self.write(Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")

    def write(self, folder: Path) -> None:
        """Write the files into a folder."""
        for name, text in self.files.items():
            (folder / name).write_text(text, encoding="utf-8")


class Progress(TrainerCallback):
    """Whether the parameters are those of a whole step, and which step was saved last."""

    def __init__(self) -> None:
        self.is_whole = False
        self.saved_step = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.is_whole, self.saved_step = True, state.global_step

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.is_whole = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.is_whole = True

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.saved_step = state.global_step
