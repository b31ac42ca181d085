"""Decoding at full size on a processor: bfloat16 with each kernel, int8, and int4.

    python -m benchmarks.full_size_decode --json benchmarks/results/full_size_decode.json

The decoder has the published sizes and random weights, which are made in memory: no files. It has
no visual branch, which text does not pass, and a small vision side. `--layers 4` is a short run.
The models are built one after the other, and their layers are rounded one at a time, so that 32
layers need about 16 GB. A seed for each layer gives all models the same weights before rounding.

A token has to read every weight that it passes. The floor is the time of plain reading, in turns
with decoding. Logits are compared with those of bfloat16, all for the same text, which bfloat16
with oneDNN wrote greedily. With random weights they lie close together: look at the errors, not
only at the share of equal tokens.
"""

import gc
import json
import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import nn
from torchao.prototype.quantization.int4.inference_workflow import PrototypeInt4WeightOnlyConfig
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import DynamicCache

from owl2_hf.modeling import (
    MplugOwl2Config,
    MplugOwl2ForConditionalGeneration,
)
from owl2_hf.modeling import cpu_kernels_mplug_owl2 as kernels
from owl2_hf.modeling.compatibility_mplug_owl2 import CACHE
from owl2_hf.modeling.modeling_mplug_owl2_text import MplugOwl2DecoderLayer

from .timing import Run, in_turns, parser, resident_memory, row, seconds, summarize, write

VISION = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}
CONFIGS: dict[str, Callable[[], Any] | None] = {
    "bfloat16": None,
    "int8": partial(Int8WeightOnlyConfig, set_inductor_config=False),
    "int4": partial(PrototypeInt4WeightOnlyConfig, group_size=128, set_inductor_config=False),
}
POSITIONS = 82  # of a prompt with one image and a short question


def with_onednn() -> AbstractContextManager[Any]:
    """oneDNN for single rows too, as PyTorch has it."""
    return mock.patch.object(kernels, "onednn_is_slow", lambda: False)


def without_onednn() -> AbstractContextManager[Any]:
    return torch.backends.mkldnn.flags(enabled=False, allow_tf32=None)


def torchao_alone() -> AbstractContextManager[Any]:
    """Rounded weights as torchao multiplies them."""
    return mock.patch.object(kernels.MplugOwl2Int8Linear, "forward", nn.Linear.forward)


KERNELS: dict[str, dict[str, Callable[[], AbstractContextManager[Any]]]] = {
    "bfloat16": {
        "chosen": nullcontext,
        "with oneDNN": with_onednn,
        "without oneDNN": without_onednn,
    },
    "int8": {"chosen": nullcontext, "torchao alone": torchao_alone},
    "int4": {"chosen": nullcontext},
}


def configuration(layers: int, width: int, heads: int) -> MplugOwl2Config:
    """The published sizes for a width of 4096."""
    return MplugOwl2Config(
        vision_config={**VISION, "image_size": 28, "patch_size": 14},
        abstractor_config={"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1},
        text_config={
            "hidden_size": width,
            "intermediate_size": {4096: 11008}.get(width, 2 * width),
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "vocab_size": 32064,
            "modality_specific_projections": [],
            "modality_specific_norms": False,
        },
        image_token_id=32000,
        output_vocab_size=32000,
    )


@torch.no_grad()
def build(name: str, layers: int, width: int, heads: int) -> MplugOwl2ForConditionalGeneration:
    """A model whose layers are made and rounded one at a time; the head stays in bfloat16."""
    config = configuration(1, width, heads)
    torch.manual_seed(0)
    model = MplugOwl2ForConditionalGeneration._from_config(config, dtype=torch.bfloat16).eval()
    text = model.config.text_config
    text.num_hidden_layers = layers
    text.layer_types = None
    quantization = CONFIGS[name]
    decoder = model.model.language_model
    decoder.layers = nn.ModuleList()
    for index in range(layers):
        with torch.device("meta"):
            layer = MplugOwl2DecoderLayer(text, index).bfloat16().eval()
        layer.to_empty(device="cpu")
        generator = torch.Generator().manual_seed(index)
        for parameter in layer.parameters():
            if parameter.ndim == 1:
                parameter.fill_(1)
            else:
                parameter.normal_(0, 0.02, generator=generator)
        if quantization is not None:
            quantize_(layer, quantization())
            kernels.use_int8_kernel(layer)
        decoder.layers.append(layer)
    return model


def stored(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """What a weight is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor.detach()
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from stored(getattr(tensor, name))


def passed_weights(model: MplugOwl2ForConditionalGeneration) -> list[torch.Tensor]:
    """What a token of text reads in decoding: the layers, the last norm and the head."""
    parts = (model.model.language_model.layers, model.model.language_model.norm, model.lm_head)
    return [one for part in parts for weight in part.parameters() for one in stored(weight)]


def read_all(weights: list[torch.Tensor]) -> None:
    """Every byte once, as float32 whatever it stands for; what has no whole number of them is
    small.
    """
    for weight in weights:
        if weight.nbytes % 4 == 0:
            weight.reshape(-1).view(torch.float32).sum()


class Decoder:
    """A model behind a prompt: single tokens, each at the position that follows it."""

    def __init__(self, model: MplugOwl2ForConditionalGeneration, positions: int) -> None:
        self.model = model
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(3, 32000, (1, positions), generator=generator)
        self.cache: Any = None

    @torch.inference_mode()
    def prompt(self) -> torch.Tensor:
        """(V,) logits of the token behind the prompt, for which the cache is made anew."""
        self.cache = DynamicCache(config=self.model.config.get_text_config())
        return self._logits(self.ids)

    @torch.inference_mode()
    def step(self, token: int) -> torch.Tensor:
        """(V,) logits of the next token."""
        return self._logits(torch.tensor([[token]]))

    def _logits(self, ids: torch.Tensor) -> torch.Tensor:
        found = self.model(ids, **{CACHE: self.cache}, use_cache=True, logits_to_keep=1)
        return found.logits[0, -1, :32000].float()

    def measured_step(self) -> None:
        """A step that leaves the cache as long as it was."""
        self.step(7)
        self.cache.crop(-1)


def text_of(decoder: Decoder, num_tokens: int, given: list[int]) -> tuple[list[int], torch.Tensor]:
    """The likeliest tokens of an answer, and its logits (tokens, V).

    Args:
        given: The answer so far, whatever this model finds likeliest; its own choice where it ends.
    """
    logits = [decoder.prompt()]
    chosen = [int(logits[0].argmax())]
    for index in range(num_tokens - 1):
        logits.append(decoder.step(given[index] if given else chosen[-1]))
        chosen.append(int(logits[-1].argmax()))
    return chosen, torch.stack(logits)


def measure(
    model: MplugOwl2ForConditionalGeneration,
    ways: dict[str, Callable[[], AbstractContextManager[Any]]],
    rounds: int,
    positions: int,
) -> dict[str, Any]:
    """Seconds of a prompt and of a token in each way, and of plain reading."""
    decoder, weights = Decoder(model, positions), passed_weights(model)
    prompts: dict[str, float] = {}
    for name, way in ways.items():
        if name == "without oneDNN":
            continue  # most of a minute
        with way():
            prompts[name] = statistics.median([seconds(decoder.prompt) for _ in range(3)][1:])

    def within(way: Callable[[], AbstractContextManager[Any]]) -> Run:
        def run() -> None:
            with way():
                decoder.measured_step()

        return run

    decoder.prompt()
    runs = {name: within(way) for name, way in ways.items()}
    times = in_turns({**runs, "read": lambda: read_all(weights)}, rounds, warmup=2)
    num_bytes = sum(weight.nbytes for weight in weights)
    reading = statistics.median(times["read"])
    return {
        "prompt_seconds": prompts,
        "bytes_of_a_token": num_bytes,
        "read_seconds": reading,
        "bandwidth_gb_per_second": num_bytes / reading / 1e9,
        "resident_bytes": resident_memory(),
        "token": {
            name: summarize(taken, times["read"]) for name, taken in times.items() if name != "read"
        },
    }


def agreement(expected: torch.Tensor, got: torch.Tensor) -> dict[str, float]:
    """Of (tokens, V) logits: equal likeliest tokens, and errors over the norm and the deviation."""
    error = (got - expected).abs() / expected.std()
    return {
        "same token": float(got.argmax(-1).eq(expected.argmax(-1)).float().mean()),
        "logit error": float((got - expected).norm() / expected.norm()),
        "largest logit error": float(error.max()),
    }


def main() -> None:
    options = parser(__doc__, rounds=12)
    options.add_argument("--layers", type=int, default=32)
    options.add_argument("--width", type=int, default=4096)
    options.add_argument("--tokens", type=int, default=16, help="of the text that is compared")
    options.add_argument("--positions", type=int, default=POSITIONS, help="of the prompt")
    options.add_argument("--models", nargs="+", choices=list(CONFIGS), default=list(CONFIGS))
    args = options.parse_args()
    if args.models[0] != "bfloat16":
        options.error("the others are compared with bfloat16: expected it first")
    torch.set_num_threads(args.threads)
    found: dict[str, Any] = {}
    text: list[int] = []
    expected = torch.empty(0)
    for name in args.models:
        model = build(name, args.layers, args.width, args.width // 128)
        decoder = Decoder(model, args.positions)
        if not text:
            with with_onednn():
                text, expected = text_of(decoder, args.tokens, [])
        agreed = agreement(expected, text_of(decoder, args.tokens, text)[1])
        result = measure(model, KERNELS[name], args.rounds, args.positions)
        found[name] = {**result, "agreement": agreed}
        for way, one in result["token"].items():
            print(row(f"{name}, {way}", one), flush=True)
        print(json.dumps({key: value for key, value in found[name].items() if key != "token"}))
        del model, decoder
        gc.collect()
    write(args.json, args, {"layers": args.layers, "positions": args.positions, "models": found})


if __name__ == "__main__":
    main()
