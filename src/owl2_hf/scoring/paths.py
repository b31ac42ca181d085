"""Score files, folders and frames of videos, and return an error for each that cannot be read."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from ..processing.image_processing_mplug_owl2 import is_many
from .frames import expand_paths, is_video_path, read_frames
from .scorer import Score, Scorer


def score_each(
    scorer: Scorer, images: Sequence[Any], task: str = "quality"
) -> Iterator[Score | ValueError]:
    """Yield the score of each image in order, or a ValueError for an image that cannot be read.

    Args:
        images: A list of images as `Scorer` takes it; for task "video", of videos. Images are
            opened one by one, so a broken image does not affect the others. An error in the list is
            returned in its place.
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
    """Yield name and score of each file, or name and ValueError if it cannot be read.

    Args:
        paths: Files and folders; see `expand_paths`. For tasks other than "video", one frame per
            second of a video is scored. The name of a frame holds its second: `clip.mp4#t=3`.
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
    """A decoded image, the list of a video's frames, or what is wrong with it."""
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
