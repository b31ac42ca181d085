"""One file holds the differences between releases of transformers; unknown arguments are never
swallowed.
"""

import copy
import inspect
import logging
import re
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import ContinuousBatchingConfig
from transformers.cache_utils import DynamicCache, StaticCache
from transformers.generation import GenerationMixin

import owl2_hf
from owl2_hf.default import default_dir
from owl2_hf.modeling import compatibility_mplug_owl2 as compatibility
from owl2_hf.modeling.compatibility_mplug_owl2 import CACHE

PACKAGE = Path(owl2_hf.__file__).parent
PROMPT = "USER: <|image|>What is this? ASSISTANT:"


@pytest.fixture(scope="module")
def loaded():
    return owl2_hf.load_default(dtype="float32")


@pytest.fixture(scope="module")
def model(loaded):
    return loaded[0]


def picture():
    return Image.open(owl2_hf.default_pictures()["emoji-banana"])


@pytest.fixture(scope="module")
def inputs(loaded):
    return loaded[1](text=PROMPT, images=picture(), return_tensors="pt")


@pytest.fixture(scope="module")
def batch(loaded):
    """Two prompts of different lengths: without padding `generate` hands over no mask."""
    texts = [PROMPT, "USER: <|image|>What is this, do you know? ASSISTANT:"]
    return loaded[1](text=texts, images=[picture(), picture()], padding=True, return_tensors="pt")


def test_no_other_file_asks_for_a_release():
    asks = re.compile(
        r"(transformers|torch|peft|hub)\.__version__|packaging|is_\w+_version|parse_version"
    )
    allowed = {
        PACKAGE / "modeling" / "compatibility_mplug_owl2.py",
        PACKAGE / "checks" / "versions.py",
    }
    files = [path for path in PACKAGE.rglob("*.py") if path not in allowed]
    assert [path.name for path in files if asks.search(path.read_text())] == []


def test_numbers_of_releases_are_not_compared():
    source = inspect.getsource(compatibility).replace("transformers.__version__}", "")
    assert "__version__" not in source


# The cache under both of its names


@torch.no_grad()
@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated for `Mplug:FutureWarning")
@pytest.mark.filterwarnings("error::FutureWarning")
def test_the_cache_is_taken_under_both_names(model, inputs, name):
    start = model(**inputs, use_cache=True)
    token = start.logits[:, -1:].argmax(-1)
    step = model(token, **{name: start.cache}).logits
    whole = model(
        torch.cat([inputs["input_ids"], token], dim=1),
        pixel_values=inputs["pixel_values"],
    ).logits[:, -1:]
    torch.testing.assert_close(step, whole, rtol=1e-4, atol=1e-4)
    answer = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert model.generate(
        **inputs, **{name: DynamicCache()}, max_new_tokens=3, do_sample=False
    ).equal(answer)


def test_two_caches_are_refused(model, inputs):
    with pytest.raises(ValueError, match="cache or past_key_values, not both"):
        model(**inputs, cache=DynamicCache(), past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="cache or past_key_values, not both"):
        model.generate(**inputs, cache=DynamicCache(), past_key_values=DynamicCache())


@pytest.mark.skipif(CACHE != "cache", reason="the old name is this release's own")
def test_the_old_name_is_deprecated_as_in_transformers(model, inputs):
    message = r"`MplugOwl2ForConditionalGeneration\.forward`. Use `cache` instead"
    with pytest.warns(FutureWarning, match=message) as record:
        model(**inputs, past_key_values=DynamicCache())
    assert len(record) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**inputs, cache=DynamicCache())


def test_outputs_have_the_images_and_the_cache(model, inputs):
    output = model(**inputs, use_cache=True)
    assert output.cache.get_seq_length() == inputs["input_ids"].shape[1]
    tokens = torch.cat(list(output.image_outputs.pooler_output))
    assert torch.equal(output.image_hidden_states, tokens)
    assert model(inputs["input_ids"][:, :1]).image_hidden_states is None


# What the model does not know


def rename(monkeypatch, old, new):
    """Let `generate` call an argument of the model by another name, as a next release of
    transformers may.
    """
    original = GenerationMixin.prepare_inputs_for_generation

    def renaming(self, *args, **kwargs):
        made = original(self, *args, **kwargs)
        return {new if name == old else name: value for name, value in made.items()}

    monkeypatch.setattr(GenerationMixin, "prepare_inputs_for_generation", renaming)


@pytest.mark.parametrize(
    ("old", "kind"),
    [(CACHE, "cache"), ("attention_mask", "tensor"), ("position_ids", "tensor")],
)
def test_an_argument_that_transformers_renames_is_an_error(model, batch, monkeypatch, old, kind):
    rename(monkeypatch, old, "renamed")
    message = rf"got the unknown argument 'renamed', a {kind}; .* transformers [\d.]+\w* did\. .*5\.17\.0 to"
    with pytest.raises(ValueError, match=message):
        model.generate(**batch, max_new_tokens=3, do_sample=False)


def test_a_cache_that_generate_loses_is_an_error(model, inputs, monkeypatch):
    original = GenerationMixin.prepare_inputs_for_generation

    def losing(self, *args, **kwargs):
        made = original(self, *args, **kwargs)
        made.pop(CACHE, None)
        return made

    monkeypatch.setattr(GenerationMixin, "prepare_inputs_for_generation", losing)
    with pytest.raises(ValueError, match=r"decoding step without a (cache|past_key_values)"):
        model.generate(**inputs, max_new_tokens=3, do_sample=False)


@torch.no_grad()
def test_a_mask_that_covers_too_much_is_an_error(model, inputs):
    length = inputs["input_ids"].shape[1]
    mask = torch.ones(1, length + 1, dtype=torch.long)
    with pytest.raises(ValueError, match=f"covers {length + 1} positions"):
        model(**{**inputs, "attention_mask": mask})
    # A static cache knows its length on the device alone, and its masks may cover all of it.
    cache = StaticCache(config=model.config, max_cache_len=length + 8)
    model(**{**inputs, "attention_mask": mask[:, :length]}, cache=cache)
    step = model(torch.tensor([[7]]), attention_mask=mask, cache=cache)
    assert step.logits.shape[:2] == (1, 1)


@torch.no_grad()
def test_other_unknown_arguments_are_ignored_with_one_warning(model, inputs, caplog):
    logging.getLogger("transformers").propagate = True
    expected = model(**inputs).logits
    with caplog.at_level("WARNING"):
        for _ in range(2):
            assert model(**inputs, colour="blue", nothing=None).logits.equal(expected)
    assert [
        record.getMessage() for record in caplog.records if "colour" in record.getMessage()
    ] == ["MplugOwl2ForConditionalGeneration ignores the unknown argument 'colour'."]
    with pytest.raises(ValueError, match="got the unknown argument 'pixel_value', a tensor"):
        model(inputs["input_ids"], pixel_value=inputs["pixel_values"])


@torch.no_grad()
def test_arguments_that_transformers_passes_are_accepted(model, inputs):
    lengths = torch.tensor([0, inputs["input_ids"].shape[1]], dtype=torch.int32)
    flash = {
        "cu_seq_lens_q": lengths,
        "cu_seq_lens_k": lengths,
        "max_length_q": 9,
        "max_length_k": 9,
    }
    assert model(**inputs, **flash, output_hidden_states=True).hidden_states is not None


def test_unknown_options_of_the_processor_are_warnings(loaded, caplog):
    logging.getLogger("transformers").propagate = True
    with caplog.at_level("WARNING"):
        processor = owl2_hf.MplugOwl2Processor.from_pretrained(
            default_dir(), image_aspect_ratioo="pad"
        )
        processor(text="a", text_kwargs={"paddding": True})
    messages = " ".join(record.getMessage() for record in caplog.records)
    assert "ignores the unknown option 'image_aspect_ratioo'" in messages
    assert "ignores the unknown option 'paddding' in text_kwargs" in messages
    with pytest.raises(TypeError, match="unexpected keyword argument 'atn_implementation'"):
        owl2_hf.load_default(atn_implementation="eager")


def test_continuous_batching_gives_what_generate_gives(loaded):
    model, processor = loaded
    texts = ("USER: What is this? ASSISTANT:", "USER: Is it a banana? ASSISTANT:")
    prompts = [processor.tokenizer(text)["input_ids"] for text in texts]
    settings = {"max_new_tokens": 6, "do_sample": False}
    config = copy.deepcopy(model.generation_config)
    config.update(**settings)
    memory = ContinuousBatchingConfig(num_blocks=32, max_batch_tokens=64)
    batch = model.generate_batch(
        inputs=prompts, generation_config=config, continuous_batching_config=memory
    )
    answers = {tuple(answer.prompt_ids): answer.generated_tokens for answer in batch.values()}
    for prompt in prompts:
        expected = model.generate(torch.tensor([prompt]), **settings)[0, len(prompt) :].tolist()
        assert answers[tuple(prompt)] == expected


# Bounds


def test_tested_versions_agree_in_code_packaging_and_docs():
    root = Path(__file__).parents[2]
    oldest = re.search(r'"transformers>=([\d.]+)', (root / "pyproject.toml").read_text())[1]
    assert compatibility.TESTED[0] == oldest + ".0"
    newest = ".".join(compatibility.TESTED[1].split(".")[:2])
    for page in ("README.md", "docs/install.md"):
        text = (root / page).read_text()
        assert f"transformers {oldest} to {newest}" in text, page
