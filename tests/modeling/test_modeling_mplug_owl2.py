"""The model by itself: degenerate cases, indicators, batches, reserved ids, initialisation,
generation.
"""

import copy
import itertools

import pytest
import torch
from torch import nn
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.models.llama import modeling_llama

from owl2_hf.modeling import MplugOwl2Config, MplugOwl2ForConditionalGeneration, MplugOwl2TextModel
from owl2_hf.modeling.compatibility_mplug_owl2 import CACHE
from owl2_hf.modeling.modeling_mplug_owl2 import RESERVED_LOGIT
from owl2_hf.modeling.modeling_mplug_owl2_abstractor import (
    image_position_table,
    query_position_table,
)

from ..original import pad

IMAGE = 90  # placeholder id; 91 to 95 pad the table


def tiny_config(**text_overrides) -> MplugOwl2Config:
    """Another odd size on every axis, so that no coincidence of shapes hides a mistake."""
    text = {
        "vocab_size": 96,
        "hidden_size": 48,
        "intermediate_size": 88,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "initializer_range": 0.2,
        **text_overrides,
    }
    return MplugOwl2Config(
        vision_config={
            "hidden_size": 40,
            "intermediate_size": 56,
            "num_hidden_layers": 2,
            "num_attention_heads": 5,
            "image_size": 21,
            "patch_size": 7,
            "initializer_range": 0.2,
        },
        abstractor_config={
            "hidden_size": 40,
            "intermediate_size": 72,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_learnable_queries": 4,
            "initializer_range": 0.2,
        },
        text_config=text,
        image_token_id=IMAGE,
        output_vocab_size=90,
    )


RUN = [IMAGE] * 5  # one image: 4 queries and the end-of-image vector


@pytest.fixture(scope="module")
def model() -> MplugOwl2ForConditionalGeneration:
    torch.manual_seed(1)
    return MplugOwl2ForConditionalGeneration(tiny_config()).eval()


def pictures(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 3, 21, 21, generator=torch.Generator().manual_seed(seed))


def llama_like(text_config) -> LlamaForCausalLM:
    fields = {key: value for key, value in text_config.to_dict().items() if key != "model_type"}
    return LlamaForCausalLM(LlamaConfig(**fields)).eval()


# Degenerate cases


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_equal_text_and_visual_weights_give_llamas_results(model, attn_implementation):
    model = copy.deepcopy(model)
    text_model = model.model.language_model
    state_dict = text_model.state_dict()
    for key in state_dict:
        if "visual_" in key:
            state_dict[key].copy_(state_dict[key.replace("visual_", "")])
    llama = llama_like(model.config.text_config)
    result = llama.model.load_state_dict(state_dict, strict=False)
    assert result.missing_keys == []
    assert all("visual_" in key for key in result.unexpected_keys)
    text_model.set_attn_implementation(attn_implementation)
    llama.set_attn_implementation(attn_implementation)
    embeds = torch.randn(2, 13, 48)
    indicators = torch.randint(0, 2, (2, 13))
    ours = text_model(inputs_embeds=embeds, mm_token_type_ids=indicators).last_hidden_state
    torch.testing.assert_close(
        ours, llama.model(inputs_embeds=embeds).last_hidden_state, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("training", [False, True])
@torch.no_grad()
def test_without_modality_specific_parts_it_is_llama(attn_implementation, training):
    config = tiny_config(modality_specific_projections=[], modality_specific_norms=False)
    assert (
        not config.text_config.has_modality_adaptive_module
        and tiny_config().text_config.has_modality_adaptive_module
    )
    model = MplugOwl2ForConditionalGeneration(config).train(training)
    llama = llama_like(config.text_config).train(training)
    llama.model.load_state_dict(model.model.language_model.state_dict())
    llama.lm_head.load_state_dict(model.lm_head.state_dict())
    model.set_attn_implementation(attn_implementation)
    llama.set_attn_implementation(attn_implementation)
    inputs = pad([[1, 5, *RUN, 7], [1, 9, 8]])
    image = model.get_image_features(pictures(1)).pooler_output[0]
    embeds = llama.get_input_embeddings()(inputs["input_ids"])
    embeds[inputs["input_ids"].eq(IMAGE)] = image
    mask = inputs["attention_mask"].bool()
    ours = model(**inputs, pixel_values=pictures(1)).logits[..., :IMAGE]
    theirs = llama(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).logits[
        ..., :IMAGE
    ]
    assert torch.equal(ours[mask], theirs[mask])


def test_a_model_without_the_module_is_saved_trained_and_loaded_as_such(tmp_path):
    model = MplugOwl2ForConditionalGeneration(
        tiny_config(modality_specific_projections=[], modality_specific_norms=False)
    )
    assert not any(
        "visual_k" in rule or "visual_v_" in rule
        for rule in model.config.text_config.base_model_tp_plan
    )
    inputs = {**pad([[1, 5, *RUN, 7]]), "pixel_values": pictures(1)}
    model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.save_pretrained(tmp_path)
    again = MplugOwl2ForConditionalGeneration.from_pretrained(tmp_path)
    assert again.config.text_config.modality_specific_projections == []
    assert torch.equal(again(**inputs).logits, model.eval()(**inputs).logits)


@torch.no_grad()
def test_norms_alone_may_be_modality_specific():
    model = MplugOwl2ForConditionalGeneration(tiny_config(modality_specific_projections=[])).eval()
    assert model.config.text_config.has_modality_adaptive_module
    inputs = {**pad([[1, 5, *RUN, 7]]), "pixel_values": pictures(1)}
    before = model(**inputs).logits
    model.model.language_model.layers[0].visual_input_layernorm.weight.mul_(2)
    assert not torch.allclose(model(**inputs).logits[:, -1], before[:, -1])


@torch.no_grad()
def test_a_llama_state_dict_is_a_subset_of_ours(model):
    llama_keys = set(llama_like(model.config.text_config).model.state_dict())
    assert llama_keys < set(model.model.language_model.state_dict())


@pytest.mark.parametrize(
    ("indicator", "ignored"), [(0, True), (1, False)], ids=["all text", "all image"]
)
@torch.no_grad()
def test_one_modality_ignores_the_branch_of_the_other(model, indicator, ignored):
    text_model = copy.deepcopy(model.model.language_model)
    embeds = torch.randn(2, 7, 48)
    indicators = torch.full((2, 7), indicator)
    before = text_model(inputs_embeds=embeds, mm_token_type_ids=indicators).last_hidden_state
    branched = ("k_proj", "v_proj", "input_layernorm", "post_attention_layernorm")
    for name, parameter in text_model.named_parameters():
        module = name.split(".")[-2]
        if module.removeprefix("visual_") in branched and module.startswith("visual_") == ignored:
            parameter.fill_(float("nan"))
    after = text_model(inputs_embeds=embeds, mm_token_type_ids=indicators).last_hidden_state
    assert torch.equal(before, after)


@torch.no_grad()
def test_compiled_and_eager_routing_agree(model, monkeypatch):
    inputs = {**pad([[1, 5, *RUN, 7], [1, 9, 8]]), "pixel_values": pictures(1)}
    eager = model(**inputs).logits
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    mask = inputs["attention_mask"].bool()
    torch.testing.assert_close(model(**inputs).logits[mask], eager[mask], rtol=1e-5, atol=1e-5)


def test_llama_in_the_same_process_stays_untouched():
    assert (
        modeling_llama.LlamaAttention.forward.__module__
        == "transformers.models.llama.modeling_llama"
    )
    layer = LlamaForCausalLM(
        LlamaConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1)
    ).model.layers[0]
    assert not any("visual" in name for name, _ in layer.named_parameters())


# Structure that others rely on


def test_projections_are_plain_linear_leaves(model):
    for name, module in model.named_modules():
        if name.endswith(("_proj", "fc1", "fc2", "visual_fc")):
            assert type(module) is nn.Linear, name
        if type(module).__name__.endswith("RMSNorm"):
            assert len(list(module.parameters())) == 1, name


def test_prefixes_of_the_components(model):
    prefixes = {
        name.split(".")[0] + "." + name.split(".")[1] for name, _ in model.named_parameters()
    }
    assert prefixes == {
        "model.vision_tower",
        "model.visual_abstractor",
        "model.language_model",
        "lm_head.weight",
    }
    assert model.get_decoder() is model.model.language_model


# Indicators


@torch.no_grad()
def test_indicators_are_read_off_the_ids_when_absent(model):
    inputs = {**pad([[1, 5, *RUN, 7, 8]]), "pixel_values": pictures(1)}
    indicators = (inputs["input_ids"] == IMAGE).long()
    torch.testing.assert_close(
        model(**inputs).logits, model(**inputs, mm_token_type_ids=indicators).logits
    )
    assert not torch.allclose(
        model.model.language_model(inputs["input_ids"]).last_hidden_state,
        model.model.language_model(
            inputs["input_ids"], mm_token_type_ids=indicators
        ).last_hidden_state,
    )


@torch.no_grad()
def test_embeddings_with_pictures_need_indicators(model):
    inputs = pad([[1, 5, *RUN, 7]])
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    with pytest.raises(ValueError, match="mm_token_type_ids"):
        model(inputs_embeds=embeds, pixel_values=pictures(1))
    indicators = (inputs["input_ids"] == IMAGE).long()
    torch.testing.assert_close(
        model(inputs_embeds=embeds, pixel_values=pictures(1), mm_token_type_ids=indicators).logits,
        model(**inputs, pixel_values=pictures(1)).logits,
    )


@torch.no_grad()
def test_one_row_of_indicators_holds_for_the_whole_batch(model):
    ids = torch.tensor([[1, 5, *RUN, 7], [1, 9, *RUN, 8]])
    indicators = ids.eq(IMAGE).long()
    expected = model(ids, pixel_values=pictures(2), mm_token_type_ids=indicators).logits
    assert torch.equal(
        model(ids, pixel_values=pictures(2), mm_token_type_ids=indicators[:1]).logits, expected
    )


@torch.no_grad()
def test_indicators_of_another_length_are_refused(model):
    with pytest.raises(ValueError, match=r"expected \(1, 3\), got \(1, 2\)"):
        model(torch.tensor([[1, 5, 6]]), mm_token_type_ids=torch.zeros(1, 2, dtype=torch.long))


# Images and placeholders


@torch.no_grad()
def test_counts_that_disagree_are_named(model):
    with pytest.raises(
        ValueError, match=r"5 features \(1 images of 5\) for 10 placeholder positions"
    ):
        model(torch.tensor([[1, *RUN, *RUN]]), pixel_values=pictures(1))
    with pytest.raises(ValueError, match=r"has 5 image placeholders .* but got no images"):
        model.generate(torch.tensor([[1, *RUN]]))
    with pytest.raises(
        ValueError, match=r"pixel_values must be \(images, 3, 21, 21\), got \(1, 3, 28, 28\)"
    ):
        model(torch.tensor([[1, *RUN]]), pixel_values=torch.zeros(1, 3, 28, 28))
    with pytest.raises(ValueError, match="not both"):
        features = model.get_image_features(pictures(1))
        model(
            torch.tensor([[1, *RUN]]),
            pixel_values=pictures(1),
            mm_encoder_outputs={"image": features},
        )
    features.pooler_output = [tokens[:, :32] for tokens in features.pooler_output]
    with pytest.raises(ValueError, match="width 32 do not fit a language model of width 48"):
        model(torch.tensor([[1, *RUN]]), mm_encoder_outputs={"image": features})


@torch.no_grad()
def test_pictures_encoded_beforehand_give_the_same(model):
    inputs = pad([[1, *RUN, 7, *RUN, 8]])
    features = model.get_image_features(pictures(2))
    torch.testing.assert_close(
        model(**inputs, mm_encoder_outputs={"image": features}).logits,
        model(**inputs, pixel_values=pictures(2)).logits,
    )


# Batches

ROWS = [
    [1, 5, *RUN, 7, 8, 9],
    [1, 20, 21],
    [1, *RUN, 11, *RUN, 12, *RUN, 13],
    [1, 30, 31, 32, 33, 34, *RUN],
]
PICTURES_OF_ROW = [1, 0, 3, 1]


def split_pictures():
    bounds = [0, *itertools.accumulate(PICTURES_OF_ROW)]
    return [pictures(5)[a:b] for a, b in itertools.pairwise(bounds)]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_a_batch_gives_each_row_its_own_logits(model, side, attn_implementation):
    model.set_attn_implementation(attn_implementation)
    batch = pad(ROWS, side=side)
    together = model(**batch, pixel_values=pictures(5)).logits
    for row, own_pictures, logits, mask in zip(
        ROWS, split_pictures(), together, batch["attention_mask"].bool(), strict=True
    ):
        alone = model(
            torch.tensor([row]), pixel_values=own_pictures if len(own_pictures) else None
        ).logits[0]
        torch.testing.assert_close(logits[mask], alone, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False}],
    ids=str,
)
def test_a_batch_generates_what_each_row_generates(model, attn_implementation, settings):
    model.set_attn_implementation(attn_implementation)
    settings = {"max_new_tokens": 6, "do_sample": False, **settings}
    batch = pad(ROWS)
    together = model.generate(**batch, pixel_values=pictures(5), **settings)[
        :, batch["input_ids"].shape[1] :
    ]
    for row, own_pictures, new_ids in zip(ROWS, split_pictures(), together, strict=True):
        inputs = pad([row])
        if len(own_pictures):
            inputs["pixel_values"] = own_pictures
        alone = model.generate(**inputs, **settings)[0, len(row) :]
        assert new_ids[: len(alone)].tolist() == alone.tolist()


@pytest.mark.parametrize("explicit_indicators", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {"prompt_lookup_num_tokens": 3},
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"prefill_chunk_size": 4},
    ],
    ids=str,
)
def test_ways_to_decode_agree_with_greedy_search(model, settings, explicit_indicators):
    inputs = {**pad([[1, 5, 6, *RUN, 5, 6, 7, *RUN, 5, 6]]), "pixel_values": pictures(2)}
    if explicit_indicators:
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).long()
    expected = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert (
        model.generate(**inputs, max_new_tokens=8, do_sample=False, **settings).tolist()
        == expected.tolist()
    )


def test_assisted_decoding_agrees_with_greedy_search(model):
    torch.manual_seed(2)
    assistant = MplugOwl2ForConditionalGeneration(tiny_config(num_hidden_layers=1)).eval()
    inputs = {**pad([[1, 5, *RUN, 7]]), "pixel_values": pictures(1)}
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).long()
    expected = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assisted = model.generate(
        **inputs, max_new_tokens=8, do_sample=False, assistant_model=assistant
    )
    assert assisted.tolist() == expected.tolist()


def test_a_conversation_continues_from_its_cache_with_another_picture(model):
    first = {**pad([[1, 5, *RUN, 7]]), "pixel_values": pictures(2)[:1]}
    start = model.generate(**first, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    ids = torch.cat([start.sequences, torch.tensor([[9, 11, *RUN, 10]])], dim=1)
    settings = {
        "max_new_tokens": 4,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    whole = model.generate(input_ids=ids, pixel_values=pictures(2), **settings)
    indicators = (ids == IMAGE).long()
    continued = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=start[CACHE],
        pixel_values=pictures(2)[1:],
        mm_token_type_ids=indicators,
        **settings,
    )
    torch.testing.assert_close(
        torch.stack(continued.logits), torch.stack(whole.logits), rtol=1e-4, atol=1e-4
    )


def test_every_beam_reads_all_images_of_its_prompt(model):
    inputs = {**pad([[1, 5, *RUN, 6, *RUN, 7], [1, *RUN, 7]]), "pixel_values": pictures(3)}
    settings = {
        "max_new_tokens": 1,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    alone = model.generate(**inputs, **settings).logits[0]
    beams = model.generate(**inputs, **settings, num_beams=3).logits[0]
    torch.testing.assert_close(beams, alone.repeat_interleave(3, dim=0), rtol=1e-4, atol=1e-4)


# Cost


@torch.no_grad()
def test_text_runs_no_visual_branch_and_decoding_runs_llamas_modules_alone(model):
    called = []
    hooks = [
        module.register_forward_hook(lambda *_, name=name: called.append(name))
        for name, module in model.named_modules()
        if "visual" in name or "vision" in name
    ]
    try:
        model.generate(**pad([[1, 5, 6]]), max_new_tokens=3, do_sample=False)
        assert called == []
        inputs = {**pad([[1, 5, *RUN]]), "pixel_values": pictures(1)}
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).long()
        output = model.generate(
            **inputs, max_new_tokens=1, do_sample=False, return_dict_in_generate=True
        )
        prefill = len(called)
        assert prefill > 0
        called.clear()
        model.generate(**inputs, max_new_tokens=5, do_sample=False)
        assert len(called) == prefill
        del output
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("with_picture", [True, False])
def test_training_touches_every_parameter_with_or_without_pictures(model, with_picture):
    model = copy.deepcopy(model).train()
    inputs = pad([[1, 5, *RUN, 7]]) if with_picture else pad([[1, 5, 7]])
    labels = inputs["input_ids"].clone()
    model(
        **inputs, labels=labels, pixel_values=pictures(1) if with_picture else None
    ).loss.backward()
    untouched = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert untouched == []
    if not with_picture:
        visual = [
            p.grad for name, p in model.named_parameters() if "visual" in name or "vision" in name
        ]
        assert all(gradient.abs().max() == 0 for gradient in visual)


@torch.no_grad()
def test_decoding_compiles_to_one_graph(model):
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    token = torch.tensor([[7]])
    cache = model(torch.tensor([[1, 5, 6]]), use_cache=True).cache
    expected = model(torch.tensor([[1, 5, 6, 7]])).logits[:, -1:]
    torch.testing.assert_close(compiled(token, cache=cache).logits, expected, rtol=1e-4, atol=1e-4)


# Reserved ids


@torch.no_grad()
def test_reserved_ids_never_win_and_do_not_change_the_loss(model):
    model = copy.deepcopy(model)
    model.lm_head.weight[90:] = 100.0
    ids = torch.tensor([[1, 5, 6, 7, 8]])
    output = model(ids, labels=ids)
    assert (output.logits[..., 90:] == RESERVED_LOGIT).all()
    assert output.logits.argmax(-1).max() < 90
    real = nn.functional.cross_entropy(output.logits[0, :-1, :90], ids[0, 1:])
    torch.testing.assert_close(output.loss, real, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_entropy_stays_finite_with_reserved_ids(model, dtype):
    logits = copy.deepcopy(model).to(dtype)(torch.tensor([[1, 5, 6]])).logits
    log_probabilities = logits.log_softmax(-1)
    entropy = -(log_probabilities.exp() * log_probabilities).sum(-1)
    assert entropy.isfinite().all()
    real = torch.distributions.Categorical(logits=logits[..., :90].float()).entropy()
    torch.testing.assert_close(entropy.float(), real, rtol=0.05, atol=0.05)


def test_prompts_longer_than_the_context_are_refused_before_the_model_runs(model):
    ids = torch.full((1, 100), 5)
    calls = []
    handle = model.model.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        with pytest.raises(
            ValueError, match=r"at most 128 tokens.* a prompt of 100 and max_new_tokens=29"
        ):
            model.generate(ids, max_new_tokens=29)
        with pytest.raises(ValueError, match="a prompt of 100 and max_new_tokens=29"):
            model.generate(inputs_embeds=model.get_input_embeddings()(ids), max_new_tokens=29)
        with pytest.raises(
            ValueError, match=r"at most 128 tokens.* a prompt of 128; .*an image needs 5"
        ):
            model.generate(torch.full((1, 128), 5), max_length=256)
        assert not calls
    finally:
        handle.remove()


def test_an_answer_without_a_length_ends_with_the_context(model):
    ids = torch.full((1, 120), 5)
    endless = {"suppress_tokens": [2], "do_sample": False}
    assert model.generate(ids, **endless).shape[1] == 128
    assert model.generate(ids, max_length=256, **endless).shape[1] == 128
    assert model.generate(ids, max_new_tokens=8, **endless).shape[1] == 128
    config = GenerationConfig(max_new_tokens=256, **endless)  # as pipelines bring one
    assert model.generate(ids, generation_config=config).shape[1] == 128
    assert model.generate(inputs_embeds=model.get_input_embeddings()(ids), **endless).shape[1] == 8


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.7},
        {"num_beams": 4},
        {"num_beams": 3, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"do_sample": True, "temperature": 5.0, "num_return_sequences": 3},
    ],
    ids=str,
)
def test_generation_settings_cope_with_the_placeholder(model, settings):
    torch.manual_seed(0)
    inputs = {**pad([[1, 5, *RUN, 7], [1, *RUN, 3, *RUN]]), "pixel_values": pictures(3)}
    output = model.generate(
        **inputs,
        max_new_tokens=6,
        output_scores=True,
        return_dict_in_generate=True,
        **{"do_sample": False, **settings},
    )
    new_ids = output.sequences[:, inputs["input_ids"].shape[1] :]
    assert new_ids.max() < 90
    assert not any(scores.isnan().any() for scores in output.scores)


def test_labels_at_visual_positions_never_count(model):
    ids = torch.tensor([[1, 5, *RUN, 7, 8]])
    masked = ids.masked_fill(ids == IMAGE, -100)
    with torch.no_grad():
        losses = [
            model(ids, pixel_values=pictures(1), labels=labels).loss for labels in (ids, masked)
        ]
    assert losses[0] == losses[1]


def test_resizing_the_table_frees_the_new_ids(model):
    model = copy.deepcopy(model)
    model.resize_token_embeddings(100, pad_to_multiple_of=64)
    assert model.lm_head.weight.shape[0] == 128
    assert model.config.output_vocab_size == 100
    with torch.no_grad():
        logits = model(torch.tensor([[1, 99]])).logits
    assert (logits[..., IMAGE] == RESERVED_LOGIT).all()
    assert (logits[..., 91:100] > RESERVED_LOGIT).all()
    assert (logits[..., 100:] == RESERVED_LOGIT).all()


# Initialisation


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_without_position_tables_loads_bit_exactly(model, tmp_path, dtype):
    model = copy.deepcopy(model).to(dtype)
    model.save_pretrained(tmp_path / "with")
    state_dict = {
        key: value for key, value in model.state_dict().items() if not key.endswith("_pos_embed")
    }
    assert len(state_dict) == len(model.state_dict()) - 4
    model.save_pretrained(tmp_path / "without", state_dict=state_dict)
    dirt = [torch.full((4096,), 7.0) for _ in range(64)]  # what uninitialised memory would hold
    del dirt
    loaded, info = MplugOwl2ForConditionalGeneration.from_pretrained(
        tmp_path / "without", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    config = model.config.abstractor_config
    for layer in loaded.model.visual_abstractor.layers:
        assert torch.equal(layer.cross_attn.q_pos_embed, query_position_table(config))
        assert torch.equal(layer.cross_attn.k_pos_embed, image_position_table(config))
    reference = MplugOwl2ForConditionalGeneration.from_pretrained(tmp_path / "with")
    assert loaded.dtype == reference.dtype == dtype
    inputs = {**pad([[1, 5, *RUN, 7]]), "pixel_values": pictures(1)}
    assert torch.equal(loaded(**inputs).logits, reference(**inputs).logits)


def test_tables_of_a_checkpoint_win_over_rebuilt_ones(model, tmp_path):
    model = copy.deepcopy(model)
    model.model.visual_abstractor.layers[1].cross_attn.k_pos_embed.mul_(0.5)
    model.save_pretrained(tmp_path)
    loaded = MplugOwl2ForConditionalGeneration.from_pretrained(tmp_path)
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


def test_every_parameter_and_buffer_is_initialised():
    with torch.device("meta"):
        model = MplugOwl2ForConditionalGeneration(tiny_config())
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in itertools.chain(model.parameters(), model.buffers()):
            tensor.fill_(float("nan"))
    model.initialize_weights()
    bad = [
        name
        for name, t in (*model.named_parameters(), *model.named_buffers())
        if not t.isfinite().all()
    ]
    assert bad == []


def test_the_sub_model_runs_by_itself():
    text_model = MplugOwl2TextModel(tiny_config().text_config).eval()
    with pytest.raises(ValueError, match="got both or neither"):
        text_model()
    assert text_model(torch.tensor([[1, 2]])).last_hidden_state.shape == (1, 2, 48)


# Around the model


def test_weights_on_disk_give_the_same(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    device_map = {
        "model.vision_tower": "cpu",
        "model.visual_abstractor": "disk",
        "model.language_model": "disk",
        "lm_head": "cpu",
    }
    offloaded = MplugOwl2ForConditionalGeneration.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    model.set_attn_implementation("sdpa")
    inputs = {**pad([[1, 5, *RUN, 7], [1, 9]]), "pixel_values": pictures(1)}
    settings = {"max_new_tokens": 4, "do_sample": False}
    assert (
        offloaded.generate(**inputs, **settings).tolist()
        == model.generate(**inputs, **settings).tolist()
    )


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(model, use_reentrant):
    inputs = {**pad([[1, 5, *RUN, 7]]), "pixel_values": pictures(1)}
    gradients = []
    for checkpointing in (False, True):
        trained = copy.deepcopy(model).train()
        if checkpointing:
            trained.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            trained.enable_input_require_grads()
        trained(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in trained.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_lora_finds_its_targets_by_plain_names_and_loads_again(model, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    inputs = {**pad([[1, 5, *RUN, 7]]), "pixel_values": pictures(1)}
    config = LoraConfig(target_modules=["q_proj", "visual_v_proj"], r=2, init_lora_weights=False)
    adapted = get_peft_model(copy.deepcopy(model), config).eval()
    trained = {
        name.split(".lora_")[0]
        for name, parameter in adapted.named_parameters()
        if parameter.requires_grad
    }
    assert all(name.endswith(("q_proj", "visual_v_proj")) for name in trained)
    assert any("language_model.layers.0.self_attn.visual_v_proj" in name for name in trained)
    with torch.no_grad():
        expected = adapted(**inputs).logits
        adapted.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
        assert torch.equal(loaded(**inputs).logits, expected)
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(merged(**inputs).logits, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_saving_writes_this_packages_layout(model, tmp_path):
    from safetensors.torch import load_file

    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()


def test_continuous_batching_takes_text_alone(model):
    config = GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=-1)
    # Otherwise the cache takes most of the memory of the machine.
    small = {
        "continuous_batching_config": ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)
    }
    prompts = [[1, 5, 6, 7], [1, 9]]
    found = model.generate_batch(prompts, generation_config=config, **small)
    answers = sorted((answer.prompt_ids, answer.generated_tokens) for answer in found.values())
    for prompt, answer in answers:
        expected = model.generate(torch.tensor([prompt]), generation_config=config)[
            0, len(prompt) :
        ].tolist()
        assert answer == expected
    with pytest.raises(
        ValueError, match=r"prompt 1 has image placeholders \(id 90\), but continuous batching"
    ):
        model.generate_batch([[1, 5], [1, *RUN, 5]], generation_config=config, **small)
    manager = model.init_continuous_batching(generation_config=config, **small)
    with pytest.raises(ValueError, match="has image placeholders"):
        manager.add_request([1, *RUN, 5])


def test_unknown_parts_in_attn_implementation_are_refused(model):
    for wrong in ({"text_confg": "eager"}, {"": "eager", "text": "sdpa"}):
        with pytest.raises(
            ValueError,
            match=r"attn_implementation: expected parts of 'vision_config', .* got \['text",
        ):
            model.set_attn_implementation(wrong)
        with pytest.raises(ValueError, match="attn_implementation: expected parts of"):
            MplugOwl2ForConditionalGeneration._from_config(tiny_config(), attn_implementation=wrong)
    parts = {"text_config": "eager", "": "sdpa"}
    other = MplugOwl2ForConditionalGeneration._from_config(tiny_config(), attn_implementation=parts)
    assert other.config.text_config._attn_implementation == "eager"
