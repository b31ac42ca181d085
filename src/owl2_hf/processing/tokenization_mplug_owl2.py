"""The original's tokenizers, as byte-pair encodings of `tokenizers` with the same ids."""

import base64
import binascii
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    normalizers,
    pre_tokenizers,
    processors,
)
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX
from transformers.tokenization_utils_sentencepiece import SentencePieceExtractor

# Noncharacters of Unicode, which texts do not contain. The tokenizer's normaliser acts on them
# after control tokens are found: it deletes ESCAPE, so that "<" + ESCAPE + "s>" is the text "<s>"
# and never the control token; and a text that starts with NO_PREFIX gets no leading space. Offsets
# and assistant masks stay right, unlike with transformers' own `sanitize_control_tokens`.
ESCAPE = "\ufdd0"
NO_PREFIX = "\ufdd1"

CONTROL_TOKENS = ("<unk>", "<s>", "</s>")
IMAGE_TOKEN = "<|image|>"
QWEN_END_OF_TEXT = "<|endoftext|>"
QWEN_CONTROL_TOKENS = (
    QWEN_END_OF_TEXT,
    "<|im_start|>",
    "<|im_end|>",
    *(f"<|extra_{i}|>" for i in range(205)),
)

SENTENCEPIECE_VOCABULARY, QWEN_VOCABULARY = "tokenizer.model", "qwen.tiktoken"
TOKENIZER_FILES = (SENTENCEPIECE_VOCABULARY, QWEN_VOCABULARY, "tokenizer.json")


def llama_tokenizer(
    vocab: dict[str, int],
    merges: Sequence[tuple[str, str]],
    model_max_length: int = 2048,
    added: Sequence[str] = (),
) -> PreTrainedTokenizerFast:
    """LLaMA's tokenizer from its pieces, with the image placeholder behind them.

    Each text between control tokens gets a leading space of its own, unless it starts with
    `NO_PREFIX`; `ESCAPE` inside the name of a control token keeps that name text. Neither reaches
    the model.

    Args:
        vocab: Piece -> id, with `<unk>`, `<s>`, `</s>` as 0, 1, 2 and the byte pieces `<0x00>` to
            `<0xFF>`.
        merges: Pairs of pieces, first come first merged.
        added: Tokens that a fine-tune has behind the pieces; the placeholder stands behind them.
    """
    vocab = {**vocab, **{token: index for index, token in enumerate(added, len(vocab))}}
    tokenizer = Tokenizer(
        BPE(vocab, list(merges), unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Prepend("▁"),
            normalizers.Replace(Regex(f"^▁{NO_PREFIX}"), ""),
            normalizers.Replace(" ", "▁"),
            normalizers.Replace(ESCAPE, ""),
        ]
    )
    # As in sentencepiece, an ASCII byte stands for itself even beside bytes that are no UTF-8.
    ascii_bytes = [decoders.Replace(f"<0x{byte:02X}>", chr(byte)) for byte in range(128)]
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            *ascii_bytes,
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocab["<s>"])]
    )
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token in (*special.values(), *added, IMAGE_TOKEN)
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **special,
        pad_token="<unk>",
        extra_special_tokens={"image_token": IMAGE_TOKEN},
        model_max_length=model_max_length,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def qwen_tokenizer(
    ranks: dict[bytes, int], num_text_tokens: int | None = None, model_max_length: int = 8192
) -> PreTrainedTokenizerFast:
    """Qwen's tokenizer from the ranks of its pieces, with the image placeholder behind all other
    ids.

    No token stands in front of a text, `<|endoftext|>` ends it and pads, and `</s>` is text.
    `ESCAPE` and `NO_PREFIX` are deleted.

    Args:
        ranks: Bytes of a piece -> id, which is also its turn to be merged; the control tokens
            follow.
        num_text_tokens: Rows of the model's weights, where they are more: the placeholder stands
            behind them.
    """
    names = bytes_to_unicode()

    def name(piece: bytes) -> str:
        return "".join(names[byte] for byte in piece)

    vocab = {name(piece): rank for piece, rank in ranks.items()}
    vocab.update({token: len(ranks) + index for index, token in enumerate(QWEN_CONTROL_TOKENS)})
    # Reserved ids get names, into which no text is ever split.
    vocab.update(
        {f"<|reserved_{index}|>": index for index in range(len(vocab), num_text_tokens or 0)}
    )
    vocab[IMAGE_TOKEN] = len(vocab)
    tokenizer = Tokenizer(
        BPE(vocab, [(name(a), name(b)) for a, b in _merges(ranks)], ignore_merges=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace(ESCAPE, ""), normalizers.Replace(NO_PREFIX, ""), normalizers.NFC()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token in (*QWEN_CONTROL_TOKENS, IMAGE_TOKEN)
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=QWEN_END_OF_TEXT,
        pad_token=QWEN_END_OF_TEXT,
        extra_special_tokens={"image_token": IMAGE_TOKEN},
        model_max_length=model_max_length,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def _merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """All pairs of pieces that make a piece, in the order of its rank."""
    pairs = []
    for piece in sorted(ranks, key=ranks.__getitem__):
        splits = [(piece[:end], piece[end:]) for end in range(1, len(piece))]
        known = [(left, right) for left, right in splits if left in ranks and right in ranks]
        pairs += sorted(known, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    return pairs


def has_tokenizer(source: Path) -> bool:
    """Whether a folder holds a tokenizer that `load_tokenizer` reads."""
    return any((source / name).is_file() for name in TOKENIZER_FILES)


def load_tokenizer(
    source: str | Path,
    legacy: bool | None = None,
    num_text_tokens: int | None = None,
    added_tokens: Sequence[str] = (),
) -> tuple[PreTrainedTokenizerFast, bool]:
    """The tokenizer of an original checkpoint, and its `legacy` flag.

    Args:
        source: A folder with tokenizer.model, qwen.tiktoken or tokenizer.json, or one of these
            files.
        legacy: The flag, where something else than the tokenizer_config.json beside the tokenizer
            tells it.
        num_text_tokens: Rows of the model's weights, which may be more than Qwen's tokenizer has
            tokens; and more than LLaMA's by added tokens (Q-Scorer's).
        added_tokens: These, where no added_tokens.json tells them.

    Raises:
        ValueError: If there is none, or it is neither LLaMA's kind nor Qwen's.
    """
    source = Path(source)
    folder = source if source.is_dir() else source.parent
    if source.is_dir():
        paths = [source / name for name in TOKENIZER_FILES]
        source = next((path for path in paths if path.is_file()), paths[-1])
    if not source.is_file():
        raise ValueError(
            f"{source} does not exist: expected a {', a '.join(TOKENIZER_FILES[:-1])} or a "
            "tokenizer.json."
        )
    if source.suffix == ".tiktoken":
        return _load_qwen(source, folder, num_text_tokens), True
    vocab, merges = _read_json(source) if source.suffix == ".json" else _read_sentencepiece(source)
    if [vocab.get(token) for token in CONTROL_TOKENS] != [0, 1, 2] or IMAGE_TOKEN in vocab:
        raise ValueError(
            f"{source} is not a LLaMA tokenizer: expected {', '.join(CONTROL_TOKENS)} as ids 0, "
            "1, 2."
        )
    if set(vocab.values()) != set(range(len(vocab))):
        raise ValueError(
            f"{source}: expected ids from 0 to {len(vocab) - 1} for {len(vocab)} pieces, some are "
            "missing."
        )
    settings = read_json(folder / "tokenizer_config.json")
    max_length = settings.get("model_max_length")
    if not isinstance(max_length, int) or max_length >= 10**6:
        max_length = 2048
    ids = {
        token: index
        for token, index in read_json(folder / "added_tokens.json").items()
        if token not in vocab
    }
    ids = ids or {token: index for index, token in enumerate(added_tokens, len(vocab))}
    by_id = {index: token for token, index in ids.items() if isinstance(index, int)}
    num_rows = num_text_tokens if isinstance(num_text_tokens, int) else 0
    rows = range(len(vocab), num_rows)  # ids in the weights that follow those of the pieces
    added = (
        [by_id[row] for row in rows]
        if len(rows) == len(ids) and all(row in by_id for row in rows)
        else []
    )
    try:
        tokenizer = llama_tokenizer(vocab, merges, max_length, added)
    except Exception as error:  # tokenizers raises plain Exceptions
        raise ValueError(f"{source} is not a valid byte-pair encoding: {error}") from None
    if source.suffix != ".json":
        _check_against_sentencepiece(tokenizer, source)
    legacy = settings.get("legacy") if legacy is None else legacy
    if legacy not in (None, True, False):
        raise ValueError(
            f"{folder / 'tokenizer_config.json'}: legacy must be true or false, got {legacy!r}."
        )
    return tokenizer, legacy is not False


def _load_qwen(source: Path, folder: Path, num_text_tokens: int | None) -> PreTrainedTokenizerFast:
    max_length = read_json(folder / "tokenizer_config.json").get("model_max_length")
    if not isinstance(max_length, int) or max_length >= 10**6:
        max_length = 8192
    return qwen_tokenizer(_read_tiktoken(source), num_text_tokens, max_length)


def _read_tiktoken(path: Path) -> dict[bytes, int]:
    """Lines of a piece in base64 and its rank -> piece and rank."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line:
            continue
        try:
            piece, rank = line.split()
            ranks[base64.b64decode(piece, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise ValueError(
                f"{path}, line {number}: expected a piece in base64 and its rank, got "
                f"{line[:40]!r}."
            ) from None
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(
            f"{path}: expected {len(ranks)} pieces with the ranks 0 to {len(ranks) - 1}, each once."
        )
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise ValueError(f"{path}: expected a piece for every byte, {missing[0]:#04x} is missing.")
    return ranks


def read_json(path: Path) -> dict[str, Any]:
    """The object of a JSON file; empty where there is no such file."""
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected an object, got {type(values).__name__}.")
    return values


def _read_sentencepiece(path: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    try:
        vocab, _, merges = SentencePieceExtractor(str(path)).extract()
    except ImportError:
        raise ValueError(
            f"{path} needs the package sentencepiece: pip install 'owl2_hf[convert]'."
        ) from None
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{path} is not a sentencepiece model ({type(error).__name__}).") from None
    return vocab, merges


def _check_against_sentencepiece(tokenizer: PreTrainedTokenizerFast, path: Path) -> None:
    """Refuse models of another kind: unigram ones, ones that normalise text, ones without a space
    in front.
    """
    from sentencepiece import SentencePieceProcessor

    probe = (
        "  Two  spaces,\ttab\n \ufb01 \uff11\uff12 \u2581 and \u7f8a\u99dd \U0001f999, "
        "then words unlike one another: "
    )
    expected = SentencePieceProcessor(model_file=str(path)).encode(probe)
    if (got := tokenizer(probe, add_special_tokens=False).input_ids) != expected:
        raise ValueError(
            f"{path} is not a LLaMA tokenizer: for a test text it gives the ids {expected}, a "
            f"byte-pair encoding {got}."
        )


def _read_json(path: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    values = read_json(path)
    model = values.get("model")
    kind = model.get("type") if isinstance(model, dict) else None
    if not isinstance(model, dict) or kind != "BPE" or not isinstance(model.get("vocab"), dict):
        raise ValueError(f"{path}: expected a byte-pair encoding, got {kind!r}.")
    if not model.get("byte_fallback"):
        raise ValueError(f"{path} is not a LLaMA tokenizer: expected byte_fallback true.")
    try:
        added = {token["content"] for token in values.get("added_tokens", [])} - {
            *model["vocab"],
            IMAGE_TOKEN,
        }
        merges = [
            merge.split(" ") if isinstance(merge, str) else merge
            for merge in model.get("merges", [])
        ]
        pairs = [(left, right) for left, right in merges]
    except (TypeError, ValueError, KeyError):
        raise ValueError(
            f"{path}: merges must be pairs of pieces, and added tokens must have content."
        ) from None
    if added:
        raise ValueError(f"{path} has tokens that the original does not have: {sorted(added)}.")
    return model["vocab"], pairs
