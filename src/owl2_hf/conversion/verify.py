"""Check that a converted folder is complete and correct."""

import gc
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from transformers import GenerationConfig
from transformers.utils import PROCESSOR_NAME

from ..hub import check_code
from ..modeling import MplugOwl2Config
from ..modeling.presets_mplug_owl2 import PRESET_FILE
from ..modeling.scoring_mplug_owl2 import level_ids
from ..processing import MplugOwl2Processor
from ..scoring.decision import check_scorer
from .layouts import open_source
from .reading import ConversionError, is_finite
from .sources import HuggingFaceSource, Source, expected_tensors, model_class, read_config

# Ids of LLaMA-2's tokenizer, which is recognised by a piece of its vocabulary.
_LLAMA2_PIECE = ("▁USER", 3148, 1001)
_LLAMA2_IDS = {
    "Hello": [1, 15043],
    "USER: ": [1, 3148, 1001, 29901, 29871],
    "ASSISTANT:": [1, 319, 1799, 9047, 13566, 29901],
    "\n": [1, 29871, 13],
    "\U0001f999": [1, 29871, 243, 162, 169, 156],
}
_PROBES = (
    "Hello",
    "What is this?",
    " two  spaces",
    "\n",
    "1234 ü 漢字 \U0001f999",
    "USER: ASSISTANT:",
)
_PROMPT = "USER: <|image|>What is this? ASSISTANT:"


def verify(
    target: str | Path, against: str | Path | None = None, base: str | Path | None = None
) -> list[str]:
    """Check a folder in this package's format.

    Args:
        target: The folder.
        against: The checkpoint that the folder was converted from. Every tensor is compared with
            it. If transformers can load it directly, so are the logits of a fixed prompt and image.
        base: Base model of `against`; see `convert`.

    Returns:
        One sentence for each check that passed.

    Raises:
        ConversionError: If a check fails. The message says what is wrong and where.
    """
    target = Path(target)
    source = open_source(target)
    if not isinstance(source, HuggingFaceSource) or source.is_original:
        raise ConversionError(f"{target} is {source.layout}: convert it first.")
    checks = [_check_tensors(source)]
    processor = _load_processor(target)
    if processor is not None:
        checks += _check_processor(processor, source.config)
    else:
        checks.append("there is no processor: the model accepts only token ids and pixels")
    checks.append(_check_code(target))
    checks += _check_preset(target, processor)
    if against is not None:
        original = open_source(against, base)
        is_loadable = isinstance(original, HuggingFaceSource)
        checks.append(_compare_tensors(source, original))
        del original
    logits = _logits(target, processor)
    checks.append(f"a forward pass gives finite logits of shape {tuple(logits.shape)}")
    if against is not None:
        checks += _compare_logits(logits, Path(against) if is_loadable else None, processor)
    return checks


def _check_tensors(source: Source) -> str:
    expected = expected_tensors(source.config)
    count = 0
    for piece in source.read():
        for name, tensor in piece.tensors:
            if name not in expected:
                raise ConversionError(
                    f"{piece.where}: the model of config.json has no such parameter, or the file "
                    "has it twice."
                )
            if tensor.shape != (shape := expected.pop(name).shape):
                raise ConversionError(
                    f"{piece.where}: expected shape {tuple(shape)}, got {tuple(tensor.shape)}."
                )
            if not is_finite(tensor):
                raise ConversionError(f"{piece.where}: it holds NaN or infinite values.")
            count += tensor.numel()
    if expected:
        raise ConversionError(
            f"{source.folder} lacks {len(expected)} parameters, the first is "
            f"{next(iter(expected))}."
        )
    return f"all {count:,} parameters exist, are finite and have the shapes of config.json"


def _load_processor(target: Path) -> MplugOwl2Processor | None:
    if not (target / PROCESSOR_NAME).is_file():
        return None
    try:
        return MplugOwl2Processor.from_pretrained(target, trust_remote_code=False)
    except Exception as error:  # damaged files raise almost any error
        raise ConversionError(f"the processor of {target} cannot be loaded: {error}") from None


def _check_code(target: Path) -> str:
    """The code beside the weights is this package's, and the settings of generation can be read."""
    names = sorted(path.name for path in target.glob("*.py"))
    try:
        check_code(target, names)
        GenerationConfig.from_pretrained(target)
    except (ValueError, TypeError) as error:
        raise ConversionError(str(error)) from None
    except OSError as error:
        raise ConversionError(
            f"{target}: its generation_config.json cannot be read: {error}"
        ) from None
    return (
        f"{len(names)} code files are identical to this package's"
        if names
        else "there is no code for trust_remote_code"
    )


def _check_preset(target: Path, processor: MplugOwl2Processor | None) -> list[str]:
    """What says how the model scores, where it does."""
    try:
        preset = check_scorer(target)
        if preset is None:
            return []
        if processor is not None:
            level_ids(processor.tokenizer, preset)
    except ValueError as error:
        raise ConversionError(str(error)) from None
    asked = f"{PRESET_FILE} asks for {', '.join(preset.prompts)} in {len(preset.levels)} levels"
    return [asked if processor is None else f"{asked}, and the vocabulary has all level words"]


def _check_processor(processor: MplugOwl2Processor, config: MplugOwl2Config) -> list[str]:
    pairs = {
        "image placeholder": (processor.image_token_id, config.image_token_id),
        "positions of an image": (processor.num_image_tokens, config.num_image_tokens),
        "pixels of a side": (
            processor.image_processor.size["height"],
            config.vision_config.image_size,
        ),
    }
    for name, (found, expected) in pairs.items():
        if found != expected:
            raise ConversionError(
                f"the processor: expected the {name} {expected} of the model, got {found}."
            )
    chat = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}
    ]
    try:
        rendered = processor.apply_chat_template(chat, add_generation_prompt=True)
    except Exception as error:  # Jinja templates raise many kinds of errors
        raise ConversionError(f"the chat template cannot be rendered: {error}") from None
    # Earlier versions left the BOS token to the tokenizer.
    if rendered.removeprefix(processor.tokenizer.bos_token or "") != _PROMPT:
        raise ConversionError(f"the chat template: expected {_PROMPT!r}, got {rendered!r}.")
    num_tokens = len(processor.tokenizer)
    if num_tokens > config.text_config.vocab_size:
        raise ConversionError(
            f"expected at most {config.text_config.vocab_size} tokens, the rows of the embedding "
            f"table, got a tokenizer with {num_tokens}."
        )
    inputs = processor(text=_PROMPT, images=_picture(config))
    num_positions = len(inputs["pixel_values"]) * config.num_image_tokens
    if (found := inputs["input_ids"][0].count(config.image_token_id)) != num_positions:
        raise ConversionError(
            f"expected {num_positions} placeholders for an image, got {found} from the processor."
        )
    return [_check_ids(processor), f"the processor fits the model: {found} positions for an image"]


def _check_ids(processor: MplugOwl2Processor) -> str:
    tokenizer = processor.tokenizer
    piece, *ids = _LLAMA2_PIECE
    is_llama2 = tokenizer(piece.strip("▁"), add_special_tokens=False).input_ids == ids
    for text, expected in _LLAMA2_IDS.items() if is_llama2 else ():
        if (found := tokenizer(text).input_ids) != expected:
            raise ConversionError(
                f"the tokenizer: expected LLaMA-2's ids {expected} for {text!r}, got {found}."
            )
    for text in _PROBES:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        if tokenizer.unk_token_id not in ids and tokenizer.decode(ids).strip() != text.strip():
            raise ConversionError(
                f"the tokenizer: expected {text!r} after encoding and decoding, got "
                f"{tokenizer.decode(ids)!r}."
            )
    if is_llama2:
        return f"the tokenizer gives LLaMA-2's ids for {len(_LLAMA2_IDS)} texts"
    return (
        f"the tokenizer encodes and decodes {len(_PROBES)} texts without loss; it is not "
        "LLaMA-2's, so its ids were not compared"
    )


def _compare_tensors(target: HuggingFaceSource, original: Source) -> str:
    """Both streams once; what is small enough to wait for its partner in the other does."""
    expected = {name: tensor for piece in target.read() for name, tensor in piece.tensors}
    compared = 0
    for piece in original.read():
        for name, tensor in piece.tensors:
            if name not in expected:
                continue  # a tied head
            found = expected.pop(name)
            if not torch.equal(found, tensor.to(found.dtype)):
                raise ConversionError(
                    f"{piece.where}: its values differ from {name} in {target.folder}."
                )
            compared += 1
    if left := [name for name in expected if not name.endswith("_pos_embed")]:
        raise ConversionError(f"{target.folder} has {left[0]}, which the source does not have.")
    return f"{compared} tensors equal the source's, bit for bit" + (
        f"; {len(expected)} tables are computed" if expected else ""
    )


def _picture(config: MplugOwl2Config) -> Image.Image:
    """Colours that change along both sides."""
    side = config.vision_config.image_size
    ramp = Image.linear_gradient("L").resize((side, side))
    return Image.merge("RGB", (ramp, ramp.rotate(90), ramp.rotate(180)))


def _inputs(processor: MplugOwl2Processor | None, config: MplugOwl2Config) -> dict[str, Tensor]:
    if processor is not None:
        return dict(processor(text=_PROMPT, images=_picture(config), return_tensors="pt"))
    vision = config.vision_config
    shape = (1, vision.num_channels, vision.image_size, vision.image_size)
    pixels = torch.linspace(-1, 1, steps=torch.Size(shape).numel()).reshape(shape)
    text = torch.arange(3, min(config.output_vocab_size or 8, 8)).unsqueeze(0)
    run = torch.full((1, config.num_image_tokens), config.image_token_id)
    return {"input_ids": torch.cat([text, run, text], dim=1), "pixel_values": pixels}


@torch.no_grad()
def _logits(folder: Path, processor: MplugOwl2Processor | None) -> Tensor:
    """(L, V) logits, whose finiteness is checked."""
    try:
        model = model_class(read_config(folder)[0]).from_pretrained(folder).eval()
    except (ValueError, OSError, RuntimeError) as error:
        raise ConversionError(f"{folder} cannot be loaded: {error}") from None
    logits = model(**_inputs(processor, model.config)).logits[0]
    del model
    gc.collect()
    if not logits.isfinite().all():
        raise ConversionError(f"{folder}: the logits of a prompt with an image are not finite.")
    return logits


def _compare_logits(
    logits: Tensor, against: Path | None, processor: MplugOwl2Processor | None
) -> list[str]:
    if against is None:
        return ["logits were not compared: transformers cannot load the source without conversion"]
    expected = _logits(against, processor)
    if expected.dtype != logits.dtype:
        return [
            f"logits were not compared: the source is {expected.dtype}, the folder {logits.dtype}"
        ]
    # The weights are bit-identical here, but their address in memory can select another kernel,
    # which rounds differently.
    error = (logits.float() - expected.float()).abs().max().item()
    bound = 16 * torch.finfo(logits.dtype).eps * expected.float().abs().max().item()
    if error > bound:
        raise ConversionError(
            f"the logits of a prompt with an image differ from the source's by up to {error:.3g}; "
            f"rounding explains up to {bound:.3g}."
        )
    return [f"the logits of a prompt with an image equal the source's, to {error:.1e}"]
