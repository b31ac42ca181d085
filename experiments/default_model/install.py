"""Put a trained model into the package: `python -m experiments.default_model.install
TRAINED_FOLDER`.

Copies the model, and beside it a few pictures that it was not trained on. Only pictures and
questions that it answers rightly are taken, so they show what it can do; how often it is right is
what `evaluate.py` measures.
"""

import argparse
import json
import shutil
from pathlib import Path

from PIL import Image

from owl2_hf.default import default_dir

from .data import load_easy_vqa, load_emoji, load_style, on_white
from .evaluate import Answerer, picture

WANTED = (
    "red apple",
    "banana",
    "strawberry",
    "tiger face",
    "cat face",
    "dog face",
    "penguin",
    "bus",
    "airplane",
)
NUM_EMOJI, NUM_SHAPES = 3, 2
LARGE, WIDE = 320, 400  # the last emoji is enlarged and put on a wider ground, to show resizing


def emoji_candidates() -> dict[str, tuple[Image.Image, dict[str, str]]]:
    """Name -> picture by the artist left out of training, with questions and true answers."""
    twitter = on_white(load_style("twitter")[0])
    emoji = load_emoji()
    named = {one.name: index for index, one in enumerate(emoji) if one.named and not one.held_out}
    order = [name for name in WANTED if name in named] + [
        name for name in named if name not in WANTED
    ]
    return {
        name: (
            picture(twitter[named[name]]),
            {"What is this?": name, "What kind of thing is it?": emoji[named[name]].group},
        )
        for name in order
    }


def shape_candidates() -> dict[str, tuple[Image.Image, dict[str, str]]]:
    """easy-VQA's test pictures with its own questions on colour and shape."""
    shapes, pairs = load_easy_vqa("test")
    return {
        str(index): (picture(shapes[index]), {q: a for q, a in own if q.startswith("what")})
        for index, own in enumerate(pairs[:60])
    }


def choose(
    answerer: Answerer, candidates: dict[str, tuple[Image.Image, dict[str, str]]], count: int
) -> list[str]:
    """The first `count` candidates all of whose questions are answered rightly, no two with the
    same answers.
    """
    chosen: dict[tuple[str, ...], str] = {}
    for name, (image, questions) in candidates.items():
        cases = [(image, question, answer) for question, answer in questions.items()]
        if cases and answerer(cases) == [case[2] for case in cases]:
            chosen.setdefault(tuple(questions.values()), name)
        if len(chosen) == count:
            return list(chosen.values())
    raise ValueError(
        f"Wanted {count} pictures that are answered rightly, found {len(chosen)}: train for longer."
    )


def on_wide_ground(image: Image.Image) -> Image.Image:
    wide = Image.new("RGB", (WIDE, LARGE), "white")
    wide.paste(image.resize((LARGE, LARGE), Image.Resampling.LANCZOS), ((WIDE - LARGE) // 2, 0))
    return wide


def install(trained: Path, target: Path) -> None:
    answerer = Answerer(trained, dtype="auto")
    emoji, shapes = emoji_candidates(), shape_candidates()
    chosen = {
        f"emoji-{name.replace(' ', '-')}": emoji[name]
        for name in choose(answerer, emoji, NUM_EMOJI)
    }
    chosen |= {f"shapes-{name}": shapes[name] for name in choose(answerer, shapes, NUM_SHAPES)}
    wide = {
        f"emoji-wide-{name.replace(' ', '-')}": (on_wide_ground(image), questions)
        for name, (image, questions) in emoji.items()
        if f"emoji-{name.replace(' ', '-')}" not in chosen
    }
    chosen |= {name: wide[name] for name in choose(answerer, wide, 1)}

    for file in trained.iterdir():
        if file.is_file() and file.suffix != ".py":
            shutil.copy(file, target)
    folder = target / "pictures"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, (image, _) in chosen.items():
        image.save(folder / f"{name}.png", optimize=True)
    answers = {name: questions for name, (_, questions) in sorted(chosen.items())}
    (folder / "answers.json").write_text(json.dumps(answers, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("trained", type=Path)
    parser.add_argument("--target", type=Path, default=default_dir())
    args = parser.parse_args()
    install(args.trained, args.target)


if __name__ == "__main__":
    main()
