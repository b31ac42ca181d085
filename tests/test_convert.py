"""Conversion of the original's Hugging Face layout: what is read, and what is refused."""

import json
import os

import pytest
import torch

from owl2_hf.conversion import ConversionError, convert
from owl2_hf.conversion.key_map import FUSED, RENAMED, split_query_key_value, to_ours
from owl2_hf.modeling import MplugOwl2Config, MplugOwl2ForConditionalGeneration, MplugOwl2Model


@pytest.fixture
def source(golden_dir, tmp_path):
    """A writable copy of the original's checkpoint of set A, as one file, without its tokenizer."""
    original = golden_dir("A") / "hf"
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_bytes((original / "config.json").read_bytes())
    torch.save(read_shards(original), folder / "pytorch_model.bin")
    return folder


def read_shards(folder):
    state_dict = {}
    for shard in sorted(folder.glob("*.bin")):
        state_dict.update(torch.load(shard, weights_only=True))
    return state_dict


def edit(source, change):
    path = source / "pytorch_model.bin"
    state_dict = torch.load(path, weights_only=True)
    change(state_dict)
    torch.save(state_dict, path)


def edit_config(source, **values):
    path = source / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_the_table_is_one_to_one():
    targets = [target for target in RENAMED.values() if target is not None]
    targets += [target for triple in FUSED.values() for target in triple]
    assert len(targets) == len(set(targets))
    assert not set(RENAMED) & set(FUSED)


def test_the_table_covers_the_published_model(golden_dir):
    """Every tensor of the published 7B model has its place, by name and shape, and every place is filled."""
    keys = golden_dir("A").parents[1] / "spec" / "keys" / "owl2.json"
    if not keys.is_file():
        pytest.skip("the key list of the published model is not here")
    config = MplugOwl2Config()
    with torch.device("meta"):
        expected = {key: value.shape for key, value in MplugOwl2ForConditionalGeneration(config).state_dict().items()}
        converted = {}
        for key, (shape, _) in json.loads(keys.read_text()).items():
            converted.update({name: value.shape for name, value in to_ours(key, torch.empty(shape), config)})
    assert converted == expected


def test_fused_projections_are_interleaved_head_by_head():
    heads, head_dim, width = 3, 2, 6
    labels = torch.tensor(
        [[head * 100 + part * 10 + d for d in range(head_dim)] for head in range(heads) for part in range(3)]
    )
    query, key, value = split_query_key_value(labels.reshape(-1, 1).expand(-1, width), heads)
    assert query[:, 0].tolist() == [0, 1, 100, 101, 200, 201]
    assert key[:, 0].tolist() == [10, 11, 110, 111, 210, 211]
    assert value[:, 0].tolist() == [20, 21, 120, 121, 220, 221]


def test_one_file_and_shards_give_the_same_bits(source, golden_dir, tmp_path):
    convert(source, tmp_path / "one")
    convert(golden_dir("A") / "hf", tmp_path / "shards", max_shard_size="200KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    one, shards = (
        MplugOwl2ForConditionalGeneration.from_pretrained(tmp_path / name).state_dict() for name in ("one", "shards")
    )
    assert one.keys() == shards.keys()
    assert all(torch.equal(one[key], shards[key]) for key in one)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_dtype_of_the_weights_is_kept(source, tmp_path, dtype):
    edit(source, lambda tensors: tensors.update({key: value.to(dtype) for key, value in tensors.items()}))
    report = convert(source, tmp_path / "target")
    assert MplugOwl2ForConditionalGeneration.from_pretrained(tmp_path / "target").dtype == dtype
    assert report.dtype == str(dtype).removeprefix("torch.")


def test_tables_are_rebuilt_and_rotary_buffers_dropped(source, tmp_path):
    reference = convert(source, tmp_path / "reference")

    def without_tables(tensors):
        for key in [key for key in tensors if key.endswith("_pos_embed")]:
            del tensors[key]
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    edit(source, without_tables)
    report = convert(source, tmp_path / "target")
    assert report.rebuilt and not reference.rebuilt
    assert "model.layers.0.self_attn.rotary_emb.inv_freq" in report.dropped
    before, after = (
        MplugOwl2ForConditionalGeneration.from_pretrained(tmp_path / name).state_dict()
        for name in ("reference", "target")
    )
    assert all(torch.equal(before[key], after[key]) for key in before)


def drop(key):
    return lambda tensors: tensors.pop(key)


def put(key, value):
    return lambda tensors: tensors.update({key: value})


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("model.layers.1.self_attn.k_proj.multiway.1.weight"), r"lacks 1 parameters.*layers\.1.*visual_k_proj"),
        (put("model.layers.0.mlp.extra.weight", torch.ones(2)), r"'model\.layers\.0\.mlp\.extra\.weight'.*no such"),
        (put("model.layers.9.mlp.up_proj.weight", torch.ones(2)), "configuration has no place"),
        (put(NORM, torch.ones(63)), r"'model\.norm\.weight': expected shape \(64,\).*got \(63,\)"),
        (put("model.embed_tokens.weight", torch.ones(999, 64)), r"expected 1000 rows \(vocab_size\), got 999"),
        (put("model.vision_model.encoder.layers.0.self_attn.query_key_value.bias", torch.ones(9)), "expected 144 rows"),
        (put(NORM, torch.full((64,), float("nan"))), "64 values are NaN or infinite"),
        (put(NORM, torch.ones(64, dtype=torch.long)), r"floating-point weights, got torch\.int64"),
        (put(NORM, [1.0]), "expected a tensor, got list"),
    ],
)
def test_a_wrong_tensor_is_named_and_nothing_is_left(source, tmp_path, change, message):
    edit(source, change)
    with pytest.raises(ConversionError, match=message):
        convert(source, tmp_path / "target")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_malicious_pickle_is_refused_and_runs_nothing(source, tmp_path):
    torch.save({NORM: Bomb(tmp_path / "ran")}, source / "pytorch_model.bin")
    with pytest.raises(ConversionError, match=r"pytorch_model\.bin cannot be read") as caught:
        convert(source, tmp_path / "target")
    assert not (tmp_path / "ran").exists()
    assert "weights_only=False" not in str(caught.value)


def test_a_truncated_file_is_named(source, tmp_path):
    path = source / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ConversionError, match=r"pytorch_model\.bin cannot be read"):
        convert(source, tmp_path / "target")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../outside.bin", "not a weight file of this folder"),
        ("/etc/passwd", "not a weight file of this folder"),
        ("pytorch_model-1-of-2.bin", "which is missing"),
    ],
)
def test_an_index_names_only_weight_files_of_its_folder(source, tmp_path, name, message):
    (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {NORM: name}}))
    with pytest.raises(ConversionError, match=message):
        convert(source, tmp_path / "target")


def test_the_source_must_be_a_checkpoint_of_the_original(source, tmp_path):
    with pytest.raises(ConversionError, match="is not a folder"):
        convert(tmp_path / "nowhere", tmp_path / "target")
    convert(source, tmp_path / "converted")
    with pytest.raises(ConversionError, match="already in this package's format"):
        convert(tmp_path / "converted", tmp_path / "target")
    edit_config(source, hidden_size=65)
    with pytest.raises(ConversionError, match=r"hidden size \(65\)"):
        convert(source, tmp_path / "target")
    edit_config(source, model_type="llama")
    with pytest.raises(ConversionError, match="expected model_type 'mplug_owl2', got 'llama'"):
        convert(source, tmp_path / "target")
    (source / "config.json").write_text("{")
    with pytest.raises(ConversionError, match="not valid JSON"):
        convert(source, tmp_path / "target")
    (source / "config.json").unlink()
    with pytest.raises(ConversionError, match=r"config\.json is missing"):
        convert(source, tmp_path / "target")


def test_a_source_without_weights_is_refused(source, tmp_path):
    (source / "pytorch_model.bin").unlink()
    with pytest.raises(ConversionError, match="holds no weights"):
        convert(source, tmp_path / "target")


def test_the_target_is_never_written_over(source, tmp_path):
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "mine.txt").write_text("mine")
    for target in (occupied, source, source / "inside"):
        with pytest.raises(ConversionError, match=r"exists and is not an empty folder|is the source or lies inside"):
            convert(source, target)
    assert [path.name for path in occupied.iterdir()] == ["mine.txt"]


def test_the_originals_layout_is_refused_by_from_pretrained(source):
    with pytest.raises(ValueError, match="is in the original's layout: convert it first"):
        MplugOwl2Model.from_pretrained(source)
