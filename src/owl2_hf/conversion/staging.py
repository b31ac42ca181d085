"""Build a folder beside its final place, and rename it when it is complete."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

# Files that belong to a model and are replaced with it; all other files in a folder are the user's.
_PACKAGE = Path(__file__).parents[1]
_CODE = {
    path.name
    for part in ("modeling", "processing")
    for path in (_PACKAGE / part).glob("*_mplug_owl2*.py")
}
_MODEL_FILE = re.compile(
    r"(pytorch_)?model(-\d+-of-\d+)?\.(bin|safetensors)|(pytorch_)?model\.(bin|safetensors)\.index\.json"
    r"|(adapter_model|non_lora_trainables)\.(bin|safetensors)|tokenizer\.(json|model)|special_tokens_map\.json"
    r"|(adapter_|preprocessor_|processor_|generation_|tokenizer_)?config\.json|added_tokens\.json|chat_template\.jinja"
    r"|conversion_report\.json|qwen\.tiktoken"
)


def check_apart(target: Path, *sources: Path) -> None:
    """Refuse a target that is a source, or lies inside one or around it.

    Raises:
        ValueError: If it does.
    """
    for source in sources:
        inner, outer = target.resolve(), source.resolve()
        if inner == outer or outer in inner.parents or inner in outer.parents:
            raise ValueError(f"{target} and {source} overlap: choose another target.")


@contextmanager
def staged_folder(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """Give a folder to fill, which becomes `target` at the end of the block.

    An exception leaves `target` unchanged.

    A run that was killed leaves a hidden folder beside the target, which the next run removes.

    Args:
        target: Must not exist, or be an empty folder.
        overwrite: A filled folder may stand there; its model files give way at the end, its other
            files stay.

    Raises:
        ValueError: If the target is in use, or another process is building it.
    """
    target = target.resolve()  # a link stays, and the folder that it points to is replaced
    _check_free(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    staging, previous = (
        target.with_name(f".{target.name}.{role}") for role in ("partial", "previous")
    )
    lock = FileLock(target.with_name(f".{target.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"{target} is being written by another process: wait for it, or choose another."
        ) from None
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
        if isinstance(error, SafetensorError) and "serializing" not in str(error):
            raise
        raise ValueError(
            f"{target} cannot be written: {getattr(error, 'strerror', None) or error}."
        ) from error
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
        raise ValueError(f"{target} is a file: expected a folder to create.")
    if target.stat().st_dev != target.parent.stat().st_dev:
        raise ValueError(
            f"{target} is a mount point, which cannot be replaced: choose a folder inside it."
        )
    if not overwrite and any(target.iterdir()):
        raise ValueError(
            f"{target} is not empty: remove it, choose another, or overwrite it (--overwrite)."
        )


def _recover(target: Path, staging: Path, previous: Path) -> None:
    """What a killed run left behind: what it built is discarded, what it moved aside comes back."""
    if previous.exists() and not target.exists():
        previous.rename(target)
    for folder in (staging, previous):
        if folder.exists():
            shutil.rmtree(folder)


def _carry_over(target: Path, staging: Path) -> None:
    for path in target.iterdir():
        is_folder = path.is_dir() and not path.is_symlink()
        if not is_folder and (_MODEL_FILE.fullmatch(path.name) or path.name in _CODE):
            continue
        copy = staging / path.name
        if copy.exists():
            if path.name != "README.md" or path.read_bytes() == copy.read_bytes():
                continue
            copy = staging / "README.previous.md"  # the user may have edited it
        if is_folder:
            shutil.copytree(path, copy, symlinks=True)
        else:
            shutil.copy2(path, copy, follow_symlinks=False)


def _flush(folder: Path) -> None:
    """Every file of the folder on the disk itself, before a rename says that it is whole."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    _flush_names(folder)


def _flush_names(folder: Path) -> None:
    if os.name != "posix":
        return  # other systems cannot open a folder
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
