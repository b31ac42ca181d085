"""The decoder against transformers' LlamaModel of the same shape: prefill, decoding, a training
step and its memory.

    python -m benchmarks.decoder --json decoder.json

Both models run in turns, A B A B, on the same threads, with the same attention and the same numbers
of weights that a token passes. The mixed prompt has 512 positions, 4 x 65 of them visual. Memory is
the peak of the training step beyond what weights and gradients take (of those ours has more, by the
visual keys, values and norms), each in a process of its own.
"""

import argparse
import math
import os
import subprocess
import sys

import torch
from transformers import DynamicCache, LlamaConfig, LlamaModel

from owl2_hf.modeling import MplugOwl2TextConfig, MplugOwl2TextModel
from owl2_hf.modeling.compatibility_mplug_owl2 import CACHE

from .timing import (
    DTYPES,
    Run,
    in_turns,
    parser,
    peak_memory,
    resident_memory,
    row,
    summarize,
    write,
)

SHAPES = {
    "1024 x 8": {
        "hidden_size": 1024,
        "intermediate_size": 2752,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
    },
    "4096 x 2": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 2,
        "num_attention_heads": 32,
    },
}
LIMITS = {"prefill, mixed": 1.05, "prefill, text": 1.02, "decode": 1.02, "training step": 1.06}
MEMORY_LIMIT = 1.03
BUILDS = 3
POSITIONS, PICTURE, STARTS = 512, 65, (10, 120, 250, 400)


def build(name: str, shape: str, dtype: torch.dtype) -> torch.nn.Module:
    """`ours` or `llama`, with random weights."""
    fields = {
        **SHAPES[shape],
        "num_key_value_heads": SHAPES[shape]["num_attention_heads"],
        "vocab_size": 128,
    }
    torch.manual_seed(0)
    kind, config = (
        (MplugOwl2TextModel, MplugOwl2TextConfig) if name == "ours" else (LlamaModel, LlamaConfig)
    )
    return kind._from_config(config(**fields), dtype=dtype)


def indicators() -> torch.Tensor:
    """(1, L), 1 at the positions of four pictures."""
    ids = torch.zeros(1, POSITIONS, dtype=torch.long)
    for start in STARTS:
        ids[0, start : start + PICTURE] = 1
    return ids


def runs_of(name: str, model: torch.nn.Module) -> dict[str, Run]:
    """What is measured of one model."""
    width = model.config.hidden_size
    embeds = torch.randn(
        1, POSITIONS, width, dtype=model.dtype, generator=torch.Generator().manual_seed(1)
    )
    mixed = {"mm_token_type_ids": indicators()} if name == "ours" else {}
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model.eval()(inputs_embeds=embeds, **{CACHE: cache}, use_cache=True)

    @torch.no_grad()
    def prefill(**kwargs) -> None:
        model.eval()(inputs_embeds=embeds, use_cache=False, **kwargs)

    @torch.no_grad()
    def decode() -> None:
        for _ in range(16):
            model.eval()(inputs_embeds=embeds[:, :1], **{CACHE: cache}, use_cache=True)
        cache.crop(-16)

    def train() -> None:
        train_step(model, embeds, mixed)

    return {
        "prefill, mixed": lambda: prefill(**mixed),
        "prefill, text": prefill,
        "decode": decode,
        "training step": train,
    }


def train_step(
    model: torch.nn.Module, embeds: torch.Tensor, mixed: dict[str, torch.Tensor]
) -> None:
    """Forward and backward; the gradients stay, as those of accumulated steps do."""
    model.train()(
        inputs_embeds=embeds, use_cache=False, **mixed
    ).last_hidden_state.float().square().mean().backward()


def compare_models(
    shape: str, dtype: torch.dtype, rounds: int
) -> dict[str, dict[str, dict[str, float]]]:
    """Measurement -> model -> its times, ours over LLaMA's turn by turn.

    The models are built anew for each third of the rounds: where their weights come to lie decides
    a few per cent.
    """
    times: dict[str, dict[str, list[float]]] = {}
    for _ in range(BUILDS):
        runs = {name: runs_of(name, build(name, shape, dtype)) for name in ("llama", "ours")}
        for what in runs["ours"]:
            taken = in_turns(
                {name: runs[name][what] for name in runs}, math.ceil(rounds / BUILDS), warmup=2
            )
            known = times.setdefault(what, {name: [] for name in runs})
            for name in runs:
                known[name] += taken[name]
    return {
        what: {name: summarize(one[name], one["llama"]) for name in one}
        for what, one in times.items()
    }


def training_memory(name: str, shape: str, dtype: torch.dtype) -> float:
    """MB of the peak of training steps beyond weights and gradients."""
    model = build(name, shape, dtype)
    embeds = torch.randn(1, POSITIONS, model.config.hidden_size, dtype=dtype)
    for parameter in model.parameters():
        # Ones, for memory that is only reserved does not count yet.
        parameter.grad = torch.ones_like(parameter)
    before = resident_memory()
    for _ in range(3):
        train_step(model, embeds, {"mm_token_type_ids": indicators()} if name == "ours" else {})
    return (peak_memory() - before) / 1e6


def _memory_in_a_process(name: str, shape: str, dtype: str) -> float:
    command = [
        sys.executable,
        "-m",
        "benchmarks.decoder",
        "--memory-of",
        name,
        "--shapes",
        shape,
        "--dtypes",
        dtype,
    ]
    # Freed tensors go back to the system at once; otherwise holes of the heap count, which differ
    # by a quarter.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    return float(
        subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    )


def main() -> None:
    options = parser(__doc__, rounds=21)
    options.add_argument("--shapes", nargs="*", choices=SHAPES, default=list(SHAPES))
    options.add_argument("--dtypes", nargs="*", choices=DTYPES, default=list(DTYPES))
    options.add_argument("--memory-of", choices=("ours", "llama"), help=argparse.SUPPRESS)
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        print(training_memory(args.memory_of, args.shapes[0], DTYPES[args.dtypes[0]]))
        return
    results = {}
    for shape in args.shapes:
        for dtype in args.dtypes:
            found = compare_models(shape, DTYPES[dtype], args.rounds)
            print(f"{shape}, {dtype}, {args.threads} threads, sdpa")
            for what, names in found.items():
                print(row(what, names["ours"], LIMITS[what]), flush=True)
            memory = {name: _memory_in_a_process(name, shape, dtype) for name in ("llama", "ours")}
            ratio = memory["ours"] / memory["llama"]
            print(
                f"  training memory: {memory['ours']:.0f} MB, {ratio:.3f} (at most {MEMORY_LIMIT})"
            )
            results[f"{shape}, {dtype}"] = {**found, "training memory, MB": memory}
    write(args.json, args, results)


if __name__ == "__main__":
    main()
