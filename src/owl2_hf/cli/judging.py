"""Compare scorers with people's opinions."""

import csv
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .app import app, report_mistakes, say, say_json
from .loading import load, preset_of
from .options import JSON, AllowOutside, Debug, Device, Levels, OriginalReading, Preset, Prompt

if TYPE_CHECKING:  # they import torch, which takes seconds
    from ..evaluation.qbench import QBenchReport
    from ..scoring.judging import Evaluation

# Options that do not apply to questions.
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
            help="Folder or Hub id of a scorer, or default-scorer for the scorer in the package."
        ),
    ],
    data: Annotated[
        str | None,
        typer.Argument(
            help="Opinions: a CSV, JSON, JSON lines or Parquet file, or a data set, with the "
            "columns image and mos."
        ),
    ] = None,
    benchmark: Annotated[
        str | None,
        typer.Option(
            help="Published data set to use instead of DATA: koniq, spaq, kadid, livec, agiqa, "
            "csiq, ava, lsvq, or qbench (questions). Needs --root."
        ),
    ] = None,
    root: Annotated[
        Path | None, typer.Option(help="Folder that the benchmark was unpacked to.")
    ] = None,
    image_folder: Annotated[
        Path | None,
        typer.Option(
            help="Folder that relative image paths start from. Default: the folder of the file."
        ),
    ] = None,
    split: Annotated[str | None, typer.Option(help="Use only the rows of this split.")] = None,
    preset: Preset = None,
    task: Annotated[
        str,
        typer.Option(help="What to score: quality, or with one-align also aesthetics or video."),
    ] = "quality",
    levels: Levels = None,
    prompt: Prompt = None,
    splits: Annotated[
        int,
        typer.Option(
            min=0,
            help="Also report the median over this many random samples of 20 % of the images.",
        ),
    ] = 0,
    samples: Annotated[
        int, typer.Option(min=1, help="Bootstrap samples for the confidence intervals.")
    ] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Seed for --splits and the bootstrap.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Images in one forward pass.")] = 8,
    original_reading: OriginalReading = False,
    allow_outside: AllowOutside = False,
    plot: Annotated[
        Path | None,
        typer.Option(help="File to plot opinions against scores to, with the logistic fit."),
    ] = None,
    card: Annotated[
        Path | None,
        typer.Option(help="File to write a model card with the results to, usually README.md."),
    ] = None,
    hub_benchmark: Annotated[
        str | None,
        typer.Option(
            help="Id of a benchmark data set on the Hub. Write the results for it to "
            ".eval_results in the model's folder."
        ),
    ] = None,
    hub_task: Annotated[
        list[str] | None,
        typer.Option(
            help="Task of --hub-benchmark, as TASK=STATISTIC. Repeat the option for more tasks. "
            "Default: srcc and plcc."
        ),
    ] = None,
    device: Device = None,
    as_json: JSON = False,
    as_csv: Annotated[
        bool, typer.Option("--csv", help="Print comma-separated values with a header line.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Compare a scorer's scores with people's opinions.

    Report SRCC, KRCC, PLCC before and after a logistic fit, and RMSE, with confidence intervals.

    If the opinions have standard deviations, also report KL, JS and Wasserstein distances. For
    qbench, report the accuracy of the answers. Images that cannot be scored are named on stderr and
    left out, and the exit code is 1.
    """
    from ..scoring import Scorer, evaluate, load_opinions
    from ..scoring.benchmarks import read_benchmark
    from ..scoring.card import check_new, write_score_card
    from ..scoring.eval_results import TASKS, check_eval_results, write_eval_results
    from ..scoring.judging import check_plot

    if as_json and as_csv:
        say("owl2-hf: use --json or --csv, not both", err=True)
        raise typer.Exit(2)
    if (data is None) == (benchmark is None) or (benchmark is None) != (root is None):
        say("owl2-hf: pass a file of opinions, or --benchmark with --root", err=True)
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
    chosen = preset_of(model, preset, task, prompt, levels)
    loaded, processor = load(model, device)
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
    _say_report(report, as_json, as_csv)
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
        # Compared by name, because some releases of typer bundle their own click.
        if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
    ]
    if given:
        say(
            f"owl2-hf: these options do not apply to qbench: leave out {', '.join(given)}", err=True
        )
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
    loaded, processor = load(model, device)

    def show_progress(asked: int) -> None:
        if asked % 100 < batch_size:
            say(f"{asked:,} of {len(questions):,} questions", err=True)

    report = evaluate_qbench(loaded, processor, questions, batch_size, samples, seed, show_progress)
    for question, error in report.failed:
        say(f"owl2-hf: qbench: row {question.row}: {' '.join(str(error).split())}", err=True)
    _say_report(report, as_json, as_csv)
    if report.failed:
        raise typer.Exit(1)


def _say_report(report: "Evaluation | QBenchReport", as_json: bool, as_csv: bool) -> None:
    """Print a report in the form that was asked for."""
    if as_json:
        say_json(report.to_dict())
    elif as_csv:
        csv.writer(sys.stdout, lineterminator="\n").writerows(report.table())
    else:
        for line in report.lines():
            say(line)
