"""Conversations with pictures for both stages and their tests: `python -m experiments.small.data
OUT --seed 0`.

Every file holds one conversation a line, `{"messages": [...], "images": ["pictures/..."]}`;
`images` is missing where a conversation has no picture. All names, styles and words are those of
`experiments.default_model.data`: Twitter's drawings and every twentieth name are kept for the
tests, and no sentence of the training files holds a held-out name.

| file | pictures | what is asked |
| --- | --- | --- |
| captions.train | easy-VQA's training part; Noto and two Fluent styles, three views each | what it is |
| instruct.train | the same, and none | easy-VQA's questions, name and kind of an emoji, meanings of words |
| captions.seen.test | training styles and names, a new view | what it is |
| captions.unseen-style.test | Twitter's drawings of training names | what it is |
| captions.unseen-names.test | held-out names in all four styles | what it is |
| easy_vqa.test | easy-VQA's test part | its own questions, one a line |
| text.test | none | meanings of words that training leaves out |

Besides: easy_vqa.prior.json has the commonest answer to every question of easy-VQA's training part,
sentences.test.txt plain English that is like nothing in the training files.
"""

import argparse
import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from experiments.default_model.data import (
    COLORS,
    NAME_QUESTIONS,
    SHAPES,
    Emoji,
    Questions,
    load_easy_vqa,
    load_emoji,
    load_style,
    on_white,
)
from experiments.packages import fetch

TRAIN_STYLES, TEST_STYLE = ("noto", "fluent modern", "fluent flat"), "twitter"
CAPTION_VIEWS, INSTRUCT_VIEWS = 3, 2  # of the views of an emoji that training has
SCALES = (0.75, 1.0)
TURNS = 4  # questions about one picture of easy-VQA
MEANING_QUESTIONS = ("What does {} mean?", "What is the meaning of {}?", "Define {}.")
MAX_MEANING, MIN_SENTENCE = 80, 50  # characters
NUM_MEANINGS, NUM_TEST = 1500, 300

Row = dict[str, list]
Pair = tuple[str, str]


def row(pairs: list[Pair], picture: str | None = None) -> Row:
    """A conversation of questions and answers; the picture stands before the first question."""
    messages = []
    for question, answer in pairs:
        content = [{"type": "text", "text": question}]
        if picture is not None and not messages:
            content.insert(0, {"type": "image"})
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return (
        {"messages": messages} if picture is None else {"messages": messages, "images": [picture]}
    )


def read_rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_rows(path: Path, rows: list[Row]) -> None:
    path.write_text(
        "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in rows), encoding="utf-8"
    )


def view(picture: Image.Image, may_flip: bool, rng: random.Random) -> Image.Image:
    """Smaller, somewhere else, and mirrored in one case of two where the name allows it."""
    side = round(picture.width * rng.uniform(*SCALES))
    drawn = picture.resize((side, side), Image.Resampling.BICUBIC)
    if may_flip and rng.random() < 0.5:
        drawn = drawn.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    ground = Image.new("RGB", picture.size, "white")
    ground.paste(
        drawn, (rng.randint(0, picture.width - side), rng.randint(0, picture.height - side))
    )
    return ground


def as_picture(pixels: torch.Tensor) -> Image.Image:
    """(3, H, W) uint8 -> a picture."""
    return Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))


class Writer:
    """Draws pictures into `folder/pictures` and says where they are."""

    def __init__(self, folder: Path, rng: random.Random):
        self.folder, self.rng = folder, rng
        (folder / "pictures").mkdir(parents=True, exist_ok=True)

    def save(self, picture: Image.Image, name: str) -> str:
        path = f"pictures/{name}.png"
        picture.save(self.folder / path)
        return path

    def shapes(self, pictures: torch.Tensor, part: str) -> list[str]:
        return [
            self.save(as_picture(one), f"easy-vqa-{part}-{i:04d}") for i, one in enumerate(pictures)
        ]

    def emoji(self, emoji: list[Emoji], style: str, views: int) -> dict[int, list[str]]:
        """Number of a named emoji -> its picture as it is, and further views of it."""
        pictures, there = load_style(style)
        paths = {}
        for i, one in enumerate(emoji):
            if one.named and there[i]:
                own = as_picture(on_white(pictures[i]))
                drawn = [own, *(view(own, one.may_flip, self.rng) for _ in range(views - 1))]
                name = f"{style.replace(' ', '-')}-{i:04d}"
                paths[i] = [self.save(picture, f"{name}-{k}") for k, picture in enumerate(drawn)]
        return paths


def caption(pairs: list[Pair]) -> str | None:
    """'red circle', where the questions about an easy-VQA picture tell both."""
    words = {
        word for q, a in pairs if a not in ("yes", "no") for word in (*q.rstrip("?").split(), a)
    }
    color, shape = words.intersection(COLORS), words.intersection(SHAPES)
    return f"{color.pop()} {shape.pop()}" if color and shape else None


def prior(train: list[list[Pair]]) -> dict[str, str]:
    """Question -> the commonest answer that it has in training."""
    counts: dict[str, Counter] = defaultdict(Counter)
    for pairs in train:
        for question, answer in pairs:
            counts[question][answer] += 1
    return {question: answers.most_common(1)[0][0] for question, answers in sorted(counts.items())}


def load_meanings() -> Iterator[tuple[str, str, list[str]]]:
    """Common English nouns of one word with their first meaning in WordNet and the sentences that
    use it.
    """
    folder = fetch("wordnet") / "usr/share/wordnet"
    data = (folder / "data.noun").read_bytes()
    for line in (folder / "index.noun").read_text().splitlines():
        if line.startswith(" "):
            continue
        # https://wordnet.princeton.edu/documentation/wndb5wn: lemma ... sense_cnt tagsense_cnt
        # offset [offset ...]
        fields = line.split()
        word, num_senses = fields[0], int(fields[2])
        is_common = int(fields[-num_senses - 1]) > 0
        if word.isalpha() and word.isascii() and is_common:
            start = int(fields[-num_senses])
            gloss = data[start : data.index(b"\n", start)].decode().split("| ", 1)[1].strip()
            meaning, *examples = [part.strip(' "') for part in gloss.split('; "')]
            yield word, meaning, examples


def text_rows(held_out: list[str], rng: random.Random) -> tuple[list[Row], list[Row], list[str]]:
    """Meanings for training, meanings for the test, and plain sentences; no name in `held_out` is
    in the first.
    """
    entries = sorted(load_meanings())
    sentences = sorted(
        {one for *_, examples in entries for one in examples if len(one) >= MIN_SENTENCE}
    )
    meanings = [
        (word, meaning)
        for word, meaning, _ in entries
        if len(meaning) <= MAX_MEANING
        and '"' not in meaning
        and not _names_any(f"{word} {meaning}", held_out)
    ]
    rng.shuffle(meanings)
    test, train = meanings[:NUM_TEST], meanings[NUM_TEST : NUM_TEST + NUM_MEANINGS]
    return (
        [row([(rng.choice(MEANING_QUESTIONS).format(word), meaning)]) for word, meaning in train],
        [row([(MEANING_QUESTIONS[0].format(word), meaning)]) for word, meaning in test],
        rng.sample(sentences, min(NUM_TEST, len(sentences))),
    )


def _names_any(text: str, names: list[str]) -> bool:
    return any(f" {name} " in f" {text} " for name in names)


def write_all(out: Path, seed: int) -> dict[str, int]:
    """File name -> number of lines."""
    rng = random.Random(seed)
    writer, emoji = Writer(out, rng), load_emoji()
    files, questions = {}, Questions(emoji, rng)

    shapes, pairs = load_easy_vqa("train")
    paths = writer.shapes(shapes, "train")
    captions = [
        (name, path)
        for own, path in zip(pairs, paths, strict=True)
        if (name := caption(own)) is not None
    ]
    instruct = []
    for own, path in zip(pairs, paths, strict=True):
        turns = questions.about_shape(own, TURNS)
        # Or answers about shape and colour would always stand before the questions with yes or no.
        rng.shuffle(turns)
        instruct.append(row(turns, path))
    test_shapes, test_pairs = load_easy_vqa("test")
    files["easy_vqa.test"] = [
        row([pair], path)
        for own, path in zip(test_pairs, writer.shapes(test_shapes, "test"), strict=True)
        for pair in own
    ]

    seen = {i: one for i, one in enumerate(emoji) if one.named and not one.held_out}
    held_out = {i: one for i, one in enumerate(emoji) if one.held_out}
    drawn = {style: writer.emoji(emoji, style, CAPTION_VIEWS + 1) for style in TRAIN_STYLES}
    drawn[TEST_STYLE] = writer.emoji(emoji, TEST_STYLE, 1)
    for style in TRAIN_STYLES:
        for i, views in drawn[style].items():
            if i in seen:
                captions += [(emoji[i].name, path) for path in views[:CAPTION_VIEWS]]
                instruct += [
                    row(questions.about_emoji(emoji[i]), path) for path in views[:INSTRUCT_VIEWS]
                ]
    new_views = [
        (i, drawn[style][i][-1]) for i in seen for style in TRAIN_STYLES if i in drawn[style]
    ]
    other_style = [(i, drawn[TEST_STYLE][i][0]) for i in seen if i in drawn[TEST_STYLE]]
    other_names = [(i, views[i][0]) for i in held_out for views in drawn.values() if i in views]
    for name, cases in (
        ("seen", new_views),
        ("unseen-style", other_style),
        ("unseen-names", other_names),
    ):
        files[f"captions.{name}.test"] = [
            row([(NAME_QUESTIONS[0], emoji[i].name)], path) for i, path in cases
        ]

    text, files["text.test"], sentences = text_rows([one.name for one in held_out.values()], rng)
    files["captions.train"] = [
        row([(rng.choice(NAME_QUESTIONS), name)], path) for name, path in captions
    ]
    files["instruct.train"] = instruct + text
    for name in ("captions.train", "instruct.train"):
        rng.shuffle(files[name])
    for name, rows in files.items():
        write_rows(out / f"{name}.jsonl", rows)
    (out / "easy_vqa.prior.json").write_text(
        json.dumps(prior(pairs), indent=0) + "\n", encoding="utf-8"
    )
    (out / "sentences.test.txt").write_text(
        "".join(f"{one}\n" for one in sentences), encoding="utf-8"
    )
    return {f"{name}.jsonl": len(rows) for name, rows in files.items()} | {
        "sentences.test.txt": len(sentences)
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--seed", type=int, default=0, help="of the views, the questions and the order"
    )
    args = parser.parse_args()
    for name, count in write_all(args.out, args.seed).items():
        print(f"{count:6,} {args.out / name}")


if __name__ == "__main__":
    main()
