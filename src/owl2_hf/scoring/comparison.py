"""Comparisons of images, as Compare2Score and Co-Instruct make them.

Compare2Score (arXiv:2405.19298) asks which of two images has the better quality, and turns
comparisons with anchor images into one score: the maximum a posteriori estimate under Thurstone's
model. Co-Instruct (arXiv:2402.16641) asks in words about numbered images.
"""

from collections.abc import Sequence
from itertools import permutations
from typing import Any

import torch
from torch import Tensor

from ..modeling.modeling_mplug_owl2 import MplugOwl2ForConditionalGeneration
from ..processing.processing_mplug_owl2 import MplugOwl2Processor
from .presets import IMAGE_TOKEN, Preset
from .scorer import Scorer

_ORDINALS = (
    "first",
    "second",
    "third",
    "fourth",
    "fifth",
    "sixth",
    "seventh",
    "eighth",
    "ninth",
    "tenth",
)

COMPARE2SCORE = Preset(
    prompts={
        "comparison": f"USER: {IMAGE_TOKEN} {IMAGE_TOKEN} Compared with the first image, what is your quality rating "
        "for second image? \nASSISTANT: The quality of the second image is"
    },
    levels=("superior", "better", "similar", "worse", "inferior"),
    scale=(0.0, 1.0),
    temperature=100.0,
    images_per_prompt=2,
)


class Comparator:
    """Tells which of two images is the better one.

    Args:
        model: `MplugOwl2ForConditionalGeneration`, in evaluation mode.
        processor: Its processor.
        preset: Prompt with two images, level words for the second one, and temperature of their
            logits.
        batch_size: Pairs in one forward pass.
        original_reading: Read files as the originals do, for the papers' numbers; see
            `MplugOwl2ImageProcessor`.
    """

    def __init__(
        self,
        model: MplugOwl2ForConditionalGeneration,
        processor: MplugOwl2Processor,
        preset: Preset = COMPARE2SCORE,
        batch_size: int = 4,
        original_reading: bool = False,
    ):
        self._scorer = Scorer(
            model, processor, preset, batch_size=batch_size, original_reading=original_reading
        )
        (self._task,) = preset.prompts

    def __call__(self, pairs: Sequence[tuple[Any, Any]]) -> list[float]:
        """How much better the second image of each pair is: 0 inferior, 0.5 alike, 1 superior."""
        return [found.score for found in self._scorer([list(pair) for pair in pairs], self._task)]

    def score(
        self, images: Sequence[Any], anchors: Sequence[Any], anchor_preferences: Any | None = None
    ) -> list[float]:
        """Scores from 0 to 100 of images, by comparison with anchors.

        The qualities of the anchors and one image are those of `thurstone_map`; as in the released
        code, the worst of them counts 0 and the best 100, so that an image beyond all anchors
        scores 0 or 100.

        Args:
            images: Images to score, each on its own.
            anchors: Two or more images whose qualities differ.
            anchor_preferences: (M, M) how much anchor i is preferred to anchor j, from 0 to 1, such
                as the released table for the released anchors; if not given the model compares
                them.

        Raises:
            ValueError: If there are fewer than two anchors, or the table is not theirs.
        """
        if len(anchors) < 2:
            raise ValueError(f"expected two or more anchors, got {len(anchors)}.")
        if anchor_preferences is None:
            table = self._compare_anchors(anchors)
        else:
            table = torch.as_tensor(anchor_preferences, dtype=torch.float64)
            if table.shape != (len(anchors),) * 2 or not ((table >= 0) & (table <= 1)).all():
                raise ValueError(
                    f"expected a table of {len(anchors)} by {len(anchors)} preferences from 0 to 1 "
                    f"for the anchors, got {table.tolist()}."
                )
        return [self._score_one(image, anchors, table) for image in images]

    def _compare_anchors(self, anchors: Sequence[Any]) -> Tensor:
        """(M, M) preferences of the model, in both orders of each pair."""
        pairs = list(permutations(range(len(anchors)), 2))
        table = torch.full((len(anchors),) * 2, 0.5, dtype=torch.float64)
        for (first, second), preference in zip(
            pairs, self([(anchors[i], anchors[j]) for i, j in pairs]), strict=True
        ):
            table[second, first] = preference
        return table

    def _score_one(self, image: Any, anchors: Sequence[Any], table: Tensor) -> float:
        preferred = torch.tensor(self([(anchor, image) for anchor in anchors]), dtype=torch.float64)
        whole = torch.nn.functional.pad(table, (0, 1, 0, 1))
        whole[-1, :-1], whole[:-1, -1] = preferred, 1 - preferred
        qualities = thurstone_map(whole)
        spread = qualities.max() - qualities.min()
        return float(100 * (qualities[-1] - qualities.min()) / spread) if spread > 1e-9 else 50.0


def thurstone_map(preferences: Tensor) -> Tensor:
    """Maximum a posteriori qualities under Thurstone's case V with a standard normal prior.

    Maximises `sum_ij C_ij log Phi(s_i - s_j) - sum_i s_i^2 / 2`, which is concave (Tsukida and
    Gupta, How to Analyze Paired Comparison Data, 2011). Compare2Score's released code takes a
    hundred steps of Adam towards this maximum.

    Args:
        preferences: (M, M) C, how often or how much row i is preferred to column j; the diagonal is
            not looked at.

    Returns:
        (M,) qualities s, float64; 0 is the middle.
    """
    counts = preferences.double().clone().fill_diagonal_(0)
    qualities = torch.zeros(len(counts), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [qualities],
        max_iter=500,
        tolerance_grad=1e-10,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        differences = qualities.unsqueeze(1) - qualities.unsqueeze(0)
        value = -(counts * torch.special.log_ndtr(differences)).sum() + qualities.square().sum() / 2
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    return qualities.detach()


def numbered_images(images: Sequence[Any], question: str) -> list[dict[str, Any]]:
    """A chat about several images in Co-Instruct's words, for `apply_chat_template` or a pipeline.

    Args:
        images: One to ten images, in any form that a chat takes.
        question: What to ask about them.

    Raises:
        ValueError: If there are none, or too many.
    """
    if not 1 <= len(images) <= len(_ORDINALS):
        raise ValueError(f"expected one to {len(_ORDINALS)} images, got {len(images)}.")
    parts: list[dict[str, Any]] = []
    if len(images) == 1:
        parts = [{"type": "text", "text": "The image: "}, {"type": "image", "image": images[0]}]
        question = f" {question}"
    else:
        for index, (ordinal, image) in enumerate(zip(_ORDINALS, images, strict=False)):
            break_before = "\n" if index else ""
            parts.append({"type": "text", "text": f"{break_before}The {ordinal} image: "})
            parts.append({"type": "image", "image": image})
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]
