"""Adapters: what the presets target, every way of loading, refusals, checkpointing, merging, the
documented example.
"""

import contextlib
import copy
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

import owl2_hf
from owl2_hf.conversion import convert, load_non_lora
from owl2_hf.modeling import MplugOwl2Config, MplugOwl2ForConditionalGeneration
from owl2_hf.modeling.adapters_mplug_owl2 import check_adapter as check_in_model
from owl2_hf.modeling.adapters_mplug_owl2 import place_adapter, read_adapter
from owl2_hf.training.adapters import LORA_PRESETS, check_adapter, load_adapter, lora_config

from ..conversion.conftest import halve, rewrite
from ..modeling.test_modeling_mplug_owl2 import IMAGE, RUN, pictures, tiny_config
from ..original import expand_markers, pad

DOCS = Path(__file__).parents[2] / "docs" / "adapters.md"
INPUTS = {**pad([[1, 5, *RUN, 7]]), "pixel_values": pictures(1)}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Folder of a model, which adapters name as theirs."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    MplugOwl2ForConditionalGeneration(tiny_config()).save_pretrained(folder)
    return folder


@pytest.fixture
def model(base):
    return MplugOwl2ForConditionalGeneration.from_pretrained(base)


def adapt(model, preset="language", **kwargs):
    """An adapter that changes something, unlike a fresh one."""
    adapted = get_peft_model(
        copy.deepcopy(model), lora_config(preset, r=2, lora_alpha=4, lora_dropout=0.0, **kwargs)
    )
    torch.manual_seed(1)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return adapted.eval()


@torch.no_grad()
def logits(model, inputs=INPUTS):
    return model.eval()(**inputs).logits


@pytest.fixture
def saved(model, tmp_path):
    folder = tmp_path / "adapter"
    adapt(model).save_pretrained(folder)
    return folder


def targets(adapted):
    return {
        name.split(".lora_")[0].split("base_model.model.")[-1]
        for name in adapted.state_dict()
        if ".lora_A" in name
    }


LEAVES = {
    "language": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "visual-branch": {"visual_k_proj", "visual_v_proj"},
    "attention": {"q_proj", "k_proj", "v_proj", "o_proj", "visual_k_proj", "visual_v_proj"},
    "q-align": {"q_proj", "visual_v_proj"},
}


@pytest.mark.parametrize("preset", LORA_PRESETS)
def test_a_preset_stays_in_the_language_model(model, preset):
    found = targets(adapt(model, preset))
    decoder = {
        name
        for name, module in model.named_modules()
        if name.startswith("model.language_model.layers.") and isinstance(module, torch.nn.Linear)
    }
    expected = {
        name for name in decoder if preset == "all-linear" or name.split(".")[-1] in LEAVES[preset]
    }
    assert found == expected and found


def test_other_members_of_the_family_have_the_same_presets():
    tiny = tiny_config()
    owl21 = tiny_config(
        modality_specific_projections=["q", "k", "v"], modality_specific_norms=False
    )
    with torch.device("meta"):
        model = MplugOwl2ForConditionalGeneration(owl21)
        found = targets(get_peft_model(model, lora_config("visual-branch", r=2)))
        assert {name.split(".")[-1] for name in found} == {
            "visual_q_proj",
            "visual_k_proj",
            "visual_v_proj",
        }
        docowl = MplugOwl2Config(
            vision_config={**tiny.vision_config.to_dict(), "image_size": 28},
            text_config=tiny.text_config.to_dict(),
            image_token_id=90,
            connector_type="h_reducer",
        )
        adapted = get_peft_model(
            MplugOwl2ForConditionalGeneration(docowl), lora_config(r=2, train_connector=True)
        )
    assert adapted.base_model.model.model.h_reducer.modules_to_save.default.visual_fc.weight.requires_grad


@pytest.mark.parametrize("preset", LORA_PRESETS)
def test_lora_trains_less_than_a_twentieth_of_the_published_model(preset):
    with torch.device("meta"):
        adapted = get_peft_model(
            MplugOwl2ForConditionalGeneration(MplugOwl2Config()), lora_config(preset)
        )
    trained, total = adapted.get_nb_trainable_parameters()
    assert 0 < trained < 0.05 * total
    row = re.search(rf"\| `{preset}` \|.*\| (.*) % \|", DOCS.read_text())
    assert float(row[1]) == round(100 * trained / total, 1)


def test_only_the_adapter_and_the_connector_are_trained(model):
    adapted = adapt(model, "q-align", train_connector=True)
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert all(".lora_" in name or "visual_abstractor.modules_to_save" in name for name in trained)
    assert any("visual_abstractor" in name for name in trained)


def test_an_unknown_preset_is_refused():
    with pytest.raises(ValueError, match="Expected a LoRA preset of language, visual-branch"):
        lora_config("vision")
    with pytest.raises(ValueError, match="A preset sets target_modules: leave them out"):
        lora_config("language", target_modules=["q_proj"])


def test_a_preset_without_any_target_is_refused():
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        llama = LlamaForCausalLM(
            LlamaConfig(hidden_size=32, intermediate_size=8, num_hidden_layers=1, vocab_size=8)
        )
        with pytest.raises(ValueError, match="not found in the base model"):
            get_peft_model(llama, lora_config("visual-branch"))


@pytest.mark.parametrize(
    "make",
    [
        lambda model: adapt(model),
        lambda model: adapt(model, "visual-branch", train_connector=True),
        lambda model: adapt(model, "attention", use_dora=True),
        lambda model: adapt(
            model, "q-align", use_rslora=True, modules_to_save=["embed_tokens", "lm_head"]
        ),
        lambda model: get_peft_model(
            model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        ),
        lambda model: get_peft_model(
            model,
            LoraConfig(r=2, target_modules=["q_proj", "visual_v_proj"], init_lora_weights=False),
        ),
        lambda model: get_peft_model(
            model,
            LoraConfig(r=2, target_modules=["embed_tokens", "lm_head"], init_lora_weights=False),
        ),
    ],
    ids=[
        "language",
        "connector",
        "dora",
        "rslora-embeddings",
        "all-linear",
        "plain-names",
        "embeddings",
    ],
)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_every_way_of_loading_gives_the_same_numbers(model, tmp_path, make):
    adapted = make(copy.deepcopy(model))
    expected = logits(adapted)
    assert not torch.allclose(expected, logits(model), atol=1e-3)
    adapted.save_pretrained(tmp_path)
    by_transformers = copy.deepcopy(model)
    by_transformers.load_adapter(str(tmp_path))
    for loaded in (
        PeftModel.from_pretrained(copy.deepcopy(model), tmp_path),
        load_adapter(copy.deepcopy(model), tmp_path),
        by_transformers,
        MplugOwl2ForConditionalGeneration.from_pretrained(tmp_path),
        AutoModelForImageTextToText.from_pretrained(tmp_path),
    ):
        assert torch.equal(logits(loaded), expected)


@pytest.mark.parametrize(
    "name", ["vision", "visual", "layer", "a", "model", "weight", "lora_A", "default"]
)
@pytest.mark.parametrize("train_connector", [False, True])
def test_an_adapter_may_have_any_name(model, tmp_path, name, train_connector):
    adapted = adapt(model, train_connector=train_connector)
    adapted.save_pretrained(tmp_path)
    model.load_adapter(str(tmp_path), adapter_name=name)
    assert torch.equal(logits(model), logits(adapted))


def test_adapter_names_may_contain_each_other(model, saved):
    expected = logits(PeftModel.from_pretrained(copy.deepcopy(model), saved))
    for name in ("a", "a2", "default", "layer"):
        model.load_adapter(str(saved), adapter_name=name)
        model.set_adapter(name)
        assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("tokens", [[5, 7], {"embed_tokens": [5, 7]}])
def test_tokens_that_were_trained_alone_load_in_every_way(tmp_path, is_tied, tokens):
    torch.manual_seed(0)
    config = tiny_config()
    config.tie_word_embeddings = is_tied
    base = tmp_path / "base"
    MplugOwl2ForConditionalGeneration(config).save_pretrained(base)
    model = MplugOwl2ForConditionalGeneration.from_pretrained(base)
    adapted = get_peft_model(
        model, LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=tokens)
    )
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    expected = logits(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    fresh = [MplugOwl2ForConditionalGeneration.from_pretrained(base) for _ in range(3)]
    fresh[0].load_adapter(str(tmp_path / "adapter"))
    fresh[1] = load_adapter(fresh[1], tmp_path / "adapter")
    fresh[2] = PeftModel.from_pretrained(fresh[2], tmp_path / "adapter")
    for loaded in (*fresh, AutoModelForImageTextToText.from_pretrained(tmp_path / "adapter")):
        assert torch.equal(logits(loaded), expected)


def test_weights_that_load_adapter_missed_are_found_and_loaded_by_place_adapter(model, tmp_path):
    adapted = adapt(model, train_connector=True)
    adapted.save_pretrained(tmp_path)
    saved = read_adapter(tmp_path, {})
    loaded = copy.deepcopy(model)
    loaded.load_adapter(str(tmp_path))
    for name, parameter in loaded.named_parameters():
        if "modules_to_save" in name or ".lora_B" in name:
            parameter.data.zero_()
    with pytest.raises(
        ValueError, match=r"was not loaded completely: \d+ tensors of the model have other values"
    ):
        check_in_model(tmp_path, loaded, "default", saved)
    place_adapter(tmp_path, loaded, "default", saved)
    assert torch.equal(logits(loaded), logits(adapted))


def test_an_adapter_of_another_rank_than_it_says_is_refused(base, model, saved):
    expected = logits(model)
    settings = saved / "adapter_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "r": 3}))
    with pytest.raises(ValueError, match="has tensors of other shapes than this model"):
        model.load_adapter(str(saved))
    assert torch.equal(logits(model), expected)


def test_a_second_adapter_with_the_same_name_is_refused(model, saved):
    model.load_adapter(str(saved))
    expected = logits(model)
    with pytest.raises(ValueError, match="already exists"):
        model.load_adapter(str(saved))
    assert torch.equal(logits(model), expected)


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_a_refused_adapter_restores_the_non_lora_weights(model, saved):
    expected = logits(model)
    beside = {"model.language_model.norm.weight": torch.full((48,), 3.0)}
    save_file(beside, saved / "non_lora_trainables.safetensors", metadata={"format": "pt"})
    change(saved, lambda tensors: tensors.pop(KEY))
    with pytest.raises(ValueError, match="does not fit this model"):
        model.load_adapter(str(saved))
    assert torch.equal(logits(model), expected)


BROKEN = {
    "short": (lambda file: rewrite(file, halve(0)), "is damaged: its tensors need"),
    "empty": (lambda file: file.write_bytes(b""), "it is empty"),
    "lfs": (
        lambda file: file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"),
        "Git LFS pointer",
    ),
    "half": (lambda file: file.write_bytes(file.read_bytes()[:900]), "it is damaged"),
}


@pytest.mark.parametrize(
    "loader", ["from_pretrained", "auto", "model.load_adapter", "load_adapter"]
)
@pytest.mark.parametrize(
    ("suffix", "kind"),
    [
        *(("bin", kind) for kind in BROKEN),
        *(("safetensors", kind) for kind in ("empty", "lfs", "half")),
    ],
)
def test_a_broken_adapter_file_is_named(base, saved, loader, kind, suffix):
    file = saved / f"adapter_model.{suffix}"
    if suffix == "bin":
        tensors = load_file(saved / "adapter_model.safetensors")
        (saved / "adapter_model.safetensors").unlink()
        torch.save(tensors, file)
        assert LOADERS[loader](base, saved) is not None
    change_file, words = BROKEN[kind]
    change_file(file)
    with pytest.raises(ValueError, match=rf"adapter_model\.{suffix} .*{words}") as caught:
        LOADERS[loader](base, saved)
    assert "weights_only" not in str(caught.value)


def test_an_adapter_added_by_transformers_loads_again(model, tmp_path):
    model.add_adapter(lora_config("language", r=2, init_lora_weights=False))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForImageTextToText.from_pretrained(tmp_path)), logits(model))


def change(folder, edit):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


LOADERS = {
    "from_pretrained": lambda base, folder: MplugOwl2ForConditionalGeneration.from_pretrained(
        folder
    ),
    "auto": lambda base, folder: AutoModelForImageTextToText.from_pretrained(folder),
    "model.load_adapter": lambda base, folder: MplugOwl2ForConditionalGeneration.from_pretrained(
        base
    ).load_adapter(str(folder)),
    "load_adapter": lambda base, folder: load_adapter(
        MplugOwl2ForConditionalGeneration.from_pretrained(base), folder
    ),
}
KEY = "base_model.model.model.language_model.layers.1.mlp.up_proj.lora_B.weight"


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_an_adapter_with_a_tensor_too_few_or_too_many_is_refused(base, saved, loader):
    change(saved, lambda tensors: tensors.pop(KEY))
    with pytest.raises(
        ValueError,
        match=r"1 tensors that the model needs are missing, the first is .*layers.1.mlp.up_pr",
    ):
        LOADERS[loader](base, saved)
    renamed = KEY.replace("up_proj", "middle_proj")
    change(
        saved,
        lambda tensors: tensors.update({KEY: torch.zeros(88, 2), renamed: torch.zeros(88, 2)}),
    )
    with pytest.raises(
        ValueError, match=r"1 tensors are unknown to the model, the first is .*middle_proj"
    ):
        LOADERS[loader](base, saved)


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_a_refused_adapter_leaves_the_model_as_it_was(model, saved):
    expected = logits(model)
    complete = saved.with_name("complete")
    shutil.copytree(saved, complete)
    change(saved, lambda tensors: tensors.pop(KEY))
    with pytest.raises(ValueError, match="does not fit this model"):
        model.load_adapter(str(saved))
    assert torch.equal(logits(model), expected)
    model.load_adapter(str(complete))
    assert not torch.equal(logits(model), expected)
    by_peft = PeftModel.from_pretrained(copy.deepcopy(model), saved, adapter_name="other")
    with pytest.raises(ValueError, match="does not fit this model"):
        check_adapter(by_peft, saved, "other")


def test_a_base_model_that_lacks_parameters_is_refused_below_an_adapter_too(base, saved, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(base, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors.pop("model.language_model.layers.0.self_attn.k_proj.weight")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    settings = saved / "adapter_config.json"
    settings.write_text(
        json.dumps({**json.loads(settings.read_text()), "base_model_name_or_path": str(broken)})
    )
    for loader in ("from_pretrained", "auto"):
        with pytest.raises(
            ValueError, match=r"lacks 1 parameters of this model, the first is .*k_proj"
        ):
            LOADERS[loader](base, saved)


def test_an_adapter_without_a_base_model_says_so(base, saved, tmp_path):
    settings = saved / "adapter_config.json"
    settings.write_text(
        json.dumps({**json.loads(settings.read_text()), "base_model_name_or_path": None})
    )
    with pytest.raises(
        ValueError,
        match="without base_model_name_or_path in its",
    ):
        LOADERS["from_pretrained"](base, saved)
    with pytest.raises(
        ValueError, match=r"contains no adapter: expected a folder with adapter_config\.json"
    ):
        LOADERS["load_adapter"](base, tmp_path)


@pytest.mark.parametrize("loader", LOADERS)
def test_an_adapter_of_the_original_names_the_conversion(base, golden_dir, loader):
    with pytest.raises(
        ValueError, match=r"adapter in the original's layout: .*`owl2-hf convert .* --to adapter`"
    ):
        LOADERS[loader](base, golden_dir("G") / "mplug_owl2_lora")


def test_tensors_under_the_originals_names_are_told_apart_too(base, saved):
    key = "base_model.model.model.layers.0.self_attn.k_proj.multiway.0.lora_A.weight"
    change(saved, lambda tensors: tensors.update({key: torch.zeros(2, 48)}))
    with pytest.raises(ValueError, match="adapter in the original's layout"):
        LOADERS["model.load_adapter"](base, saved)


def train(model, inputs, steps=3):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    model.train()
    for _ in range(steps):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_a_fine_tune_of_the_original_is_trained_on(golden_dir, tmp_path):
    golden, adapter = golden_dir("G"), tmp_path / "adapter"
    convert(golden / "mplug_owl2_base", tmp_path / "base")
    convert(golden / "mplug_owl2_lora", adapter, base=tmp_path / "base", to="adapter")
    cases = load_file(golden / "cases.safetensors")
    # The base that it names, and all that was trained.
    loaded = AutoModelForImageTextToText.from_pretrained(adapter)
    inputs = expand_markers(cases["merged_fp32/input_ids"], loaded.config)
    inputs["pixel_values"] = cases["merged_fp32/images"].reshape(-1, 3, 28, 28)
    expected = cases["merged_fp32/logits"]
    strict = load_adapter(AutoModelForImageTextToText.from_pretrained(tmp_path / "base"), adapter)
    for model in (loaded, strict):
        assert (
            logits(model, inputs)[..., :1000] - expected
        ).abs().max() / expected.abs().max() < 1e-5

    full_base = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
    load_non_lora(full_base, adapter)
    full_base.save_pretrained(tmp_path / "full_base")
    full_base = AutoModelForImageTextToText.from_pretrained(tmp_path / "full_base")
    continued = PeftModel.from_pretrained(full_base, adapter, is_trainable=True)
    losses = train(continued, inputs)
    assert losses[-1] < losses[0]
    continued.save_pretrained(tmp_path / "continued")
    back = AutoModelForImageTextToText.from_pretrained(tmp_path / "full_base")
    back = PeftModel.from_pretrained(back, tmp_path / "continued")
    check_adapter(back, tmp_path / "continued")
    assert torch.equal(logits(back, inputs), logits(continued, inputs))
    assert not torch.allclose(logits(back, inputs), logits(strict, inputs), atol=1e-3)


GRADIENT_CASES = {
    "language": lambda: lora_config(r=2, lora_dropout=0.0, init_lora_weights=False),
    "connector": lambda: lora_config(
        "q-align", r=2, lora_dropout=0.0, init_lora_weights=False, train_connector=True
    ),
    "vision": lambda: LoraConfig(
        r=2, target_modules=r".*vision_tower.*\.q_proj", init_lora_weights=False
    ),
    "abstractor": lambda: LoraConfig(
        r=2, target_modules=r".*visual_abstractor.*\.k_proj", init_lora_weights=False
    ),
}


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("case", GRADIENT_CASES)
def test_gradient_checkpointing_with_frozen_embeddings_changes_no_gradient(
    model, case, use_reentrant
):
    plain = get_peft_model(model, GRADIENT_CASES[case]()).train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    checkpointed.enable_input_require_grads()
    calls = []
    decoder = checkpointed.get_base_model().model.language_model
    decoder.layers[0].mlp.register_forward_pre_hook(lambda *args: calls.append(args))
    for inputs in (INPUTS, pad([[1, 5, 7, 8]])):
        grads = []
        for adapted in (plain, checkpointed):
            adapted.zero_grad()
            adapted(**inputs, labels=inputs["input_ids"]).loss.backward()
            grads.append(
                {name: p.grad for name, p in adapted.named_parameters() if p.requires_grad}
            )
        assert grads[0].keys() == grads[1].keys()
        for name, expected in grads[0].items():
            torch.testing.assert_close(grads[1][name], expected, rtol=1e-5, atol=1e-7)
    assert any(gradient.abs().max() > 0 for gradient in grads[0].values()) or case in (
        "vision",
        "abstractor",
    )
    assert len(calls) == 4  # forward and once more in backward, for both inputs


@torch.no_grad()
def test_a_merged_model_is_a_plain_one(model, saved, tmp_path):
    adapted = load_adapter(copy.deepcopy(model), saved)
    expected = logits(adapted)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), logits(model))
    merged = adapted.merge_and_unload()
    scale = expected.abs().max()
    assert (logits(merged) - expected).abs().max() / scale < 1e-5
    merged.save_pretrained(tmp_path / "merged")
    assert load_file(tmp_path / "merged" / "model.safetensors").keys() == model.state_dict().keys()
    assert torch.equal(
        logits(AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")), logits(merged)
    )


def test_adapters_are_added_up_and_stand_beside_each_other(model, saved):
    adapted = load_adapter(model, saved)
    load_adapter(adapted, saved, "second")
    alone = logits(adapted)
    adapted.add_weighted_adapter(["default", "second"], [0.5, 0.5], "both", combination_type="cat")
    adapted.set_adapter("both")
    torch.testing.assert_close(logits(adapted), alone, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_a_resized_table_is_saved_with_its_adapter(model, base, tmp_path):
    def resized():
        fresh = MplugOwl2ForConditionalGeneration.from_pretrained(base)
        fresh.resize_token_embeddings(104)
        return fresh

    inputs = {**pad([[1, 5, *RUN, 100]]), "pixel_values": pictures(1)}
    adapted = adapt(resized())
    adapted.save_pretrained(tmp_path)
    by_transformers = resized()
    by_transformers.load_adapter(str(tmp_path))
    for loaded in (
        by_transformers,
        load_adapter(resized(), tmp_path),
        PeftModel.from_pretrained(resized(), tmp_path),
    ):
        assert torch.equal(logits(loaded, inputs), logits(adapted, inputs))
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(model, tmp_path)


def test_the_documented_example_runs(tmp_path, monkeypatch):
    pytest.importorskip("trl")
    monkeypatch.chdir(tmp_path)
    training, loading = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    names: dict = {}
    exec(compile(training, "adapters.md, training", "exec"), names)
    processor, row = names["processor"], names["rows"][0]
    batch = names["trainer"].data_collator([copy.deepcopy(row)])
    # What is trained is what generation reads, and the answers alone count.
    question = [
        {"type": "image", "image": row["images"][0]},
        {"type": "text", "text": row["messages"][0]["content"]},
    ]
    chat = [{"role": "user", "content": question}, row["messages"][1]]
    inputs = processor.apply_chat_template(
        chat, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert batch["input_ids"].tolist() == inputs["input_ids"].tolist()
    assert torch.equal(batch["pixel_values"], inputs["pixel_values"])
    counted = batch["labels"][0][batch["labels"][0] != -100]
    assert processor.tokenizer.decode(counted) == row["messages"][1]["content"] + "</s>"

    exec(compile(loading, "adapters.md, loading", "exec"), names)
    trained = logits(names["trainer"].model, inputs)
    assert torch.equal(
        logits(AutoModelForImageTextToText.from_pretrained("adapter", dtype="float32"), inputs),
        trained,
    )
    assert torch.equal(logits(names["base"], inputs), logits(names["merged"], inputs))
    torch.testing.assert_close(logits(names["merged"], inputs), trained, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(
        trained, logits(owl2_hf.load_default(dtype="float32")[0], inputs), atol=1e-3
    )


@torch.no_grad()
@pytest.mark.parametrize("preset", LORA_PRESETS)
def test_each_row_of_a_batch_may_have_an_adapter_of_its_own(model, preset):
    adapted = adapt(model, preset)
    adapted.add_adapter("second", lora_config(preset, r=2, lora_dropout=0.0))
    adapted.double()  # what differs is then no rounding
    torch.manual_seed(2)
    for name, parameter in adapted.named_parameters():
        if ".second." in name:
            parameter.normal_(std=0.1)
    rows = pad([[1, 5, *RUN, 7], [1, *RUN, 5, 7, 8], [1, 5, 6]])
    inputs = {
        **rows,
        "pixel_values": pictures(2).double(),
        "mm_token_type_ids": rows["input_ids"].eq(IMAGE).long(),
    }
    names = ["default", "__base__", "second"]
    mixed = adapted(**inputs, adapter_names=names).logits
    for index, name in enumerate(names):
        with contextlib.nullcontext() if name != "__base__" else adapted.disable_adapter():
            if name != "__base__":
                adapted.set_adapter(name)
            alone = adapted(**inputs).logits
        kept = inputs["attention_mask"][index].bool()
        torch.testing.assert_close(mixed[index][kept], alone[index][kept], rtol=1e-9, atol=1e-9)
    answers = adapted.generate(**inputs, adapter_names=names, max_new_tokens=2, do_sample=False)
    assert answers.shape[0] == 3


@pytest.mark.parametrize("kind", [PromptTuningConfig, PromptEncoderConfig])
@pytest.mark.parametrize("has_image", [True, False])
def test_virtual_tokens_in_front_of_a_prompt_are_text(model, kind, has_image):
    settings = {"encoder_hidden_size": 8} if kind is PromptEncoderConfig else {}
    torch.manual_seed(0)
    base = copy.deepcopy(model)
    tuned = get_peft_model(
        base, kind(task_type="CAUSAL_LM", num_virtual_tokens=2, **settings)
    ).eval()
    inputs = pad([[1, 5, *RUN, 7] if has_image else [1, 5, 7], [1, 5, 6]])
    inputs |= {"mm_token_type_ids": inputs["input_ids"].eq(IMAGE).long()}
    inputs |= {"pixel_values": pictures(1)} if has_image else {}
    got = logits(tuned, inputs)
    # The same by hand, with an indicator for each position.
    embeds = torch.cat(
        [tuned.get_prompt(2), model.get_input_embeddings()(inputs["input_ids"])], dim=1
    )
    by_hand = {**inputs, "inputs_embeds": embeds, "input_ids": None}
    for name, value in (("attention_mask", 1), ("mm_token_type_ids", 0)):
        by_hand[name] = torch.nn.functional.pad(inputs[name], (2, 0), value=value)
    torch.testing.assert_close(got, logits(model, by_hand), rtol=1e-5, atol=1e-6)
    loss = tuned(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    assert all(
        parameter.grad is not None
        for parameter in tuned.prompt_encoder.parameters()
        if parameter.requires_grad
    )
    answers = tuned.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert answers[:, -2].tolist() == got[:, -1].argmax(-1).tolist()


def test_indicators_that_are_too_short_are_refused_where_no_tokens_are_virtual(model):
    embeds = model.get_input_embeddings()(torch.tensor([[1, 5, *RUN, 7]]))
    short = torch.tensor([[0, *[1] * len(RUN), 0]])
    for extra in ({}, {"pixel_values": pictures(1)}):
        with pytest.raises(ValueError, match="one indicator for each position"):
            model(inputs_embeds=embeds, mm_token_type_ids=short, **extra)
    # As virtual tokens leave a model; ids tell that there are none.
    frozen = model.requires_grad_(False)
    with pytest.raises(ValueError, match="one indicator for each position"):
        frozen(torch.tensor([[1, 5, *RUN, 7]]), mm_token_type_ids=short, pixel_values=pictures(1))
    long = torch.tensor([[0, 0, 0, *[1] * len(RUN), 0]])
    with pytest.raises(ValueError, match="one indicator for each position"):
        frozen(inputs_embeds=embeds, mm_token_type_ids=long)
