"""Check which files of a folder make a complete model that may be published."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open

from .contents import (
    check_card,
    check_metadata,
    check_picture,
    check_text,
    read_json,
    read_text,
    strings,
)

INDEX = "model.safetensors.index.json"
_ADAPTER = "adapter_model.safetensors"
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
_PICTURE = re.compile(r"(pictures/)?\w[\w.+-]*\.(png|jpe?g)", re.IGNORECASE)
_ALLOWED = re.compile(
    r"((generation_|processor_|preprocessor_|tokenizer_|adapter_)?config|tokenizer|special_tokens_map|added_tokens"
    r"|conversion_report|scorer|decision|model\.safetensors\.index)\.json|tokenizer\.model|qwen\.tiktoken"
    r"|(chat|decision)_template\.jinja|README\.md"
    r"|(LICENSE|NOTICE)[\w-]*(\.txt|\.md)?|\.gitattributes|\w+_mplug_owl2\w*\.py"
    r"|\.eval_results/[\w.-]+\.yaml"
    rf"|(adapter_model|non_lora_trainables)\.safetensors|{WEIGHTS.pattern}"
)
_PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}
_BINARY = {".safetensors", ".model", ".tiktoken", ".png", ".jpg", ".jpeg"}
_PROGRAM = re.compile(rb"\x7fELF|MZ\x90\x00|\xcf\xfa\xed\xfe")  # of Linux, Windows, macOS
_ARCHIVE_OR_PICKLE = re.compile(rb"PK\x03\x04|\x80[\x02-\x05]")
_SECRET_NAME = re.compile(
    r"\.env.*|.*\.(pem|key)|id_(rsa|dsa|ecdsa|ed25519).*|\.netrc|(stored_)?tokens?(\.txt)?|credentials.*",
    re.IGNORECASE,
)
_RELATIVE_IMPORT = re.compile(r"^\s*from \.(\w+) import", re.MULTILINE)


def checked_names(folder: Path) -> list[str]:
    """Run every check that needs no network, and return the names of the files to upload."""
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder}: expected a model folder with a config.json, got none; save or convert one "
            "first."
        )
    config = read_json(folder / "config.json")
    if (found := config.get("model_type")) != "mplug_owl2":
        raise ValueError(
            f"{folder}: expected model_type 'mplug_owl2' in config.json, got {found!r}: convert it "
            "first."
        )
    names = _allowed_names(folder)
    check_card(folder / "README.md")
    for name in names:
        if Path(name).suffix.lower() not in _BINARY:
            check_text(folder / name)
        elif name.endswith(".safetensors"):
            check_metadata(folder / name)
        elif _PICTURE.fullmatch(name):
            check_picture(folder / name)
    check_code(folder, names)
    if any(name.startswith(("scorer.", "decision")) for name in names):
        from ..scoring.decision import check_scorer  # torch, which takes seconds

        check_scorer(folder)
    _check_weights(folder, names)
    return names


def _allowed_names(folder: Path) -> list[str]:
    card = folder / "README.md"
    shown = read_text(card) if card.is_file() else ""
    names: list[str] = []
    refused: dict[str, list[str]] = {}
    for path in _entries(folder):
        name = path.relative_to(folder).as_posix()
        if reason := _reason_against(path, name, folder, shown):
            refused.setdefault(reason, []).append(name)
        else:
            names.append(name)
    if refused:
        reasons = "; ".join(f"{reason}: {', '.join(found)}" for reason, found in refused.items())
        raise ValueError(
            f"{folder} contains files that must not be published. {reasons}. Remove them from "
            "the folder."
        )
    return names


def _entries(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.name in ("pictures", ".eval_results") and path.is_dir() and not path.is_symlink():
            yield from sorted(path.iterdir())
        else:
            yield path


def _reason_against(path: Path, name: str, folder: Path, card: str) -> str | None:
    if path.is_symlink() and not _is_honest_link(path, folder):
        return "Links to other folders or to missing files"
    if _SECRET_NAME.fullmatch(path.name):
        return "Files named like secrets"
    if path.suffix.lower() in _PICKLES:
        return "Pickles, which can run code on loading (convert writes safetensors)"
    is_picture = _PICTURE.fullmatch(name)
    if not path.is_file() or not (is_picture or _ALLOWED.fullmatch(name)):
        return "Not part of a model of this package"
    if is_picture and name not in card:
        return "Images that README.md does not show"
    return _reason_against_content(path)


def _reason_against_content(path: Path) -> str | None:
    """A safetensors header may begin with the bytes of a pickle: only one that cannot be read is
    looked at.
    """
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="np"):
                return None
    except (SafetensorError, OSError):
        damaged: str | None = "Damaged weight files, truncated or not safetensors"
    else:
        damaged = None
    with path.open("rb") as file:
        start = file.read(4)
    if _PROGRAM.match(start):
        return "Programs under another name"
    if _ARCHIVE_OR_PICKLE.match(start):
        return "Pickles or archives under another name, which can run code on loading"
    return damaged


def _is_honest_link(path: Path, folder: Path) -> bool:
    """Into the folder itself, or into the blobs of a Hub cache, of one repository or shared by
    all.
    """
    target = Path(os.path.realpath(path))
    if not target.is_file():
        return False
    in_repo = target.parent.name == "blobs" and re.match(
        r"(models|datasets|spaces)--", target.parents[1].name
    )
    store = target.parents[1] if len(target.parents) > 1 else target.parent
    is_shared = store.name == "blobs" and (store / ".huggingface-shared-blobs").is_file()
    return target.is_relative_to(folder.resolve()) or bool(in_repo) or is_shared


def check_code(folder: Path, names: list[str]) -> None:
    """Check that the remote code in the folder is the package's own and complete."""
    package = Path(__file__).parents[1]
    ours = {
        file.name: file
        for part in ("modeling", "processing")
        for file in (package / part).glob("*.py")
    }
    needed: set[str] = set()
    for name in names:
        if name.endswith(".py"):
            content = (folder / name).read_bytes()
            if name not in ours or content != ours[name].read_bytes():
                raise ValueError(
                    f"{folder / name} differs from the package's file: save the model again."
                )
            needed.update(_RELATIVE_IMPORT.findall(content.decode()))
        elif name.endswith("config.json"):
            maps = (
                value
                for key, value in strings(read_json(folder / name))
                if "auto_map" in key.split(".")
            )
            needed.update(value.rsplit(".", 1)[0] for value in maps)
    if missing := sorted({f"{module}.py" for module in needed} - set(names)):
        raise ValueError(
            f"{folder}: the code files {', '.join(missing)} are missing; save the model again."
        )


def _check_weights(folder: Path, names: list[str]) -> None:
    weights = {name for name in names if WEIGHTS.fullmatch(name)}
    expected = {"model.safetensors"}
    if INDEX in names:
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(
                f"{folder / INDEX}: expected a weight_map, got {weight_map!r}; save the model "
                "again."
            )
        expected = {str(name) for name in weight_map.values()}
    elif _ADAPTER in names and not weights:
        return
    if missing := sorted(expected - weights):
        raise ValueError(
            f"{folder}: its weights are incomplete, {', '.join(missing)} is missing; save the "
            "model again."
        )
    if stale := sorted(weights - expected):
        raise ValueError(f"{folder}: {', '.join(stale)} is not named in {INDEX}; remove it.")
