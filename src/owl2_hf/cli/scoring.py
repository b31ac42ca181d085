"""Score images and videos."""

import csv
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from ..naming import DEFAULT_SCORER
from ..printing import printable
from .app import app, report_mistakes, say, say_json
from .loading import load, preset_of
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
            help="Images, folders of images, or videos. With --task video also folders of "
            "videos, or a folder of one video's frames. With --out also globs, CSV and "
            "Parquet lists, tar files, and data sets of the datasets library. Default: two "
            "images in the package."
        ),
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            help="Folder or Hub id of a scorer, or default-scorer for the small scorer in the "
            "package."
        ),
    ] = DEFAULT_SCORER,
    preset: Preset = None,
    task: Annotated[
        str,
        typer.Option(
            help="What to score: quality, or with one-align also aesthetics or video. quality "
            "scores each frame of a video; video gives one score for a video."
        ),
    ] = "quality",
    scale: Annotated[
        Scale | None, typer.Option(help="Lowest and highest score. Default: the preset's.")
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
            help="Score square crops of the image at full resolution and average them. Slower, "
            "and not how the papers score.",
        ),
    ] = False,
    original_reading: OriginalReading = False,
    device: Device = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object per line, one for each image.")
    ] = False,
    as_csv: Annotated[
        bool, typer.Option("--csv", help="Print comma-separated values with a header line.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="File to write, .csv or .parquet. Use it for whole data sets: worker processes "
            "decode images, and an interrupted run can continue."
        ),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="With --out: start again and replace earlier results."),
    ] = False,
    column: Annotated[
        str | None,
        typer.Option(help="With --out: name of the image column in a list. Default: image."),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="With --out: split of a data set. Default: all splits.")
    ] = None,
    image_folder: Annotated[
        Path | None,
        typer.Option(
            help="With --out: folder that relative paths in a list start from. Default: the "
            "folder of the list."
        ),
    ] = None,
    allow_outside: AllowOutside = False,
    workers: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="With --out: number of processes that decode images. Default: half the "
            "processors, at most 8.",
        ),
    ] = None,
    part_rows: Annotated[
        int | None,
        typer.Option(min=1, help="With --out: number of rows to write at a time. Default: 128."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Score images or videos.

    The model gives a probability to each level word, such as good or poor. The score is the mean
    value of the levels.

    The scorer in the package tells degraded images from sharp ones. It was not trained on people's
    opinions. From a video, one frame per second is scored.

    Files that cannot be read are named on stderr and left out, and the exit code is 1. With --out,
    they are named in the column error, and the exit code is 0.

    With --out, several processes can share the rows: torchrun --nproc-per-node N -m owl2_hf score
    ...
    """
    from ..scoring import Scorer, score_paths
    from ..scoring.parts import check_kind

    if as_json and as_csv:
        say("owl2-hf: use --json or --csv, not both", err=True)
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
            raise ValueError("the file name in --out sets the format: leave out --json and --csv.")
    chosen = preset_of(model, preset, task, prompt, levels)
    bounds = None if scale is None else tuple(float(bound) for bound in scale.value.split("-"))
    if out is not None:
        from ..scoring.dataset import local_device

        device = device or local_device()
    loaded, processor = load(model, device)
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
