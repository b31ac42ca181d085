"""What trains, how fast, and the table of it."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

import owl2_hf
from owl2_hf.training.adapters import lora_config
from owl2_hf.training.components import (
    COMPONENTS,
    TRAINABLE,
    Parameters,
    component_of,
    count_parameters,
    format_table,
    freeze_all_but,
    parameter_groups,
)


@pytest.fixture
def model():
    return owl2_hf.load_default(dtype=torch.float32)[0]


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_every_parameter_belongs_to_a_component(model):
    parts = {component_of(name) for name, _ in model.named_parameters()}
    assert parts == {"vision_tower", "connector", "visual_branch", "embeddings", "language_model"}


def test_the_visual_branch_does_not_change_text(model):
    branch = {name for name, _ in model.named_parameters() if component_of(name) == "visual_branch"}
    assert len(branch) == 4 * model.config.text_config.num_hidden_layers
    ids = torch.tensor([[1, 5, 6, 7]])
    before = model(ids).logits
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in branch:
                parameter.normal_()
    torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("preset", "frozen"),
    [
        ("pretrain", {"language_model", "embeddings"}),
        ("instruct", set()),
        ("frozen-vision", {"vision_tower"}),
        ("visual-branch", {"vision_tower", "language_model", "embeddings"}),
        ("connector", {"vision_tower", "language_model", "embeddings", "visual_branch"}),
    ],
)
def test_a_preset_trains_its_components_alone(model, preset, frozen):
    freeze_all_but(model, preset)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (component_of(name) not in frozen), name


def test_components_can_be_named_one_by_one(model):
    freeze_all_but(model, ["connector", "embeddings"])
    assert {component_of(name) for name in trainable(model)} == {"connector", "embeddings"}


def test_an_adapter_trains_whatever_the_preset(model):
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    freeze_all_but(adapted, "adapters")
    assert trainable(adapted) and all("lora_" in name for name in trainable(adapted))
    freeze_all_but(adapted, "connector")
    assert {component_of(name) for name in trainable(adapted)} == {"adapters", "connector"}


def test_presets_that_match_nothing_are_refused(model):
    with pytest.raises(ValueError, match="expected trains to be one of pretrain, instruct"):
        freeze_all_but(model, "stage1")
    with pytest.raises(
        ValueError, match=r"expected parts of vision_tower.* to train, got 'vision'"
    ):
        freeze_all_but(model, ["vision"])
    with pytest.raises(ValueError, match="trains='adapters' trains no parameter: add an adapter"):
        freeze_all_but(model, "adapters")
    with pytest.raises(ValueError, match="names vision_tower, connector, visual_branch"):
        freeze_all_but(torch.nn.Linear(2, 2), "pretrain")


def test_learning_rates_reach_the_optimizer(model):
    freeze_all_but(model, "instruct")
    rates = {"connector": 3e-4, "visual_branch": 2e-4}
    groups = parameter_groups(
        model, 1e-4, rates, None, 0.1, ["model.visual_abstractor.visual_fc.weight"]
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    seen = {}
    for group in torch.optim.AdamW(groups).param_groups:
        for parameter in group["params"]:
            seen[names[id(parameter)]] = (group["lr"], group["weight_decay"])
    assert seen.keys() == names_of(model)
    for name, (rate, decay) in seen.items():
        assert rate == rates.get(component_of(name), 1e-4), name
        assert decay == (0.1 if name == "model.visual_abstractor.visual_fc.weight" else 0.0), name


def names_of(model):
    return {name for name, _ in model.named_parameters()}


def test_layers_of_the_vision_encoder_learn_slower_from_top_to_bottom(model):
    freeze_all_but(model, "pretrain")
    groups = parameter_groups(model, 1.0, {"vision_tower": 2.0}, 0.5, 0.0, [])
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {names[id(parameter)]: group["lr"] for group in groups for parameter in group["params"]}
    tower = "model.vision_tower."
    assert rates[tower + "post_layernorm.weight"] == 2.0
    assert rates[tower + "layers.3.mlp.fc1.weight"] == 1.0
    assert rates[tower + "layers.0.self_attn.q_proj.bias"] == 0.125
    assert rates[tower + "embeddings.patch_embedding.weight"] == 0.0625
    assert rates["model.visual_abstractor.layers.0.mlp.up_proj.weight"] == 1.0


def test_a_learning_rate_for_what_does_not_train_is_refused(model):
    freeze_all_but(model, "connector")
    with pytest.raises(ValueError, match="learning_rates names vision_tower, which does not train"):
        parameter_groups(model, 1e-4, {"vision_tower": 1e-5}, None, 0.0, [])


def test_the_table_counts_every_parameter_once(model):
    freeze_all_but(model, "visual-branch")
    groups = parameter_groups(model, 1e-4, {"connector": 1e-3}, None, 0.0, [])
    rows = count_parameters(model, groups)
    assert sum(row.trainable + row.frozen for row in rows) == sum(
        p.numel() for p in model.parameters()
    )
    assert sum(row.trainable for row in rows) == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )
    by_name = {row.component: row for row in rows}
    assert by_name["connector"].learning_rates == (1e-3,) and by_name["connector"].frozen == 0
    assert (
        by_name["language_model"].learning_rates == () and by_name["language_model"].trainable == 0
    )
    table = format_table(rows)
    assert "connector" in table and "0.001" in table and "of the parameters train" in table


def test_a_connector_that_trains_beside_an_adapter_counts_as_the_connector(model):
    expected = sum(
        parameter.numel() for name, parameter in model.named_parameters() if "abstractor" in name
    )
    adapted = get_peft_model(model, lora_config(r=2, train_connector=True))
    for trains in ("adapters", "connector"):
        freeze_all_but(adapted, trains)
        rates = {"connector": 1e-3}
        rows = {
            row.component: row
            for row in count_parameters(
                adapted, parameter_groups(adapted, 1e-4, rates, None, 0, [])
            )
        }
        assert rows["connector"] == Parameters("connector", expected, 0, (1e-3,))
        assert rows["adapters"].learning_rates == (1e-4,)
        in_adapter = sum(
            parameter.numel() for name, parameter in adapted.named_parameters() if ".lora_" in name
        )
        assert (rows["adapters"].trainable, rows["adapters"].frozen) == (in_adapter, 0)
        assert not any(".original_module." in name for name in trainable(adapted))


def test_names_of_presets_and_components_agree():
    assert {part for parts in TRAINABLE.values() for part in parts} <= COMPONENTS.keys()
