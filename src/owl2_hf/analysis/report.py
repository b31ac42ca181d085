"""Analyse one model with one image and question: its answer, its attention, and its norms.

N: squares that the image becomes, S: side of a square, Q: learnable queries, G: patches along one
side.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..limits import Context
from ..modeling.configuration_mplug_owl2 import MplugOwl2Config
from ..modeling.modeling_mplug_owl2 import MplugOwl2ForConditionalGeneration
from ..processing.image_processing_mplug_owl2 import MplugOwl2ImageProcessor
from ..processing.processing_mplug_owl2 import MplugOwl2Processor
from .attention import attention_mass, query_maps, uniform_attention
from .findings import Findings, Run
from .recording import DecoderRecorder, branch_weights

JSON_NAME = "analysis.json"
_OWN_FILES = (JSON_NAME, "attention.png", "norms.png", "query_maps*.png")
MODEL_TYPES = ("mplug_owl2", "mplug_owl2_1")


@dataclass
class Analysis(Findings):
    """The result of `analyze`: numbers, described at `Findings`, and figures."""

    def save(
        self, folder: str | Path, overwrite: bool = False
    ) -> dict[str, tuple[int, int] | None]:
        """Write analysis.json, attention.png, norms.png and the query maps. Needs matplotlib.

        Args:
            folder: Must not exist, or be empty.
            overwrite: Replace an analysis in the folder. Other files stay.

        Returns:
            Name of each file -> width and height in pixels, for images.

        Raises:
            ValueError: If the folder is in use, or matplotlib is not installed.
        """
        folder = Path(folder)
        check_target(folder, overwrite)
        from .plots import draw

        figures = draw(self)
        folder.mkdir(parents=True, exist_ok=True)
        for pattern in _OWN_FILES:
            for old in folder.glob(pattern):
                old.unlink()
        files: dict[str, tuple[int, int] | None] = {JSON_NAME: None}
        text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False)
        (folder / JSON_NAME).write_text(text + "\n", encoding="utf-8")
        for name, figure in figures.items():
            figure.savefig(folder / name)
            width, height = figure.canvas.get_width_height()
            files[name] = width, height
        return files


def analyze(
    model: MplugOwl2ForConditionalGeneration,
    processor: MplugOwl2Processor,
    image: Any,
    question: str,
    *,
    answer: str | None = None,
    unrelated: Any = None,
    without: tuple[Any, Any] | None = None,
    max_new_tokens: int = 64,
    name: str | None = None,
) -> Analysis:
    """Ask a question about an image, and measure what the model attends to while it answers.

    The model's training mode and attention implementation are restored afterwards.

    Args:
        model: `MplugOwl2ForConditionalGeneration`, also with LoRA adapters.
        processor: Its processor.
        image: One image, in any form that the processor takes.
        question: The question to ask.
        answer: Answer whose attention is measured. Default: the answer that the model generates.
        unrelated: An image that has nothing to do with the question. The analysis is repeated with
            this image, and without an image.
        without: A second model and its processor to compare with, usually one without the
            modality-adaptive module. It reads the same answer.
        max_new_tokens: Longest generated answer, in tokens.
        name: Name of the model in the report. Default: what it was loaded from.

    Raises:
        ValueError: If the model is of another family, the image cannot be used, or the answer is
            empty.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    _check(model, answer, max_new_tokens)
    pictures = {"given": image}
    if unrelated is not None:
        pictures.update(unrelated=unrelated, none=None)
    is_generated, runs = answer is None, []
    with _prepared(model):
        for kind, picture in pictures.items():
            reader = _Reader(model, processor, picture, question)
            generated = reader.generate(max_new_tokens)
            answer = generated if answer is None else answer
            runs.append(reader.read(answer, kind, generated))
        weights = branch_weights(model.model.language_model)
    assert answer is not None
    found = Analysis(
        name or model.name_or_path or type(model).__name__,
        model.config.text_config.has_modality_adaptive_module,
        question,
        answer,
        is_generated,
        runs,
        weights,
        _notes(model.config),
    )
    if without is not None:
        settings = {"answer": answer, "unrelated": unrelated, "max_new_tokens": max_new_tokens}
        found.compare_with(analyze(*without, image, question, **settings))
    return found


def check_target(folder: str | Path, overwrite: bool = False) -> None:
    """Refuse a folder that an analysis may not be written into.

    Raises:
        ValueError: If it is a file, or has files and `overwrite` is not given.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: choose a folder for the analysis.")
    if not overwrite and folder.is_dir() and any(folder.iterdir()):
        raise ValueError(
            f"{folder} is not empty: choose another folder, or replace the analysis in it "
            "(--overwrite)."
        )


class _Reader:
    """One model in front of one image and question."""

    def __init__(
        self,
        model: MplugOwl2ForConditionalGeneration,
        processor: MplugOwl2Processor,
        image: Any,
        question: str,
    ):
        self.model, self.processor = model, processor
        self.image, self.picture = image, None if image is None else _open(processor, image)
        parts: list[dict[str, Any]] = [{"type": "text", "text": question}]
        if self.picture is not None:
            parts.insert(0, {"type": "image", "image": self.picture})
        self.messages: list[dict[str, Any]] = [{"role": "user", "content": parts}]
        self.prompt = self._tokenize(self.messages, add_generation_prompt=True)

    def _tokenize(self, messages: list[dict[str, Any]], **kwargs: Any) -> Any:
        inputs = self.processor.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_tensors="pt", **kwargs
        )
        return inputs.to(self.model.device, dtype=self.model.dtype)

    def generate(self, max_new_tokens: int) -> str:
        length = self.prompt["input_ids"].shape[1]
        max_new_tokens = min(max_new_tokens, Context(self.model, self.processor).room(length))
        ids = self.model.generate(
            **self.prompt, do_sample=False, num_beams=1, max_new_tokens=max_new_tokens
        )
        return self.processor.decode(ids[0, length:], skip_special_tokens=True).strip()

    def read(self, answer: str, kind: str, generated: str) -> Run:
        """The forward pass over question and answer."""
        inputs = self._tokenize([*self.messages, {"role": "assistant", "content": answer}])
        ids = inputs["input_ids"]
        indicators = ids.eq(self.model.config.image_token_id).long()
        start = _common_length(self.prompt["input_ids"][0], ids[0])
        groups = _query_groups(indicators, start)
        recorder = DecoderRecorder(indicators, groups)
        pixels = inputs.get("pixel_values")
        encoded, looked_at = self._encode(pixels)
        with recorder.watching(self.model.model.language_model):
            logits = self.model(
                input_ids=ids,
                attention_mask=inputs["attention_mask"],
                mm_token_type_ids=indicators,
                mm_encoder_outputs=encoded,
                logits_to_keep=ids.shape[1] - start + 1,
                use_cache=False,
            ).logits[0, :-1]
        logprobs = logits.float().log_softmax(-1).gather(1, ids[0, start:, None].to(logits.device))
        num_visual = int(indicators.sum())
        run = Run(
            kind,
            None if self.image is None else _name(self.image),
            generated,
            float(logprobs.mean()),
            {
                "text": ids.shape[1] - num_visual,
                "visual": num_visual,
                "answer": ids.shape[1] - start,
            },
            recorder.attention,
            _uniform_shares(indicators, groups),
            recorder.norms,
        )
        if self.picture is not None:
            run.squares = _as_seen(pixels, self.processor.image_processor)
            if self.processor.image_processor.image_aspect_ratio == "resize":
                run.aspect_ratio = self.picture.height / self.picture.width
        if looked_at is not None:
            found = query_maps(looked_at, self.model.config.vision_config.grid_size)
            run.query_maps = found.maps.numpy()
            shares = found.shares.mean(1).T.tolist()
            run.query_shares = dict(zip(("queries", "class_token", "patches"), shares, strict=True))
        return run

    def _encode(
        self, pixels: Tensor | None
    ) -> tuple[dict[str, Any] | None, tuple[Tensor, ...] | None]:
        """The images' visual tokens, and the attention of the learnable queries where there are
        any.

        The vision encoder's own weights are not asked for: of a 7B model they take gigabytes.
        """
        if pixels is None:
            return None, None
        base = self.model.model
        features = base.vision_tower(pixels, return_dict=True).last_hidden_state
        has_queries = self.model.config.connector_type == "abstractor"
        connected = base.connector(
            features, **({"output_attentions": True} if has_queries else {}), return_dict=True
        )
        visual_tokens = list(connected.last_hidden_state)
        return {
            "image": BaseModelOutputWithPooling(pooler_output=visual_tokens)
        }, connected.attentions


@contextmanager
def _prepared(model: MplugOwl2ForConditionalGeneration) -> Iterator[None]:
    """Evaluation mode, no gradients, and eager attention where weights are read; afterwards
    everything as it was.
    """
    config = model.config
    parts = ["text_config"] + (
        ["abstractor_config"] if config.connector_type == "abstractor" else []
    )
    before = {part: getattr(config, part)._attn_implementation for part in parts}
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        model.set_attn_implementation(dict.fromkeys(parts, "eager"))
        with torch.no_grad():
            yield
    finally:
        model.set_attn_implementation(before)
        for module, training in modes:
            module.training = training


def _check(
    model: MplugOwl2ForConditionalGeneration, answer: str | None, max_new_tokens: int
) -> None:
    model_type = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if model_type not in MODEL_TYPES or not hasattr(model, "lm_head"):
        raise ValueError(
            f"expected an MplugOwl2ForConditionalGeneration, got {type(model).__name__} "
            f"({model_type!r})."
        )
    if answer is not None and not answer.strip():
        raise ValueError(
            "the answer is empty: pass some text, or leave it out to have the model answer."
        )
    if max_new_tokens < 1:
        raise ValueError(f"expected max_new_tokens of at least 1, got {max_new_tokens}.")


def _notes(config: MplugOwl2Config) -> list[str]:
    notes = []
    if config.connector_type != "abstractor":
        notes.append("This model's H-Reducer has no learnable queries, so there are no query maps.")
    if not config.text_config.has_modality_adaptive_module:
        notes.append(
            "This model has no modality-adaptive module: one branch reads both modalities."
        )
    return notes


def _query_groups(indicators: Tensor, start: int) -> dict[str, Tensor]:
    """(1, L) masks of the positions whose attention counts; `start` is the first position of the
    answer.
    """
    positions = torch.arange(indicators.shape[1], device=indicators.device)[None]
    visual = indicators.bool()
    behind = visual.long().flip(1).cumsum(1).flip(1).eq(0)  # no visual token here or further on
    groups = {
        "answer": (positions >= start - 1) & (positions < indicators.shape[1] - 1),
        "text": behind,
    }
    return {**groups, "visual": visual} if visual.any() else groups


def _uniform_shares(indicators: Tensor, groups: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    uniform = [uniform_attention(torch.ones_like(indicators))]
    shares = {
        name: attention_mass(uniform, indicators, query_mask=mask)[0, 0].tolist()
        for name, mask in groups.items()
    }
    return {name: dict(zip(("text", "visual"), both, strict=True)) for name, both in shares.items()}


def _common_length(prompt: Tensor, whole: Tensor) -> int:
    """Ids that two sequences begin with alike; with most tokenizers all of the prompt."""
    length = min(len(prompt), len(whole) - 1)
    differs = (prompt[:length] != whole[:length]).nonzero()
    return int(differs[0]) if len(differs) else length


def _open(processor: MplugOwl2Processor, image: Any) -> Image.Image:
    if isinstance(image, (list, tuple)):
        raise ValueError(f"expected one image, got a list of {len(image)}.")
    return processor.image_processor.process_image(image)


def _as_seen(pixel_values: Tensor, image_processor: MplugOwl2ImageProcessor) -> np.ndarray:
    """(N, 3, S, S) model inputs -> (N, S, S, 3) uint8, the normalisation undone."""
    pixels = pixel_values.float().cpu().permute(0, 2, 3, 1)
    if image_processor.do_normalize:
        pixels = pixels * torch.tensor(image_processor.image_std) + torch.tensor(
            image_processor.image_mean
        )
    if image_processor.do_rescale:
        pixels = pixels / image_processor.rescale_factor
    return pixels.round().clamp(0, 255).to(torch.uint8).numpy()


def _name(image: Any) -> str:
    return str(image)[:200] if isinstance(image, (str, Path)) else type(image).__name__
