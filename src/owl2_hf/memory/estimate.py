"""Compute the memory that a task needs on one GPU, by use.

B: batch, L: positions, N: images of the whole batch.
"""

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from ..modeling.compatibility_mplug_owl2 import CACHE
from ..modeling.configuration_mplug_owl2 import MplugOwl2Config
from ..training.loading import checkpoint_activations, make_trainable
from ..training.recipe import Recipe, load_recipe
from ..training.resolution import with_image_size
from .quantized import quantize_stand_in
from .tracking import follow_gpu, materialize, num_bytes, without_data

WEIGHTS = ("bf16", "int8", "int4")
CARDS = (16, 24, 40, 80, 141)  # GB of common GPUs
# The CUDA context, the allocator's gaps and whatever else runs take the rest.
USABLE = 0.9
_LENGTH = 2048
# Their states are two float32 for each parameter, and a step makes no copies.
_OPTIMIZERS = ("adamw_torch_fused", "paged_adamw", "paged_adamw_32bit")


@dataclass(frozen=True)
class Memory:
    """Bytes of a GPU that a task holds at its largest moment.

    Args:
        weights: Parameters and buffers; an adapter's, too.
        cache: Keys and values of all positions.
        gradients: Of the parameters that train.
        optimizer: States of AdamW.
        activations: All other tensors at the largest moment: the input, what is kept for the
            gradients, and what an operation works with.
    """

    weights: int
    cache: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0

    @property
    def total(self) -> int:
        """Their sum."""
        return sum(asdict(self).values())


def smallest_card(total: int) -> int | None:
    """GB of the smallest of `CARDS` that has room for so many bytes; `None` if none has.

    A tenth of a card stays free for what is not counted.
    """
    return next((card for card in CARDS if total <= USABLE * card * 1e9), None)


def inference_memory(
    config: MplugOwl2Config,
    weights: str = "bf16",
    *,
    batch_size: int = 1,
    length: int | None = None,
    images: int = 1,
) -> Memory:
    """Compute what generation needs: prompts with images at once, then token by token.

    Args:
        weights: `bf16`; `int8`, the decoder's matrices rounded by torchao; or `int4`, by
            bitsandbytes (NF4 with quantised scales). All else is bfloat16.
        batch_size: Rows, B.
        length: Positions of a row, L: visual tokens, prompt and answer. Default: 2048, or the
            model's context if that is shorter.
        images: Images (DocOwl 1.5: crops) of a row.

    Raises:
        ValueError: If an argument has no such value, the images have no room in the row, or the
            configuration is of a quantised model.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights: expected one of {', '.join(WEIGHTS)}, got {weights!r}.")
    length = usual_length(config) if length is None else length
    _check_size(config, batch_size, length, images)
    inputs = _inputs(config, batch_size, length - 1, images)  # the last one is decoded alone
    with torch.device("meta"):
        model = _model(config, torch.bfloat16).eval()
        if weights != "bf16":
            quantize_stand_in(model, weights)
    with without_data() as found, torch.no_grad():
        materialize(model)
        held = num_bytes(_tensors(model))
        found.restart()
        output = model(**inputs, **_pixels(config, batch_size * images), **_LAST)
        token = inputs["input_ids"][:, -1:]
        output = model(input_ids=token, **{CACHE: output[CACHE]}, **_LAST)
        cache = num_bytes(
            one for layer in output[CACHE].layers for one in (layer.keys, layer.values)
        )
        return Memory(held, cache, activations=found.peak - held - cache)


_LAST = {"use_cache": True, "logits_to_keep": 1}  # as `generate` calls the model


def training_memory(
    config: MplugOwl2Config,
    recipe: Recipe | str = "lora",
    *,
    batch_size: int | None = None,
    length: int | None = None,
    images: int = 1,
    checkpointing: bool | None = None,
) -> Memory:
    """Compute what a step of a recipe needs, while gradients are accumulated.

    Args:
        recipe: A recipe, its file, or the name of one in the package.
        batch_size: Rows on the device. Default: the recipe's.
        length: Positions of a row. Default: the recipe's `data.max_length`.
        images: Images (DocOwl 1.5: crops) of a row.
        checkpointing: Whether activations are computed again for the gradients instead of kept.
            Default: as the recipe says.

    Raises:
        ValueError: As in `inference_memory`, or if the recipe has a setting that is not counted.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    _check_recipe(recipe)
    settings = recipe.trainer
    if batch_size is None:
        batch_size = settings.get("per_device_train_batch_size", 8)
    if recipe.scores is not None and recipe.scores.labels == "soft":
        batch_size *= 2  # each row is a pair
    if recipe.image_size is not None:
        config = with_image_size(config, recipe.image_size)
    if length is None:
        length = recipe.data.max_length or usual_length(config)
    _check_size(config, batch_size, length, images)
    inputs = _inputs(config, batch_size, length, images)
    labels = inputs["input_ids"]
    with torch.device("meta"):
        model = _model_to_train(config, recipe)
    with without_data() as found:
        materialize(model)
        follow_gpu(model)
        if checkpointing is None:
            # Its second name is the one of older releases of transformers.
            names = ("activation_checkpointing", "gradient_checkpointing")
            checkpointing = any(settings.get(name) for name in names)
        if checkpointing:
            checkpoint_activations(model)
        trained = [one for one in model.parameters() if one.requires_grad]
        optimizer = torch.optim.AdamW(trained, fused=True)
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        held = Memory(
            num_bytes(_tensors(model)),
            gradients=num_bytes(one.grad for one in trained if one.grad is not None),
            optimizer=num_bytes(
                value for state in optimizer.state.values() for value in state.values()
            ),
        )
        found.restart()
        with _autocast(recipe):
            pixels = _pixels(config, batch_size * images, torch.float32)
            loss = model(**inputs, **pixels, labels=labels, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        return replace(held, activations=found.peak - held.total)


def memory_of_tasks(
    config: MplugOwl2Config,
    *,
    batch_size: int = 1,
    length: int | None = None,
    images: int = 1,
) -> Iterator[tuple[str, Memory]]:
    """Compute the usual tasks one after the other: inference, and the recipes lora, qlora and
    instruct (full training), each with and without gradient checkpointing.

    Args:
        batch_size, length, images: As in `inference_memory`. Default of the length: 2048, or the
            model's context if that is shorter.

    Returns:
        Name and memory of each.
    """
    length = usual_length(config) if length is None else length
    size: dict[str, Any] = {"batch_size": batch_size, "length": length, "images": images}
    for weights in WEIGHTS:
        yield f"inference, {weights}", inference_memory(config, weights, **size)
    for name in ("qlora", "lora", "instruct"):
        for checkpointing in (True, False):
            kind = name if checkpointing else f"{name}, no checkpointing"
            yield kind, training_memory(config, name, checkpointing=checkpointing, **size)


def usual_length(config: MplugOwl2Config) -> int:
    """Positions of a row if none are given."""
    return min(_LENGTH, config.text_config.max_position_embeddings)


def _model(config: MplugOwl2Config, dtype: torch.dtype) -> Any:
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            "expected an unquantised model, whose memory is computed for bf16, int8 and int4, got "
            "a quantised one."
        )
    return AutoModelForImageTextToText.from_config(copy.deepcopy(config), dtype=dtype)


def _model_to_train(config: MplugOwl2Config, recipe: Recipe) -> Any:
    """What `load_for_training` makes."""
    model = _model(config, getattr(torch, recipe.dtype))
    if recipe.quantization is not None:
        quantize_stand_in(model, "int4")
        model.is_loaded_in_4bit = True
    return make_trainable(model, recipe).train()


def _autocast(recipe: Recipe) -> Any:
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if recipe.trainer.get(name):
            return torch.autocast("cpu", dtype)
    return nullcontext()


def _check_recipe(recipe: Recipe) -> None:
    settings = recipe.trainer
    if recipe.quantization not in (None, "4bit"):
        raise ValueError(f"quantization: expected 4bit or none, got {recipe.quantization}.")
    if (optim := settings.get("optim", _OPTIMIZERS[0])) not in _OPTIMIZERS:
        raise ValueError(f"trainer.optim: expected one of {', '.join(_OPTIMIZERS)}, got {optim}.")
    if sharded := [name for name in ("deepspeed", "fsdp") if settings.get(name)]:
        raise ValueError(
            f"trainer.{sharded[0]}: memory is computed for one device, without sharding: leave it "
            "out."
        )


def _check_size(config: MplugOwl2Config, batch_size: int, length: int, images: int) -> None:
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("length", length, 2),
        ("images", images, 0),
    ):
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}.")
    longest, visual = config.text_config.max_position_embeddings, images * config.num_image_tokens
    if length > longest:
        raise ValueError(f"length: expected at most the model's {longest}, got {length}.")
    if visual >= length - 1:
        raise ValueError(
            f"images: {images} take {visual} positions, but a row has {length}: give fewer images "
            "or a larger length."
        )


def _inputs(
    config: MplugOwl2Config, batch_size: int, length: int, images: int
) -> dict[str, Tensor]:
    """Ids, a mask as rows that are padded to one length have, and modality indicators, (B, L)."""
    ids = torch.ones(batch_size, length, dtype=torch.long)
    ids[:, : images * config.num_image_tokens] = config.image_token_id
    mask = torch.ones_like(ids)
    mask[1:, -1] = 0
    indicators = ids.eq(config.image_token_id).long()
    return {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": indicators}


def _pixels(
    config: MplugOwl2Config, num_images: int, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Tensor]:
    """Pixels (N, 3, H, W)."""
    vision = config.vision_config
    shape = (num_images, vision.num_channels, vision.image_size, vision.image_size)
    return {"pixel_values": torch.empty(shape, dtype=dtype)} if num_images else {}


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()
