"""Which kernel multiplies what on a CPU, seen by oneDNN's setting and by the operations that run."""

import threading
from collections import Counter

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageTextToText, DynamicCache, TorchAoConfig

from owl2_hf.default import default_dir
from owl2_hf.modeling import MplugOwl2ForConditionalGeneration
from owl2_hf.modeling import cpu_kernels_mplug_owl2 as kernels
from owl2_hf.modeling.compatibility_mplug_owl2 import CACHE

from ..original import pad
from .test_dispatch import operations
from .test_modeling_mplug_owl2 import RUN, pictures, tiny_config


def is_on() -> bool:
    return torch._C._get_mkldnn_enabled()


@pytest.fixture(autouse=True)
def slow_onednn(monkeypatch):
    """As on a processor where oneDNN is slow; afterwards oneDNN is on again."""
    monkeypatch.setattr(kernels, "onednn_is_slow", lambda: True)
    assert is_on()
    yield
    was_on = is_on()
    torch._C._set_mkldnn_enabled(True)
    assert was_on, "a test left oneDNN off"


def tiny(dtype=torch.bfloat16, **text):
    torch.manual_seed(0)
    return MplugOwl2ForConditionalGeneration(tiny_config(**text)).to(dtype).eval()


@pytest.fixture
def model():
    return tiny()


def watch(model: nn.Module) -> Counter:
    """(name of a module, whether oneDNN is on) -> how often it ran so, from now on."""
    seen: Counter = Counter()
    named = {
        "vision": model.model.vision_tower,
        "first": model.model.language_model.layers[0].self_attn.q_proj,
        "last": model.model.language_model.layers[-1].mlp.down_proj,
        "head": model.lm_head,
    }
    for name, module in named.items():
        module.register_forward_pre_hook(
            lambda *_, name=name: seen.update([(name, is_on())]),
        )
    return seen


def of_all(setting: bool, times: int = 1) -> Counter:
    return Counter({(name, setting): times for name in ("first", "last", "head")})


ONE = torch.tensor([[7]])


@torch.no_grad()
def test_a_single_row_runs_without_onednn_from_the_first_layer_to_the_head(model):
    seen = watch(model)
    model(ONE)
    assert seen == of_all(False) and is_on()


@torch.no_grad()
def test_embeddings_of_one_position_are_a_single_row(model):
    seen = watch(model)
    model(inputs_embeds=model.get_input_embeddings()(ONE))
    model(input_ids=ONE)
    assert seen == of_all(False, 2)


@torch.no_grad()
@pytest.mark.parametrize("ids", [[[1, 5]], [[1], [5]]], ids=["two positions", "two prompts"])
def test_two_rows_keep_onednn(model, ids):
    seen = watch(model)
    model(torch.tensor(ids))
    assert seen == of_all(True)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_keep_onednn(dtype):
    model = tiny(dtype)
    seen = watch(model)
    model(ONE)
    assert seen == of_all(True)


def test_gradients_and_training_keep_onednn(model):
    seen = watch(model)
    model(ONE)
    with torch.no_grad():
        model.train()(ONE)
    # In training the vision side takes part without images.
    assert seen - Counter({("vision", True): 1}) == of_all(True, 2)


@torch.no_grad()
def test_other_processors_keep_onednn(model, monkeypatch):
    monkeypatch.setattr(kernels, "onednn_is_slow", lambda: False)
    seen = watch(model)
    model(ONE)
    assert seen == of_all(True)


@torch.no_grad()
def test_generate_reads_the_prompt_with_onednn_and_decodes_without(model):
    seen = watch(model)
    inputs = pad([[1, 5, *RUN, 7]])
    images = pictures(1).bfloat16()
    model.generate(
        **inputs, pixel_values=images, max_new_tokens=4, do_sample=False, eos_token_id=None
    )
    assert seen == of_all(True) + of_all(False, 3) + Counter({("vision", True): 1})
    assert is_on()


@torch.no_grad()
def test_a_user_who_turned_onednn_off_finds_it_off(model):
    seen = watch(model)
    torch._C._set_mkldnn_enabled(False)
    model(ONE)
    model(torch.tensor([[1, 5]]))
    was_on = is_on()
    torch._C._set_mkldnn_enabled(True)
    assert not was_on and seen == of_all(False, 2)


@torch.no_grad()
def test_an_error_in_the_model_leaves_onednn_on(model):
    def fail(*_):
        assert not is_on()
        raise RuntimeError("in the head")

    model.lm_head.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the head"):
        model(ONE)
    assert is_on()


@torch.no_grad()
def test_other_settings_of_onednn_are_not_touched(model):
    before = torch.backends.mkldnn.matmul.fp32_precision, torch.backends.mkldnn.deterministic
    torch.backends.mkldnn.deterministic = True
    torch.backends.mkldnn.matmul.fp32_precision = "ieee"
    try:
        model(ONE)
        assert torch.backends.mkldnn.deterministic
        assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
    finally:
        torch.backends.mkldnn.matmul.fp32_precision, torch.backends.mkldnn.deterministic = before


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_compiled_and_traced_steps_are_left_alone(model, monkeypatch):
    def refuse(*_):
        raise AssertionError("the setting is not for a graph")

    monkeypatch.setattr(kernels.ONEDNN, "rows", refuse)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert compiled(ONE).logits.shape == (1, 1, 96)
    torch.jit.trace(kernels.fast_single_row(lambda ids: ids + 1), ONE, check_trace=False)
    with pytest.raises(AssertionError, match="not for a graph"):
        model(ONE)


@torch.no_grad()
def test_a_prompt_in_another_thread_turns_onednn_on(model):
    """The setting is the process's: the step goes on with oneDNN, and without it afterwards."""
    seen = []

    def read_prompt(*_):
        other = tiny()
        other.lm_head.register_forward_pre_hook(lambda *_: seen.append(is_on()))
        thread = threading.Thread(target=torch.no_grad()(other), args=(torch.tensor([[1, 5]]),))
        thread.start()
        thread.join()
        seen.append(is_on())

    model.model.language_model.layers[0].register_forward_pre_hook(read_prompt)
    model(ONE)
    assert seen == [True, False] and is_on()


@pytest.mark.parametrize("first_ends", [True, False])
def test_the_last_of_overlapping_steps_turns_onednn_on(first_ends):
    switch = kernels.OneDnnSwitch()
    steps = [switch.rows("single"), switch.rows("single")]
    for step in steps:
        step.__enter__()
    order = steps if first_ends else steps[::-1]
    order[0].__exit__(None, None, None)
    assert not is_on()
    order[1].__exit__(None, None, None)
    assert is_on()


@pytest.mark.parametrize("enabled", [True, False], ids=["onednn", "own"])
def test_both_kernels_add_up_in_float32(enabled):
    """In bfloat16, 256 + 1 is 256."""
    row, weight = torch.ones(1, 4096).bfloat16(), torch.ones(256, 4096).bfloat16()
    with torch.backends.mkldnn.flags(enabled=enabled, allow_tf32=None):
        assert nn.functional.linear(row, weight).eq(4096).all()


@torch.no_grad()
@pytest.mark.parametrize("heads", [2, 6], ids="{} key-value heads".format)
def test_a_step_without_onednn_agrees_with_one_with_it(monkeypatch, heads):
    model, logits = tiny(num_key_value_heads=heads), []
    for is_slow in (True, False):
        monkeypatch.setattr(kernels, "onednn_is_slow", lambda is_slow=is_slow: is_slow)
        cache = DynamicCache(config=model.config.get_text_config())
        model(torch.tensor([[1, 5, 6]]), **{CACHE: cache}, use_cache=True)
        logits.append(model(ONE, **{CACHE: cache}).logits[..., :90].float())
    exact = tiny(torch.float32, num_key_value_heads=heads)
    expected = exact(torch.tensor([[1, 5, 6, 7]])).logits[:, -1:, :90]
    errors = [float((one - expected).norm() / expected.norm()) for one in logits]
    assert max(errors) < 0.03  # bfloat16's own rounding: 0.008 to 0.02


# Attention of a single row

SDPA = "_scaled_dot_product_flash_attention_for_cpu"


def sdpa_calls(model, ids, **inputs) -> int:
    """Of a step with `ids` behind a prompt of three positions, in the three layers."""
    cache = DynamicCache(config=model.config.get_text_config())
    model(torch.tensor([[1, 5, 6]]), **{CACHE: cache}, use_cache=True)
    return operations(lambda: model(torch.tensor(ids), **{CACHE: cache}, **inputs))[SDPA]


@torch.no_grad()
def test_a_single_row_attends_without_sdpa(monkeypatch):
    model = tiny(num_key_value_heads=6)
    assert sdpa_calls(model, [[7]]) == 0
    assert sdpa_calls(model, [[7, 8]]) == 3
    assert sdpa_calls(model, [[7]], attention_mask=torch.tensor([[0, 1, 1, 1]])) == 3
    assert sdpa_calls(model.float(), [[7]]) == 3
    monkeypatch.setattr(kernels, "onednn_is_slow", lambda: False)
    assert sdpa_calls(model.bfloat16(), [[7]]) == 3


@torch.no_grad()
def test_keys_that_heads_share_keep_sdpa():
    assert sdpa_calls(tiny(num_key_value_heads=2), [[7]]) == 3


@torch.no_grad()
def test_the_users_choice_of_eager_attention_stays(monkeypatch):
    model = tiny(num_key_value_heads=6)
    monkeypatch.setattr(
        "owl2_hf.modeling.modeling_mplug_owl2_text.single_row_attention", lambda **_: 1 / 0
    )
    model.set_attn_implementation("eager")
    model(ONE)
    model.set_attn_implementation("sdpa")
    with pytest.raises(TypeError):  # the stand-in
        model(ONE)


def test_attention_of_a_single_row_is_sdpas():
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 6, length, 16).bfloat16() for length in (1, 40, 40))
    exact = nn.functional.scaled_dot_product_attention(
        query.double(), key.double(), value.double(), scale=0.3
    ).transpose(1, 2)
    got, weights = kernels.single_row_attention(None, query, key, value, None, scaling=0.3)
    assert weights is None and got.shape == (1, 1, 6, 16) and got.dtype == torch.bfloat16
    assert (got - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize(
    ("has_bfloat16", "has_tiles", "variable", "expected"),
    [
        (True, False, None, True),
        (True, True, None, False),
        (False, False, None, False),
        (False, False, "1", True),
        (True, False, "0", False),
        (True, False, "", True),
    ],
)
def test_the_processor_decides_unless_the_user_does(
    monkeypatch, has_bfloat16, has_tiles, variable, expected
):
    monkeypatch.undo()  # the function itself
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bfloat16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_tiles)
    if variable is None:
        monkeypatch.delenv(kernels.VARIABLE, raising=False)
    else:
        monkeypatch.setenv(kernels.VARIABLE, variable)
    assert kernels.onednn_is_slow.__wrapped__() is expected


def test_a_release_of_pytorch_without_the_question_keeps_onednn(monkeypatch):
    monkeypatch.undo()
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported", raising=False)
    assert kernels.onednn_is_slow.__wrapped__() is False


# int8 weights

PACKED = "_weight_int8pack_mm"


def torchao_config(**kwargs):
    quantization = pytest.importorskip(
        "torchao.quantization", reason="needs torchao: pip install 'owl2_hf[quantization]'"
    )
    return quantization.Int8WeightOnlyConfig(set_inductor_config=False, **kwargs)


def linear(columns=48, dtype=torch.bfloat16, bias=False, config=None):
    """(its layer, torchao's) with the same int8 weight of 33 rows."""
    config = config or torchao_config()
    from torchao.quantization import quantize_

    torch.manual_seed(0)
    pair = [nn.Sequential(nn.Linear(columns, 33, bias=bias, dtype=dtype)).eval() for _ in range(2)]
    pair[1].load_state_dict(pair[0].state_dict())
    for module in pair:
        quantize_(module, config)
    kernels.use_int8_kernel(pair[0])
    assert type(pair[0][0]) is kernels.MplugOwl2Int8Linear
    return pair[0][0], pair[1][0]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (5,), (3, 50)], ids=str)
def test_an_int8_product_is_that_of_rounded_weights(monkeypatch, dtype, bias, shape):
    monkeypatch.setattr(kernels, "INT8_BLOCK", 48 * 7)  # five parts, the last with 5 rows
    ours, torchaos = linear(dtype=dtype, bias=bias)
    x = torch.randn(*shape, 48).to(dtype)
    exact = x.double() @ (ours.weight.qdata.double() * ours.weight.scale.double()).T
    if bias:
        exact = exact + ours.bias.double()
    got = ours(x)
    assert got.dtype == dtype and got.shape == (*shape, 33)
    tolerance = {torch.bfloat16: 1.2e-2, torch.float16: 1.5e-3, torch.float32: 1e-6}[dtype]
    for found in (got, torchaos(x)):
        assert (found - exact).abs().max() < tolerance * exact.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, kernels.MAX_INT8_ROWS])
def test_few_rows_make_no_copy_of_the_weights(rows):
    ours = linear()[0]
    counts = operations(lambda: ours(torch.randn(rows, 48).bfloat16()))
    assert counts[PACKED] == 1 and not counts["mm"]


@torch.no_grad()
def test_many_rows_copy_a_part_at_a_time(monkeypatch):
    monkeypatch.setattr(kernels, "INT8_BLOCK", 48 * 7)
    ours = linear()[0]
    x = torch.randn(kernels.MAX_INT8_ROWS + 1, 48).bfloat16()
    counts = operations(lambda: ours(x))
    assert counts["mm"] == 5 and not counts[PACKED]


def moved(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, eight bytes behind an aligned address."""
    place = 8 // tensor.element_size()
    buffer = torch.empty(tensor.numel() + place, dtype=tensor.dtype)
    return buffer[place:].view(tensor.shape).copy_(tensor)


@torch.no_grad()
def test_neither_rows_nor_weights_need_to_be_aligned():
    """The kernel itself ends the process there."""
    ours, torchaos = linear()
    x = torch.randn(1, 48).bfloat16()
    expected = ours(x)
    rows = moved(x)
    assert operations(lambda: ours(rows))[PACKED] == 1 and torch.equal(ours(rows), expected)
    ours.weight.qdata = moved(ours.weight.qdata)
    assert not operations(lambda: ours(x))[PACKED]
    assert torch.allclose(ours(x), expected, rtol=0.02)
    torchaos.weight.qdata = moved(torchaos.weight.qdata)
    layers = nn.Sequential(torchaos)
    kernels.use_int8_kernel(layers)
    assert operations(lambda: layers(x))[PACKED] == 1 and torch.equal(layers(x), expected)


@torch.no_grad()
def test_unsupported_int8_layers_use_torchao():
    quantization = pytest.importorskip("torchao.quantization")
    dynamic = quantization.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
    for options in (
        {"columns": 40},
        {"config": torchao_config(granularity=quantization.PerGroup(16))},
        {"config": dynamic},
    ):
        ours, torchaos = linear(**options)
        x = torch.randn(2, ours.in_features).bfloat16()
        assert not operations(lambda ours=ours, x=x: ours(x))[PACKED]
        assert torch.equal(ours(x), torchaos(x))


@torch.no_grad()
def test_no_rows_are_no_error():
    assert linear()[0](torch.empty(0, 48).bfloat16()).shape == (0, 33)


def test_gradients_pass_through_int8_layers():
    ours, torchaos = linear()
    grads = []
    for layer in (ours, torchaos):
        x = torch.ones(1, 48, dtype=torch.bfloat16, requires_grad=True)
        layer(x).sum().backward()
        grads.append(x.grad)
    assert grads[0].abs().sum() > 0 and torch.equal(*grads)


@torch.no_grad()
@pytest.mark.parametrize("is_saved", [False, True], ids=["rounded", "saved"])
def test_a_loaded_int8_model_decodes_with_the_kernel(is_saved, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(
        default_dir(), dtype=torch.bfloat16, quantization_config=TorchAoConfig(torchao_config())
    ).eval()
    if is_saved:
        expected = model(ONE).logits
        model.save_pretrained(tmp_path)
        model = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
        assert torch.equal(model(ONE).logits, expected)
    rounded = [m for m in model.modules() if type(m) is kernels.MplugOwl2Int8Linear]
    assert len(rounded) == sum(type(value) is not nn.Parameter for value in model.parameters())
    visual = [
        layer.self_attn.visual_k_proj for layer in model.model.language_model.layers
    ]  # and as many values, which text does not pass
    assert operations(lambda: model(ONE))[PACKED] == len(rounded) - 2 * len(visual) > 0
