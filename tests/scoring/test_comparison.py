"""Comparisons of images and the scores that come of them."""

import math

import pytest
import torch

import owl2_hf
from owl2_hf.scoring import Preset
from owl2_hf.scoring.comparison import COMPARE2SCORE, Comparator, numbered_images, thurstone_map

TINY = Preset(
    {"comparison": "USER: <|image|> <|image|> Is the second red? ASSISTANT:"},
    ("yes", "no"),
    (1.0, 0.0),
    "resize",
    (0.0, 1.0),
    temperature=2.0,
    images_per_prompt=2,
)


@pytest.fixture(scope="module")
def default():
    return owl2_hf.load_default(dtype=torch.float32)


@pytest.fixture(scope="module")
def pictures():
    return [str(path) for path in list(owl2_hf.default_pictures().values())[:5]]


def test_a_comparison_reads_both_pictures_in_order(default, pictures):
    model, processor = default
    comparator = Comparator(model, processor, TINY, batch_size=2)
    pairs = [(pictures[0], pictures[1]), (pictures[1], pictures[0]), (pictures[2], pictures[3])]
    found = comparator(pairs)
    yes, no = processor.tokenizer.convert_tokens_to_ids(["▁yes", "▁no"])
    for pair, preference in zip(pairs, found, strict=True):
        inputs = processor(text=TINY.prompts["comparison"], images=list(pair), return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs).logits[0, -1] / 2.0
        assert preference == pytest.approx(float(torch.sigmoid(logits[yes] - logits[no])), abs=1e-5)
    assert found[0] != found[1]


def test_equal_preferences_give_equal_qualities():
    assert torch.allclose(
        thurstone_map(torch.full((4, 4), 0.5)), torch.zeros(4, dtype=torch.float64), atol=1e-8
    )


def test_the_estimate_is_a_maximum():
    torch.manual_seed(0)
    preferences = torch.rand(5, 5, dtype=torch.float64)
    preferences.fill_diagonal_(0)

    def objective(qualities):
        differences = qualities.unsqueeze(1) - qualities.unsqueeze(0)
        normal = torch.distributions.Normal(0.0, 1.0)
        return (preferences * normal.cdf(differences).log()).sum() - qualities.square().sum() / 2

    best = thurstone_map(preferences)
    top = objective(best)
    for _ in range(50):
        assert objective(best + 1e-3 * torch.randn(5, dtype=torch.float64)) < top
    # Two images, one always preferred: s solves phi(2s) / Phi(2s) = s.
    (quality, other) = thurstone_map(torch.tensor([[0.0, 1.0], [0.0, 0.0]])).tolist()
    density = math.exp(-2 * quality**2) / math.sqrt(2 * math.pi)
    assert other == pytest.approx(-quality)
    assert density / (0.5 * math.erfc(-math.sqrt(2) * quality)) == pytest.approx(quality, abs=1e-6)


def test_a_picture_that_is_preferred_scores_higher(default, pictures, monkeypatch):
    order = {picture: index for index, picture in enumerate(pictures)}
    comparator = Comparator(*default, TINY)
    monkeypatch.setattr(
        Comparator,
        "__call__",
        lambda self, pairs: [0.9 if order[b] > order[a] else 0.1 for a, b in pairs],
    )
    low, middle, high = comparator.score(
        [pictures[0], pictures[2], pictures[4]], [pictures[1], pictures[3]]
    )
    assert (low, middle, high) == pytest.approx((0, 50, 100), abs=1e-5)


def test_the_scale_is_the_released_one(default, monkeypatch):
    """The optimum from a search of another kind, the worst of anchors and image at 0 and the best
    at 100.
    """
    anchors, preferred = ["a", "b", "c"], [0.9, 0.8, 0.3]
    table = [[0.5, 0.3, 0.05], [0.7, 0.5, 0.2], [0.95, 0.8, 0.5]]
    comparator = Comparator(*default, TINY)
    monkeypatch.setattr(
        Comparator, "__call__", lambda self, pairs: [preferred[anchors.index(a)] for a, _ in pairs]
    )
    (score,) = comparator.score(["x"], anchors, anchor_preferences=table)
    counts = [[*row, 1 - own] for row, own in zip(table, preferred, strict=True)] + [
        [*preferred, 0.5]
    ]

    def pull(s, i):
        """Derivative of the objective by quality i."""
        total = -s[i]
        for j in range(4):
            for sign, count in ((1, counts[i][j]), (-1, counts[j][i])):
                gap = sign * (s[i] - s[j])
                density = math.exp(-(gap**2) / 2) / math.sqrt(2 * math.pi)
                total += sign * count * density / (0.5 * math.erfc(-gap / math.sqrt(2)))
        return total

    s = [0.0] * 4
    for _ in range(2000):
        s = [s[i] + 0.1 * pull(s, i) for i in range(4)]
    assert score == pytest.approx(100 * (s[3] - min(s)) / (max(s) - min(s)), abs=1e-4)
    assert 0 < score < 100
    for wrong in ([[0.5, 0.5], [0.5, 0.5]], [[2.0] * 3] * 3):
        with pytest.raises(ValueError, match="expected a table of 3 by 3 preferences from 0 to 1"):
            comparator.score(["x"], anchors, anchor_preferences=wrong)
    monkeypatch.setattr(Comparator, "__call__", lambda self, pairs: [0.5 for _ in pairs])
    assert comparator.score(["x"], anchors) == [50.0]


def test_scores_come_from_the_models_comparisons(default, pictures):
    scores = Comparator(*default, TINY).score(pictures[:2], pictures[2:])
    alone = Comparator(*default, TINY, batch_size=1).score(pictures[1:2], pictures[2:])
    assert scores[1] == pytest.approx(alone[0], abs=1e-3)
    with pytest.raises(ValueError, match="expected two or more anchors, got 1"):
        Comparator(*default, TINY).score(pictures[:1], pictures[1:2])


def test_compare2score_has_the_released_prompt_and_levels():
    assert COMPARE2SCORE.prompts["comparison"] == (
        "USER: <|image|> <|image|> Compared with the first image, what is your quality rating for second image? "
        "\nASSISTANT: The quality of the second image is"
    )
    values = dict(zip(COMPARE2SCORE.levels, COMPARE2SCORE.values, strict=True))
    assert values == {
        "inferior": 0.0,
        "worse": 0.25,
        "similar": 0.5,
        "better": 0.75,
        "superior": 1.0,
    }
    assert COMPARE2SCORE.temperature == 100


def test_numbered_pictures_are_co_instructs_prompts(default, pictures):
    _, processor = default

    def rendered(images):
        return processor.apply_chat_template(
            numbered_images(images, "Which is sharper?"), add_generation_prompt=True
        )

    assert rendered(pictures[:1]) == "<s>USER: The image: <|image|> Which is sharper? ASSISTANT:"
    assert rendered(pictures[:2]) == (
        "<s>USER: The first image: <|image|>\nThe second image: <|image|>Which is sharper? ASSISTANT:"
    )
    with pytest.raises(ValueError, match="expected one to 10 images, got 0"):
        numbered_images([], "?")
