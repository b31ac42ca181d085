"""Checkpoints of Megatron: the original's own, and cut over two ranks."""

import argparse
import os
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from owl2_hf.conversion import ConversionError, convert
from owl2_hf.conversion.megatron import RENAMED, merge_ranks
from owl2_hf.modeling import MplugOwl2ForConditionalGeneration
from owl2_hf.modeling.conversion_mplug_owl2 import FUSED
from owl2_hf.modeling.conversion_mplug_owl2 import RENAMED as ORIGINAL

from ..original import expand_markers
from .conftest import assert_same_bits, command, halve, load_state, read_shards, refused, rewrite

RANK = "iter_0000100/mp_rank_00/model_optim_rng.pt"


@pytest.fixture(scope="session")
def golden(golden_dir):
    return golden_dir("F")


@pytest.fixture(scope="session")
def loaded(golden):
    with torch.serialization.safe_globals(
        [
            argparse.Namespace,
            np.ndarray,
            np.dtype,
            np.dtypes.UInt32DType,
            np._core.multiarray._reconstruct,
        ]
    ):
        return torch.load(golden / "megatron_iter" / RANK, weights_only=False)


@pytest.fixture(scope="session")
def whole(golden, tmp_path_factory):
    """The golden checkpoint, converted."""
    target = tmp_path_factory.mktemp("whole") / "converted"
    command("convert", golden / "megatron_iter", target, "--base", golden / "tiny_config")
    return target


def test_the_table_reaches_every_parameter_of_the_original_but_the_tables():
    computed = {
        key for key, target in ORIGINAL.items() if target is None or key.endswith("_pos_embed")
    }
    # LLaMA has none.
    biases = {key for key in ORIGINAL if key.startswith("model.layers.") and key.endswith(".bias")}
    # It has no ranks of Megatron's.
    docowl = {key for key in ORIGINAL if key.startswith("model.vision2text.")}
    assert {target for target, _ in RENAMED.values()} == {
        *ORIGINAL,
        *FUSED,
    } - computed - biases - docowl


def test_the_table_splits_what_megatron_splits():
    for name, (_, dim) in RENAMED.items():
        assert dim == split_of(name), name


def test_logits_and_answers_are_those_after_the_originals_converter(golden, whole):
    cases = load_file(golden / "cases.safetensors")
    model = MplugOwl2ForConditionalGeneration.from_pretrained(whole).eval()
    inputs = expand_markers(cases["c1_one_image/input_ids"], model.config)
    inputs["pixel_values"] = cases["c1_one_image/images"].reshape(-1, 3, 16, 16)
    with torch.no_grad():
        logits = model(**inputs).logits[..., :64]
    expected = cases["c1_one_image/logits"]
    assert (logits - expected).abs().max() / expected.abs().max() < 1e-5
    new_ids = cases["c6_generate_one_image/new_ids"]
    output = model.generate(**inputs, max_new_tokens=new_ids.shape[1], do_sample=False)
    assert output[:, inputs["input_ids"].shape[1] :].tolist() == new_ids.tolist()


def test_tensors_are_those_of_the_originals_converter(golden, whole, tmp_path):
    if not (golden / "hf_default").is_dir():
        pytest.skip(
            "the original converter's output is not here; OWL2_HF_GOLDEN names the folder that "
            "holds it"
        )
    command("convert", whole, tmp_path / "original", "--to", "original")
    back = load_file(tmp_path / "original" / "model.safetensors")
    expected = {
        key: tensor
        for key, tensor in read_shards(golden / "hf_default").items()
        if "inv_freq" not in key
    }
    assert_same_bits(expected, {key: back[key] for key in expected})


def write(loaded, folder, name="model_optim_rng.pt", **changes):
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({**loaded, **changes}, folder / name)


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("release/mp_rank_00", "model_optim_rng.pt"),
        ("mp_rank_00", "model_rng.pt"),
        ("iter_0000007/mp_rank_00", "model_optim_rng.pt"),
    ],
)
def test_every_place_and_name_is_found(golden, loaded, whole, tmp_path, place, name):
    write(loaded, tmp_path / "megatron" / place, name)
    command("convert", tmp_path / "megatron", tmp_path / "target", "--base", golden / "tiny_config")
    assert_same_bits(load_state(whole), load_state(tmp_path / "target"))


def test_the_tracker_chooses_the_iteration(golden, loaded, whole, tmp_path):
    source = tmp_path / "megatron"
    write(loaded, source / "iter_0000100" / "mp_rank_00")
    write({"model": {}}, source / "iter_0000200" / "mp_rank_00")
    assert "has no latest_checkpointed_iteration.txt and contains" in refused(
        "convert", source, tmp_path / "target", "--base", golden / "tiny_config"
    )
    (source / "latest_checkpointed_iteration.txt").write_text("100\n")
    command("convert", source, tmp_path / "target", "--base", golden / "tiny_config")
    assert_same_bits(load_state(whole), load_state(tmp_path / "target"))
    (source / "iter_0000200").rename(source / "release")  # which the tracker does not name
    command("convert", source, tmp_path / "beside", "--base", golden / "tiny_config")
    assert_same_bits(load_state(whole), load_state(tmp_path / "beside"))


@pytest.mark.parametrize(
    "content", ["../../elsewhere", "__import__('os').system('touch ran')", "", "9" * 40, "-1"]
)
def test_a_tracker_is_a_number_and_nothing_else(golden, loaded, tmp_path, content, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "megatron"
    write(loaded, source / "iter_0000100" / "mp_rank_00")
    (source / "latest_checkpointed_iteration.txt").write_text(content)
    assert "the number of an iteration, got" in refused(
        "convert", source, "target", "--base", golden / "tiny_config"
    )
    assert not (tmp_path / "ran").exists()


def test_the_name_of_the_folder_is_never_evaluated(golden, loaded, whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "iter_(open('ran','w'))"
    write(loaded, source / "mp_rank_00")
    command("convert", source, "target", "--base", golden / "tiny_config")
    assert_same_bits(load_state(whole), load_state(tmp_path / "target"))
    assert not (tmp_path / "ran").exists()


def flat(model, prefix=""):
    for key, value in model.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", model, key


# What Megatron's parallel layers split, said here once more: by rows, and by columns.
ROWS = """word_embeddings lm_head q_proj k_proj v_proj gate_proj up_proj query_key_value dense_h_to_4h w1 w3 ffn_ln
    visual_fc"""
COLUMNS = (
    "o_proj.weight down_proj.weight self_attention.dense.weight dense_4h_to_h.weight w2.weight"
)


def split_of(name):
    if name.endswith(tuple(COLUMNS.split())):
        return 1
    return 0 if any(part in name.split(".") for part in ROWS.split()) else None


def cut(loaded, rank, num_ranks, where=lambda name: True, vocabulary_padding=0):
    """What one tensor-parallel rank would hold."""
    import copy

    part = copy.deepcopy(loaded)
    part["args"] = argparse.Namespace(tensor_model_parallel_size=num_ranks)
    for name, owner, key in list(flat(part["model"])):
        tensor, dim = owner[key], split_of(name)
        if "word_embeddings" in name or "lm_head" in name:
            tensor = torch.cat([tensor, torch.zeros(vocabulary_padding, tensor.shape[1])])
        if dim is not None and where(name):
            owner[key] = tensor.chunk(num_ranks, dim)[rank].clone()
    return part


@pytest.mark.parametrize(
    ("num_ranks", "where", "padding"),
    [
        (2, lambda name: True, 0),
        (4, lambda name: True, 64),
        (2, lambda name: name.startswith("language_model"), 0),
        (2, lambda name: True, 64),
    ],
    ids=["all", "four ranks", "only the language model", "padded vocabulary"],
)
def test_ranks_are_merged(golden, loaded, whole, tmp_path, num_ranks, where, padding):
    for rank in range(num_ranks):
        write(
            cut(loaded, rank, num_ranks, where, padding),
            tmp_path / "megatron" / f"release/mp_rank_{rank:02d}",
        )
    command("convert", tmp_path / "megatron", tmp_path / "target", "--base", golden / "tiny_config")
    assert_same_bits(load_state(whole), load_state(tmp_path / "target"))


def test_ranks_are_not_taken_for_the_whole(golden, loaded, tmp_path):
    source = tmp_path / "megatron"
    write(cut(loaded, 0, 2), source / "mp_rank_00")
    line = refused("convert", source, tmp_path / "target", "--base", golden / "tiny_config")
    assert "expected 2 tensor-parallel ranks, got 1" in line
    part = cut(loaded, 0, 2)
    del part["args"]
    write(part, source / "mp_rank_00")
    line = refused("convert", source, tmp_path / "target", "--base", golden / "tiny_config")
    assert "expected shape" in line and "from 1 ranks" in line
    write(cut(loaded, 1, 2), source / "mp_rank_02")
    assert "mp_rank_01 does not exist" in refused(
        "convert", source, tmp_path / "target", "--base", golden / "tiny_config"
    )
    (source / "mp_rank_02").rename(source / "mp_rank_00_001")
    assert "pipeline stages are not supported" in refused(
        "convert", source, tmp_path / "target", "--base", golden / "tiny_config"
    )


def test_ranks_that_disagree_are_refused(golden, loaded, tmp_path):
    for rank in range(2):
        part = cut(loaded, rank, 2)
        part["model"]["language_model"]["encoder"]["norm.weight"] += rank
        write(part, tmp_path / "megatron" / f"mp_rank_{rank:02d}")
    line = refused(
        "convert", tmp_path / "megatron", tmp_path / "target", "--base", golden / "tiny_config"
    )
    assert "norm.weight': expected equal values in all ranks" in line
    part = cut(loaded, 1, 2)
    del part["model"]["vision_model"]["cls_token"]
    write(part, tmp_path / "megatron" / "mp_rank_01")
    line = refused(
        "convert", tmp_path / "megatron", tmp_path / "target", "--base", golden / "tiny_config"
    )
    assert "'vision_model.cls_token': not every rank has this tensor" in line


def test_merged_parts_must_make_up_the_whole():
    parts = [torch.ones(2, 3), torch.ones(2, 3)]
    assert merge_ranks(parts, 0, torch.Size([4, 3])).shape == (4, 3)
    assert merge_ranks(parts, 1, torch.Size([2, 6])).shape == (2, 6)
    for dim, shape in [(0, [5, 3]), (None, [4, 3]), (0, [3, 3])]:
        with pytest.raises(ValueError, match="expected shape"):
            merge_ranks(parts, dim, torch.Size(shape))
    with pytest.raises(ValueError, match="expected parts of shape"):
        merge_ranks([torch.ones(2, 3), torch.ones(2, 4)], 0, torch.Size([4, 3]))


def test_a_missing_layer_and_an_unknown_tensor_are_named(golden, loaded, tmp_path):
    part = cut(loaded, 0, 1)
    encoder = part["model"]["language_model"]["encoder"]
    del encoder["layers.3.mlp.up_proj.weight"]
    write(part, tmp_path / "megatron" / "mp_rank_00")
    line = refused(
        "convert", tmp_path / "megatron", tmp_path / "target", "--base", golden / "tiny_config"
    )
    assert "lacks 1 parameters" in line and "layers.3.mlp.up_proj" in line
    encoder["layers.3.mlp.up_proj.scale"] = torch.ones(3)
    write(part, tmp_path / "megatron" / "mp_rank_00")
    line = refused(
        "convert", tmp_path / "megatron", tmp_path / "target", "--base", golden / "tiny_config"
    )
    assert "layers.3.mlp.up_proj.scale': mPLUG-Owl2 has no such parameter" in line


def test_without_a_configuration_the_published_sizes_are_expected(golden, tmp_path):
    line = refused("convert", golden / "megatron_iter", tmp_path / "target")
    assert "pass a folder with config.json as --base" in line
    (tmp_path / "empty").mkdir()
    line = refused(
        "convert", golden / "megatron_iter", tmp_path / "target", "--base", tmp_path / "empty"
    )
    assert "expected a folder with config.json, got none" in line


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("place", ["args", "inside the settings", "rng_state", "model"])
def test_a_pickle_runs_nothing(golden, loaded, tmp_path, place):
    bomb = Bomb(tmp_path / "ran")
    changes = {
        "args": {"args": bomb},
        "inside the settings": {"args": argparse.Namespace(size=bomb)},
        "rng_state": {"rng_state": [bomb]},
        "model": {"model": {**loaded["model"], "extra": bomb}},
    }[place]
    write(loaded, tmp_path / "megatron" / "mp_rank_00", **changes)
    with pytest.raises(ConversionError, match=r"model_optim_rng\.pt cannot be read as weights"):
        convert(tmp_path / "megatron", tmp_path / "target", base=golden / "tiny_config")
    assert not (tmp_path / "ran").exists()


def test_settings_and_random_states_are_neither_needed_nor_built(golden, loaded, whole, tmp_path):
    """The golden pickle names argparse and numpy; stand-ins take their place."""
    names = torch.serialization.get_unsafe_globals_in_checkpoint(golden / "megatron_iter" / RANK)
    assert "argparse.Namespace" in names and any(name.startswith("numpy.") for name in names)
    plain = {"model": loaded["model"]}
    write(plain, tmp_path / "megatron" / "mp_rank_00")
    shutil.copyfile(golden / "tiny_config" / "config.json", tmp_path / "megatron" / "config.json")
    command("convert", tmp_path / "megatron", tmp_path / "target")
    assert_same_bits(load_state(whole), load_state(tmp_path / "target"))
    command("verify", tmp_path / "target", "--against", tmp_path / "megatron")


def test_a_rank_whose_record_is_too_short_is_refused(golden, tmp_path):
    shutil.copytree(golden / "megatron_iter", tmp_path / "source")
    rank = tmp_path / "source" / RANK
    rank.chmod(0o644)
    rewrite(rank, halve(5))
    line = refused(
        "convert", tmp_path / "source", tmp_path / "target", "--base", golden / "tiny_config"
    )
    assert "model_optim_rng.pt is damaged: its tensors need" in line
