"""The classifier: what it reads, its losses, every way of saving and loading it, and adapters with
its head.
"""

import copy
import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments
from transformers.cache_utils import DynamicCache

from owl2_hf.modeling import (
    MplugOwl2ForConditionalGeneration,
    MplugOwl2ForSequenceClassification,
    MplugOwl2Model,
)

from ..original import pad
from .test_modeling_mplug_owl2 import RUN, pictures, tiny_config

ROWS = [[1, 5, *RUN, 7], [1, 9, 8], [1, *RUN, 6, *RUN, 4, 3]]
NUM_IMAGES = 3


def make(num_labels: int = 3, **settings) -> MplugOwl2ForSequenceClassification:
    config = tiny_config()
    config.num_labels = num_labels
    for name, value in settings.items():
        setattr(config, name, value)
    torch.manual_seed(1)
    return MplugOwl2ForSequenceClassification(config).eval()


@pytest.fixture(scope="module")
def model() -> MplugOwl2ForSequenceClassification:
    return make()


@pytest.fixture
def causal(tmp_path):
    """Folder of a model that was trained to answer."""
    torch.manual_seed(2)
    MplugOwl2ForConditionalGeneration(tiny_config()).save_pretrained(tmp_path / "causal")
    return tmp_path / "causal"


def batch(side: str = "left") -> dict[str, torch.Tensor]:
    return {**pad(ROWS, side=side), "pixel_values": pictures(NUM_IMAGES)}


@torch.no_grad()
def logits(model, inputs=None):
    return model.eval()(**(inputs or batch())).logits


# What it reads


@pytest.mark.parametrize("side", ["left", "right"])
def test_each_prompt_is_scored_at_its_last_token_alone_or_padded(model, side):
    found = logits(model, batch(side))
    assert found.shape == (3, 3)
    images, first = pictures(NUM_IMAGES), 0
    for row, ids in zip(found, ROWS, strict=True):
        num_images = ids.count(RUN[0]) // len(RUN)
        inputs = {"input_ids": torch.tensor([ids])}
        if num_images:
            inputs["pixel_values"] = images[first : first + num_images]
        first += num_images
        with torch.no_grad():
            hidden_state = MplugOwl2Model.forward(model.model, **inputs).last_hidden_state[0, -1]
        torch.testing.assert_close(row, model.score.weight @ hidden_state, rtol=1e-5, atol=1e-5)


def test_padding_is_known_by_its_id_where_there_is_no_mask(model):
    inputs = {"input_ids": pad([ROWS[1], [1, 4]], side="right")["input_ids"]}
    expected = torch.cat(
        [logits(model, {"input_ids": torch.tensor([ids])}) for ids in (ROWS[1], [1, 4])]
    )
    torch.testing.assert_close(logits(model, inputs), expected)


def test_prompts_of_which_nothing_tells_the_padding_are_refused():
    model = make()
    model.config.text_config.pad_token_id = None
    ids = pad([ROWS[1], [1, 4]])
    with pytest.raises(ValueError, match="Padding cannot be found in 2 prompts"):
        model(input_ids=ids["input_ids"])
    alone = logits(model, {"input_ids": ids["input_ids"][:1]})
    torch.testing.assert_close(alone, logits(make(), ids)[:1])


def test_embeddings_are_scored_as_the_ids_are(model, caplog):
    inputs = batch("right")
    ids = inputs.pop("input_ids")
    inputs["inputs_embeds"] = model.get_input_embeddings()(ids).detach()
    inputs["mm_token_type_ids"] = ids.eq(RUN[0]).long()
    assert torch.equal(logits(model, inputs), logits(model, batch("right")))
    del inputs["attention_mask"]
    assert logits(model, inputs).shape == (3, 3)


def test_a_prompt_continued_from_a_cache_gets_the_same_logits(model):
    ids = torch.tensor([[1, 5, 7, 8, 4]])
    cache = DynamicCache(config=model.config.get_text_config())
    mask = torch.ones(1, 5).long()
    with torch.no_grad():
        first = model(input_ids=ids[:, :3], attention_mask=mask[:, :3], cache=cache)
        second = model(input_ids=ids[:, 3:], attention_mask=mask, cache=first.cache)
    torch.testing.assert_close(
        second.logits, logits(model, {"input_ids": ids}), rtol=1e-5, atol=1e-5
    )


def test_it_gives_hidden_states_and_images_as_the_other_models_do(model):
    outputs = model(**batch(), output_hidden_states=True)
    assert len(outputs.hidden_states) == 4 and outputs.image_hidden_states.shape == (
        NUM_IMAGES * len(RUN),
        48,
    )
    assert torch.equal(model(**batch(), return_dict=False)[0], outputs.logits)


# Losses


LOSSES = {
    "regression": (1, torch.tensor([0.5, 2.0, -1.0]), lambda x, y: (x[:, 0] - y).square().mean()),
    "regression of whole numbers": (
        1,
        torch.tensor([1, 5, 3]),
        lambda x, y: (x[:, 0] - y).square().mean(),
    ),
    "single_label_classification": (3, torch.tensor([0, 2, 1]), nn.functional.cross_entropy),
    "multi_label_classification": (
        3,
        torch.tensor([[0.0, 1, 1], [1, 0, 0], [0, 0, 0]]),
        nn.functional.binary_cross_entropy_with_logits,
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", LOSSES)
def test_the_loss_is_that_of_the_problem(kind, dtype):
    num_labels, labels, expected = LOSSES[kind]
    model = make(num_labels).to(dtype)
    outputs = model(**batch(), labels=labels)
    torch.testing.assert_close(outputs.loss, expected(outputs.logits.float(), labels))
    assert model.config.problem_type == kind.split()[0]
    outputs.loss.backward()
    assert (
        model.score.weight.grad.abs().sum() > 0
        and model.model.vision_tower.embeddings.cls_token.grad is not None
    )


def test_a_problem_that_is_set_needs_no_labels_of_its_own_type():
    model = make(problem_type="multi_label_classification")
    loss = model(**batch(), labels=torch.tensor([[0, 1, 1], [1, 0, 0], [0, 0, 0]])).loss
    loss.backward()
    assert loss.isfinite()


def test_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        model = make(1).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**batch(), labels=torch.ones(3)).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_accumulated_steps_are_one_step_of_all_their_rows(tmp_path):
    rows = [
        {"input_ids": torch.tensor([1, 5, 7 + i]), "labels": torch.tensor(float(i))}
        for i in range(4)
    ]
    found = []
    for size, steps in ((4, 1), (1, 4)):
        model = make(1)
        arguments = TrainingArguments(
            tmp_path, max_steps=1, per_device_train_batch_size=size, gradient_accumulation_steps=steps,
            learning_rate=0.1, optim="sgd", max_grad_norm=0, report_to="none", use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=rows).train()
        found.append(model.score.weight.detach())
    torch.testing.assert_close(*found)
    assert not torch.equal(found[0], make(1).score.weight)


# Saving and loading


def test_a_causal_checkpoint_gives_all_but_the_head(causal, caplog):
    model, info = AutoModelForSequenceClassification.from_pretrained(
        causal, num_labels=2, output_loading_info=True
    )
    assert type(model) is MplugOwl2ForSequenceClassification and model.score.out_features == 2
    assert set(info["missing_keys"]) == {"score.weight"} and not info["unexpected_keys"]
    expected = MplugOwl2ForConditionalGeneration.from_pretrained(causal).model.state_dict()
    assert all(
        torch.equal(tensor, expected[name]) for name, tensor in model.model.state_dict().items()
    )


def test_a_new_head_is_said(causal):
    code = f"""
        from owl2_hf import MplugOwl2ForSequenceClassification
        MplugOwl2ForSequenceClassification.from_pretrained({str(causal)!r})
    """
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True
    )
    assert ran.returncode == 0 and "score.weight" in ran.stderr and "MISSING" in ran.stderr


def test_a_checkpoint_that_lacks_more_than_the_head_is_refused(causal):
    weights = load_file(causal / "model.safetensors")
    weights.pop("model.language_model.norm.weight")
    save_file(weights, causal / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError,
        match=r"lacks 1 parameters of this model, .* model\.language_model\.norm\.weight",
    ):
        MplugOwl2ForSequenceClassification.from_pretrained(causal)


def test_a_saved_classifier_is_the_same_again(tmp_path):
    model = make(problem_type="regression", id2label={0: "sharp", 1: "blurred", 2: "dark"})
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["MplugOwl2ForSequenceClassification"]
    again, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(info["missing_keys"]) and not any(info["unexpected_keys"])
    assert again.config.problem_type == "regression" and again.config.id2label[1] == "blurred"
    assert torch.equal(logits(again), logits(model))


def test_a_classifier_is_not_loaded_as_another_class_without_its_head(tmp_path, model):
    model.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError,
        match=r"does not have, the first is 'score\.weight': it is the head of MplugOwl2ForSequenceClassification",
    ):
        MplugOwl2Model.from_pretrained(tmp_path)


STRANGER = """
    import sys
    sys.modules["owl2_hf"] = None
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1], trust_remote_code=True, num_labels=3).eval()
    assert "transformers_modules" in type(model).__module__
    inputs = torch.load(sys.argv[2])
    with torch.no_grad():
        torch.save(model(**inputs).logits, sys.argv[3])
    if len(sys.argv) > 4:
        model.save_pretrained(sys.argv[4])
"""


@pytest.mark.parametrize("kind", ["classifier", "causal"])
def test_it_loads_where_the_package_is_not(kind, causal, tmp_path, model):
    folder = causal
    if kind == "classifier":
        folder = tmp_path / "saved"
        model.save_pretrained(folder)
    assert (folder / "modeling_mplug_owl2_classification.py").is_file()
    torch.save(batch(), tmp_path / "inputs.pt")
    environment = {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path),
        "HF_MODULES_CACHE": str(tmp_path / "m"),
    }
    names = [folder, tmp_path / "inputs.pt", tmp_path / "logits.pt", tmp_path / "again"]
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(STRANGER), *map(str, names)],
        capture_output=True, text=True, env={**os.environ, **environment}, cwd=tmp_path,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "again")
    assert type(again) is MplugOwl2ForSequenceClassification
    torch.testing.assert_close(logits(again), torch.load(tmp_path / "logits.pt"), rtol=0, atol=1e-6)
    if kind == "classifier":
        assert torch.equal(logits(again), logits(model))


# Adapters


@pytest.fixture
def adapted(causal, tmp_path):
    """A trained adapter with its head, and its folder."""
    base = MplugOwl2ForSequenceClassification.from_pretrained(causal, num_labels=3)
    config = LoraConfig(
        task_type="SEQ_CLS",
        target_modules=r".*language_model.*q_proj",
        modules_to_save=["score"],
        r=2,
    )
    adapted = get_peft_model(base, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    adapted.save_pretrained(tmp_path / "adapter")
    return adapted.eval(), tmp_path / "adapter"


def test_an_adapter_has_the_head_and_loads_in_every_way(adapted, causal):
    model, folder = adapted
    assert any("score" in name for name in load_file(folder / "adapter_model.safetensors"))
    expected = logits(model)

    def base():
        torch.manual_seed(3)  # another new head than the adapter's
        return MplugOwl2ForSequenceClassification.from_pretrained(causal, num_labels=3)

    assert not torch.allclose(logits(base()), expected)
    ways = {
        "PEFT": lambda: PeftModel.from_pretrained(base(), folder),
        "PEFT's auto class": lambda: AutoPeftModelForSequenceClassification.from_pretrained(
            folder, num_labels=3
        ),
        "from_pretrained": lambda: AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=3
        ),
    }
    for name, load in ways.items():
        torch.testing.assert_close(logits(load()), expected, msg=name)
    loaded = base()
    loaded.load_adapter(str(folder))
    torch.testing.assert_close(logits(loaded), expected)
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)
