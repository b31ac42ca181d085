"""The bundled model against numbers that were stored when it agreed with the original.

`record.py` makes the file. N: images of a prompt, P: its positions, A: tokens of the answer.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from ..default import default_pictures
from .subject import Found, Subject

FILE = Path(__file__).with_name("expected.safetensors")
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
    # Ten different tokens, and 0.24 between the best two at the closest choice.
    Case("long answer", ("emoji-banana", "shapes-0", "What kind of thing is it?"), 16),
)

PIXELS = 1e-5
# Largest absolute difference of visual tokens and logits to the stored ones, which are float32. Measured on a CPU with
# eager and sdpa attention, in the order of the dtypes: 5e-6, 0.065 and 0.0071. Other devices round in other orders.
ABSOLUTE = {torch.float32: 5e-5, torch.bfloat16: 0.25, torch.float16: 0.03}
# Between the best two tokens of a stored answer, so that rounding in any dtype chooses the same.
MARGIN = 0.2


def encode(processor: Any, case: Case) -> Any:
    """The model's inputs of a case, as a chat makes them."""
    pictures = default_pictures()
    parts = [
        {"type": "image", "image": str(pictures[part])} if part in pictures else {"type": "text", "text": part}
        for part in case.parts
    ]
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


def all_logits(subject: Subject, input_ids: Tensor, new_ids: Tensor, inputs: dict[str, Tensor]) -> Tensor:
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
            self.tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
            self.made_with = json.loads(file.metadata()["made_with"])
        self.absolute = ABSOLUTE[subject.model.dtype]

    def _worst(self, errors: dict[str, float], tolerance: float) -> Found:
        """NaN counts as the largest."""
        name = max(errors, key=lambda name: (errors[name] != errors[name], errors[name]))
        found = Found(errors[name], tolerance)
        return found if found.is_ok else found._replace(wrong=f"most for the prompt {name!r}")

    def _inputs(self, case: Case) -> dict[str, Tensor]:
        """What the processor makes of a case now."""
        return self.subject.place(encode(self.subject.processor, case))

    def token_ids(self) -> Found:
        errors = {}
        for case in CASES:
            ids, expected = encode(self.subject.processor, case)["input_ids"][0], self.tensors[f"{case.name}/input_ids"]
            same = min(len(ids), len(expected))
            errors[case.name] = int((ids[:same] != expected[:same]).sum()) + abs(len(ids) - len(expected))
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
            stored = {name: self.tensors[f"{case.name}/{name}"] for name in ("input_ids", "new_ids", "logits")}
            found = all_logits(self.subject, stored["input_ids"], stored["new_ids"], self._inputs(case))
            errors[case.name] = _largest(found, stored["logits"])
        return self._worst(errors, self.absolute)

    def answers(self) -> Found:
        """Greedy ids; and the logits of each step, as far as the ids before it are the stored ones."""
        errors, wrong = {}, ""
        for case in CASES:
            ids, new_ids = (self.tensors[f"{case.name}/{name}"] for name in ("input_ids", "new_ids"))
            expected = self.tensors[f"{case.name}/logits"][len(ids) - 1 : -1]  # (A, kept)
            pictures = {name: value for name, value in self._inputs(case).items() if name == "pixel_values"}
            inputs = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids[None]), **pictures}
            found, logits = self.subject.decode(self.subject.place(inputs), len(new_ids))
            differs = found[0].cpu() != new_ids
            steps = int(differs.int().argmax()) + 1 if differs.any() else len(new_ids)
            errors[case.name] = _largest(kept_logits(logits[0, :steps]), expected[:steps])
            if differs.any() and not wrong:
                said, meant = (self.subject.processor.decode(some).strip() for some in (found[0], new_ids))
                wrong = f"the prompt {case.name!r} is answered by {said!r}, not by {meant!r}"
        worst = self._worst(errors, self.absolute)
        return worst._replace(wrong=wrong or worst.wrong)


def _largest(found: Tensor, expected: Tensor) -> float:
    """Largest absolute difference; infinite where the shapes differ."""
    return (found - expected).abs().max().item() if found.shape == expected.shape else float("inf")
