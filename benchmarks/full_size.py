"""Conversion of a full-size checkpoint: time against `cp -r`, peak memory, then loading and
generation.

The checkpoint has the published model's shapes and the original's 33 shards, with random weights:

    python -m benchmarks.full_size make DIR --tokenizer tokenizer.model
    python -m benchmarks.full_size run DIR WORK --json results.json

needs 33 GB of disk for WORK beside DIR, and for the last step 20 GB of memory.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch

from owl2_hf.conversion.original_config import original_config
from owl2_hf.conversion.sources import expected_tensors
from owl2_hf.modeling import MplugOwl2Config
from owl2_hf.modeling.conversion_mplug_owl2 import original_key, split_number, to_original

TOKENS = (1, 17)  # new tokens of two answers; their difference is decoding alone
INV_FREQ = "model.layers.{}.self_attn.rotary_emb.inv_freq"


def original_shapes(config: MplugOwl2Config) -> dict[str, torch.Size]:
    """Key -> shape of the original's checkpoint, without the sin-cos tables, as it was
    published.
    """
    expected = expected_tensors(config)
    shapes = {}
    for name in expected:
        key, parts = original_key(name)
        if not key.endswith("_pos_embed"):
            shapes[key] = to_original(key, {part: expected[part] for part in parts}, config).shape
    text = config.text_config
    for layer in range(text.num_hidden_layers):
        shapes[INV_FREQ.format(layer)] = torch.Size(
            [text.hidden_size // text.num_attention_heads // 2]
        )
    return shapes


def make(
    folder: Path, config: MplugOwl2Config, tokenizer: Path | None = None, dtype=torch.bfloat16
) -> None:
    """Random weights in the original's layout: one shard for each decoder layer, one for the
    rest.
    """
    folder.mkdir(parents=True)
    num_shards = config.text_config.num_hidden_layers + 1
    shards: dict[int, dict[str, torch.Size]] = defaultdict(dict)
    for key, shape in original_shapes(config).items():
        is_decoder = split_number(key)[0].startswith("model.layers.{}.")
        shards[int(split_number(key)[1]) + 1 if is_decoder else num_shards][key] = shape
    weight_map = {}
    generator = torch.Generator().manual_seed(0)
    for number, keys in sorted(shards.items()):
        name = f"pytorch_model-{number}-of-{num_shards}.bin"
        tensors = {key: _random(key, shape, dtype, generator) for key, shape in keys.items()}
        torch.save(tensors, folder / name)
        weight_map.update(dict.fromkeys(keys, name))
        print(f"made {name}", flush=True)
    (folder / "pytorch_model.bin.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    config.dtype = dtype
    (folder / "config.json").write_text(json.dumps(original_config(config), indent=2))
    if tokenizer is not None:
        shutil.copyfile(tokenizer, folder / "tokenizer.model")


def _random(
    key: str, shape: torch.Size, dtype: torch.dtype, generator: torch.Generator
) -> torch.Tensor:
    if key.endswith("inv_freq"):
        return 10000.0 ** -(torch.arange(len(torch.empty(shape))) / shape[0])
    if "norm" in key or "ffn_ln" in key:
        return (
            torch.ones(shape, dtype=dtype)
            if key.endswith("weight")
            else torch.zeros(shape, dtype=dtype)
        )
    return torch.empty(shape, dtype=dtype).normal_(0.0, 0.02, generator=generator)


def timed(command: list[str], log: Path | None = None) -> dict[str, float]:
    """Seconds, and MB of the largest resident set, of a process of its own, from a cold cache.

    A process starts with the peak of the one that started it, so what is smaller than this one is
    not told.
    """
    drop_caches()
    start = time.perf_counter()
    with (log or Path(os.devnull)).open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT if log else None
        )
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command} failed: {log.read_text()[-2000:] if log else status}")
    return {"seconds": time.perf_counter() - start, "peak_mb": usage.ru_maxrss / 1024}


def drop_caches() -> None:
    """So that each run reads from the disk; without the right to do so, all of them may find the
    files in memory.
    """
    subprocess.run(["sync"], check=True)
    if os.geteuid() == 0 and Path("/proc/sys/vm/drop_caches").exists():
        Path("/proc/sys/vm/drop_caches").write_text("3")


def run(source: Path, work: Path, repeats: int = 3) -> dict:
    """Copy and convert in turn, then ask the converted model about a picture."""
    work.mkdir(parents=True)
    cli = [sys.executable, "-m", "owl2_hf"]
    copies, conversions = [], []
    for turn in range(repeats):
        copies.append(timed(["cp", "-r", str(source), str(work / "copy")]))
        shutil.rmtree(work / "copy")
        conversions.append(
            timed([*cli, "convert", str(source), str(work / "converted")], work / "convert.log")
        )
        if turn < repeats - 1:
            shutil.rmtree(work / "converted")
        print(f"cp {copies[-1]}, convert {conversions[-1]}", flush=True)
    answers = [_answer(cli, work, count) for count in TOKENS]
    num_bytes = sum(path.stat().st_size for path in source.iterdir())
    largest = max(path.stat().st_size for path in source.iterdir())
    return {
        "bytes": num_bytes,
        "largest_shard_bytes": largest,
        "cp_seconds": [run["seconds"] for run in copies],
        "convert_seconds": [run["seconds"] for run in conversions],
        "convert_peak_mb": [run["peak_mb"] for run in conversions],
        "throughput_of_cp": statistics.median(run["seconds"] for run in copies)
        / statistics.median(run["seconds"] for run in conversions),
        "peak_above_largest_shard_mb": max(run["peak_mb"] for run in conversions) - largest / 2**20,
        "describe": dict(zip(TOKENS, answers, strict=True)),
        "load_and_prefill_seconds": answers[0]["seconds"],
        "tokens_per_second": (TOKENS[1] - TOKENS[0])
        / (answers[1]["seconds"] - answers[0]["seconds"]),
        "answer": (work / "describe.log").read_text().splitlines()[-1],
        "threads": os.cpu_count(),
        "memory_mb": os.sysconf("SC_PHYS_PAGES") * resource.getpagesize() / 2**20,
    }


def _answer(cli: list[str], work: Path, num_tokens: int) -> dict[str, float]:
    """A picture described by the converted model in a process of its own, greedily."""
    question = ["describe", "--model", str(work / "converted"), "-q", "What is this?"]
    return timed([*cli, *question, "--max-new-tokens", str(num_tokens)], work / "describe.log")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    maker = commands.add_parser("make", help="write the checkpoint")
    maker.add_argument("folder", type=Path)
    maker.add_argument("--tokenizer", type=Path, help="a tokenizer.model to put beside the weights")
    runner = commands.add_parser("run", help="measure")
    runner.add_argument("folder", type=Path)
    runner.add_argument(
        "work", type=Path, help="a folder to make, for what is copied and converted"
    )
    runner.add_argument("--repeats", type=int, default=3)
    runner.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "make":
        make(arguments.folder, MplugOwl2Config(), arguments.tokenizer)
        return
    results = run(arguments.folder, arguments.work, arguments.repeats)
    print(json.dumps(results, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
