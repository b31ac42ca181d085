"""Another size of images."""

import pytest
import torch

import owl2_hf
from owl2_hf.conversion.stock_vision import resize_position_table
from owl2_hf.modeling.modeling_mplug_owl2_abstractor import image_position_table
from owl2_hf.training.resolution import set_image_size


def test_the_position_table_is_resized_and_all_else_stays(tmp_path):
    model, processor = owl2_hf.load_default(dtype=torch.float32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    larger = set_image_size(model, processor, 96)
    table = "model.vision_tower.embeddings.position_embedding"
    changed = {
        name
        for name, value in larger.state_dict().items()
        if value.shape != before[name].shape or not torch.equal(value, before[name])
    }
    keys = {name for name in before if name.endswith("k_pos_embed")}
    assert changed == {table, *keys}
    torch.testing.assert_close(
        larger.state_dict()[table], resize_position_table(before[table], 8, 12)
    )
    for name in keys:
        torch.testing.assert_close(
            larger.state_dict()[name],
            image_position_table(larger.config.abstractor_config),
            rtol=0,
            atol=0,
        )
    picture = str(next(iter(owl2_hf.default_pictures().values())))
    inputs = processor(
        images=picture, text="USER: <|image|>What is this? ASSISTANT:", return_tensors="pt"
    )
    assert inputs["pixel_values"].shape == (1, 3, 96, 96)
    logits = larger(**inputs).logits
    larger.save_pretrained(tmp_path)
    again = owl2_hf.MplugOwl2ForConditionalGeneration.from_pretrained(tmp_path)
    torch.testing.assert_close(again(**inputs).logits, logits, rtol=0, atol=0)


def test_the_same_size_changes_nothing():
    model, processor = owl2_hf.load_default()
    assert set_image_size(model, processor, 64) is model


def test_an_image_size_must_be_a_multiple_of_the_patch_size():
    model, processor = owl2_hf.load_default()
    with pytest.raises(
        ValueError, match="expected an image_size that is a multiple of 8 pixels, got 60"
    ):
        set_image_size(model, processor, 60)
