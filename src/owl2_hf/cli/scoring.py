"""Score images and videos."""

import csv
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from ..naming import DEFAULT_SCORER, naming_model
from ..printing import printable
from .app import app, report_mistakes, say, say_json
from .loading import load, place
from .options import AllowOutside, Debug, Device, Levels, OriginalReading, Preset, Prompt


class Scale(str, Enum):
    """Scales of `score`."""

    one_to_five = "1-5"
    zero_to_one = "0-1"


@app.command()
@report_mistakes
def score(
    images: Annotated[
        list[str] | None,
        typer.Argument(
            help="Images, folders of images, videos; for task video also folders of videos or of a video's frames. "
            "With --out also globs, CSV and Parquet lists, tar files, and data sets of the package datasets. "
            "Two images inside the package if none are given."
        ),
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            help="Folder or Hub id of a model that scores; the small scorer inside the package if not given."
        ),
    ] = DEFAULT_SCORER,
    preset: Preset = None,
    task: Annotated[
        str,
        typer.Option(
            help="quality, for a video of each frame; with one-align also aesthetics or video."
        ),
    ] = "quality",
    scale: Annotated[
        Scale | None, typer.Option(help="Lowest and highest score; the preset's if not given.")
    ] = None,
    levels: Levels = None,
    prompt: Prompt = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Images or crops in one forward pass.")
    ] = 8,
    crops: Annotated[
        bool,
        typer.Option(
            "--crops",
            help="Average over squares at the image's own resolution; not how the papers score, and slower.",
        ),
    ] = False,
    original_reading: OriginalReading = False,
    device: Device = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a JSON object in a line for each image.")
    ] = False,
    as_csv: Annotated[
        bool, typer.Option("--csv", help="Print comma-separated values, the names first.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Write a .csv or .parquet file, for a whole data set: decoded ahead, resumed after an interruption."
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="With --out: begin anew, whatever is there.")
    ] = False,
    column: Annotated[
        str | None, typer.Option(help="With --out: the column of a list that holds images; image.")
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="With --out: part of a data set; all parts if not given.")
    ] = None,
    image_folder: Annotated[
        Path | None,
        typer.Option(help="With --out: where a list's paths start; the list's own folder."),
    ] = None,
    allow_outside: AllowOutside = False,
    workers: Annotated[
        int | None,
        typer.Option(min=0, help="With --out: processes that decode images; half the processors."),
    ] = None,
    part_rows: Annotated[
        int | None,
        typer.Option(min=1, help="With --out: rows that are written together; 128."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Score images or videos by the probabilities of level words.

    The scorer inside the package tells degraded images from sharp ones; it learned no people's opinions.
    Of a video one frame a second counts. What cannot be read is named on stderr, the others are scored, and the exit
    code is 1. With --out it is named in the column error, and the exit code is 0; several processes share the rows:
    torchrun --nproc-per-node N -m owl2_hf score ...
    """
    from ..scoring import Scorer, custom_preset, score_paths
    from ..scoring.parts import check_kind
    from ..scoring.presets import preset_for

    if as_json and as_csv:
        say("owl2-hf: give one of --json and --csv, not both", err=True)
        raise typer.Exit(2)
    if not images:
        from ..default_scorer import default_scorer_images

        images = [str(path) for path in default_scorer_images().values()]
    options = {
        "column": column,
        "split": split,
        "image_folder": image_folder,
        "allow_outside": allow_outside or None,
        "num_workers": workers,
        "part_rows": part_rows,
        "overwrite": overwrite or None,
    }
    options = {name: value for name, value in options.items() if value is not None}
    if out is None and options:
        name = next(iter(options)).replace("num_", "").replace("_", "-")
        raise ValueError(f"--{name} needs --out, the file to write.")
    if out is not None:
        check_kind(out)
        if as_json or as_csv:
            raise ValueError("the name of --out tells the format: leave out --json and --csv.")
    with naming_model(model):
        own = preset_for(place(model), preset)
    chosen = custom_preset(own, task, prompt, levels.split(",") if levels else None)
    bounds = None if scale is None else tuple(float(bound) for bound in scale.value.split("-"))
    loaded, processor = load(model)
    if out is not None:
        from ..scoring.dataset import local_device

        device = device or local_device()
    loaded = loaded.to(device) if device else loaded
    scorer = Scorer(loaded, processor, chosen, bounds, batch_size, crops, original_reading)  # type: ignore[arg-type]
    if out is not None:
        _score_dataset(scorer, images, out, task, options)
        return
    table = csv.writer(sys.stdout, lineterminator="\n")
    if as_csv:
        sys.stdout.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]  # names keep their bytes
        table.writerow(["image", "score", "std", *scorer.levels])
    failed = 0
    for name, found in score_paths(scorer, images, task):
        if isinstance(found, ValueError):
            failed += 1
            message = " ".join(str(found).split())
            say(f"owl2-hf: {message if name in message else f'{name}: {message}'}", err=True)
        elif as_json:
            say_json({"image": name, **vars(found)})
        elif as_csv:
            shown = printable(name) if sys.stdout.isatty() else name
            table.writerow(
                [shown, *(f"{value:.6f}" for value in (found.score, found.std, *found.probs))]
            )
        else:
            low, high = found.scale
            say(f"{found.score:.4f} of {low:g} to {high:g}, std {found.std:.4f}  {name}")
    if failed:
        raise typer.Exit(1)


def _score_dataset(
    scorer: Any, images: list[str], out: Path, task: str, options: dict[str, Any]
) -> None:
    from ..scoring.dataset import score_dataset

    summary = score_dataset(scorer, images, out, task, **options)
    if summary is not None:
        before = f", {summary.found:,} of them scored before" if summary.found else ""
        errors = (
            f", {summary.errors:,} without a score: see the column error" if summary.errors else ""
        )
        say(f"{summary.rows:,} rows in {out}{before}{errors}", err=True)
