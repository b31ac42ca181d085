"""The target appears when it is whole, and what stood there stays until then."""

import os
import shutil
import signal
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from owl2_hf.conversion import convert
from owl2_hf.conversion.staging import staged_folder

from .conftest import NORM, command, drop, edit, refused


def fill(folder, text="new"):
    (folder / "config.json").write_text(text)


def test_a_folder_appears_at_the_end(tmp_path):
    with staged_folder(tmp_path / "target") as folder:
        fill(folder)
        assert not (tmp_path / "target").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), staged_folder(tmp_path / "target") as folder:
        fill(folder)
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_a_filled_target_is_refused_unless_overwriting(source, tmp_path):
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "mine.txt").write_text("mine")
    (occupied / "my_weights.pt").write_text("mine")
    (occupied / "README.md").write_text("mine")
    (occupied / "model.safetensors").write_text("old")
    (occupied / "model.safetensors.index.json").write_text("old")
    assert "is not empty" in refused("convert", source, occupied)
    assert sorted(path.name for path in occupied.iterdir()) == [
        "README.md",
        "mine.txt",
        "model.safetensors",
        "model.safetensors.index.json",
        "my_weights.pt",
    ]
    command("convert", source, occupied, "--overwrite", "--max-shard-size", "200KB")
    for name in ("mine.txt", "my_weights.pt", "README.previous.md"):
        assert (occupied / name).read_text() == "mine"
    # Transformers would prefer it to the shards.
    assert not (occupied / "model.safetensors").exists()
    assert "weight_map" in (occupied / "model.safetensors.index.json").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["occupied", "source"]


def test_a_failed_overwrite_keeps_the_old_model(source, tmp_path):
    command("convert", source, tmp_path / "target")
    before = {path.name: path.read_bytes() for path in (tmp_path / "target").iterdir()}
    edit(source, drop(NORM))
    refused("convert", source, tmp_path / "target", "--overwrite")
    assert {path.name: path.read_bytes() for path in (tmp_path / "target").iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


def test_source_and_target_stay_apart(source, tmp_path):
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "file").write_text("a file")
    for target in (
        source,
        source / "inside",
        tmp_path / "link",
        tmp_path / "link" / "inside",
        tmp_path,
    ):
        assert "overlap: choose another target" in refused("convert", source, target, "--overwrite")
    assert "is a file" in refused("convert", source, tmp_path / "file", "--overwrite")
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before


def test_a_link_to_an_empty_folder_is_followed(source, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    command("convert", source, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "elsewhere" / "model.safetensors").is_file()


def test_two_processes_cannot_write_the_same_folder(source, tmp_path):
    with staged_folder(tmp_path / "target") as folder:
        fill(folder)
        assert "is being written by another process" in refused(
            "convert", source, tmp_path / "target"
        )
    assert (tmp_path / "target" / "config.json").read_text() == "new"
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "owl2_hf", "convert", source, tmp_path / "both"],
            stderr=subprocess.PIPE,
        )
        for _ in range(2)
    ]
    messages = [process.communicate()[1] for process in processes]
    assert any(process.returncode == 0 for process in processes), messages
    assert all(process.returncode in (0, 1) for process in processes)
    assert not any(b"Traceback" in message for message in messages)
    convert(source, tmp_path / "alone")
    assert (tmp_path / "both/model.safetensors").read_bytes() == (
        tmp_path / "alone/model.safetensors"
    ).read_bytes()
    assert not list(tmp_path.glob(".*"))


SLOW = """
import time
from owl2_hf.cli import app
from owl2_hf.conversion import writing
write = writing.ShardWriter.write
def slow(self, key, tensor):
    write(self, key, tensor)
    print("written", flush=True)
    time.sleep(0.01)
writing.ShardWriter.write = slow
app()
"""


@pytest.mark.parametrize(
    ("signal_number", "seen"),
    [
        (signal.SIGKILL, 1),
        (signal.SIGKILL, 60),
        (signal.SIGKILL, 133),
        (signal.SIGINT, 60),
        (signal.SIGTERM, 60),
    ],
)
def test_a_killed_run_leaves_no_whole_looking_folder_and_a_rerun_works(
    source, tmp_path, signal_number, seen
):
    arguments = [sys.executable, "-c", SLOW, "convert", source, tmp_path / "target"]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for _ in range(seen):
        process.stdout.readline()
    os.kill(process.pid, signal_number)
    _, message = process.communicate()
    if process.returncode != 0:
        assert process.returncode == (130 if signal_number == signal.SIGINT else -signal_number)
        assert not (tmp_path / "target").exists()
    assert b"Traceback" not in message
    command("convert", source, tmp_path / "target", "--overwrite")
    assert len(load_file(tmp_path / "target" / "model.safetensors")) == 133
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


def test_a_run_killed_between_the_two_renames_loses_nothing(tmp_path):
    with staged_folder(tmp_path / "target") as folder:
        fill(folder, "old")
    (tmp_path / "target").rename(tmp_path / ".target.previous")
    (tmp_path / ".target.partial").mkdir()
    with pytest.raises(RuntimeError), staged_folder(tmp_path / "target", overwrite=True):
        raise RuntimeError
    assert (tmp_path / "target" / "config.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_full_disk_is_one_line_and_leaves_nothing(source, tmp_path):
    """A limit on the size of files stands in for the disk's end."""
    limited = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000));"
        "sys.argv[0] = 'owl2-hf'; from owl2_hf.cli import app; app()"
    )
    result = subprocess.run(
        [sys.executable, "-c", limited, "convert", source, tmp_path / "target"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert f"{tmp_path / 'target'} cannot be written: File too large" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_an_error_of_the_disk_while_writing_is_not_lost(source, tmp_path, monkeypatch):
    """It is told to whoever flushes first, which here is a thread beside the writing."""
    from owl2_hf.conversion import writing

    def broken(descriptor):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(writing, "_FLUSHED_AT", 1000)
    monkeypatch.setattr(writing, "os", type("", (), {"fsync": staticmethod(broken)}))
    assert "cannot be written: Input/output error" in refused(
        "convert", source, tmp_path / "target"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_space_is_looked_at_before_anything_is_written(source, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1000, 900, 100))
    line = refused("convert", source, tmp_path / "target")
    assert "got 100: free some space" in line


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_place_without_permission_is_one_line(source, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "Permission denied" in refused("convert", source, tmp_path / "locked" / "target")
