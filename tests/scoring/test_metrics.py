"""Metrics that are called as pyiqa's are."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

import owl2_hf
from owl2_hf.scoring import Scorer, create_metric, custom_preset, metrics

from ..test_docs import place  # noqa: F401  a small OneAlign

PRESET = custom_preset("one-align", levels=["high", "soft", "bad"])


@pytest.fixture(scope="module")
def default():
    model, processor = owl2_hf.load_default(dtype=torch.float32)
    return {"model": model.requires_grad_(False), "processor": processor}


@pytest.fixture(scope="module")
def scorer(default):
    return Scorer(**default, preset=PRESET)


@pytest.fixture(scope="module")
def paths():
    return [str(path) for path in list(owl2_hf.default_pictures().values())[:3]]


def read(path, size=(90, 60)):
    return Image.open(path).convert("RGB").resize(size)


def to_batch(*images):
    arrays = [np.array(image).transpose(2, 0, 1) for image in images]
    return torch.from_numpy(np.stack(arrays)) / 255  # (B, 3, H, W)


def test_paths_images_bytes_and_tensors_score_as_in_the_scorer(default, scorer, paths, tmp_path):
    metric = create_metric(PRESET, **default)
    images = [read(path) for path in paths]
    files = [tmp_path / f"{index}.png" for index in range(len(images))]
    for image, file in zip(images, files, strict=True):
        image.save(file)
    expected = [found.score for found in scorer(images)]
    for target in (images, files, to_batch(*images)):
        found = metric(target)
        assert found.shape == (3,) and found.dtype == torch.float32 and not found.requires_grad
        assert found.tolist() == pytest.approx(expected, abs=1e-5)
    for target in (images[0], str(files[0]), files[0].read_bytes(), to_batch(images[0])):
        found = metric(target, None)
        assert found.shape == (1,) and found.item() == pytest.approx(expected[0], abs=1e-5)


def test_a_metric_has_the_attributes_of_pyiqas(default):
    metric = create_metric(PRESET, **default)
    assert (metric.lower_better, metric.metric_mode, metric.score_range) == (False, "NR", "1, 5")
    assert isinstance(metric, torch.nn.Module) and metric.device.type == "cpu"
    assert len(list(metric.parameters())) == len(list(default["model"].parameters()))


def test_tasks_are_those_of_the_preset(default, scorer, paths):
    metric = create_metric(PRESET, **default)
    found = metric(paths[0], task_="aesthetic").item()
    assert found == pytest.approx(scorer(paths[0], "aesthetics")[0].score, abs=1e-5)
    assert abs(found - metric(paths[0]).item()) > 1e-4
    with pytest.raises(ValueError, match="expected a task of quality, aesthetics, video"):
        metric(paths[0], task_="beauty")
    with pytest.raises(ValueError, match="expected input_ 'image', got 'video'"):
        metric(paths[0], input_="video")


def test_a_loss_is_one_number_with_gradients(default, scorer, paths):
    batch = to_batch(*map(read, paths)).requires_grad_()
    expected = scorer.score_tensor(batch)
    loss = create_metric(PRESET, as_loss=True, **default)(batch)
    assert loss.shape == () and loss.item() == pytest.approx(expected.mean().item(), abs=1e-6)
    (5 - loss).backward()
    (gradient,) = torch.autograd.grad(-expected.mean(), batch)
    torch.testing.assert_close(batch.grad, gradient)
    for reduction, value in (("sum", expected.sum()), ("none", expected)):
        metric = create_metric(PRESET, as_loss=True, loss_reduction=reduction, **default)
        torch.testing.assert_close(metric(batch), value)
        assert metric(batch.detach() + 1).isfinite().all()  # clipped, not refused
    assert metric(paths).tolist() == pytest.approx(
        [found.score for found in scorer(paths)], abs=5e-3
    )


def test_grey_tensors_score_as_grey_images(default, scorer, paths):
    grey = read(paths[0]).convert("L")
    tensor = torch.from_numpy(np.array(grey))[None, None] / 255
    expected = scorer(grey)[0].score
    assert create_metric(PRESET, **default)(tensor).item() == pytest.approx(expected, abs=1e-5)
    loss = create_metric(PRESET, as_loss=True, **default)(tensor)
    assert loss.item() == pytest.approx(expected, abs=5e-3)


def test_files_are_read_as_pyiqa_reads_them(default, scorer, paths, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3
    read(paths[0]).save(tmp_path / "turned.png", exif=exif)
    expected = Scorer(**default, preset=PRESET, original_reading=True)(tmp_path / "turned.png")
    metric = create_metric(PRESET, **default)
    found = metric(str(tmp_path / "turned.png")).item()
    assert found == pytest.approx(expected[0].score, abs=1e-6)
    upright = create_metric(PRESET, original_reading=False, **default)
    assert abs(upright(str(tmp_path / "turned.png")).item() - found) > 1e-4


def test_a_folder_is_loaded_with_frozen_weights(place):  # noqa: F811
    for name, preset in (("qalign", "one-align"), ("deqa", "deqa")):
        metric = create_metric(name, model=place / "path/to/one-align", dtype=torch.float64)
        assert (
            metric.metric_name == name and metric.scorer.preset is owl2_hf.scoring.PRESETS[preset]
        )
        assert metric.net.dtype == torch.float64 and not metric.net.training
        assert not any(weight.requires_grad for weight in metric.parameters())
        assert 1 <= metric(place / "photo.jpg").item() <= 5


def test_without_a_model_the_published_weights_are_loaded(place, monkeypatch):  # noqa: F811
    asked = []
    load = AutoModelForImageTextToText.from_pretrained

    def stand_in(name, processor, kwargs):
        asked.append(name)
        folder = place / "path/to/one-align"
        return load(folder), processor or owl2_hf.MplugOwl2Processor.from_pretrained(folder)

    monkeypatch.setattr(metrics, "_load", stand_in)
    for name in ("qalign", "deqa"):
        create_metric(name)
    assert asked == ["q-future/one-align", "zhiyuanyou/DeQA-Score-Mix3"]
    with pytest.raises(ValueError, match="'q-instruct' has no default weights: pass model="):
        create_metric("q-instruct")


def test_unknown_and_incomplete_metrics_are_refused(default, paths, tmp_path):
    for name, message in (
        ("musiq", "expected a metric of qalign, one-align, deqa, .*, got 'musiq'"),
        ("qalign_4bit", "expected 'qalign', got 'qalign_4bit': pass it with a quantization_config"),
        ("compare2score", "use owl2_hf.scoring.comparison.Comparator"),
    ):
        with pytest.raises(ValueError, match=message):
            create_metric(name, **default)
    with pytest.raises(ValueError, match="expected the model's processor together with the model"):
        create_metric(PRESET, model=default["model"])
    with pytest.raises(ValueError, match="dtype apply only to loading"):
        create_metric(PRESET, dtype=torch.float16, **default)
    with pytest.raises(ValueError, match="the folder does not exist"):
        create_metric("qalign", model=tmp_path / "missing")
    with pytest.raises(ValueError, match="loss_reduction of mean, sum, none, got 'max'"):
        create_metric(PRESET, loss_reduction="max", **default)
    metric, image = create_metric(PRESET, **default), torch.rand(1, 3, 8, 9)
    for bad, message in (
        (image[0], r"of shape \(B, 3, H, W\) .* got torch.float32 of shape \(3, 8, 9\)"),
        ((image * 255).byte(), "got torch.uint8"),
        (image + 1, "expected values from 0 to 1, got 1"),
        (image - 0.5, "expected values from 0 to 1, got -0"),
        (torch.full_like(image, torch.nan), "expected values from 0 to 1, got nan to nan"),
        (str(tmp_path / "missing.png"), "missing.png"),
    ):
        with pytest.raises(ValueError, match=message):
            metric(bad)


def test_pyiqa_is_not_imported():
    code = "import sys; sys.modules['pyiqa'] = None; from owl2_hf.scoring import create_metric"
    subprocess.run([sys.executable, "-c", code], check=True)
