"""The cache of prepared images: an epoch that reads from it against one that decodes the files.

    python -m benchmarks.image_cache --json image_cache.json

JPEG files of KonIQ's size, 1024 x 768, become squares of 448 pixels. Batches alone: the time of the
collator for all rows, without a cache, while it fills one, and with it. An epoch: the recipe
score-soft with the bundled model, which is small and sees 64 pixels; the losses are compared, too.
"""

import json
from collections.abc import Callable
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image

from owl2_hf.default import default_dir
from owl2_hf.processing import MplugOwl2Processor
from owl2_hf.training.collator import Collator
from owl2_hf.training.recipe import load_recipe
from owl2_hf.training.run import train

from .processor import SIDE, picture
from .timing import compare, parser, row, summarize, write

NUM_IMAGES = 48
SIZE = (1024, 768)
BATCH = 8
LEVELS = "[high, soft, bad]"  # words of the bundled model


def make_images(folder: Path) -> list[str]:
    """JPEG files, and opinions of them."""
    whole = picture(*SIZE)
    paths, lines = [], ["image,mos,std"]
    for number in range(NUM_IMAGES):
        image = Image.blend(whole, whole.rotate(number), 0.5)
        paths.append(str(folder / f"{number}.jpg"))
        image.save(paths[-1], quality=90)
        lines.append(f"{number}.jpg,{1 + number % 5},0.5")
    (folder / "opinions.csv").write_text("\n".join(lines), encoding="utf-8")
    return paths


def batches(paths: list[str], folder: Path, rounds: int) -> dict[str, Any]:
    """Times of all batches of an epoch, without the model."""
    processor = MplugOwl2Processor.from_pretrained(default_dir())
    processor.image_processor.size = {"height": SIDE, "width": SIDE}
    processor.image_processor.image_aspect_ratio = "pad"
    turns = [{"from": "human", "value": "<image>How is it?"}, {"from": "gpt", "value": "Good."}]
    rows = [{"image": path, "conversations": turns} for path in paths]

    def epoch(make: Callable[[], Collator]) -> list[torch.Tensor]:
        collator = make()
        return [
            collator(rows[start : start + BATCH])["pixel_values"]
            for start in range(0, len(rows), BATCH)
        ]

    def filled() -> Collator:
        rmtree(folder / "new", ignore_errors=True)
        return Collator(processor, image_cache=folder / "new")

    makers: dict[str, Callable[[], Collator]] = {
        "without": lambda: Collator(processor),
        "filling": filled,
        "with": lambda: Collator(processor, image_cache=folder / "kept"),
    }
    expected, _, found = (epoch(make) for make in makers.values())
    runs = {name: lambda make=make: epoch(make) for name, make in makers.items()}
    same = all(map(torch.equal, expected, found))
    return {**compare(runs, "without", rounds), "same pixels": same}


def epochs(folder: Path, rounds: int) -> dict[str, Any]:
    """Times of one epoch of training, and whether the losses are the same."""
    settings = ["model=default", f"data.train={folder / 'opinions.csv'}", f"scores.levels={LEVELS}"]
    settings += ["trainer.num_train_epochs=1", f"trainer.per_device_train_batch_size={BATCH}"]
    settings += ["trainer.bf16=false", "trainer.use_cpu=true", "trainer.save_strategy=no"]
    settings += ["trainer.disable_tqdm=true", "trainer.dataloader_num_workers=0"]
    settings += ["trainer.activation_checkpointing=false", "trainer.logging_steps=1"]

    def run(name: str, cache: Path | None) -> tuple[float, list[float]]:
        rmtree(folder / name, ignore_errors=True)
        own = [f"output_dir={folder / name}", f"data.image_cache={cache or 'null'}"]
        train(load_recipe("score-soft", [*settings, *own]))
        log = json.loads((folder / name / "trainer_state.json").read_text())["log_history"]
        return log[-1]["train_runtime"], [step["loss"] for step in log if "loss" in step]

    cache = folder / "trained"
    losses = [run("run", None)[1], run("run", cache)[1]]  # also fills the cache
    times: dict[str, list[float]] = {"without": [], "with": []}
    for _ in range(rounds):
        for name, place in (("without", None), ("with", cache)):
            taken, found = run("run", place)
            times[name].append(taken)
            losses.append(found)
    summaries = {name: summarize(taken, times["without"]) for name, taken in times.items()}
    return {**summaries, "same losses": all(one == losses[0] for one in losses)}


def main() -> None:
    options = parser(__doc__, rounds=5)
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    with TemporaryDirectory() as name:
        folder = Path(name)
        paths = make_images(folder)
        results = {
            "batches alone": batches(paths, folder, args.rounds),
            "an epoch of the bundled model": epochs(folder, args.rounds),
        }
    for what, found in results.items():
        for name, one in found.items():
            print(row(f"{what}, {name}", one) if isinstance(one, dict) else f"  {name}: {one}")
    write(args.json, args, results)


if __name__ == "__main__":
    main()
