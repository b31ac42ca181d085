"""Scores of images: prepared images by batch size, JPEG files with and without worker processes,
and where the time goes.

The model has the published shape and random weights; the prompt is OneAlign's. The roofline is the
time that the matrix products of a forward pass alone take at the measured bfloat16 rate: their
FLOPs, as `operations.count` counts them, over that rate. JPEG files have 1600 x 1200 pixels.
Files are scored by `owl2_hf.scoring.dataset.score_dataset`, as `owl2-hf score --out` does.
"""

import math
import os
import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from owl2_hf.scoring import PRESETS, Scorer
from owl2_hf.scoring.batches import Preparation
from owl2_hf.scoring.dataset import Ranks, score_dataset

from ..timing import Run
from . import operations
from .frame import Setting, Step, aim, in_words, matmul_rate, peak_memory, time_of
from .processors import TOKENIZER, image_of, load, make_files

PRESET = PRESETS["one-align"]
SHARE_OF_ROOFLINE = 0.5
SHARE_OF_PREPARED = 0.9
ROUNDS = 5
DEFAULT_BATCH = 8  # of the command
BATCHES_OF_A_RUN = 64


def batch_sizes(setting: Setting) -> tuple[int, ...]:
    return (1, 2) if setting.tiny else (1, DEFAULT_BATCH, 32, 64, 128)


def large_batch(setting: Setting) -> int:
    """The batch size of the steps that have one."""
    return 2 if setting.tiny else 32


def make_scorer(setting: Setting, batch_size: int = DEFAULT_BATCH) -> Scorer:
    loaded = load(setting)
    return Scorer(loaded.model, loaded.processor, PRESET, batch_size=batch_size)


def square_image(setting: Setting, scorer: Scorer) -> Any:
    side = scorer.model.config.vision_config.image_size
    return image_of(setting).resize((side, side))


def prepared(setting: Setting) -> dict[str, Any]:
    """Images a second of inputs that are on the device."""
    scorer = make_scorer(setting)
    image = square_image(setting, scorer)
    found: dict[str, Any] = {}
    for size in batch_sizes(setting):
        inputs = scorer.prepare(size * [image])
        run = partial(scorer.score_prepared, inputs)
        flops = operations.count(run) / size
        taken = time_of(run, setting, ROUNDS) / size
        found[str(size)] = {
            "images per second": 1 / taken,
            "FLOPs per image": flops,
            "images per second, roofline": matmul_rate(setting) / flops,
            "share of the roofline": flops / matmul_rate(setting) / taken,
            "peak memory": peak_memory(run, setting),
        }
    best = max(found.values(), key=lambda one: one["images per second"])
    share = best["share of the roofline"]
    return {
        "preset": "one-align",
        "tokenizer": TOKENIZER,
        "counted by": operations.COUNTED_BY,
        "positions": inputs["input_ids"].shape[1],
        "by batch size": found,
        "aims": {"prepared images, share of the roofline": aim(share, at_least=SHARE_OF_ROOFLINE)},
        "shown": {"images per second": best["images per second"]},
    }


def where(setting: Setting) -> dict[str, Any]:
    """Seconds of each part of the way from a file to a score, in one process."""
    scorer, count = make_scorer(setting), large_batch(setting)
    on_cpu = Preparation(scorer, "quality").scorer  # as a worker process has it
    with TemporaryDirectory() as folder:
        files = make_files(Path(folder) / "files", count, setting)
        images = [scorer.open_image(str(file)) for file in files]
        made = on_cpu.prepare(images)
        inputs = made.to(setting.device)
        pixels = inputs["pixel_values"]
        rest = {name: value for name, value in inputs.items() if name != "pixel_values"}
        features = {"image": scorer.model.get_image_features(pixels)}

        def vision() -> None:
            scorer.model.get_image_features(pixels)

        def language() -> None:
            scorer.model(**rest, mm_encoder_outputs=features, logits_to_keep=1, use_cache=False)

        runs: dict[str, Run] = {
            "decode": lambda: [scorer.open_image(str(file)) for file in files],
            "prepare": lambda: on_cpu.prepare(images),
            "copy to the device": lambda: made.to(setting.device),
            "vision": vision,
            "language": language,
            "vision, language and scores": lambda: scorer.score_prepared(inputs),
        }
        taken = {name: time_of(run, setting, ROUNDS, 1) / count for name, run in runs.items()}
    rate = matmul_rate(setting)
    shares = {
        name: operations.count(run) / count / rate / taken[name]
        for name, run in (("vision", vision), ("language", language))
    }
    return {
        "batch size": count,
        "seconds per image": taken,
        "share of the roofline": shares,
        "shown": {f"{name}, ms per image": 1000 * value for name, value in taken.items()},
    }


def end_to_end(setting: Setting) -> dict[str, Any]:
    """Images a second from JPEG files to a file of scores."""
    size = large_batch(setting)
    scorer = make_scorer(setting, size)
    inputs = scorer.prepare(size * [square_image(setting, scorer)])
    rate = size / time_of(partial(scorer.score_prepared, inputs), setting, ROUNDS)
    usual = 1 if setting.tiny else Ranks().share_of(None)
    most = usual if setting.tiny else min(16, os.cpu_count() or 1)
    # Batch size, worker processes, and how many batches.
    runs = {
        (size, 0): BATCHES_OF_A_RUN // 8,
        (size, usual): BATCHES_OF_A_RUN,
        (size, most): BATCHES_OF_A_RUN,
        (DEFAULT_BATCH, usual): BATCHES_OF_A_RUN,
    }
    found: list[dict[str, Any]] = []
    for (batch_size, workers), batches in runs.items():
        scorer.batch_size = batch_size
        count = batch_size * (2 if setting.tiny else batches)
        found.append({"batch size": batch_size, "workers": workers, "images": count})
        try:
            speed = count / score_files(scorer, count, workers, setting)
        except RuntimeError as error:  # workers may lack shared memory, for one
            found[-1]["error"] = in_words(error)
        else:
            found[-1] |= {"images per second": speed, "over prepared": speed / rate}
    ratios = [
        one.get("over prepared", math.nan)
        for one in found
        if one["workers"] and one["batch size"] == size
    ]
    shown = {
        f"batches of {one['batch size']}, {one['workers']} workers, images per second": speed
        for one in found
        if (speed := one.get("images per second")) is not None
    }
    name = f"JPEG files with workers, over prepared images, batches of {size}"
    return {
        "processors": os.cpu_count(),
        f"prepared images per second, batches of {size}": rate,
        "runs": found,
        "aims": {name: aim(max(ratios), at_least=SHARE_OF_PREPARED)},
        "shown": shown,
    }


def score_files(scorer: Scorer, count: int, workers: int, setting: Setting) -> float:
    """Seconds of scoring so many files.

    Raises:
        RuntimeError: If an image has no score, or a worker process ends.
    """
    with TemporaryDirectory() as folder:
        files, out = Path(folder) / "files", Path(folder) / "scores.csv"
        make_files(files, count, setting)
        start = time.perf_counter()
        summary = score_dataset(scorer, [str(files)], out, num_workers=workers)
        taken = time.perf_counter() - start
    if summary is None or (summary.rows, summary.errors) != (count, 0):
        raise RuntimeError(f"expected scores of {count} images, got {summary}")
    return taken


STEPS = [
    Step("prepared images", prepared, minutes=0.4),
    Step("where the time goes", where, minutes=0.3),
    Step("JPEG files", end_to_end, minutes=0.9),
]
