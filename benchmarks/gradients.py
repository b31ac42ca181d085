"""Gradients of scores to pixels: memory with and without gradient checkpointing.

    python -m benchmarks.gradients --json gradients.json

Vision encoder and abstractor have the published sizes, the language model behind them has 8 layers
of width 1024; the weights are random and frozen, the image is noise of 1024 x 768 pixels. Memory is
the peak of a process that goes forward and back once, beyond what it has with the model alone; it
gives freed memory back at once.
"""

import argparse
import os
import subprocess
import sys
from typing import Any

import torch

from owl2_hf.default import default_dir
from owl2_hf.processing import MplugOwl2ImageProcessor, MplugOwl2Processor
from owl2_hf.scoring import Scorer, custom_preset

from .timing import DTYPES, parser, peak_memory, resident_memory, write
from .vision import build

SIZE = (768, 1024)
WAYS = ("no gradients", "gradients", "with checkpointing")
# glibc would keep freed memory for later, which hides what is needed at one time.
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}


def scorer(dtype: torch.dtype) -> Scorer:
    """A model of `benchmarks.vision` that scores, by the tokenizer of the small model."""
    model = build(dtype).requires_grad_(False)
    config = model.config
    side = config.vision_config.image_size
    processor = MplugOwl2Processor(
        MplugOwl2ImageProcessor(size={"height": side, "width": side}),
        MplugOwl2Processor.from_pretrained(default_dir()).tokenizer,
        num_image_tokens=config.num_image_tokens,
    )
    config.image_token_id = processor.image_token_id
    levels = ["high", "soft", "bad"]  # words of that tokenizer
    return Scorer(model, processor, custom_preset("one-align", levels=levels))


def measure(way: str, dtype: torch.dtype) -> float:
    """MB of the peak of one pass in this process, beyond what the model takes."""
    made = scorer(dtype)
    if way == "with checkpointing":
        made.model.gradient_checkpointing_enable()
    before = resident_memory()
    images = torch.rand(1, 3, *SIZE).requires_grad_(way != "no gradients")
    with torch.set_grad_enabled(images.requires_grad):
        scores = made.score_tensor(images)
    if images.requires_grad:
        scores.sum().backward()
    return (peak_memory() - before) / 1e6


def main() -> None:
    options = parser(__doc__, rounds=1)
    options.add_argument("--dtypes", nargs="*", choices=DTYPES, default=["float32"])
    options.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    if args.one:
        print(measure(args.one[0], DTYPES[args.one[1]]))
        return
    results: dict[str, Any] = {}
    for dtype in args.dtypes:
        results[dtype] = {}
        for way in WAYS:
            command = [sys.executable, "-m", "benchmarks.gradients"]
            command += ["--threads", str(args.threads), "--one", way, dtype]
            done = subprocess.run(
                command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | GIVES_BACK
            )
            results[dtype][way] = float(done.stdout.splitlines()[-1])
            print(f"{dtype}, {way}: {results[dtype][way]:,.0f} MB", flush=True)
    write(args.json, args, results)


if __name__ == "__main__":
    main()
