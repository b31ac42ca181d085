"""The paper's questions at a small scale: `python -m experiments.ablations DATA_DIR OUT`.

Does the modality-adaptive module help, how many queries does the abstractor need, how large must
pictures be, are two stages better than one, and should the vision encoder train? Every variant
differs from the base in one thing and is trained from the same beginnings with several seeds: a
LLaMA of the embedded default model's size that has read text alone, and the default model's vision
encoder. DATA_DIR is what `experiments.small.data` wrote. Finished runs are not repeated.

Writes OUT/results.json (every run), OUT/table.md (means and spreads) and OUT/ablations.png.
"""

import argparse
import json
import shutil
import statistics
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import owl2_hf
from owl2_hf.conversion import initialize
from owl2_hf.default import default_dir
from owl2_hf.training.recipe import DataRecipe, Recipe
from owl2_hf.training.run import train

from .small.evaluate import evaluate

# Shown score -> (test file, its key, whether more is better).
SCORES = {
    "easy-VQA": ("easy-VQA", "accuracy", True),
    "unseen artist, token F1": ("captions, unseen-style", "token F1", True),
    "text, perplexity": ("text", "perplexity of meanings", False),
}


@dataclass(frozen=True)
class Variant:
    """What a run differs in.

    Args:
        has_module: The decoder has the modality-adaptive module.
        num_queries: Of the abstractor.
        image_size: Side of a picture in pixels.
        has_two_stages: Captions first, with the language model frozen; otherwise all steps are of
            the second stage.
        trains_vision: The vision encoder trains.
    """

    has_module: bool = True
    num_queries: int = 16
    image_size: int = 64
    has_two_stages: bool = True
    trains_vision: bool = True


VARIANTS = {
    "base": Variant(),
    "without the module": Variant(has_module=False),
    "8 queries": Variant(num_queries=8),
    "32 queries": Variant(num_queries=32),
    "64 queries": Variant(num_queries=64),
    "32 pixels": Variant(image_size=32),
    "96 pixels": Variant(image_size=96),
    "one stage": Variant(has_two_stages=False),
    "frozen vision encoder": Variant(trains_vision=False),
}


@dataclass(frozen=True)
class Budget:
    """Steps of each stage, rows of a step, and questions of each test file."""

    text_steps: int = 300
    first_steps: int = 200
    second_steps: int = 1000
    batch_size: int = 8
    limit: int = 300


def train_language_model(folder: Path, data: Path, budget: Budget) -> Path:
    """A LLaMA of the default model's size that has read the training files' conversations without
    pictures.
    """
    target, rough = folder / "llama", folder / "llama.owl2"
    if target.is_dir():
        return target
    torch.manual_seed(0)
    model, processor = owl2_hf.load_default(dtype=torch.float32)
    text = model.config.text_config
    same = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    )
    fields = {
        name: getattr(text, name) for name in (*same, "rms_norm_eps", "max_position_embeddings")
    }
    tied = {"tie_word_embeddings": True, "initializer_range": 0.04}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    llama = LlamaForCausalLM(
        LlamaConfig(vocab_size=model.config.image_token_id, **fields, **tied, **ids)
    )
    llama.save_pretrained(folder / "llama.fresh")
    processor.tokenizer.save_pretrained(folder / "llama.fresh")
    initialize(folder / "llama.fresh", rough, default_dir(), overwrite=True)
    rows = [
        line
        for line in (data / "instruct.train.jsonl").open(encoding="utf-8")
        if '"images"' not in line
    ]
    (folder / "text.jsonl").write_text("".join(rows), encoding="utf-8")
    everything = _recipe(
        rough, folder / "llama.trained", folder / "text.jsonl", budget.text_steps, budget, 0
    )
    everything.trains = ["embeddings", "language_model"]
    train(everything)
    trained = owl2_hf.MplugOwl2ForConditionalGeneration.from_pretrained(folder / "llama.trained")
    state = trained.model.language_model.state_dict()
    state["embed_tokens.weight"] = state["embed_tokens.weight"][: llama.config.vocab_size]
    llama.model.load_state_dict(
        {name: value for name, value in state.items() if "visual_" not in name}
    )
    shutil.move(folder / "llama.fresh", target)
    llama.save_pretrained(target)
    return target


def _recipe(model: Path, target: Path, rows: Path, steps: int, budget: Budget, seed: int) -> Recipe:
    settings: dict[str, Any] = {
        "max_steps": steps,
        "per_device_train_batch_size": budget.batch_size,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "weight_decay": 0.05,
        "logging_steps": 50,
        "save_strategy": "no",
        "use_cpu": True,
        "seed": seed,
    }
    return Recipe(
        model=str(model), output_dir=str(target), data=DataRecipe(train=str(rows)), trainer=settings
    )


def run(
    name: str, seed: int, language: Path, data: Path, folder: Path, budget: Budget
) -> dict[str, Any]:
    """Train and evaluate one variant."""
    variant = VARIANTS[name]
    place = folder / f"{name.replace(' ', '-')}.{seed}"
    shutil.rmtree(place, ignore_errors=True)
    start = _begin(variant, seed, language, place / "start")
    vision = ["vision_tower"] if variant.trains_vision else []
    branch = ["visual_branch"] if variant.has_module else []
    steps = budget.second_steps
    if variant.has_two_stages:
        first = _recipe(
            start, place / "first", data / "captions.train.jsonl", budget.first_steps, budget, seed
        )
        first.trains = [*vision, "connector", *branch]
        train(first)
        start = place / "first"
    else:
        steps += budget.first_steps
    second = _recipe(start, place / "second", data / "instruct.train.jsonl", steps, budget, seed)
    second.trains = [*vision, "connector", *branch, "embeddings", "language_model"]
    second.learning_rates = {"vision_tower": 3e-4} if variant.trains_vision else {}
    train(second)
    scores = evaluate(place / "second", data, budget.limit)
    shutil.rmtree(place)
    return {"variant": name, "seed": seed, "budget": asdict(budget), "scores": scores}


def _begin(variant: Variant, seed: int, language: Path, target: Path) -> Path:
    initialize(
        language, target, default_dir(), variant.image_size, variant.num_queries, 2, "float32", seed
    )
    if variant.has_module:
        return target
    config = owl2_hf.MplugOwl2Config.from_pretrained(target)
    config.text_config.modality_specific_projections, config.text_config.modality_specific_norms = (
        [],
        False,
    )
    # The visual branch began as a copy of the text branch; without it both modalities share the
    # latter.
    plain = owl2_hf.MplugOwl2ForConditionalGeneration.from_pretrained(target, config=config)
    owl2_hf.MplugOwl2Processor.from_pretrained(target).save_pretrained(target.with_name("plain"))
    plain.save_pretrained(target.with_name("plain"))
    return target.with_name("plain")


def table(results: Sequence[dict[str, Any]]) -> str:
    """Mean and standard deviation over seeds, by variant."""
    lines = [
        f"| variant | seeds | {' | '.join(SCORES)} |",
        "| --- | --- |" + " --- |" * len(SCORES),
    ]
    for name in VARIANTS:
        if own := [result["scores"] for result in results if result["variant"] == name]:
            cells = [
                _spread([scores[file][key] for scores in own]) for file, key, _ in SCORES.values()
            ]
            lines.append(f"| {name} | {len(own)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _spread(values: list[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.3f} ± {deviation:.3f}"


def plot(results: Sequence[dict[str, Any]], file: Path) -> None:
    """Every run as a dot, every variant's mean as a line."""
    from matplotlib.figure import Figure

    names = [name for name in VARIANTS if any(result["variant"] == name for result in results)]
    figure = Figure(figsize=(4 * len(SCORES), 0.4 * len(names) + 1.2), layout="constrained")
    for axes, (title, (test, key, more)) in zip(
        figure.subplots(1, len(SCORES), sharey=True), SCORES.items(), strict=True
    ):
        for place, name in enumerate(names):
            values = [
                result["scores"][test][key] for result in results if result["variant"] == name
            ]
            axes.plot(
                values,
                [place] * len(values),
                "o",
                alpha=0.6,
                color="tab:blue" if place else "tab:orange",
            )
            axes.plot([statistics.mean(values)] * 2, [place - 0.3, place + 0.3], color="black")
        axes.set_yticks(range(len(names)), names)
        axes.set_title(title + (" (more is better)" if more else " (less is better)"), fontsize=9)
        axes.grid(axis="x", alpha=0.3)
    figure.axes[0].invert_yaxis()
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    for name, value in asdict(Budget()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    budget = Budget(**{name: getattr(args, name) for name in asdict(Budget())})
    args.out.mkdir(parents=True, exist_ok=True)
    done = args.out / "results.json"
    results = json.loads(done.read_text(encoding="utf-8")) if done.is_file() else []
    with redirect_stdout(sys.stderr):
        language = train_language_model(args.out, args.data, budget)
        for seed in range(args.seeds):
            for name in args.variants:
                if any(
                    (one["variant"], one["seed"], one["budget"]) == (name, seed, asdict(budget))
                    for one in results
                ):
                    continue
                results.append(run(name, seed, language, args.data, args.out, budget))
                done.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
                (args.out / "table.md").write_text(table(results), encoding="utf-8")
                plot(results, args.out / "ablations.png")
    print(table(results))


if __name__ == "__main__":
    main()
