"""Pictures, questions and answers that the default model is trained and tested on.

Pictures: easy-VQA (its own training and test parts) and emoji of three artists: Noto and Fluent to
train on, Twitter's to test on. Names are CLDR short names. Everything is fetched by package name,
checked, and kept in a cache folder.
"""

import io
import json
import random
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from ..packages import cache_dir, fetch

SIDE = 64
# The unseen captions: every HELD_OUT_EVERY-th name never occurs in training, in no style and in no
# sentence.
HELD_OUT_EVERY = 20

STYLES = ("noto", "fluent modern", "fluent flat", "fluent high-contrast")
STYLE_WEIGHTS = (0.36, 0.28, 0.28, 0.08)

NAME_QUESTIONS = (
    "What is this?",
    "What is it?",
    "What is in the picture?",
    "What does the picture show?",
    "Name this.",
    "Describe the image.",
)
KIND_QUESTIONS = ("What kind of thing is it?", "What kind of thing is this?")
YES_NO_QUESTIONS = ("Is this {}?", "Is it {}?", "Does the picture show {}?")
# Kind -> CLDR subgroups (a name that ends with "-" stands for all that start with it).
KINDS = {
    "an animal": ("animal-", "cat-face", "monkey-face"),
    "a bird": ("animal-bird",),
    "a bug": ("animal-bug",),
    "a plant": ("plant-",),
    "a flower": ("plant-flower",),
    "food": ("food-",),
    "a fruit": ("food-fruit",),
    "a vegetable": ("food-vegetable",),
    "a drink": ("drink",),
    "a vehicle": ("transport-ground", "transport-water", "transport-air"),
    "a building": ("place-building", "place-religious", "hotel"),
    "a face": ("face-", "cat-face", "monkey-face"),
    "a heart": ("heart",),
    "a hand": ("hand-", "hands"),
    "clothing": ("clothing",),
    "a tool": ("tool",),
    "a musical instrument": ("musical-instrument",),
    "an arrow": ("arrow",),
    "a flag": ("flag", "country-flag", "subdivision-flag"),
    "a person": ("person", "person-", "family"),
}
# Besides all animals, plants, food and drinks these are named; of the rest the model tells the kind
# alone.
NAMED_SUBGROUPS = ("transport-ground", "transport-water", "transport-air", "sky & weather", "sport")
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")


@dataclass(frozen=True)
class Emoji:
    """`pictures` counts from 0 in the order of `load_emoji`; `may_flip`: its mirror image has the
    same name.
    """

    name: str
    group: str
    subgroup: str
    file: str
    named: bool
    held_out: bool

    @property
    def may_flip(self) -> bool:
        sided = any(
            word in self.name.split()
            for word in ("left", "right", "clockwise", "back", "next", "last")
        )
        return self.group != "symbols" and self.subgroup != "time" and not sided

    def is_a(self, kind: str) -> bool:
        return any(
            self.subgroup.startswith(part) if part.endswith("-") else self.subgroup == part
            for part in KINDS[kind]
        )


def load_emoji() -> list[Emoji]:
    """All emoji without skin tones, in a fixed order."""
    short_names = json.loads((fetch("emoji") / "emoji/unicode_codes/emoji.json").read_text())
    rows = json.loads((fetch("noto") / "emoji.json").read_text())
    rows = sorted(
        (row for row in rows if row["category"] != "Component"), key=lambda row: row["sort_order"]
    )
    emoji, names = [], 0
    for row in rows:
        sequence = "".join(chr(int(code, 16)) for code in row["unified"].split("-"))
        name = short_names[sequence]["en"].strip(":").replace("_", " ").lower()
        group = row["category"].lower().replace("&", "and")
        country = row["subcategory"] in ("country-flag", "subdivision-flag")
        subgroup = row["subcategory"]
        named = group in ("animals and nature", "food and drink") or subgroup in NAMED_SUBGROUPS
        names += named
        held_out = named and names % HELD_OUT_EVERY == 7
        emoji.append(
            Emoji(
                "flag" if country else name,
                group,
                row["subcategory"],
                row["image"],
                named,
                held_out,
            )
        )
    return emoji


def _fluent_slug(name: str) -> str:
    return "".join(
        c for c in name.replace(" ", "-").replace("&", "and") if c.isalnum() or c in "-_"
    ).lower()


def _picture(style: str, emoji: Emoji) -> Image.Image | None:
    if style in ("noto", "twitter"):
        vendor = "google" if style == "noto" else "twitter"
        path = fetch(style) / f"img/{vendor}/64/{emoji.file}"
        return Image.open(path).convert("RGBA") if path.exists() else None
    from resvg_py import svg_to_bytes

    folder = fetch("fluent") / "icons" / style.removeprefix("fluent ")
    for suffix in ("", "-default"):
        path = folder / f"{_fluent_slug(emoji.name)}{suffix}.svg"
        if path.exists():
            return Image.open(
                io.BytesIO(bytes(svg_to_bytes(svg_path=str(path), width=SIDE, height=SIDE)))
            ).convert("RGBA")
    return None


def _to_tensor(image: Image.Image) -> Tensor:
    """A picture as uint8 (C, H, W)."""
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return flat.view(image.height, image.width, -1).permute(2, 0, 1).contiguous()


def load_style(style: str) -> tuple[Tensor, Tensor]:
    """(E, 4, 64, 64) uint8 RGBA pictures of all emoji in one style, and (E,) whether this style has
    the emoji.
    """
    cached = cache_dir() / f"{style.replace(' ', '-')}.pt"
    if not cached.exists():
        emoji = load_emoji()
        pictures = torch.zeros(len(emoji), 4, SIDE, SIDE, dtype=torch.uint8)
        there = torch.zeros(len(emoji), dtype=torch.bool)
        for i, one in enumerate(emoji):
            if (image := _picture(style, one)) is not None:
                pictures[i], there[i] = (
                    _to_tensor(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)),
                    True,
                )
        torch.save((pictures, there), cached)
    return torch.load(cached, weights_only=True)


def on_white(rgba: Tensor) -> Tensor:
    """(..., 4, H, W) uint8 -> (..., 3, H, W) uint8 on a white ground."""
    alpha = rgba[..., 3:, :, :].float() / 255
    return (rgba[..., :3, :, :] * alpha + 255 * (1 - alpha)).round().to(torch.uint8)


def load_easy_vqa(part: str) -> tuple[Tensor, list[list[tuple[str, str]]]]:
    """(N, 3, 64, 64) uint8 pictures and the (question, answer) pairs of each; `part` is "train" or
    "test".
    """
    folder = fetch("easy-vqa") / "easy_vqa/data" / part
    questions = json.loads((folder / "questions.json").read_text())
    pairs: list[list[tuple[str, str]]] = [[] for _ in range(1 + max(row[2] for row in questions))]
    for question, answer, index in questions:
        pairs[index].append((question, answer))
    images = [
        Image.open(folder / "images" / f"{index}.png").convert("RGB") for index in range(len(pairs))
    ]
    return torch.stack([_to_tensor(image) for image in images]), pairs


def with_article(name: str) -> str:
    """'red apple' -> 'a red apple', 'grapes' -> 'grapes'."""
    if name.endswith("s") and not name.endswith("ss"):
        return name
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def kind_question(name: str) -> str:
    thing = with_article(name)
    return f"What kind of thing {'are' if thing == name else 'is'} {thing}?"


def is_kind_question(name: str, kind: str) -> str:
    thing = with_article(name)
    return f"{'Are' if thing == name else 'Is'} {thing} {kind}?"


def text_only_test(emoji: list[Emoji]) -> list[tuple[str, str]]:
    """Questions without a picture that training leaves out: one in twenty pairs of a name and a
    kind.
    """
    rng = random.Random(1)
    named = [one for one in emoji if one.named and not one.held_out]
    questions = []
    for one in rng.sample(named, 200):
        yes = [kind for kind in KINDS if one.is_a(kind)]
        no = [kind for kind in KINDS if not one.is_a(kind)]
        if yes:
            questions.append((is_kind_question(one.name, rng.choice(yes)), "yes"))
            questions.append((is_kind_question(one.name, rng.choice(no)), "no"))
    return questions


class Questions:
    """Draws the questions of one training step."""

    def __init__(self, emoji: list[Emoji], rng: random.Random):
        self.emoji, self.rng = emoji, rng
        self.left_out = {question for question, _ in text_only_test(emoji)}
        self.named = [one for one in emoji if one.named and not one.held_out]

    def yes_no(self, one: Emoji) -> tuple[str, str]:
        """A kind, in one case of two a true one."""
        true = [kind for kind in KINDS if one.is_a(kind)]
        if true and self.rng.random() < 0.5:
            return self.rng.choice(true), "yes"
        return self.rng.choice([kind for kind in KINDS if kind not in true]), "no"

    def about_emoji(self, one: Emoji) -> list[tuple[str, str]]:
        pairs = []
        if one.named or one.name == "flag":
            pairs.append((self.rng.choice(NAME_QUESTIONS), one.name))
        pairs.append((self.rng.choice(KIND_QUESTIONS), one.group))
        for _ in range(3 - len(pairs)):
            kind, answer = self.yes_no(one)
            pairs.append((self.rng.choice(YES_NO_QUESTIONS).format(kind), answer))
        return pairs

    def about_shape(self, pairs: list[tuple[str, str]], count: int) -> list[tuple[str, str]]:
        """easy-VQA's own questions; those on shape and colour first, for they teach the most."""
        open_ones = [pair for pair in pairs if pair[1] not in ("yes", "no")]
        chosen = self.rng.sample(open_ones, min(2, len(open_ones)))
        rest = [pair for pair in pairs if pair not in chosen]
        chosen += self.rng.sample(rest, min(count - len(chosen), len(rest)))
        # As people write: easy-VQA itself has small letters alone.
        return [(q.capitalize() if self.rng.random() < 0.3 else q, a) for q, a in chosen]

    def without_picture(self) -> tuple[str, str]:
        draw = self.rng.random()
        if draw < 0.06:
            return self.rng.choice(GREETINGS)
        if draw < 0.2:
            return self._about_words()
        one = self.rng.choice(self.named)
        if draw < 0.6:
            return kind_question(one.name), one.group
        while True:
            kind, answer = self.yes_no(one)
            question = is_kind_question(one.name, kind)
            if question not in self.left_out:
                return question, answer

    def _about_words(self) -> tuple[str, str]:
        word, kind = self.rng.choice(COLORS + SHAPES), self.rng.choice(("color", "shape"))
        true = (word in COLORS) == (kind == "color")
        subject = word if word in COLORS else with_article(word)
        return f"Is {subject} a {kind}?", "yes" if true else "no"


GREETINGS = (
    ("Hello!", "hello! show me a picture."),
    ("Hello", "hello! show me a picture."),
    ("Hi!", "hello! show me a picture."),
    ("Who are you?", "a small mPLUG-Owl2."),
    ("What can you do?", "i name pictures and answer short questions."),
    ("Thank you!", "you are welcome."),
)
