"""Images of known degradation with simulated opinions: photographs, clip art, and emoji side by
side.

Packages come by name and are checked (`experiments/packages.py`). What is held out is held out by
what an image is made of: a photograph, a drawing of clip art, an emoji with its artist. No crop of
it is in another part.
"""

import csv
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.random import Generator
from PIL import Image

from ..default_model.data import load_emoji
from ..packages import fetch
from .degrade import TRAINED, UNSEEN, degrade, simulate_opinions

SIDE = 128  # of the images that the model sees
TEST_SHARE = 5  # every fifth drawing and emoji is held out
PRISTINE_SHARE = 0.1  # of the images are not degraded
SHARES = {"photo": 0.6, "emoji": 0.2, "clip art": 0.2}
MAX_DRAWING_BYTES = 50_000  # a few drawings have 200 million pixels
# A crop must show something that degrading can take away.
MIN_STD, MIN_SHARPNESS = 20.0, 150.0
FILE = "opinions.csv"
Row = Mapping[str, str]
COLUMNS = ("image", "mos", "std", "split", "kind", "amount", "sources")

_SKIMAGE, _SKLEARN = "skimage/data", "sklearn/datasets/images"
_LOMIRI = "usr/share/backgrounds"
TRAIN_PHOTOS = (
    ("scikit-image", f"{_SKIMAGE}/brick.png"),
    ("scikit-image", f"{_SKIMAGE}/camera.png"),
    ("scikit-image", f"{_SKIMAGE}/chelsea.png"),
    ("scikit-image", f"{_SKIMAGE}/coins.png"),
    ("scikit-image", f"{_SKIMAGE}/grass.png"),
    ("scikit-image", f"{_SKIMAGE}/hubble_deep_field.jpg"),
    ("scikit-image", f"{_SKIMAGE}/ihc.png"),
    ("scikit-learn", f"{_SKLEARN}/china.jpg"),
    ("lomiri-wallpapers", f"{_LOMIRI}/Picture_0B_by_freespace.jpg"),
    ("lomiri-wallpapers", f"{_LOMIRI}/Wine_by_Jakkub_Mede.jpg"),
    ("lomiri-wallpapers", f"{_LOMIRI}/aitzgorri_by_Aitzol_Berasategi.jpg"),
    ("lomiri-wallpapers", f"{_LOMIRI}/friends_by_Aitzol_Berasategi.jpg"),
    ("lomiri-wallpapers", f"{_LOMIRI}/seeding_by_Clements_Engelhardt.jpg"),
    ("lomiri-wallpapers", f"{_LOMIRI}/sunset_by_Aitzol_Berasategi.jpg"),
    ("lomiri-wallpapers", f"{_LOMIRI}/umang_by_Abhishek_Mudgal.jpg"),
)
TEST_PHOTOS = (
    ("scikit-image", f"{_SKIMAGE}/astronaut.png"),
    ("scikit-image", f"{_SKIMAGE}/coffee.png"),
    ("scikit-image", f"{_SKIMAGE}/gravel.png"),
    ("scikit-image", f"{_SKIMAGE}/rocket.jpg"),
    ("scikit-learn", f"{_SKLEARN}/flower.jpg"),
    ("lomiri-wallpapers", f"{_LOMIRI}/Picture_1A_by_freespace.jpg"),
    ("lomiri-wallpapers", f"{_LOMIRI}/life_by_Aitzol_Berasategi.jpg"),
    ("lomiri-wallpapers", f"{_LOMIRI}/picosdeeuropa_by_Aitzol_Berasategi.jpg"),
)


@dataclass(frozen=True)
class Sources:
    """What the images of one part are made of.

    Args:
        photos: Name -> photograph, RGB.
        emoji: Name -> emoji, RGBA of 64 pixels.
        clip_art: Files of drawings.
    """

    photos: dict[str, Image.Image]
    emoji: dict[str, Image.Image]
    clip_art: tuple[Path, ...]


def is_test(name: str) -> bool:
    """Whether a drawing or an emoji is held out, by the letters of its name: home2 and home9 go the
    same way.
    """
    letters = "".join(letter for letter in name.lower() if letter.isalpha())
    return hashlib.sha256(letters.encode()).digest()[0] % TEST_SHARE == 0


def load_sources(test: bool) -> Sources:
    """Everything that training, or the tests, may use; the emoji are Noto's in training, Twitter's
    in the tests.
    """
    photos = {
        name: Image.open(fetch(package) / name).convert("RGB")
        for package, name in (TEST_PHOTOS if test else TRAIN_PHOTOS)
    }
    package, vendor = ("twitter", "twitter") if test else ("noto", "google")
    emoji = {}
    for one in load_emoji():
        path = fetch(package) / f"img/{vendor}/64/{one.file}"
        if is_test(one.name) == test and path.exists():
            emoji[f"{vendor}/{one.file}"] = Image.open(path).convert("RGBA")
    clip_art = tuple(path for path in drawings() if is_test(path.stem) == test)
    return Sources(photos, emoji, clip_art)


def drawings() -> list[Path]:
    """Files of clip art, each drawing once: some lie in several folders."""
    folder = fetch("openclipart") / "usr/share/openclipart/png"
    first: dict[bytes, Path] = {}
    for path in sorted(folder.rglob("*.png")):
        if path.is_file() and path.stat().st_size <= MAX_DRAWING_BYTES:
            first.setdefault(hashlib.sha256(path.read_bytes()).digest(), path)
    return list(first.values())


def sharpness(image: Image.Image) -> float:
    """Variance of the Laplacian of the image in grey: the classic measure of focus."""
    grey = np.asarray(image.convert("L"), dtype=np.float64)
    laplacian = (
        grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * grey[1:-1, 1:-1]
    )
    return float(laplacian.var())


def draw_image(kind: str, sources: Sources, generator: Generator) -> tuple[Image.Image, list[str]]:
    """A sharp image of `SIDE` pixels that shows something, and what it is made of.

    Args:
        kind: A name in `SHARES`.
    """
    makers = {"photo": _photo, "emoji": _emoji, "clip art": _clip_art}
    while True:
        image, names = makers[kind](sources, generator)
        if np.asarray(image.convert("L")).std() >= MIN_STD and sharpness(image) >= MIN_SHARPNESS:
            return image, names


def _photo(sources: Sources, generator: Generator) -> tuple[Image.Image, list[str]]:
    """A square of a photograph, mirrored or not, at its own resolution or coarser."""
    name = _choose(sorted(sources.photos), generator)
    photo = sources.photos[name]
    longest = min(photo.size)
    side = round(SIDE * (longest / SIDE) ** generator.random())
    left = generator.integers(photo.width - side + 1)
    top = generator.integers(photo.height - side + 1)
    box = (left, top, left + side, top + side)
    image = photo.resize((SIDE, SIDE), Image.Resampling.LANCZOS, box, reducing_gap=2.0)
    if generator.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image, [name]


def _emoji(sources: Sources, generator: Generator) -> tuple[Image.Image, list[str]]:
    """Six emoji at their own resolution, anywhere on a ground of one colour."""
    image = _ground(generator)
    names = []
    for _ in range(6):
        name = _choose(sorted(sources.emoji), generator)
        place = tuple(generator.integers(-24, SIDE - 40, 2).tolist())
        image.paste(sources.emoji[name], place, sources.emoji[name])
        names.append(name)
    return image, names


def _clip_art(sources: Sources, generator: Generator) -> tuple[Image.Image, list[str]]:
    """A drawing that fills the image, on a ground of one colour."""
    path = sources.clip_art[int(generator.integers(len(sources.clip_art)))]
    drawing = Image.open(path).convert("RGBA")
    scale = SIDE / min(drawing.size)
    size = (max(SIDE, round(drawing.width * scale)), max(SIDE, round(drawing.height * scale)))
    if scale > 1 or max(size) > 4 * SIDE:  # would be soft, or is a strip
        return _ground(generator), []
    drawing = drawing.resize(size, Image.Resampling.LANCZOS, reducing_gap=2.0)
    left, top = ((length - SIDE) // 2 for length in size)
    drawing = drawing.crop((left, top, left + SIDE, top + SIDE))
    image = _ground(generator)
    image.paste(drawing, (0, 0), drawing)
    return image, [f"{path.parent.name}/{path.name}"]


def _ground(generator: Generator) -> Image.Image:
    white = generator.random() < 0.4
    color = (255, 255, 255) if white else tuple(generator.integers(0, 256, 3).tolist())
    return Image.new("RGB", (SIDE, SIDE), color)


def _choose(names: Sequence[str], generator: Generator) -> str:
    return names[int(generator.integers(len(names)))]


def write_part(
    folder: Path, split: str, count: int, kinds: Sequence[str], sources: Sources, seed: int
) -> list[dict[str, object]]:
    """Images of one part as PNG files in `folder/split`, and their rows.

    Args:
        kinds: Of degradation, as often each.
        seed: Row n depends on the seed, the part and n alone.
    """
    (folder / split).mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, object]] = []
    part = int.from_bytes(hashlib.sha256(split.encode()).digest()[:4], "big")
    for number in range(count):
        generator = np.random.default_rng([seed, part, number])
        drawn = generator.choice(list(SHARES), p=list(SHARES.values()))
        image, names = draw_image(str(drawn), sources, generator)
        kind = kinds[number % len(kinds)]
        amount = 0.0 if generator.random() < PRISTINE_SHARE else float(generator.random())
        mos, std = simulate_opinions(amount, generator)
        name = f"{split}/{number:05d}.png"
        degrade(image, kind, amount, generator).save(folder / name)
        values = (name, f"{mos:.3f}", f"{std:.3f}", split, kind, f"{amount:.4f}", ";".join(names))
        rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


def write_all(folder: Path, num_train: int, num_test: int, seed: int = 0) -> None:
    """`folder/opinions.csv` and its images: parts `train`, `unseen images` and `unseen kinds`."""
    train, test = load_sources(test=False), load_sources(test=True)
    rows = write_part(folder, "train", num_train, list(TRAINED), train, seed)
    rows += write_part(folder, "unseen images", num_test, list(TRAINED), test, seed)
    rows += write_part(folder, "unseen kinds", num_test, list(UNSEEN), test, seed)
    with (folder / FILE).open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def read_rows(folder: Path, split: str) -> list[Row]:
    """The rows of one part, as they stand in the file."""
    with (folder / FILE).open(encoding="utf-8", newline="") as file:
        return [row for row in csv.DictReader(file) if row["split"] == split]
