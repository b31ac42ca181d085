"""Compressed models: their sizes, and what the bundled scorer and the bundled chat model lose.

    pip install 'owl2_hf[quantization,scoring]'
    python -m benchmarks.compressed DATA --json benchmarks/results/compressed_torchao.json

DATA is the folder that `python -m experiments.default_scorer.make` fills. The scorer is judged by
the simulated opinions of each of its held-out parts, the chat model by its greedy answers. Run it
again with `--by llmcompressor`, in an environment that has it (compressed_llmcompressor.json).
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from owl2_hf.compression import quantize
from owl2_hf.compression.rounding import TOOLS, TYPES

from .timing import parser, write

PARTS = ("unseen images", "unseen kinds")


def compressed(data: Path, by: str, parts: tuple[str, ...] = PARTS) -> dict[str, Any]:
    """Type -> size and losses of both bundled models."""
    found: dict[str, Any] = {}
    for to in TYPES:
        with tempfile.TemporaryDirectory() as folder:
            scorer = {}
            for part in parts:
                report = quantize(
                    "default-scorer",
                    Path(folder) / part,
                    to,
                    by,
                    data=data / "opinions.csv",
                    split=part,
                )
                scorer[part] = report.to_dict()
            chat = quantize("default", Path(folder) / "chat", to, by).to_dict()
        found[to] = {"scorer": scorer, "chat": chat}
        print(to, found[to], flush=True)
    return found


def main() -> None:
    options = parser(__doc__, rounds=1)
    options.add_argument("data", type=Path)
    options.add_argument("--by", choices=TOOLS, default=TOOLS[0])
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    logging.disable_progress_bar()
    found = compressed(args.data, args.by)
    write(args.json, args, found)


if __name__ == "__main__":
    main()
