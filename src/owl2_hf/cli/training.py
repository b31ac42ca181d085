"""Train models, and check training data."""

import dataclasses
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from .app import app, report_mistakes, say, say_json
from .loading import load_processor
from .options import JSON, AllowOutside, Debug


@app.command()
@report_mistakes
def train(
    recipe: Annotated[
        str,
        typer.Argument(
            help="Recipe: a YAML file, or one of pretrain, instruct, lora, qlora, visual-branch, "
            "score, score-lora, score-soft, score-soft-lora."
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder or Hub id of the model to train, or default or default-scorer for a "
            "model in the package."
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Training data: a .json or .jsonl file, a saved data set, or a Hub id. For a "
            "scorer, opinions. Repeat the option for more data."
        ),
    ] = None,
    image_folder: Annotated[
        Path | None,
        typer.Option(
            help="Folder that relative image paths start from. Default: the folder of the file."
        ),
    ] = None,
    allow_outside: AllowOutside = False,
    out: Annotated[Path | None, typer.Option(help="Output folder to make.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Change a setting of the recipe: key=value, for example trainer.max_steps=100. "
            "Repeatable.",
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Continue from the last checkpoint in the output folder."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show which parameters would be trained, and stop.")
    ] = False,
    as_json: JSON = False,
    debug: Debug = False,
) -> None:
    """Train a model with a recipe.

    To use several processes: torchrun --nproc-per-node N -m owl2_hf train ...

    Options override the recipe. The output folder holds the trained model, its recipe, and the loss
    curve.
    """
    from contextlib import redirect_stdout

    from ..training.components import format_table
    from ..training.recipe import load_recipe
    from ..training.run import train as run

    given: list[str] = [] if model is None else [f"model={json.dumps(model)}"]
    given += [f"data.train={json.dumps(data)}"] if data else []
    given += (
        [f"data.image_folder={json.dumps(str(image_folder))}"] if image_folder is not None else []
    )
    given += ["data.allow_outside=true"] if allow_outside else []
    given += [f"output_dir={json.dumps(str(out))}"] if out is not None else []
    loaded = load_recipe(recipe, [*(settings or []), *given])

    def show(rows: Any) -> None:
        for line in format_table(rows).split("\n"):
            say(line, err=True)

    with redirect_stdout(sys.stderr):  # the Trainer prints its log to stdout
        report = run(loaded, resume, dry_run, show)
    if as_json:
        say_json(dataclasses.asdict(report))
    elif not dry_run:
        say(f"{report.output_dir}: {report.summary()}")


data_app = typer.Typer(help="Check training data.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(data_app, name="data")


@data_app.callback()
def _data() -> None:
    """Check training data."""


@data_app.command(name="check")
@report_mistakes
def check_data(
    file: Annotated[
        str,
        typer.Argument(
            help="Data to check: JSON or JSON lines in LLaVA's format, a folder saved by the "
            "datasets library, or the id of a data set on the Hub. Opinions may also be CSV "
            "or Parquet files, or a published data set such as koniq:FOLDER."
        ),
    ],
    image_folder: Annotated[
        Path | None,
        typer.Option(
            help="Folder that relative image paths start from. Default: the folder of the file."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder or Hub id of the model to train, to count tokens, including those of "
            "images."
        ),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="With --model: count the rows with more tokens than this, which training would "
            "truncate.",
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="Split of the data set.")] = "train",
    streaming: Annotated[
        bool,
        typer.Option(
            "--streaming", help="Stream a data set from the Hub instead of downloading it first."
        ),
    ] = False,
    allow_outside: AllowOutside = False,
    skip_pictures: Annotated[
        bool,
        typer.Option(
            "--skip-pictures", help="Only check that the image files exist. Do not open them."
        ),
    ] = False,
    opinions: Annotated[
        bool,
        typer.Option(
            "--opinions",
            help="Read rows as opinions of images (image, mos). Files of opinions are recognised "
            "without it.",
        ),
    ] = False,
    as_json: JSON = False,
    debug: Debug = False,
) -> None:
    """List the rows that cannot be used, and why. Count the other rows.

    Rows are numbered from 1. In JSON lines and CSV files the number is the line. The exit code is 1
    if a row is bad. An opinion is also bad if its image is in another split of the data set.
    Duplicates are listed.
    """
    from ..scoring.opinions import OpinionReport, check_opinions, is_opinions
    from ..training.data import DataReport, check_rows

    if model is None and max_length is not None:
        raise ValueError("--max-length needs --model, which counts the tokens.")
    if model is not None and skip_pictures:
        raise ValueError("--model opens the images: leave out --skip-pictures or --model.")
    if model is not None and opinions:
        raise ValueError("--model counts tokens of conversations: leave out --opinions or --model.")

    def show_progress(rows: int) -> None:
        if rows % 10_000 == 0:
            say(f"{rows:,} rows", err=True)

    report: OpinionReport | DataReport
    if opinions or (model is None and is_opinions(file)):
        report = check_opinions(file, image_folder, not skip_pictures, allow_outside, show_progress)
    else:
        report = check_rows(
            file,
            image_folder,
            None if model is None else load_processor(model),
            max_length,
            split,
            streaming,
            open_images=not skip_pictures,
            allow_outside=allow_outside,
            on_row=show_progress,
        )
    if as_json:
        say_json(asdict(report))
    else:
        for bad in [*report.bad, *(report.duplicates if isinstance(report, OpinionReport) else ())]:
            identity = "" if bad.id is None else f" (id {bad.id!r})"
            say(f"row {bad.row}{identity}: {' '.join(bad.reason.split())}")
        for line in report.summary().split("\n"):
            say(line)
    if report.bad:
        raise typer.Exit(1)
