"""Names, options and fields that users write down change only on purpose.

A change that is meant goes into CHANGELOG, and `python -m tests.test_public_interface` writes
public_interface.json.
"""

import dataclasses
import inspect
import json
from pathlib import Path

import typer

import owl2_hf
from owl2_hf.cli import app
from owl2_hf.modeling.compatibility_mplug_owl2 import CACHE
from owl2_hf.scoring import PRESETS
from owl2_hf.training.adapters import LORA_PRESETS
from owl2_hf.training.components import TRAINABLE
from owl2_hf.training.recipe import AdapterRecipe, DataRecipe, Recipe, ScoreRecipe

FILE = Path(__file__).with_name("public_interface.json")
NAMES = {CACHE: "cache"}  # which older releases of transformers call past_key_values


def options(command, path: str = "owl2-hf") -> dict[str, list[str]]:
    """Command line -> its arguments and options, of a command and all below it."""
    if below := getattr(command, "commands", None):
        return {
            line: found
            for name, one in below.items()
            for line, found in options(one, f"{path} {name}").items()
        }
    names = ["/".join([*parameter.opts, *parameter.secondary_opts]) for parameter in command.params]
    return {path: sorted(names)}


def own_fields(config: type) -> list[str]:
    """Fields that a configuration has beyond those of every configuration."""
    common = {field.name for field in dataclasses.fields(owl2_hf.MplugOwl2Config.__mro__[1])}
    return sorted(field.name for field in dataclasses.fields(config) if field.name not in common)


def interface() -> dict:
    configs = [name for name in owl2_hf.__all__ if name.endswith("Config")]
    calls = {
        "MplugOwl2ForConditionalGeneration.forward": owl2_hf.MplugOwl2ForConditionalGeneration.forward
    }
    calls["MplugOwl2ForSequenceClassification.forward"] = (
        owl2_hf.MplugOwl2ForSequenceClassification.forward
    )
    calls["MplugOwl2ForConditionalGeneration.score"] = (
        owl2_hf.MplugOwl2ForConditionalGeneration.score
    )
    calls["MplugOwl2Processor"] = owl2_hf.MplugOwl2Processor.__init__
    return {
        "names": sorted(owl2_hf.__all__),
        "commands": options(typer.main.get_command(app)),
        "configurations": {name: own_fields(getattr(owl2_hf, name)) for name in sorted(configs)},
        "image processor": sorted(owl2_hf.MplugOwl2ImageProcessor.valid_kwargs.__annotations__),
        "calls": {
            name: [NAMES.get(p, p) for p in inspect.signature(call).parameters]
            for name, call in calls.items()
        },
        "recipes": {
            kind.__name__: [field.name for field in dataclasses.fields(kind)]
            for kind in (Recipe, DataRecipe, AdapterRecipe, ScoreRecipe)
        },
        "presets": {
            "scores": sorted(PRESETS),
            "lora": sorted(LORA_PRESETS),
            "trains": sorted(TRAINABLE),
        },
    }


def test_nothing_changed_by_accident():
    assert interface() == json.loads(FILE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    FILE.write_text(json.dumps(interface(), indent=1) + "\n", encoding="utf-8")
