"""How much work a step is, in counts that no load of the machine changes: LLaMA's operations and a
stated few more.
"""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, StaticCache

from owl2_hf.modeling import MplugOwl2ForConditionalGeneration
from owl2_hf.modeling.compatibility_mplug_owl2 import CACHE

from ..original import pad
from .test_modeling_mplug_owl2 import IMAGE, RUN, llama_like, pictures, tiny_config

# Masking the logits of reserved ids: two comparisons, their union, the ids themselves, and the
# mask.
RESERVED_IDS = {"arange": 1, "eq": 1, "ge": 1, "bitwise_or": 1, "masked_fill": 1}
# Looking for placeholders that came without images, once a prompt.
PLACEHOLDERS = {"eq": 1, "sum": 1, "stack": 1}


class CountOperations(TorchDispatchMode):
    """Counts what PyTorch dispatches, by the operator's name."""

    def __init__(self):
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def operations(function) -> Counter[str]:
    with CountOperations() as mode:
        function()
    return mode.counts


@pytest.fixture(scope="module", params=[2, 5], ids="{} layers".format)
def models(request):
    torch.manual_seed(0)
    ours = MplugOwl2ForConditionalGeneration(tiny_config(num_hidden_layers=request.param)).eval()
    return ours, llama_like(ours.config.text_config)


def test_a_decoding_step_is_llamas_whatever_the_depth(models):
    counts = []
    for model in models:
        cache = DynamicCache(config=model.config.get_text_config())
        model(torch.tensor([[1, 5, 6]]), **{CACHE: cache}, use_cache=True)
        counts.append(
            operations(
                lambda model=model, cache=cache: model(torch.tensor([[7]]), **{CACHE: cache})
            )
        )
    assert counts[0] - counts[1] == Counter(RESERVED_IDS) and not counts[1] - counts[0]


def test_a_prompt_of_text_is_llamas_whatever_the_depth(models):
    ids = torch.tensor([[1, 5, 6, 7]])
    ours, llamas = (operations(lambda model=model: model(ids, use_cache=False)) for model in models)
    assert ours - llamas == Counter(RESERVED_IDS) + Counter(PLACEHOLDERS) and not llamas - ours


def test_positions_of_pictures_are_looked_up_once_for_all_layers(models):
    model = models[0].model.language_model
    indicators = torch.tensor([[0, 1, 1, 0, 1]])
    embeds = torch.randn(1, 5, 48)
    counts = operations(lambda: model(inputs_embeds=embeds, mm_token_type_ids=indicators))
    # The order of the tokens, and its inverse.
    assert counts["sort"] == 2 and counts["sum"] == counts["_local_scalar_dense"] == 1


def saved_bytes(model, **inputs) -> int:
    """Bytes that a forward keeps for the gradients, weights aside."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model.train()(use_cache=False, **inputs)
    model.eval()
    assert output.last_hidden_state.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


def test_gradients_keep_what_llamas_do_and_the_order_of_the_tokens(models):
    ours, llama = models[0].model.language_model, models[1].model
    indicators = torch.tensor([[0, 1, 1, 0, 1, 0], [0, 0, 1, 1, 1, 0]])
    embeds = torch.randn(2, 6, 48)
    extra = saved_bytes(ours, inputs_embeds=embeds, mm_token_type_ids=indicators) - saved_bytes(
        llama, inputs_embeds=embeds
    )
    assert 0 < extra <= 2 * 8 * indicators.numel()


@torch.no_grad()
def test_compiled_decoding_neither_breaks_nor_compiles_again(models):
    """A static cache, one compilation for the first step, none for the others."""
    model = models[0]
    inputs = pad([[1, 5, *RUN, 7]])
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=32)
    model(**inputs, pixel_values=pictures(1), cache=cache, use_cache=True)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(4):
            position = torch.tensor([inputs["input_ids"].shape[1] + step])
            output = compiled(
                torch.tensor([[8 + step]]),
                cache=cache,
                position_ids=position[None],
                use_cache=True,
            )
    expected = model(
        torch.cat([inputs["input_ids"], torch.tensor([[8, 9, 10, 11]])], dim=1),
        pixel_values=pictures(1),
    ).logits[:, -1:, :IMAGE]
    torch.testing.assert_close(output.logits[..., :IMAGE], expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_graph_for_texts_of_any_length_takes_pictures_after_them(models):
    model = models[0]
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for ids in ([[1, 5, 6]], [[1, 5, 6, 7, 8]]):
        compiled(input_ids=torch.tensor(ids))  # the second call makes the length a variable
    for ids in ([1, 5, *RUN, 7], [1, 5, *RUN, 7, 8]):
        inputs = {**pad([ids]), "pixel_values": pictures(1)}
        inputs["mm_token_type_ids"] = inputs["input_ids"].eq(IMAGE).long()
        torch.testing.assert_close(
            compiled(**inputs).logits, model(**inputs).logits, rtol=1e-4, atol=1e-4
        )
    inputs["mm_token_type_ids"] = inputs["mm_token_type_ids"][:, 1:]
    with pytest.raises(ValueError, match="one indicator for each position"):
        model(**inputs)
