"""Find the complete checkpoints of a training run, and what is wrong with the others."""

import json
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

STATE = "trainer_state.json"
# Written into a checkpoint; contains the number of processes.
VERSIONS = "versions.json"
# `torch.save` writes zip files with a checksum of each tensor.
_ZIPPED = {".pt", ".pth", ".bin"}
# Names of FSDP's folders (and of its files, without shards); DeepSpeed has a file that names the
# folder.
_WEIGHTS = (
    "model.safetensors",
    "adapter_model.safetensors",
    "pytorch_model*",
    "adapter_model.bin",
    "latest",
)
_OPTIMIZER = ("optimizer.pt", "optimizer.bin", "optimizer_*", "latest")


def last_checkpoint(
    folder: str | Path, on_damaged: Callable[[Path, str], None] = lambda checkpoint, reason: None
) -> Path | None:
    """The newest whole checkpoint of a run.

    Args:
        on_damaged: Called with each newer checkpoint that is not whole, and with what is wrong with
            it.
    """
    numbered = [
        path for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if _step(path).isdigit()
    ]
    for checkpoint in sorted(numbered, key=lambda path: int(_step(path)), reverse=True):
        reason = find_damage(checkpoint)
        if reason is None:
            return checkpoint
        on_damaged(checkpoint, reason)
    return None


def find_damage(checkpoint: Path) -> str | None:
    """What keeps a run from going on from a checkpoint, `None` if nothing does.

    Every file is there, as long as it should be, and what `torch.save` wrote has the checksums that
    it was written with. Weights in safetensors carry none: a changed number in them is not seen.
    """
    missing = _missing(checkpoint)
    return f"{missing} is missing" if missing else _first_damaged(checkpoint.rglob("*"), checkpoint)


def is_finished(folder: Path, num_steps: int) -> bool:
    """Whether a run of that many steps left its trained model in the folder, whole."""
    has_weights = any(
        any(folder.glob(name)) for name in ("*.safetensors", "*.safetensors.index.json")
    )
    return (
        has_weights
        and _first_damaged(folder.iterdir(), folder) is None
        and steps_of(folder) >= num_steps
    )


def steps_of(folder: Path) -> int:
    """Steps that the state in a folder counts, 0 without a state."""
    return _read(folder / STATE).get("global_step", 0)


def num_processes(checkpoint: Path) -> int | None:
    """How many processes wrote a checkpoint, `None` where that is not known."""
    if (checkpoint / "rng_state.pth").is_file():
        return 1
    recorded = _read(checkpoint / VERSIONS).get("processes")
    return recorded or len(list(checkpoint.glob("rng_state_*.pth"))) or None


def _step(path: Path) -> str:
    return path.name.rpartition("-")[2]


def _missing(checkpoint: Path) -> str | None:
    """The first thing that a checkpoint lacks."""
    if not (checkpoint / STATE).is_file():  # the last file that the Trainer writes
        return STATE
    is_deepspeed = (checkpoint / "latest").is_file()
    is_sharded = any(checkpoint.glob("*.index.json"))
    is_adapter = any(checkpoint.glob("**/adapter_config.json"))
    has_weights = is_sharded or any(any(checkpoint.glob(name)) for name in _WEIGHTS)
    if not has_weights and not any(checkpoint.glob("*/adapter_model.safetensors")):
        return "adapter_model.safetensors" if is_adapter else "model.safetensors"
    if not is_adapter and not (checkpoint / "config.json").is_file():
        return "config.json"
    if not any(any(checkpoint.glob(name)) for name in _OPTIMIZER):
        return "optimizer.pt"
    if not is_deepspeed and not (checkpoint / "scheduler.pt").is_file():
        return "scheduler.pt"
    if (
        is_deepspeed
        and not (checkpoint / (checkpoint / "latest").read_text(encoding="utf-8").strip()).is_dir()
    ):
        return "the folder that `latest` names"
    if (checkpoint / "rng_state.pth").is_file():
        return None
    # With several processes, at least two, each has its own state.
    count = max(num_processes(checkpoint) or 0, 2)
    if not any(checkpoint.glob("rng_state_*.pth")):
        return "rng_state.pth"
    states = (f"rng_state_{rank}.pth" for rank in range(count))
    return next((name for name in states if not (checkpoint / name).is_file()), None)


def _first_damaged(files: Iterable[Path], folder: Path) -> str | None:
    for path in sorted(files):
        reason = _damage_of(path) if path.is_file() else None
        if reason is not None:
            return f"{path.relative_to(folder)} {reason}"
    return None


def _damage_of(path: Path) -> str | None:
    if path.suffix in {".json", ".safetensors"} | _ZIPPED and not path.stat().st_size:
        return "is empty"
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt"):  # compares the length of the file with its header
                return None
        if path.suffix in _ZIPPED:
            with zipfile.ZipFile(path) as archive:
                return None if archive.testzip() is None else "is damaged: its checksum is wrong"
        if path.suffix == ".json":
            content = json.loads(path.read_text(encoding="utf-8"))
            shards = (
                content.get("weight_map", {}).values() if path.name.endswith(".index.json") else ()
            )
            lost = sorted(name for name in set(shards) if not (path.parent / name).is_file())
            return f"names {lost[0]}, which does not exist" if lost else None
    except Exception:  # damaged files raise almost any error
        return "is truncated or damaged"
    return None


def _read(path: Path) -> dict[str, Any]:
    """What a JSON file holds, nothing where it cannot be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
