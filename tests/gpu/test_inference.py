"""Numbers and generation on a GPU; each test also runs on the CPU."""

from collections.abc import Callable

import pytest
import torch
from PIL import Image
from transformers import CompileConfig, DynamicCache, StaticCache

import owl2_hf
from owl2_hf.conversion import convert
from owl2_hf.modeling.compatibility_mplug_owl2 import CACHE
from owl2_hf.modeling.conversion_mplug_owl2 import to_ours

from ..original import GoldenSet
from ..syncs import host_syncs

# Largest error over the largest number. A GPU sums in another order than the CPU of the original.
TOLERANCE = {"cpu": 1e-5, "cuda": 5e-5}
GREEDY = {"do_sample": False, "max_new_tokens": 6}


@pytest.fixture(scope="module")
def small_set(golden_dir, tmp_path_factory):
    """The golden set that the repository ships, and its model converted."""
    source = golden_dir("A")
    target = tmp_path_factory.mktemp("A") / "converted"
    convert(source / "hf", target)
    return source, target


@pytest.fixture
def golden(small_set, device):
    """The model on the device, and a function from a case's name to its inputs and numbers there."""
    golden = GoldenSet(*small_set, device, dtype=torch.float32)

    def case(name):
        if name not in golden.cases:
            pytest.skip(f"the golden set A that is here has no case {name}")
        found = golden.case(name)
        return golden.inputs(found), found

    return golden.model, case


def assert_close(actual, expected, device, floor=0.0):
    assert actual.device.type == device
    error = (actual.float() - expected.float()).abs().max()
    assert error < TOLERANCE[device] * expected.abs().max().clamp_min(floor)


@torch.no_grad()
@pytest.mark.parametrize("name", ["c2_two_images", "c3_text_only", "c4_batch2"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_logits_are_the_originals(golden, device, name, attention):
    model, case = golden
    model.set_attn_implementation(attention)
    inputs, expected = case(name)
    logits = model(**inputs).logits[..., : model.config.output_vocab_size]
    assert_close(logits, expected["logits"], device)


@torch.no_grad()
def test_visual_tokens_are_the_originals(golden, device):
    model, case = golden
    _, expected = case("c2_two_images")
    features = model.get_image_features(expected["images"])
    assert_close(features.last_hidden_state, expected["vision_last_hidden_state"], device)
    tokens = torch.stack(features.pooler_output)
    assert_close(tokens, expected["abstractor_last_hidden_state"], device)


def test_loss_and_gradients_are_the_originals(golden, device):
    model, case = golden
    inputs, expected = case("c7_grads")
    loss = model.train()(**inputs).loss
    loss.backward()
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    compared = 0
    for key, value in expected.items():
        if key.startswith("grad."):
            for name, gradient in to_ours(key.removeprefix("grad."), value, model.config):
                # The floor is for key biases, whose gradients are rounding noise.
                assert_close(ours[name], gradient, device, floor=1e-2)
                compared += 1
    assert compared >= 20


@pytest.mark.parametrize("name", ["c6b_generate_two_images", "c6d_generate_batch2"])
def test_generated_ids_are_the_originals(golden, device, name):
    model, case = golden
    inputs, expected = case(name)
    new_ids = expected["new_ids"]
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert output[:, -new_ids.shape[1] :].tolist() == new_ids.tolist()


@pytest.fixture
def default_prompt(device):
    """The bundled model in float32, and a question about an image, on the device."""
    model, processor = owl2_hf.load_default(dtype=torch.float32)
    image = Image.open(owl2_hf.default_pictures()["emoji-banana"])
    text = "USER: <|image|>What is this? ASSISTANT:"
    inputs = processor(text=text, images=image, return_tensors="pt")
    return model.eval().to(device), dict(inputs.to(device))


def test_compiled_generation_with_a_static_cache_gives_the_same_ids(default_prompt, device):
    model, inputs = default_prompt
    expected = model.generate(**inputs, **GREEDY)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    # On a GPU what transformers chooses; a CPU compiles only if it is told to.
    config = CompileConfig() if device == "cuda" else CompileConfig(backend="eager")
    config._compile_all_devices = True
    got = model.generate(**inputs, **GREEDY, cache_implementation="static", compile_config=config)
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0
    assert torch.equal(got, expected)


def check_no_syncs(device: str, function: Callable[[], object]) -> None:
    """Whatever makes the host wait for the device is an error."""
    if device == "cpu":
        assert not host_syncs(function)
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        function()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_waiting_for_the_device_is_noticed(device):
    value = torch.ones(3, device=device)
    with pytest.raises((RuntimeError, AssertionError)):
        check_no_syncs(device, value.nonzero)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_decoding_step_does_not_wait_for_the_device(default_prompt, device, kind):
    model, inputs = default_prompt
    text = model.config.get_text_config()
    length = inputs["input_ids"].shape[1]
    cache = (
        DynamicCache(config=text)
        if kind == "dynamic"
        else StaticCache(config=text, max_cache_len=length + 8)
    )
    options = {CACHE: cache, "use_cache": True, "logits_to_keep": 1}
    token = model(**inputs, **options).logits[:, -1].argmax(-1, keepdim=True)
    token = model(token, **options).logits[:, -1].argmax(-1, keepdim=True)  # the first of its kind
    check_no_syncs(device, lambda: model(token, **options))


def test_layers_may_be_offloaded(default_prompt, device, tmp_path):
    """Half of the decoder waits in the CPU's memory, or on the disk where the CPU computes; its
    weights come when they are needed.
    """
    model, inputs = default_prompt
    expected = model(**inputs).logits, model.generate(**inputs, **GREEDY)
    place, elsewhere = (0, "cpu") if device == "cuda" else ("cpu", "disk")
    half = model.config.text_config.num_hidden_layers // 2
    layers = {
        f"model.language_model.layers.{index}": place if index < half else elsewhere
        for index in range(model.config.text_config.num_hidden_layers)
    }
    decoder = {f"model.language_model.{name}": place for name in ("embed_tokens", "norm")}
    rest = dict.fromkeys(("model.vision_tower", "model.visual_abstractor", "lm_head"), place)
    split, _ = owl2_hf.load_default(
        dtype=torch.float32,
        device_map={**rest, **decoder, "model.language_model.rotary_emb": place, **layers},
        offload_folder=tmp_path,
    )
    assert set(split.hf_device_map.values()) == {place, elsewhere}
    torch.testing.assert_close(split(**inputs).logits, expected[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(split.generate(**inputs, **GREEDY), expected[1])
