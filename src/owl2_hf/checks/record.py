"""Make the numbers that `owl2-hf check` compares with: `python -m owl2_hf.checks.record`.

Run it on a CPU, with code that agrees with the original (tests/test_golden.py), and only after a
change of the bundled model. A change of the code must not change these numbers.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..default import load_default
from .stored import CASES, FILE, MARGIN, all_logits, encode, image_features, kept_pixels
from .subject import Subject
from .versions import installed_versions


def record() -> dict[str, torch.Tensor]:
    """Name -> numbers of all cases, in float32."""
    model, processor = load_default(dtype=torch.float32, attn_implementation="eager")
    subject = Subject(model, processor, Path(tempfile.gettempdir()))
    tensors: dict[str, torch.Tensor] = {}
    for case in CASES:
        inputs = subject.place(encode(processor, case))
        new_ids, logits = subject.decode(inputs, case.num_new)
        logits[..., model.config.text_config.eos_token_id] = -torch.inf  # min_new_tokens forbids it
        first, second = logits[0].topk(2).values.unbind(-1)
        margin = (first - second).min().item()
        answer = processor.decode(new_ids[0])
        sys.stderr.write(f"{case.name}: {answer!r}, {margin:.2f} between the best two\n")
        assert margin > MARGIN, "another device could choose another token"
        found = {
            "input_ids": inputs["input_ids"][0],
            "new_ids": new_ids[0],
            "logits": all_logits(subject, inputs["input_ids"][0], new_ids[0], inputs),
        }
        if "pixel_values" in inputs:
            found["pixels"] = kept_pixels(inputs["pixel_values"])
            found["visual_tokens"] = image_features(subject, inputs["pixel_values"])
        for name, value in found.items():
            tensors[f"{case.name}/{name}"] = value.contiguous().clone()
    return tensors


if __name__ == "__main__":
    versions = {one.name: one.version for one in installed_versions()}
    save_file(record(), FILE, {"made_with": json.dumps(versions)})
