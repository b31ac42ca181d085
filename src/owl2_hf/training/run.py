"""Run a training recipe: load model and data, train, and save the results.

The target folder holds checkpoints on the way, and at the end the trained model (or adapter) with
its processor, the recipe as it was run, the versions it was run with, the history of the losses and
a plot of it.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch.utils.data import ConcatDataset
from transformers import TrainingArguments, set_seed
from transformers.utils import logging

from ..scoring.decision import scorer_files
from .arguments import training_arguments
from .bad_rows import look_over
from .checkpoints import STATE, VERSIONS, is_finished, last_checkpoint, num_processes, steps_of
from .collator import Collator
from .components import Parameters, count_parameters
from .data import load_rows
from .loading import load_for_training
from .recipe import DataRecipe, Recipe, ScoreRecipe
from .report import TrainReport, plot_losses, versions_json
from .score_trainer import ScoreTrainer
from .scores import ScoreCollator, answer_ids, checked_score_rows, preset_of
from .trainer import Owl2Trainer, RunRecord

logger = logging.get_logger(__name__)

MAX_LOOKING = 8  # processes that check the rows


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
            f"{output_dir} contains an unfinished run without a complete checkpoint to resume "
            "from: choose another output_dir."
        )
    if checkpoint is not None and num_processes(checkpoint) != trainer.args.world_size:
        logger.warning(
            f"{checkpoint} was saved by {num_processes(checkpoint)} processes, this run has "
            f"{trainer.args.world_size}: random numbers and the order of rows differ from an "
            "uninterrupted run."
        )
    versions = versions_json(trainer.args.world_size)
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
        plot_losses(trainer.state.log_history, output_dir / "loss.png")
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
    arguments = training_arguments(recipe)
    if recipe.scores is not None:
        return _score_trainer(recipe, recipe.scores, arguments)
    if recipe.data.bad_rows == "stop":
        _check_files(recipe.data, arguments)
    # The Trainer sets the seed later, but a new adapter is initialised now.
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
            # accelerate sends the rows of streams to processes as tensors, and names are not
            # tensors.
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
    except (RuntimeError, ImportError) as error:  # a setting needs a package that is not installed
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
    except (RuntimeError, ImportError) as error:  # a setting needs a package that is not installed
        raise ValueError(f"trainer: {error}") from error


def _output(recipe: Recipe, resume: bool) -> tuple[Path, Path | None]:
    """The output folder, and the checkpoint to go on from."""
    if not recipe.output_dir:
        raise ValueError("the recipe has no output_dir: set it to a folder for the trained model.")
    folder = Path(recipe.output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: expected a folder to create as output_dir.")
    checkpoint = _checkpoint(folder) if resume else None
    if not resume and folder.is_dir() and any(folder.iterdir()):
        raise ValueError(
            f"{folder} is not empty: resume the run in it (--resume), or choose another output_dir."
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
            f"{'; '.join([f'{folder} contains no complete checkpoint to resume from', *damaged])}."
        )
    if damaged:
        instead = "" if found is None else f"; resuming from {found.name}"
        logger.warning(f"{folder}: incomplete or damaged: {', '.join(damaged)}{instead}.")
    return found


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
            "the recipe has no data.train: set it to a file, a folder or the id of a data set."
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
            f"data.streaming: expected one source, got {len(names)}: mix them with "
            "datasets.interleave_datasets."
        )
    return ConcatDataset(loaded)


__all__ = ["MAX_LOOKING", "TrainReport", "load_for_training", "train"]
