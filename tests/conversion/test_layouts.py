"""What is recognized as a checkpoint, and what is refused."""

import pytest

from owl2_hf.conversion import ConversionError, convert

from .conftest import (
    edit_config,
    refused,
)


def test_the_source_must_be_a_checkpoint_of_the_original(source, tmp_path):
    assert "is not a folder" in refused("convert", tmp_path / "nowhere", tmp_path / "target")
    edit_config(source, hidden_size=65)
    assert "hidden size (65)" in refused("convert", source, tmp_path / "target")
    edit_config(source, model_type="llama")
    assert (
        "expected model_type 'mplug_owl2' or 'mplug_owl2_1' or 'mplug_docowl', got 'llama'"
        in refused("convert", source, tmp_path / "target")
    )
    (source / "config.json").write_text("{")
    assert "not valid JSON" in refused("convert", source, tmp_path / "target")
    (source / "config.json").unlink()
    assert "config.json does not exist" in refused("convert", source, tmp_path / "target")


def test_a_source_without_weights_is_refused(source, tmp_path):
    (source / "pytorch_model.bin").unlink()
    with pytest.raises(ConversionError, match="contains no weights"):
        convert(source, tmp_path / "target")
