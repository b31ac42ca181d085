"""How well a scorer ranks degraded images, beside what simple numbers tell: SRCC and PLCC on each
held-out part.

`python -m experiments.default_scorer.evaluate DATA MODEL [MODEL ...]` prints them as JSON. A
baseline may have either sign, so of its correlations the size counts; a scorer's keep their sign.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging

from owl2_hf.scoring import Preset, Scorer
from owl2_hf.scoring.presets import load_preset
from owl2_hf.scoring.statistics import plcc, srcc

from .data import Row, read_rows, sharpness

PARTS = ("unseen images", "unseen kinds")
NUM_FIT = 2000  # training images that the fitted baseline learns from
Table = dict[str, dict[str, dict[str, float]]]  # kind, or "all" -> method -> statistic


def scores_of(model: Path, data: Path, rows: Sequence[Row], preset: Preset | None = None):
    """(N,) scores of the images of these rows, computed in float32.

    Args:
        preset: How the model is asked, where it has no `scorer.json`.
    """
    loaded = AutoModelForImageTextToText.from_pretrained(model, dtype="float32").eval()
    processor = AutoProcessor.from_pretrained(model)
    scorer = Scorer(loaded, processor, preset or load_preset(str(model)), batch_size=16)
    found = scorer([str(data / row["image"]) for row in rows])
    return np.array([one.score for one in found])


def simple_numbers(data: Path, rows: Sequence[Row]) -> dict[str, np.ndarray]:
    """(N,) bytes of each file, a PNG whatever the degradation; and variances of the Laplacian."""
    return {
        "file size": np.array([(data / row["image"]).stat().st_size for row in rows], float),
        "sharpness": np.array([sharpness(Image.open(data / row["image"])) for row in rows]),
    }


def fitted(data: Path, rows: Sequence[Row]) -> np.ndarray:
    """(N,) opinions guessed from both simple numbers, by a quadratic fitted to training images."""

    def terms(own: Sequence[Row]) -> np.ndarray:
        size, sharp = (np.log(1 + values) for values in simple_numbers(data, own).values())
        return np.stack([np.ones_like(size), size, sharp, size**2, sharp**2, size * sharp], 1)

    train = read_rows(data, "train")[:NUM_FIT]
    opinions = np.array([float(row["mos"]) for row in train])
    weights, *_ = np.linalg.lstsq(terms(train), opinions, rcond=None)
    return terms(rows) @ weights


def agreement(rows: Sequence[Row], values: Mapping[str, np.ndarray], signed: bool) -> Table:
    """SRCC and PLCC of each method over all rows, and over those of each kind of degradation."""
    opinions = np.array([float(row["mos"]) for row in rows])
    kinds = np.array([row["kind"] for row in rows])
    table: Table = {}
    for kind in ("all", *dict.fromkeys(kinds.tolist())):
        chosen = np.ones(len(rows), bool) if kind == "all" else kinds == kind
        table[kind] = {}
        for method, own in values.items():
            found = (srcc(own[chosen], opinions[chosen]), plcc(own[chosen], opinions[chosen]))
            first, second = found if signed else map(abs, found)
            table[kind][method] = {"srcc": round(first, 4), "plcc": round(second, 4)}
    return table


def evaluate_baselines(data: Path) -> dict[str, Table]:
    """Part -> table of file size, sharpness, and the fit of both."""
    tables = {}
    for part in PARTS:
        rows = read_rows(data, part)
        values = {**simple_numbers(data, rows), "both, fitted": fitted(data, rows)}
        tables[part] = agreement(rows, values, signed=False)
    return tables


def evaluate_model(model: Path, data: Path, preset: Preset | None = None) -> dict[str, Table]:
    """Part -> table of one model, under the method `scorer`."""
    tables = {}
    for part in PARTS:
        rows = read_rows(data, part)
        values = {"scorer": scores_of(model, data, rows, preset)}
        tables[part] = agreement(rows, values, signed=True)
    return tables


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("models", type=Path, nargs="*")
    args = parser.parse_args()
    logging.disable_progress_bar()
    found = {str(model): evaluate_model(model, args.data) for model in args.models}
    print(json.dumps({"baselines": evaluate_baselines(args.data), **found}, indent=2))


if __name__ == "__main__":
    main()
