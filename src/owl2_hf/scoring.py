"""Scores of pictures and videos by the probabilities of level words, as Q-Align, Q-Instruct and DeQA-Score read them.

The model is shown a picture and the beginning of an answer; the probabilities of a few words at its next position, and
the value of each word, make the score. B: pictures of one batch, K: levels, V: embedding rows.

Sources: Q-Align (arXiv:2312.17090), Q-Instruct (arXiv:2311.06783), DeQA-Score (arXiv:2501.11561), and their released
code.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .processing.image_processing_mplug_owl2 import FORMATS, is_many
from .videos import is_video_path, read_frames

IMAGE_TOKEN = "<|image|>"
_ALIGN_PROMPT = (
    "USER: How would you rate the {aspect} of this {medium}?\n{image}\nASSISTANT: The {aspect} of the {medium} is"
)
_ALIGN_LEVELS = ("excellent", "good", "fair", "poor", "bad")
_ALIGN_VALUES = (1.0, 0.75, 0.5, 0.25, 0.0)
# Ids of the level words in LLaMA-2's vocabulary, which is told by its size.
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


@dataclass(frozen=True)
class Preset:
    """How one model of the family scores.

    Args:
        prompts: Task -> prompt, with `<|image|>` at the place of the picture, or of a video's frames.
        levels: Words, best first; or groups of words that mean the same, whose logits are averaged.
        values: What each level is worth, from 0 to 1.
        image_aspect_ratio: How a picture becomes square, see `MplugOwl2ImageProcessor`.
        scale: Lowest and highest score.
        temperature: The logits are divided by it.
        images_per_prompt: Pictures that the prompt names; a video's frames stand in the place of one.
    """

    prompts: dict[str, str]
    levels: tuple[str | tuple[str, ...], ...] = _ALIGN_LEVELS
    values: tuple[float, ...] = _ALIGN_VALUES
    image_aspect_ratio: str = "pad"
    scale: tuple[float, float] = (1.0, 5.0)
    temperature: float = 1.0
    images_per_prompt: int = 1

    def __post_init__(self):
        if len(self.levels) != len(self.values) or len(self.levels) < 2:
            raise ValueError(f"expected a value for each of two or more levels, got {self.levels} and {self.values}.")
        for task, prompt in self.prompts.items():
            if prompt.count(IMAGE_TOKEN) != self.images_per_prompt:
                times = "once" if self.images_per_prompt == 1 else f"{self.images_per_prompt} times"
                raise ValueError(f"the prompt of task {task!r} must hold {IMAGE_TOKEN} {times}, got {prompt!r}.")


def _align(aspect: str, medium: str) -> str:
    return _ALIGN_PROMPT.format(aspect=aspect, medium=medium, image=IMAGE_TOKEN)


_Q_INSTRUCT_PROMPT = f"USER: {IMAGE_TOKEN}Rate the quality of the image.\nASSISTANT: "
PRESETS: dict[str, Preset] = {
    # Upstream: Q-Align's repository asks for "the image of the quality"; its model on the Hub, like this, does not.
    "one-align": Preset(
        {
            "quality": _align("quality", "image"),
            "aesthetics": _align("aesthetics", "image"),
            "video": _align("quality", "video"),
        }
    ),
    "deqa": Preset({"quality": _align("quality", "image")}),
    "q-instruct": Preset(
        {"quality": _Q_INSTRUCT_PROMPT}, ("good", "average", "poor"), (1.0, 0.5, 0.0), "crop", scale=(0.0, 1.0)
    ),
    "q-instruct-boost": Preset(
        {"quality": _Q_INSTRUCT_PROMPT},
        (("good", "high", "fine"), ("average", "medium", "acceptable"), ("poor", "low", "bad")),
        (1.0, 0.5, 0.0),
        "crop",
        scale=(0.0, 1.0),
    ),
}


@dataclass(frozen=True)
class Score:
    """What a model thinks of one picture.

    Args:
        score: Expected value of the level, on `scale`.
        std: Standard deviation of the level's value, on the same scale (DeQA-Score).
        probs: Probability of each level, among the levels.
        levels: The level words; of a group the first.
        logits: The model's, for each level, over the temperature; with crops the logarithms of `probs`.
        scale: Lowest and highest score.
    """

    score: float
    std: float
    probs: tuple[float, ...]
    levels: tuple[str, ...]
    logits: tuple[float, ...]
    scale: tuple[float, float]


class Scorer:
    """Scores pictures with a model and its processor.

    Args:
        model: `MplugOwl2ForConditionalGeneration`, in evaluation mode.
        processor: Its processor.
        preset: A name in `PRESETS`, or one of your own.
        scale: Lowest and highest score, where not the preset's.
        batch_size: Pictures in one forward pass; it does not change the scores.
        crops: Score squares of the model's size, cut from the image at its own resolution, and average them. This is
            not how the papers score.
        original_reading: Read files as the originals do, for the papers' numbers; see `MplugOwl2ImageProcessor`.

    Raises:
        ValueError: The preset is unknown, or a level word is not one token of the vocabulary.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        preset: str | Preset = "one-align",
        scale: tuple[float, float] | None = None,
        batch_size: int = 8,
        crops: bool = False,
        original_reading: bool = False,
    ):
        if isinstance(preset, str):
            if preset not in PRESETS:
                raise ValueError(f"expected a preset of {', '.join(PRESETS)}, got {preset!r}.")
            preset = PRESETS[preset]
        if batch_size < 1:
            raise ValueError(f"expected a batch_size of at least 1, got {batch_size}.")
        self.model, self.processor, self.batch_size = model, processor, batch_size
        self.crops, self.original_reading = crops, original_reading
        self.preset = preset if scale is None else replace(preset, scale=scale)
        groups = [(level,) if isinstance(level, str) else level for level in preset.levels]
        self._names = tuple(group[0] for group in groups)
        self._ids = [[_token_id(processor.tokenizer, word) for word in group] for group in groups]

    @property
    def levels(self) -> tuple[str, ...]:
        """The level words, best first; of a group the first."""
        return self._names

    def __call__(self, images: Any, task: str = "quality") -> list[Score]:
        """Scores of pictures, or of videos.

        Args:
            images: Pictures as the processor takes them. For task "video" the path of a video each, of which one frame
                a second counts, or a list or array of frames. One alone may stand without a list.
            task: One of the preset's; "aesthetic" means "aesthetics".

        Raises:
            ValueError: The preset has no such task, a picture or video cannot be read, or the model gives NaN.
        """
        if task == "aesthetic" and task not in self.preset.prompts:  # pyiqa's word
            task = "aesthetics"
        if task not in self.preset.prompts:
            raise ValueError(f"expected a task of {', '.join(self.preset.prompts)}, got {task!r}.")
        if self.crops and task == "video":
            raise ValueError("expected crops of images, got task 'video': score its frames by another task.")
        images = _to_list(images, is_video=task == "video")
        scores: list[Score] = []
        if self.crops:
            return [self._score_crops(image, self.preset.prompts[task]) for image in images]
        for start in range(0, len(images), self.batch_size):
            batch = images[start : start + self.batch_size]
            if task == "video":
                batch = [read_frames(video) if isinstance(video, (str, Path)) else video for video in batch]
            scores += [self._score(levels) for levels in self._levels(batch, self.preset.prompts[task])]
        return scores

    def open_image(self, image: Any) -> Image.Image:
        """An image of any kind in RGB, read as this scorer reads it.

        Raises:
            ValueError: It cannot be read.
        """
        return self.processor.image_processor.process_image(image, original_reading=self.original_reading)

    def _score_crops(self, image: Any, prompt: str) -> Score:
        """The score by the mean of all crops' probabilities."""
        image = self.open_image(image)
        size = dict(self.processor.image_processor.size)
        boxes = crop_boxes(image.width, image.height, size.get("height") or size["shortest_edge"])
        probs = []  # (K,) each
        for start in range(0, len(boxes), self.batch_size):
            batch = [image.crop(box) for box in boxes[start : start + self.batch_size]]
            probs += [levels.softmax(-1) for levels in self._levels(batch, prompt)]
        return self._score(torch.stack(probs).mean(0).log())

    def _levels(self, images: Sequence[Any], prompt: str) -> Tensor:
        """(B, K) logits of the levels, over the temperature."""
        frames = [list(image) if is_many(image) else [image] for image in images]
        if not all(frames):
            raise ValueError("expected at least one frame of each video, got a list without any.")
        # Frames of a video stand where one picture would, one behind the other.
        prompts = [prompt] * len(frames)
        if self.preset.images_per_prompt == 1:
            prompts = [prompt.replace(IMAGE_TOKEN, IMAGE_TOKEN * len(own)) for own in frames]
        inputs = self.processor(
            images=frames,
            text=prompts,
            padding=True,
            padding_side="left",
            image_aspect_ratio=self.preset.image_aspect_ratio,
            original_reading=self.original_reading,
            return_tensors="pt",
        ).to(self.model.device)
        with torch.no_grad():
            logits = self.model(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1].float().cpu()
        levels = torch.stack([logits[:, ids].mean(-1) for ids in self._ids], -1) / self.preset.temperature
        if not levels.isfinite().all():
            raise ValueError(f"the model's logits are not finite ({levels.tolist()}): try another dtype, or verify it.")
        return levels

    def _score(self, levels: Tensor) -> Score:
        """(K,) logits of the levels -> the score."""
        probs = levels.softmax(-1)
        low, high = self.preset.scale
        values = low + (high - low) * torch.tensor(self.preset.values)
        mean = float(probs @ values)
        std = math.sqrt(max(0.0, float(probs @ (values - mean) ** 2)))
        return Score(mean, std, tuple(probs.tolist()), self._names, tuple(levels.tolist()), self.preset.scale)


def _to_list(images: Any, is_video: bool) -> Any:
    """What is to be scored one by one; a list of pictures is one video."""
    if not is_video:
        return images if is_many(images) else [images]
    is_several = isinstance(images, (list, tuple)) and all(is_many(one) or is_video_path(one) for one in images)
    return images if is_several else [images]


def crop_boxes(width: int, height: int, side: int) -> list[tuple[int, int, int, int]]:
    """Squares of this side that cover an image, row by row, at even steps; the fewest that do, so they may overlap.

    Returns:
        (left, top, right, bottom) of each. Where the image is smaller than the side, a box ends with the image.
    """

    def starts(length: int) -> list[int]:
        steps = math.ceil(length / side) - 1
        return [round(step * (length - side) / steps) for step in range(steps + 1)] if steps > 0 else [0]

    return [
        (left, top, min(left + side, width), min(top + side, height))
        for top in starts(height)
        for left in starts(width)
    ]


def _token_id(tokenizer: Any, word: str) -> int:
    """The token that a word is behind other words, with its space."""
    before = tokenizer("a", add_special_tokens=False).input_ids
    ids = tokenizer(f"a {word}", add_special_tokens=False).input_ids[len(before) :]
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        pieces = tokenizer.convert_ids_to_tokens(ids)
        raise ValueError(f"the level {word!r} is not one token of this vocabulary but {pieces}: choose another word.")
    expected = _LLAMA2_IDS.get(word)
    if expected is not None and len(tokenizer) == _LLAMA2_SIZE + 1 and ids[0] != expected:
        raise ValueError(f"the level {word!r} has id {ids[0]}, LLaMA-2's vocabulary has {expected}: it is damaged.")
    return ids[0]


def score_each(scorer: Scorer, images: Sequence[Any], task: str = "quality") -> Iterator[Score | ValueError]:
    """Scores in order, with the error of a picture that cannot be read in its place.

    Args:
        images: A list as for `Scorer`, for task "video" of videos; opened one by one, so that a broken one costs
            nothing else its score. An error in the list comes back in its place.
    """
    for start in range(0, len(images), scorer.batch_size):
        batch = images[start : start + scorer.batch_size]
        opened = [_try_open(scorer, image, is_video=task == "video") for image in batch]
        good = [image for image in opened if not isinstance(image, ValueError)]
        scores = iter(scorer(good, task) if good else [])
        for image in opened:
            yield image if isinstance(image, ValueError) else next(scores)


def score_paths(
    scorer: Scorer, paths: Iterable[str], task: str = "quality"
) -> Iterator[tuple[str, Score | ValueError]]:
    """Names and scores of files and folders, with the error of what cannot be read in its place.

    Args:
        paths: As for `expand_paths`. For a task other than "video", a video is its frames, one a second, each with a
            score of its own and named by its second: `clip.mp4#t=3`.
    """
    pending = _named_images(paths, is_video=task == "video")
    while batch := list(islice(pending, scorer.batch_size)):
        names, images = zip(*batch, strict=True)
        yield from zip(names, score_each(scorer, images, task), strict=True)


def _named_images(paths: Iterable[str], is_video: bool) -> Iterator[tuple[str, Any]]:
    """What is to be scored with its name, opened no sooner than it is needed."""
    for path in paths:
        try:
            for name, source in zip(*expand_paths([path], is_video), strict=True):
                if is_video or not is_video_path(source):
                    yield name, source
                    continue
                try:
                    for second, frame in enumerate(read_frames(source)):
                        yield f"{name}#t={second}", frame
                except ValueError as error:
                    yield name, error
        except (ValueError, OSError) as error:
            yield path, ValueError(str(error))


def _try_open(scorer: Scorer, image: Any, is_video: bool) -> Any:
    """A decoded picture, the list of a video's frames, or what is wrong with it."""
    if isinstance(image, ValueError):
        return image
    try:
        if not is_video:
            return scorer.open_image(image)
        frames = read_frames(image) if isinstance(image, (str, Path)) else image
        if is_many(frames) and len(frames) == 0:
            raise ValueError("expected at least one frame, got a list without any.")
        return [scorer.open_image(frame) for frame in (frames if is_many(frames) else [frames])]
    except (ValueError, OSError) as error:
        return ValueError(str(error))


def custom_preset(name: str, task: str, prompt: str | None = None, levels: Sequence[str] | None = None) -> Preset:
    """A preset with another prompt or other levels, which are worth evenly spaced values.

    Raises:
        ValueError: There is no preset of that name.
    """
    if name not in PRESETS:
        raise ValueError(f"expected a preset of {', '.join(PRESETS)}, got {name!r}.")
    preset = PRESETS[name]
    if levels is not None:
        words = tuple(word.strip() for word in levels)
        steps = max(len(words) - 1, 1)
        preset = replace(preset, levels=words, values=tuple(1 - index / steps for index in range(len(words))))
    return preset if prompt is None else replace(preset, prompts={task: prompt.replace("\\n", "\n")})


def expand_paths(paths: Sequence[str], is_video: bool = False) -> tuple[list[str], list[Any]]:
    """Files and folders as names and what to score.

    Args:
        is_video: A folder that holds videos stands for each of them; else its pictures are the frames of one video, in
            the order of their names.

    Raises:
        ValueError: A folder holds nothing to score.
    """
    names: list[str] = []
    sources: list[Any] = []
    for path in paths:
        files: list[Any] = [path]
        if Path(path).is_dir():
            videos = sorted(file for file in Path(path).iterdir() if is_video_path(file)) if is_video else []
            files = videos or ([_pictures(Path(path))] if is_video else _pictures(Path(path)))
        names += [path if isinstance(file, list) else str(file) for file in files]
        sources += files
    return names, sources


def _pictures(folder: Path) -> list[Path]:
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS}
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in suffixes)
    if not files:
        raise ValueError(f"{folder} holds no images: expected files named {', '.join(sorted(suffixes)[:6])}, ...")
    return files
