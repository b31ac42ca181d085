"""Compare with golden sets, numbers of the original code, for one attention and dtype."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from owl2_hf.modeling.conversion_mplug_owl2 import to_ours
from tests.original import GoldenSet

from .frame import Setting

ROOT = Path(__file__).parents[2]
SETS = ("A", "B", "C", "C2", "S", "H1", "Q1")
LOGITS = ("c1_", "c2", "c3", "c4")  # beginnings of the names of cases
NUM_NEW = {"H1": 10, "Q1": 10}  # tokens of greedy answers, 12 elsewhere
# A key bias moves no attention, so its gradient is rounding noise around zero.
GRADIENT_FLOOR = 1e-2


class Attention(NamedTuple):
    """How attention is computed.

    Args:
        name: As for `attn_implementation`.
        backend: The kernel that sdpa must use; any if `None`.
        decoder_only: The vision side uses eager attention, for kernels that take few widths.
        smallest_head: Heads of the decoder must have this width.
    """

    name: str
    backend: SDPBackend | None = None
    decoder_only: bool = False
    smallest_head: int = 1

    def kernels(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.backend is None else sdpa_kernel([self.backend])

    def of_parts(self) -> str | dict[str, str]:
        if not self.decoder_only:
            return self.name
        return {"": "eager", "text_config": self.name}


def folders() -> list[Path]:
    """Where golden sets are looked for."""
    named = os.environ.get("OWL2_HF_GOLDEN")
    usual = [ROOT / "shared" / "golden", ROOT.parent / "shared" / "golden", ROOT / "tests/golden"]
    return [Path(named)] if named else usual


def find(name: str) -> Path | None:
    """The folder of a whole set: model and cases."""
    places = (folder / name for folder in folders())
    return next(
        (one for one in places if (one / "hf").is_dir() and (one / "cases.json").is_file()), None
    )


def not_here() -> str | None:
    """Why no golden numbers can be compared."""
    if any(map(find, SETS)):
        return None
    places = ", ".join(map(str, folders()))
    return f"golden numbers not found at {places}; set OWL2_HF_GOLDEN to their folder"


class Comparison:
    """Collects the errors of one set: largest difference over the largest expected number."""

    def __init__(self) -> None:
        self.errors: dict[str, float] = {}
        self.other_ids: list[str] = []
        self.refused: dict[str, str] = {}

    def compare(self, what: str, actual: Tensor, expected: Tensor, floor: float = 0.0) -> None:
        if actual.shape != expected.shape:
            raise ValueError(f"{what}: expected {tuple(expected.shape)}, got {tuple(actual.shape)}")
        difference = (actual.float() - expected.float()).abs().max()
        scale = expected.float().abs().max().clamp_min(floor)
        self.errors[what] = (difference / scale).item()

    def summary(self) -> dict[str, Any]:
        worst = max(self.errors, key=lambda name: _nan_last(self.errors[name]), default=None)
        return {
            "numbers compared": len(self.errors),
            "largest error": self.errors[worst] if worst else None,
            "of": worst,
            **({"other ids": self.other_ids} if self.other_ids else {}),
            **({"refused": self.refused} if self.refused else {}),
        }


def _nan_last(value: float) -> float:
    return float("inf") if value != value else value


def load(name: str, attention: Attention, setting: Setting, dtype: torch.dtype) -> GoldenSet:
    folder = find(name)
    golden = GoldenSet(folder, folder / "hf", setting.device, dtype=dtype)
    golden.model.set_attn_implementation(attention.of_parts())
    return golden


def logits(golden: GoldenSet, attention: Attention, found: Comparison) -> None:
    """Logits of prompts with and without images, in batches and long ones."""
    for name, case in _cases(golden, *LOGITS, "c9"):
        frames = case["images"].shape[1] if "c9" in name else None
        per_marker = frames and frames * golden.config.num_image_tokens
        inputs = golden.inputs(case, tokens_per_marker=per_marker)
        with _refusals(found, name), torch.no_grad(), attention.kernels():
            output = golden.model(**inputs)
            found.compare(f"{name}: logits", _text(golden, output.logits), case["logits"])
    for name, case in _cases(golden, "c11", "x12"):
        expected = case["last_logits"]
        with _refusals(found, name), torch.no_grad(), attention.kernels():
            output = golden.model(**golden.inputs(case), logits_to_keep=expected.shape[1])
            found.compare(f"{name}: logits", _text(golden, output.logits), expected)


def features(golden: GoldenSet, attention: Attention, found: Comparison) -> None:
    """Visual tokens of images."""
    is_reducer = golden.config.connector_type == "h_reducer"
    key = "connector_output" if is_reducer else "abstractor_last_hidden_state"
    for name, case in _cases(golden, "c1_one_image", "c2_two_images", "c2_three_crops"):
        with _refusals(found, name), torch.no_grad(), attention.kernels():
            made = golden.model.get_image_features(case["images"])
            found.compare(f"{name}: visual tokens", torch.stack(made.pooler_output), case[key])


def gradients(golden: GoldenSet, attention: Attention, found: Comparison) -> None:
    """Loss and gradients of a training step."""
    for name, case in _cases(golden, "c7"):
        golden.model.zero_grad()
        with _refusals(found, name), attention.kernels():
            golden.model(**golden.inputs(case)).loss.backward()
            ours = {key: weight.grad for key, weight in golden.model.named_parameters()}
            floor = 0.0 if golden.name == "H1" else GRADIENT_FLOOR
            for key in [key for key in case if key.startswith("grad.")]:
                # The conversion is linear: it maps gradients as it maps weights.
                original = key.removeprefix("grad."), case[key]
                for mapped, expected in to_ours(*original, golden.config):
                    found.compare(f"{name}: {mapped}", ours[mapped], expected, floor)
    for name, case in _cases(golden, "c5"):
        inputs = golden.inputs(case)
        # The original feeds a row of text alone an image that nobody looks at.
        inputs["pixel_values"] = inputs["pixel_values"][: int((case["input_ids"] == -200).sum())]
        with _refusals(found, name), torch.no_grad(), attention.kernels():
            found.compare(f"{name}: loss", golden.model(**inputs).loss, case["loss"].squeeze())


def answers(golden: GoldenSet, attention: Attention, found: Comparison) -> None:
    """Greedy ids, and the logits that they were chosen from."""
    for name, case in _cases(golden, "c6_", "c6b_", "c6c_", "c6d_"):
        with _refusals(found, name), attention.kernels():
            output = golden.model.generate(
                **golden.inputs(case),
                max_new_tokens=NUM_NEW.get(golden.name, 12),
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
            ids, expected = output.sequences, case["new_ids"]
            if ids[:, -expected.shape[1] :].tolist() != expected.tolist():
                found.other_ids.append(name)
            scores = _text(golden, torch.stack(output.logits, dim=1))
            found.compare(f"{name}: logits", scores, case["scores"])


def _cases(golden: GoldenSet, *beginnings: str) -> Iterator[tuple[str, dict[str, Tensor]]]:
    for name in golden.cases:
        if name.startswith(beginnings):
            yield name, golden.case(name)


def _text(golden: GoldenSet, logits: Tensor) -> Tensor:
    return logits[..., : golden.config.output_vocab_size]


class _refusals(AbstractContextManager[None]):
    """Notes a case that the kernel does not take; any other error is one of the step."""

    def __init__(self, found: Comparison, name: str):
        self.found, self.name = found, name

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:
        if not isinstance(error, RuntimeError) or "available kernel" not in str(error):
            return False
        self.found.refused[self.name] = " ".join(str(error).split())[:200]
        return True
