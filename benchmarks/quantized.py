"""Quantised weights on a processor: speed, memory, and what they change.

    pip install 'owl2_hf[quantization]'
    python -m benchmarks.quantized --json quantized.json

int8 is torchao's `Int8WeightOnlyConfig` (a scale for each row), dynamic int8 the same weights with
activations that are rounded as they come, int4 torchao's prototype for processors (groups of 32
columns; matrices whose width 32 does not divide stay as they are). Speed and memory are those of
the decoder of width 1024 with 8 layers of `benchmarks.generation`. Agreement with float32, beside
bfloat16's own, is that of the embedded default model, which has learned something, and of that
decoder, whose weights are random and whose logits lie close together.
"""

import copy
from functools import partial
from typing import Any

import torch
from torch import nn
from torchao.prototype.quantization.int4.inference_workflow import PrototypeInt4WeightOnlyConfig
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    quantize_,
)
from transformers import BatchFeature
from transformers.quantizers.quantizers_utils import should_convert_module

import owl2_hf
from owl2_hf.modeling.loading_mplug_owl2 import UNQUANTIZED

from .generation import answer, build, compiled_config, prompt
from .timing import compare, parser, row, write

CONFIGS = {
    "int8": partial(Int8WeightOnlyConfig, set_inductor_config=False),
    "dynamic int8": partial(Int8DynamicActivationInt8WeightConfig, set_inductor_config=False),
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
        runs = {
            name: partial(answer, model, inputs, num_tokens, **kwargs)
            for name, model in models.items()
        }
        found[how] = compare(runs, "bfloat16", rounds)
    return found


def default_model() -> tuple[nn.Module, list[Any]]:
    """The embedded model in float32, and questions about every picture that comes with it."""
    model, processor = owl2_hf.load_default(dtype=torch.float32)
    chats = [
        [
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": str(path)},
                    {"type": "text", "text": question},
                ],
            }
        ]
        for path in owl2_hf.default_pictures().values()
        for question in QUESTIONS
    ]
    options = {
        "add_generation_prompt": True,
        "tokenize": True,
        "return_dict": True,
        "return_tensors": "pt",
    }
    return model, [processor.apply_chat_template(chat, **options) for chat in chats]


def random_decoder(num_prompts: int = 8) -> tuple[nn.Module, list[Any]]:
    """The decoder of width 1024 in float32, and prompts of random ids with a picture."""
    model = build(torch.float32)
    together = prompt(model, num_prompts)
    rows = (
        {name: value[i : i + 1] for name, value in together.items()} for i in range(num_prompts)
    )
    return model, [BatchFeature(one) for one in rows]


@torch.no_grad()
def agreement(exact: Any, asked: list[Any], num_tokens: int = 24) -> dict[str, Any]:
    """How close greedy answers and logits come to float32's.

    Returns:
        For each model the share of answers that are float32's; and, where the answer so far is
        float32's, the share of tokens that are, the error of all logits over their norm, and its
        mean and maximum over their standard deviation.
    """
    whole = copy.deepcopy(exact).bfloat16()
    models = {"bfloat16": whole, **{name: quantise(whole, name) for name in CONFIGS}}
    num_ids = exact.config.image_token_id

    def write_answer(model: Any, inputs: Any) -> torch.Tensor:
        return model.generate(
            **inputs.to(dtype=model.dtype), max_new_tokens=num_tokens, do_sample=False
        )

    def logits(model: Any, inputs: Any, ids: torch.Tensor) -> torch.Tensor:
        """(tokens of the answer, ids), each where the answer so far is float32's."""
        pixels = inputs["pixel_values"].to(model.dtype)
        length = ids.shape[1] - inputs["input_ids"].shape[1]
        found = model(ids, pixel_values=pixels, logits_to_keep=length + 1).logits[0, :-1, :num_ids]
        return found.float()

    answers = [write_answer(exact, inputs) for inputs in asked]
    expected = torch.cat([logits(exact, *one) for one in zip(asked, answers, strict=True)])
    results: dict[str, Any] = {}
    for name, model in models.items():
        same = [
            torch.equal(write_answer(model, *one[:1]), one[1])
            for one in zip(asked, answers, strict=True)
        ]
        got = torch.cat([logits(model, *one) for one in zip(asked, answers, strict=True)])
        error = (got - expected).abs() / expected.std()
        results[name] = {
            "same answer": sum(same) / len(same),
            "same token": float((got.argmax(-1) == expected.argmax(-1)).float().mean()),
            "logit error": float((got - expected).norm() / expected.norm()),
            "mean logit error": float(error.mean()),
            "largest logit error": float(error.max()),
        }
    return {"prompts": len(asked), "tokens": len(expected), "models": results}


MODELS = {"default model": default_model, "random decoder": random_decoder}


def main() -> None:
    options = parser(__doc__, rounds=5)
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    results: dict[str, Any] = {"agreement": {}}
    for what, make in MODELS.items():
        results["agreement"][what] = found = agreement(*make())
        print(f"{what}: {found['prompts']} prompts, {found['tokens']} tokens")
        for name, values in found["models"].items():
            print(
                f"  {name:14} " + ", ".join(f"{key} {value:.4f}" for key, value in values.items()),
                flush=True,
            )
    results["speed"] = speed(args.rounds)
    for how in ("eager", "compiled"):
        for name, result in results["speed"][how].items():
            print(row(f"{name}, {how}", result))
    print(f"  bytes of linear weights: {results['speed']['bytes']}")
    write(args.json, args, results)


if __name__ == "__main__":
    main()
