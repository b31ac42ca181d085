"""Scoring JPEG files: a whole data set into a file, against a plain loop over `Scorer`.

    python -m benchmarks.score_dataset --threads 1 --rounds 5 --json
    benchmarks/results/score_dataset.json

Each run takes the same files, from the disk to the scores; model and processor are loaded before.
The base is a loop that scores one file after the other. `prefix` compares the bundled model's
processor time for one batch, in float32 on one thread, with and without keeping the text in front
of the image.
"""

import argparse
import shutil
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import owl2_hf
from owl2_hf.scoring import Scorer, custom_preset, dataset
from owl2_hf.scoring.prefix import with_prefix

from .processor import picture
from .timing import Run, compare, parser, row, summarize, write

PRESET = custom_preset("one-align", levels=["high", "soft", "bad"])
SIZE = (1600, 1200)
NUM_FILES = 48
BATCH = 8


def make_files(folder: Path) -> list[str]:
    image = picture(*SIZE)
    paths = [str(folder / f"{index:03}.jpg") for index in range(NUM_FILES)]
    for path in paths:
        image.save(path, quality=90)
    return paths


def into_file(scorer: Scorer, folder: Path, **options: Any) -> None:
    out = folder / "out.csv"
    dataset.score_dataset(scorer, [str(folder)], out, overwrite=True, **options)


def without_prefix(run: Run) -> None:
    with mock.patch.object(dataset, "with_prefix", lambda scorer: scorer):
        run()


def ways(rounds: int) -> dict[str, Any]:
    """Name -> time of scoring all files, and over that of the loop."""
    scorer = Scorer(*owl2_hf.load_default(dtype=torch.float32), PRESET, batch_size=BATCH)
    folder = Path(tempfile.mkdtemp())
    try:
        paths = make_files(folder)
        in_file = {
            f"into a file, {count} worker processes": partial(
                into_file, scorer, folder, num_workers=count
            )
            for count in (0, 1, 2)
        }
        runs: dict[str, Run] = {
            "a loop, one file at a time": lambda: [scorer(path) for path in paths],
            f"one call, batches of {BATCH}": lambda: scorer(paths),
            **in_file,
            "into a file, 2 worker processes, prompt read for each image": partial(
                without_prefix, in_file["into a file, 2 worker processes"]
            ),
        }
        found = compare(runs, next(iter(runs)), rounds)
    finally:
        shutil.rmtree(folder)
    return {
        name: {**one, "images per second": NUM_FILES / one["seconds"]}
        for name, one in found.items()
    }


def prefix(rounds: int) -> dict[str, Any]:
    """Batch size -> processor time of one batch on one thread, and over that without the prefix
    kept.
    """
    scorer = Scorer(*owl2_hf.load_default(dtype=torch.float32), PRESET)
    shared = with_prefix(scorer)
    found = {}
    for batch in (1, BATCH):
        images = [picture(64, 64) for _ in range(batch)]
        inputs = scorer.prepare(images)
        both = {"whole prompt": scorer, "prefix kept": shared}
        times: dict[str, list[float]] = {name: [] for name in both}
        for turn in range(3 + 10 * rounds):
            for name, one in both.items():
                start = time.process_time()
                one.score_prepared(inputs)
                if turn >= 3:
                    times[name].append(time.process_time() - start)
        base = times["whole prompt"]
        found[str(batch)] = {name: summarize(taken, base) for name, taken in times.items()}
    return found


def main() -> None:
    options = parser(__doc__, rounds=5)
    args: argparse.Namespace = options.parse_args()
    torch.set_num_threads(args.threads)
    results = {"ways": ways(args.rounds)}
    torch.set_num_threads(1)
    results["prefix"] = prefix(args.rounds)
    for name, found in results["ways"].items():
        print(f"{row(name, found)}, {found['images per second']:.1f} images a second")
    for batch, found in results["prefix"].items():
        print(row(f"prefix kept, batch of {batch}", found["prefix kept"]))
    write(args.json, args, results)


if __name__ == "__main__":
    main()
