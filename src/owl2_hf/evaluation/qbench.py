"""Evaluate Q-Bench's multiple-choice questions as Q-Align and DeQA-Score do.

Sources: Q-Bench (arXiv:2309.14181), LLVisionQA as published; eval_qbench_mcq.py of Q-Align and
DeQA-Score, which is the same in both: the prompt, greedy decoding, and an answer that counts if it
holds the letter of the right choice.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..limits import Context
from ..modeling.modeling_mplug_owl2 import MplugOwl2ForConditionalGeneration
from ..processing.processing_mplug_owl2 import MplugOwl2Processor
from ..scoring.statistics import bootstrap_interval
from ..training.messages import Place, locate_picture
from ..training.rows import read_rows
from .settings import EVALUATIONS

LETTERS = "ABCD"
# The order of Q-Bench's own tables. lmms-eval calls type 1 "How" and 2 "What", but in the published
# rows "How is the lighting of this building?" has type 2.
TYPES = ("yes-or-no", "what", "how")
CONCERNS = ("distortion", "others", "in-context distortion", "in-context others")
_SETTINGS = EVALUATIONS["qbench"]
_LAYOUT = "expected llvisionqa_dev.json, and the images in images/"
_IMAGE_FOLDERS = ("images", "images_llvisionqa", ".")


@dataclass(frozen=True)
class Question:
    """One question.

    Args:
        image: Path of its image.
        text: The question itself.
        candidates: Its two to four answers.
        correct: Letter of the right one.
        kind: Its type, one of `TYPES`, or what the file says.
        concern: What it is about, one of `CONCERNS`, or what the file says.
        row: Its number in the file, counted from 1.
    """

    image: str
    text: str
    candidates: tuple[str, ...]
    correct: str
    kind: str
    concern: str
    row: int

    @property
    def prompt(self) -> str:
        """As the model is asked."""
        options = [
            f"{letter}. {one}" for letter, one in zip(LETTERS, self.candidates, strict=False)
        ]
        return _SETTINGS.fill(question=self.text, options="\n".join(options))


@dataclass(frozen=True)
class Answer:
    """What the model answered."""

    question: Question
    text: str

    @property
    def is_correct(self) -> bool:
        """Whether it holds the right letter; as in the scripts also inside a word."""
        return self.question.correct in self.text


@dataclass(frozen=True)
class Accuracy:
    """Share of right answers, with its 95 % interval from drawing images with replacement."""

    questions: int
    value: float
    low: float
    high: float


@dataclass
class QBenchReport:
    """Answers, what could not be asked and why, and draws and seed of the intervals."""

    answers: list[Answer] = field(default_factory=list)
    failed: list[tuple[Question, Exception]] = field(default_factory=list)
    samples: int = 1000
    seed: int = 0

    def accuracies(self) -> dict[str, dict[str, Accuracy]]:
        """The accuracy of all questions, of each type, and of each concern."""
        groups: dict[str, dict[str, list[Answer]]] = {"overall": {}, "type": {}, "concern": {}}
        for answer in self.answers:
            question = answer.question
            for group, name in zip(
                groups, ("all questions", question.kind, question.concern), strict=True
            ):
                groups[group].setdefault(name, []).append(answer)
        order = {name: place for place, name in enumerate((*TYPES, *CONCERNS))}
        return {
            group: {
                name: self._accuracy(found[name])
                for name in sorted(found, key=lambda name: (order.get(name, len(order)), name))
            }
            for group, found in groups.items()
        }

    def _accuracy(self, answers: Sequence[Answer]) -> Accuracy:
        is_correct = np.array([answer.is_correct for answer in answers], dtype=np.float64)
        low, high = bootstrap_interval(
            lambda drawn: float(drawn.mean()),
            is_correct,
            images=[answer.question.image for answer in answers],
            samples=self.samples,
            seed=self.seed,
        )
        return Accuracy(len(answers), float(is_correct.mean()), low, high)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: accuracies, and every answer."""
        return {
            "accuracy": {
                group: {name: vars(one) for name, one in found.items()}
                for group, found in self.accuracies().items()
            },
            "answers": [
                {
                    "row": answer.question.row,
                    "answer": answer.text,
                    "correct_choice": answer.question.correct,
                    "is_correct": answer.is_correct,
                }
                for answer in self.answers
            ],
            "failed": [
                {"row": question.row, "reason": str(error)} for question, error in self.failed
            ],
        }

    def table(self) -> list[list[str]]:
        """For CSV: the names, then one row of each group of questions."""
        rows = [["group", "name", "questions", "accuracy", "accuracy_low", "accuracy_high"]]
        for group, found in self.accuracies().items():
            for name, one in found.items():
                numbers = [f"{value:.6f}" for value in (one.value, one.low, one.high)]
                rows.append([group, name, str(one.questions), *numbers])
        return rows

    def lines(self) -> list[str]:
        """For people."""
        lines = ["qbench: accuracy, and its 95 % interval"]
        for group, found in self.accuracies().items():
            lines += [group] if group != "overall" else []
            lines += [
                f"  {name:24} {one.value:8.4f}   {one.low:.4f} to {one.high:.4f}   "
                f"{one.questions:,} questions"
                for name, one in found.items()
            ]
        return lines


def load_questions(root: str | Path, split: str = "dev") -> list[Question]:
    """The questions of one part of LLVisionQA.

    Args:
        root: Folder with `llvisionqa_dev.json` and `images/`, as they are published.
        split: The part. The right answers of `test` are not published.

    Raises:
        ValueError: If the folder does not hold it, or a row is no question. The message names both.
    """
    folder = Path(root)
    path = folder / f"llvisionqa_{split}.json"
    if not path.is_file():
        raise ValueError(f"qbench: {path} does not exist; {_LAYOUT}.")
    rows = read_rows(path)
    if not len(rows):
        raise ValueError(f"{path} has no rows.")
    images = next(folder / name for name in _IMAGE_FOLDERS if (folder / name).is_dir())
    questions = []
    for number, row in enumerate(rows, 1):
        try:
            questions.append(_question(row, number, Place(images, is_open=False)))
        except ValueError as error:
            raise ValueError(f"{path}: row {number}: {error}") from None
    return questions


def _question(row: Any, number: int, place: Place) -> Question:
    if not isinstance(row, Mapping):
        raise ValueError(f"expected an object with 'question', got {type(row).__name__}.")
    image, text, candidates = (row.get(key) for key in ("img_path", "question", "candidates"))
    if not isinstance(image, str) or not isinstance(text, str):
        raise ValueError(f"expected texts as 'img_path' and 'question', got {image!r}, {text!r}.")
    if not isinstance(candidates, list) or not 2 <= len(candidates) <= len(LETTERS):
        raise ValueError(f"expected a list of 2 to 4 'candidates', got {candidates!r}.")
    if row.get("correct_ans") is None:
        raise ValueError(
            "expected 'correct_ans', the correct candidate, got none: use the split dev, which "
            "has it."
        )
    if row["correct_ans"] not in candidates:
        raise ValueError(f"'correct_ans' {row['correct_ans']!r} is not among the candidates.")
    # The last one of equal candidates, as in the scripts.
    last = max(index for index, one in enumerate(candidates) if one == row["correct_ans"])
    return Question(
        locate_picture(image, place),
        text,
        tuple(map(str, candidates)),
        LETTERS[last],
        _named(row.get("type"), TYPES),
        _named(row.get("concern"), CONCERNS),
        number,
    )


def _named(value: Any, names: Sequence[str]) -> str:
    """The name of a number from 0 on; anything else is its own name."""
    is_number = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(names)
    return names[value] if is_number else "not named" if value is None else str(value)


def evaluate_qbench(
    model: MplugOwl2ForConditionalGeneration,
    processor: MplugOwl2Processor,
    questions: Sequence[Question],
    batch_size: int = 8,
    samples: int = 1000,
    seed: int = 0,
    on_question: Callable[[int], None] = lambda questions: None,
) -> QBenchReport:
    """Ask a model every question. One whose image cannot be read costs no other its answer.

    Images are read and cut as in the scripts: no EXIF orientation, shorter edge to the model's
    size, then the centre.

    Args:
        model: `MplugOwl2ForConditionalGeneration`, in evaluation mode.
        batch_size: Questions in one call of `generate`.
        samples, seed: Of the intervals.
        on_question: Called with the number of questions asked so far.

    Raises:
        ValueError: If no question could be asked.
    """
    report = QBenchReport(samples=samples, seed=seed)
    for start in range(0, len(questions), batch_size):
        batch: list[tuple[Question, Any]] = []
        for question in questions[start : start + batch_size]:
            try:
                image = processor.image_processor.process_image(
                    question.image, original_reading=True
                )
                batch.append((question, image))
            except (ValueError, OSError) as error:
                report.failed.append((question, error))
        if batch:
            texts = _answers(model, processor, batch)
            report.answers += [
                Answer(question, text) for (question, _), text in zip(batch, texts, strict=True)
            ]
        on_question(min(start + batch_size, len(questions)))
    if not report.answers:
        reason = f": row {report.failed[0][0].row}: {report.failed[0][1]}" if report.failed else "."
        raise ValueError(f"qbench: no question could be asked{reason}")
    return report


def _answers(
    model: MplugOwl2ForConditionalGeneration,
    processor: MplugOwl2Processor,
    batch: Sequence[tuple[Question, Any]],
) -> list[str]:
    inputs = processor(
        text=[question.prompt for question, _ in batch],
        images=[[image] for _, image in batch],
        image_aspect_ratio="crop",
        padding=True,
        padding_side="left",
        return_tensors="pt",
    ).to(model.device)
    length = inputs["input_ids"].shape[1]
    generation = _SETTINGS.generation_kwargs()
    room = Context(model, processor).room(length)
    generation["max_new_tokens"] = min(generation["max_new_tokens"], room)
    output = model.generate(**inputs, **generation)  # (B, length + new)
    texts = processor.batch_decode(output[:, length:], skip_special_tokens=True)
    return [text.strip() for text in texts]
