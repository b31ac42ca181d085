"""The vision side: attention implementations, several images in one call, and an image of an
earlier turn.

    python -m benchmarks.vision --json vision.json

Vision encoder and abstractor have the published model's shapes (ViT-L/14 at 448 pixels: 1,025
positions, 64 queries) with random weights; the language model behind them has 8 layers of width
1024.
"""

from typing import Any

import torch

from owl2_hf.modeling import MplugOwl2Config, MplugOwl2ForConditionalGeneration

from .timing import DTYPES, compare, parser, row, write

NUM_PICTURES = 4


def build(
    dtype: torch.dtype, attn_implementation: str = "sdpa"
) -> MplugOwl2ForConditionalGeneration:
    """The published vision side before a language model of 8 layers."""
    text = {
        "hidden_size": 1024,
        "intermediate_size": 2752,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
    }
    config = MplugOwl2Config(text_config={**text, "num_key_value_heads": 16})
    torch.manual_seed(0)
    kind = MplugOwl2ForConditionalGeneration
    return kind._from_config(config, dtype=dtype, attn_implementation=attn_implementation).eval()


def pictures(model: MplugOwl2ForConditionalGeneration, count: int) -> torch.Tensor:
    size = model.config.vision_config.image_size
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1)).to(
        model.dtype
    )


@torch.no_grad()
def attention(dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """One picture encoded with eager attention and with sdpa."""
    models = {name: build(dtype, name) for name in ("eager", "sdpa")}
    pixels = pictures(models["sdpa"], 1)
    runs = {
        name: (lambda model=model: model.get_image_features(pixels))
        for name, model in models.items()
    }
    return compare(runs, "eager", rounds)


@torch.no_grad()
def batches(dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Four pictures one after the other and in one call."""
    model = build(dtype)
    pixels = pictures(model, NUM_PICTURES)
    runs = {
        "one by one": lambda: [model.get_image_features(one[None]) for one in pixels],
        "one call": lambda: model.get_image_features(pixels),
    }
    return compare(runs, "one by one", rounds)


@torch.no_grad()
def second_turn(dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """The prompt of a later turn with the picture encoded again, and with the features of the first
    turn.
    """
    model = build(dtype)
    pixels = pictures(model, 1)
    features = model.get_image_features(pixels)
    ids = torch.randint(3, 1000, (1, 192), generator=torch.Generator().manual_seed(2))
    ids[:, 8 : 8 + model.config.num_image_tokens] = model.config.image_token_id
    runs = {
        "encoded again": lambda: model(ids, pixel_values=pixels, logits_to_keep=1),
        "features kept": lambda: model(
            ids, mm_encoder_outputs={"image": features}, logits_to_keep=1
        ),
    }
    return compare(runs, "encoded again", rounds)


PARTS = {"attention": attention, "batches": batches, "second turn": second_turn}


def main() -> None:
    options = parser(__doc__, rounds=7)
    options.add_argument("--dtypes", nargs="*", choices=DTYPES, default=list(DTYPES))
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    results: dict[str, Any] = {}
    for dtype in args.dtypes:
        results[dtype] = {}
        for part, measure in PARTS.items():
            results[dtype][part] = found = measure(DTYPES[dtype], args.rounds)
            print(f"{part}, {dtype}, {args.threads} threads")
            for name, result in found.items():
                print(row(name, result), flush=True)
    write(args.json, args, results)


if __name__ == "__main__":
    main()
