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

from ..processing.image_processing_mplug_owl2 import ASPECT_RATIOS
from ..scoring import IMAGE_TOKEN
from ..scoring.labels import DENSITIES
from ..scoring.losses import PAIR_LOSSES

_FOLDER = Path(__file__).parent
# The questions of Q-Align's training rows, equally often; inference uses the first.
QUESTIONS = (
    "How would you rate the quality of this image?",
    "What do you think about the quality of this image?",
    "Can you rate the quality of this picture?",
    "Can you judge the quality of this image?",
    "How would you judge the quality of this image?",
    "What is your quality rating for this image?",
    "What's your opinion on the quality of this picture?",
    "Rate the quality of this image.",
    "Could you evaluate the quality of this image?",
    "How do you assess the quality of this image?",
)


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
        bad_rows: `stop` looks at all rows of the files before the first step, and ends there if one
            cannot be learned from; `skip` leaves such rows out when they come, and says which; of
            opinions before the first step.
        image_cache: Folder that keeps prepared images, for later epochs and runs; see `ImageCache`.
    """

    train: str | list[str] = ""
    eval: str | list[str] | None = None
    image_folder: str | None = None
    max_length: int | None = 2048
    streaming: bool = False
    allow_outside: bool = False
    bad_rows: str = "stop"
    image_cache: str | None = None

    def __post_init__(self) -> None:
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
class ScoreRecipe:
    """A scorer that learns from opinions of images; `data` names files of opinions then.

    Args:
        labels: `hard`, one level word and the next-token loss (Q-Align); or `soft`, a probability
            of each level, KL at the level, and pairs of images (DeQA-Score).
        levels: Level words, best first; each one token of the vocabulary.
        questions: Asked in even shares; the first one alone in evaluation. The image stands behind
            the question and a line break, or where the question says `<|image|>`.
        answer: With `{level}` at the place of the level.
        image_aspect_ratio: How an image becomes square, see `MplugOwl2ImageProcessor`.
        train_split, eval_split: Only rows of this part.
        weights: How many times each of `data.train` counts; each once if not given.
        density: Of soft labels, `pdf` or `cdf` as in `soft_label`; or a list, one of each of
            `data.train`.
        pair_weight, image_weight, level_weight, in_level_weight: Of the parts of the loss, see
            `LossWeights`.
        pair_loss: `fidelity`, or `bce` where no opinion has a standard deviation.
        score_stds: `fixed` takes 1 as the standard deviation of both scores of a pair, `predicted`
            the model's.
        keep_best: Checkpoints to keep, those with the highest SRCC; the newest stays, too. All if
            not given.
    """

    labels: str = "hard"
    levels: list[str] = field(default_factory=lambda: ["excellent", "good", "fair", "poor", "bad"])
    questions: list[str] = field(default_factory=lambda: list(QUESTIONS))
    answer: str = "The quality of the image is {level}."
    image_aspect_ratio: str = "pad"
    train_split: str | None = None
    eval_split: str | None = None
    weights: list[int | float] | None = None
    density: str | list[str] = "pdf"
    pair_weight: int | float = 1.0
    image_weight: int | float = 0.05
    level_weight: int | float = 1.0
    in_level_weight: int | float = 0.0
    pair_loss: str = "fidelity"
    score_stds: str = "fixed"
    keep_best: int | None = None

    def __post_init__(self) -> None:
        _check_choice("labels", self.labels, ("hard", "soft"))
        _check_choice("image_aspect_ratio", self.image_aspect_ratio, ASPECT_RATIOS)
        _check_choice("pair_loss", self.pair_loss, PAIR_LOSSES)
        _check_choice("score_stds", self.score_stds, ("fixed", "predicted"))
        for one in [self.density] if isinstance(self.density, str) else self.density:
            _check_choice("density", one, DENSITIES)
        if len(set(self.levels)) != len(self.levels) or len(self.levels) < 2:
            raise ValueError(f"levels: expected two or more different words, got {self.levels}.")
        if not self.questions or any(
            question.count(IMAGE_TOKEN) > 1 for question in self.questions
        ):
            raise ValueError(
                f"questions: expected at least one, each with at most one {IMAGE_TOKEN}, got "
                f"{self.questions}."
            )
        if self.answer.count("{level}") != 1:
            raise ValueError(f"answer: expected {{level}} once, got {self.answer!r}.")
        if self.weights is not None and not all(weight > 0 for weight in self.weights):
            raise ValueError(f"weights: expected numbers above 0, got {self.weights}.")
        if self.keep_best is not None and self.keep_best < 1:
            raise ValueError(f"keep_best: expected at least 1, got {self.keep_best}.")


@strict
@dataclass
class Recipe:
    """A training run.

    Args:
        model: Folder or Hub id; `default` or `default-scorer` for a model inside the package.
        output_dir: Folder to make.
        trains: What trains: a name in `TRAINABLE`, or a list of names in `COMPONENTS`.
        image_size: Side of a picture in pixels, where not the model's own.
        dtype: Of the weights while they are trained.
        attn_implementation: As `from_pretrained` takes it.
        data: What is trained on.
        adapter: A LoRA adapter to train.
        scores: How a scorer learns from opinions; rows are conversations if not given.
        quantization: `4bit` or `8bit`: weights of the frozen language model, by bitsandbytes.
        learning_rates: Component -> its own learning rate, where not `trainer.learning_rate`.
        vision_layer_decay: Factor of the learning rate from each layer of the vision encoder to the
            one below.
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
    scores: ScoreRecipe | None = None
    quantization: str | None = None
    learning_rates: dict[str, int | float] = field(default_factory=dict)
    vision_layer_decay: int | float | None = None
    trainer: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_choice("dtype", self.dtype, ("float32", "bfloat16", "float16"))
        _check_choice("quantization", self.quantization, (None, "4bit", "8bit"))
        known = {one.name: one.default for one in dataclasses.fields(TrainingArguments)}
        # Its name in older releases of transformers, which newer ones still read.
        if "activation_checkpointing" not in known:
            renamed = {"activation_checkpointing": "gradient_checkpointing"}
            self.trainer = {renamed.get(name, name): it for name, it in self.trainer.items()}
        _check_known(
            "trainer", self.trainer, known.keys() - {"output_dir", "resume_from_checkpoint"}
        )
        for name, value in self.trainer.items():
            _check_kind(f"trainer.{name}", value, known[name])
        if self.quantization is not None and self.adapter is None:
            raise ValueError(
                "quantization needs an adapter: quantised weights themselves cannot train."
            )
        if self.adapter is not None and self.image_size is not None:
            raise ValueError(
                "image_size changes the model, which an adapter cannot save: leave one of them out."
            )
        if self.scores is not None:
            self._check_scores(self.scores)

    def _check_scores(self, scores: ScoreRecipe) -> None:
        """Whether the other settings leave a scorer what it needs."""
        sources = 1 if isinstance(self.data.train, str) else len(self.data.train)
        for name in ("weights", "density"):
            given = getattr(scores, name)
            if isinstance(given, list) and len(given) != sources:
                raise ValueError(
                    f"scores.{name}: expected {sources} values, one for each of data.train, got "
                    f"{len(given)}."
                )
        if self.data.streaming:
            raise ValueError(
                "data.streaming: a scorer needs all rows to find their range of scores: leave "
                "it out."
            )
        if self.trainer.get("label_smoothing_factor"):
            raise ValueError(
                "trainer.label_smoothing_factor does not work with a scorer's own labels: leave "
                "it out."
            )
        if scores.keep_best is not None and self.trainer.get("save_total_limit") is not None:
            raise ValueError(
                "scores.keep_best and trainer.save_total_limit both remove checkpoints: use "
                "only one of them."
            )
        if scores.keep_best is not None and self.data.eval is None:
            raise ValueError(
                "scores.keep_best compares SRCC: set data.eval to the opinions to evaluate on."
            )
        if scores.keep_best is not None and self.trainer.get("eval_strategy") not in (
            "steps",
            "epoch",
        ):
            raise ValueError(
                "scores.keep_best compares SRCC during training: set trainer.eval_strategy to "
                "steps or epoch."
            )

    def to_yaml(self) -> str:
        """The recipe as a file of its own."""
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)


def shipped_recipes() -> dict[str, Path]:
    """Name -> file of the recipes that come with the package."""
    return {path.stem: path for path in sorted((_FOLDER / "recipes").glob("*.yaml"))}


def load_recipe(name: str | Path, settings: Sequence[str] = ()) -> Recipe:
    """A recipe, from its file or by its name.

    Args:
        settings: `key=value` each, in the order in which they replace what the file says; keys of
            inner tables are written `trainer.max_steps`, values as YAML.

    Raises:
        ValueError: If there is no such recipe, it is no YAML, or a key is unknown or has a value of
            another type.
    """
    path = shipped_recipes().get(str(name), Path(name))
    if not path.is_file():
        raise ValueError(
            f"{name}: expected a recipe file, or one of {', '.join(shipped_recipes())}."
        )
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from None
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
            raise ValueError(f"{setting!r}: {name} is a value and has no keys.")
    try:
        values[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ValueError(f"{setting!r}: the value is not valid YAML: {error}") from None


def _build(kind: type, values: Any, where: str) -> Any:
    """A dataclass of this module from what YAML holds."""
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected keys with values, got {values!r}.")
    fields = {one.name: one for one in dataclasses.fields(kind)}
    _check_known(where, values, fields)
    tables = {"data": DataRecipe, "adapter": AdapterRecipe, "scores": ScoreRecipe}
    built = {}
    for name, value in values.items():
        if name in tables and kind is Recipe:
            built[name] = (
                None
                if value is None and name != "data"
                else _build(tables[name], value or {}, name)
            )
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
    return (
        float(value)
        if isinstance(value, str) and re.fullmatch(r"[\d.]+e[-+]?\d+", value)
        else value
    )


def _check_known(where: str, values: Mapping[str, Any], known: Any) -> None:
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(str(name), list(known), n=1)
            meant = (
                f", did you mean {near[0]!r}?"
                if near
                else f": expected some of {', '.join(sorted(known))}."
            )
            raise ValueError(f"unknown key {f'{where}.{name}'.lstrip('.')!r}{meant}")


def _check_kind(name: str, value: Any, default: Any) -> None:
    """Numbers where the default is a number, true or false where it is one; the Trainer itself does
    not look.
    """
    for kind, accepted, expected in (
        (bool, bool, "true or false"),
        ((int, float), (int, float), "a number"),
    ):
        if isinstance(default, kind):
            if not isinstance(value, accepted) or (
                accepted is not bool and isinstance(value, bool)
            ):
                raise ValueError(f"{name}: expected {expected}, got {value!r}.")
            return


def _check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(str, choices))}, got {value!r}.")
