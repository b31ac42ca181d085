"""Put a trained scorer into the package: `python -m experiments.default_scorer.install DIR`, with
the folder of `make`.

Copies the model of one seed, results.json of all seeds with the baselines, and the sample images,
and brings the table of the card up to date.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
from PIL import Image

from owl2_hf.default_scorer import default_scorer_dir

from ..packages import fetch
from .data import SIDE, read_rows
from .degrade import degrade
from .evaluate import PARTS, evaluate_baselines
from .make import RESULTS

# The sample, by which nothing was trained: a square of NASA's portrait of Eileen Collins.
SAMPLE, SAMPLE_BOX, SAMPLE_BLUR = "skimage/data/astronaut.png", (100, 0, 356, 256), 0.7
BEGIN, END = "<!-- results -->", "<!-- end of results -->"


def gather(folder: Path, seed: int) -> dict[str, Any]:
    """Results of all seeds that were made, with the baselines.

    Raises:
        ValueError: The seed to install was not made.
    """
    seeds = sorted(int(path.parent.name) for path in folder.glob(f"*/{RESULTS}"))
    if seed not in seeds:
        raise ValueError(
            f"{folder} has results of the seeds {seeds}, not of {seed}: make it first."
        )
    found = {one: json.loads((folder / str(one) / RESULTS).read_text()) for one in seeds}
    data = folder / "data"
    return {
        "seed": seed,
        "images": {part: len(read_rows(data, part)) for part in ("train", *PARTS)},
        "scorer": {one: results["scorer"] for one, results in found.items()},
        "untrained": {one: results["untrained"] for one, results in found.items()},
        "baselines": evaluate_baselines(data),
    }


def result_lines(results: dict[str, Any]) -> list[str]:
    """The card's table: a row for each part and kind, SRCC / PLCC in each cell."""
    seed, seeds = str(results["seed"]), list(results["scorer"])
    simple = list(next(iter(results["baselines"].values()))["all"])
    names = ["part", "degradation", "this scorer", f"{len(seeds)} seeds", "untrained", *simple]
    lines = [f"| {' | '.join(names)} |", f"|{' --- |' * len(names)}"]

    def pair(statistics: dict[str, float]) -> str:
        return f"{statistics['srcc']:.3f} / {statistics['plcc']:.3f}"

    for part in PARTS:
        for kind, row in results["baselines"][part].items():
            own = [results["scorer"][one][part][kind]["scorer"] for one in seeds]
            spread = [mean_and_std([one[name] for one in own]) for name in ("srcc", "plcc")]
            cells = [pair(results["scorer"][seed][part][kind]["scorer"]), " / ".join(spread)]
            cells += [pair(results["untrained"][seed][part][kind]["scorer"])]
            cells += [pair(row[name]) for name in simple]
            lines.append(f"| {' | '.join([part, kind, *cells])} |")
    return lines


def mean_and_std(values: Sequence[float]) -> str:
    spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
    return f"{mean(values):.3f}{spread}"


def write_samples(folder: Path) -> None:
    """A sharp image of the size that the model sees, and the same image blurred."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    photo = Image.open(fetch("scikit-image") / SAMPLE).convert("RGB").crop(SAMPLE_BOX)
    sharp = photo.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    sharp.save(folder / "astronaut.png", optimize=True)
    blurred = degrade(sharp, "blur", SAMPLE_BLUR, np.random.default_rng(0))
    blurred.save(folder / "astronaut-blurred.png", optimize=True)


def install(made: Path, seed: int, target: Path) -> None:
    results = json.loads(json.dumps(gather(made, seed)))  # keys as the file has them
    for file in (made / str(seed) / "model").iterdir():
        if file.is_file() and file.suffix != ".py":
            shutil.copyfile(file, target / file.name)
    (target / RESULTS).write_text(json.dumps(results, indent=1) + "\n")
    write_samples(target / "images")
    card = target / "README.md"
    before, _, rest = card.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    card.write_text("\n".join([f"{before}{BEGIN}", *result_lines(results), f"{END}{after}"]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("made", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="which of the models")
    parser.add_argument("--target", type=Path, default=default_scorer_dir())
    args = parser.parse_args()
    install(args.made, args.seed, args.target)


if __name__ == "__main__":
    main()
