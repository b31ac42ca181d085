"""The model to check, its prompts, and the difference of two results.

B: rows of a batch, A: tokens of an answer, V: vocabulary.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..default import default_pictures
from ..modeling.modeling_mplug_owl2 import MplugOwl2ForConditionalGeneration
from ..processing.processing_mplug_owl2 import MplugOwl2Processor

NUM_NEW = 12  # tokens of an answer: enough to see that a cache is lost

# Prompts that any model of the family takes, of unequal lengths.
PROMPTS = (
    ("USER: What kind of thing is a banana? Answer in one word. ASSISTANT:", ()),
    ("USER: {image}What is this? ASSISTANT:", ("emoji-tiger-face",)),
    ("USER: {image}{image}Which of them is yellow? ASSISTANT:", ("emoji-banana", "shapes-0")),
)

# Largest norm of the difference of two vectors of logits, over their norm. Measured on a CPU:
# - the bundled model: 5e-7 in float32, 0.009 in bfloat16, 0.0011 in float16
# - 32 layers of random weights: 5e-6, 0.072, 0.0085
RELATIVE = {torch.float32: 5e-5, torch.bfloat16: 0.15, torch.float16: 0.03}


class Skipped(Exception):
    """A check cannot run; the text says why."""


class Found(NamedTuple):
    """What a check saw.

    Args:
        wrong: What is wrong besides the number; nothing where empty.
        detail: What else is worth knowing.
    """

    difference: float | None
    tolerance: float | None
    wrong: str = ""
    detail: str = ""

    @property
    def is_ok(self) -> bool:
        is_small = self.difference is None or self.difference <= (self.tolerance or 0)
        return is_small and not self.wrong  # NaN is not small


@dataclass
class Subject:
    """A model, its processor, and a folder for what the checks write."""

    model: MplugOwl2ForConditionalGeneration
    processor: MplugOwl2Processor
    scratch: Path
    _saved: Path | None = field(default=None, init=False)

    @property
    def image_options(self) -> dict[str, Any]:
        """One crop an image where images are cut into crops, so that prompts fit the context."""
        is_cropped = self.processor.image_processor.image_aspect_ratio == "anchors"
        return {"crop_anchors": "grid_1"} if is_cropped else {}

    @property
    def tolerance(self) -> float:
        return RELATIVE[self.model.dtype]

    def rows(self, *numbers: int, **kwargs: Any) -> dict[str, Tensor]:
        """One batch of some of `PROMPTS`, padded as the processor pads unless `kwargs` differ."""
        pictures = default_pictures()
        image = self.processor.image_token
        text = [PROMPTS[number][0].format(image=image) for number in numbers]
        images = [[str(pictures[name]) for name in PROMPTS[number][1]] for number in numbers]
        options = {"padding": True, "return_tensors": "pt", **kwargs}
        if any(images):
            options |= {"images": images, **self.image_options}
        return self.place(self.processor(text=text, **options))

    def place(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same inputs on the model's device, pixels in its dtype."""
        device, dtype = self.model.device, self.model.dtype
        return {
            name: value.to(device, dtype) if value.is_floating_point() else value.to(device)
            for name, value in inputs.items()
            if isinstance(value, Tensor)
        }

    def real(self, logits: Tensor) -> Tensor:
        """Logits (..., V) without those of ids that are never predicted, as float32 on the CPU."""
        size = self.model.config.output_vocab_size or logits.shape[-1]
        logits = logits[..., :size].detach().cpu().float()
        reserved = self.model.config.image_token_id
        return torch.cat((logits[..., :reserved], logits[..., reserved + 1 :]), dim=-1)

    def whole(self, inputs: Mapping[str, Tensor], new_ids: Tensor) -> Tensor:
        """Logits behind a prompt and behind each token that follows it, made without a cache.

        Args:
            inputs: One prompt without padding.
            new_ids: (A,)

        Returns:
            (A + 1, V)
        """
        ids = torch.cat((inputs["input_ids"], new_ids[None].to(self.model.device)), dim=1)
        rest = {"pixel_values": inputs["pixel_values"]} if "pixel_values" in inputs else {}
        with torch.no_grad():
            logits = self.model(
                input_ids=ids,
                use_cache=False,
                logits_to_keep=len(new_ids) + 1,
                **rest,
            ).logits
        return self.real(logits[0])

    def decode(
        self,
        inputs: Mapping[str, Tensor],
        num_new: int,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Greedy answers of `num_new` tokens by `generate`: ids (B, A) and logits (B, A, V).

        Raises:
            Skipped: The context of the model is too short.
        """
        needed = inputs["input_ids"].shape[1] + num_new
        context = self.model.config.text_config.max_position_embeddings
        if needed > context:
            raise Skipped(f"it needs a context of {needed} tokens, the model has {context}")
        output = self.model.generate(
            **inputs,
            min_new_tokens=num_new,
            max_new_tokens=num_new,
            do_sample=False,
            num_beams=1,
            output_logits=True,
            return_dict_in_generate=True,
            **kwargs,
        )
        return output.sequences[:, -num_new:], torch.stack(output.logits, dim=1)

    def decoding_error(self, numbers: tuple[int, ...], **kwargs: Any) -> float:
        """How far the answers of a batch are from each of its rows read alone, as a whole."""
        return self.whole_error(numbers, *self.decode(self.rows(*numbers), NUM_NEW, **kwargs))

    def whole_error(self, numbers: tuple[int, ...], new_ids: Tensor, logits: Tensor) -> float:
        """How far `logits` (B, A, V) of `new_ids` (B, A) are from each row read as a whole."""
        errors = [
            relative_error(self.real(logits[row]), self.whole(self.rows(number), new_ids[row, :-1]))
            for row, number in enumerate(numbers)
        ]
        return max(errors, key=lambda error: (error != error, error))  # NaN first

    def saved(self) -> Path:
        """A folder that the model and its processor were saved to, made at the first call.

        Raises:
            Skipped: There is no room for a second copy.
        """
        if self._saved is None:
            needed = sum(map(num_bytes, self.model.state_dict().values()))
            rooms = {
                "free on the disk": shutil.disk_usage(self.scratch).free,
                **_free_memory(self.model.device),
            }
            for what, room in rooms.items():
                if room < 1.1 * needed:
                    sizes = f"{needed / 1e9:.1f} GB, {room / 1e9:.1f} GB are {what}"
                    raise Skipped(f"a second copy needs {sizes}")
            folder = self.scratch / "saved"
            self.model.save_pretrained(folder)
            self.processor.save_pretrained(str(folder))
            self._saved = folder
        return self._saved


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest norm of the difference over the expected norm, over all vectors (..., V)."""
    return ((actual - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-9)).max().item()


def num_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor; of a quantised one, those of its parts."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(num_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


def _free_memory(device: torch.device) -> dict[str, int]:
    """Bytes that are free where a second copy would lie, as far as this machine tells."""
    if device.type == "cuda":
        return {f"free on {device}": torch.cuda.mem_get_info(device)[0]}
    table = Path("/proc/meminfo")
    if device.type != "cpu" or not table.is_file():
        return {}
    values = dict(line.split(":") for line in table.read_text(encoding="utf-8").splitlines())
    available = values.get("MemAvailable")
    return {} if available is None else {"free in memory": 1024 * int(available.split()[0])}
