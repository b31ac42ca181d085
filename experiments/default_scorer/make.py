"""Make the bundled scorer and measure it: `python -m experiments.default_scorer.make --out DIR`.

Images go to DIR/data; for each seed DIR/SEED holds what training starts from, the run of `owl2-hf
train`, the model as the package holds it, and results.json. What is there already is not made
again.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from owl2_hf.scoring.decision import scorer_files
from owl2_hf.scoring.presets import load_preset
from owl2_hf.training.recipe import load_recipe
from owl2_hf.training.scores import preset_of

from .data import FILE, write_all
from .evaluate import evaluate_model
from .start import write_start

RECIPE = Path(__file__).with_name("recipe.yaml")
RESULTS = "results.json"


def train(start: Path, data: Path, out: Path, seed: int, steps: int) -> None:
    """The run, by the command line that everybody has."""
    settings = [f"trainer.seed={seed}", f"trainer.max_steps={steps}"]
    command = [sys.executable, "-m", "owl2_hf", "train", str(RECIPE), "--model", str(start)]
    command += ["--data", str(data / FILE), "--out", str(out)]
    command += [part for setting in settings for part in ("--set", setting)]
    subprocess.run(command, check=True)


def export(run: Path, target: Path) -> None:
    """The trained model as the package holds it: weights of 16 bits, which load as 32."""
    model = AutoModelForImageTextToText.from_pretrained(run, dtype=torch.bfloat16)
    model.config.use_cache = True  # off for training
    model.save_pretrained(target)
    processor = AutoProcessor.from_pretrained(run)
    processor.save_pretrained(target)
    for name, text in scorer_files(load_preset(str(run)), processor).items():
        (target / name).write_text(text, encoding="utf-8")
    # Scores differ in the third digit: computed in bfloat16, many images would have the same.
    file = target / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "dtype": "float32"}, indent=2) + "\n")


def make_seed(folder: Path, data: Path, seed: int, steps: int) -> None:
    """Start, run, model and results of one seed."""
    if (folder / RESULTS).exists():
        return
    start, run, model = folder / "start", folder / "run", folder / "model"
    for left_over in (start, run, model):
        shutil.rmtree(left_over, ignore_errors=True)
    write_start(start, seed)
    train(start, data, run, seed, steps)
    export(run, model)
    scores = load_recipe(RECIPE).scores
    assert scores is not None
    untrained = evaluate_model(start, data, preset_of(scores, AutoProcessor.from_pretrained(start)))
    results = {"scorer": evaluate_model(model, data), "untrained": untrained}
    (folder / RESULTS).write_text(json.dumps(results, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=5000, help="to train on")
    parser.add_argument("--test-images", type=int, default=600, help="of each held-out part")
    parser.add_argument("--steps", type=int, default=800)
    args = parser.parse_args()
    data = args.out / "data"
    if not (data / FILE).exists():  # written last
        write_all(data, args.images, args.test_images)
    for seed in args.seeds:
        make_seed(args.out / str(seed), data, seed, args.steps)


if __name__ == "__main__":
    main()
