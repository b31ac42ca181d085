"""Degradations of known amount, and simulated opinions of what they leave.

An amount goes from 0, which leaves the image as it is, to 1. Images are RGB, of the size that the
model sees.
"""

import io
from collections.abc import Callable

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageFilter

NUM_PEOPLE = 20  # simulated people who rate each image
PERSON_STD = 0.7  # of one person's opinion, in levels
BEST, WORST = 5.0, 1.0


def blur(image: Image.Image, amount: float, _: Generator) -> Image.Image:
    """Gaussian blur, of up to 4 pixels standard deviation."""
    return image.filter(ImageFilter.GaussianBlur(4 * amount**1.5))


def noise(image: Image.Image, amount: float, generator: Generator) -> Image.Image:
    """Gaussian noise of each value, of up to 60 steps of 255 standard deviation."""
    pixels = np.asarray(image, dtype=np.float64)
    return _to_image(pixels + generator.normal(0, 60 * amount**1.5, pixels.shape))


def jpeg(image: Image.Image, amount: float, _: Generator) -> Image.Image:
    """JPEG, of quality 95 down to 4."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=round(95 * (4 / 95) ** amount))
    return Image.open(file).convert("RGB")


def contrast(image: Image.Image, amount: float, _: Generator) -> Image.Image:
    """Less contrast: down to a tenth, around the mean of each channel."""
    pixels = np.asarray(image, dtype=np.float64)
    mean = pixels.mean((0, 1))
    return _to_image(mean + (1 - 0.9 * amount) * (pixels - mean))


def pixelation(image: Image.Image, amount: float, _: Generator) -> Image.Image:
    """Blocks of one colour, of up to 8 pixels."""
    size = (
        max(1, round(image.width / (1 + 7 * amount))),
        max(1, round(image.height / (1 + 7 * amount))),
    )
    return image.resize(size, Image.Resampling.BOX).resize(image.size, Image.Resampling.NEAREST)


def motion_blur(image: Image.Image, amount: float, generator: Generator) -> Image.Image:
    """The mean along a line of up to 15 pixels, in a random direction."""
    pixels = np.asarray(image, dtype=np.float64)
    length = 1 + round(14 * amount)
    angle = generator.uniform(0, np.pi)
    padded = np.pad(pixels, ((8, 8), (8, 8), (0, 0)), mode="edge")
    total = np.zeros_like(pixels)
    for step in range(length):
        along = step - (length - 1) / 2
        row, column = 8 + round(along * np.sin(angle)), 8 + round(along * np.cos(angle))
        total += padded[row : row + image.height, column : column + image.width]
    return _to_image(total / length)


def impulse_noise(image: Image.Image, amount: float, generator: Generator) -> Image.Image:
    """Black and white pixels, up to a fifth of all."""
    pixels = np.array(image)
    draw = generator.random(pixels.shape[:2])
    share = 0.2 * amount**1.5
    pixels[draw < share / 2] = 0
    pixels[draw > 1 - share / 2] = 255
    return Image.fromarray(pixels)


def posterization(image: Image.Image, amount: float, _: Generator) -> Image.Image:
    """Few values of each channel: from 128 down to 2."""
    steps = round(2 * 64 ** (1 - amount)) - 1
    pixels = np.asarray(image, dtype=np.float64) / 255
    return _to_image(np.round(pixels * steps) / steps * 255)


Degradation = Callable[[Image.Image, float, Generator], Image.Image]
TRAINED: dict[str, Degradation] = {
    "blur": blur,
    "noise": noise,
    "jpeg": jpeg,
    "contrast": contrast,
    "pixelation": pixelation,
}
# Never trained on. The first two have a trained relative (blur, noise), the third has none.
UNSEEN: dict[str, Degradation] = {
    "motion blur": motion_blur,
    "impulse noise": impulse_noise,
    "posterization": posterization,
}
KINDS = TRAINED | UNSEEN


def degrade(image: Image.Image, kind: str, amount: float, generator: Generator) -> Image.Image:
    """The image with an amount of one kind of degradation; of amount 0 the image itself."""
    return image if amount == 0 else KINDS[kind](image, amount, generator)


def expected_opinion(amount: float) -> float:
    """What people would say on the average, if the amount were all that they saw: 5 down to 1."""
    return BEST + (WORST - BEST) * amount


def simulate_opinions(amount: float, generator: Generator) -> tuple[float, float]:
    """Mean and standard deviation of simulated opinions: whole levels from 1 to 5, each person's
    with an error.
    """
    errors = generator.normal(0, PERSON_STD, NUM_PEOPLE)
    opinions = np.clip(np.round(expected_opinion(amount) + errors), WORST, BEST)
    return float(opinions.mean()), float(opinions.std(ddof=1))


def _to_image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(np.round(pixels), 0, 255).astype(np.uint8))
