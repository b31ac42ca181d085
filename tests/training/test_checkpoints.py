"""Checkpoints: whole ones, damaged ones, and what a run does with them."""

import json

import pytest
import torch
from safetensors.torch import save_file

from owl2_hf.training.checkpoints import find_damage, is_finished, last_checkpoint, num_processes


def make(folder, step=2, processes=1, adapter=False):
    """A checkpoint as the Trainer lays it out."""
    folder = folder / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    save_file(
        {"weight": torch.ones(99)},
        folder / ("adapter_model.safetensors" if adapter else "model.safetensors"),
    )
    (folder / ("adapter_config.json" if adapter else "config.json")).write_text(
        '{"model_type": "mplug_owl2"}'
    )
    for name in ("optimizer.pt", "scheduler.pt", "training_args.bin"):
        torch.save({"state": torch.ones(99)}, folder / name)
    for name in (
        ["rng_state.pth"]
        if processes == 1
        else [f"rng_state_{rank}.pth" for rank in range(processes)]
    ):
        torch.save(torch.get_rng_state(), folder / name)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    (folder / "versions.json").write_text(json.dumps({"processes": processes}))
    return folder


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def change(path):
    content = bytearray(path.read_bytes())
    content[content.rindex(b"\x80\x3f")] ^= 1  # within the tensor
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("processes", [1, 3])
def test_a_whole_checkpoint_has_no_damage(tmp_path, processes, adapter):
    folder = make(tmp_path, processes=processes, adapter=adapter)
    assert find_damage(folder) is None
    assert num_processes(folder) == processes


@pytest.mark.parametrize("damage", [cut, empty])
@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "config.json",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
    ],
)
def test_each_damaged_file_is_named(tmp_path, name, damage):
    folder = make(tmp_path)
    damage(folder / name)
    assert (
        find_damage(folder) == f"{name} is {'empty' if damage is empty else 'truncated or damaged'}"
    )


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth"])
def test_a_changed_byte_in_a_checkpoint_state_is_found(tmp_path, name):
    folder = make(tmp_path)
    torch.save({"state": torch.ones(99)}, folder / name)
    change(folder / name)
    assert find_damage(folder) == f"{name} is damaged: its checksum is wrong"


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "config.json",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
    ],
)
def test_each_missing_file_is_named(tmp_path, name):
    folder = make(tmp_path)
    (folder / name).unlink()
    assert find_damage(folder) == f"{name} is missing"


def test_an_adapter_needs_its_weights(tmp_path):
    folder = make(tmp_path, adapter=True)
    cut(folder / "adapter_model.safetensors")
    assert find_damage(folder) == "adapter_model.safetensors is truncated or damaged"
    (folder / "adapter_model.safetensors").unlink()
    assert find_damage(folder) == "adapter_model.safetensors is missing"


def test_every_process_needs_its_random_state(tmp_path):
    for rank in range(3):
        folder = make(tmp_path / str(rank), processes=3)
        (folder / f"rng_state_{rank}.pth").unlink()
        assert find_damage(folder) == f"rng_state_{rank}.pth is missing"
    folder = make(tmp_path, processes=2)
    # Nothing says how many there were, but one alone has no number.
    (folder / "versions.json").unlink()
    (folder / "rng_state_1.pth").unlink()
    assert find_damage(folder) == "rng_state_1.pth is missing"


def test_every_shard_of_the_weights_is_looked_at(tmp_path):
    folder = make(tmp_path)
    (folder / "model.safetensors").unlink()
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for shard in shards:
        save_file({shard: torch.ones(9)}, folder / shard)
    index = {"weight_map": {shard: shard for shard in shards}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert find_damage(folder) is None
    cut(folder / shards[1])
    assert find_damage(folder) == f"{shards[1]} is truncated or damaged"
    (folder / shards[1]).unlink()
    assert (
        find_damage(folder)
        == f"model.safetensors.index.json names {shards[1]}, which does not exist"
    )
    cut(folder / "model.safetensors.index.json")
    assert find_damage(folder) == "model.safetensors.index.json is truncated or damaged"


def test_deepspeed_keeps_its_state_in_a_folder(tmp_path):
    folder = make(tmp_path)
    for name in ("optimizer.pt", "scheduler.pt"):
        (folder / name).unlink()
    (folder / "latest").write_text("global_step2")
    assert find_damage(folder) == "the folder that `latest` names is missing"
    (folder / "global_step2").mkdir()
    torch.save({"state": torch.ones(9)}, folder / "global_step2" / "zero_pp_rank_0_optim_states.pt")
    assert find_damage(folder) is None
    cut(folder / "global_step2" / "zero_pp_rank_0_optim_states.pt")
    assert (
        find_damage(folder) == "global_step2/zero_pp_rank_0_optim_states.pt is truncated or damaged"
    )


def test_the_newest_whole_checkpoint_is_found_and_the_others_are_named(tmp_path):
    for step in (2, 4, 10, 12):
        make(tmp_path, step)
    cut(tmp_path / "checkpoint-12" / "optimizer.pt")
    (tmp_path / "checkpoint-10" / "config.json").unlink()
    (tmp_path / "checkpoint-best").mkdir()
    named = []
    found = last_checkpoint(
        tmp_path, lambda checkpoint, reason: named.append((checkpoint.name, reason))
    )
    assert found == tmp_path / "checkpoint-4"
    assert named == [
        ("checkpoint-12", "optimizer.pt is truncated or damaged"),
        ("checkpoint-10", "config.json is missing"),
    ]
    assert last_checkpoint(tmp_path / "nothing") is None


def test_a_run_is_finished_when_its_last_state_and_its_model_are_there(tmp_path):
    folder = make(tmp_path, 8)
    assert is_finished(folder, 8) and not is_finished(folder, 9)
    cut(folder / "model.safetensors")
    assert not is_finished(folder, 8)
    (folder / "model.safetensors").unlink()
    assert not is_finished(folder, 8)
