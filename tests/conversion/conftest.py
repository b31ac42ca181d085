"""A checkpoint in the original's layout that a test may spoil."""

import json
import zipfile

import pytest
import torch
from typer.testing import CliRunner

from owl2_hf.cli import app
from owl2_hf.modeling import MplugOwl2ForConditionalGeneration
from owl2_hf.modeling.conversion_mplug_owl2 import original_key, to_original, to_ours

NORM = "model.norm.weight"


def read_shards(folder):
    state_dict = {}
    for shard in sorted(folder.glob("*.bin")):
        state_dict.update(torch.load(shard, weights_only=True))
    return state_dict


@pytest.fixture
def source(golden_dir, tmp_path):
    """A writable copy of the original's checkpoint of set A, as one file, without its tokenizer."""
    original = golden_dir("A") / "hf"
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_bytes((original / "config.json").read_bytes())
    torch.save(read_shards(original), folder / "pytorch_model.bin")
    return folder


def edit(source, change):
    path = source / "pytorch_model.bin"
    state_dict = torch.load(path, weights_only=True)
    change(state_dict)
    torch.save(state_dict, path)


def edit_config(source, **values):
    path = source / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def put(key, value):
    return lambda tensors: tensors.update({key: value})


def drop(key):
    return lambda tensors: tensors.pop(key)


def rewrite(path, change):
    """The same archive, each record after `change(name, content)`; the directory and all checksums
    are right.
    """
    with zipfile.ZipFile(path) as archive:
        records = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records:
            archive.writestr(name, change(name, content))


def halve(number):
    return lambda name, content: (
        content[: len(content) // 2] if name.endswith(f"/data/{number}") else content
    )


def load_state(folder, **kwargs):
    return MplugOwl2ForConditionalGeneration.from_pretrained(folder, **kwargs).state_dict()


def assert_same_bits(before, after):
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype, key
        assert torch.equal(tensor, after[key]), key


def command(*arguments):
    """The command line, as a user types it; fails with its output where it does."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result


def refused(*arguments):
    """The one line of a command that ends in a user's mistake."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("owl2-hf: ")]
    assert len(lines) == 1, result.stderr
    return lines[0]


def assert_names_are_covered(config, keys):
    """Every tensor of a published model has its place, by name and shape, every place is filled,
    and back.

    Args:
        keys: JSON file of the published names, each with its shape and dtype.
    """
    if not keys.is_file():
        pytest.skip("the key list of the published model is not here")
    with torch.device("meta"):
        model = MplugOwl2ForConditionalGeneration(config)
        expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
        published = {
            key: torch.Size(shape) for key, (shape, _) in json.loads(keys.read_text()).items()
        }
        converted = {}
        for key, shape in published.items():
            converted.update(to_ours(key, torch.empty(shape), config))
    assert {name: tensor.shape for name, tensor in converted.items()} == expected
    back = {}
    for name in converted:
        key, parts = original_key(name, config)
        back[key] = to_original(key, {part: converted[part] for part in parts}, config).shape
    # The model computes the rotary frequencies.
    assert back == {key: shape for key, shape in published.items() if "inv_freq" not in key}
