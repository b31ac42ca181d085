"""Run a training recipe: load model and data, train, and save the results.

The target folder holds checkpoints on the way, and at the end the trained model (or adapter) with
its processor, the recipe as it was run, the versions it was run with, the history of the losses and
a plot of it.

One file because the steps of a run follow each other.
"""

import importlib.metadata
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.utils.data import ConcatDataset
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from ..naming import naming_model, place
from ..scoring.decision import scorer_files
from .adapters import add_adapter
from .checkpoints import STATE, VERSIONS, is_finished, last_checkpoint, num_processes, steps_of
from .collator import Collator
from .components import Parameters, count_parameters, freeze_all_but
from .data import load_rows, look_over
from .recipe import DataRecipe, Recipe, ScoreRecipe
from .resolution import set_image_size
from .score_trainer import ScoreTrainer
from .scores import ScoreCollator, answer_ids, checked_score_rows, preset_of
from .trainer import Owl2Trainer, RunRecord

# What this package needs of the Trainer; a recipe may not say otherwise.
_FIXED: dict[str, Any] = {
    "remove_unused_columns": False,
    "prediction_loss_only": True,
    # A batch of an IterableDataset cannot be cut between ranks row by row: images have rows of
    # their own.
    "accelerator_config": {"dispatch_batches": False, "split_batches": False},
    "logging_nan_inf_filter": False,
}
logger = logging.get_logger(__name__)

MAX_LOOKING = 8  # processes that look over the rows
_PACKAGES = (
    "owl2_hf",
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "tokenizers",
    "numpy",
    "pillow",
)


@dataclass(frozen=True)
class TrainReport:
    """What a run came to.

    Args:
        output_dir: Where the trained model is.
        steps: Optimizer steps in all, those before resuming included.
        loss: Mean training loss of the steps of this call.
        resumed_from: Checkpoint that the run went on from.
        parameters: Components, what trained of them, and how fast.
        counts: Rows in all, rows that were cut at `max_length`, that had no label left, and bad
            ones that were skipped.
        eval_loss: Loss on the rows to evaluate on, after the last step.
        eval_srcc: Of a scorer, SRCC on these rows; the mean over data sets.
        was_finished: The run that should go on had all its steps and its model, so nothing was
            done.
    """

    output_dir: str
    steps: int
    loss: float | None
    resumed_from: str | None
    parameters: list[Parameters] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    eval_loss: float | None = None
    eval_srcc: float | None = None
    was_finished: bool = False

    def summary(self) -> str:
        """The run in one line."""
        if self.was_finished:
            return f"all {self.steps} steps were finished before; nothing was changed"
        parts = [f"{self.steps} steps"]
        parts += [] if self.loss is None else [f"training loss {self.loss:.4f}"]
        parts += [] if self.eval_loss is None else [f"evaluation loss {self.eval_loss:.4f}"]
        parts += [] if self.eval_srcc is None else [f"evaluation SRCC {self.eval_srcc:.4f}"]
        names = {
            "truncated": "cut at max_length",
            "without_labels": "without a label left",
            "skipped": "skipped",
        }
        parts += [
            f"{self.counts[key]} rows {name}" for key, name in names.items() if self.counts.get(key)
        ]
        return ", ".join(parts)


def train(
    recipe: Recipe,
    resume: bool = False,
    dry_run: bool = False,
    on_parameters: Callable[[Sequence[Parameters]], None] = lambda rows: None,
) -> TrainReport:
    """Train a model as a recipe says.

    Args:
        resume: Go on from the last whole checkpoint in the output folder; a finished run stays as
            it is.
        dry_run: Load everything and count the parameters, but take no step and write nothing.
        on_parameters: Called with the components before the first step.

    Raises:
        ValueError: If the recipe lacks something, its parts do not fit together, or the output
            folder holds a run.
        NonFiniteError: If the loss or a gradient became NaN or infinite.
    """
    output_dir, checkpoint = _output(recipe, resume)
    if dry_run:
        with TemporaryDirectory() as folder:
            data = replace(recipe.data, image_cache=None)
            trainer = _trainer(replace(recipe, output_dir=folder, data=data))
            rows = count_parameters(trainer.model, trainer.create_optimizer().param_groups)
        on_parameters(rows)
        return TrainReport(str(output_dir), 0, None, None, rows)
    shown: list[Parameters] = []

    def keep(rows: list[Parameters]) -> None:
        shown.extend(rows)
        on_parameters(rows)

    trainer = _trainer(recipe)
    if resume and is_finished(output_dir, trainer.num_steps()):
        return TrainReport(str(output_dir), steps_of(output_dir), None, None, was_finished=True)
    if resume and checkpoint is None:
        raise ValueError(
            f"{output_dir} holds a run that is not finished, and no whole checkpoint to go on from."
        )
    if checkpoint is not None and num_processes(checkpoint) != trainer.args.world_size:
        logger.warning(
            f"{checkpoint} is of {num_processes(checkpoint)} processes, this run has "
            f"{trainer.args.world_size}: random numbers and the order of rows are not those that "
            "an uninterrupted run would have."
        )
    versions = _versions(trainer.args.world_size)
    files = {"recipe.yaml": recipe.to_yaml(), VERSIONS: versions}
    if recipe.scores is not None:
        processor = trainer.processing_class
        files |= scorer_files(preset_of(recipe.scores, processor), processor)
    record = RunRecord(files, keep)
    trainer.add_callback(record)
    first = 0 if checkpoint is None else steps_of(checkpoint)
    with _naming_rows():
        result = trainer.train(
            resume_from_checkpoint=None if checkpoint is None else str(checkpoint)
        )
    evaluated = trainer.evaluate() if recipe.data.eval is not None else {}
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        record.write(output_dir)
        _plot_losses(trainer.state.log_history, output_dir / "loss.png")
    return TrainReport(
        str(output_dir),
        trainer.state.global_step,
        result.training_loss if trainer.state.global_step > first else None,
        None if checkpoint is None else str(checkpoint),
        shown,
        trainer.data_collator.counts,
        evaluated.get("eval_loss"),
        evaluated.get("eval_srcc"),
    )


@contextmanager
def _naming_rows() -> Iterator[None]:
    """A bad row in one line, also from a worker of the DataLoader, which reports with its whole
    traceback.
    """
    try:
        yield
    except ValueError as error:
        if "DataLoader worker process" not in str(error):
            raise
        *_, last = str(error).strip().splitlines()
        raise ValueError(
            f"{last.partition(': ')[2]} `owl2-hf data check` names all bad rows."
        ) from error


def _trainer(recipe: Recipe) -> Owl2Trainer:
    arguments = _arguments(recipe)
    if recipe.scores is not None:
        return _score_trainer(recipe, recipe.scores, arguments)
    if recipe.data.bad_rows == "stop":
        _check_files(recipe.data, arguments)
    # The Trainer seeds everything, but a fresh adapter is drawn before there is one.
    set_seed(arguments.seed)
    model, processor = load_for_training(recipe)
    rows = _rows(recipe.data, recipe.data.train)
    eval_rows = None if recipe.data.eval is None else _rows(recipe.data, recipe.data.eval)
    try:
        return Owl2Trainer(
            model=model,
            args=arguments,
            train_dataset=rows,
            eval_dataset=eval_rows,
            # accelerate deals streams out to processes as tensors, which names are not.
            data_collator=Collator(
                processor,
                recipe.data.max_length,
                name_rows=not recipe.data.streaming,
                skip_bad=recipe.data.bad_rows == "skip",
                image_cache=recipe.data.image_cache,
            ),
            processing_class=processor,
            learning_rates=recipe.learning_rates,
            vision_layer_decay=recipe.vision_layer_decay,
        )
    except (RuntimeError, ImportError) as error:  # what a setting needs is not installed
        raise ValueError(f"trainer: {error}") from error


def _score_trainer(
    recipe: Recipe, scores: ScoreRecipe, arguments: TrainingArguments
) -> Owl2Trainer:
    """The Trainer of a scorer, whose rows are opinions."""
    seed = arguments.seed if arguments.data_seed is None else arguments.data_seed
    rows, eval_rows, skipped = checked_score_rows(recipe, seed, *_looking(arguments))
    for message in skipped if arguments.process_index == 0 else ():
        logger.warning(f"{message} The row is skipped.")
    set_seed(arguments.seed)
    model, processor = load_for_training(recipe)
    processor.image_processor.image_aspect_ratio = scores.image_aspect_ratio
    collator = ScoreCollator(
        processor, recipe.data.max_length, name_rows=True, image_cache=recipe.data.image_cache
    )
    collator.count_skipped(len(skipped))
    prefix, level_ids = answer_ids(collator, scores)
    try:
        return ScoreTrainer(
            model=model,
            args=arguments,
            train_dataset=rows,
            eval_dataset=eval_rows,
            data_collator=collator,
            processing_class=processor,
            learning_rates=recipe.learning_rates,
            vision_layer_decay=recipe.vision_layer_decay,
            scores=scores,
            prefix=prefix,
            level_ids=level_ids,
            dataset_names=[] if eval_rows is None else [group.name for group in eval_rows.groups],
        )
    except (RuntimeError, ImportError) as error:  # what a setting needs is not installed
        raise ValueError(f"trainer: {error}") from error


def load_for_training(recipe: Recipe) -> tuple[Any, Any]:
    """The model of a recipe, with its adapter and with what it says frozen, and the processor."""
    source = place(recipe.model)
    if not source:
        raise ValueError(
            "the recipe names no model: set model to a folder or Hub id, or to default."
        )
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
    if recipe.adapter is not None:
        model = add_adapter(model, recipe.adapter, recipe.quantization is not None)
    freeze_all_but(model, recipe.trains if recipe.adapter is None else "adapters")
    model.config.use_cache = False
    return model, processor


def _quantization(recipe: Recipe) -> dict[str, Any]:
    if recipe.quantization is None:
        return {}
    if find_spec("bitsandbytes") is None:
        raise ValueError(
            f"quantization: {recipe.quantization} needs bitsandbytes: pip install "
            "'owl2_hf[qlora]', or train the recipe lora, which keeps the weights as they are."
        )
    if recipe.quantization == "8bit":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    # QLoRA (arXiv:2305.14314): NF4, doubly quantised.
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return {"quantization_config": settings}


def _output(recipe: Recipe, resume: bool) -> tuple[Path, Path | None]:
    """The output folder, and the checkpoint to go on from."""
    if not recipe.output_dir:
        raise ValueError("the recipe names no output_dir: where should the trained model go?")
    folder = Path(recipe.output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: expected a folder to make as output_dir.")
    checkpoint = _checkpoint(folder) if resume else None
    if not resume and folder.is_dir() and any(folder.iterdir()):
        raise ValueError(
            f"{folder} is not empty: resume the run that it holds, or name another output_dir."
        )
    return folder, checkpoint


def _checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint; says which ones are passed over. A finished run needs none."""
    damaged: list[str] = []
    found = last_checkpoint(
        folder, lambda checkpoint, reason: damaged.append(f"{checkpoint.name}: {reason}")
    )
    if found is None and not (folder / STATE).is_file():
        raise ValueError(
            f"{'; '.join([f'{folder} holds no whole checkpoint to go on from', *damaged])}."
        )
    if damaged:
        instead = "" if found is None else f"; going on from {found.name}"
        logger.warning(f"{folder}: not whole is {', '.join(damaged)}{instead}.")
    return found


def _arguments(recipe: Recipe) -> TrainingArguments:
    # YAML reads a bare `no` as False.
    given = {
        key: "no" if key.endswith("_strategy") and value is False else value
        for key, value in recipe.trainer.items()
    }
    fixed = {**_FIXED, "prediction_loss_only": recipe.scores is None}
    for name, value in fixed.items():
        if given.get(name, value) != value:
            raise ValueError(f"trainer.{name} has to be {value} here, got {given[name]}.")
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
            raise ValueError("data.streaming has no length, so the recipe has to name max_steps.")
    except (TypeError, ValueError, ImportError) as error:
        raise ValueError(f"trainer: {error}") from None
    return arguments


def _check_files(data: DataRecipe, arguments: TrainingArguments) -> None:
    """Refuse files with bad rows before the model is loaded; of images the header is read. Ranks
    share the rows.
    """
    for name in filter(os.path.isfile, [*_names(data.train), *_names(data.eval or [])]):
        rows = load_rows(name, data.image_folder, allow_outside=data.allow_outside)
        if bad := look_over(rows, *_looking(arguments)):
            first = (
                f"row {bad[0].row}{f' (id {bad[0].id!r})' if bad[0].id else ''}: {bad[0].reason}"
            )
            others = f" {len(bad) - 1:,} more rows are bad:" if len(bad) > 1 else ""
            raise ValueError(f"{name}: {first}{others} `owl2-hf data check` names all of them.")


def _looking(arguments: TrainingArguments) -> tuple[int, int, int]:
    """How many processes look over rows, and which share of the rows is this rank's."""
    return min(os.cpu_count() or 1, MAX_LOOKING), arguments.process_index, arguments.world_size


def _names(sources: str | list[str]) -> list[str]:
    return [sources] if isinstance(sources, str) else sources


def _rows(data: DataRecipe, sources: str | list[str]) -> Any:
    names = _names(sources)
    if not names or not all(names):
        raise ValueError(
            "the recipe names no data: set data.train to a file, a folder or a data set's id."
        )
    loaded = [
        load_rows(
            name,
            data.image_folder,
            streaming=data.streaming,
            allow_outside=data.allow_outside,
            skip_bad=data.bad_rows == "skip",
        )
        for name in names
    ]
    if len(loaded) == 1:
        return loaded[0]
    if data.streaming:
        raise ValueError(
            f"streaming reads one source, got {len(names)}: mix them with "
            "datasets.interleave_datasets."
        )
    return ConcatDataset(loaded)


def _versions(processes: int) -> str:
    versions: dict[str, str | int] = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return json.dumps({**versions, "processes": processes}, indent=2) + "\n"


def _plot_losses(history: list[dict[str, float]], file: Path) -> None:
    """Training and evaluation losses by step; no plot where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for key, label in (("loss", "training"), ("eval_loss", "evaluation")):
        points = [(row["step"], row[key]) for row in history if key in row]
        axes.plot([step for step, _ in points], [loss for _, loss in points], ".-", label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.legend()
    figure.savefig(file, dpi=120)
