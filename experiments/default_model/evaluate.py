"""Held-out accuracy of the default model: `python -m experiments.default_model.evaluate DIR`.

Everything goes the way a user's picture goes: processor, chat template, greedy `generate`. An
answer is right when it is the expected one to the letter.
"""

import argparse
import json
from collections import Counter, defaultdict
from pathlib import Path

import torch
from PIL import Image

from owl2_hf.modeling import MplugOwl2ForConditionalGeneration
from owl2_hf.processing import MplugOwl2Processor

from .data import load_easy_vqa, load_emoji, load_style, on_white, text_only_test

Case = tuple[Image.Image | None, str, str]  # picture, question, expected answer


class Answerer:
    """Greedy answers of a saved model."""

    def __init__(self, folder: Path, batch_size: int = 64, dtype: str = "float32"):
        self.model = MplugOwl2ForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()
        self.processor = MplugOwl2Processor.from_pretrained(folder)
        self.batch_size = batch_size

    @torch.no_grad()
    def __call__(self, cases: list[Case]) -> list[str]:
        """Answers to cases that all have a picture, or all have none."""
        answers = []
        for start in range(0, len(cases), self.batch_size):
            chats = []
            for picture, question, _ in cases[start : start + self.batch_size]:
                parts = [{"type": "text", "text": question}]
                if picture is not None:
                    parts.insert(0, {"type": "image", "image": picture})
                chats.append([{"role": "user", "content": parts}])
            inputs = self.processor.apply_chat_template(
                chats,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": True},
            )
            inputs = inputs.to(dtype=self.model.dtype)
            ids = self.model.generate(**inputs, do_sample=False, max_new_tokens=24)
            new = ids[:, inputs["input_ids"].shape[1] :]
            answers += [
                text.strip() for text in self.processor.batch_decode(new, skip_special_tokens=True)
            ]
        return answers


def accuracy(answers: list[str], cases: list[Case]) -> float:
    return sum(answer == case[2] for answer, case in zip(answers, cases, strict=True)) / len(cases)


def picture(pixels: torch.Tensor) -> Image.Image:
    """(3, H, W) uint8 -> a picture."""
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def swapped(cases: list[Case]) -> list[Case]:
    """The same questions, each about the picture of a case half the list away."""
    half = len(cases) // 2
    pictures = [case[0] for case in cases]
    return [
        (other, question, answer)
        for other, (_, question, answer) in zip(
            pictures[half:] + pictures[:half], cases, strict=True
        )
    ]


def most_frequent(cases: list[Case]) -> float:
    return Counter(case[2] for case in cases).most_common(1)[0][1] / len(cases)


def question_prior(train: list[list[tuple[str, str]]], cases: list[Case]) -> float:
    """Always the commonest answer that the same question has in training."""
    counts: dict[str, Counter] = defaultdict(Counter)
    for pairs in train:
        for question, answer in pairs:
            counts[question][answer] += 1
    return accuracy(
        [counts[q].most_common(1)[0][0] if q in counts else "" for _, q, _ in cases], cases
    )


def with_pictures(answerer: Answerer, cases: list[Case]) -> dict[str, float]:
    return {
        "accuracy": accuracy(answerer(cases), cases),
        "picture swapped": accuracy(answerer(swapped(cases)), cases),
        "most frequent answer": most_frequent(cases),
        "questions": len(cases),
    }


def word_overlap(answers: list[str], cases: list[Case]) -> float:
    """Share of answers that have a word of the expected name."""
    return sum(
        bool(set(answer.split()) & set(case[2].split()))
        for answer, case in zip(answers, cases, strict=True)
    ) / len(cases)


def evaluate(folder: Path, dtype: str = "float32") -> dict[str, dict[str, float]]:
    answerer = Answerer(folder, dtype=dtype)
    shapes, pairs = load_easy_vqa("test")
    shape_cases: list[Case] = [
        (picture(shapes[i]), q, a) for i, own in enumerate(pairs) for q, a in own
    ]
    results = {"easy-VQA test": with_pictures(answerer, shape_cases)}
    results["easy-VQA test"]["commonest answer to the same question"] = question_prior(
        load_easy_vqa("train")[1], shape_cases
    )

    emoji = load_emoji()
    twitter = on_white(load_style("twitter")[0])
    there = load_style("twitter")[1]
    seen = [i for i, one in enumerate(emoji) if one.named and not one.held_out and there[i]]
    unseen = [i for i, one in enumerate(emoji) if one.held_out and there[i]]
    pictures = {i: picture(twitter[i]) for i in seen + unseen}
    names: list[Case] = [(pictures[i], "What is this?", emoji[i].name) for i in seen]
    results["name, unseen artist"] = with_pictures(answerer, names)
    results["name, unseen artist"]["a word of the name"] = word_overlap(answerer(names), names)
    kinds: list[Case] = [(pictures[i], "What kind of thing is it?", emoji[i].group) for i in seen]
    results["kind, unseen artist"] = with_pictures(answerer, kinds)
    food_and_animals = [
        i for i in seen if emoji[i].group in ("animals and nature", "food and drink")
    ]
    results["name, unseen artist, animals and food alone"] = with_pictures(
        answerer, [(pictures[i], "What is this?", emoji[i].name) for i in food_and_animals]
    )
    animal: list[Case] = [
        (pictures[i], "Is this an animal?", "yes" if emoji[i].is_a("an animal") else "no")
        for i in food_and_animals
    ]
    results["is it an animal, unseen artist, animals and food alone"] = with_pictures(
        answerer, animal
    )
    new_names: list[Case] = [(pictures[i], "What is this?", emoji[i].name) for i in unseen]
    results["name, unseen artist and unseen caption"] = with_pictures(answerer, new_names)
    results["name, unseen artist and unseen caption"]["a word of the name"] = word_overlap(
        answerer(new_names), new_names
    )
    results["kind, unseen artist and unseen caption"] = with_pictures(
        answerer, [(pictures[i], "What kind of thing is it?", emoji[i].group) for i in unseen]
    )
    text: list[Case] = [(None, question, answer) for question, answer in text_only_test(emoji)]
    results["text only, held-out yes/no questions"] = {
        "accuracy": accuracy(answerer(text), text),
        "most frequent answer": most_frequent(text),
        "questions": len(text),
    }
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", default="float32", help="dtype to compute in")
    args = parser.parse_args()
    print(json.dumps(evaluate(args.folder, args.dtype), indent=2))


if __name__ == "__main__":
    main()
