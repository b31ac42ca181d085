"""Folders that are whole or absent: built beside their final place, flushed to disk, and renamed at the end."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

# What belongs to a model and is stale beside another one; all else in a folder is its owner's.
_MODEL_FILE = re.compile(
    r".*\.(bin|safetensors|pt|index\.json)|(adapter_|preprocessor_|processor_|generation_|tokenizer_)?config\.json"
    r"|tokenizer\.(json|model)|special_tokens_map\.json|added_tokens\.json|chat_template\.jinja"
    r"|conversion_report\.json|README\.md|\w+_mplug_owl2\w*\.py"
)


@contextmanager
def staged_folder(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder to fill that becomes `target` at the end of the block; an exception leaves `target` as it was.

    A run that was killed leaves a hidden folder beside the target, which the next run removes.

    Args:
        target: Must not exist, or be an empty folder.
        overwrite: A filled folder may stand there; its model files give way at the end, its other files stay.

    Raises:
        ValueError: The target is in use, or another process is building it.
    """
    target = target.resolve()  # a link keeps its place, the folder behind it is what gets replaced
    _check_free(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    staging, previous = (target.with_name(f".{target.name}.{role}") for role in ("partial", "previous"))
    lock = FileLock(target.with_name(f".{target.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"{target} is being built by another process: wait for it, or choose another.") from None
    try:
        _recover(target, staging, previous)
        staging.mkdir()
        yield staging
        _flush(staging)
        _check_free(target, overwrite)
        if target.exists():
            _carry_over(target, staging)
            target.rename(previous)
        staging.rename(target)
        _flush_names(target.parent)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{target} cannot be written: {getattr(error, 'strerror', None) or error}.") from error
    finally:
        if previous.exists() and not target.exists():
            previous.rename(target)
        for folder in (staging, previous):
            shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):
            Path(lock.lock_file).unlink()
        lock.release()


def _check_free(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise ValueError(f"{target} is a file: expected a folder to make.")
    if not overwrite and any(target.iterdir()):
        raise ValueError(f"{target} is not empty: remove it, choose another, or ask to overwrite it.")


def _recover(target: Path, staging: Path, previous: Path) -> None:
    """What a killed run left behind: what it built is discarded, what it moved aside comes back."""
    if previous.exists() and not target.exists():
        previous.rename(target)
    for folder in (staging, previous):
        if folder.exists():
            shutil.rmtree(folder)


def _carry_over(target: Path, staging: Path) -> None:
    for path in target.iterdir():
        if not _MODEL_FILE.fullmatch(path.name) and not (staging / path.name).exists():
            if path.is_dir() and not path.is_symlink():
                shutil.copytree(path, staging / path.name, symlinks=True)
            else:
                shutil.copy2(path, staging / path.name, follow_symlinks=False)


def _flush(folder: Path) -> None:
    """Every file of the folder on the disk itself, before a rename says that it is whole."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    _flush_names(folder)


def _flush_names(folder: Path) -> None:
    if os.name != "posix":
        return  # elsewhere a folder cannot be opened
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
