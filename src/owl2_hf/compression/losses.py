"""Measure what a model loses when its weights are rounded: in its scores, or in its answers."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..modeling.modeling_mplug_owl2 import MplugOwl2ForConditionalGeneration
from ..processing.processing_mplug_owl2 import MplugOwl2Processor
from ..scoring import Scorer
from ..scoring.frames import expand_paths
from ..scoring.judging import evaluate
from ..scoring.opinions import Opinions
from ..scoring.presets import own_preset

QUESTIONS = ("What is this?", "What kind of thing is it?", "Is it an animal?", "What color is it?")
MAX_NEW_TOKENS = 24
_STATISTICS = {"srcc": "SRCC", "plcc": "PLCC"}


@dataclass(frozen=True)
class Findings:
    """What a model says of the images.

    Args:
        values: Scores, or answers, in the order of the images.
        statistics: Name -> agreement of the scores with people's opinions, where there are any.
    """

    values: list[Any]
    statistics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Losses:
    """What a model said before its weights were rounded, and after.

    Args:
        subject: What was asked about, in words.
        before: What the whole model says.
        after: What the compressed one says.
        is_scorer: These are scores; else answers.
    """

    subject: str
    before: Findings
    after: Findings
    is_scorer: bool

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        if not self.is_scorer:
            return {"answers": len(self.before.values), "same answers": self._same()}
        changes = self._changes()
        statistics = {
            name: {"before": value, "after": self.after.statistics[name]}
            for name, value in self.before.statistics.items()
        }
        return {
            "images": len(changes),
            **statistics,
            "mean change of a score": float(changes.mean()),
            "largest change of a score": float(changes.max()),
        }

    def lines(self) -> list[str]:
        """For people."""
        if not self.is_scorer:
            return [f"{self._same()} of {len(self.before.values)} greedy answers are the same"]
        lines = [
            f"{name} {value:.4f} before, {self.after.statistics[name]:.4f} after"
            for name, value in self.before.statistics.items()
        ]
        changes = self._changes()
        return [
            *lines,
            f"a score changes by {changes.mean():.4f} on average, by {changes.max():.4f} at most",
        ]

    def _same(self) -> int:
        pairs = zip(self.before.values, self.after.values, strict=True)
        return sum(one == other for one, other in pairs)

    def _changes(self) -> np.ndarray:
        """(N,) absolute differences of the scores."""
        return np.abs(np.subtract(self.before.values, self.after.values))


class Trial:
    """The same questions for the whole model and for the compressed one.

    Args:
        model: The whole one; one that has a scorer.json beside it scores, any other answers.
        opinions: What people think of images, for a scorer.
        images: Files and folders; those of the bundled model if none are given.
        questions: Asked about each image, of a model that answers.
        split: Part of the opinions that was read, for the card.

    Raises:
        ValueError: There are no such images, or opinions are given for a model that does not score.
    """

    def __init__(
        self,
        model: MplugOwl2ForConditionalGeneration,
        opinions: Opinions | None = None,
        images: Sequence[str] = (),
        questions: Sequence[str] = QUESTIONS,
        split: str | None = None,
    ):
        self.preset = own_preset(model)
        if opinions is not None and self.preset is None:
            raise ValueError(
                "opinions need a scorer, got a model without scorer.json: use images instead, or "
                "convert it with --preset."
            )
        self.opinions, self.questions = opinions, questions
        self.part = "" if split is None else f", part {split}"
        self.images = expand_paths(list(images))[1] if images else self._bundled()
        self.subject = self._words(bundled=not images)

    def _bundled(self) -> list[str]:
        from ..default import default_pictures
        from ..default_scorer import default_scorer_images

        bundled = default_pictures() if self.preset is None else default_scorer_images()
        return [str(path) for path in bundled.values()]

    def _words(self, bundled: bool) -> str:
        if self.opinions is not None:
            return f"{len(self.opinions):,} images of {Path(self.opinions.name).name}{self.part}"
        kind = "bundled images" if bundled else "images"
        asked = "" if self.preset is not None else f", {len(self.questions)} questions about each"
        return f"{len(self.images):,} {kind}{asked}"

    def __call__(
        self, model: MplugOwl2ForConditionalGeneration, processor: MplugOwl2Processor
    ) -> Findings:
        """What a model says.

        Raises:
            ValueError: An image cannot be read, or the model gives NaN.
        """
        if self.preset is None:
            return Findings(
                [answer for image in self.images for answer in self._ask(model, processor, image)]
            )
        scorer = Scorer(model, processor, self.preset)
        task = "quality" if "quality" in self.preset.prompts else next(iter(self.preset.prompts))
        if self.opinions is None:
            return Findings([one.score for one in scorer(self.images, task)])
        report = evaluate(scorer, self.opinions, task, samples=1)
        for opinion, error in report.failed:
            raise ValueError(f"{self.opinions.name}: row {opinion.row}: {error}")
        statistics = {
            f"{words}, {one.dataset}" if one.dataset else words: one.statistics[name].value
            for one in report.judgements
            for name, words in _STATISTICS.items()
        }
        return Findings([score.score for _, score in report.scored], statistics)

    def _ask(
        self, model: MplugOwl2ForConditionalGeneration, processor: MplugOwl2Processor, image: str
    ) -> list[str]:
        """Greedy answers to all questions about one image."""
        answers = []
        for question in self.questions:
            parts = [{"type": "image", "image": image}, {"type": "text", "text": question}]
            inputs = processor.apply_chat_template(
                [{"role": "user", "content": parts}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            ).to(model.device, dtype=model.dtype)
            ids = model.generate(**inputs, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
            new = ids[0, inputs["input_ids"].shape[1] :]
            answers.append(processor.decode(new, skip_special_tokens=True).strip())
        return answers
