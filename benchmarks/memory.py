"""Computes the tables of docs/memory.md: GPU memory for a model of the published shape.

    python -m benchmarks.memory --json benchmarks/results/memory.json

Nothing is measured, so the machine does not matter. Takes a few minutes and less than 2 GB.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from owl2_hf.memory import Memory, inference_memory, memory_of_tasks, training_memory
from owl2_hf.modeling import MplugOwl2Config

# Batch size, length, images of a row.
SIZES = ((8, 512, 1), (1, 2048, 8), (4, 2048, 1), (16, 2048, 1))


def by_size(config: MplugOwl2Config) -> Iterator[tuple[str, dict[str, Memory]]]:
    """Inference and LoRA (with checkpointing) for several sizes of a batch."""
    for batch_size, length, images in SIZES:
        size = {"batch_size": batch_size, "length": length, "images": images}
        name = f"{batch_size} x {length:,} positions, {images} image{'s' * (images > 1)} each"
        yield (
            name,
            {
                "inference, bf16": inference_memory(config, **size),
                "lora": training_memory(config, "lora", **size),
            },
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="where to write the results")
    path = parser.parse_args().json
    config = MplugOwl2Config()
    tasks, sizes = {}, {}
    for name, found in memory_of_tasks(config):
        tasks[name] = asdict(found)
        print(f"{name:28} {found.total / 1e9:8.2f} GB", flush=True)
    for name, row in by_size(config):
        sizes[name] = {task: found.total for task, found in row.items()}
        print(f"{name:36} {sizes[name]}", flush=True)
    if path is not None:
        results = {"results": {"tasks": tasks, "sizes": sizes}}
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
