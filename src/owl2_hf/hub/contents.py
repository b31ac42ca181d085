"""Check the content of a file before it is published: no secrets, no local paths."""

import json
import re
import warnings
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from huggingface_hub.utils import HFValidationError, validate_repo_id
from PIL import ExifTags, Image
from safetensors import safe_open

_SECRETS = {
    "a Hugging Face token": re.compile(r"\bhf_[A-Za-z0-9]{30,}"),
    "an AWS access key": re.compile(r"\bAKIA[0-9A-Z]{16}\b"),
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    "a GitHub token": re.compile(r"\b(gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,})"),
    "an API key (sk-)": re.compile(r"(?<![\w-])sk-(?=[\w-]*\d)[\w-]{20,}"),
}
_SECRET_KEY = re.compile(
    r"(.*_)?(api_?key|secret(_?key)?|passw(or)?d|private_?key|credentials?|(access|auth|api|hub|hf|github)_?token)",
    re.IGNORECASE,
)
_NAME_KEYS = ("_name_or_path", "name_or_path", "base_model_name_or_path")
_HOME = re.compile(r"(?<![\w.~])(/(home|Users)/\w|/root/|[A-Za-z]:\\Users\\)")
_LOCAL_PATH = re.compile(r"(?<![\w.~])(/(home|Users|root|tmp)/|[A-Za-z]:\\)")


def check_card(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"{path} does not exist: expected a model card with metadata; write one.")
    try:
        data = ModelCard.load(path).data
    except Exception as error:  # YAML's errors and the card's own share no base class
        raise ValueError(
            f"{path}: expected metadata in YAML between two lines of ---, got {error!r}."
        ) from None
    required = ["library_name", "pipeline_tag", "license", "tags"]
    if data.get("license") == "other":
        required.append("license_name")
    if missing := [name for name in required if not data.get(name)]:
        raise ValueError(
            f"{path}: its metadata lacks {', '.join(missing)}; add them between the lines of ---."
        )
    if data.pipeline_tag != "image-text-to-text":
        raise ValueError(
            f"{path}: expected pipeline_tag image-text-to-text, got {data.pipeline_tag}; correct "
            "it."
        )


def check_text(path: Path) -> None:
    text = read_text(path)
    _check_secrets(path, text)
    if path.suffix != ".json":
        if found := _HOME.search(text):
            line = text.count("\n", 0, found.start()) + 1
            raise ValueError(
                f"{path}: line {line} contains the path of a home folder: write ~/ or a shorter "
                "path."
            )
        return
    content = read_json(path)
    if path.name == "tokenizer.json":
        return  # a vocabulary may hold any text
    for key, value in strings(content):
        if value and any(map(_SECRET_KEY.fullmatch, key.split("."))):
            raise ValueError(
                f"{path}: {key} seems to be a secret: remove it, and revoke it if it was ever "
                "shared."
            )
        if _LOCAL_PATH.search(value) or (
            key.rpartition(".")[2] in _NAME_KEYS and not _is_repo_id(value)
        ):
            raise ValueError(f"{path}: {key} is a local path: remove it, or write a relative path.")


def check_metadata(path: Path) -> None:
    """What safetensors keeps beside the tensors."""
    with safe_open(path, framework="np") as file:
        metadata = file.metadata() or {}
    for key, value in metadata.items():
        _check_secrets(path, f"{key} {value}")
        if value and _SECRET_KEY.fullmatch(key):
            raise ValueError(
                f"{path}: {key} in its metadata seems to be a secret: save the model again without "
                "it."
            )
        if _LOCAL_PATH.search(value):
            raise ValueError(
                f"{path}: {key} in its metadata is a local path: save the model again without it."
            )


def check_picture(path: Path) -> None:
    """It is what its name says, and tells nothing but what it shows."""
    kind = "PNG" if path.suffix.lower() == ".png" else "JPEG"
    content = path.read_bytes()
    try:
        with warnings.catch_warnings(), Image.open(BytesIO(content), formats=[kind]) as image:
            warnings.simplefilter("ignore")  # raise errors for damaged images
            image.load()
            exif = image.getexif()
            values = [
                value for key, value in image.info.items() if key not in ("exif", "icc_profile")
            ]
            values += [*exif.values(), *exif.get_ifd(ExifTags.IFD.Exif).values()]
            position = exif.get_ifd(ExifTags.IFD.GPSInfo)
    except MemoryError:
        raise
    except Exception as error:  # damaged files raise almost any error
        raise ValueError(
            f"{path} is not a complete {kind} image ({type(error).__name__}); save it again."
        ) from None
    texts = [
        value.decode("latin-1") if isinstance(value, bytes) else str(value) for value in values
    ]
    _check_secrets(path, "\n".join([content.decode("latin-1"), *texts]))
    if position or any("exif:GPS" in text for text in texts):
        raise ValueError(
            f"{path} contains the GPS position where it was taken: save it again without EXIF "
            "and XMP."
        )
    if any(map(_LOCAL_PATH.search, texts)):
        raise ValueError(f"{path} contains a local path: save it again without text metadata.")


def _check_secrets(path: Path, text: str) -> None:
    for kind, pattern in _SECRETS.items():
        if pattern.search(text):
            raise ValueError(
                f"{path} seems to contain {kind}: remove it, and revoke it if it was ever shared."
            )


def _is_repo_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return not name
    return True


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(
            f"{path}: expected text in UTF-8, got other bytes; write it again."
        ) from None


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}; save the model again.") from None
    if not isinstance(content, dict):
        raise ValueError(
            f"{path}: expected a JSON object, got {type(content).__name__}; save the model again."
        )
    return content


def strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """The strings of a JSON value, each with the dotted key that leads to it."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, (dict, list)):
        for step, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from strings(inner, f"{key}.{step}" if key else str(step))
