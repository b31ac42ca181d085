"""The decoder against transformers' LLaMA of the same shape, and decoding against the time that
reading the weights takes.

"Ours" is the whole model with images that are encoded already, so that the decoder alone is
measured; LLaMA gets embeddings of as many positions.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, DynamicCache, StaticCache

from owl2_hf.checks.speed import bytes_per_token
from owl2_hf.modeling.compatibility_mplug_owl2 import CACHE
from owl2_hf.modeling.outputs_mplug_owl2 import MplugOwl2ImageFeatures

from . import models
from .compiling import compiled, counts, difference
from .frame import Setting, Step, aim, bandwidth, compare, matmul_rate, peak_memory, time_of

PREFILL, DECODE, FLOOR, MEMORY, VISION = 1.05, 1.02, 1.25, 1.05, 1.05  # at most
# Rounding in bfloat16, in another order of operations.
DIFFERENCE = 0.05
# A layer of the compiled graphs is as large as a published one; fewer of them compile sooner.
COMPILED_LAYERS = 4
PROMPT, TOKENS, ROOM = 512, 8, 640  # positions before decoding, tokens of a run, of the cache
# Text tokens and images; the last has 4,096 positions.
PROMPTS = ((64, 1), (64, 4), (64, 16), (512, 1), (512, 4), (512, 16), (3056, 16))
COMPILED_PROMPTS = ((512, 4), (64, 16), (64, 1), (3056, 16))
BATCHES = (1, 8, 32)


def prefill_runs(
    setting: Setting, text: int, images: int, num_layers: int | None = None
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The two models, and the arguments of a prompt for each."""
    both = {
        "llama": models.llama(setting, num_layers),
        "ours": models.owl2(setting, num_layers),
    }
    prompt = models.inputs(setting, 1, text // 16 if setting.tiny else text, images)
    width = both["llama"].config.hidden_size
    embeds = torch.randn(
        (*prompt["input_ids"].shape, width), device=setting.device, dtype=setting.dtype
    )
    del prompt["pixel_values"]
    features = torch.randn(
        (images, both["ours"].config.num_image_tokens, width),
        device=setting.device,
        dtype=setting.dtype,
    )
    encoded = {"image": MplugOwl2ImageFeatures(pooler_output=list(features))}
    shared = {"use_cache": False, "logits_to_keep": 1}
    return both, {
        "llama": {"inputs_embeds": embeds, **shared},
        "ours": {**prompt, "mm_encoder_outputs": encoded, **shared},
    }


@torch.no_grad()
def prefill(text: int, images: int, setting: Setting) -> dict[str, Any]:
    """A prompt, eager, and the memory that it takes beside the weights."""
    both, arguments = prefill_runs(setting, text, images)
    runs = {name: partial(model, **arguments[name]) for name, model in both.items()}
    found = compare(runs, "llama", setting)
    aims = {"time over LLaMA's": aim(found["ours"]["ratio"], at_most=PREFILL)}
    memory = {name: _beyond_weights(run, setting) for name, run in runs.items()}
    if memory["llama"]:
        aims["memory over LLaMA's"] = aim(memory["ours"] / memory["llama"], at_most=MEMORY)
    positions = arguments["ours"]["input_ids"].shape[1]
    return {"positions": positions, **found, "peak memory, bytes": memory, "aims": aims}


def _beyond_weights(run: Callable[[], object], setting: Setting) -> int | None:
    """Bytes of the peak beyond what lay on the GPU before."""
    if setting.device.type != "cuda":
        return None
    before = torch.cuda.memory_allocated(setting.device)
    return peak_memory(run, setting) - before


@torch.no_grad()
def prefill_compiled(
    text: int, images: int, setting: Setting, mode: str | None = None
) -> dict[str, Any]:
    """A prompt of a compiled model with few layers."""
    both, arguments = prefill_runs(setting, text, images, COMPILED_LAYERS)
    eager = both["ours"](**arguments["ours"]).logits
    calls = {name: compiled(model, mode=mode) for name, model in both.items()}
    runs = {name: partial(call, **arguments[name]) for name, call in calls.items()}
    found = compare(runs, "llama", setting, warmup=4)
    other = difference(runs["ours"]().logits, eager, both["ours"].config.image_token_id)
    aims = {
        "time over LLaMA's": aim(found["ours"]["ratio"], at_most=PREFILL),
        "difference from eager": aim(other, at_most=DIFFERENCE),
        **counts(2, setting),
    }
    shape = {
        "positions": arguments["ours"]["input_ids"].shape[1],
        "layers": both["ours"].config.text_config.num_hidden_layers,
    }
    return {**shape, **found, "aims": aims}


class Decoding:
    """Tokens behind a prompt of `PROMPT` positions; each run starts there anew.

    Args:
        call: The model, or what was compiled of it.
        is_static: The cache has `ROOM` positions from the start.
    """

    def __init__(self, model: Any, call: Any, batch: int, is_static: bool, setting: Setting):
        self.call, self.prompt = call, 32 if setting.tiny else PROMPT
        text = model.config.get_text_config()
        self.cache = (
            StaticCache(config=text, max_cache_len=self.prompt + ROOM - PROMPT)
            if is_static
            else DynamicCache(config=text)
        )
        ids = models.inputs(setting, batch, self.prompt + TOKENS, 0)["input_ids"]
        self.tokens = ids[:, self.prompt :].split(1, dim=1)  # TOKENS of (B, 1)
        options = {CACHE: self.cache, "use_cache": True, "logits_to_keep": 1}
        model(ids[:, : self.prompt], **options)
        self.options = options
        self.is_static = is_static

    def __call__(self) -> torch.Tensor:
        """Decode `TOKENS` tokens. Returns the last logits, (B, 1, V)."""
        for token in self.tokens:
            if self.is_static:
                # What an earlier replay of a CUDA graph returned may be overwritten.
                torch.compiler.cudagraph_mark_step_begin()
            logits = self.call(token, **self.options).logits
        if self.is_static:
            for layer in self.cache.layers:
                layer.cumulative_length.fill_(self.prompt)
        else:
            self.cache.crop(-TOKENS)
        return logits

    def bytes_of_cache(self) -> int:
        """Keys and values that a step reads: all places of a static cache."""
        return sum(one.keys.nbytes + one.values.nbytes for one in self.cache.layers)


@torch.no_grad()
def decode(batch: int, setting: Setting) -> dict[str, Any]:
    """Tokens one after the other, eager, with the cache that grows."""
    both = {"llama": models.llama(setting), "ours": models.owl2(setting)}
    runs = {name: Decoding(one, one, batch, False, setting) for name, one in both.items()}
    found = compare(runs, "llama", setting, rounds=8, warmup=2)
    aims = {"time over LLaMA's": aim(found["ours"]["ratio"], at_most=DECODE)}
    return {**_by_token(found, batch), "aims": aims}


@torch.no_grad()
def decode_compiled(
    batch: int, setting: Setting, num_layers: int | None = COMPILED_LAYERS, alone: bool = False
) -> dict[str, Any]:
    """Tokens one after the other, each a replay of one CUDA graph, with a static cache."""
    both = {"ours": models.owl2(setting, num_layers)}
    if not alone:
        both = {"llama": models.llama(setting, num_layers), **both}
    calls = {name: compiled(one, mode="reduce-overhead") for name, one in both.items()}
    runs = {name: Decoding(one, calls[name], batch, True, setting) for name, one in both.items()}
    base = next(iter(runs))
    eager = Decoding(both["ours"], both["ours"], batch, True, setting)().clone()
    found = compare(runs, base, setting, rounds=10, warmup=3)
    num_bytes = bytes_per_token(both["ours"]) + runs["ours"].bytes_of_cache()
    floor = num_bytes / bandwidth(setting)
    over = found["ours"]["seconds"] / TOKENS / floor
    other = difference(runs["ours"](), eager, both["ours"].config.image_token_id)
    aims = {
        **({} if alone else {"time over LLaMA's": aim(found["ours"]["ratio"], at_most=DECODE)}),
        # With many rows other things than reading take the time.
        **({"time over reading": aim(over, at_most=FLOOR)} if batch == 1 else {}),
        "difference from eager": aim(other, at_most=DIFFERENCE),
        **counts(len(runs), setting),
    }
    shape = {"layers": both["ours"].config.text_config.num_hidden_layers, "bytes": num_bytes}
    reading = {"seconds of reading": floor, "time over reading": over}
    return {**shape, **reading, **_by_token(found, batch), "aims": aims}


def _by_token(found: dict[str, dict[str, float]], batch: int) -> dict[str, Any]:
    """Adds the tokens a second of all rows."""
    return {
        name: {**one, "tokens a second": TOKENS * batch / one["seconds"]}
        for name, one in found.items()
    }


@torch.no_grad()
def vision(images: int, setting: Setting) -> dict[str, Any]:
    """Images to visual tokens; the encoder against transformers' CLIP of the same shape."""
    model = models.owl2(setting, COMPILED_LAYERS)
    pixels = models.inputs(setting, 1, 8, images)["pixel_values"]
    shape = model.config.vision_config
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("image_size", "patch_size", "hidden_act", "layer_norm_eps")
    fields = {name: getattr(shape, name) for name in names}
    clip = models.build(CLIPVisionModel, CLIPVisionConfig(**fields), setting)
    encoder = model.model.vision_tower
    runs = {
        "CLIP": lambda: clip(pixel_values=pixels),
        "ours": lambda: encoder(pixel_values=pixels),
        "ours with connector": lambda: model.get_image_features(pixels),
    }
    found = compare(runs, "CLIP", setting)
    weights = sum(one.numel() for one in encoder.parameters())
    positions = images * ((shape.image_size // shape.patch_size) ** 2 + 1)
    # Two operations for each weight at each position; attention adds a tenth.
    rate = 2 * weights * positions / found["ours"]["seconds"]
    return {
        **found,
        "images a second": images / found["ours with connector"]["seconds"],
        "share of the matmul rate": rate / matmul_rate(setting),
        "aims": {"time over CLIP's": aim(found["ours"]["ratio"], at_most=VISION)},
    }


def first_step(setting: Setting) -> dict[str, Any]:
    """Whether both models can be made, and how long it takes."""
    weights = {}
    for name, make in (("llama", models.llama), ("ours", models.owl2)):
        weights[name] = sum(one.numel() for one in make(setting).parameters())
    token = models.inputs(setting, 1, 1, 0)["input_ids"]
    with torch.no_grad():
        seconds = time_of(lambda: models.owl2(setting)(token), setting, rounds=3)
    return {"weights": weights, "seconds of a token": seconds}


def prompt_of(text: int, images: int) -> str:
    if text == PROMPTS[-1][0]:
        return "4096 positions"
    return f"{text} text + {images} image{'s' * (images > 1)}"


def one_is_enough(setting: Setting) -> str | None:
    """A try of the steps compiles one of each kind."""
    return "another step of its kind ran with the tiny shapes" if setting.tiny else None


def steps() -> list[Step]:
    prefills = {one: f"prefill, {prompt_of(*one)}" for one in PROMPTS}
    tuned = partial(prefill_compiled, 512, 4, mode="max-autotune-no-cudagraphs")
    whole = partial(decode_compiled, 1, num_layers=None, alone=True)
    made = [Step("models are made", first_step, 0.2)]
    for one, name in prefills.items():
        made.append(Step(f"{name}, eager", partial(prefill, *one), 0.05))
    for batch in BATCHES:
        made.append(Step(f"decode, batch {batch}, eager", partial(decode, batch), 0.15))
    for images in (1, 4, 16):
        name = f"vision side, {images} image{'s' * (images > 1)}"
        made.append(Step(name, partial(vision, images), 0.05))
    others: dict[str, Any] = {}
    for one in COMPILED_PROMPTS:
        call = partial(prefill_compiled, *one)
        made.append(Step(f"{prefills[one]}, compiled", call, 0.35, **others))
        others = {"needs": one_is_enough}
    others = {}
    for batch in BATCHES:
        call = partial(decode_compiled, batch)
        made.append(Step(f"decode, batch {batch}, compiled", call, 0.35, **others))
        others = {"needs": one_is_enough}
    made.append(Step("decode, batch 1, compiled, all layers", whole, 1.0))
    name = f"{prefills[512, 4]}, max-autotune"
    return [*made, Step(name, tuned, 1.5, one_is_enough)]


STEPS = steps()
