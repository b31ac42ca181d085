"""Compare the bundled model with numbers stored when it agreed with the original.

`record.py` makes the file. N: images of a prompt, P: its positions, A: tokens of the answer.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import BatchFeature

from ..default import default_pictures
from ..processing.processing_mplug_owl2 import MplugOwl2Processor
from .subject import Found, Subject

FILE = Path(__file__).with_name("expected.safetensors")
IDS = ("input_ids", "new_ids")  # a prompt's (P,) and its answer's (A,)
KEPT_IDS = slice(None, 1400, 22)  # of the logits at a position
KEPT_PIXELS = slice(None, None, 29)


class Case(NamedTuple):
    """A chat turn whose numbers are stored; a part that names a bundled image stands for it."""

    name: str
    parts: tuple[str, ...]
    num_new: int


CASES = (
    Case("one image", ("emoji-tiger-face", "What is this?"), 3),
    Case("text only", ("What kind of thing is a banana?",), 3),
    Case("two images", ("emoji-wide-cat-face", "What is this?", "emoji-tiger-face"), 3),
    # Ten different tokens. The logits of the best two are at least 0.24 apart.
    Case("long answer", ("emoji-banana", "shapes-0", "What kind of thing is it?"), 16),
)

PIXELS = 1e-5
# Largest absolute difference to the stored visual tokens and logits, which are float32.
# Measured on a CPU with eager and sdpa attention: 5e-6 in float32, 0.065 in bfloat16, 0.0071 in
# float16. The rest is for devices that round in another order.
ABSOLUTE = {torch.float32: 5e-5, torch.bfloat16: 0.25, torch.float16: 0.03}
# The logits of the best two tokens of a stored answer are at least this far apart, so that rounding
# does not change the answer.
MARGIN = 0.2


def encode(processor: MplugOwl2Processor, case: Case) -> BatchFeature:
    """The model's inputs of a case, as a chat makes them."""
    pictures = default_pictures()
    parts: list[dict[str, str]] = []
    for part in case.parts:
        image = pictures.get(part)
        kind, value = ("image", str(image)) if image else ("text", part)
        parts.append({"type": kind, kind: value})
    return processor.apply_chat_template(
        [{"role": "user", "content": parts}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


def kept_pixels(pixel_values: Tensor) -> Tensor:
    return pixel_values.flatten()[KEPT_PIXELS].float()


def image_features(subject: Subject, pixel_values: Tensor) -> Tensor:
    """(N, Q + 1, D) visual tokens."""
    with torch.no_grad():
        features = subject.model.get_image_features(pixel_values, return_dict=True).pooler_output
    return torch.stack(list(features)).cpu().float()


def kept_logits(logits: Tensor) -> Tensor:
    """(..., V) -> (..., kept)."""
    return logits[..., KEPT_IDS].detach().cpu().float()


def all_logits(
    subject: Subject,
    input_ids: Tensor,
    new_ids: Tensor,
    inputs: dict[str, Tensor],
) -> Tensor:
    """(P + A, kept) logits of a prompt (P,) and its answer (A,), read as a whole."""
    ids = torch.cat((input_ids, new_ids))[None].to(subject.model.device)
    pictures = {"pixel_values": inputs["pixel_values"]} if "pixel_values" in inputs else {}
    with torch.no_grad():
        return kept_logits(subject.model(input_ids=ids, use_cache=False, **pictures).logits[0])


class Stored:
    """The stored numbers, and what this machine makes of the same prompts."""

    def __init__(self, subject: Subject):
        self.subject = subject
        with safe_open(FILE, "pt") as file:
            self.tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        self.absolute = ABSOLUTE[subject.model.dtype]

    def _worst(self, errors: dict[str, float], tolerance: float) -> Found:
        """NaN counts as the largest."""
        name = max(errors, key=lambda name: (errors[name] != errors[name], errors[name]))
        found = Found(errors[name], tolerance)
        return (
            found
            if found.is_ok
            else found._replace(wrong=f"the difference is largest for the prompt {name!r}")
        )

    def _inputs(self, case: Case) -> dict[str, Tensor]:
        """What the processor makes of a case now."""
        return self.subject.place(encode(self.subject.processor, case))

    def token_ids(self) -> Found:
        errors: dict[str, float] = {}
        for case in CASES:
            ids = encode(self.subject.processor, case)["input_ids"][0]
            expected = self.tensors[f"{case.name}/input_ids"]
            same = min(len(ids), len(expected))
            different = int((ids[:same] != expected[:same]).sum())
            errors[case.name] = different + abs(len(ids) - len(expected))
        return self._worst(errors, 0)

    def pixels(self) -> Found:
        errors = {}
        for case in CASES:
            if (expected := self.tensors.get(f"{case.name}/pixels")) is not None:
                found = kept_pixels(encode(self.subject.processor, case)["pixel_values"])
                errors[case.name] = _largest(found, expected)
        return self._worst(errors, PIXELS)

    def visual_tokens(self) -> Found:
        errors = {}
        for case in CASES:
            if (expected := self.tensors.get(f"{case.name}/visual_tokens")) is not None:
                found = image_features(self.subject, self._inputs(case)["pixel_values"])
                errors[case.name] = _largest(found, expected)
        return self._worst(errors, self.absolute)

    def logits(self) -> Found:
        errors = {}
        for case in CASES:
            ids, new_ids = (self.tensors[f"{case.name}/{name}"] for name in IDS)
            found = all_logits(self.subject, ids, new_ids, self._inputs(case))
            errors[case.name] = _largest(found, self.tensors[f"{case.name}/logits"])
        return self._worst(errors, self.absolute)

    def answers(self) -> Found:
        """Greedy ids, and the logits of each step whose ids before it are the stored ones."""
        errors, wrong = {}, ""
        for case in CASES:
            ids, new_ids = (self.tensors[f"{case.name}/{name}"] for name in IDS)
            expected = self.tensors[f"{case.name}/logits"][len(ids) - 1 : -1]  # (A, kept)
            inputs = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids[None])}
            if len(pixels := self._inputs(case).get("pixel_values", ())):
                inputs["pixel_values"] = pixels
            found, logits = self.subject.decode(self.subject.place(inputs), len(new_ids))
            differs = found[0].cpu() != new_ids
            steps = int(differs.int().argmax()) + 1 if differs.any() else len(new_ids)
            errors[case.name] = _largest(kept_logits(logits[0, :steps]), expected[:steps])
            if differs.any() and not wrong:
                decode = self.subject.processor.decode
                said, meant = decode(found[0]).strip(), decode(new_ids).strip()
                wrong = f"expected the answer {meant!r} to the prompt {case.name!r}, got {said!r}"
        worst = self._worst(errors, self.absolute)
        return worst._replace(wrong=wrong or worst.wrong)


def _largest(found: Tensor, expected: Tensor) -> float:
    """Largest absolute difference; infinite where the shapes differ."""
    return (found - expected).abs().max().item() if found.shape == expected.shape else float("inf")
