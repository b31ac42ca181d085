"""Images and prompts: the processor against transformers' CLIPImageProcessor and the plain
tokenizer.

    python -m benchmarks.processor --json processor.json

The base is what the original does: PIL stretches the picture to the square of its longer edge,
CLIPImageProcessor (PIL) resizes, rescales and normalises it; the pixels that come out are compared.
Memory is the peak of a process that prepares one picture of 12,000 x 9,000 pixels, beyond that of a
picture of 224. Prompts go through the processor, and through transformers' LlavaProcessor with the
same tokenizer, against that tokenizer alone.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.processing_llava import LlavaProcessor

from owl2_hf.default import default_dir
from owl2_hf.processing import MplugOwl2ImageProcessor, MplugOwl2Processor

from .timing import compare, parser, peak_memory, row, write

SIZES = ("224 x 224", "224 x 168", "1000 x 750", "1000 x 1000", "4000 x 3000")
SIDE = 448
REPEATS = 10
HUGE, SMALL = (12_000, 9_000), (224, 168)
MAX_PIXELS = 150_000_000
NUM_PROMPTS = 10_000


def picture(width: int, height: int) -> Image.Image:
    """Noise of many scales, which no resampling finds easy."""
    coarse = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def original(processor: Any, image: Image.Image) -> torch.Tensor:
    edge = max(image.size)
    return processor(image.resize((edge, edge)), return_tensors="pt")["pixel_values"]


def processors() -> tuple[Any, Any]:
    clip = CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    )
    return clip, MplugOwl2ImageProcessor(max_image_pixels=MAX_PIXELS)


def pictures(rounds: int) -> dict[str, Any]:
    """Size -> times of both, and whether the pixels are the same."""
    clip, ours = processors()
    found = {}
    for size in SIZES:
        image = picture(*map(int, size.split(" x ")))
        prepare: dict[str, Callable[[], torch.Tensor]] = {
            "CLIPImageProcessor": lambda image=image: original(clip, image),
            "ours": lambda image=image: ours(image, return_tensors="pt")["pixel_values"],
        }
        same = bool(prepare["ours"]().equal(prepare["CLIPImageProcessor"]()))
        runs = {name: partial(several, one) for name, one in prepare.items()}
        times = compare(runs, "CLIPImageProcessor", rounds, warmup=2)
        rates = {name: REPEATS / one["seconds"] for name, one in times.items()}
        found[size] = {**times, "pictures per second": rates, "same pixels": same}
    return found


def several(prepare: Callable[[], torch.Tensor]) -> None:
    for _ in range(REPEATS):
        prepare()


def peak(name: str, size: tuple[int, int]) -> float:
    """MB of the largest resident set of this process after it prepared one picture."""
    clip, ours = processors()
    Image.MAX_IMAGE_PIXELS = None
    image = Image.new("RGB", size, (200, 100, 50))
    if name == "ours":
        ours(image, return_tensors="pt")
    else:
        original(clip, image)
    return peak_memory() / 1e6


def memory() -> dict[str, float]:
    """MB that the huge picture takes beyond a small one, in processes of their own."""

    def run(name: str, size: tuple[int, int]) -> float:
        command = [sys.executable, "-m", "benchmarks.processor", "--peak-of", name, *map(str, size)]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    return {name: run(name, HUGE) - run(name, SMALL) for name in ("CLIPImageProcessor", "ours")}


def prompts(rounds: int) -> dict[str, Any]:
    """The same texts through the tokenizer alone, a processor of transformers' around it, and
    ours.
    """
    processor = MplugOwl2Processor.from_pretrained(default_dir())
    texts = [
        f"USER: What is picture number {number} of this long series? ASSISTANT:"
        for number in range(NUM_PROMPTS)
    ]
    llava = LlavaProcessor(processors()[0], processor.tokenizer, patch_size=14)
    runs = {
        "tokenizer": lambda: processor.tokenizer(texts),
        "LlavaProcessor": lambda: llava(text=texts),
        "ours": lambda: processor(text=texts),
    }
    return compare(runs, "tokenizer", rounds)


def main() -> None:
    options = parser(__doc__, rounds=9)
    options.add_argument("--peak-of", nargs=3, help=argparse.SUPPRESS)
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    if args.peak_of:
        print(peak(args.peak_of[0], (int(args.peak_of[1]), int(args.peak_of[2]))))
        return
    results = {
        "pictures": pictures(args.rounds),
        "memory, MB": memory(),
        "prompts": prompts(args.rounds),
    }
    for size, found in results["pictures"].items():
        print(f"{row(size, found['ours'], 1.05)}, same pixels: {found['same pixels']}")
    print(f"  memory: {results['memory, MB']}")
    for name, found in results["prompts"].items():
        print(row(f"{NUM_PROMPTS:,} prompts, {name}", found))
    write(args.json, args, results)


if __name__ == "__main__":
    main()
