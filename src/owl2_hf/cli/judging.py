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

# Options without a meaning for questions.
_OF_SCORES = (
    *("image_folder", "preset", "task", "levels", "prompt", "splits", "original_reading"),
    *("allow_outside", "plot", "card"),
)


@app.command(name="evaluate-scores")
@report_mistakes
def evaluate_scores(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            help="Folder or Hub id of a model that scores, or default-scorer for the one inside the package."
        ),
    ],
    data: Annotated[
        str | None,
        typer.Argument(
            help="Opinions: CSV, JSON, JSON lines, Parquet, or a data set, with image and mos."
        ),
    ] = None,
    benchmark: Annotated[
        str | None,
        typer.Option(
            help="In place of DATA koniq, spaq, kadid, livec, agiqa, csiq, ava or lsvq, or the "
            "questions of qbench; with --root."
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
    hub_benchmark: Annotated[
        str | None,
        typer.Option(
            help="Write the results to .eval_results in the model's folder, for this data set of the Hub."
        ),
    ] = None,
    hub_task: Annotated[
        list[str] | None,
        typer.Option(
            help="Task of --hub-benchmark, as TASK=STATISTIC, once for each; srcc and plcc if not given."
        ),
    ] = None,
    device: Device = None,
    as_json: JSON = False,
    as_csv: Annotated[
        bool, typer.Option("--csv", help="Print comma-separated values, the names first.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Judge a scorer by people's opinions: SRCC, KRCC, PLCC before and after the logistic fit, RMSE, with intervals.

    With standard deviations of the opinions also KL, JS and Wasserstein distances. Of qbench the
    accuracy of the answers. What cannot be scored is named on stderr, the others count, and the
    exit code is 1.
    """
    from ..scoring import Scorer, custom_preset, evaluate, load_opinions
    from ..scoring.benchmarks import read_benchmark
    from ..scoring.card import check_new, write_score_card
    from ..scoring.eval_results import TASKS, check_eval_results, write_eval_results
    from ..scoring.judging import check_plot
    from ..scoring.presets import preset_for

    if as_json and as_csv:
        say("owl2-hf: give one of --json and --csv, not both", err=True)
        raise typer.Exit(2)
    if (data is None) == (benchmark is None) or (benchmark is None) != (root is None):
        say("owl2-hf: give opinions, or --benchmark with --root", err=True)
        raise typer.Exit(2)
    if benchmark == "qbench" and root is not None:
        _refuse_options(context, _OF_SCORES)
        _evaluate_qbench(
            model, root, split or "dev", samples, seed, batch_size, device, as_json, as_csv
        )
        return
    if plot is not None:
        check_plot(plot)
    if card is not None:
        check_new(card)
    if benchmark is not None and root is not None:
        opinions = read_benchmark(benchmark, root, split)
    else:
        opinions = load_opinions(data, image_folder, split, allow_outside)
    tasks = hub_task or TASKS
    if hub_benchmark is not None:
        check_eval_results(model, hub_benchmark, tasks, list(opinions.by_dataset()))
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
    if hub_benchmark is not None:
        write_eval_results(model, report, hub_benchmark, tasks, f"task {task}")
    if report.failed:
        raise typer.Exit(1)


def _refuse_options(context: typer.Context, names: tuple[str, ...]) -> None:
    given = [
        f"--{name.replace('_', '-')}"
        for name in names
        # By its name: some releases of typer carry a click of their own.
        if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
    ]
    if given:
        say(f"owl2-hf: qbench asks questions: leave out {', '.join(given)}", err=True)
        raise typer.Exit(2)


def _evaluate_qbench(
    model: str,
    root: Path,
    split: str,
    samples: int,
    seed: int,
    batch_size: int,
    device: str | None,
    as_json: bool,
    as_csv: bool,
) -> None:
    """Ask the questions of Q-Bench, and print how many answers are right."""
    from ..evaluation.qbench import evaluate_qbench, load_questions

    questions = load_questions(root, split)
    loaded, processor = load(model)
    loaded = loaded.to(device) if device else loaded

    def show_progress(asked: int) -> None:
        if asked % 100 < batch_size:
            say(f"{asked:,} of {len(questions):,} questions", err=True)

    report = evaluate_qbench(loaded, processor, questions, batch_size, samples, seed, show_progress)
    for question, error in report.failed:
        say(f"owl2-hf: qbench: row {question.row}: {' '.join(str(error).split())}", err=True)
    if as_json:
        say_json(report.to_dict())
    elif as_csv:
        csv.writer(sys.stdout, lineterminator="\n").writerows(report.table())
    else:
        for line in report.lines():
            say(line)
    if report.failed:
        raise typer.Exit(1)
