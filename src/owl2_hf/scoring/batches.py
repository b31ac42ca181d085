"""Batches of rows: any process decodes and prepares them, the one with the model scores them."""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from torch.utils.data import Dataset

from .frames import read_frames
from .scorer import Score, Scorer
from .sources import HubFile, Member, Row

PREFIX = "input_"  # for a column of the data set that has the name of an output column
# Batches are prepared on the CPU, wherever the model is.
_NO_MODEL: Any = SimpleNamespace(device="cpu")


@dataclass(frozen=True)
class Prepared:
    """A batch as a worker process hands it over.

    Args:
        errors: Of each row, `None` where it has an image.
        inputs: Of the model, for the rows that have an image; decoded images where crops are to be
            cut.
    """

    errors: list[str | None]
    inputs: Any


class Preparation(Dataset[Any]):
    """What worker processes do: a batch of rows -> what the model takes."""

    def __init__(self, scorer: Scorer, task: str):
        self.scorer = copy.copy(scorer)
        self.scorer.model = _NO_MODEL
        self.is_video, self.prompt = task == "video", scorer._prompt(task)

    def __getitem__(self, rows: list[Row]) -> Prepared:
        frames: list[list[Any]] = []
        errors: list[str | None] = []
        for row in rows:
            try:
                frames.append(self._open(row.image))
                errors.append(None)
            except (ValueError, OSError) as error:
                errors.append(" ".join(str(error).split()))
        if not frames:
            return Prepared(errors, None)
        if self.scorer.crops:
            return Prepared(errors, [image for (image,) in frames])
        return Prepared(errors, self.scorer._inputs(frames, self.prompt))

    def _open(self, image: Any) -> list[Any]:
        if isinstance(image, ValueError):
            raise image
        if isinstance(image, (HubFile, Member)):
            image = image.read()
        frames = read_frames(image) if self.is_video else [image]
        return [self.scorer.open_image(frame) for frame in frames]


class BatchScorer:
    """Scores of batches of rows, each row with its score or what is wrong with it."""

    def __init__(self, scorer: Scorer, task: str):
        self.scorer, self.task = scorer, task
        self.prepare = Preparation(scorer, task)
        self.has_score = False

    def scores(self, rows: Sequence[Row], prepared: Prepared) -> list[Score | str]:
        """Scores of what `prepare` made of these rows.

        Raises:
            ValueError: If the model gives NaN for everything that it has seen.
        """
        found = iter(self._read(rows, prepared))
        return [next(found) if error is None else error for error in prepared.errors]

    def _read(self, rows: Sequence[Row], prepared: Prepared) -> list[Score | str]:
        """Of the rows that have an image."""
        if prepared.inputs is None:
            return []
        scores: list[Score | str]
        try:
            if self.scorer.crops:
                scores = [*self.scorer(prepared.inputs, self.task)]
            else:
                inputs = prepared.inputs.to(self.scorer.model.device)
                scores = [*self.scorer.score_prepared(inputs)]
        except ValueError as error:
            if len(rows) == 1:
                return [str(error)]
            alone = [(row, self.prepare[[row]]) for row in rows]
            scores = [found for row, one in alone for found in self._read([row], one)]
            if not self.has_score and all(isinstance(found, str) for found in scores):
                raise  # it is the model, not an image
        self.has_score = self.has_score or any(isinstance(found, Score) for found in scores)
        return scores


def as_columns(score: Score | str) -> dict[str, Any]:
    """A row's own columns of the output."""
    if not isinstance(score, Score):
        return {"error": score}
    return {
        "score": score.score,
        "std": score.std,
        **dict(zip(score.levels, score.probs, strict=True)),
    }


def output_names(columns: Iterable[str], scorer: Scorer) -> dict[str, str]:
    """Columns of a data set -> their names in the output, where the score's own come first."""
    own = ("image", "score", "std", *scorer.levels, "error")
    return {name: f"{PREFIX}{name}" if name in own else name for name in columns}
