"""Make a new mPLUG-Owl2 from a pretrained LLaMA and, optionally, a pretrained ViT.

The visual abstractor is new. Both branches of every modality-adaptive module start with the
language model's weights. So the new model first computes the same as the language model, with any
modality indicators.

V: ids that the language model predicts, D: its width, C: width of the vision encoder, P: positions
of one image.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.configuration_utils import PreTrainedConfig

from ..modeling.configuration_mplug_owl2 import (
    MplugOwl2AbstractorConfig,
    MplugOwl2Config,
    MplugOwl2TextConfig,
    MplugOwl2VisionConfig,
    padded_vocab_size,
)
from ..modeling.modeling_mplug_owl2 import MplugOwl2ForConditionalGeneration
from ..modeling.modeling_mplug_owl2_abstractor import MplugOwl2VisualAbstractor
from ..modeling.modeling_mplug_owl2_vision import MplugOwl2VisionModel
from ..processing import MplugOwl2ImageProcessor, MplugOwl2Processor
from .card import write_new_card
from .reading import DTYPES
from .staging import check_apart, staged_folder
from .stock_tokenizer import read_tokenizer
from .stock_vision import StockVision, check_not_quantized, fresh_vision, load_whole, read_vision

_ADAPTED = re.compile(r"\b(k_proj|v_proj|input_layernorm|post_attention_layernorm)\b")


@dataclass
class InitReport:
    """The parts that a new model was made from.

    Args:
        parameters: Component -> number of parameters; a head that is tied to the embeddings counts
            0.
        notes: Facts that may be unexpected, one sentence each.
    """

    language: str
    vision: str | None
    target: str
    dtype: str
    parameters: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def num_parameters(self) -> int:
        return sum(self.parameters.values())

    def summary(self) -> str:
        """One line for people."""
        parts = ", ".join(f"{name} {count:,}" for name, count in self.parameters.items())
        vision = "a fresh vision encoder" if self.vision is None else self.vision
        return f"{self.num_parameters:,} parameters, {self.dtype}, from {self.language} and {vision} ({parts})"


def initialize(
    language: str | Path,
    target: str | Path,
    vision: str | Path | None = None,
    image_size: int | None = None,
    num_queries: int = 64,
    num_abstractor_layers: int = 6,
    dtype: str | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> InitReport:
    """Make a new model and its processor, ready for training.

    Args:
        language: Folder or Hub id of a LLaMA with its tokenizer.
        target: Folder to make; it must not exist, or be empty.
        vision: Folder or Hub id of a CLIP or DINOv2 ViT, or of a model of this family. Default: a
            new, small vision encoder; for a language model of width 4096, one of the published 7B
            model's size.
        image_size: Width and height of the images in pixels. Position embeddings are resized to
            fit. Default: the vision model's.
        num_queries: Visual tokens of one image, without the end-of-image vector.
        num_abstractor_layers: Layers of the visual abstractor.
        dtype: "float32", "float16" or "bfloat16". Default: the language model's dtype.
        seed: Seed for the new random weights. The global random state is not changed.
        overwrite: Replace a model in `target`, after the new folder is complete.

    Raises:
        ValueError: If a source has the wrong type or is incomplete, sizes do not fit, or the target
            is in use.
    """
    _check_arguments(language, target, vision, image_size, dtype)
    report = InitReport(
        _name(language), None if vision is None else _name(vision), _name(target), dtype or ""
    )
    with _plain_errors():
        text_config = _read_language_config(language)
        tower = (
            fresh_vision(text_config, image_size)
            if vision is None
            else read_vision(vision, image_size)
        )
        abstractor = _abstractor_config(
            tower.config, text_config.hidden_size, num_queries, num_abstractor_layers
        )
    tokenizer, legacy = read_tokenizer(language, text_config.max_position_embeddings, report.notes)
    image_processor = MplugOwl2ImageProcessor(
        size=dict.fromkeys(("height", "width"), tower.config.image_size), **tower.pixels
    )
    processor = MplugOwl2Processor(
        image_processor, tokenizer, num_image_tokens=num_queries + 1, legacy=legacy
    )
    with staged_folder(Path(target), overwrite) as folder:
        _build(language, tower, abstractor, processor, seed, report).save_pretrained(folder)
        processor.save_pretrained(folder)
        _check_loads(folder)
        write_new_card(folder, report.language, report.vision, report.summary())
    return report


def _check_arguments(
    language: str | Path,
    target: str | Path,
    vision: str | Path | None,
    image_size: int | None,
    dtype: str | None,
) -> None:
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"expected a dtype of {', '.join(DTYPES)}, got {dtype!r}.")
    if image_size is not None and image_size < 1:
        raise ValueError(f"expected an image_size of at least one patch, got {image_size}.")
    check_apart(
        Path(target),
        *(Path(source) for source in (language, vision) if source and Path(source).is_dir()),
    )


@contextmanager
def _plain_errors() -> Iterator[None]:
    """What configurations refuse, as the ValueError behind it."""
    try:
        yield
    except StrictDataclassError as error:
        raise ValueError(str(error.__cause__ or error)) from None


def _name(source: str | Path) -> str:
    """A folder without what lies above it, or a Hub id."""
    return (
        Path(source).resolve().name if isinstance(source, Path) or Path(source).is_dir() else source
    )


def _read_language_config(source: str | Path) -> LlamaConfig:
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except OSError as error:
        raise ValueError(f"{source} has no valid config.json: {error}") from None
    if config.model_type != "llama":
        raise ValueError(
            f"{source}: expected a stock LLaMA of model_type 'llama', got {config.model_type!r}."
        )
    check_not_quantized(source, config)
    return config


def _build(
    source: str | Path,
    tower: StockVision,
    abstractor_config: MplugOwl2AbstractorConfig,
    processor: MplugOwl2Processor,
    seed: int,
    report: InitReport,
) -> MplugOwl2ForConditionalGeneration:
    """The model, whole but for what is computed when it is loaded."""
    language = load_whole(source, AutoModelForCausalLM, DTYPES.get(report.dtype, "auto"))
    report.dtype = str(language.dtype).removeprefix("torch.")
    config = _model_config(language.config, tower.config, abstractor_config, processor, report)
    with torch.device("meta"):
        model = MplugOwl2ForConditionalGeneration(config)
    abstractor, vision = _visual_side(abstractor_config, tower, seed, language.dtype)
    model.model.visual_abstractor, model.model.vision_tower = abstractor, vision
    _copy_language(language, model)
    for part in (config, config.vision_config, config.connector_config, config.text_config):
        part.dtype = language.dtype
    model.generation_config = _generation_config(language.generation_config, processor.tokenizer)
    report.parameters = _count(model)
    return model


def _model_config(
    language: LlamaConfig,
    vision: MplugOwl2VisionConfig,
    abstractor: MplugOwl2AbstractorConfig,
    processor: MplugOwl2Processor,
    report: InitReport,
) -> MplugOwl2Config:
    fields = set(LlamaConfig.__dataclass_fields__) - set(PreTrainedConfig.__dataclass_fields__)
    text = {
        name: getattr(language, name) for name in fields - {"vocab_size", "tie_word_embeddings"}
    }
    num_ids, image_token_id = language.vocab_size, processor.image_token_id
    if image_token_id != num_ids:
        where = "behind" if image_token_id > num_ids else "inside"
        report.notes.append(
            f"The placeholder is id {image_token_id}, {where} the {num_ids} ids of the language "
            "model's table: the tokenizer and the table differ in length."
        )
    return MplugOwl2Config(
        vision_config=vision,
        abstractor_config=abstractor,
        text_config=MplugOwl2TextConfig(
            **text, vocab_size=padded_vocab_size(max(num_ids - 1, image_token_id))
        ),
        image_token_id=image_token_id,
        output_vocab_size=num_ids,
        tie_word_embeddings=language.tie_word_embeddings,
    )


def _copy_language(language: LlamaForCausalLM, model: MplugOwl2ForConditionalGeneration) -> None:
    num_rows = model.config.text_config.vocab_size
    state = language.model.state_dict()
    # A copy, because saving treats tensors that share memory as tied.
    state.update(
        {
            _ADAPTED.sub(r"visual_\1", name): value.clone()
            for name, value in state.items()
            if _ADAPTED.search(name)
        }
    )
    state["embed_tokens.weight"] = _with_rows(state["embed_tokens.weight"], num_rows)
    model.model.language_model.load_state_dict(state, assign=True)
    if model.config.tie_word_embeddings:
        model.tie_weights()
    else:
        model.lm_head.weight = nn.Parameter(_with_rows(language.lm_head.weight.detach(), num_rows))


def _with_rows(table: Tensor, num_rows: int) -> Tensor:
    """(V, D) -> (num_rows, D), zeros at the end."""
    return torch.cat([table, table.new_zeros(num_rows - len(table), table.shape[1])])


def _generation_config(
    own: GenerationConfig, tokenizer: PreTrainedTokenizerFast
) -> GenerationConfig:
    """The language model's, which also stops where the chat template ends an answer."""
    # Transformers 5 does not save sampling settings if do_sample is false.
    if not own.do_sample:
        own.temperature = own.top_p = own.top_k = own.typical_p = None
    ends = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    ends = [end for end in ends if end is not None]
    if tokenizer.eos_token_id not in ends:
        ends = [*ends, tokenizer.eos_token_id]
    own.eos_token_id = ends if len(ends) > 1 else ends[0]
    if own.pad_token_id is None:
        own.pad_token_id = tokenizer.pad_token_id
    return own


def _count(model: MplugOwl2ForConditionalGeneration) -> dict[str, int]:
    parts: dict[str, nn.Module] = dict(model.model.named_children())
    counts = {
        name: sum(parameter.numel() for parameter in part.parameters())
        for name, part in parts.items()
    }
    return {
        **counts,
        "lm_head": 0 if model.config.tie_word_embeddings else model.lm_head.weight.numel(),
    }


def _abstractor_config(
    vision: MplugOwl2VisionConfig, projection_dim: int, num_queries: int, num_layers: int
) -> MplugOwl2AbstractorConfig:
    """Sizes in the proportions of the published model."""
    width = vision.hidden_size
    num_heads = max(1, width // 64)
    if width % num_heads or width % 4:
        raise ValueError(
            f"expected a vision encoder whose width is a multiple of 4 and of {num_heads}, the "
            f"heads of the visual abstractor, got {width}. Choose another vision encoder."
        )
    return MplugOwl2AbstractorConfig(
        num_learnable_queries=num_queries,
        hidden_size=width,
        encoder_hidden_size=width,
        intermediate_size=8 * round(2.75 * width / 8),
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        grid_size=vision.grid_size,
        use_cls_token=vision.use_cls_token,
        projection_dim=projection_dim,
    )


def _visual_side(
    config: MplugOwl2AbstractorConfig, tower: StockVision, seed: int, dtype: torch.dtype
) -> tuple[MplugOwl2VisualAbstractor, MplugOwl2VisionModel]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        abstractor = MplugOwl2VisualAbstractor._from_config(config, dtype=torch.float32)
        with torch.device("cpu" if tower.state is None else "meta"):
            vision = MplugOwl2VisionModel._from_config(tower.config, dtype=torch.float32)
    if tower.state is not None:
        vision.load_state_dict(tower.state, assign=True)
    for parameter in (*abstractor.parameters(), *vision.parameters()):
        # The sin-cos tables, which are buffers, stay float32.
        parameter.data = parameter.data.to(dtype)
    return abstractor, vision


def _check_loads(folder: Path) -> None:
    model, info = MplugOwl2ForConditionalGeneration.from_pretrained(
        folder, dtype="auto", output_loading_info=True
    )
    processor = MplugOwl2Processor.from_pretrained(folder)
    unexpected = sorted(info["unexpected_keys"])
    missing = sorted(info["missing_keys"])
    if unexpected or missing or processor.image_token_id != model.config.image_token_id:
        raise ValueError(
            f"the saved model does not load: {missing} missing, {unexpected} unexpected."
        )
