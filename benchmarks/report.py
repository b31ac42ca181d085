"""Writes the tables of docs/performance.md, docs/compressed.md and docs/memory.md from the JSON files
in benchmarks/results.

    python -m benchmarks.report

Everything between `<!-- table: NAME -->` and `<!-- end -->` is written anew; the sentences around
are left alone.
"""

import json
import re
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from owl2_hf.memory import CARDS, Memory, smallest_card

from .decoder import LIMITS, MEMORY_LIMIT
from .gpu import outcomes

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"
PAGES = (PAGE, ROOT / "docs" / "compressed.md", ROOT / "docs" / "memory.md")
TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def read(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["results"]


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def ratio(result: dict[str, float]) -> str:
    """Median and quartiles of a ratio."""
    return f"{result['ratio']:.3f} ({result['low']:.3f} to {result['high']:.3f})"


# The names in the results -> those in the tables. Where there are none, both are the same.
COMPILED = {
    "ours, compiled, number not known": "ours, compiled, number of visual tokens unknown",
    "dense": "both branches for every token",
    "split": "each token in its own branch",
    "grouped": "grouped product",
    "grouped, weights stacked first": "grouped product, weights stacked first",
}
GENERATION = {
    "dynamic cache": "48 tokens, dynamic cache",
    "static cache": "48 tokens, static cache",
    "compiled": "48 tokens, static cache, compiled",
    "one by one": "8 prompts, one after the other",
    "one batch": "8 prompts in one batch",
    "greedy": "64 tokens, greedy",
    "prompt lookup": "64 tokens, prompt lookup",
    "assisted by itself": "64 tokens, assisted by the model itself",
    "all positions": "prompt of 512, logits at all positions",
    "last position": "prompt of 512, logits at the last position",
}
VISION = {
    "eager": "one image, eager attention",
    "sdpa": "one image, sdpa attention",
    "one by one": "4 images, one after the other",
    "one call": "4 images in one call",
    "encoded again": "later turn, image encoded again",
    "features kept": "later turn, features kept",
}
LOADED = {"torch.load": "pickles", "from_pretrained": "converted folder"}


def milliseconds(result: dict[str, float]) -> str:
    return f"{1000 * result['seconds']:,.1f} ms"


def decoder() -> str:
    found = read("decoder")
    rows = []
    for what, limit in LIMITS.items():
        rows.append([what, f"{limit}", *(ratio(one[what]["ours"]) for one in found.values())])
    memory = [one["training memory, MB"] for one in found.values()]
    rows.append(
        [
            "memory of the training step",
            f"{MEMORY_LIMIT}",
            *(f"{one['ours'] / one['llama']:.3f}" for one in memory),
        ]
    )
    return table(["ratio ours / LlamaModel", "limit", *found], rows)


def times_of(
    found: dict[str, dict[str, dict[str, float]]], labels: dict[str, str]
) -> list[list[str]]:
    """One row for each thing that was timed, with its dtypes side by side; `found` by dtype."""
    names = next(iter(found.values()))
    return [
        [
            labels[name],
            *(f"{milliseconds(one[name])}, {ratio(one[name])}" for one in found.values()),
        ]
        for name in names
    ]


def compiled() -> str:
    rows = []
    for what, found in read("compiled").items():
        rows += [
            [f"{what}: {COMPILED.get(name, name)}", milliseconds(result), ratio(result)]
            for name, result in found.items()
        ]
    return table(["what is timed", "time", "ratio"], rows)


def generation() -> str:
    found = read("generation")
    rows = []
    for part in next(iter(found.values())):
        times = {dtype: parts[part]["times"] for dtype, parts in found.items()}
        rows += times_of(times, GENERATION)
    return table(["what is timed", *(f"{dtype}: time, ratio" for dtype in found)], rows)


def vision() -> str:
    found = read("vision")
    rows = []
    for part in next(iter(found.values())):
        rows += times_of({dtype: parts[part] for dtype, parts in found.items()}, VISION)
    return table(["what is timed", *(f"{dtype}: time, ratio" for dtype in found)], rows)


def growth() -> str:
    found = read("growth")
    rows = []
    for what in ("pictures", "positions"):
        for count, times in found[what]["times"].items():
            both = [milliseconds(times["llama"]), milliseconds(times["ours"])]
            shown = {"pictures": "image" if count == "1" else "images"}.get(what, what)
            rows.append([f"{count} {shown}", *both, ratio(times["ours"])])
    return table(["prompt", "LlamaModel, time", "ours, time", "ratio of times"], rows)


def fits() -> str:
    found = read("growth")
    rows = []
    for what in ("pictures", "positions"):
        for name, (a, b, c) in found[what]["fits"].items():
            rows.append(
                [
                    f"more {'images' if what == 'pictures' else what}, "
                    f"{'LlamaModel' if name == 'llama' else name}",
                    *(f"{x:.0f}" for x in (a, b, c)),
                ]
            )
    return table(["fit in ms, n in thousands of positions", "a", "b", "c"], rows)


def processor() -> str:
    found = read("processor")
    rows = [
        [
            size,
            *(
                f"{times['pictures per second'][name]:.0f}"
                for name in ("CLIPImageProcessor", "ours")
            ),
            ratio(times["ours"]),
        ]
        for size, times in found["pictures"].items()
    ]
    memory = found["memory, MB"]
    both = [f"{memory[name]:,.0f} MB" for name in ("CLIPImageProcessor", "ours")]
    rows.append(
        ["memory for 12000 x 9000", *both, f"{memory['ours'] / memory['CLIPImageProcessor']:.2f}"]
    )
    speeds = [f"{name}, images per second" for name in ("CLIPImageProcessor", "ours")]
    return table(["image size", *speeds, "ratio of times, or of memory"], rows)


def prompts() -> str:
    rows = [
        [name, f"{found['seconds']:.2f} s", ratio(found)]
        for name, found in read("processor")["prompts"].items()
    ]
    return table(["processor", "time for 10,000 prompts", "ratio to the tokenizer"], rows)


def gradients() -> str:
    found = read("gradients")
    ways = next(iter(found.values()))
    rows = [
        [
            way.replace("with checkpointing", "gradients, checkpointing"),
            *(f"{one[way]:,.0f} MB" for one in found.values()),
        ]
        for way in ways
    ]
    return table(["score computed with", *(f"peak memory, {dtype}" for dtype in found)], rows)


def quantized() -> str:
    found = read("quantized")
    speed = found["speed"]
    rows = []
    for name, size in speed["bytes"].items():
        times = [ratio(speed[how][name]) for how in ("eager", "compiled")]
        rows.append([name, f"{size / 1e6:.0f} MB", *times])
    return table(["type", "linear weights", "ratio of times, eager", "ratio, compiled"], rows)


def agreement() -> str:
    rows = []
    for what, one in read("quantized")["agreement"].items():
        for name, values in one["models"].items():
            shares = [f"{values[key]:.3f}" for key in ("same answer", "same token")]
            errors = [
                f"{values[key]:.4f}"
                for key in ("logit error", "mean logit error", "largest logit error")
            ]
            rows.append([f"{what.replace('default', 'bundled')}, {name}", *shares, *errors])
    errors = ["logit error / norm", "mean error / std", "largest error / std"]
    return table(["model, type", "same answers", "same tokens", *errors], rows)


def compressed() -> str:
    rows = []
    for tool in ("torchao", "llmcompressor"):
        for to, found in read(f"compressed_{tool}").items():
            losses = [one["losses"] for one in found["scorer"].values()]
            size = found["scorer"]["unseen images"]["num_bytes"]
            answers = found["chat"]["losses"]
            rows.append(
                [
                    f"{to}, {tool}",
                    f"{size / 1e6:.1f} MB",
                    *(
                        f"{one['SRCC']['before']:.4f} → {one['SRCC']['after']:.4f}"
                        for one in losses
                    ),
                    f"{max(one['largest change of a score'] for one in losses):.3f}",
                    f"{answers['same answers']} of {answers['answers']}",
                ]
            )
    parts = [f"SRCC before → after, {kind} degradations" for kind in ("trained", "other")]
    head = ["type, package", "scorer's weights", *parts, "largest change of a score"]
    return table([*head, "same answers of the chat model"], rows)


def start() -> str:
    found = read("start")
    clocks = [
        [name, *(f"{one[clock]['median']:.2f} s" for clock in ("wall", "cpu"))]
        for name, one in found.items()
    ]
    ratios = [f"{one['wall']['ratio']:.2f}" for one in found.values()]
    head = ["command", "wall-clock time", "CPU time", "wall clock / `import transformers`"]
    return table(head, [[*row, one] for row, one in zip(clocks, ratios, strict=True)])


def loading() -> str:
    found = read("full_size_speed")["loading"]
    rows = []
    for name, runs in found.items():
        taken = [run["seconds"] for run in runs]
        peak = f"{max(run['peak_mb'] for run in runs):,.0f} MB"
        rows.append(
            [
                f"the {LOADED[name]}, with `{name}`",
                f"{statistics.median(taken):.1f} s ({min(taken):.1f} to {max(taken):.1f})",
                peak,
            ]
        )
    return table(["what is loaded", "time", "peak memory"], rows)


def score_dataset() -> str:
    rows = [
        [
            name.replace("1 worker processes", "1 worker process"),
            f"{one['images per second']:.1f}",
            ratio(one),
        ]
        for name, one in read("score_dataset")["ways"].items()
    ]
    return table(["method", "images per second", "ratio of times"], rows)


def prefix() -> str:
    rows = [
        [f"batch of {batch}", milliseconds(one["whole prompt"]), ratio(one["prefix kept"])]
        for batch, one in read("score_dataset")["prefix"].items()
    ]
    return table(["batch", "whole prompt, time", "text kept, ratio"], rows)


def full_size() -> str:
    found = read("full_size_speed")["speed"]
    reading = f"{found['read_seconds']:.3f} s ({found['bandwidth_gb_per_second']:.1f} GB/s)"
    rows = [
        [
            f"prefill, one image, {found['positions']} positions",
            f"{found['prefill_seconds']:.2f} s",
            "",
        ],
        ["of this, encoding the image", f"{found['encoding_seconds']:.2f} s", ""],
        ["prefill without oneDNN", f"{found['prefill_without_onednn_seconds']:.2f} s", ""],
        [
            f"reading the {found['bytes_of_a_token'] / 1e9:.1f} GB of weights that a token needs",
            reading,
            "1",
        ],
        *(
            # A plain step there is one with oneDNN.
            [
                f"decoding a token with{'' if name == 'decode' else 'out'} oneDNN",
                f"{one['seconds']:.3f} s",
                ratio(one),
            ]
            for name, one in found["decode"].items()
        ),
    ]
    return table(["what is timed", "time", "ratio to reading"], rows)


def full_size_decode() -> str:
    """Times over those of bfloat16 as the model chooses it, and over each model's own reading."""
    run = read("full_size_decode")
    models = run["models"]
    whole = models["bfloat16"]["token"]["chosen"]["seconds"]
    rows = []
    for name, found in models.items():
        for way, one in found["token"].items():
            prompt = found["prompt_seconds"].get(way)
            rows.append(
                [
                    name if way == "chosen" else f"{name}, {way}",
                    f"{found['bytes_of_a_token'] / 1e9:.1f} GB",
                    f"{found['read_seconds']:.3f} s",
                    f"{one['seconds']:.3f} s",
                    ratio(one),
                    f"{whole / one['seconds']:.2f}",
                    "" if prompt is None else f"{prompt:.1f} s",
                ]
            )
    head = [
        f"type ({run['layers']} layers)",
        "weights",
        "time to read them",
        "time per token",
        "ratio to reading",
        "tokens per second / bfloat16",
        "prompt",
    ]
    return table(head, rows)


def full_size_agreement() -> str:
    rows = []
    for name, found in read("full_size_decode")["models"].items():
        one = found["agreement"]
        errors = [f"{one[key]:.4f}" for key in ("logit error", "largest logit error")]
        rows.append([name, f"{one['same token']:.3f}", *errors])
    return table(["type", "same tokens", "logit error / norm", "largest error / std"], rows)


def image_cache() -> str:
    rows = []
    for what, found in read("image_cache").items():
        for name in ("filling", "with"):
            if name in found:
                shown = {"filling": "filling the cache", "with": "with the cache"}[name]
                times = [f"{found[one]['seconds']:.2f} s" for one in ("without", name)]
                rows.append([f"{what}, {shown}", *times, ratio(found[name])])
    return table(["what is timed", "time without the cache", "time", "ratio"], rows)


NO_GPU = "This was not run on a GPU yet.\n"


def gpu() -> str:
    """The machine, and a table for each part."""
    content = outcomes.read(RESULTS / "gpu.json")
    if content is None:
        return NO_GPU
    machine = content["machine"]
    text = (
        f"{machine['device']}, torch {machine['torch']}, transformers {machine['transformers']}, "
        f"{machine['dtype']}. Its memory moves {machine['bandwidth'] / 1e9:,.0f} GB/s, and a large "
        f"matrix product runs at {machine['matmul rate'] / 1e12:,.0f} TFLOP/s.\n"
    )
    for part, steps in content["results"].items():
        rows = [row for step, outcome in steps.items() for row in gpu_rows(step, outcome)]
        head = ["step", "measured", "value", "aim", "reached"]
        text += f"\n**{part.capitalize()}**\n\n{table(head, rows)}"
    return text


def gpu_rows(step: str, outcome: dict[str, Any]) -> list[list[str]]:
    """A row for each aim and each shown number of a step; one that says why there is none."""
    result = outcome.get(outcomes.RESULT)
    if result is None:
        [line] = outcomes.lines_of(outcome)
        return [[step, line.replace("|", "\\|"), "", "", ""]]
    rows = [
        [name, f"{one['value']:.4g}", outcomes.limit_of(one), "yes" if one["reached"] else "no"]
        for name, one in result.get("aims", {}).items()
    ]
    rows += [[name, f"{value:,.4g}", "", ""] for name, value in result.get("shown", {}).items()]
    rows = rows or [[f"measured in {outcome['seconds']:.0f} s, no aim", "", "", ""]]
    return [[step, *rows[0]], *(["", *row] for row in rows[1:])]


_TASKS = {
    "inference, bf16": "inference, 16 bits",
    "inference, int8": "inference, int8",
    "inference, int4": "inference, int4",
    "qlora": "train `qlora`",
    "qlora, no checkpointing": "train `qlora`, no checkpointing",
    "lora": "train `lora`",
    "lora, no checkpointing": "train `lora`, no checkpointing",
    "instruct": "train `instruct`, all weights",
    "instruct, no checkpointing": "train `instruct`, no checkpointing",
}


def cards() -> str:
    """Which cards have room for which task."""
    rows = []
    for name, parts in read("memory")["tasks"].items():
        total = Memory(**parts).total
        card = smallest_card(total)
        fits = ["yes" if card is not None and card <= one else "no" for one in CARDS]
        rows.append([_TASKS[name], f"{total / 1e9:.1f} GB", *fits])
    return table(["task", "needs", *(f"{one} GB" for one in CARDS)], rows)


def memory() -> str:
    """Task by task, what holds the memory."""
    rows = []
    for name, parts in read("memory")["tasks"].items():
        shown = [f"{value / 1e9:.2f}" if value else "" for value in parts.values()]
        rows.append([_TASKS[name], *shown])
    return table(["task (GB)", *next(iter(read("memory")["tasks"].values()))], rows)


def memory_sizes() -> str:
    """Other batches, lengths and numbers of images."""
    found = read("memory")["sizes"]
    names = list(next(iter(found.values())))
    rows = [[size, *(f"{one[name] / 1e9:.1f} GB" for name in names)] for size, one in found.items()]
    return table(["rows", *(_TASKS[name] for name in names)], rows)


TABLES: dict[str, Callable[[], str]] = {
    "gpu": gpu,
    "decoder": decoder,
    "compiled": compiled,
    "generation": generation,
    "vision": vision,
    "growth": growth,
    "fits": fits,
    "processor": processor,
    "prompts": prompts,
    "gradients": gradients,
    "image_cache": image_cache,
    "quantized": quantized,
    "agreement": agreement,
    "compressed": compressed,
    "start": start,
    "loading": loading,
    "full_size": full_size,
    "full_size_decode": full_size_decode,
    "full_size_agreement": full_size_agreement,
    "score_dataset": score_dataset,
    "prefix": prefix,
    "cards": cards,
    "memory": memory,
    "memory_sizes": memory_sizes,
}


def render(page: str) -> str:
    """The page with its tables as the results say."""
    return TABLE.sub(lambda match: f"{match[1]}\n{TABLES[match[2]]()}\n{match[3]}", page)


def main() -> None:
    for page in PAGES:
        page.write_text(render(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
