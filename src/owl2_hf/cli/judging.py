"""Judge scorers by people's opinions."""

import csv
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..naming import naming_model
from .app import app, report_mistakes, say, say_json
from .loading import load, place
from .options import JSON, AllowOutside, Debug, Device, Levels, OriginalReading, Preset, Prompt


@app.command(name="evaluate-scores")
@report_mistakes
def evaluate_scores(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a model that scores.")],
    data: Annotated[
        str | None,
        typer.Argument(
            help="Opinions: CSV, JSON, JSON lines, Parquet, or a data set, with image and mos."
        ),
    ] = None,
    benchmark: Annotated[
        str | None,
        typer.Option(
            help="In place of DATA koniq, spaq, kadid, livec, agiqa, csiq, ava or lsvq, with --root."
        ),
    ] = None,
    root: Annotated[
        Path | None, typer.Option(help="Folder of the benchmark, as it was unpacked.")
    ] = None,
    image_folder: Annotated[
        Path | None,
        typer.Option(help="What paths of images start from; the file's own folder if not given."),
    ] = None,
    split: Annotated[str | None, typer.Option(help="Judge by this part of the rows alone.")] = None,
    preset: Preset = None,
    task: Annotated[
        str, typer.Option(help="quality; with one-align also aesthetics or video.")
    ] = "quality",
    levels: Levels = None,
    prompt: Prompt = None,
    splits: Annotated[
        int, typer.Option(min=0, help="Also the median over this many random fifths of the images.")
    ] = 0,
    samples: Annotated[int, typer.Option(min=1, help="Draws for the intervals.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Of splits and draws.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Images in one forward pass.")] = 8,
    original_reading: OriginalReading = False,
    allow_outside: AllowOutside = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw opinions over scores, with the fit, to this file.")
    ] = None,
    card: Annotated[
        Path | None, typer.Option(help="Write a model card with the results, a README.md.")
    ] = None,
    device: Device = None,
    as_json: JSON = False,
    as_csv: Annotated[
        bool, typer.Option("--csv", help="Print comma-separated values, the names first.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Judge a scorer by people's opinions: SRCC, KRCC, PLCC before and after the logistic fit, RMSE, with intervals.

    With standard deviations of the opinions also KL, JS and Wasserstein distances. What cannot be scored is named on
    stderr, the others count, and the exit code is 1.
    """
    from ..scoring import Scorer, custom_preset, evaluate, load_opinions
    from ..scoring.benchmarks import read_benchmark
    from ..scoring.card import check_new, write_score_card
    from ..scoring.judging import check_plot
    from ..scoring.presets import preset_for

    if as_json and as_csv:
        say("owl2-hf: give one of --json and --csv, not both", err=True)
        raise typer.Exit(2)
    if (data is None) == (benchmark is None) or (benchmark is None) != (root is None):
        say("owl2-hf: give opinions, or --benchmark with --root", err=True)
        raise typer.Exit(2)
    if plot is not None:
        check_plot(plot)
    if card is not None:
        check_new(card)
    if benchmark is not None and root is not None:
        opinions = read_benchmark(benchmark, root, split)
    else:
        opinions = load_opinions(data, image_folder, split, allow_outside)
    with naming_model(model):
        own = preset_for(place(model), preset)
    chosen = custom_preset(own, task, prompt, levels.split(",") if levels else None)
    loaded, processor = load(model)
    loaded = loaded.to(device) if device else loaded
    scorer = Scorer(
        loaded, processor, chosen, batch_size=batch_size, original_reading=original_reading
    )

    def show_progress(images: int) -> None:
        if images % 1000 == 0:
            say(f"{images:,} of {len(opinions):,} images", err=True)

    report = evaluate(scorer, opinions, task, splits, samples, seed, show_progress)
    for opinion, error in report.failed:
        say(
            f"owl2-hf: {opinions.name}: row {opinion.row}: {' '.join(str(error).split())}", err=True
        )
    if as_json:
        say_json(report.to_dict())
    elif as_csv:
        csv.writer(sys.stdout, lineterminator="\n").writerows(report.table())
    else:
        for line in report.lines():
            say(line)
    if plot is not None:
        report.plot(plot)
    if card is not None:
        name = benchmark or (Path(str(data)).name if Path(str(data)).exists() else str(data))
        write_score_card(
            card, report, chosen, name if split is None else f"{name}, part {split}", task
        )
    if report.failed:
        raise typer.Exit(1)
