"""Recipes: all settings of a training run, in one YAML file."""

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import TrainingArguments

_FOLDER = Path(__file__).parent


@strict
@dataclass
class DataRecipe:
    """What is trained on.

    Args:
        train: Rows to train on: a file, a folder or a data set's id, or several of them.
        eval: Rows to compute the loss on from time to time.
        image_folder: Where relative paths of pictures start; the folder of the file if not given.
        max_length: Longest row in tokens, pictures included; longer ones lose their end.
        streaming: Read row by row, never all at once.
        allow_outside: Rows may name pictures outside the folder and http(s) URLs.
        bad_rows: `stop` looks at all rows of the files before the first step, and ends there if one cannot be learned
            from; `skip` leaves such rows out when they come, and says which.
    """

    train: str | list[str] = ""
    eval: str | list[str] | None = None
    image_folder: str | None = None
    max_length: int | None = 2048
    streaming: bool = False
    allow_outside: bool = False
    bad_rows: str = "stop"

    def __post_init__(self):
        _check_choice("bad_rows", self.bad_rows, ("stop", "skip"))


@strict
@dataclass
class AdapterRecipe:
    """A LoRA adapter.

    Args:
        preset: Which modules it adapts, a name in `LORA_PRESETS`.
        r, lora_alpha, lora_dropout: As in `peft.LoraConfig`.
        train_connector: The connector trains, too, and is saved with the adapter.
    """

    preset: str = "language"
    r: int = 64
    lora_alpha: int = 16
    lora_dropout: int | float = 0.05
    train_connector: bool = False


@strict
@dataclass
class Recipe:
    """A training run.

    Args:
        model: Folder or Hub id; `default` for the embedded model.
        output_dir: Folder to make.
        trains: What trains: a name in `TRAINABLE`, or a list of names in `COMPONENTS`.
        image_size: Side of a picture in pixels, where not the model's own.
        dtype: Of the weights while they are trained.
        attn_implementation: As `from_pretrained` takes it.
        data: What is trained on.
        adapter: A LoRA adapter to train.
        quantization: `4bit` or `8bit`: weights of the frozen language model, by bitsandbytes.
        learning_rates: Component -> its own learning rate, where not `trainer.learning_rate`.
        vision_layer_decay: Factor of the learning rate from each layer of the vision encoder to the one below.
        trainer: Settings of transformers' `TrainingArguments`.
    """

    model: str = ""
    output_dir: str = ""
    trains: str | list[str] = "instruct"
    image_size: int | None = None
    dtype: str = "float32"
    attn_implementation: str = "sdpa"
    data: DataRecipe = field(default_factory=DataRecipe)
    adapter: AdapterRecipe | None = None
    quantization: str | None = None
    learning_rates: dict[str, int | float] = field(default_factory=dict)
    vision_layer_decay: int | float | None = None
    trainer: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        _check_choice("dtype", self.dtype, ("float32", "bfloat16", "float16"))
        _check_choice("quantization", self.quantization, (None, "4bit", "8bit"))
        known = {one.name: one.default for one in dataclasses.fields(TrainingArguments)}
        _check_known("trainer", self.trainer, known.keys() - {"output_dir", "resume_from_checkpoint"})
        for name, value in self.trainer.items():
            _check_kind(f"trainer.{name}", value, known[name])
        if self.quantization is not None and self.adapter is None:
            raise ValueError("quantization needs an adapter: quantised weights themselves cannot train.")
        if self.adapter is not None and self.image_size is not None:
            raise ValueError("image_size changes the model, which an adapter cannot carry: leave one of them out.")

    def to_yaml(self) -> str:
        """The recipe as a file of its own."""
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)


def shipped_recipes() -> dict[str, Path]:
    """Name -> file of the recipes that come with the package."""
    return {path.stem: path for path in sorted((_FOLDER / "recipes").glob("*.yaml"))}


def load_recipe(name: str | Path, settings: Sequence[str] = ()) -> Recipe:
    """A recipe, from its file or by its name.

    Args:
        settings: `key=value` each, in the order in which they replace what the file says; keys of inner tables are
            written `trainer.max_steps`, values as YAML.

    Raises:
        ValueError: There is no such recipe, it is no YAML, or a key is unknown or has a value of another type.
    """
    path = shipped_recipes().get(str(name), Path(name))
    if not path.is_file():
        raise ValueError(f"{name}: expected the file of a recipe, or one of {', '.join(shipped_recipes())}.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected keys with values, got {type(values).__name__}.")
    for setting in settings:
        _set(values, setting)
    try:
        return _build(Recipe, values, "")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _set(values: dict[str, Any], setting: str) -> None:
    key, equals, value = setting.partition("=")
    if not equals:
        raise ValueError(f"expected key=value, got {setting!r}.")
    *tables, last = key.split(".")
    for name in tables:
        if values.get(name) is None:
            values[name] = {}
        values = values[name]
        if not isinstance(values, dict):
            raise ValueError(f"{setting!r}: {name} holds a value, no keys.")
    try:
        values[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ValueError(f"{setting!r}: the value is no YAML: {error}") from None


def _build(kind: type, values: Any, where: str) -> Any:
    """A dataclass of this module from what YAML holds."""
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected keys with values, got {values!r}.")
    fields = {one.name: one for one in dataclasses.fields(kind)}
    _check_known(where, values, fields)
    tables = {"data": DataRecipe, "adapter": AdapterRecipe}
    built = {}
    for name, value in values.items():
        if name in tables and kind is Recipe:
            built[name] = None if value is None and name == "adapter" else _build(tables[name], value or {}, name)
        else:
            built[name] = _plain_numbers(value)
    try:
        return kind(**built)
    except StrictDataclassFieldValidationError as error:
        problem = re.sub(r"<class '(\w+)'>", r"\1", str(error.__cause__).partition(". Errors:")[0])
        raise ValueError(f"{where}: {problem}".removeprefix(": ")) from None


def _plain_numbers(value: Any) -> Any:
    """Numbers like 1e-4, which YAML reads as text, as numbers."""
    if isinstance(value, dict):
        return {key: _plain_numbers(one) for key, one in value.items()}
    return float(value) if isinstance(value, str) and re.fullmatch(r"[\d.]+e[-+]?\d+", value) else value


def _check_known(where: str, values: Mapping[str, Any], known: Any) -> None:
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(str(name), list(known), n=1)
            meant = f", did you mean {near[0]!r}?" if near else f": expected some of {', '.join(sorted(known))}."
            raise ValueError(f"unknown key {f'{where}.{name}'.lstrip('.')!r}{meant}")


def _check_kind(name: str, value: Any, default: Any) -> None:
    """Numbers where the default is a number, true or false where it is one; the Trainer itself does not look."""
    for kind, accepted, expected in ((bool, bool, "true or false"), ((int, float), (int, float), "a number")):
        if isinstance(default, kind):
            if not isinstance(value, accepted) or (accepted is not bool and isinstance(value, bool)):
                raise ValueError(f"{name}: expected {expected}, got {value!r}.")
            return


def _check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(str, choices))}, got {value!r}.")
