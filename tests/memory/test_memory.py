"""What the package computes of memory, against what PyTorch allocates in the same task."""

import gc
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForImageTextToText, DynamicCache, TorchAoConfig

from owl2_hf.default import default_dir
from owl2_hf.memory import (
    Memory,
    inference_memory,
    memory_of_tasks,
    smallest_card,
    training_memory,
)
from owl2_hf.memory.quantized import StandInLinear
from owl2_hf.memory.tracking import Allocations, follow_gpu, num_bytes, without_data
from owl2_hf.modeling import MplugOwl2Config
from owl2_hf.modeling.compatibility_mplug_owl2 import CACHE
from owl2_hf.training.adapters import add_adapter
from owl2_hf.training.components import freeze_all_but
from owl2_hf.training.loading import checkpoint_activations, load_for_training
from owl2_hf.training.recipe import load_recipe

from ..modeling.test_modeling_mplug_owl2 import tiny_config

ROOT = Path(__file__).parents[2]


def peak_of(run) -> int:
    """Most bytes that PyTorch's allocator held for tensors at a time, as it reports them itself."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    events = [one for one in found.profiler.kineto_results.events() if one.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda one: one.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def small_config() -> MplugOwl2Config:
    config = tiny_config(num_hidden_layers=4, max_position_embeddings=2048)
    return MplugOwl2Config.from_dict(config.to_dict())


def row_inputs(config, batch_size, length, images):
    ids = torch.ones(batch_size, length, dtype=torch.long)
    ids[:, : images * config.num_image_tokens] = config.image_token_id
    mask = torch.ones_like(ids)
    mask[1:, -1] = 0
    side = config.vision_config.image_size
    pixels = {"pixel_values": torch.zeros(batch_size * images, 3, side, side)} if images else {}
    indicators = ids.eq(config.image_token_id).long()
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "mm_token_type_ids": indicators,
        **pixels,
    }


def real_model(config, recipe):
    model = AutoModelForImageTextToText.from_config(config, dtype=getattr(torch, recipe.dtype))
    if recipe.adapter is not None:
        model = add_adapter(model, recipe.adapter, is_quantized=False)
    freeze_all_but(model, recipe.trains if recipe.adapter is None else "adapters")
    return model.train()


def real_step(config, recipe, batch_size, length, images, checkpointing):
    model = real_model(config, recipe)
    follow_gpu(model)
    if checkpointing:
        checkpoint_activations(model)
    trained = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    inputs = row_inputs(config, batch_size, length, images)
    for _ in range(2):  # the second one finds gradients and states of the first
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.trainer["bf16"]):
            loss = model(**inputs, labels=inputs["input_ids"], use_cache=False).loss
        loss.backward()
        optimizer.step()
    return model, optimizer


# Batch size, positions and images of a row; checkpointing.
STEPS = [
    ("instruct", (1, 700, 2), False, True),
    ("instruct", (3, 300, 1), True, True),
    ("instruct", (2, 150, 0), False, False),
    ("lora", (1, 1500, 1), False, True),
    ("lora", (3, 300, 1), True, False),
]


@pytest.mark.parametrize(("name", "size", "checkpointing", "bf16"), STEPS)
def test_a_training_step_needs_what_the_allocator_reports(name, size, checkpointing, bf16):
    settings = ["image_size=null", f"trainer.bf16={str(bf16).lower()}"]
    recipe = load_recipe(name, settings)
    batch_size, length, images = size
    expected = training_memory(
        small_config(),
        recipe,
        batch_size=batch_size,
        length=length,
        images=images,
        checkpointing=checkpointing,
    )
    kept = []
    peak = peak_of(lambda: kept.extend(real_step(small_config(), recipe, *size, checkpointing)))
    model, optimizer = kept
    trained = [one for one in model.parameters() if one.requires_grad]
    assert expected.weights == num_bytes([*model.parameters(), *model.buffers()])
    grads = [one.grad for one in trained]
    assert expected.gradients == sum(one.numel() * one.element_size() for one in grads) > 0
    states = [value for state in optimizer.state.values() for value in state.values()]
    assert expected.optimizer == num_bytes(states)
    # Kernels of the CPU have memory of their own, most of it when activations are computed again.
    assert 1 <= peak / expected.total < (1.06 if checkpointing else 1.02)


def test_what_is_counted_after_a_forward_is_what_autograd_saves():
    """A second opinion on activations alone: tensors that autograd hands to its hooks."""
    config, recipe = small_config(), load_recipe("instruct", ["image_size=null"])
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage
        return tensor

    with Allocations() as found:
        model = real_model(config, recipe)
        inputs = row_inputs(config, 2, 260, 1)
        before = found.alive
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(**inputs, labels=inputs["input_ids"], use_cache=False).loss
        kept = found.alive - before
    for tensor in (*model.parameters(), *model.buffers(), *inputs.values()):
        saved.pop(tensor.untyped_storage().data_ptr(), None)
    assert loss.requires_grad
    assert sum(storage.nbytes() for storage in saved.values()) == pytest.approx(kept, rel=0.01)


@pytest.mark.parametrize("size", [(1, 60, 1), (3, 200, 2), (2, 40, 0)])
def test_inference_has_the_weights_and_the_cache_of_a_real_run(size):
    batch_size, length, images = size
    config = small_config()
    found = inference_memory(config, batch_size=batch_size, length=length, images=images)
    made = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16).eval()
    inputs = row_inputs(config, batch_size, length, images)
    with torch.no_grad():
        if images:
            inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
        cache = made(**inputs, use_cache=True)[CACHE]
    assert isinstance(cache, DynamicCache)
    keys = [one for layer in cache.layers for one in (layer.keys, layer.values)]
    assert found.weights == num_bytes([*made.parameters(), *made.buffers()])
    assert found.cache == sum(one.numel() * one.element_size() for one in keys)

    def run():
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16).eval()
        prompt = row_inputs(config, batch_size, length - 1, images)
        if images:
            prompt["pixel_values"] = prompt["pixel_values"].bfloat16()
        with torch.no_grad():
            output = model(**prompt, use_cache=True, logits_to_keep=1)
            token = torch.ones(batch_size, 1, dtype=torch.long)
            model(input_ids=token, **{CACHE: output[CACHE]}, use_cache=True, logits_to_keep=1)

    # Kernels of the CPU have memory of their own.
    assert 0.98 < peak_of(run) / found.total < 1.25


def test_the_published_shape_has_the_published_number_of_parameters():
    found = inference_memory(MplugOwl2Config(), length=200)
    assert found.weights == pytest.approx(2 * 8_198_383_616, rel=0.002)
    assert found.weights > 2 * 8_198_383_616  # tables of positions are float32
    keys_and_values = 2 * 32 * 32 * 128
    assert found.cache == 2 * 200 * keys_and_values


def test_int8_weights_are_of_torchaos_size():
    quantization = pytest.importorskip("torchao.quantization")
    model = AutoModelForImageTextToText.from_pretrained(
        default_dir(),
        dtype=torch.bfloat16,
        quantization_config=TorchAoConfig(quantization.Int8WeightOnlyConfig()),
    )
    real = 0
    for tensor in [*model.parameters(), *model.buffers()]:
        names = (
            tensor.__tensor_flatten__()[0]
            if type(tensor) is not nn.Parameter and hasattr(tensor, "__tensor_flatten__")
            else []
        )
        real += num_bytes([getattr(tensor, name) for name in names] if names else [tensor])
    config = AutoConfig.from_pretrained(default_dir())
    assert inference_memory(config, "int8", length=64).weights == real
    whole = inference_memory(config, "bf16", length=64).weights
    assert real < 0.85 * whole


@pytest.mark.parametrize("shape", [(128, 192), (64, 4096), (11, 320)])
def test_int4_weights_are_of_bitsandbytes_size(shape):
    functional = pytest.importorskip(
        "bitsandbytes.functional", reason="needs bitsandbytes: pip install 'owl2_hf[qlora]'"
    )
    linear = nn.Linear(shape[1], shape[0], bias=False, dtype=torch.bfloat16)
    packed, state = functional.quantize_4bit(
        linear.weight.data, quant_type="nf4", compress_statistics=True
    )
    parts = [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    stand_in = StandInLinear(linear, "int4")
    expected = num_bytes([*stand_in.parameters(), *stand_in.buffers()])
    assert expected == num_bytes([packed, *parts])


@pytest.mark.parametrize("to", ["int8", "int4"])
def test_a_quantised_layer_keeps_neither_its_input_nor_the_restored_matrix(to):
    linear = nn.Linear(96, 64, dtype=torch.bfloat16)
    with without_data() as found:
        layer = StandInLinear(linear, to)
        x = torch.empty(8, 96, requires_grad=True)
        before = found.alive
        output = layer(x)
        # The output in float32, as the input; the sum with the bias is another tensor.
        assert output.dtype == torch.float32 and found.alive - before == 8 * 64 * 4
        assert found.peak - before >= 96 * 64 * 2
        output.sum().backward()
        assert x.grad.shape == x.shape


@pytest.mark.parametrize("name", ["lora", "score-lora", "visual-branch"])
def test_the_model_of_a_recipe_is_the_one_that_training_loads(name):
    recipe = load_recipe(name, ["model=default"])
    model, _ = load_for_training(recipe)
    config = AutoConfig.from_pretrained(default_dir())
    found = training_memory(config, recipe, batch_size=1, length=64)
    trained = [one for one in model.parameters() if one.requires_grad]
    assert found.weights == num_bytes([*model.parameters(), *model.buffers()])
    assert found.gradients == num_bytes(trained)
    assert found.optimizer == pytest.approx(2 * found.gradients, rel=0.01)


def test_a_recipes_image_size_counts():
    config = AutoConfig.from_pretrained(default_dir())
    small, large = (
        training_memory(
            config, load_recipe("instruct", [f"image_size={side}"]), batch_size=1, length=64
        )
        for side in (64, 256)
    )
    assert large.activations > 1.3 * small.activations and large.weights > small.weights


def test_pairs_of_a_soft_scorer_are_two_rows():
    config = small_config()
    soft = load_recipe("score-soft-lora")
    hard = replace(soft, scores=replace(soft.scores, labels="hard"))
    size = {"length": 100, "checkpointing": False}
    assert training_memory(config, soft, batch_size=2, **size) == training_memory(
        config, hard, batch_size=4, **size
    )


def test_qlora_keeps_the_decoder_in_four_bits_and_all_else_in_float32():
    config = small_config()
    found = training_memory(config, "qlora", batch_size=1, length=64)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    decoder = sum(
        module.weight.numel()
        for module in model.model.language_model.modules()
        if isinstance(module, nn.Linear)
    )
    others = num_bytes([*model.parameters(), *model.buffers()]) - 4 * decoder
    adapter = found.gradients
    scales = found.weights - others - adapter - decoder / 2
    # A byte for 64 weights, and tables of 1,092 bytes in each of 4 x 9 matrices.
    assert decoder / 64 < scales < decoder / 64 + 4 * 9 * 1400


MISTAKES = [
    ({"weights": "int3"}, "weights: expected one of bf16, int8, int4, got 'int3'"),
    ({"length": 5000}, "length: expected at most the model's 2048, got 5000"),
    ({"length": 20, "images": 4}, "images: 4 take 20 positions, but a row has 20: give fewer"),
    ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
    ({"images": -1}, "images: expected at least 0, got -1"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_impossible_sizes_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        inference_memory(small_config(), **arguments)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "trainer.optim=adafactor",
            "trainer.optim: expected one of adamw_torch_fused, .*adafactor",
        ),
        ("quantization=8bit", "quantization: expected 4bit or none, got 8bit"),
        ("trainer.fsdp=true", "trainer.fsdp: memory is computed for one device"),
    ],
)
def test_a_recipe_that_is_not_counted_is_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        training_memory(small_config(), load_recipe("lora", [setting]))


def test_a_quantised_model_is_refused():
    config = small_config()
    config.quantization_config = {"quant_method": "torchao"}
    with pytest.raises(ValueError, match="expected an unquantised model"):
        inference_memory(config)


def test_a_tenth_of_a_card_stays_free():
    assert Memory(10, 1, 2, 3, 4).total == 20
    assert smallest_card(int(14.4e9)) == 16 and smallest_card(int(14.5e9)) == 24
    assert smallest_card(int(127e9)) is None


def test_the_stored_table_is_what_the_functions_compute():
    stored = json.loads((ROOT / "benchmarks" / "results" / "memory.json").read_text())["results"]
    config = MplugOwl2Config()
    found = dict(zip(("inference, bf16", "inference, int8"), memory_of_tasks(config), strict=False))
    for name, (task, memory) in found.items():
        assert task == name and vars(memory) == stored["tasks"][name]
    lora = training_memory(config, "lora", batch_size=8, length=512)
    assert lora.total == stored["sizes"]["8 x 512 positions, 1 image each"]["lora"]


MEASURED = ROOT / "benchmarks" / "results" / "gpu.json"
# Steps of `python -m benchmarks.gpu training`; whether activations are the most of their memory.
GPU_STEPS = [
    ("LoRA, with gradient checkpointing", "lora", True, True),
    ("LoRA, without gradient checkpointing", "lora", False, True),
    ("QLoRA, with gradient checkpointing", "qlora", True, True),
    # Its first step, which is measured, has no states of the optimizer yet.
    ("stage 2, with gradient checkpointing", "instruct", True, False),
]


@pytest.mark.parametrize(("step", "recipe", "checkpointing", "is_close"), GPU_STEPS)
def test_computed_memory_matches_memory_measured_on_a_gpu(step, recipe, checkpointing, is_close):
    if not MEASURED.is_file():
        pytest.skip("no GPU was measured yet: python -m benchmarks.gpu")
    results = json.loads(MEASURED.read_text())["results"]
    result = results.get("training", {}).get(step, {}).get("result", {})
    if not result.get("peak memory"):
        pytest.skip(f"this step was not measured on a GPU: {step}")
    config = MplugOwl2Config(text_config={"num_hidden_layers": result["decoder layers"]})
    computed = training_memory(
        config,
        recipe,
        batch_size=1,
        length=result["positions"],
        images=result["images"],
        checkpointing=checkpointing,
    )
    ratio = result["peak memory"] / computed.total
    assert (0.9 if is_close else 0.4) < ratio < 1.1
