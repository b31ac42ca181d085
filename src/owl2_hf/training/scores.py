"""Training data of scorers: batches of single opinions or pairs, with soft labels.

Sources: Q-Align (arXiv:2312.17090) and DeQA-Score (arXiv:2501.11561) with their released code. B:
images, K: levels.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ..processing.processing_mplug_owl2 import MplugOwl2Processor
from ..scoring import IMAGE_TOKEN, Preset
from ..scoring.frames import is_video_path
from ..scoring.labels import hard_level, soft_label
from ..scoring.opinions import Opinion, load_opinions
from ..scoring.scorer import level_id
from .bad_rows import look_over
from .collator import IGNORED, Collator
from .messages import ORIGIN
from .recipe import Recipe, ScoreRecipe
from .rows import Row

_PARTS = ("level_probs", "mos", "mos_stds", "datasets")


@dataclass(frozen=True)
class _Group:
    """Opinions of one data set: pairs are drawn within it."""

    source: str
    name: str
    rows: tuple[Opinion, ...]
    bounds: tuple[float, float]
    density: str


class ScoreRows(Dataset[Row]):
    """Opinions as rows to train or evaluate on.

    Args:
        groups: The data sets.
        recipe: Levels, questions and answer.
        weights: How often each data set counts; of a fraction a fixed random share of the rows.
        seed: Of questions, shares and pairs.
        in_pairs: Each row comes with a second one of its data set, another one in each epoch.
        asks_first: All rows have the first question.
    """

    def __init__(
        self,
        groups: Sequence[_Group],
        recipe: ScoreRecipe,
        weights: Sequence[float] = (),
        seed: int = 0,
        in_pairs: bool = False,
        asks_first: bool = False,
    ):
        self.groups, self.recipe, self.seed, self.in_pairs = groups, recipe, seed, in_pairs
        self.weights, self.asks_first = weights, asks_first
        for group in groups if in_pairs else ():
            if len(group.rows) < 2:
                raise ValueError(
                    f"{group.source}: pairs need two or more rows of data set {group.name!r}, got "
                    "one."
                )
        drawn = [
            self._drawn(group, weights[number] if weights else 1.0)
            for number, group in enumerate(groups)
        ]
        numbers = np.repeat(np.arange(len(groups)), [len(rows) for rows in drawn])
        self._places = np.stack([numbers, np.concatenate(drawn)], 1)  # (rows, 2) group and row
        generator = np.random.default_rng([seed, 1])
        count = 1 if asks_first else len(recipe.questions)
        self._questions = [generator.permutation(len(group.rows)) % count for group in groups]
        # Persistent DataLoader workers see the new epoch, too.
        self._epoch = torch.zeros((), dtype=torch.long).share_memory_()

    def _drawn(self, group: _Group, weight: float) -> np.ndarray:
        whole, count = int(weight), len(group.rows)
        share = np.random.default_rng([self.seed, 2]).permutation(count)[
            : round((weight - whole) * count)
        ]
        return np.concatenate([np.tile(np.arange(count), whole), np.sort(share)])

    def begin_epoch(self, epoch: int) -> None:
        """Draw other pairs from now on; the same ones for the same epoch."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Row:
        group, row = map(int, self._places[index])
        first = self.row(group, row)
        if not self.in_pairs:
            return first
        generator = np.random.default_rng([self.seed, 3, int(self._epoch), index])
        other = int(generator.integers(len(self.groups[group].rows) - 1))
        return {"pair": [first, self.row(group, other + (other >= row))]}

    def row(self, group: int, index: int) -> Row:
        """An opinion as a row of messages, with what the losses need beside it."""
        own, recipe = self.groups[group], self.recipe
        opinion = own.rows[index]
        question = recipe.questions[int(self._questions[group][index])]
        kind = "video" if is_video_path(opinion.image) else "image"
        answer = recipe.answer.format(level=self.level(own, opinion))
        return {
            "messages": [
                {"role": "user", "content": question_parts(question, kind)},
                {"role": "assistant", "content": [{"type": "text", "text": answer}]},
            ],
            f"{kind}s": [opinion.image],
            "allow_outside": True,  # reading the opinions already checked the paths of images
            ORIGIN: f"{own.source}: row {opinion.row}",
            "level_probs": self.soft(own, opinion),
            "mos": opinion.mos,
            "mos_stds": float("nan") if opinion.std is None else opinion.std,
            "datasets": group,
        }

    def level(self, group: _Group, opinion: Opinion) -> str:
        """The level word: the one that the file's own answer names, else that of the MOS."""
        words = set((opinion.answer or "").lower().replace(".", " ").split()) & set(
            self.recipe.levels
        )
        if len(words) == 1:
            return words.pop()
        return self.recipe.levels[hard_level(opinion.mos, *group.bounds, len(self.recipe.levels))]

    def soft(self, group: _Group, opinion: Opinion) -> tuple[float, ...]:
        """The soft label: the file's own, else by the density; without a deviation two neighbouring
        levels share it.
        """
        if opinion.level_probs is not None:
            if len(opinion.level_probs) != len(self.recipe.levels):
                raise ValueError(
                    f"{group.source}: row {opinion.row}: expected level_probs of "
                    f"{len(self.recipe.levels)} levels, got {len(opinion.level_probs)}."
                )
            return opinion.level_probs
        return soft_label(
            opinion.mos, opinion.std or 0.0, *group.bounds, group.density, len(self.recipe.levels)
        )

    def without(self, bad: Mapping[int, set[int]]) -> "ScoreRows":
        """The same without some rows of its groups, by their numbers in the source."""
        groups = [
            replace(group, rows=tuple(row for row in group.rows if row.row not in bad[number]))
            for number, group in enumerate(self.groups)
        ]
        for group in groups:
            if not group.rows:
                raise ValueError(f"{group.source}: all rows of {group.name!r} are bad.")
        return ScoreRows(
            groups, self.recipe, self.weights, self.seed, self.in_pairs, self.asks_first
        )


class SingleRows(Dataset[Row]):
    """Every image of one data set once, to be looked over as rows of conversations are; videos take
    too long.

    Args:
        rows: What the opinions are part of.
        group: Number of the data set.
    """

    def __init__(self, rows: ScoreRows, group: int):
        self.rows, self.group = rows, group
        self._places = [
            place
            for place, opinion in enumerate(rows.groups[group].rows)
            if not is_video_path(opinion.image)
        ]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Row:
        return self.rows.row(self.group, self._places[index])

    def number_of(self, index: int) -> int:
        """Number of the row in its source."""
        return self.rows.groups[self.group].rows[self._places[index]].row


def load_score_rows(
    recipe: Recipe, seed: int, on_bad: Callable[[str], None] | None = None
) -> tuple[ScoreRows, ScoreRows | None]:
    """Rows of a recipe to train on, and to evaluate on if it names any.

    Args:
        seed: Of questions, shares and pairs.
        on_bad: As in `load_opinions`.

    Raises:
        ValueError: If opinions cannot be read, or do not make labels.
    """
    scores, data = recipe.scores, recipe.data
    assert scores is not None
    sources = [data.train] if isinstance(data.train, str) else data.train
    if not sources or not all(sources):
        raise ValueError("the recipe has no data.train: set it to files of opinions.")
    densities = (
        [scores.density] * len(sources) if isinstance(scores.density, str) else scores.density
    )
    groups, weights = [], []
    for index, (source, density) in enumerate(zip(sources, densities, strict=True)):
        own = _groups(recipe, source, scores.train_split, density, on_bad)
        groups += own
        weights += [scores.weights[index] if scores.weights else 1.0] * len(own)
    for group in groups:
        if not group.bounds[0] < group.bounds[1]:
            raise ValueError(
                f"{group.source}: every MOS of {group.name!r} is {group.bounds[0]:g}: nothing to "
                "learn."
            )
    rows = ScoreRows(groups, scores, weights, seed, in_pairs=scores.labels == "soft")
    if data.eval is None:
        return rows, None
    found = [data.eval] if isinstance(data.eval, str) else data.eval
    held_out = [
        group
        for source in found
        for group in _groups(recipe, source, scores.eval_split, "pdf", on_bad)
    ]
    return rows, ScoreRows(held_out, scores, seed=seed, asks_first=True)


def checked_score_rows(
    recipe: Recipe, seed: int, workers: int = 0, first: int = 0, step: int = 1
) -> tuple[ScoreRows, ScoreRows | None, list[str]]:
    """Rows to train and to evaluate on, looked over as `data.bad_rows` says.

    Args:
        seed: Of questions, shares and pairs.
        workers: Processes that look over the rows.
        first, step: This rank's share of the rows, as in `look_over`.

    Returns:
        Both, and what is wrong with each row that was left out.

    Raises:
        ValueError: If a row is bad, and should not be left out; or none is left.
    """
    if recipe.data.bad_rows == "stop":
        rows, eval_rows = load_score_rows(recipe, seed)
        for own in [rows] if eval_rows is None else [rows, eval_rows]:
            for message, _, _ in _bad_opinions(own, workers, first, step):
                raise ValueError(f"{message} `owl2-hf data check` names all bad rows.")
        return rows, eval_rows, []
    skipped: list[str] = []
    rows, eval_rows = load_score_rows(recipe, seed, skipped.append)
    kept: list[ScoreRows] = []
    for own in [rows] if eval_rows is None else [rows, eval_rows]:
        bad: dict[int, set[int]] = {number: set() for number in range(len(own.groups))}
        # Every rank checks all rows, so that all skip the same ones.
        for message, number, row in _bad_opinions(own, workers, 0, 1, decode=True):
            bad[number].add(row)
            skipped.append(message)
        kept.append(own.without(bad))
    # A file used for both training and evaluation is read twice.
    return kept[0], None if eval_rows is None else kept[1], list(dict.fromkeys(skipped))


def _bad_opinions(
    rows: ScoreRows, workers: int, first: int, step: int, decode: bool = False
) -> Iterator[tuple[str, int, int]]:
    """What is wrong with each bad row, the number of its group, and its own in the source."""
    for number, group in enumerate(rows.groups):
        for bad in look_over(SingleRows(rows, number), workers, first, step, decode):
            where = f"{group.source}: row {bad.row}: "
            yield where + bad.reason.removeprefix(where), number, bad.row


def _groups(
    recipe: Recipe,
    source: str,
    split: str | None,
    density: str,
    on_bad: Callable[[str], None] | None,
) -> list[_Group]:
    data = recipe.data
    opinions = load_opinions(source, data.image_folder, split, data.allow_outside, on_bad)
    return [
        _Group(opinions.name, name or Path(source).stem, rows, opinions.ranges[name], density)
        for name, rows in opinions.by_dataset().items()
    ]


def question_parts(question: str, kind: str = "image") -> list[dict[str, Any]]:
    """A question as parts of a message, with the image behind it and a line break, or where it
    says.
    """
    whole = question if IMAGE_TOKEN in question else f"{question}\n{IMAGE_TOKEN}"
    before, after = whole.split(IMAGE_TOKEN)
    texts = [{"type": "text", "text": text} for text in (before, after)]
    return [part for part in (texts[0], {"type": kind}, texts[1]) if part.get("text") != ""]


class ScoreCollator(Collator):
    """Makes batches of `ScoreRows`: of n pairs all first images, then all second ones.

    The batch also holds `level_probs` (B, K), `mos`, `mos_stds` (NaN where not known) and
    `datasets` (B,).
    """

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        if "pair" in rows[0]:
            rows = [row["pair"][place] for place in (0, 1) for row in rows]
        batch = super().__call__(rows)
        for name in _PARTS:
            batch[name] = torch.tensor([row[name] for row in rows])
        return batch


def answer_ids(collator: Collator, recipe: ScoreRecipe) -> tuple[list[int], list[int]]:
    """Token ids of the answer in front of its level, and of each level word there.

    Raises:
        ValueError: If a level is not one token, in general or within the answer.
    """
    ids = [level_id(collator.processor.tokenizer, word) for word in recipe.levels]
    answers = []
    for word in recipe.levels:
        answer = {"role": "assistant", "content": recipe.answer.format(level=word)}
        [row] = collator.encode([{"messages": [{"role": "user", "content": "?"}, answer]}])
        answers.append(row.labels[row.labels.ne(IGNORED)].tolist())
    place = next(
        (index for index, pair in enumerate(zip(*answers, strict=False)) if len(set(pair)) > 1), 0
    )
    for word, own, expected in zip(recipe.levels, answers, ids, strict=True):
        if own != [*answers[0][:place], expected, *answers[0][place + 1 :]]:
            raise ValueError(
                f"the level {word!r} is not a single token in {recipe.answer!r}: choose another "
                "word, or put a space or a full stop around {level}."
            )
    return answers[0][:place], ids


def preset_of(recipe: ScoreRecipe, processor: MplugOwl2Processor) -> Preset:
    """How the trained model is asked: its first question, up to the level."""
    chat = [{"role": "user", "content": question_parts(recipe.questions[0])}]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    before = recipe.answer.partition("{level}")[0].strip()
    steps = len(recipe.levels) - 1
    return Preset(
        {
            "quality": f"{prompt.removeprefix(processor.tokenizer.bos_token or '')} {before}".rstrip()
        },
        tuple(recipe.levels),
        tuple(1 - index / steps for index in range(steps + 1)),
        recipe.image_aspect_ratio,
        (1.0, float(steps + 1)),
    )
