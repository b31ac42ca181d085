"""Change the image size of a model for further training, such as the paper's 224 and 448 pixels."""

import copy

from torch import nn

from ..conversion.stock_vision import resize_position_table
from ..modeling import MplugOwl2Config, MplugOwl2ForConditionalGeneration
from ..processing import MplugOwl2Processor


def with_image_size(config: MplugOwl2Config, image_size: int) -> MplugOwl2Config:
    """The configuration of the same model for images of another size.

    Args:
        image_size: Side of an image in pixels.

    Raises:
        ValueError: If it is no multiple of the patch size.
    """
    patch_size = config.vision_config.patch_size
    if image_size < patch_size or image_size % patch_size:
        raise ValueError(
            f"expected an image_size that is a multiple of {patch_size} pixels, got {image_size}."
        )
    values = copy.deepcopy(config.to_dict())
    values["vision_config"]["image_size"] = image_size
    for name in ("abstractor_config", "h_reducer_config"):
        if values.get(name):
            values[name]["grid_size"] = image_size // patch_size
    return type(config).from_dict(values)


def set_image_size(
    model: MplugOwl2ForConditionalGeneration, processor: MplugOwl2Processor, image_size: int
) -> MplugOwl2ForConditionalGeneration:
    """A model of the same weights for images of another size; the processor is changed in place.

    Learned positions are resized by bicubic interpolation, those of the abstractor's keys computed
    anew.

    Args:
        image_size: Side of an image in pixels.

    Raises:
        ValueError: If it is no multiple of the patch size.
    """
    own = model.config.vision_config
    if image_size == own.image_size:
        return model
    config = with_image_size(model.config, image_size)
    state = {
        name: value
        for name, value in model.state_dict().items()
        if not name.endswith("k_pos_embed")
    }
    table = "model.vision_tower.embeddings.position_embedding"
    if own.use_cls_token:
        state[table] = resize_position_table(
            state[table], own.grid_size, config.vision_config.grid_size
        )
    resized = type(model)._from_config(config, dtype=model.dtype)
    result: nn.modules.module._IncompatibleKeys = resized.load_state_dict(state, strict=False)
    if (
        lost := [name for name in result.missing_keys if not name.endswith("k_pos_embed")]
        + result.unexpected_keys
    ):
        raise AssertionError(f"parameters changed that image_size does not affect: {lost[:3]}")
    resized.generation_config = model.generation_config
    processor.image_processor.size = {"height": image_size, "width": image_size}
    processor.num_image_tokens = config.num_image_tokens
    return resized
