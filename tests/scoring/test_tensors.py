"""Scores that gradients pass through: near those of `Scorer`, and with the right gradients."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import owl2_hf
from owl2_hf.processing import MplugOwl2ImageProcessor
from owl2_hf.scoring import Preset, Scorer, custom_preset
from owl2_hf.scoring.tensors import pixel_values

PRESET = custom_preset("one-align", levels=["high", "soft", "bad"])
MODES = ("pad", "resize", "crop")
SIDE = 64  # of the small model
# (H, W); the model's own, smaller, larger, long, odd.
SIZES = [
    (64, 64),
    (1, 1),
    (2, 5),
    (3, 100),
    (63, 65),
    (97, 113),
    (480, 640),
    (1000, 333),
    (50, 900),
]
# PIL rounds (half a step) after each pass, and a cubic filter's weights sum to at most 5/4 without
# their signs: one resampling is within 5/4 of 1/2 and another 1/2; "resize" has a pass in front.
MOST_STEPS = {"pad": 1.125, "crop": 1.125, "resize": 1.91}


@pytest.fixture(scope="module")
def default():
    model, processor = owl2_hf.load_default(dtype=torch.float32)
    return model.requires_grad_(False), processor


@pytest.fixture(scope="module")
def scorer(default):
    return Scorer(*default, PRESET, batch_size=2)


@pytest.fixture(scope="module")
def images():
    return [
        Image.open(path).convert("RGB") for path in list(owl2_hf.default_pictures().values())[:4]
    ]


def to_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255  # (3, H, W)


def kinds(height, width):
    """Noise, slow changes, and stripes that overshoot when they are resized."""
    generator = np.random.default_rng(height * width)
    yield Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
    coarse = Image.fromarray(generator.integers(0, 256, (9, 9, 3), dtype=np.uint8))
    yield coarse.resize((width, height), Image.Resampling.BICUBIC)
    stripes = (np.arange(height)[:, None] // 3 + np.arange(width) // 2) % 2 * 255
    yield Image.fromarray(stripes.astype(np.uint8)).convert("RGB")


@pytest.mark.parametrize("mode", MODES)
def test_pixels_are_within_pils_rounding_of_the_image_processors(mode):
    processor = MplugOwl2ImageProcessor(size={"height": SIDE, "width": SIDE})
    std = torch.tensor(processor.image_std)[:, None, None]
    for size in SIZES:
        for image in kinds(*size):
            expected = processor(image, image_aspect_ratio=mode, return_tensors="pt").pixel_values
            found = pixel_values(processor, to_tensor(image)[None], mode)
            steps = ((found - expected) * std * 255).abs().max()
            assert found.shape == expected.shape
            assert steps < (MOST_STEPS[mode] if size != (SIDE, SIDE) else 1e-3), (size, steps)


@pytest.mark.parametrize("mode", MODES)
def test_scores_are_the_scorers(default, images, mode):
    scorer = Scorer(*default, replace(PRESET, image_aspect_ratio=mode))
    for size in SIZES:
        resized = [image.resize(size[::-1]) for image in images]
        found = scorer.score_tensor(torch.stack([to_tensor(image) for image in resized]))
        expected = [one.score for one in scorer(resized)]
        most = 1e-5 if size == (SIDE, SIDE) else 5e-3  # on a scale from 1 to 5
        assert found.tolist() == pytest.approx(expected, abs=most), size


@pytest.mark.parametrize(
    ("settings", "modes"),
    [
        ({"do_normalize": False}, MODES),
        ({"do_resize": False}, ["pad"]),
        ({"rescale_factor": 1 / 127.5, "image_mean": [0.5] * 3, "image_std": [1, 2, 3]}, MODES),
        ({"resample": Image.Resampling.BILINEAR}, MODES),
        ({"max_image_pixels": 6000}, ["pad", "resize"]),  # the longer edge's square has more
        ({"size": {"shortest_edge": 48}}, MODES),
    ],
)
def test_the_image_processors_settings_count(images, settings, modes):
    image = images[0].resize((90, 40))
    processor = MplugOwl2ImageProcessor(**{"size": {"height": SIDE, "width": SIDE}, **settings})
    for mode in modes:
        found = pixel_values(processor, to_tensor(image)[None], mode)
        expected = processor(image, image_aspect_ratio=mode, return_tensors="pt").pixel_values
        torch.testing.assert_close(found, expected, atol=0.03, rtol=0)


def test_a_batch_scores_as_one_by_one_whatever_the_sizes(scorer, images):
    tensors = [
        to_tensor(image.resize(size))
        for image, size in zip(images, [(80, 50), (64, 64), (30, 99), (7, 5)], strict=True)
    ]
    together = scorer.score_tensor(tensors)
    assert together.shape == (4,) and together.dtype == torch.float32
    alone = [scorer.score_tensor(tensor).item() for tensor in tensors]
    assert together.tolist() == pytest.approx(alone, abs=1e-5)
    assert max(alone) - min(alone) > 0.01
    batch = torch.stack([tensors[0], tensors[0].flip(-1)])
    assert scorer.score_tensor(batch).tolist() == pytest.approx(
        [scorer.score_tensor(one[None]).item() for one in batch], abs=1e-5
    )


def test_videos_score_as_their_frames_do_in_the_scorer(default, images):
    preset = Preset({"video": PRESET.prompts["video"]}, ("high", "bad"), (1.0, 0.0))
    scorer = Scorer(*default, preset)
    videos = [[image.resize((64, 64)) for image in own] for own in (images[:3], images[3:])]
    tensors = [torch.stack([to_tensor(image) for image in video]) for video in videos]
    expected = [one.score for one in scorer(videos, task="video")]
    assert scorer.score_tensor(tensors, "video").tolist() == pytest.approx(expected, abs=1e-5)
    assert scorer.score_tensor(tensors[0][None], "video").item() == pytest.approx(
        expected[0], abs=1e-5
    )


def test_crops_score_as_in_the_scorer(default, images):
    scorer = Scorer(*default, PRESET, batch_size=2, crops=True)
    image = images[0].resize((150, 128))
    tensor = to_tensor(image).requires_grad_()
    found = scorer.score_tensor(tensor)
    assert found.item() == pytest.approx(scorer(image)[0].score, abs=1e-5)
    found.sum().backward()
    assert (tensor.grad.abs().sum((0, 1)) > 0).all()


@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_the_pixels_are_right(mode):
    processor = MplugOwl2ImageProcessor(size={"height": 6, "width": 6})
    for shape in ((2, 3, 5, 9), (1, 3, 11, 4), (1, 3, 6, 6)):
        # Away from 0 and 1, where clipping makes a corner.
        images = (0.4 + 0.2 * torch.rand(shape, dtype=torch.float64)).requires_grad_()
        assert torch.autograd.gradcheck(lambda x: pixel_values(processor, x, mode), images)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_the_score_are_right(monkeypatch, mode):
    # transformers' norm rounds to float32, which drowns small differences.
    monkeypatch.setattr(
        LlamaRMSNorm,
        "forward",
        lambda self, x: F.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon),
    )
    model, processor = owl2_hf.load_default(dtype=torch.float64)
    scorer = Scorer(
        model.requires_grad_(False), processor, replace(PRESET, image_aspect_ratio=mode)
    )
    generator = torch.Generator().manual_seed(0)
    images = 0.4 + 0.2 * torch.rand(1, 3, 40, 71, dtype=torch.float64, generator=generator)
    assert torch.autograd.gradcheck(
        scorer.score_tensor, images.requires_grad_(), fast_mode=True, atol=1e-7, rtol=1e-3
    )


def test_padding_and_what_is_cut_off_have_no_gradient_and_the_rest_has(default, images):
    tensor = to_tensor(images[0].resize((100, 40))).requires_grad_()
    for mode, seen in (("pad", slice(None)), ("crop", slice(34, 66))):
        (gradient,) = torch.autograd.grad(
            Scorer(*default, replace(PRESET, image_aspect_ratio=mode)).score_tensor(tensor).sum(),
            tensor,
        )
        seen_columns = gradient.abs().sum((0, 1)) > 0  # (W,)
        assert seen_columns[seen].all()
        if mode == "crop":
            assert not seen_columns[:25].any() and not seen_columns[75:].any()


def test_gradient_ascent_raises_the_score(scorer, images):
    image = to_tensor(images[0].resize((48, 80))).requires_grad_()
    optimizer = torch.optim.Adam([image], lr=0.02)
    before = scorer([images[0].resize((48, 80))])[0].score
    for _ in range(10):
        optimizer.zero_grad()
        (-scorer.score_tensor(image)).sum().backward()
        optimizer.step()
    better = (image.detach().clamp(0, 1) * 255).round().byte()
    assert scorer(better)[0].score > before + 0.3
    assert all(weight.grad is None for weight in scorer.model.parameters())


def test_values_beyond_black_and_white_are_clipped_and_have_no_gradient(scorer):
    image = torch.full((3, 64, 64), 0.5)
    image[:, :8], image[:, 8:16] = -0.5, 1.5
    image.requires_grad_()
    found = scorer.score_tensor(image)
    assert found.item() == scorer.score_tensor(image.detach().clamp(0, 1)).item()
    found.sum().backward()
    assert not image.grad[:, :16].any() and image.grad[:, 16:].any()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_and_keeps_less(default, images, use_reentrant):
    model, processor = copy.deepcopy(default[0]), default[1]
    scorer = Scorer(model, processor, PRESET)
    batch = torch.stack([to_tensor(image.resize((64, 64))) for image in images[:2]])

    def run():
        kept = 0

        def count(tensor):
            nonlocal kept
            kept += tensor.numel()
            return tensor

        tensor = batch.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(count, lambda saved: saved):
            score = scorer.score_tensor(tensor)
        score.sum().backward()
        return score, tensor.grad, kept

    score, gradient, kept = run()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    again, same_gradient, kept_less = run()
    assert not any(module.training for module in model.modules())
    torch.testing.assert_close(again, score)
    torch.testing.assert_close(same_gradient, gradient, atol=1e-6, rtol=1e-4)
    assert kept_less < kept / 2


def test_bfloat16_has_gradients_near_those_of_float32(scorer, images):
    model, processor = owl2_hf.load_default(dtype=torch.bfloat16)
    rounded = Scorer(model.requires_grad_(False), processor, PRESET)
    gradients = []
    for one, dtype in (
        (scorer, torch.float32),
        (rounded, torch.float32),
        (rounded, torch.bfloat16),
    ):
        tensor = to_tensor(images[1].resize((80, 60))).to(dtype).requires_grad_()
        score = one.score_tensor(tensor)
        score.sum().backward()
        assert score.dtype == torch.float32 and tensor.grad.dtype == dtype
        gradients.append(tensor.grad.float().flatten())
    assert F.cosine_similarity(gradients[0], gradients[1], dim=0) > 0.9
    assert F.cosine_similarity(gradients[0], gradients[2], dim=0) > 0.9


def test_without_gradients_nothing_is_kept(scorer, images):
    with torch.no_grad():
        assert not scorer.score_tensor(to_tensor(images[0])).requires_grad
    assert not scorer.score_tensor(
        to_tensor(images[0])
    ).requires_grad  # frozen weights, plain pixels


def test_inputs_that_cannot_be_scored_are_refused(default, scorer):
    image = torch.rand(3, 20, 30)
    for bad, message in (
        (
            (image * 255).byte(),
            r"image 1 of 1: expected floats from 0 to 1, got torch.uint8: divide",
        ),
        (image * 255, "expected values from 0 to 1, their mean is 1"),
        (
            image.permute(1, 2, 0),
            r"image 1 of 1: expected the shape \(3, H, W\), got \(20, 30, 3\)",
        ),
        ([image, image[:1]], r"image 2 of 2: expected the shape \(3, H, W\), got \(1, 20, 30\)"),
        (torch.full((3, 4, 4), math.nan), "it holds NaN or infinite values"),
        (torch.zeros(3, 0, 4), "it has no pixels"),
        (torch.zeros(0, 3, 4, 4), "expected at least one image, got none"),
        (image[None, None], r"expected a tensor \(B, 3, H, W\) or a list of tensors \(3, H, W\)"),
        ("photo.jpg", "for files and PIL images call the scorer"),
    ):
        with pytest.raises(ValueError, match=message):
            scorer.score_tensor(bad)
    with pytest.raises(
        ValueError, match="expected a task of quality, aesthetics, video, got 'beauty'"
    ):
        scorer.score_tensor(image, "beauty")
    for settings, mode, message in (
        (
            {"resample": Image.Resampling.LANCZOS},
            "pad",
            "gradients need bilinear or bicubic .* lanczos",
        ),
        ({"max_image_pixels": 500}, "pad", "30 x 20 pixels, the limit is 500 in all"),
        ({"max_image_pixels": 10_000}, "crop", "too long and narrow for a center crop"),
        ({}, "anchors", "one square of each image, got image_aspect_ratio 'anchors'"),
    ):
        processor = MplugOwl2ImageProcessor(size={"height": 64, "width": 64}, **settings)
        long = torch.rand(1, 3, 2, 30) if mode == "crop" else image[None]
        with pytest.raises(ValueError, match=message):
            pixel_values(processor, long, mode)
