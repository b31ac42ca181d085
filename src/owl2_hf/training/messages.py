"""Rows of training data as chat messages.

Two formats: LLaVA's `conversations`, and `messages` as TRL and Hugging Face write them.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..scoring.frames import expand_paths, read_frames

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
MARKERS = re.compile(r"<\|image\|>|<image>|<video>")
# Keys that loading adds to a row: its place in the file, and the reason if it could not be read.
ORIGIN = "_origin"
UNREADABLE = "_unreadable"
PAYLOADS = ("image", "video", "url", "path", "base64", "image_url")

Message = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """Where images of a row come from.

    Args:
        folder: What relative paths start from; the working directory if `None`.
        is_open: Paths may lead elsewhere, and http(s) URLs are taken.
    """

    folder: str | Path | None
    is_open: bool

    def path(self, name: str | Path) -> Path:
        start = Path(self.folder or "")
        path = start / name
        root, place = (os.path.normpath(one.absolute()) for one in (start, path))
        if not self.is_open and not Path(place).is_relative_to(root):
            folder = (
                "the working directory"
                if self.folder is None
                else f"the image folder {str(self.folder)!r}"
            )
            raise ValueError(
                f"{str(name)!r} is outside {folder}: choose another folder, or set allow_outside."
            )
        return Path(os.path.normpath(path))


def to_messages(
    row: Mapping[str, Any],
    image_folder: str | Path | None = None,
    allow_outside: bool | None = None,
) -> list[Message]:
    """A row as chat messages whose content is a list of text, image and video parts; the row stays
    as it is.

    LLaVA rows: `<|image|>` and `<image>` stand for an image, `<video>` for a video. With one image
    all markers of a turn become one in front of its text and a line break, as the original trains;
    with several they stay where they are. An answer that opens the conversation is left out, as the
    original does.

    `messages` rows: text is text, unless the row has `images` or `videos` and no part holds a place
    for them: then the markers do.

    Args:
        image_folder: What relative paths start from; the row's own `image_folder` if not given.
        allow_outside: Take images from elsewhere, too: paths that lead out of the folder, and
            http(s) URLs. If not given what the row's own `allow_outside` says, and without one
            whether there is no folder to stay in.

    Raises:
        ValueError: If the row cannot be learned from. The message says why.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"expected an object, got {type(row).__name__}.")
    if UNREADABLE in row:
        raise ValueError(row[UNREADABLE])
    folder = row.get("image_folder") if image_folder is None else image_folder
    is_open = row.get("allow_outside", folder is None) if allow_outside is None else allow_outside
    place = Place(folder, is_open)
    images = [locate_picture(image, place) for image in _listed(row, "images", "image")]
    videos = [_frames(video, place) for video in _videos(row)]
    if row.get("conversations") is not None:
        messages = _from_llava(
            row["conversations"], bool(images), bool(videos), len(images) + len(videos) == 1
        )
    elif row.get("messages") is not None:
        messages = _from_messages(row["messages"], bool(images), bool(videos), place)
    else:
        keys = (
            ", ".join(str(key) for key in row if key not in ("image_folder", "allow_outside"))
            or "none"
        )
        raise ValueError(f"expected 'conversations' (LLaVA) or 'messages', got keys: {keys}.")
    _check_turns(messages)
    _fill(messages, images, videos)
    return messages


def pictures_of(messages: Sequence[Message]) -> list[Any]:
    """Every image and every frame of a conversation, in order."""
    found: list[Any] = []
    for message in messages:
        for part in message["content"]:
            found += [part["image"]] if part["type"] == "image" else part.get("video", [])
    return found


def _from_llava(turns: Any, has_images: bool, has_videos: bool, is_single: bool) -> list[Message]:
    messages = []
    for number, turn in enumerate(_turns(turns, "conversations"), 1):
        role, value = turn.get("from"), turn.get("value")
        if not isinstance(role, str) or role not in ROLES:
            raise ValueError(
                f"turn {number}: expected 'from' to be 'human', 'gpt' or 'system', got {role!r}."
            )
        text = _text(value, f"turn {number}: expected a string as 'value'")
        content = list(_split(text, has_images, has_videos))
        places = [part for part in content if part["type"] != "text"]
        if is_single and places:
            # Upstream: all markers of the turn are stripped and one is put in front.
            rest = "".join(part["text"] for part in content if part["type"] == "text").strip()
            content = [places[0], *_text_parts("\n" + rest if rest else "")]
        messages.append({"role": ROLES[role], "content": content})
    # Upstream: a conversation starts with the human; an answer in front of it is dropped.
    first = next(
        (index for index, message in enumerate(messages) if message["role"] != "system"), None
    )
    if first is not None and messages[first]["role"] == "assistant":
        del messages[first]
    return messages


def _from_messages(turns: Any, has_images: bool, has_videos: bool, place: Place) -> list[Message]:
    messages = []
    for number, turn in enumerate(_turns(turns, "messages"), 1):
        role, content = turn.get("role"), turn.get("content")
        if role not in ("system", "user", "assistant"):
            raise ValueError(
                f"turn {number}: expected 'role' to be 'system', 'user' or 'assistant', got "
                f"{role!r}."
            )
        if isinstance(content, (list, tuple)):
            parts = [_part(part, place, f"turn {number}") for part in content]
        else:
            text = _text(
                content, f"turn {number}: expected a string or a list of parts as 'content'"
            )
            parts = _text_parts(text)
        messages.append({"role": role, "content": parts})
    if (has_images or has_videos) and not any(map(_is_place, _parts(messages))):
        for message, turn in zip(messages, turns, strict=True):
            if isinstance(turn["content"], str):
                message["content"] = list(_split(turn["content"], has_images, has_videos))
    return messages


def _turns(turns: Any, key: str) -> Sequence[Mapping[str, Any]]:
    if not isinstance(turns, (list, tuple)):
        raise ValueError(f"expected a list of turns in {key!r}, got {type(turns).__name__}.")
    if not turns:
        raise ValueError(f"{key!r} has no turns.")
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, Mapping):
            raise ValueError(f"turn {number}: expected an object, got {type(turn).__name__}.")
    return turns


def _text(value: Any, expected: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{expected}, got {type(value).__name__}.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{expected}, got one that is not valid Unicode at character {error.start}."
        ) from None
    return value


def _text_parts(text: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text}] if text else []


def _split(text: str, has_images: bool, has_videos: bool) -> Iterator[dict[str, Any]]:
    """Text between markers, and a place for each of them."""
    last = 0
    for match in MARKERS.finditer(text):
        is_video = match[0] == "<video>"
        if is_video and not has_videos:
            continue
        yield from _text_parts(text[last : match.start()])
        yield {"type": "video" if is_video or (has_videos and not has_images) else "image"}
        last = match.end()
    yield from _text_parts(text[last:])


def _part(part: Any, place: Place, where: str) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if kind == "text":
        return {
            "type": "text",
            "text": _text(part.get("text"), f"{where}: expected a string as 'text'"),
        }
    if kind not in ("image", "image_url", "video"):
        raise ValueError(
            f"{where}: expected parts of type 'text', 'image' or 'video', got {kind!r}."
        )
    given = next((part[key] for key in PAYLOADS if part.get(key) is not None), None)
    if kind == "video":
        return (
            {"type": "video"}
            if given is None
            else {"type": "video", "video": _frames(given, place)}
        )
    if isinstance(given, Mapping) and "url" in given:
        given = given["url"]
    return (
        {"type": "image"}
        if given is None
        else {"type": "image", "image": locate_picture(given, place)}
    )


def _parts(messages: Sequence[Message]) -> Iterator[dict[str, Any]]:
    return (part for message in messages for part in message["content"])


def _is_place(part: Mapping[str, Any]) -> bool:
    return part["type"] != "text" and part["type"] not in part


def _fill(messages: Sequence[Message], images: list[Any], videos: list[list[Any]]) -> None:
    """Put images and videos, in order, into the places that wait for them."""
    for kind, media in (("image", images), ("video", videos)):
        places = [part for part in _parts(messages) if part["type"] == kind and _is_place(part)]
        if len(places) != len(media):
            marker = "<|image|>" if kind == "image" else "<video>"
            raise ValueError(
                f"expected one {marker}, or one part of type {kind!r}, for each of {len(media)} "
                f"{kind}s, got {len(places)}."
            )
        for part, medium in zip(places, media, strict=True):
            part[kind] = medium


def _check_turns(messages: Sequence[Message]) -> None:
    """An optional system message, then user and assistant in turn, an answer last and none
    empty.
    """
    for number, message in enumerate(messages, 1):
        role, before = message["role"], messages[number - 2]["role"] if number > 1 else None
        after_user = ["assistant"] if before == "user" else ["user"]
        expected = ["system", "user"] if before is None else after_user
        if role not in expected:
            place = "as the first turn" if before is None else f"after {before!r}"
            raise ValueError(
                f"roles must alternate: expected {' or '.join(map(repr, expected))} {place}, got "
                f"{role!r}."
            )
        texts = [part["text"] for part in message["content"] if part["type"] == "text"]
        if role == "assistant" and not "".join(texts).strip():
            raise ValueError(
                f"answer {sum(m['role'] == role for m in messages[:number])} is empty."
            )
    if not messages or messages[-1]["role"] != "assistant":
        got = messages[-1]["role"] if messages else "nothing"
        raise ValueError(f"expected an answer of the assistant in the last turn, got {got!r}.")


def _listed(row: Mapping[str, Any], *keys: str) -> list[Any]:
    """What stands under the first of the keys that the row has, as a list."""
    value: Any = next((row[key] for key in keys if row.get(key) is not None), [])
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _videos(row: Mapping[str, Any]) -> list[Any]:
    """Videos of a row, each a list of frames or a folder of them: `videos` holds several, `video`
    one.
    """
    if row.get("videos") is not None:
        return _listed(row, "videos")
    return [row["video"]] if row.get("video") is not None else []


def _frames(video: Any, place: Place) -> list[Any]:
    if isinstance(video, (str, Path)):
        path = place.path(video)
        if path.is_file():
            return read_frames(path)
        if not path.is_dir():
            raise ValueError(
                f"video {str(video)!r}: expected a file, a folder of frames or a list of them."
            )
        return [str(frame) for frame in expand_paths([str(path)])[1]]
    if not isinstance(video, (list, tuple)) or not video:
        got = "an empty list" if isinstance(video, (list, tuple)) else type(video).__name__
        raise ValueError(
            f"expected a folder of frames or a list of at least one as a video, got {got}."
        )
    return [locate_picture(frame, place) for frame in video]


def locate_picture(image: Any, place: Place) -> Any:
    """An image that the processor opens: a path that exists, a URL, bytes or a PIL image."""
    if isinstance(image, Mapping):  # an undecoded `Image` of the package datasets
        image = image.get("path") if image.get("bytes") is None else image["bytes"]
    if isinstance(image, (bytes, Image.Image)):
        return image
    if not isinstance(image, (str, Path)) or not str(image):
        got = repr(image) if isinstance(image, str) else type(image).__name__
        raise ValueError(f"expected an image as path, URL, bytes or PIL image, got {got}.")
    is_web = isinstance(image, str) and image.startswith(("http://", "https://"))
    if is_web and not place.is_open:
        raise ValueError(
            f"{str(image).partition('?')[0]!r} is not downloaded: set allow_outside for images "
            "from the internet."
        )
    if is_web or (isinstance(image, str) and image.startswith("data:")):
        return image
    path = place.path(image)
    if not path.is_file():
        raise ValueError(
            f"the image {str(path)!r} does not exist; relative paths start from the image folder."
        )
    return str(path)


__all__ = ["pictures_of", "to_messages"]
