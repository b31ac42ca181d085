"""LoRA fine-tunes of the original's training code and its descendants: an adapter beside
the other weights that were trained (`non_lora_trainables.bin`), merged into their base model or
brought to today's PEFT.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..modeling.configuration_mplug_owl2 import MplugOwl2Config
from ..processing.tokenization_mplug_owl2 import read_json
from .reading import ConversionError, check_tensor, describe, is_finite, read_tensors
from .sources import OnFile, Piece, Source, expected_tensors, nobody, read_config, rename

_CONFIG = "adapter_config.json"
_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_OTHER_FILES = ("non_lora_trainables.safetensors", "non_lora_trainables.bin")
# Settings that would change the sum W + scale * B A -> the value that does not.
_PLAIN = {
    "peft_type": "LORA",
    "bias": "none",
    "fan_in_fan_out": False,
    "use_dora": False,
    "lora_bias": False,
    "init_lora_weights": True,
    "layer_replication": None,
    "modules_to_save": None,
}


def is_lora(folder: Path) -> bool:
    """Whether a folder holds a LoRA fine-tune, whatever its name."""
    return (folder / _CONFIG).is_file() or any((folder / name).is_file() for name in _OTHER_FILES)


@dataclass
class LoraUpdate:
    """A low-rank update of one of our parameters: `scale * B @ A` is added to it.

    Args:
        down: (r, in), PEFT's A.
        up: (out, r), PEFT's B.
    """

    down: Tensor
    up: Tensor
    scale: float


@dataclass
class LoraSource:
    """A LoRA fine-tune on its base model, as a stream of merged tensors.

    Args:
        folder: Holds adapter_config.json, the adapter, and mostly non_lora_trainables.bin and a
            config.json.
        base: What it was trained on.
    """

    folder: Path
    base: Source
    files: list[Path] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.layout = f"a LoRA fine-tune on {self.base.layout}"
        adapter = self.folder
        # The fine-tune's configuration sets how images become square.
        self.config = (
            read_config(adapter)[0] if (adapter / "config.json").is_file() else self.base.config
        )
        self.settings = _read_settings(adapter)
        self.own_files = [
            adapter / name
            for names in (_ADAPTER_FILES, _OTHER_FILES)
            for name in _first(adapter, names)
        ]
        if not self.own_files or self.own_files[0].name not in _ADAPTER_FILES:
            raise ConversionError(
                f"{adapter} contains no adapter: expected {' or '.join(_ADAPTER_FILES)}."
            )
        if len(self.own_files) > 1:
            _describe_scorer(self.config, read_tensors(self.own_files[1]))
        self._expected = expected_tensors(self.config)
        self.updates = self._read_updates(self.own_files[0])
        self.replaced = self._read_replaced(self.own_files[1]) if len(self.own_files) > 1 else {}
        self.files = [*self.own_files, *self.base.files]
        self.folder = self.base.folder

    def read(self, on_file: OnFile = nobody, meta: bool = False) -> Iterator[Piece]:
        for file in self.own_files:
            on_file(file)
        left = {*self.updates, *self.replaced}
        for piece in self.base.read(on_file, meta):
            left.difference_update(name for name, _ in piece.tensors)
            yield Piece(
                piece.where,
                piece.key,
                [(name, self._merged(name, tensor)) for name, tensor in piece.tensors],
            )
        # Of the fine-tune's parameters, the base may lack only computed tables and a scorer's head.
        for name in sorted(left):
            if not (name.endswith("_pos_embed") or name.startswith("score.")):
                raise ConversionError(
                    f"the fine-tune changes {name}, which the base model does not have."
                )
            tensor = self.replaced[name].to("meta") if meta else self.replaced[name]
            yield Piece(f"{self.own_files[-1]}, tensor {name!r}", name, [(name, tensor)])

    def _merged(self, name: str, tensor: Tensor) -> Tensor:
        """The base's tensor after the fine-tune, in the base's dtype; the sum is taken in
        float32.
        """
        dtype, update = tensor.dtype, self.updates.get(name)
        if tensor.is_meta or (update is None and name not in self.replaced):
            return tensor
        total = self.replaced.get(name, tensor).float()
        if update is not None:
            total = total + update.scale * (update.up.float() @ update.down.float())
        merged = total.to(dtype)
        if is_finite(total) and not is_finite(merged):
            raise ConversionError(
                f"{self.own_files[-1].parent}: the merged {name} is too large for the base's "
                f"{dtype}; convert the base with --dtype float32 first."
            )
        return merged

    def _read_updates(self, file: Path) -> dict[str, LoraUpdate]:
        pairs: dict[str, dict[str, Tensor]] = {}
        wheres: dict[str, str] = {}
        for key, tensor in read_tensors(file).items():
            where = describe(file, key)
            match = re.fullmatch(r"(.+)\.lora_(A|B)(?:\.default)?\.weight", _strip(key))
            if match is None:
                raise ConversionError(
                    f"{where}: expected lora_A and lora_B weights of linear layers."
                )
            pairs.setdefault(match[1], {})[match[2]] = check_tensor(where, tensor)
            wheres[match[1]] = where
        updates = {}
        for module, pair in pairs.items():
            if pair.keys() != {"A", "B"}:
                raise ConversionError(
                    f"{wheres[module]}: expected a pair of lora_A and lora_B, got only one of them."
                )
            scale = _scale(self.settings, module, pair["A"].shape[0])
            # B has the same rows as the weight, so it is split or padded in the same way.
            for name, up in self._under_our_names(wheres[module], f"{module}.weight", pair["B"]):
                updates[name] = self._checked(
                    wheres[module], name, LoraUpdate(pair["A"], up, scale)
                )
        return updates

    def _checked(self, where: str, name: str, update: LoraUpdate) -> LoraUpdate:
        expected = self._expected[name].shape
        shapes = tuple(update.up.shape), tuple(update.down.shape)
        if shapes != ((expected[0], update.down.shape[0]), (update.down.shape[0], expected[-1])):
            raise ConversionError(
                f"{where}: B and A of shapes {shapes} do not fit a weight of {tuple(expected)}."
            )
        if not (is_finite(update.up) and is_finite(update.down)):
            raise ConversionError(f"{where}: it holds NaN or infinite values.")
        return update

    def _read_replaced(self, file: Path) -> dict[str, Tensor]:
        replaced = {}
        for key, tensor in read_tensors(file).items():
            where = describe(file, key)
            # Newer PEFT keeps an adapted weight in a module `base_layer`.
            own_key = _strip(key).replace(".base_layer.", ".")
            for name, value in self._under_our_names(where, own_key, check_tensor(where, tensor)):
                if value.shape != self._expected[name].shape:
                    expected = tuple(self._expected[name].shape)
                    raise ConversionError(
                        f"{where}: expected shape {expected}, got {tuple(value.shape)}."
                    )
                if not is_finite(value):
                    raise ConversionError(f"{where}: it holds NaN or infinite values.")
                replaced[name] = value
        return replaced

    def _under_our_names(self, where: str, key: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
        is_ours = key in self._expected and tensor.shape[:1] == self._expected[key].shape[:1]
        renamed = [(key, tensor)] if is_ours else rename(where, key, tensor, self.config)
        for name, _ in renamed:
            if name not in self._expected:
                raise ConversionError(
                    f"{where}: the model of config.json has no such parameter ({name})."
                )
        return renamed


def _first(folder: Path, names: tuple[str, ...]) -> list[str]:
    return [name for name in names if (folder / name).is_file()][:1]


def _strip(key: str) -> str:
    """The name of the parameter inside PEFT's wrappers; the two of the original's training code
    differ by one.
    """
    key = key.removeprefix("base_model.")
    while key.startswith(("model.model.", "model.lm_head.", "model.deepmlp.")):
        key = key.removeprefix("model.")
    return key


def _describe_scorer(config: MplugOwl2Config, tensors: Mapping[str, Tensor]) -> None:
    """Complete the configuration of a Q-Scorer, whose training code says nothing of its head and
    tokens in it.
    """
    biases = {_strip(key): tensor for key, tensor in tensors.items() if ".bias" in key}
    layers = [name for name in biases if name.startswith("deepmlp.model.")]
    names = [f"deepmlp.model.{i}.linear.bias" for i in range(len(layers))]
    if not names or set(names) != set(layers):
        return
    config.deepmlp_hidden_dims, config.num_labels = [biases[name].numel() for name in names], 1
    config.score_tokens = [f"<score{i}>" for i in range(1, 6)]


def _read_settings(folder: Path) -> dict[str, Any]:
    try:
        settings = read_json(folder / _CONFIG)
    except ValueError as error:
        raise ConversionError(str(error)) from None
    if not settings:
        raise ConversionError(
            f"{folder / _CONFIG} does not exist: it is needed for the adapter's scale."
        )
    for key, plain in _PLAIN.items():
        if (found := settings.get(key, plain)) not in (plain, None):
            raise ConversionError(f"{folder / _CONFIG}: expected {key} {plain!r}, got {found!r}.")
    for key in ("r", "lora_alpha"):
        _check_number(folder / _CONFIG, key, settings.get(key))
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = settings.get(key) or {}
        if not isinstance(patterns, dict) or not all(
            re.fullmatch(r"[\w.]+", name) for name in patterns
        ):
            raise ConversionError(
                f"{folder / _CONFIG}: expected names of modules in {key}, got {str(patterns)[:80]}."
            )
        for name, value in patterns.items():
            _check_number(folder / _CONFIG, f"{key} of {name}", value)
    if settings.get("use_rslora") not in (True, False, None):
        raise ConversionError(
            f"{folder / _CONFIG}: expected use_rslora true or false, got "
            f"{settings['use_rslora']!r}."
        )
    return settings


def _check_number(path: Path, name: str, value: Any) -> None:
    if type(value) not in (int, float) or not 0 < value <= 2**20:
        raise ConversionError(f"{path}: expected a positive {name}, got {str(value)[:40]!r}.")


def _scale(settings: dict[str, Any], module: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r) with rsLoRA; both may be given for single modules."""

    def of_module(pattern_key: str, default: Any) -> Any:
        patterns = settings.get(pattern_key) or {}
        return next(
            (value for key, value in patterns.items() if f".{module}".endswith(f".{key}")), default
        )

    if rank != (expected := of_module("rank_pattern", settings["r"])):
        raise ConversionError(
            f"{_CONFIG}: expected r {rank}, the rows of lora_A of {module}, got {expected}."
        )
    alpha = of_module("alpha_pattern", settings["lora_alpha"])
    return alpha / (rank**0.5 if settings.get("use_rslora") else rank)


def save_adapter(source: LoraSource, folder: Path) -> None:
    """The fine-tune as today's PEFT and this package's names have it.

    `adapter_config.json` and `adapter_model.safetensors` are PEFT's;
    `non_lora_trainables.safetensors` holds the other trained weights, to be loaded into the base
    model before the adapter.
    """
    from peft import LoraConfig
    from safetensors.torch import save_file

    settings = source.settings
    modules = {name.removesuffix(".weight"): update for name, update in source.updates.items()}
    config = LoraConfig(
        r=settings["r"],
        lora_alpha=settings["lora_alpha"],
        lora_dropout=settings.get("lora_dropout") or 0.0,
        use_rslora=bool(settings.get("use_rslora")),
        target_modules=sorted(modules),
        rank_pattern={
            name: len(update.down)
            for name, update in modules.items()
            if len(update.down) != settings["r"]
        },
        alpha_pattern=_alpha_pattern(settings, modules),
        task_type="CAUSAL_LM",
        inference_mode=True,
        base_model_name_or_path=str(source.folder.resolve()),
    )
    config.save_pretrained(str(folder))
    tensors = {}
    for name, update in modules.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = update.down.contiguous().clone()
        tensors[f"base_model.model.{name}.lora_B.weight"] = update.up.contiguous().clone()
    save_file(tensors, folder / _ADAPTER_FILES[0], metadata={"format": "pt"})
    if source.replaced:
        others = {name: tensor.contiguous().clone() for name, tensor in source.replaced.items()}
        save_file(others, folder / _OTHER_FILES[0], metadata={"format": "pt"})


def _alpha_pattern(settings: dict[str, Any], modules: dict[str, LoraUpdate]) -> dict[str, float]:
    pattern = {}
    for name, update in modules.items():
        rank = len(update.down)
        alpha = update.scale * (rank**0.5 if settings.get("use_rslora") else rank)
        if alpha != settings["lora_alpha"]:
            pattern[name] = alpha
    return pattern


def load_non_lora(model: torch.nn.Module, folder: str | Path) -> None:
    """Put the other trained weights of a fine-tune, as `save_adapter` writes them, into its base
    model.

    Raises:
        ConversionError: If the model has no such parameters.
    """
    file = Path(folder) / _OTHER_FILES[0]
    result = model.load_state_dict(read_tensors(file), strict=False)
    if result.unexpected_keys:
        raise ConversionError(f"{file}: the model has no parameter {result.unexpected_keys[0]}.")
