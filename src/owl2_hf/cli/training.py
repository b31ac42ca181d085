"""Train models, and check what they are trained on."""

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
            help="YAML file, or one of pretrain, instruct, lora, qlora, visual-branch, score, score-lora, score-soft, "
            "score-soft-lora."
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder or Hub id to train; default or default-scorer for a bundled one."
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Rows to train on: .json, .jsonl, a saved data set or Hub id; opinions for a scorer; repeatable."
        ),
    ] = None,
    image_folder: Annotated[
        Path | None,
        typer.Option(
            help="Where relative paths of images start; the folder of the file if not given."
        ),
    ] = None,
    allow_outside: AllowOutside = False,
    out: Annotated[Path | None, typer.Option(help="Folder to make.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="key=value of the recipe, for instance trainer.max_steps=100."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint of the folder.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would train; take no step.")
    ] = False,
    as_json: JSON = False,
    debug: Debug = False,
) -> None:
    """Train a model as a recipe says; several processes: torchrun --nproc-per-node N -m owl2_hf train ...

    Options win over the recipe. The folder holds the trained model, its recipe, and the curve of the losses.
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

    with redirect_stdout(sys.stderr):  # where the Trainer's log belongs
        report = run(loaded, resume, dry_run, show)
    if as_json:
        say_json(dataclasses.asdict(report))
    elif not dry_run:
        say(f"{report.output_dir}: {report.summary()}")


data_app = typer.Typer(help="Training data.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(data_app, name="data")


@data_app.callback()
def _data() -> None:
    """Training data."""


@data_app.command(name="check")
@report_mistakes
def check_data(
    file: Annotated[
        str,
        typer.Argument(
            help="LLaVA's JSON, JSON lines, a folder saved by datasets, or the id of a data set on "
            "the Hub; opinions also as CSV or Parquet, or as koniq:FOLDER and other published data "
            "sets."
        ),
    ],
    image_folder: Annotated[
        Path | None,
        typer.Option(help="What paths of images start from; the file's own folder if not given."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder or Hub id of the model to train: also counts tokens, images included."
        ),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(min=1, help="With --model: count rows that this many positions truncate."),
    ] = None,
    split: Annotated[str, typer.Option(help="Split of a data set that has several.")] = "train",
    streaming: Annotated[
        bool, typer.Option("--streaming", help="Read a data set of the Hub as it arrives.")
    ] = False,
    allow_outside: AllowOutside = False,
    skip_pictures: Annotated[
        bool,
        typer.Option(
            "--skip-pictures", help="Do not open images, only see whether the files are there."
        ),
    ] = False,
    opinions: Annotated[
        bool,
        typer.Option(
            "--opinions", help="Rows are opinions of images (image, mos); files are recognised."
        ),
    ] = False,
    as_json: JSON = False,
    debug: Debug = False,
) -> None:
    """Name every row that cannot be learned from, and why, and count the others.

    Rows are numbered from 1, rows of JSON lines and CSV by their line. The exit code is 1 where rows are bad. An
    opinion is bad, too, where its image is in another part of the data set; duplicates are named.
    """
    from ..scoring.opinions import OpinionReport, check_opinions, is_opinions
    from ..training.data import DataReport, check_rows

    if model is None and max_length is not None:
        raise ValueError("--max-length counts tokens, which needs --model.")
    if model is not None and skip_pictures:
        raise ValueError("--model looks into images: leave out --skip-pictures, or --model.")
    if model is not None and opinions:
        raise ValueError(
            "--model counts tokens of conversations: leave out --opinions, or --model."
        )

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
