"""A compiled prompt computes each token once, and gives eager's numbers wherever the images stand."""

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from owl2_hf.modeling import MplugOwl2ForConditionalGeneration
from owl2_hf.modeling.modeling_mplug_owl2_text import ModalityRouting

from ..original import pad
from .test_modeling_mplug_owl2 import IMAGE, RUN, llama_like, pictures, tiny_config


class Graphs:
    """A backend that keeps the compiled graphs, runs them as they are, and counts operations."""

    def __init__(self):
        self.graphs: list[torch.fx.GraphModule] = []
        self.flops = 0

    def __call__(self, graph, example_inputs):
        self.graphs.append(graph)

        def run(*args):
            with FlopCounterMode(display=False) as counter:
                output = graph.forward(*args)
            self.flops = counter.get_total_flops()
            return output

        return run


def flops(function) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.fixture(scope="module")
def model() -> MplugOwl2ForConditionalGeneration:
    torch.manual_seed(1)
    model = MplugOwl2ForConditionalGeneration(tiny_config(num_hidden_layers=2)).eval()
    return model.requires_grad_(False)  # the counter of operations would follow the gradients


@pytest.fixture(autouse=True)
def no_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def prompts(rows: list[list[int]], side: str = "left") -> dict[str, torch.Tensor]:
    """Prompts with as many images as their ids name."""
    inputs = pad(rows, side=side)
    num_images = int(inputs["input_ids"].eq(IMAGE).sum()) // len(RUN)
    return {**inputs, "pixel_values": pictures(num_images)} if num_images else inputs


def agrees(model, compiled, inputs) -> None:
    mask = inputs["attention_mask"].bool()
    found, expected = (one(**inputs).logits[mask] for one in (compiled, model))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_mixed_prompt_costs_what_llamas_does_eager_and_compiled(model):
    ours, llama = model.model.language_model, llama_like(model.config.text_config).model
    indicators = torch.tensor([[0, 1, 1, 0, 1, 0], [0, 0, 1, 1, 1, 0]])
    embeds = torch.randn(2, 6, 48)
    inputs = {"inputs_embeds": embeds, "mm_token_type_ids": indicators, "use_cache": False}
    expected = flops(lambda: llama(inputs_embeds=embeds, use_cache=False))
    assert flops(lambda: ours(**inputs)) == expected
    graphs = Graphs()
    compiled = torch.compile(ours, backend=graphs, fullgraph=True)
    found = compiled(**inputs, num_visual_tokens=6).last_hidden_state
    assert graphs.flops == expected
    torch.testing.assert_close(found, ours(**inputs).last_hidden_state, rtol=1e-5, atol=1e-5)
    # Without the count both branches compute every token.
    found = compiled(**inputs).last_hidden_state
    assert graphs.flops > expected
    torch.testing.assert_close(found, ours(**inputs).last_hidden_state, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_whole_model_compiled_costs_what_it_does_eager(model):
    inputs = prompts([[1, 5, *RUN, 7], [1, *RUN, 9, *RUN]])
    graphs = Graphs()
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    agrees(model, compiled, inputs)
    assert graphs.flops == flops(lambda: model(**inputs))


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_images_at_other_places_need_no_other_graph(model, side):
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (
            [[1, 5, *RUN, 7, 8, 9, *RUN], [1, *RUN, 8]],
            [[1, *RUN, 5, 7, 8, 9, *RUN], [1, 8, *RUN]],
            [[6, 7, 8, *RUN], [1, *RUN, *RUN, 4, 2, 3, 6]],
            [[*RUN, *RUN, *RUN], [1, 8]],
        ):
            agrees(model, compiled, prompts(rows, side))


@torch.no_grad()
def test_another_number_of_images_needs_one_more_graph_at_most(model):
    graphs = Graphs()
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    for count in (2, 3, 4, 6):
        row = [1, *(token for number in range(count) for token in (*RUN, 5 + number)), 2]
        agrees(model, compiled, prompts([row]))
    assert len(graphs.graphs) <= 2
    for length in (1, 3, 4):  # of the text behind the images
        agrees(model, compiled, prompts([[1, *RUN, *RUN, *range(5, 5 + length)]]))
    assert len(graphs.graphs) <= 3


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@torch.no_grad()
def test_a_compiled_prompt_refuses_counts_that_disagree(model, backend):
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    inputs = prompts([[1, 5, *RUN, 7]])
    agrees(model, compiled, inputs)
    inputs["input_ids"][0, 3] = 8
    with pytest.raises(RuntimeError, match="number of visual positions differs"):
        compiled(**inputs)


@pytest.mark.parametrize("with_images", [True, False])
def test_a_compiled_training_step_has_eagers_gradients(model, with_images):
    model = copy.deepcopy(model).train().requires_grad_(True)
    inputs = prompts([[1, 5, *RUN, 7, 8], [1, 4, 3]] if with_images else [[1, 5, 6], [4, 3]])
    gradients = []
    for step in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        step(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradients.append({name: one.grad for name, one in model.named_parameters()})
        model.zero_grad()
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-4, atol=1e-5, msg=name)


@torch.no_grad()
def test_nothing_in_the_graph_is_read_by_the_host(model):
    graphs = Graphs()
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    compiled(**prompts([[1, 5, *RUN, 7], [1, 4, 3]]))
    (graph,) = graphs.graphs
    called = {str(node.target) for node in graph.graph.nodes if node.op.startswith("call")}
    assert not called & {"item", "tolist", "nonzero", "masked_select", "cpu"}, called


@torch.no_grad()
def test_without_a_count_a_graph_computes_both_branches_and_selects(model, monkeypatch):
    text_model = model.model.language_model
    inputs = {
        "inputs_embeds": torch.randn(2, 5, 48),
        "mm_token_type_ids": torch.tensor([[0, 1, 1, 0, 1], [0, 0, 0, 1, 1]]),
    }
    expected = text_model(**inputs).last_hidden_state
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert ModalityRouting.from_indicators(inputs["mm_token_type_ids"], False).order is None
    torch.testing.assert_close(
        text_model(**inputs).last_hidden_state, expected, rtol=1e-5, atol=1e-5
    )
