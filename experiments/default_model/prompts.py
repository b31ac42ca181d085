"""Tokenizer of the default model, and rows of token ids for its training.

A row is one picture (or none) with several questions. Each question sees the picture and itself
alone and keeps the positions that it would have in a prompt of its own, so a row computes what as
many single-turn prompts would, with the picture encoded once.

R: rows, L: positions.
"""

import json
import random

import torch
from tokenizers import Regex, Tokenizer, pre_tokenizers, trainers
from tokenizers.models import BPE
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from owl2_hf.processing.tokenization_mplug_owl2 import llama_tokenizer

from .data import Emoji, Questions

IMAGE_TOKEN = "<|image|>"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
Row = tuple[bool, list[tuple[str, str]]]  # has a picture, (question, answer) pairs


def train_tokenizer(emoji: list[Emoji], shape_pairs: list[list[tuple[str, str]]], vocab_size: int):
    """A byte-pair encoding with LLaMA's structure, from the questions and answers of training."""
    questions = Questions(emoji, random.Random(0))
    lines = ["USER: ASSISTANT:"] * 500
    lines += [f"{q} {a}" for pairs in shape_pairs[::20] for q, a in pairs]
    lines += [
        f"{q} {a}" for one in emoji if not one.held_out for q, a in questions.about_emoji(one)
    ]
    lines += [one.name for one in questions.named for _ in range(10)]
    lines += [" ".join(questions.without_picture()) for _ in range(3000)]
    trainee = Tokenizer(BPE(unk_token="<unk>"))
    # Pieces never cross a word; digits and punctuation stand alone.
    trainee.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="always"),
            pre_tokenizers.Split(Regex(r"[^\p{L}▁]"), "isolated"),
        ]
    )
    printable = [chr(code) for code in range(33, 127)] + ["▁"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<unk>", "<s>", "</s>", *BYTES],
        initial_alphabet=printable,
        min_frequency=2,
        show_progress=False,
    )
    trainee.train_from_iterator(lines, trainer)
    model = json.loads(trainee.to_str())["model"]
    return llama_tokenizer(
        model["vocab"], [tuple(pair) for pair in model["merges"]], model_max_length=2048
    )


class RowEncoder:
    """Rows of questions -> tensors."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, num_image_tokens: int):
        self.tokenizer, self.num_image_tokens = tokenizer, num_image_tokens
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self.prefixes = {
            True: self._ids("USER: " + IMAGE_TOKEN * num_image_tokens),
            False: self._ids("USER:"),
        }
        self.known: dict[tuple[bool, str, str], tuple[list[int], list[int]]] = {}

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text).input_ids

    def question(
        self, has_picture: bool, question: str, answer: str
    ) -> tuple[list[int], list[int]]:
        """Ids behind the prefix, and the same as labels, -100 up to the answer."""
        key = (has_picture, question, answer)
        if key not in self.known:
            prefix = self.prefixes[has_picture]
            start = "USER: " + IMAGE_TOKEN * self.num_image_tokens if has_picture else "USER: "
            prompt = self._ids(f"{start}{question} ASSISTANT:")
            whole = self._ids(f"{start}{question} ASSISTANT: {answer}</s>")
            assert whole[: len(prompt)] == prompt and prompt[: len(prefix)] == prefix, (
                question,
                answer,
            )
            ids = whole[len(prefix) :]
            num_prompt = len(prompt) - len(prefix)
            self.known[key] = (ids, [-100] * num_prompt + ids[num_prompt:])
        return self.known[key]

    def __call__(self, rows: list[Row]) -> dict[str, Tensor]:
        """Ids, labels, positions (R, L) and the mask of what each position attends to (R, 1, L,
        L).
        """
        columns: dict[str, list[list[int]]] = {
            "input_ids": [],
            "labels": [],
            "position_ids": [],
            "part": [],
        }
        for has_picture, pairs in rows:
            prefix = self.prefixes[has_picture]
            ids, labels = list(prefix), [-100] * len(prefix)
            positions, part = list(range(len(prefix))), [0] * len(prefix)
            for number, (question, answer) in enumerate(pairs, 1):
                question_ids, question_labels = self.question(has_picture, question, answer)
                ids += question_ids
                labels += question_labels
                positions += range(len(prefix), len(prefix) + len(question_ids))
                part += [number] * len(question_ids)
            for name, values in zip(columns, (ids, labels, positions, part), strict=True):
                columns[name].append(values)
        padding = {"input_ids": 0, "labels": -100, "position_ids": 0, "part": -1}
        batch = {name: _pad(values, padding[name]) for name, values in columns.items()}
        part = batch.pop("part")
        same = (part[:, :, None] == part[:, None, :]) | (part[:, None, :] == 0)
        batch["attention_mask"] = (same & torch.ones(same.shape[1:], dtype=torch.bool).tril())[
            :, None
        ]
        batch["mm_token_type_ids"] = batch["input_ids"].eq(self.image_token_id).long()
        return batch


def _pad(rows: list[list[int]], value: int) -> Tensor:
    length = max(map(len, rows))
    return torch.tensor([row + [value] * (length - len(row)) for row in rows])
