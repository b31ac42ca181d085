"""Generation: compiled decoding with a static cache, batches, speculation, and logits of a prompt.

    python -m benchmarks.generation --json generation.json

A model of width 1024 and 8 layers with random weights; a prompt is a picture and 64 positions of
text. Speculation never changes greedy text, which is checked; how much it saves depends on the
text. Here it is what random weights write, which soon repeats itself, and an assistant that is the
model itself: always right, and as slow as what it assists.
"""

from functools import partial
from typing import Any

import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig, GenerationConfig

from owl2_hf.modeling import MplugOwl2Config, MplugOwl2ForConditionalGeneration

from .timing import DTYPES, compare, parser, row, write

WIDTH, LAYERS, HEADS, VOCABULARY = 1024, 8, 16, 32000
BATCH, NUM_TEXT = 8, 64


def build(dtype: torch.dtype, layers: int = LAYERS) -> MplugOwl2ForConditionalGeneration:
    """A model with random weights, whose vision side is small: it runs once an answer."""
    vision = {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config = MplugOwl2Config(
        vision_config={**vision, "image_size": 112, "patch_size": 14},
        abstractor_config={"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2},
        text_config={
            "hidden_size": WIDTH,
            "intermediate_size": 2752,
            "num_hidden_layers": layers,
            "num_attention_heads": HEADS,
            "num_key_value_heads": HEADS,
            "vocab_size": VOCABULARY + 64,
            "initializer_range": 0.02,
        },
        image_token_id=VOCABULARY,
        output_vocab_size=VOCABULARY,
    )
    torch.manual_seed(0)
    return MplugOwl2ForConditionalGeneration._from_config(config, dtype=dtype).eval()


def prompt(model: MplugOwl2ForConditionalGeneration, batch: int = 1) -> dict[str, Any]:
    """Ids, mask and pixels of `batch` prompts with one picture each."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(
        3, VOCABULARY, (batch, NUM_TEXT + model.config.num_image_tokens), generator=generator
    )
    ids[:, 8 : 8 + model.config.num_image_tokens] = model.config.image_token_id
    size = model.config.vision_config.image_size
    pixels = torch.randn(batch, 3, size, size, generator=generator).to(model.dtype)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def answer(
    model: MplugOwl2ForConditionalGeneration, inputs: dict[str, Any], num_tokens: int, **kwargs
) -> torch.Tensor:
    """Ids of the greedy answer, of `num_tokens` in any case."""
    config = GenerationConfig(
        do_sample=False, max_new_tokens=num_tokens, pad_token_id=0, eos_token_id=None, **kwargs
    )
    return model.generate(**inputs, generation_config=config)[:, inputs["input_ids"].shape[1] :]


def compiled_config() -> dict[str, Any]:
    """`generate` with a static cache, and every decoding step in one graph."""
    compile_config = CompileConfig(fullgraph=True, dynamic=False, mode="default")
    compile_config._compile_all_devices = True  # transformers compiles on GPUs alone unless told
    return {"cache_implementation": "static", "compile_config": compile_config}


def compiled(
    model: MplugOwl2ForConditionalGeneration, rounds: int, num_tokens: int = 48
) -> dict[str, Any]:
    """Decoding of an answer with the dynamic cache, with the static one, and compiled."""
    inputs = prompt(model)
    torch._dynamo.reset()
    counters.clear()
    static = {"cache_implementation": "static"}
    options: dict[str, dict] = {
        "dynamic cache": {},
        "static cache": static,
        "compiled": compiled_config(),
    }
    runs = {
        name: partial(answer, model, inputs, num_tokens, **kwargs)
        for name, kwargs in options.items()
    }
    texts = {name: run() for name, run in runs.items()}
    before = counters["stats"]["unique_graphs"]
    found = compare(runs, "dynamic cache", rounds)
    return {
        "times": found,
        "graphs": before,
        "recompiles after the first answer": counters["stats"]["unique_graphs"] - before,
        "graph breaks": sum(counters["graph_break"].values()),
        "tokens equal to eager": {
            name: float(text.eq(texts["dynamic cache"]).float().mean())
            for name, text in texts.items()
        },
    }


def batched(
    model: MplugOwl2ForConditionalGeneration, rounds: int, num_tokens: int = 32
) -> dict[str, Any]:
    """Eight prompts in one batch against one after the other."""
    together = prompt(model, BATCH)
    alone = [{name: value[i : i + 1] for name, value in together.items()} for i in range(BATCH)]
    runs = {
        "one by one": lambda: [answer(model, one, num_tokens) for one in alone],
        "one batch": lambda: answer(model, together, num_tokens),
    }
    found = compare(runs, "one by one", rounds)
    return {"times": found, "tokens per second, ratio": 1 / found["one batch"]["ratio"]}


def speculative(
    model: MplugOwl2ForConditionalGeneration, rounds: int, num_tokens: int = 64
) -> dict[str, Any]:
    """Prompt lookup and assisted decoding against plain greedy decoding."""
    inputs = prompt(model)
    runs = {
        "greedy": lambda: answer(model, inputs, num_tokens),
        "prompt lookup": lambda: answer(model, inputs, num_tokens, prompt_lookup_num_tokens=8),
        "assisted by itself": lambda: model.generate(
            **inputs,
            assistant_model=model,
            do_sample=False,
            max_new_tokens=num_tokens,
            pad_token_id=0,
            eos_token_id=None,
        )[:, inputs["input_ids"].shape[1] :],
    }
    texts = {name: run() for name, run in runs.items()}
    equal = {name: bool(text.equal(texts["greedy"])) for name, text in texts.items()}
    return {"times": compare(runs, "greedy", rounds), "same text": equal}


@torch.no_grad()
def prompt_logits(model: MplugOwl2ForConditionalGeneration, rounds: int) -> dict[str, Any]:
    """A prompt of 512 positions with logits at all of them, and at the last alone, as `generate`
    asks.
    """
    ids = torch.randint(3, VOCABULARY, (1, 512), generator=torch.Generator().manual_seed(2))
    runs = {
        "all positions": lambda: model(ids, use_cache=False),
        "last position": lambda: model(ids, use_cache=False, logits_to_keep=1),
    }
    return {"times": compare(runs, "all positions", rounds)}


PARTS = {
    "compiled": compiled,
    "batch": batched,
    "speculation": speculative,
    "logits": prompt_logits,
}


def main() -> None:
    options = parser(__doc__, rounds=7)
    options.add_argument("--dtypes", nargs="*", choices=DTYPES, default=list(DTYPES))
    options.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    results: dict[str, Any] = {}
    for dtype in args.dtypes:
        model = build(DTYPES[dtype])
        results[dtype] = {}
        for part in args.parts:
            results[dtype][part] = found = PARTS[part](model, args.rounds)
            print(f"{part}, {dtype}, {args.threads} threads")
            for name, result in found["times"].items():
                print(row(name, result))
            for name, value in found.items():
                if name != "times":
                    print(f"  {name}: {value}", flush=True)
    write(args.json, args, results)


if __name__ == "__main__":
    main()
