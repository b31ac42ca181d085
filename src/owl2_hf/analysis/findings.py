"""The numbers of an analysis, for programs, and their summary in words."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class Run:
    """One model with one image. All runs of an analysis read the same question and answer.

    Args:
        picture: "given", "unrelated" or "none".
        image: Name of the image.
        generated: What the model itself answers, greedily.
        answer_logprob: Mean log probability, in nats, of the tokens of the answer that is read, its
            end included.
        num_tokens: How many are "text", "visual", and, among the text, "answer".
        attention: Queries -> keys -> share of attention in each layer. Queries: "answer", the
            positions that predict the answer; "text", the text behind the image; "visual". Keys:
            "text" and "visual" sum to one; "first_token" is a part of the text.
        uniform: Queries -> keys -> the share if attention went to all that a position sees alike.
        norms: State -> modality -> root mean square over channels in each layer, as the median over
            tokens.
        query_shares: "queries", "class_token", "patches" -> share of the abstractor's attention in
            each layer.
        query_maps: (N, Q, G, G), each sums to one; `None` without learnable queries or image.
        squares: (N, S, S, 3) uint8, what the model sees.
        aspect_ratio: Height over width that a square is drawn with: a stretched image's own.
    """

    picture: str
    image: str | None
    generated: str
    answer_logprob: float
    num_tokens: dict[str, int]
    attention: dict[str, dict[str, list[float]]]
    uniform: dict[str, dict[str, float]]
    norms: dict[str, dict[str, list[float | None]]]
    query_shares: dict[str, list[float]] | None = None
    query_maps: np.ndarray | None = None
    squares: np.ndarray | None = None
    aspect_ratio: float = 1.0

    def to_dict(self, with_maps: bool = True) -> dict[str, Any]:
        """For JSON: all but the pixels."""
        values = {
            key: value for key, value in vars(self).items() if key not in ("query_maps", "squares")
        }
        if with_maps:
            values["query_maps"] = None if self.query_maps is None else _rounded(self.query_maps)
        return values


@dataclass
class Findings:
    """The numbers that `analyze` found. `Analysis` also saves them.

    Args:
        model: Name of the model.
        has_module: Its decoder has parts of their own for visual tokens, the modality-adaptive
            module.
        question, answer: The text that all runs read.
        is_answer_generated: The answer is the model's own to the given image.
        runs: With the given image; in the unrelated mode also with the unrelated one and with none.
        weights: Part of a layer -> "text", "visual" (root mean squares), "distance" -> number in
            each layer.
        notes: What the numbers do not say.
        without: The same of a model to compare with, usually one without the module.
    """

    model: str
    has_module: bool
    question: str
    answer: str
    is_answer_generated: bool
    runs: list[Run]
    weights: dict[str, dict[str, list[float | None]]]
    notes: list[str] = field(default_factory=list)
    without: "Findings | None" = None

    def compare_with(self, other: "Findings") -> None:
        """Put the analysis of another model, which read the same question and answer, beside this
        one.
        """
        self.without = other
        if other.has_module:
            other.notes.append(
                "Expected a second model without the modality-adaptive module, but this one has it."
            )

    def to_dict(self, with_maps: bool = True) -> dict[str, Any]:
        """For JSON.

        Args:
            with_maps: Include the maps of the queries, by far the most numbers.
        """
        return {
            **vars(self),
            "runs": [run.to_dict(with_maps) for run in self.runs],
            "without": self.without and self.without.to_dict(with_maps),
        }

    def summary(self) -> list[str]:
        """Lines for a person: the answers, and the attention of the answer that is read."""
        lines = [
            f"{self.model} ({'with' if self.has_module else 'without'} the modality-adaptive "
            "module)"
        ]
        for run in self.runs:
            picture = "no" if run.picture == "none" else run.picture
            lines.append(
                f"  {picture} image: {run.generated!r}; log probability of the answer "
                f"{run.answer_logprob:.3f}"
            )
            if run.picture != "none":
                shares = " ".join(f"{share:.3f}" for share in run.attention["answer"]["visual"])
                uniform = run.uniform["answer"]["visual"]
                lines.append(
                    f"    attention on visual tokens by layer: {shares} (uniform: {uniform:.3f})"
                )
        lines += [f"  {note}" for note in self.notes]
        return lines + (self.without.summary() if self.without else [])


def _rounded(maps: np.ndarray) -> Any:
    """Six significant digits, which a reader of 65 thousand numbers does not miss."""
    return np.vectorize(lambda value: float(f"{value:.6g}"))(maps).tolist()
