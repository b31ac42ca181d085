"""A chat of the page as messages for the chat template."""

from collections.abc import Sequence
from typing import Any


def to_messages(
    history: Sequence[dict[str, Any]], question: dict[str, Any]
) -> list[dict[str, Any]]:
    """The chat so far and a new question, with paths at the places of images.

    Args:
        history: Messages as gradio keeps them. A question without an answer, because it failed
            (`problem`) or was stopped at once, is left out: its image may be the very reason.
        question: Its "text" and "files".

    Raises:
        ValueError: If the question is empty.
    """
    messages: list[dict[str, Any]] = []
    waiting: list[dict[str, Any]] = []
    for message in history:
        parts = _parts(message["content"])
        if message["role"] == "user":
            waiting = parts
        elif waiting and parts and not (message.get("metadata") or {}).get("title"):
            messages += [
                {"role": "user", "content": waiting},
                {"role": "assistant", "content": parts},
            ]
            waiting = []
    parts = _parts(
        [*({"path": path} for path in question.get("files") or []), question.get("text") or ""]
    )
    if not parts:
        raise ValueError("the question is empty: write one, or add an image.")
    return [*messages, {"role": "user", "content": parts}]


def problem(text: str) -> dict[str, Any]:
    """A message at the place of an answer, which says why there is none."""
    return {"role": "assistant", "content": text, "metadata": {"title": "No answer"}}


def _parts(content: Any) -> list[dict[str, Any]]:
    """What gradio takes as the content of a message, as parts; text without a letter is none."""
    parts = []
    for part in content if isinstance(content, (list, tuple)) else [content]:
        text = part if isinstance(part, str) else part.get("text")
        if text is None:
            parts.append(
                {"type": "image", "image": part["path"] if "path" in part else part["file"]["path"]}
            )
        elif text.strip():
            parts.append({"type": "text", "text": text})
    return parts
