"""Export the vision encoder and connector to ONNX.

N: images, Q + 1: visual tokens of one image, D: width of the language model.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# Largest difference that rounding explains, of the largest value.
TOLERANCE = 1e-4


class _VisionSide(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(N, 3, H, W) normalised pixels -> (N, Q + 1, D) visual tokens."""
        return self.model.get_image_features(
            pixel_values=pixel_values, return_dict=True
        ).pooler_output


def export_vision(name: str, target: Path) -> float:
    """Write the vision encoder and connector of a model to an ONNX file.

    The weights are float32. The file takes any number of images.

    Args:
        name: Folder or Hub id of a model.
        target: The file to write. Weights above 1.5 GiB go to a second file, with `.data` added to
            the name.

    Returns:
        The largest difference between the outputs of the file and of torch for random images.

    Raises:
        ValueError: If packages are missing, the file exists, the model does not load, or the
            outputs of the file differ from torch's.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401, torch exports with it
    except ImportError:
        raise ValueError(
            "the export needs onnx, onnxscript and onnxruntime: pip install 'owl2_hf[export]'."
        ) from None
    from transformers import AutoModel

    from .naming import naming_model

    if target.exists():
        raise ValueError(f"{target} exists: remove it, or choose another name.")
    with naming_model(name):
        model = AutoModel.from_pretrained(name)
    del model.language_model  # the largest part, before the rest becomes float32
    vision = model.config.vision_config
    side = _VisionSide(model.float()).eval()
    images = torch.randn(3, vision.num_channels, vision.image_size, vision.image_size)
    with torch.no_grad():
        program = torch.onnx.export(
            side,
            (images[:2],),
            dynamo=True,
            verbose=False,
            input_names=["pixel_values"],
            output_names=["image_features"],
            dynamic_shapes=({0: torch.export.Dim("images")},),
        )
        expected = torch.stack(list(side(images))).numpy()
    assert program is not None  # with dynamo=True it is returned
    program.save(target)
    session = onnxruntime.InferenceSession(target, providers=["CPUExecutionProvider"])
    (found,) = session.run(["image_features"], {"pixel_values": images.numpy()})
    difference = float(np.abs(found - expected).max())
    if not difference <= TOLERANCE * float(np.abs(expected).max()):
        raise ValueError(f"{target} differs from torch by {difference:.1e}: do not use it.")
    return difference
