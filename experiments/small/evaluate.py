"""What a model answers on the test files of `experiments.small.data`.

`python -m experiments.small.evaluate MODEL DATA_DIR`

Questions go the way a user's do: processor, chat template, greedy `generate`. An answer is right
when it is the expected one but for case and a full stop. Beside each accuracy stands the same with
pictures swapped, which is what the model gets without looking; beside easy-VQA's also the answer
that the question alone suggests. Perplexities are of tokens of the model's own tokenizer: compare
them between models that share it.
"""

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image

from owl2_hf.modeling import MplugOwl2ForConditionalGeneration
from owl2_hf.processing import MplugOwl2Processor

from .data import Row, read_rows

CAPTION_FILES = ("seen", "unseen-style", "unseen-names")
MAX_NEW_TOKENS = 16
Scores = dict[str, float]


def question_of(row: Row) -> str:
    return row["messages"][0]["content"][-1]["text"]


def answer_of(row: Row) -> str:
    return row["messages"][1]["content"][0]["text"]


def plain(answer: str) -> str:
    return answer.strip().rstrip(".").lower()


def accuracy(answers: list[str], rows: list[Row]) -> float:
    return sum(
        plain(said) == plain(answer_of(row)) for said, row in zip(answers, rows, strict=True)
    ) / len(rows)


def token_f1(answers: list[str], rows: list[Row]) -> float:
    """Mean over rows of the harmonic mean of precision and recall of words, as SQuAD has it."""
    pairs = zip(answers, rows, strict=True)
    return sum(
        _f1(plain(said).split(), plain(answer_of(row)).split()) for said, row in pairs
    ) / len(rows)


def _f1(said: list[str], expected: list[str]) -> float:
    common = sum((Counter(said) & Counter(expected)).values())
    return 2 * common / (len(said) + len(expected)) if common else 0.0


def swapped(rows: list[Row]) -> list[Row]:
    """The same questions, each about another picture: the one half the list of pictures away."""
    pictures = list(dict.fromkeys(row["images"][0] for row in rows))
    half = len(pictures) // 2
    other = dict(zip(pictures, pictures[half:] + pictures[:half], strict=True))
    return [{**row, "images": [other[row["images"][0]]]} for row in rows]


def thinned(rows: list[Row], limit: int | None) -> list[Row]:
    """At most `limit` rows, evenly from the whole file."""
    if limit is None or limit >= len(rows):
        return rows
    return [rows[i * len(rows) // limit] for i in range(limit)]


class Model:
    """A saved model, and the folder that the pictures of the rows are in."""

    def __init__(self, folder: Path, data: Path, batch_size: int = 32):
        self.model = MplugOwl2ForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32
        ).eval()
        self.processor = MplugOwl2Processor.from_pretrained(folder)
        self.data, self.batch_size = data, batch_size

    def _batches(self, rows: list[Row], name: str) -> Iterator[list[Row]]:
        for start in range(0, len(rows), self.batch_size):
            print(f"\r{name}: {start} of {len(rows)} ", end="", file=sys.stderr, flush=True)
            yield rows[start : start + self.batch_size]
        print(f"\r{name}: {len(rows)} of {len(rows)} ", file=sys.stderr)

    def _chat(self, row: Row, num_messages: int) -> list[dict]:
        pictures = iter(row.get("images", []))
        return [
            {
                "role": message["role"],
                "content": [
                    {
                        "type": "image",
                        "image": Image.open(self.data / next(pictures)).convert("RGB"),
                    }
                    if part["type"] == "image"
                    else part
                    for part in message["content"]
                ],
            }
            for message in row["messages"][:num_messages]
        ]

    def _inputs(self, rows: list[Row], num_messages: int, **kwargs):
        return self.processor.apply_chat_template(
            [self._chat(row, num_messages) for row in rows],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
            **kwargs,
        )

    @torch.no_grad()
    def answers(self, rows: list[Row], name: str) -> list[str]:
        """Greedy answers to the first question of every row."""
        answers = []
        for batch in self._batches(rows, name):
            inputs = self._inputs(batch, 1, add_generation_prompt=True)
            ids = self.model.generate(**inputs, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
            new = ids[:, inputs["input_ids"].shape[1] :]
            answers += self.processor.batch_decode(new, skip_special_tokens=True)
        return answers

    def answer_perplexity(self, rows: list[Row], name: str) -> float:
        """Of the expected answers behind their questions, without the token that ends them."""
        total = count = 0
        for batch in self._batches(rows, name):
            inputs = self._inputs(batch, 2, return_assistant_tokens_mask=True)
            is_answer = torch.as_tensor(inputs.pop("assistant_masks")).bool()
            is_answer &= inputs["input_ids"] != self.processor.tokenizer.eos_token_id
            total, count = self._add(inputs, is_answer, total, count)
        return math.exp(total / count)

    def text_perplexity(self, sentences: list[str], name: str) -> float:
        """Of plain text without a template, from its second token on."""
        total = count = 0
        for batch in self._batches(sentences, name):
            inputs = self.processor.tokenizer(
                batch, padding=True, return_tensors="pt", return_token_type_ids=False
            )
            is_text = inputs["attention_mask"].bool()
            # Padding stands on the left: the first token has none before it.
            is_text &= is_text.roll(1, dims=1)
            is_text[:, 0] = False
            total, count = self._add(inputs, is_text, total, count)
        return math.exp(total / count)

    @torch.no_grad()
    def _add(self, inputs, is_counted: torch.Tensor, total: float, count: int) -> tuple[float, int]:
        """`total` and `count` with the losses of the tokens of one batch; (N, T) True where a token
        counts.
        """
        logits = self.model(**inputs).logits[:, :-1].float()
        targets = inputs["input_ids"][:, 1:].masked_fill(~is_counted[:, 1:], -100)
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), reduction="sum"
        )
        return total + loss.item(), count + int((targets != -100).sum())


def with_pictures(model: Model, rows: list[Row], name: str) -> tuple[list[str], Scores]:
    said, blind = (
        model.answers(rows, name),
        model.answers(swapped(rows), f"{name}, picture swapped"),
    )
    return said, {
        "questions": len(rows),
        "accuracy": accuracy(said, rows),
        "picture swapped": accuracy(blind, rows),
    }


def question_prior(rows: list[Row], prior: dict[str, str]) -> float:
    """Accuracy of the commonest answer that the same question has in training."""
    return accuracy([prior.get(question_of(row), "") for row in rows], rows)


def evaluate(
    folder: Path, data: Path, limit: int | None = None, batch_size: int = 32
) -> dict[str, Scores]:
    """All scores by test file; `limit` thins each file."""
    model, results = Model(folder, data, batch_size), {}
    rows = thinned(read_rows(data / "easy_vqa.test.jsonl"), limit)
    said, scores = with_pictures(model, rows, "easy-VQA")
    is_open = [answer_of(row) not in ("yes", "no") for row in rows]
    for name, wanted in (("yes or no", False), ("shape or colour", True)):
        own = [i for i, flag in enumerate(is_open) if flag == wanted]
        if own:
            scores[f"accuracy, {name}"] = accuracy([said[i] for i in own], [rows[i] for i in own])
    prior = json.loads((data / "easy_vqa.prior.json").read_text(encoding="utf-8"))
    results["easy-VQA"] = {**scores, "question-only prior": question_prior(rows, prior)}
    for kind in CAPTION_FILES:
        rows = thinned(read_rows(data / f"captions.{kind}.test.jsonl"), limit)
        said, scores = with_pictures(model, rows, f"captions, {kind}")
        results[f"captions, {kind}"] = {**scores, "token F1": token_f1(said, rows)}
    meanings = thinned(read_rows(data / "text.test.jsonl"), limit)
    sentences = (data / "sentences.test.txt").read_text(encoding="utf-8").splitlines()
    results["text"] = {
        "perplexity of meanings": model.answer_perplexity(meanings, "meanings"),
        "perplexity of sentences": model.text_perplexity(sentences[:limit], "sentences"),
    }
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path, help="what experiments.small.data wrote")
    parser.add_argument(
        "--limit", type=int, help="questions of each file, evenly from the whole of it"
    )
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument(
        "--json", type=Path, metavar="OUT", help="write the scores into this file too"
    )
    args = parser.parse_args()
    text = json.dumps(evaluate(args.model, args.data, args.limit, args.batch_size), indent=2)
    print(text)
    if args.json is not None:
        args.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
