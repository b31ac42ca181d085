"""Weight-only quantisation on a processor: speed, memory, and what it changes.

    pip install 'owl2_hf[quantization]'
    python -m benchmarks.quantized --json quantized.json

int8 is torchao's `Int8WeightOnlyConfig` (a scale for each row), int4 its prototype for processors (groups of 32
columns; matrices whose width 32 does not divide stay as they are). Speed and memory are those of the decoder of width
1024 with 8 layers of `benchmarks.generation`. Agreement is that of the embedded default model, which has learned
something: greedy answers to questions about its pictures, and logits of the same prompts, against float32, beside
bfloat16's own.
"""

import copy
from functools import partial
from typing import Any

import torch
from torch import nn
from torchao.prototype.quantization.int4.inference_workflow import PrototypeInt4WeightOnlyConfig
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers.quantizers.quantizers_utils import should_convert_module

import owl2_hf
from owl2_hf.modeling.modeling_mplug_owl2 import UNQUANTIZED

from .generation import answer, build, compiled_config, prompt
from .timing import compare, parser, row, write

CONFIGS = {
    "int8": partial(Int8WeightOnlyConfig, set_inductor_config=False),
    "int4": partial(PrototypeInt4WeightOnlyConfig, group_size=32, set_inductor_config=False),
}
QUESTIONS = ("What is this?", "What kind of thing is it?", "Is it an animal?", "What color is it?")


def is_quantised(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and should_convert_module(name, UNQUANTIZED)


def quantise(model: nn.Module, name: str) -> nn.Module:
    """A copy, with the weights that `from_pretrained` would quantise."""
    quantised = copy.deepcopy(model)
    quantize_(quantised, CONFIGS[name](), filter_fn=is_quantised)
    return quantised


def num_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor, of those that it is made of where it is quantised."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.numel() * tensor.element_size()
    return sum(num_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])


def linear_bytes(model: nn.Module) -> int:
    """Bytes of all linear weights, head and vision side included."""
    linears = [module for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return sum(num_bytes(module.weight.data) for module in linears)


def speed(rounds: int, num_tokens: int = 24) -> dict[str, Any]:
    """Times of an answer, step by step and compiled, and bytes of all linear weights."""
    whole = build(torch.bfloat16)
    models = {"bfloat16": whole, **{name: quantise(whole, name) for name in CONFIGS}}
    inputs = prompt(whole)
    found: dict[str, Any] = {"bytes": {name: linear_bytes(model) for name, model in models.items()}}
    for how, kwargs in {"eager": {}, "compiled": compiled_config()}.items():
        runs = {name: partial(answer, model, inputs, num_tokens, **kwargs) for name, model in models.items()}
        found[how] = compare(runs, "bfloat16", rounds)
    return found


def prompts(processor: Any) -> list[Any]:
    """Questions about every picture that comes with the default model."""
    chats = [
        [{"role": "user", "content": [{"type": "image", "image": str(path)}, {"type": "text", "text": question}]}]
        for path in owl2_hf.default_pictures().values()
        for question in QUESTIONS
    ]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    return [processor.apply_chat_template(chat, **options) for chat in chats]


@torch.no_grad()
def agreement() -> dict[str, Any]:
    """Share of greedy answers equal to float32's, and relative error of the logits of the last position."""
    exact, processor = owl2_hf.load_default(dtype=torch.float32)
    whole = copy.deepcopy(exact).bfloat16()
    models = {"bfloat16": whole, **{name: quantise(whole, name) for name in CONFIGS}}
    asked = prompts(processor)
    num_ids = exact.config.image_token_id

    def run(model: Any) -> tuple[list[str], torch.Tensor]:
        batches = [inputs.to(dtype=model.dtype) for inputs in asked]
        texts = [processor.decode(model.generate(**batch)[0]) for batch in batches]
        logits = [model(**batch, logits_to_keep=1).logits[0, -1, :num_ids].float() for batch in batches]
        return texts, torch.stack(logits)

    expected_texts, expected = run(exact)
    found: dict[str, Any] = {"prompts": len(asked)}
    for name, model in models.items():
        texts, logits = run(model)
        found[name] = {
            "same answer": sum(a == b for a, b in zip(texts, expected_texts, strict=True)) / len(texts),
            "logit error": float((logits - expected).norm() / expected.norm()),
            "largest logit error": float((logits - expected).abs().max()),
        }
    return found


def main() -> None:
    options = parser(__doc__, rounds=5)
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    results = {"agreement": agreement()}
    for name, value in results["agreement"].items():
        print(f"  {name}: {value}", flush=True)
    results["speed"] = speed(args.rounds)
    for how in ("eager", "compiled"):
        for name, result in results["speed"][how].items():
            print(row(f"{name}, {how}", result))
    print(f"  bytes of linear weights: {results['speed']['bytes']}")
    write(args.json, args, results)


if __name__ == "__main__":
    main()
