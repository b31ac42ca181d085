"""What training starts from: the default model with fewer layers, and with the level words as
tokens.
"""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from owl2_hf.default import load_default
from owl2_hf.modeling import MplugOwl2ForConditionalGeneration
from owl2_hf.modeling.configuration_mplug_owl2 import padded_vocab_size
from owl2_hf.processing import MplugOwl2Processor
from owl2_hf.processing.tokenization_mplug_owl2 import llama_tokenizer
from owl2_hf.training.resolution import set_image_size

from .data import SIDE

# Upper layers know what is drawn, lower ones how, which is all that quality needs; and two layers
# cost half of four.
NUM_VISION_LAYERS = 2
LEVELS = ("excellent", "good", "fair", "poor", "bad")


def add_words(tokenizer: Any, words: Sequence[str]) -> tuple[Any, list[list[int]]]:
    """A tokenizer with the pieces of another one, that has these words as pieces, too.

    Returns:
        The tokenizer, and of each added piece the ids that it is made of.
    """
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    vocab, merges = dict(model["vocab"]), [tuple(pair) for pair in model["merges"]]
    made_of = []
    for word in words:
        whole, *others = tokenizer.tokenize(word, add_special_tokens=False)
        parts = [vocab[whole]]
        for piece in others:
            merges.append((whole, piece))
            whole += piece
            parts.append(vocab[piece])
            if whole not in vocab:
                vocab[whole] = len(vocab)
                made_of.append(list(parts))
    return llama_tokenizer(vocab, merges, tokenizer.model_max_length), made_of


@torch.no_grad()
def make_start(seed: int) -> tuple[MplugOwl2ForConditionalGeneration, Any]:
    """The default model with the level words and without its upper vision layers.

    What a new piece stands for starts as the mean of its parts.

    Args:
        seed: Of a little noise on the new rows, which would be equal for equal parts.
    """
    model, processor = load_default(dtype=torch.float32)
    tokenizer, made_of = add_words(processor.tokenizer, LEVELS)
    config = copy.deepcopy(model.config)
    num_old = config.output_vocab_size
    config.image_token_id = config.output_vocab_size = num_old + len(made_of)
    config.text_config.vocab_size = padded_vocab_size(config.output_vocab_size)
    config.vision_config.num_hidden_layers = NUM_VISION_LAYERS
    generator = torch.Generator().manual_seed(seed)
    old = model.get_input_embeddings().weight  # (V, D)
    new = torch.zeros(config.text_config.vocab_size, old.shape[1])
    new[:num_old] = old[:num_old]
    spread = config.text_config.initializer_range
    for row, parts in enumerate(made_of, num_old):
        new[row] = old[parts].mean(0) + spread * torch.randn(old.shape[1], generator=generator)
    extended = MplugOwl2ForConditionalGeneration(config)
    wanted = extended.state_dict()
    state = {name: value for name, value in model.state_dict().items() if name in wanted}
    for name, value in state.items():
        if value.shape == old.shape and torch.equal(value, old):  # the table, and the tied head
            state[name] = new
    extended.load_state_dict(state)  # everything that is wanted has to be there
    extended.generation_config = model.generation_config
    processor = MplugOwl2Processor(
        processor.image_processor, tokenizer, num_image_tokens=processor.num_image_tokens
    )
    return set_image_size(extended, processor, SIDE).eval(), processor


def write_start(folder: Path, seed: int) -> None:
    """The model to start from as a folder that a recipe takes."""
    model, processor = make_start(seed)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
