"""How often the host waits for the device, beyond what Llama of the same shape makes it wait."""

import copy
from collections import Counter

import pytest
import torch
from transformers import DynamicCache, StaticCache

from owl2_hf.modeling import MplugOwl2ForConditionalGeneration, MplugOwl2ForSequenceClassification
from owl2_hf.modeling.compatibility_mplug_owl2 import CACHE
from owl2_hf.modeling.configuration_mplug_owl2 import MplugOwl2HReducerConfig
from owl2_hf.modeling.modeling_mplug_owl2_h_reducer import MplugOwl2HReducer

from ..original import pad
from ..syncs import host_syncs
from .test_modeling_mplug_owl2 import IMAGE, RUN, llama_like, pictures, tiny_config

PROMPTS = {
    "text": [[1, 5, 6, 7]],
    "padded texts": [[1, 5, 6, 7], [1, 5]],
    "an image": [[1, 5, *RUN, 7]],
    "two images": [[1, 5, *RUN, 7, *RUN]],
    "a padded batch with images": [[1, 5, *RUN, 7, *RUN], [1, *RUN], [1, 8, 9]],
}


@pytest.fixture(scope="module", params=[2, 4], ids="{} layers".format)
def models(request):
    torch.manual_seed(0)
    ours = MplugOwl2ForConditionalGeneration(tiny_config(num_hidden_layers=request.param)).eval()
    return ours, llama_like(ours.config.text_config)


def inputs_of(rows, has_indicators: bool = False) -> dict[str, torch.Tensor]:
    """Padded prompts with the images that their ids name."""
    inputs = pad(rows)
    is_image = inputs["input_ids"].eq(IMAGE)
    if is_image.any():
        inputs["pixel_values"] = pictures(int(is_image.sum()) // len(RUN))
    return {**inputs, "mm_token_type_ids": is_image.long()} if has_indicators else inputs


def for_llama(inputs) -> dict[str, torch.Tensor]:
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


def own(ours: Counter[str], llamas: Counter[str]) -> int:
    """Reads beyond Llama's, for instance of a mask without padding."""
    assert not llamas - ours
    return (ours - llamas).total()


@pytest.mark.parametrize("has_indicators", [False, True], ids=["ids", "indicators"])
@pytest.mark.parametrize("rows", PROMPTS.values(), ids=PROMPTS)
@torch.no_grad()
def test_a_prompt_waits_once(models, rows, has_indicators):
    ours, llama = models
    inputs = inputs_of(rows, has_indicators)
    found = host_syncs(lambda: ours(**inputs, use_cache=True))
    assert own(found, host_syncs(lambda: llama(**for_llama(inputs), use_cache=True))) == 1


@torch.no_grad()
def test_the_language_model_alone_waits_once_or_never(models):
    text_model = models[0].model.language_model
    inputs = {
        "inputs_embeds": torch.randn(2, 5, 48),
        "mm_token_type_ids": torch.tensor([[0, 1, 1, 0, 1], [0, 0, 0, 1, 1]]),
    }
    assert host_syncs(lambda: text_model(**inputs)).total() == 1
    assert not host_syncs(lambda: text_model(**inputs, num_visual_tokens=5))
    assert torch.equal(
        text_model(**inputs).last_hidden_state,
        text_model(**inputs, num_visual_tokens=5).last_hidden_state,
    )


@pytest.mark.parametrize("has_indicators", [False, True], ids=["ids", "indicators"])
@pytest.mark.parametrize("rows", PROMPTS.values(), ids=PROMPTS)
def test_a_training_step_waits_once(models, rows, has_indicators):
    ours, llama = models
    inputs = inputs_of(rows, has_indicators)
    counts = []
    for model, own_inputs in ((ours, inputs), (llama, for_llama(inputs))):
        model.train()
        labels = inputs["input_ids"].masked_fill(inputs["input_ids"].eq(IMAGE), -100)
        counts.append(
            host_syncs(
                lambda model=model, own_inputs=own_inputs, labels=labels: model(
                    **own_inputs, labels=labels
                ).loss.backward()
            )
        )
        model.eval()
        model.zero_grad()
    assert own(*counts) == 1


def test_num_items_in_batch_is_not_copied_to_the_device(models):
    inputs = inputs_of(PROMPTS["text"])
    found = host_syncs(
        lambda: models[0](**inputs, labels=inputs["input_ids"], num_items_in_batch=3)
    )
    assert not found["lift_fresh"]


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
@torch.no_grad()
def test_a_decoding_step_never_waits(models, kind):
    ours, llama = models
    inputs = inputs_of(PROMPTS["an image"])
    counts = []
    for model, own_inputs in ((ours, inputs), (llama, for_llama(inputs))):
        config = model.config.get_text_config()
        cache = kind(config=config, **({"max_cache_len": 32} if kind is StaticCache else {}))
        model(**own_inputs, **{CACHE: cache}, use_cache=True)
        step = {"input_ids": torch.tensor([[7]]), CACHE: cache, "use_cache": True}
        counts.append(host_syncs(lambda model=model, step=step: model(**step)))
    assert own(*counts) == 0


@pytest.mark.parametrize("settings", [{}, {"cache_implementation": "static"}], ids=str)
@pytest.mark.parametrize("name", ["text", "a padded batch with images"])
def test_generation_waits_once_more_than_llamas(models, settings, name):
    ours, llama = models
    inputs = inputs_of(PROMPTS[name], has_indicators=True)
    for num_tokens in (1, 5):
        options = {
            "max_new_tokens": num_tokens,
            "min_new_tokens": num_tokens,
            "do_sample": False,
            "disable_compile": True,
            **settings,
        }
        found = host_syncs(lambda options=options: ours.generate(**inputs, **options))
        theirs = host_syncs(lambda options=options: llama.generate(**for_llama(inputs), **options))
        assert own(found, theirs) == 1


@pytest.mark.parametrize("count", [1, 3])
def test_encoding_images_never_waits(models, count):
    model = copy.deepcopy(models[0]).train()

    def step():
        tokens = torch.stack(list(model.get_image_features(pictures(count)).pooler_output))
        tokens.sum().backward()

    assert not host_syncs(step)


def test_the_h_reducer_never_waits():
    config = MplugOwl2HReducerConfig(hidden_size=16, projection_dim=24, kernel_width=2, grid_size=4)
    reducer = MplugOwl2HReducer(config).train()
    features = torch.randn(2, 17, 16, requires_grad=True)
    assert not host_syncs(lambda: reducer(features).last_hidden_state.sum().backward())


@pytest.mark.parametrize("settings", [{}, {"deepmlp_hidden_dims": [48, 24]}], ids=str)
def test_a_classifier_waits_once_for_each_reading_of_the_prompt(models, settings):
    config = tiny_config(num_hidden_layers=2)
    config.num_labels = 1
    for name, value in settings.items():
        setattr(config, name, value)
    model = MplugOwl2ForSequenceClassification(config).train()
    inputs = inputs_of(PROMPTS["a padded batch with images"])
    labels = torch.randn(3)
    found = host_syncs(lambda: model(**inputs, labels=labels).loss.backward())
    llamas = host_syncs(lambda: models[1](**for_llama(inputs))).total()
    # Q-Scorer reads the prompt, and then reads it with the first token of its answer.
    assert found.total() == (2 if settings else 1) * (1 + llamas), found
