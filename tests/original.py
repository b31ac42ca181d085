"""The original's numbers, and its inputs in this package's terms: one `-200` marker there is a run of
placeholders here.
"""

import json

import torch
from safetensors.torch import load_file
from torch import Tensor

from owl2_hf.modeling import MplugOwl2ForConditionalGeneration

MARKER = -200


def expand_markers(
    input_ids: Tensor, config, labels=None, attention_mask=None, tokens_per_marker=None
):
    """(B, L) original ids -> model inputs with every marker expanded, rows padded on the right.

    Args:
        tokens_per_marker: Visual tokens behind one marker, where it is not one image.
    """
    run = tokens_per_marker or config.num_image_tokens
    rows, kept_labels = [], []
    for index, row in enumerate(input_ids):
        keep = slice(None) if attention_mask is None else attention_mask[index].bool()
        ids, new_labels = [], []
        row_labels = labels[index] if labels is not None else torch.full_like(row, -100)
        for token, label in zip(row[keep].tolist(), row_labels[keep].tolist(), strict=True):
            is_image = token == MARKER
            ids += [config.image_token_id] * run if is_image else [token]
            new_labels += [-100] * run if is_image else [label]
        rows.append(ids)
        kept_labels.append(new_labels)
    return pad(rows, kept_labels if labels is not None else None, side="right")


def pad(
    rows: list[list[int]], labels: list[list[int]] | None = None, side: str = "left"
) -> dict[str, Tensor]:
    """Rows of ids -> a padded batch with its attention mask."""
    width = max(map(len, rows))

    def fill(row, value):
        padding = [value] * (width - len(row))
        return padding + row if side == "left" else row + padding

    batch = {
        "input_ids": torch.tensor([fill(row, 0) for row in rows]),
        "attention_mask": torch.tensor([fill([1] * len(row), 0) for row in rows]),
    }
    if labels is not None:
        batch["labels"] = torch.tensor([fill(row, -100) for row in labels])
    return batch


class GoldenSet:
    """A golden set with its model.

    Args:
        folder: The set, with cases.json and cases.safetensors.
        weights: Folder of the model, converted or as the original wrote it.
        kwargs: As for `from_pretrained`.
    """

    def __init__(self, folder, weights, device="cpu", **kwargs):
        self.model = MplugOwl2ForConditionalGeneration.from_pretrained(weights, **kwargs)
        self.model = self.model.eval().to(device)
        self.config = self.model.config
        self.name = folder.name
        self.tensors = load_file(folder / "cases.safetensors", device=str(device))
        self.cases = json.loads((folder / "cases.json").read_text())["cases"]

    def case(self, name):
        prefix = name + "/"
        return {
            key.removeprefix(prefix): value
            for key, value in self.tensors.items()
            if key.startswith(prefix)
        }

    def inputs(self, case, **kwargs):
        inputs = expand_markers(
            case["input_ids"], self.config, case.get("labels"), case.get("attention_mask"), **kwargs
        )
        inputs = {name: value.to(self.model.device) for name, value in inputs.items()}
        if "images" in case and (inputs["input_ids"] == self.config.image_token_id).any():
            images = case["images"].reshape(-1, *case["images"].shape[-3:])
            inputs["pixel_values"] = images.to(self.model.dtype)
        return inputs
