"""Write the files beside the trained weights: report, versions, plot of the losses."""

import importlib.metadata
import json
from dataclasses import dataclass, field
from pathlib import Path

from .components import Parameters

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
            return f"all {self.steps} steps are already done; nothing was changed"
        parts = [f"{self.steps} steps"]
        parts += [] if self.loss is None else [f"training loss {self.loss:.4f}"]
        parts += [] if self.eval_loss is None else [f"evaluation loss {self.eval_loss:.4f}"]
        parts += [] if self.eval_srcc is None else [f"evaluation SRCC {self.eval_srcc:.4f}"]
        names = {
            "truncated": "truncated at max_length",
            "without_labels": "without a label left",
            "skipped": "skipped",
        }
        parts += [
            f"{self.counts[key]} rows {name}" for key, name in names.items() if self.counts.get(key)
        ]
        return ", ".join(parts)


def versions_json(processes: int) -> str:
    """Versions of the packages, and the number of processes of the run."""
    versions: dict[str, str | int] = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return json.dumps({**versions, "processes": processes}, indent=2) + "\n"


def plot_losses(history: list[dict[str, float]], file: Path) -> None:
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
