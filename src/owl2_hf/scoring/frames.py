"""Videos and animated images as lists of frames."""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image, ImageSequence, UnidentifiedImageError

from ..processing.image_processing_mplug_owl2 import FORMATS, open_image

VIDEO_SUFFIXES = (
    ".mp4",
    ".m4v",
    ".mov",
    ".mkv",
    ".webm",
    ".avi",
    ".mpg",
    ".mpeg",
    ".wmv",
    ".flv",
    ".3gp",
)


def is_video_path(source: Any) -> bool:
    """Whether this names a video, by its suffix."""
    return isinstance(source, (str, Path)) and Path(source).suffix.lower() in VIDEO_SUFFIXES


def read_frames(source: str | Path) -> list[Image.Image]:
    """Read frames: one per second of a video, all of an animated image, or a single image.

    Args:
        source: A file of any suffix; an image also in the other forms that the image processor
            takes.

    Raises:
        ValueError: If it is none of these or damaged, or PyAV, which reads videos, is not
            installed.
    """
    try:
        with Image.open(source, formats=FORMATS) as picture:
            if getattr(picture, "n_frames", 1) > 1:
                return [frame.convert("RGB") for frame in ImageSequence.Iterator(picture)]
    except UnidentifiedImageError:
        return _decode(Path(source))
    except MemoryError:
        raise
    except Exception as error:  # a damaged file makes decoders raise almost anything
        if Path(source).is_file():
            raise ValueError(f"{str(source)!r} is damaged ({type(error).__name__}).") from None
    return [open_image(source)]


def _decode(path: Path) -> list[Image.Image]:
    from transformers.utils import is_av_available
    from transformers.video_utils import load_video

    if not is_av_available():
        raise ValueError(
            f"{str(path)!r} is not an image; to read videos, install PyAV: pip install "
            "'owl2_hf[video]'."
        )
    path = path.resolve()  # absolute, so that FFmpeg never reads its name as a protocol
    try:
        frames, _ = load_video(str(path), sample_indices_fn=partial(_every_second, path=path))
    except MemoryError:
        raise
    except Exception as error:  # damaged, see above
        kind = type(error).__name__
        raise ValueError(f"{str(path)!r} is not a readable image or video ({kind}).") from None
    return [Image.fromarray(frame) for frame in frames]


def _every_second(metadata: Any, path: Path, **kwargs: Any) -> list[int]:
    """Places of the first frame of each whole second, as Q-Align takes them; of a shorter video the
    first frame.
    """
    num_frames = metadata.total_num_frames or _count_frames(path)
    return [
        math.floor(metadata.fps * second)
        for second in range(max(1, int(num_frames / metadata.fps)))
    ]


def _count_frames(path: Path) -> int:
    """Frames of a video whose container does not tell, as WebM's and Matroska's don't; nothing is
    decoded.
    """
    import av

    with av.open(str(path)) as container:
        return sum(packet.size > 0 for packet in container.demux(video=0))


def expand_paths(paths: Sequence[str], is_video: bool = False) -> tuple[list[str], list[Any]]:
    """Files and folders as names and what to score.

    Args:
        is_video: A folder that holds videos stands for each of them; else its images are the frames
            of one video, in the order of their names.

    Raises:
        ValueError: If a folder holds nothing to score.
    """
    names: list[str] = []
    sources: list[Any] = []
    for path in paths:
        files: list[Any] = [path]
        if Path(path).is_dir():
            videos = (
                sorted(file for file in Path(path).iterdir() if is_video_path(file))
                if is_video
                else []
            )
            files = videos or ([_pictures(Path(path))] if is_video else _pictures(Path(path)))
        names += [path if isinstance(file, list) else str(file) for file in files]
        sources += files
    return names, sources


def image_suffixes() -> tuple[str, ...]:
    """The suffixes of all image files that are read, sorted."""
    extensions = Image.registered_extensions().items()
    return tuple(sorted(suffix for suffix, kind in extensions if kind in FORMATS))


def _pictures(folder: Path) -> list[Path]:
    suffixes = image_suffixes()
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in suffixes)
    if not files:
        raise ValueError(
            f"{folder} contains no images: expected files named {', '.join(suffixes[:6])}, ..."
        )
    return files
