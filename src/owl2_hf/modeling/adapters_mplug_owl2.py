"""PEFT adapters: find their base model, and check that all their tensors are loaded.

PEFT is imported only when an adapter is loaded, because models on the Hub must load without PEFT.
"""

import json
import re
import sys
from collections.abc import Collection
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import CONFIG_NAME, cached_file, find_adapter_config_file, is_peft_available

from .weight_files_mplug_owl2 import read_weights

# Base model parameters that a fine-tune of the original trained together with the adapter, under
# our names.
NON_LORA_FILE = "non_lora_trainables.safetensors"

_HUB_KEYS = (
    "cache_dir",
    "force_download",
    "proxies",
    "token",
    "revision",
    "local_files_only",
    "subfolder",
)
_ORIGINAL_NAME = re.compile(
    r"\bmultiway\b|^(base_model\.model\.)?model\.layers\.|\btransformer\.h\.|\bvision_model\."
)


class Adapter(NamedTuple):
    """An adapter and the model that it belongs to, as `from_pretrained` takes them."""

    source: str | Path
    base: str
    hub: dict[str, Any]  # arguments to find the adapter on the Hub


def find_adapter(source: str | Path | None, kwargs: dict[str, Any]) -> Adapter | None:
    """What `from_pretrained(source, **kwargs)` names: an adapter, or `None` for a model, also one
    with its own adapter.

    Raises:
        ValueError: If the adapter is the original's, or does not tell its base model.
    """
    if source is None or not is_peft_available():
        return None
    adapter_kwargs = dict(kwargs.get("adapter_kwargs") or {})
    # AutoModel finds the adapter first. It passes the base model's name, and the adapter's here.
    found = adapter_kwargs.pop("_adapter_model_path", None)
    hub = hub_kwargs({**kwargs, **adapter_kwargs})
    settings = read_settings(found or source, hub)
    if settings is None or (Path(str(found or source)) / CONFIG_NAME).is_file():
        return None
    if found is not None:
        return Adapter(found, str(source), hub)
    if not settings.get("base_model_name_or_path"):
        raise ValueError(
            f"{source} is an adapter without base_model_name_or_path in its adapter_config.json: "
            "load the model that it was trained on, then call its load_adapter."
        )
    return Adapter(source, settings["base_model_name_or_path"], hub)


def hub_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those of the arguments that tell where to look on the Hub."""
    return {name: kwargs[name] for name in _HUB_KEYS if kwargs.get(name) is not None}


def read_settings(source: str | Path, hub: dict[str, Any]) -> dict[str, Any] | None:
    """Content of adapter_config.json; `None` where there is none.

    Raises:
        ValueError: If the adapter is one of the original's training code, or the file is not JSON.
    """
    path = find_adapter_config_file(str(source), **hub)
    if path is None:
        return None
    try:
        settings = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: expected an object, got {type(settings).__name__}.")
    targets = settings.get("target_modules") or []
    if any(map(_ORIGINAL_NAME.search, [targets] if isinstance(targets, str) else targets)):
        raise ValueError(_original_error(source))
    return settings


def read_non_lora(source: str | Path, hub: dict[str, Any]) -> dict[str, Tensor]:
    """What was trained beside an adapter, mostly nothing."""
    return _read_tensors(source, NON_LORA_FILE, hub) or {}


def read_adapter(
    source: str | Path, hub: dict[str, Any], use_safetensors: bool | None = None
) -> dict[str, Tensor]:
    """An adapter's tensors under the names in its file.

    Args:
        use_safetensors: `False` prefers the pickle where there are both, as in transformers.

    Raises:
        ValueError: If there are none, or the file is broken.
    """
    names = ["adapter_model.safetensors", "adapter_model.bin"]
    for name in reversed(names) if use_safetensors is False else names:
        if (tensors := _read_tensors(source, name, hub)) is not None:
            return tensors
    raise ValueError(f"{source} contains no adapter: expected {' or '.join(names)}.")


def whole_dora_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same, with DoRA's magnitudes under their whole names.

    PEFT saves `lora_magnitude_vector.weight` without its last part; transformers, unlike PEFT, does
    not put it back.
    """
    return {
        re.sub("lora_magnitude_vector$", r"\g<0>.weight", name): tensor
        for name, tensor in tensors.items()
    }


def find_file(source: str | Path, name: str, hub: dict[str, Any]) -> Path | None:
    """A file of a folder or a repository; `None` where it has none."""
    if Path(source).is_file():
        return None
    path = cached_file(
        str(source),
        name,
        **hub,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if path is None else Path(path)


def _read_tensors(source: str | Path, name: str, hub: dict[str, Any]) -> dict[str, Tensor] | None:
    path = find_file(source, name, hub)
    return None if path is None else read_weights(path)


def check_adapter_keys(
    source: str | Path | None, missing: Collection[str], unexpected: Collection[str]
) -> None:
    """An adapter fits where neither it nor the model has a tensor that the other lacks.

    Raises:
        ValueError: If there are such tensors.
    """
    if any(map(_ORIGINAL_NAME.search, unexpected)):
        raise ValueError(_original_error(source))
    problems = [
        f"{len(keys)} tensors {what}, the first is {min(keys)}"
        for keys, what in (
            (missing, "that the model needs are missing"),
            (unexpected, "are unknown to the model"),
        )
        if keys
    ]
    if problems:
        raise ValueError(
            f"The adapter {source} does not fit this model: {'; '.join(problems)}. Load the "
            "model that it was trained on (base_model_name_or_path in its adapter_config.json), "
            "and check that its files are complete."
        )


def has_named_rows(model: nn.Module) -> bool:
    """Whether each row of the batch has an adapter of its own (PEFT's `adapter_names`); hooks tell
    adapted layers.
    """
    if "peft" not in sys.modules:
        return False
    hooks = (hook for module in model.modules() for hook in module._forward_pre_hooks.values())
    return any("adapter_names" in getattr(hook, "keywords", ()) for hook in hooks)


class NotPlacedError(ValueError):
    """An adapter fits its model, but is not in it."""


def place_adapter(
    source: str | Path | None, model: PreTrainedModel, adapter_name: str, saved: dict[str, Tensor]
) -> None:
    """Check an adapter that transformers has loaded, and let PEFT put in what transformers left
    out.

    Before 5.19 that is all but the layers of the adapter itself: whole modules and single tokens
    that were trained.

    Raises:
        ValueError: If the adapter does not fit.
    """
    try:
        check_adapter(source, model, adapter_name, saved)
    except NotPlacedError:
        plain = {name.removeprefix("base_model.model."): tensor for name, tensor in saved.items()}
        import_module("peft").set_peft_model_state_dict(model, plain, adapter_name=adapter_name)
        check_adapter(source, model, adapter_name, saved)


def check_adapter(
    source: str | Path | None, model: PreTrainedModel, adapter_name: str, saved: dict[str, Tensor]
) -> None:
    """An adapter that is in a model is the one that was saved: all of it, and nothing else.

    What belongs to it is PEFT's to say; parts of names are not enough, for an adapter may have any
    name.

    Raises:
        ValueError: If it is not.
    """
    get_state_dict = import_module("peft").get_peft_model_state_dict
    found = get_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)

    def plain(name: str) -> str:
        """Without PEFT's prefix, that of the model below a head, and the adapter's name, which PEFT
        takes out of it.
        """
        name = name.removeprefix("base_model.model.").removeprefix(f"{model.base_model_prefix}.")
        return ".".join(part for part in name.split(".") if part != adapter_name)

    placed, given = (
        {plain(name): tensor for name, tensor in state.items()} for state in (found, saved)
    )
    # PEFT also saves the whole embedding if it is adapted.
    known = set(map(plain, model.state_dict()))
    check_adapter_keys(source, placed.keys() - given.keys(), given.keys() - placed.keys() - known)
    different = [
        name
        for name, tensor in placed.items()
        if not tensor.is_meta and not _is_same(tensor, given[name])
    ]
    if different:
        raise NotPlacedError(
            f"The adapter {source} was not loaded completely: {len(different)} tensors of the "
            f"model have other values, the first is {min(different)}."
        )


def _is_same(tensor: Tensor, saved: Tensor) -> bool:
    expected = saved.to(tensor.device, tensor.dtype)
    return tensor.shape == expected.shape and torch.equal(
        tensor.nan_to_num(), expected.nan_to_num()
    )


def _original_error(source: str | Path | None) -> str:
    return (
        f"{source} is an adapter in the original's layout: convert it with `owl2-hf convert "
        f"{source} TARGET --base BASE_MODEL --to adapter`."
    )
