"""Write results of an evaluation for the Hub, to the folder `.eval_results` of a model.

The Hub puts the values on the model's page and on the leaderboard of a benchmark, a data set that
defines its tasks in `eval.yaml`. Source: the Hub's documentation, "Evaluation Results"
(huggingface.co/docs/hub/eval-results).
"""

from collections.abc import Collection, Sequence
from datetime import datetime, timezone
from pathlib import Path

import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml
from huggingface_hub.utils import validate_repo_id

from .judging import AGREEMENT, DISTANCES, FITTED, Evaluation

FOLDER = ".eval_results"
TASKS = ("srcc", "plcc")


def check_eval_results(
    folder: str | Path, benchmark: str, tasks: Sequence[str], datasets: Collection[str]
) -> tuple[Path, dict[str, str]]:
    """Whether results can be written, before anything is scored.

    Args:
        folder, benchmark, tasks: As for `write_eval_results`.
        datasets: Names of the data sets that the opinions are of.

    Returns:
        The file, and task -> statistic.

    Raises:
        ValueError: See `write_eval_results`.
    """
    validate_repo_id(benchmark)
    if not Path(folder).is_dir():
        raise ValueError(
            f"expected the folder of a model to write {FOLDER} to, got {str(folder)!r}: download "
            "the model first."
        )
    if len(datasets) != 1:
        raise ValueError(
            f"expected opinions of one data set for the benchmark {benchmark}, got "
            f"{len(datasets)} ({', '.join(map(repr, datasets))}): evaluate each separately."
        )
    known = [*AGREEMENT, *FITTED, *DISTANCES]
    statistics: dict[str, str] = {}
    for task in tasks:
        name, _, statistic = task.partition("=")
        if not name or name in statistics or (statistic or name) not in known:
            raise ValueError(
                f"expected TASK=STATISTIC, each task once and a statistic of {', '.join(known)}, "
                f"got {task!r}."
            )
        statistics[name] = statistic or name
    file = Path(folder) / FOLDER / f"{benchmark.replace('/', '--')}.yaml"
    if file.exists():
        raise ValueError(f"{file} already exists: remove it to write new results.")
    return file, statistics


def write_eval_results(
    folder: str | Path,
    report: Evaluation,
    benchmark: str,
    tasks: Sequence[str] = TASKS,
    notes: str = "",
) -> Path:
    """Write the results of one data set to `.eval_results` in a model's folder.

    `owl2-hf push` uploads the file as well.

    Args:
        folder: Of the model.
        report: What `evaluate` found.
        benchmark: Id of the data set on the Hub that the opinions are from, such as `me/photos`.
        tasks: Tasks of the benchmark's `eval.yaml`, each as `TASK=STATISTIC`, or only the name
            where both are the same.
        notes: How the model was asked. The number of images and the interval of each value are
            added.

    Returns:
        The file, with one entry for each task.

    Raises:
        ValueError: If the benchmark is no id, the folder or a statistic does not exist, the report
            is of several data sets, or the file is there already.
    """
    datasets = [one.dataset for one in report.judgements]
    file, statistics = check_eval_results(folder, benchmark, tasks, datasets)
    [judgement] = report.judgements
    today = datetime.now(timezone.utc).date().isoformat()
    entries = []
    for task, name in statistics.items():
        found = judgement.statistics.get(name)
        if found is None or found.value != found.value:  # NaN
            raise ValueError(f"task {task!r}: {name} is not defined for these opinions and scores.")
        own = f"{judgement.images:,} images, 95 % interval {found.low:.4f} to {found.high:.4f}"
        entries.append(
            EvalResultEntry(
                dataset_id=benchmark,
                task_id=task,
                value=round(found.value, 6),
                date=today,
                notes=f"{own}; {notes}" if notes else own,
            )
        )
    file.parent.mkdir(exist_ok=True)
    text = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False, width=1000)
    file.write_text(text, encoding="utf-8")
    return file
