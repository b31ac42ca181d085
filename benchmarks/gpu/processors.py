"""A random model with a processor, for steps that begin with images and text.

The LLaMA-2 tokenizer is not part of this repository. The tokenizer of the scorer in the package
takes its place: each level word of OneAlign is one token in it, too, and its prompt is 4 tokens
longer. The pixels are those of the published processor.
"""

import re
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from owl2_hf.default_scorer import default_scorer_dir
from owl2_hf.modeling import MplugOwl2ForConditionalGeneration
from owl2_hf.processing import MplugOwl2Processor

from . import models
from .frame import Setting

TOKENIZER = "that of the scorer in the package, 1,410 tokens"
SIZE = (1600, 1200)  # width and height of an image file
NUM_IMAGES = 16


@dataclass(frozen=True)
class Loaded:
    """A model on the device, and the processor that goes with it."""

    model: Any
    processor: Any


def load(setting: Setting) -> Loaded:
    """The published shape with random weights. Each token of a greedy answer is a word of the
    tokenizer, and none ends the answer.
    """
    config = models.config(setting)
    side = config.vision_config.image_size
    processor = MplugOwl2Processor.from_pretrained(
        default_scorer_dir(),
        size={"height": side, "width": side},
        num_image_tokens=config.num_image_tokens,
    )
    config.image_token_id = processor.image_token_id
    vocabulary = processor.tokenizer.get_vocab()
    if setting.tiny:
        config.text_config.vocab_size = config.output_vocab_size = len(vocabulary)
    model = models.build(MplugOwl2ForConditionalGeneration, config, setting).requires_grad_(False)
    words = [number for word, number in vocabulary.items() if re.fullmatch("▁[a-z]+", word)]
    is_word = torch.zeros(config.text_config.vocab_size, 1, device=setting.device)
    is_word[words] = 1
    # A logit of 0 is never the largest of hundreds of random ones.
    model.lm_head.weight.data.mul_(is_word)
    return Loaded(model, processor)


def image_of(setting: Setting, seed: int = 0) -> Image.Image:
    """Patches of color with grain. Its JPEG file is as large as that of a photo: 0.7 MB."""
    width, height = (64, 48) if setting.tiny else SIZE
    random = np.random.default_rng(seed)
    patches = Image.fromarray(random.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    smooth = np.asarray(patches.resize((width, height), Image.Resampling.BICUBIC))
    grain = random.normal(0, 6, (height, width, 1))
    return Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8))


def make_files(folder: Path, count: int, setting: Setting) -> list[Path]:
    """JPEG files in a new folder: `count` names of at most 16 images."""
    folder.mkdir()
    files = [folder / f"{index:05}.jpg" for index in range(count)]
    for index, path in enumerate(files):
        if index < NUM_IMAGES:
            path.write_bytes(_jpeg(setting, index))
        else:
            path.hardlink_to(files[index % NUM_IMAGES])
    return files


@cache
def _jpeg(setting: Setting, seed: int) -> bytes:
    file = BytesIO()
    image_of(setting, seed).save(file, "JPEG", quality=90)
    return file.getvalue()
