"""Read a pretrained language model's tokenizer, and add the image placeholder token."""

import json
from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import CONFIG_NAME

from ..processing.tokenization_mplug_owl2 import (
    ESCAPE,
    IMAGE_TOKEN,
    NO_PREFIX,
    has_tokenizer,
    load_tokenizer,
    read_json,
)
from .stock_vision import find_file

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
_PROBE = "Two  spaces,\ttab\n and 12,345 words: caf\u00e9, \u7f8a\u99dd, \U0001f999 isn't <all>."


def read_tokenizer(
    source: str | Path, max_positions: int, notes: list[str]
) -> tuple[PreTrainedTokenizerFast, bool]:
    """The language model's tokenizer with the placeholder, and the processor's `legacy` flag."""
    folder = _tokenizer_folder(source)
    if has_tokenizer(folder):
        try:
            tokenizer, legacy = load_tokenizer(folder)
        except ValueError:
            pass  # not a BPE tokenizer
        else:
            if _has_the_ids_of(folder, tokenizer):
                return tokenizer, legacy
    return _adapt_tokenizer(_load_fast_tokenizer(source), max_positions, notes), True


def _tokenizer_folder(source: str | Path) -> Path:
    files = [find_file(source, name) for name in _TOKENIZER_FILES]
    found = next((file for file in files if file is not None), None)
    if found is None:
        raise ValueError(
            f"{source} has no tokenizer: expected a tokenizer.json or a tokenizer.model beside "
            f"{CONFIG_NAME}. Save the language model's tokenizer there."
        )
    return found.parent


def _has_the_ids_of(folder: Path, tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether LLaMA's tokenizer is all that the folder holds: no token more, no other way to
    split.
    """
    vocab = set(tokenizer.get_vocab()) - {IMAGE_TOKEN}
    added = set(read_json(folder / "added_tokens.json"))
    decoder = read_json(folder / "tokenizer_config.json").get("added_tokens_decoder", {})
    added |= {token["content"] for token in decoder.values()}
    if not (folder / "tokenizer.json").is_file():
        return added <= vocab
    try:
        own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception:  # tokenizers raises plain Exceptions; another function reports the file
        return False
    added |= set(own.get_vocab())
    probe = own.encode(_PROBE, add_special_tokens=False).ids
    return (
        added - {IMAGE_TOKEN} <= vocab
        and probe == tokenizer(_PROBE, add_special_tokens=False).input_ids
    )


def _load_fast_tokenizer(source: str | Path) -> PreTrainedTokenizerFast:
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # tokenizers raises plain Exceptions
        raise ValueError(f"{source}: its tokenizer cannot be loaded: {error}") from None
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(
            f"{source}: expected a fast tokenizer with a tokenizer.json, got a "
            f"{type(tokenizer).__name__}."
        )
    if tokenizer.eos_token is None:
        raise ValueError(
            f"{source}: its tokenizer has no eos_token to end an answer; set one and save it."
        )
    return tokenizer


def _adapt_tokenizer(
    own: PreTrainedTokenizerFast, max_positions: int, notes: list[str]
) -> PreTrainedTokenizerFast:
    """The same ids for every text, the placeholder as one token more, and a normalizer that deletes
    noncharacters.

    The class is the plain one: those of single models build themselves anew when they are loaded,
    without the normalizer of the file.
    """
    special = {
        name: token for name, token in own.special_tokens_map.items() if isinstance(token, str)
    }
    if "pad_token" not in special:
        special["pad_token"] = special["eos_token"]
        notes.append(f"The tokenizer has no pad_token: {special['eos_token']!r} is used.")
    max_length = own.model_max_length if own.model_max_length < 10**6 else max_positions
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_deleting_noncharacters(own.backend_tokenizer),
        **special,
        extra_special_tokens={"image_token": IMAGE_TOKEN},
        model_max_length=max_length,
        padding_side="left",
        clean_up_tokenization_spaces=own.clean_up_tokenization_spaces,
    )
    _check_placeholder(own, tokenizer)
    return tokenizer


def _deleting_noncharacters(backend: Tokenizer) -> Tokenizer:
    """Control tokens are found before the normalizer runs, or an escaped one would be found behind
    it.
    """
    state = json.loads(backend.to_str())
    deletions = [
        {"type": "Replace", "pattern": {"String": mark}, "content": ""}
        for mark in (ESCAPE, NO_PREFIX)
    ]
    existing = [] if state["normalizer"] is None else [state["normalizer"]]
    state["normalizer"] = {"type": "Sequence", "normalizers": [*deletions, *existing]}
    for token in state["added_tokens"]:
        token["normalized"] = token["normalized"] and not token["special"]
    return Tokenizer.from_str(json.dumps(state))


def _check_placeholder(own: PreTrainedTokenizerFast, tokenizer: PreTrainedTokenizerFast) -> None:
    """A vocabulary with gaps gets new ids that are in use."""
    taken = {index: token for token, index in own.get_vocab().items()}
    index = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    if taken.get(index, IMAGE_TOKEN) != IMAGE_TOKEN:
        raise ValueError(
            f"the tokenizer has gaps in its ids: it gives {IMAGE_TOKEN!r} the id {index} of "
            f"{taken[index]!r}. Add {IMAGE_TOKEN!r} to its tokenizer.json with a free id."
        )
