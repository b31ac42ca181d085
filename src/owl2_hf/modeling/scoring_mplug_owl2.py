"""Scores of images by the probabilities of level words, and the `score` of the published scorers.

The model reads an image and the beginning of an answer. The score is the sum of the values of a few
level words, weighted by the probabilities of these words at the next position.

B: images or videos of one batch, K: levels, V: embedding rows.

Sources: Q-Align (arXiv:2312.17090), Q-Instruct (arXiv:2311.06783), DeQA-Score (arXiv:2501.11561),
and their released code.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.feature_extraction_utils import BatchFeature
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from .adapters_mplug_owl2 import find_file
from .presets_mplug_owl2 import (
    IMAGE_TOKEN,
    PRESET_FILE,
    PRESETS,
    SCORER_FILES,
    Preset,
    read_preset,
)

if TYPE_CHECKING:  # it imports the Auto classes, which may be in the middle of importing this file
    from transformers.processing_utils import ProcessorMixin

# Ids of the level words in LLaMA-2's vocabulary, which is recognised by its size.
_LLAMA2_SIZE = 32000
_LLAMA2_IDS = {
    "excellent": 15129,
    "good": 1781,
    "fair": 6534,
    "poor": 6460,
    "bad": 4319,
    "average": 6588,
    "inferior": 20773,
    "worse": 15029,
    "similar": 2788,
    "better": 2253,
    "superior": 11558,
}


def own_preset(model: PreTrainedModel) -> Preset | None:
    """Return the preset that is stored with a model's weights or adapter.

    Return `None` if there is none.

    Raises:
        ValueError: If the file is damaged.
    """
    file = next(_own_files(model, PRESET_FILE), None)
    return None if file is None else read_preset(file)


def _own_files(model: PreTrainedModel, name: str) -> Iterator[Path]:
    """Files of this name in the folders or repositories that a model was loaded from, the adapter's
    first.
    """
    places = [getattr(model, "_adapter_place", None), _place(model)]
    for source, hub in filter(None, places):
        try:
            file = find_file(source, name, hub)
        except OSError:  # a deleted folder, or not a repository
            continue
        if file is not None:
            yield file


def _place(model: PreTrainedModel) -> tuple[str, dict[str, Any]] | None:
    """Where the weights came from, and of which commit; `None` for a model that was not loaded."""
    name = getattr(model, "name_or_path", None)
    commit = getattr(getattr(model, "config", None), "_commit_hash", None)
    return (str(name), {"revision": commit} if commit else {}) if name else None


def level_id(tokenizer: PreTrainedTokenizerBase, word: str) -> int:
    """The token that a word is behind other words, with its space."""
    before = tokenizer("a", add_special_tokens=False).input_ids
    ids = tokenizer(f"a {word}", add_special_tokens=False).input_ids[len(before) :]
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        pieces = tokenizer.convert_ids_to_tokens(ids)
        raise ValueError(
            f"the level {word!r} is not one token of this vocabulary but {pieces}: choose another "
            "word."
        )
    expected = _LLAMA2_IDS.get(word)
    if expected is not None and len(tokenizer) == _LLAMA2_SIZE + 1 and ids[0] != expected:
        raise ValueError(
            f"the level {word!r} has id {ids[0]}, expected {expected} as in LLaMA-2's "
            "vocabulary: the tokenizer is damaged."
        )
    return ids[0]


def level_ids(tokenizer: PreTrainedTokenizerBase, preset: Preset) -> list[list[int]]:
    """The tokens of each level's words.

    Raises:
        ValueError: If a word is not one token of the vocabulary.
    """
    groups = [(level,) if isinstance(level, str) else level for level in preset.levels]
    return [[level_id(tokenizer, word) for word in group] for group in groups]


def level_inputs(
    model: PreTrainedModel,
    processor: "ProcessorMixin",
    preset: Preset,
    frames: Sequence[Sequence[Any]],
    prompt: str,
    **options: Any,
) -> BatchFeature:
    """What the model takes for B images or videos.

    Args:
        frames: For each of B prompts its images, as the processor takes them: one, the frames of a
            video, or as many as the prompt names.
        prompt: One of the preset's.
        options: Of the image processor, for instance `original_reading`.

    Raises:
        ValueError: If a list of frames is empty, or an image cannot be read.
    """
    if not all(frames):
        raise ValueError("expected at least one frame of each video, got a list without any.")
    # The frames of a video, one after the other, replace one image.
    prompts = [prompt] * len(frames)
    if preset.images_per_prompt == 1:
        prompts = [prompt.replace(IMAGE_TOKEN, IMAGE_TOKEN * len(own)) for own in frames]
    return processor(
        images=frames,
        text=prompts,
        padding=True,
        padding_side="left",
        image_aspect_ratio=preset.image_aspect_ratio,
        return_tensors="pt",
        **options,
    ).to(model.device)


def gather_levels(logits: Tensor, ids: Sequence[Sequence[int]], preset: Preset) -> Tensor:
    """(B, V) logits -> (B, K) of the levels, each the mean of its words, over the temperature."""
    return torch.stack([logits[:, own].mean(-1) for own in ids], -1) / preset.temperature


def level_values(levels: Tensor, preset: Preset) -> Tensor:
    """(K,) what each level is worth on the preset's scale, with dtype and device of `levels`."""
    low, high = preset.scale
    return low + (high - low) * levels.new_tensor(preset.values)


def level_logits(logits: Tensor, ids: Sequence[Sequence[int]], preset: Preset) -> Tensor:
    """(B, V) logits of the next token -> (B, K) of the levels, over the temperature.

    Raises:
        ValueError: If the model gives NaN.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    levels = gather_levels(logits, ids, preset)  # (B, K)
    if not levels.isfinite().all():
        raise ValueError(
            f"the model's logits are not finite ({levels.tolist()}): try another dtype, or check "
            "the model with `owl2-hf verify`."
        )
    return levels


def read_levels(
    model: PreTrainedModel, inputs: BatchFeature, ids: Sequence[Sequence[int]], preset: Preset
) -> Tensor:
    """(B, K) logits of the levels at the place of the answer's first word, without gradients, on
    the CPU.

    Args:
        inputs: As `level_inputs` makes them.
        ids: Tokens of each level, as `level_ids` finds them.

    Raises:
        ValueError: If the model gives NaN.
    """
    with torch.no_grad():
        # (B, V)
        logits = model(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1]
    return level_logits(logits.float().cpu(), ids, preset)


def expected_score(levels: Tensor, preset: Preset) -> tuple[float, float, Tensor]:
    """(K,) logits of the levels -> expected value and standard deviation, on the preset's scale,
    and probabilities.
    """
    probs = levels.softmax(-1)  # (K,)
    values = level_values(probs, preset)  # (K,)
    mean = float(probs @ values)
    return mean, math.sqrt(max(0.0, float(probs @ (values - mean) ** 2))), probs


class ScoresImages:
    """Mixin with `score`, the method of Q-Align's and DeQA-Score's published models."""

    device: torch.device

    def score(
        self,
        images: Sequence[Any],
        task_: str = "quality",
        input_: str = "image",
        *,
        processor: "ProcessorMixin | None" = None,
        batch_size: int = 8,
    ) -> Tensor:
        """Score images or videos.

        Uses the preset in scorer.json beside the weights, otherwise OneAlign's.

        Args:
            images: A list of images, in any form that the processor takes. For videos, a list of
                lists of frames.
            task_: "quality" or "aesthetics", or another task of the model's own preset.
            input_: "image" or "video".
            processor: Processor to use. Default: the one in the model's folder, loaded at the first
                call.
            batch_size: Images or videos in one forward pass. It does not change the scores.

        Returns:
            (B,) float32 scores on the model's device, on the preset's scale. It is 1 to 5 for
            OneAlign and DeQA-Score.

        Raises:
            ValueError: If there is no processor or no such task, an image cannot be read, or the
                model returns NaN.
        """
        if batch_size < 1:
            raise ValueError(f"expected a batch_size of at least 1, got {batch_size}.")
        preset = own_preset(self) or PRESETS["one-align"]
        prompt = _prompt(preset, task_, input_)
        if processor is None:
            processor = self._own_processor()
        ids = level_ids(processor.tokenizer, preset)
        scores: list[float] = []
        frames = _as_frames(images, is_video=input_ == "video")
        for start in range(0, len(frames), batch_size):
            batch = frames[start : start + batch_size]
            inputs = level_inputs(self, processor, preset, batch, prompt)
            for levels in read_levels(self, inputs, ids, preset):
                scores.append(expected_score(levels, preset)[0])
        return torch.tensor(scores, dtype=torch.float32, device=self.device)

    def _own_processor(self) -> "ProcessorMixin":
        """The processor beside the weights; loaded once."""
        place = _place(self)
        found, loaded_from = getattr(self, "_scoring_processor", (None, None))
        if found is not None and loaded_from == place:
            return found
        reason = "this model was not loaded from a folder"
        if place is not None:
            # Not at the top: the Auto classes may still be importing when this file is imported.
            from transformers import AutoProcessor

            name, hub = place
            # The folder's code runs only if the model was loaded from it: then the user trusted it
            # already.
            is_remote = type(self).__module__.startswith("transformers_modules.")
            try:
                found = AutoProcessor.from_pretrained(name, trust_remote_code=is_remote, **hub)
            except (OSError, ValueError, KeyError, ImportError) as error:
                reason = (
                    f"the processor of {name!r} cannot be loaded "
                    f"({' '.join(str(error).split())[:200]})"
                )
            else:
                if hasattr(found, "image_processor") and hasattr(found, "tokenizer"):
                    self._scoring_processor = (found, place)
                    return found
                reason = f"{name!r} has no processor"
        raise ValueError(
            f"score needs the processor of the model's folder, but {reason}: pass processor=..., "
            "or convert the checkpoint again with --tokenizer."
        )

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save the model.

        Differs from transformers: the scoring files, such as scorer.json, are saved as well.
        """
        folder = Path(save_directory)
        preset = next(_own_files(self, PRESET_FILE), None)
        if preset is not None and kwargs.get("is_main_process", True) and not folder.is_file():
            for name in SCORER_FILES:
                file = next(_own_files(self, name), None)
                if file is not None and file.parent == preset.parent:
                    text = file.read_text(encoding="utf-8")
                    folder.mkdir(parents=True, exist_ok=True)
                    (folder / name).write_text(text, encoding="utf-8")
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]


def _prompt(preset: Preset, task: str, kind: str) -> str:
    """The prompt of the published call's two arguments.

    Raises:
        ValueError: If the preset has none for them.
    """
    if kind not in ("image", "video"):
        raise ValueError(f"expected input_ 'image' or 'video', got {kind!r}.")
    if kind == "video" and "video" not in preset.prompts:
        raise ValueError(
            "this scorer has no prompt for videos: pass input_='image' to score each list of "
            "frames like one image."
        )
    if kind == "video" and task == "quality":
        return preset.prompts["video"]
    task = preset.task_named(task)
    tasks = {name: prompt for name, prompt in preset.prompts.items() if name != "video"}
    if task not in tasks:
        raise ValueError(
            f"expected a task_ of {', '.join(tasks)}, got {task!r}; for videos, pass "
            "input_='video'."
        )
    if kind == "image":
        return tasks[task]
    # Upstream: one template for all pairs of task and medium; the preset has the trained pairs.
    return preset.prompts["video"].replace("quality", task)


def _as_frames(images: Any, is_video: bool) -> list[list[Any]]:
    """For each score its images: one, or the frames of a video. A single image or video may stand
    without a list.
    """
    several = list(images) if _is_many(images) else [images]
    if is_video and several and not any(map(_is_many, several)):
        several = [several]
    return [list(one) if _is_many(one) else [one] for one in several]


def _is_many(images: Any) -> bool:
    """As the processor's files, which this one cannot import, tell several images from one."""
    return isinstance(images, (list, tuple)) or getattr(images, "ndim", 0) == 4
