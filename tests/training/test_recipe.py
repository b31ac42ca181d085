"""Recipes: files, settings and mistakes in them."""

import dataclasses
import re
from typing import Any

import pytest
import yaml
from transformers import TrainingArguments

from owl2_hf.training.adapters import LORA_PRESETS
from owl2_hf.training.components import TRAINABLE
from owl2_hf.training.recipe import Recipe, load_recipe, shipped_recipes

NAMES = [
    "pretrain",
    "instruct",
    "lora",
    "qlora",
    "visual-branch",
    "score",
    "score-lora",
    "score-soft",
    "score-soft-lora",
]


@pytest.mark.parametrize("name", NAMES)
def test_shipped_recipes_load_by_name(name):
    recipe = load_recipe(name)
    assert recipe.trains in TRAINABLE
    assert recipe.adapter is None or recipe.adapter.preset in LORA_PRESETS
    assert recipe.trainer["learning_rate"] > 0
    assert sorted(shipped_recipes()) == sorted(NAMES)


def test_shipped_recipes_say_where_their_numbers_come_from():
    # Transformers' own.
    plain = {
        "max_grad_norm: 1.0",
        "adam_beta1: 0.9",
        "gradient_accumulation_steps: 1",
    }
    run_only = {"logging_steps", "save_steps", "save_total_limit", "dataloader_num_workers", "seed"}
    for name, path in shipped_recipes().items():
        for line in path.read_text().splitlines():
            setting = re.match(r"\s*(\w+): [\d.e-]+", line)
            if setting and setting[1] not in run_only and line.strip() not in plain:
                assert "#" in line, f"{name}: {line}"


def test_settings_replace_what_the_file_says(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("model: default\ndata: {train: a.json}\ntrainer: {learning_rate: 1e-3}\n")
    settings = [
        "trainer.max_steps=3",
        "data.train=[b.json, c.jsonl]",
        "adapter.r=4",
        "learning_rates.connector=2e-4",
    ]
    recipe = load_recipe(file, settings)
    assert recipe.trainer == {"learning_rate": 1e-3, "max_steps": 3}
    assert recipe.data.train == ["b.json", "c.jsonl"]
    assert recipe.adapter.r == 4 and recipe.adapter.preset == "language"
    assert recipe.learning_rates == {"connector": 2e-4}


def test_numbers_that_yaml_reads_as_text_are_numbers(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("trainer: {learning_rate: 1e-3}\nvision_layer_decay: 9e-1\n")
    recipe = load_recipe(file)
    assert recipe.trainer["learning_rate"] == 1e-3 and recipe.vision_layer_decay == 0.9


def test_a_recipe_survives_being_written(tmp_path):
    recipe = load_recipe("lora", ["model=default", "data.train=[a.json]"])
    (tmp_path / "again.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "again.yaml") == recipe


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trains: [", "is not valid YAML"),
        ("- a", "expected keys with values, got list"),
        ("modell: default", "unknown key 'modell', did you mean 'model'"),
        (
            "trainer: {learning_rat: 1}",
            "unknown key 'trainer.learning_rat', did you mean 'learning_rate'",
        ),
        ("data: {max_len: 3}", "unknown key 'data.max_len', did you mean 'max_length'"),
        (
            "data: {max_length: long}",
            "data: Field 'max_length' with value 'long'",
        ),
        ("image_size: true", "Field 'image_size' with value True"),
        ("data: file.json", "data: expected keys with values, got 'file.json'"),
        ("dtype: half", "dtype: expected one of float32, bfloat16, float16, got 'half'"),
        ("quantization: 4bit", "quantization needs an adapter"),
        (
            "quantization: 2bit\nadapter: {}",
            "quantization: expected one of None, 4bit, 8bit, got '2bit'",
        ),
        (
            "image_size: 448\nadapter: {r: 4}",
            "image_size changes the model, which an adapter cannot save",
        ),
        ("learning_rates: {connector: fast}", "Invalid key or value in dict 'learning_rates'"),
        (
            "vision_layer_decay: slow",
            "Field 'vision_layer_decay' with value 'slow'",
        ),
        ("trainer: {max_steps: many}", "trainer.max_steps: expected a number, got 'many'"),
        ("trainer: {learning_rate: true}", "trainer.learning_rate: expected a number, got True"),
        ("trainer: {bf16: 1}", "trainer.bf16: expected true or false, got 1"),
        ("trainer: {output_dir: x}", "unknown key 'trainer.output_dir'"),
    ],
)
def test_mistakes_are_named(tmp_path, text, message):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_recipe(file)


def test_unknown_recipes_and_settings_are_named():
    with pytest.raises(
        ValueError, match="stage3: expected a recipe file, or one of instruct, lora"
    ):
        load_recipe("stage3")
    with pytest.raises(ValueError, match="expected key=value, got 'trainer'"):
        load_recipe("lora", ["trainer"])
    with pytest.raises(ValueError, match="model is a value and has no keys"):
        load_recipe("lora", ["model=default", "model.size=3"])
    with pytest.raises(ValueError, match="the value is not valid YAML"):
        load_recipe("lora", ["data.train=["])


def test_an_empty_recipe_has_defaults():
    assert Recipe().trains == "instruct"
    assert yaml.safe_load(Recipe().to_yaml())["data"]["max_length"] == 2048


def test_checkpointing_has_the_name_that_the_installed_transformers_knows(monkeypatch):
    names = {"activation_checkpointing", "gradient_checkpointing"}
    older = dataclasses.make_dataclass(
        "TrainingArguments",
        [
            (one.name, Any, dataclasses.field(default=None))
            for one in dataclasses.fields(TrainingArguments)
            if one.name != "activation_checkpointing"
        ],
    )
    monkeypatch.setattr("owl2_hf.training.recipe.TrainingArguments", older)
    trainer = load_recipe("lora").trainer
    assert {name: trainer[name] for name in names & trainer.keys()} == {
        "gradient_checkpointing": True
    }
