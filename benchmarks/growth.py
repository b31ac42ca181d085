"""How prefill grows with images and with positions, beside transformers' LlamaModel of the same
shape.

    python -m benchmarks.growth --json growth.json --plot growth.png

Width 1024, 8 layers. A picture is 65 visual positions, beside 64 positions of text; its encoding is
not in it. Times are fitted by a + b n + c n², n positions.
"""

from pathlib import Path
from typing import Any

import torch

from .decoder import PICTURE, build
from .timing import DTYPES, compare, parser, row, write

NUM_PICTURES = (1, 2, 4, 8, 16)
LENGTHS = (256, 512, 1024, 2048, 4096)
NUM_TEXT = 64
SHAPE = "1024 x 8"


@torch.no_grad()
def prefill(
    models: dict[str, torch.nn.Module], length: int, num_visual: int, rounds: int
) -> dict[str, Any]:
    """Prompts of `length` positions, the `num_visual` after the first eight of them visual."""
    base = models["llama"]
    embeds = torch.randn(1, length, base.config.hidden_size, dtype=base.dtype)
    indicators = torch.zeros(1, length, dtype=torch.long)
    indicators[:, 8 : 8 + num_visual] = 1
    runs = {
        "llama": lambda: base(inputs_embeds=embeds, use_cache=False),
        "ours": lambda: models["ours"](
            inputs_embeds=embeds, mm_token_type_ids=indicators, use_cache=False
        ),
    }
    return compare(runs, "llama", rounds)


def fit(lengths: list[int], times: list[float]) -> list[float]:
    """a, b, c of a + b n + c n² in milliseconds, n in thousands of positions, with the least sum of
    relative errors.
    """
    n = torch.tensor(lengths, dtype=torch.float64) / 1000
    milliseconds = 1000 * torch.tensor(times, dtype=torch.float64)
    powers = torch.stack([n**0, n, n**2], dim=1) / milliseconds[:, None]
    return (
        torch.linalg.lstsq(powers, torch.ones(len(n), 1, dtype=torch.float64))
        .solution[:, 0]
        .tolist()
    )


def grow(models: dict[str, torch.nn.Module], rounds: int) -> dict[str, Any]:
    """Times by number of pictures and by length (a quarter of it visual), and the fits."""
    grids = {
        "pictures": [
            (count, NUM_TEXT + count * PICTURE, count * PICTURE) for count in NUM_PICTURES
        ],
        "positions": [(length, length, length // 4) for length in LENGTHS],
    }
    found: dict[str, Any] = {}
    for what, grid in grids.items():
        rows = {}
        for count, length, num_visual in grid:
            rows[count] = prefill(models, length, num_visual, rounds)
            print(row(f"{count} {what}", rows[count]["ours"]), flush=True)
        lengths = [length for _, length, _ in grid]
        fits = {
            name: fit(lengths, [times[name]["seconds"] for times in rows.values()])
            for name in models
        }
        found[what] = {"times": rows, "positions": lengths, "fits": fits}
    return found


def plot(found: dict[str, Any], path: Path) -> None:
    """Both curves over the number of positions, with their fits."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for axis, (what, part) in zip(axes, found.items(), strict=True):
        n = torch.linspace(min(part["positions"]), max(part["positions"]), 100, dtype=torch.float64)
        for name, color in (("llama", "tab:gray"), ("ours", "tab:blue")):
            times = [one[name]["seconds"] * 1000 for one in part["times"].values()]
            a, b, c = part["fits"][name]
            axis.plot(
                part["positions"],
                times,
                "o",
                color=color,
                label={"llama": "LlamaModel"}.get(name, name),
            )
            axis.plot(n, a + b * n / 1000 + c * (n / 1000) ** 2, "-", color=color, linewidth=1)
        axis.set(
            xlabel="positions",
            ylabel="prefill, ms",
            title=f"more {what}".replace("pictures", "images"),
        )
        axis.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    options = parser(__doc__, rounds=5)
    options.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    options.add_argument("--plot", type=Path, help="where to draw the curves")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    print(f"prefill against LlamaModel, {SHAPE}, {args.dtype}, {args.threads} threads")
    models = {name: build(name, SHAPE, DTYPES[args.dtype]).eval() for name in ("llama", "ours")}
    results = grow(models, args.rounds)
    if args.plot is not None:
        plot(results, args.plot)
    write(args.json, args, {"dtype": args.dtype, **results})


if __name__ == "__main__":
    main()
