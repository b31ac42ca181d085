"""Weight files that nobody vouches for: what is read, and what is refused, by name and without
running anything.
"""

import io
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModel

from owl2_hf.conversion import ConversionError, convert
from owl2_hf.conversion.reading import read_tensors, sha256
from owl2_hf.modeling import MplugOwl2ForConditionalGeneration

from .conftest import NORM, command, halve, read_shards, refused, rewrite


class Bomb:
    def __init__(self, path, function=os.mkdir):
        self.path, self.function = path, function

    def __reduce__(self):
        return self.function, (str(self.path),)


class NestedBomb(Bomb):
    """Hidden in bytes that another unpickler would read."""

    def __reduce__(self):
        return torch.storage._load_from_bytes, (pickle.dumps(Bomb(self.path)),)


class AttributeBomb(Bomb):
    def __reduce__(self):
        return getattr, (dict, "fromkeys")


def protocol_4(value, path):
    torch.save(value, path, pickle_protocol=4)


def legacy(value, path):
    torch.save(value, path, _use_new_zipfile_serialization=False)


def bare_pickle(value, path):
    path.write_bytes(pickle.dumps(value))


@pytest.mark.parametrize("save", [torch.save, protocol_4, legacy, bare_pickle])
@pytest.mark.parametrize("bomb", [Bomb, NestedBomb, AttributeBomb])
@pytest.mark.parametrize("hidden", [False, True], ids=["alone", "behind tensors"])
def test_a_malicious_pickle_is_refused_and_runs_nothing(source, tmp_path, save, bomb, hidden):
    path = source / "pytorch_model.bin"
    tensors = torch.load(path, weights_only=True) if hidden else {}
    save({**tensors, NORM: bomb(tmp_path / "ran")}, path)
    with pytest.raises(ConversionError, match=r"pytorch_model\.bin cannot be read") as caught:
        convert(source, tmp_path / "target")
    assert not (tmp_path / "ran").exists()
    assert "weights_only" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_the_environment_variable_for_unsafe_loading_is_ignored(source, tmp_path):
    torch.save({NORM: Bomb(tmp_path / "ran")}, source / "pytorch_model.bin")
    result = subprocess.run(
        [sys.executable, "-m", "owl2_hf", "convert", source, tmp_path / "target"],
        env={**os.environ, "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1 and "cannot be read as weights" in result.stderr
    assert not (tmp_path / "ran").exists()


def test_a_script_of_torch_is_refused(source, tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), source / "pytorch_model.bin")
    assert "pytorch_model.bin is compressed: it was not" in refused(
        "convert", source, tmp_path / "target"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
            "a Git LFS pointer",
        ),
        (b"<!DOCTYPE html><html></html>", "a web page"),
        (os.urandom(500), "damaged, or contains more than tensors"),
        (b"\x80\x02" + b"(" * 5000, "damaged, or contains more than tensors"),
    ],
)
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_git_lfs_pointers_web_pages_and_damaged_files_are_named(
    source, tmp_path, content, message, name
):
    (source / "pytorch_model.bin").unlink()
    (source / name).write_bytes(content)
    line = refused("convert", source, tmp_path / "target")
    assert name in line
    assert message in line or "damaged or cut off" in line


@pytest.mark.parametrize("keep", [10, 1000, 0.5, 0.999])
def test_a_truncated_file_is_named(source, tmp_path, keep):
    path = source / "pytorch_model.bin"
    content = path.read_bytes()
    path.write_bytes(content[: keep if isinstance(keep, int) else int(len(content) * keep)])
    assert "pytorch_model.bin cannot be read" in refused("convert", source, tmp_path / "target")


@pytest.mark.parametrize("keep", [4, 1000, 0.5])
def test_truncated_safetensors_are_named(source, tmp_path, keep):
    tensors = torch.load(source / "pytorch_model.bin", weights_only=True)
    save_file(
        {key: value.contiguous() for key, value in tensors.items()}, source / "model.safetensors"
    )
    content = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(
        content[: keep if isinstance(keep, int) else int(len(content) * keep)]
    )
    assert "model.safetensors cannot be read" in refused("convert", source, tmp_path / "target")


def test_a_flipped_bit_is_found_by_the_checksum(source, tmp_path):
    path = source / "pytorch_model.bin"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert "is damaged: the checksum of its record" in refused(
        "convert", source, tmp_path / "target"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_files_without_checksums_are_read(source, tmp_path):
    path = source / "pytorch_model.bin"
    tensors = torch.load(path, weights_only=True)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(tensors, path)
    finally:
        torch.serialization.set_crc32_options(True)
    convert(source, tmp_path / "target")
    assert len(sha256(path)) == 64


def test_a_compressed_archive_is_refused(source, tmp_path):
    path = source / "pytorch_model.bin"
    with (
        zipfile.ZipFile(path) as archive,
        zipfile.ZipFile(tmp_path / "new", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in archive.namelist():
            packed.writestr(name, archive.read(name))
    (tmp_path / "new").replace(path)
    assert "is compressed" in refused("convert", source, tmp_path / "target")


def test_a_record_that_is_there_twice_is_refused(source, tmp_path):
    path = source / "pytorch_model.bin"
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        archive.writestr(name, b"other")
    assert "has two records of one name" in refused("convert", source, tmp_path / "target")


def test_a_wrong_safetensors_header_is_refused(source, tmp_path):
    (source / "pytorch_model.bin").unlink()
    for header in (
        b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,999]}}',
        b"{" * 100,
        b'{"a": 1}',
    ):
        (source / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
        assert "model.safetensors cannot be read" in refused("convert", source, tmp_path / "target")
    (source / "model.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")
    assert "model.safetensors cannot be read" in refused("convert", source, tmp_path / "target")


def test_a_file_must_hold_a_dictionary(source, tmp_path):
    torch.save([torch.ones(2)], source / "pytorch_model.bin")
    assert "expected a dictionary of tensors, got list" in refused(
        "convert", source, tmp_path / "target"
    )


def test_folders_pipes_and_loops_are_no_files(source, tmp_path):
    path = source / "pytorch_model.bin"
    path.unlink()
    path.mkdir()
    assert "pytorch_model.bin is not a file" in refused("convert", source, tmp_path / "target")
    path.rmdir()
    os.mkfifo(path)
    assert "pytorch_model.bin is not a file" in refused("convert", source, tmp_path / "target")
    path.unlink()
    path.symlink_to(path)
    assert refused("convert", source, tmp_path / "target")


def write_index(source, text):
    (source / "pytorch_model.bin").unlink(missing_ok=True)
    (source / "pytorch_model.bin.index.json").write_text(
        text if isinstance(text, str) else json.dumps(text)
    )


@pytest.mark.parametrize(
    "name",
    [
        "../outside.bin",
        "/etc/passwd",
        "a/../../outside.bin",
        "sub/pytorch_model.bin",
        "..\\x.bin",
        "x.pkl",
        ".",
        "",
        7,
        None,
    ],
)
def test_an_index_names_only_weight_files_of_its_folder(source, tmp_path, name):
    write_index(source, {"weight_map": {NORM: name}})
    line = refused("convert", source, tmp_path / "target")
    assert repr(name) in line and "expected a weight file in the same folder" in line


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"weight_map": {"a": "pytorch_model-1-of-2.bin"}}', "which does not exist"),
        (
            '{"weight_map": {"a": "model.safetensors", "a": "model.safetensors"}}',
            "it names 'a' twice",
        ),
        ('{"weight_map": []}', "weight_map is not an object"),
        ('{"weight_map": {}}', "weight_map is not an object with entries"),
        ("{}", "weight_map"),
        ("[]", "not a weight index"),
        ("{", "not a weight index"),
        ("[" * 100000, "not a weight index"),
    ],
)
def test_a_broken_index_is_refused(source, tmp_path, text, message):
    write_index(source, text)
    assert message in refused("convert", source, tmp_path / "target")


def test_a_huge_index_is_not_read(source, tmp_path):
    write_index(source, "{}")
    with (source / "pytorch_model.bin.index.json").open("ab") as file:
        file.truncate(2**33)
    assert "larger than 64 MiB" in refused("convert", source, tmp_path / "target")


def test_an_entry_without_its_tensor_is_refused(source, tmp_path):
    (source / "pytorch_model.bin").rename(source / "pytorch_model-1-of-1.bin")
    write_index(
        source,
        {"weight_map": {NORM: "pytorch_model-1-of-1.bin", "ghost": "pytorch_model-1-of-1.bin"}},
    )
    assert "tensor 'ghost': the index names it, but the file does not" in refused(
        "convert", source, tmp_path / "target"
    )


def test_pickles_that_the_index_does_not_name_stay_closed(golden_dir, source, tmp_path):
    shutil.rmtree(source)
    shutil.copytree(golden_dir("A") / "hf", source)
    source.chmod(0o755)
    torch.save({NORM: Bomb(tmp_path / "ran")}, source / "training_args.bin")
    torch.save({NORM: Bomb(tmp_path / "ran")}, source / "pytorch_model-00009-of-00004.bin")
    convert(source, tmp_path / "target")
    assert not (tmp_path / "ran").exists()
    assert not list((tmp_path / "target").glob("*.bin"))


def test_tensors_are_mapped_not_loaded(tmp_path):
    """Memory follows what is used, not what is in the file."""
    import psutil

    torch.save(
        {"large": torch.zeros(64 << 20), "small": torch.ones(2)}, tmp_path / "pytorch_model.bin"
    )
    process = psutil.Process()
    before = process.memory_info().rss
    tensors = read_tensors(tmp_path / "pytorch_model.bin")
    assert tensors["small"].sum() == 2
    assert process.memory_info().rss - before < 64 << 20


def test_names_are_quoted(source, tmp_path):
    tensors = read_shards(source)
    torch.save({**tensors, "evil\x1b[31m\nname": torch.ones(2)}, source / "pytorch_model.bin")
    line = refused("convert", source, tmp_path / "target")
    assert r"'evil\x1b[31m\nname'" in line and "\x1b" not in line


@pytest.mark.parametrize("number", [0, 1, 40, 100])
def test_a_record_shorter_than_its_tensors_is_refused_wherever_it_is_read(source, tmp_path, number):
    command("convert", source, tmp_path / "right")
    rewrite(source / "pytorch_model.bin", halve(number))
    message = rf"pytorch_model\.bin is damaged: its tensors need \d+ bytes of the record '[^']+/data/{number}'"
    assert re.search(message, refused("convert", source, tmp_path / "target"))
    assert re.search(message, refused("verify", tmp_path / "right", "--against", source))
    for load in (AutoModel.from_pretrained, MplugOwl2ForConditionalGeneration.from_pretrained):
        for dtype in ("auto", torch.float32):
            with pytest.raises(ValueError, match=message):
                load(source, dtype=dtype)


def test_every_record_is_checked(source):
    path = source / "pytorch_model.bin"
    whole = path.read_bytes()
    for number in range(len(read_tensors(path))):
        path.write_bytes(whole)
        rewrite(path, halve(number))
        with pytest.raises(ConversionError, match=f"/data/{number}'"):
            read_tensors(path)


def test_a_record_that_is_missing_or_too_long_or_cut_out_of_the_file_is_refused(source):
    path = source / "pytorch_model.bin"
    whole = path.read_bytes()
    rewrite(path, lambda name, content: content + content if name.endswith("/data/3") else content)
    with pytest.raises(
        ConversionError, match=r"need (\d+) bytes of the record '[^']+/data/3', which has (?!\1)"
    ):
        read_tensors(path)
    with zipfile.ZipFile(path, "w") as archive, zipfile.ZipFile(io.BytesIO(whole)) as before:
        for name in before.namelist():
            if not name.endswith("/data/3"):
                archive.writestr(name, before.read(name))
    with pytest.raises(
        ConversionError, match=r"has no record '[^']+/data/3', which its tensors need"
    ):
        read_tensors(path)
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        record = next(entry for entry in archive.infolist() if entry.filename.endswith("/data/3"))
    start = record.header_offset + 200
    path.write_bytes(whole[:start] + whole[start + 64 :])
    with pytest.raises(ConversionError, match="damaged"):
        read_tensors(path)


def test_a_legacy_file_with_a_short_storage_is_refused(source):
    path = source / "pytorch_model.bin"
    legacy({"a": torch.arange(7.0), "b": torch.ones(300)}, path)
    content = path.read_bytes()
    start = content.index(struct.pack("<qff", 7, 0, 1))
    path.write_bytes(
        content[:start]
        + struct.pack("<q", 3)
        + content[start + 8 : start + 20]
        + content[start + 36 :]
    )
    with pytest.raises(ConversionError, match="cannot be read as weights"):
        read_tensors(path)


def test_storages_of_every_type_are_read(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    names = [
        "double",
        "float",
        "half",
        "bfloat16",
        "long",
        "int",
        "short",
        "uint8",
        "int8",
        "bool",
        "cfloat",
        "cdouble",
    ]
    made = {
        name: torch.ones(3, dtype=getattr(torch, name))
        for name in [*names, "cdouble", "float8_e4m3fn", "uint16"]
    }
    others = {
        "part": torch.ones(9)[2:5],
        "turned": torch.ones(4, 3).t(),
        "none": torch.ones(0),
        "one": torch.ones(()),
    }
    torch.save({**made, **others, "trained": torch.nn.Parameter(torch.ones(2))}, path)
    for name, tensor in read_tensors(path).items():
        assert tensor.float().eq(1).all(), name
