"""The decoder against transformers' LlamaModel of the same shape: prefill, decoding, a training step and its memory.

    python -m benchmarks.decoder --json decoder.json

Both models run in turns, A B A B, on the same threads, with the same attention and the same numbers of weights that a
token passes. The mixed prompt has 512 positions, 4 x 65 of them visual. Memory is the peak of the training step beyond
what model and gradients take, each in a process of its own.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import DynamicCache, LlamaConfig, LlamaModel

from owl2_hf.modeling import MplugOwl2TextConfig, MplugOwl2TextModel

SHAPES = {
    "1024 x 8": {"hidden_size": 1024, "intermediate_size": 2752, "num_hidden_layers": 8, "num_attention_heads": 16},
    "4096 x 2": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 2, "num_attention_heads": 32},
}
LIMITS = {"prefill, mixed": 1.05, "prefill, text": 1.02, "decode": 1.02, "training step": 1.06, "training memory": 1.03}
POSITIONS, PICTURE, STARTS = 512, 65, (10, 120, 250, 400)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def build(name: str, shape: str, dtype: torch.dtype) -> torch.nn.Module:
    """`ours` or `llama`, with random weights."""
    fields = {**SHAPES[shape], "num_key_value_heads": SHAPES[shape]["num_attention_heads"], "vocab_size": 128}
    torch.manual_seed(0)
    if name == "ours":
        return MplugOwl2TextModel(MplugOwl2TextConfig(**fields)).to(dtype)
    return LlamaModel(LlamaConfig(**fields)).to(dtype)


def indicators() -> torch.Tensor:
    """(1, L), 1 at the positions of four pictures."""
    ids = torch.zeros(1, POSITIONS, dtype=torch.long)
    for start in STARTS:
        ids[0, start : start + PICTURE] = 1
    return ids


def runs_of(name: str, model: torch.nn.Module) -> dict[str, Callable[[], None]]:
    """What is measured of one model."""
    width = model.config.hidden_size
    embeds = torch.randn(1, POSITIONS, width, dtype=model.dtype, generator=torch.Generator().manual_seed(1))
    mixed = {"mm_token_type_ids": indicators()} if name == "ours" else {}
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model.eval()(inputs_embeds=embeds, past_key_values=cache, use_cache=True)

    @torch.no_grad()
    def prefill(**kwargs) -> None:
        model.eval()(inputs_embeds=embeds, use_cache=False, **kwargs)

    @torch.no_grad()
    def decode() -> None:
        for _ in range(8):
            model.eval()(inputs_embeds=embeds[:, :1], past_key_values=cache, use_cache=True)
        cache.crop(-8)

    def train() -> None:
        train_step(model, embeds, mixed)

    return {
        "prefill, mixed": lambda: prefill(**mixed),
        "prefill, text": prefill,
        "decode": decode,
        "training step": train,
    }


def train_step(model: torch.nn.Module, embeds: torch.Tensor, mixed: dict[str, torch.Tensor]) -> None:
    """Forward and backward; the gradients stay, as those of accumulated steps do."""
    model.train()(inputs_embeds=embeds, use_cache=False, **mixed).last_hidden_state.float().square().mean().backward()


def seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def compare(shape: str, dtype: torch.dtype, rounds: int) -> dict[str, dict[str, float]]:
    """Measurement -> medians in seconds, and median and spread (its quartiles) of ours over LLaMA's, turn by turn."""
    models = {name: build(name, shape, dtype) for name in ("llama", "ours")}
    runs = {name: runs_of(name, model) for name, model in models.items()}
    results = {}
    for what in runs["ours"]:
        times: dict[str, list[float]] = {name: [] for name in models}
        for turn in range(rounds + 1):
            for name in models:
                taken = seconds(runs[name][what])
                if turn:  # the first turn warms up
                    times[name].append(taken)
        ratios = [ours / llama for ours, llama in zip(times["ours"], times["llama"], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        medians = {name: statistics.median(values) for name, values in times.items()}
        results[what] = {**medians, "ratio": statistics.median(ratios), "low": low, "high": high}
    return results


def training_memory(name: str, shape: str, dtype: torch.dtype) -> float:
    """MB of the peak of a second training step beyond what there was before the first."""
    model = build(name, shape, dtype)
    embeds = torch.randn(1, POSITIONS, model.config.hidden_size, dtype=dtype)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(2):
        train_step(model, embeds, {"mm_token_type_ids": indicators()} if name == "ours" else {})
    whole = sum(2 * parameter.numel() * parameter.element_size() for parameter in model.parameters()) / 1e6
    return whole + (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3


def _memory_in_a_process(name: str, shape: str, dtype: str) -> float:
    command = [sys.executable, "-m", "benchmarks.decoder", "--memory-of", name, "--shapes", shape, "--dtypes", dtype]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--dtypes", nargs="*", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--memory-of", choices=("ours", "llama"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        print(training_memory(args.memory_of, args.shapes[0], DTYPES[args.dtypes[0]]))
        return
    results = {}
    for shape in args.shapes:
        for dtype in args.dtypes:
            found = compare(shape, DTYPES[dtype], args.rounds)
            memory = {name: _memory_in_a_process(name, shape, dtype) for name in ("llama", "ours")}
            found["training memory"] = {**memory, "ratio": memory["ours"] / memory["llama"]}
            results[f"{shape}, {dtype}"] = found
            print(f"{shape}, {dtype}, {args.threads} threads, sdpa")
            for what, row in found.items():
                spread = f"{row['low']:.3f} to {row['high']:.3f}" if "low" in row else ""
                print(f"  {what:16} ratio {row['ratio']:.3f}  {spread:16} (at most {LIMITS[what]})", flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps({"threads": args.threads, "rounds": args.rounds, "results": results}, indent=1))


if __name__ == "__main__":
    main()
