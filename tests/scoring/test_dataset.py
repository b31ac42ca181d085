"""Scores of whole data sets: sources, the file that comes out, interruptions, and several
processes.
"""

import csv
import io
import os
import re
import shlex
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import owl2_hf
from owl2_hf.cli import app
from owl2_hf.scoring import Scorer, custom_preset
from owl2_hf.scoring.dataset import score_dataset
from owl2_hf.scoring.prefix import PrefixScorer, with_prefix

from ..modeling.test_scale_out import ROOT, torchrun
from ..syncs import host_syncs
from ..test_docs import DOCS, examples, place  # noqa: F401  # a fixture
from ..test_videos import make_video

PRESET = custom_preset("one-align", levels=["high", "soft", "bad"])
OWN = ["image", "score", "std", "high", "soft", "bad", "error"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As the other processes of these tests: sums of several threads round differently."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def scorer():
    return Scorer(*owl2_hf.load_default(dtype=torch.float32), PRESET, batch_size=4)


@pytest.fixture(scope="module")
def model(scorer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scorer") / "model"
    scorer.model.save_pretrained(folder)
    scorer.processor.save_pretrained(folder)
    return folder


def noise(seed: int) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((80, 60))


@pytest.fixture
def images(tmp_path, monkeypatch):
    """A folder with folders in it, and the working directory around it."""
    monkeypatch.chdir(tmp_path)
    for index, name in enumerate(["b.jpg", "a.png", "inner/c.jpg", "inner/deep/d.JPG", "z.webp"]):
        path = Path("images", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        noise(index).save(path)
    Path("images", "broken.jpg").write_bytes(b"no image")
    Path("images", "notes.txt").write_text("no image")
    return Path("images")


NAMES = [
    "images/a.png",
    "images/b.jpg",
    "images/broken.jpg",
    "images/z.webp",
    "images/inner/c.jpg",
    "images/inner/deep/d.JPG",
]


def arguments(model, *rest):
    return ["score", *map(str, rest), "--model", str(model), "--levels", "high,soft,bad"]


def run(model, *rest):
    return CliRunner().invoke(app, arguments(model, *rest))


def table(path="out.csv"):
    with Path(path).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def assert_scores(rows, scorer, images):
    """The rows hold what the scorer says of these images one by one."""
    assert len(rows) == len(images)
    for row, image in zip(rows, images, strict=True):
        (expected,) = scorer(image)
        assert not row["error"]
        assert float(row["score"]) == pytest.approx(expected.score, abs=1e-5)
        assert float(row["std"]) == pytest.approx(expected.std, abs=1e-5)
        found = [float(row[level]) for level in expected.levels]
        assert found == pytest.approx(expected.probs, abs=1e-5)


def test_a_folder_is_scored_with_all_folders_in_it(model, scorer, images):
    result = run(model, images, "--out", "out.csv", "--batch-size", "2")
    assert result.exit_code == 0, result.output
    assert not result.stdout
    assert "6 rows in out.csv, 1 without a score" in result.stderr
    rows = table()
    assert list(rows[0]) == OWN
    assert [row["image"] for row in rows] == NAMES
    (broken,) = [row for row in rows if row["error"]]
    assert broken["image"] == "images/broken.jpg" and broken["score"] == broken["high"] == ""
    assert "is not an image" in broken["error"]
    good = [row for row in rows if not row["error"]]
    assert_scores(good, scorer, [row["image"] for row in good])
    assert not Path("out.csv.parts").exists()


def test_parquet_holds_the_same_rows_as_numbers(model, scorer, images):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    assert run(model, images, "--out", "out.parquet", "--workers", "0").exit_code == 0
    found = parquet.read_table("out.parquet")
    assert [str(found.schema.field(name).type) for name in OWN] == [
        "string",
        *["double"] * 5,
        "string",
    ]
    rows = found.to_pylist()
    assert [row["image"] for row in rows] == NAMES
    assert rows[2]["score"] is None and "is not an image" in rows[2]["error"]
    assert_scores([row for row in rows if not row["error"]], scorer, [*NAMES[:2], *NAMES[3:]])


def test_globs_files_and_folders_may_stand_side_by_side(model, images):
    result = run(
        model,
        "images/*.jpg",
        "images/**/*.JPG",
        "images/inner",
        "--out",
        "out.csv",
        "--workers",
        "0",
    )
    assert result.exit_code == 0, result.output
    assert [row["image"] for row in table()] == [
        "images/b.jpg",
        "images/broken.jpg",
        "images/inner/deep/d.JPG",
        "images/inner/c.jpg",
        "images/inner/deep/d.JPG",
    ]


def test_a_csv_list_keeps_its_other_columns(model, scorer, images):
    Path("list.csv").write_text(
        'id,image,note,std\n7,images/a.png,"two\nlines, ""one"" row",0.5\n8,images/none.png,,\n'
        "9,/etc/passwd,,\n10,images/b.jpg,short\n",
        encoding="utf-8-sig",
    )
    result = run(model, "list.csv", "--out", "out.csv", "--workers", "0")
    assert result.exit_code == 0, result.output
    rows = table()
    assert list(rows[0]) == ["image", "id", "note", "input_std", *OWN[1:]]
    assert [row["id"] for row in rows] == ["7", "8", "9", ""]
    assert rows[0]["note"] == 'two\nlines, "one" row' and rows[0]["input_std"] == "0.5"
    assert_scores(rows[:1], scorer, ["images/a.png"])
    for row, error in zip(
        rows[1:], ["does not exist", "is outside", "expected 4 values, got 3"], strict=True
    ):
        assert error in row["error"]
    assert rows[3]["image"] == "list.csv: row 6"
    Path("outside.csv").write_text(f"file\n{Path('images/a.png').absolute()}\n")
    options = ["--column", "file", "--allow-outside", "--out", "again.csv", "--workers", "0"]
    assert run(model, "outside.csv", *options).exit_code == 0
    assert_scores(table("again.csv"), scorer, ["images/a.png"])


def test_a_parquet_list_keeps_types_and_holds_paths_or_bytes(scorer, images):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet

    content = Path("images/b.jpg").read_bytes()
    columns = {
        "image": [{"bytes": content, "path": None}, {"bytes": None, "path": "a.png"}],
        "id": [1, 2],
        "tags": [["x"], []],
        "other": [b"1", b"2"],
    }
    parquet.write_table(pyarrow.table(columns), "list.parquet")
    score_dataset(scorer, ["list.parquet"], "out.parquet", image_folder="images", num_workers=0)
    found = parquet.read_table("out.parquet")
    assert found.column_names == ["image", "id", "tags", *OWN[1:]]
    assert found["id"].to_pylist() == [1, 2] and found["tags"].to_pylist() == [["x"], []]
    assert found["image"].to_pylist() == ["list.parquet: row 1", "a.png"]
    assert_scores(found.to_pylist(), scorer, ["images/b.jpg", "images/a.png"])


def test_data_sets_are_scored_from_a_folder_the_hub_and_memory(scorer, images, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    photos = [str(images / name) for name in ("a.png", "b.jpg")]
    rows = datasets.Dataset.from_dict({"photo": photos, "id": [3, 4]})
    rows = rows.cast_column("photo", datasets.Image())
    both = datasets.DatasetDict({"train": rows, "test": rows.select([1])})
    both.save_to_disk("saved")
    score_dataset(scorer, ["saved"], "all.csv", column="photo", num_workers=0, allow_outside=True)
    assert [(row["split"], row["id"]) for row in table("all.csv")] == [
        ("train", "3"),
        ("train", "4"),
        ("test", "4"),
    ]
    assert_scores(table("all.csv"), scorer, [*photos, photos[1]])
    options = {"column": "photo", "split": "test", "num_workers": 1, "allow_outside": True}
    score_dataset(scorer, ["saved"], "test.csv", **options)
    assert_scores(table("test.csv"), scorer, photos[1:])
    score_dataset(scorer, [rows], "memory.csv", column="photo", num_workers=0)
    assert_scores(table("memory.csv"), scorer, photos)
    asked = []

    def load_dataset(name, split, streaming):
        asked.append((name, split, streaming))
        return rows.to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    options = {"column": "photo", "split": "train", "num_workers": 0}
    with_paths = rows
    contents = [{"bytes": Path(photo).read_bytes(), "path": None} for photo in photos]
    rows = datasets.Dataset.from_dict(
        {"photo": contents}, datasets.Features(photo=datasets.Image())
    )
    score_dataset(scorer, ["someone/photos"], "hub.csv", **options)
    assert asked == [("someone/photos", "train", True)]
    assert_scores(table("hub.csv"), scorer, photos)
    rows = with_paths
    score_dataset(scorer, ["someone/photos"], "paths.csv", **options)
    assert all("does not exist" in row["error"] for row in table("paths.csv"))


def test_images_that_the_hub_has_as_files_are_fetched_from_their_own_data_set(
    scorer, images, monkeypatch
):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    import fsspec

    urls = [f"hf://datasets/someone/{name}@main/a.png" for name in ("photos", "others")]
    rows = datasets.Dataset.from_dict({"image": urls}).cast_column("image", datasets.Image())
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows.to_iterable_dataset())
    fetched = []

    def fetch(url, mode):
        fetched.append(url)
        return io.BytesIO(Path("images/a.png").read_bytes())

    monkeypatch.setattr(fsspec, "open", fetch)
    score_dataset(scorer, ["someone/photos"], "out.csv", num_workers=0)
    found = table()
    assert_scores(found[:1], scorer, ["images/a.png"])
    assert fetched == urls[:1] and found[1]["error"]


def pack(path, mode, names):
    with tarfile.open(path, mode) as file:
        for key, name in enumerate(names):
            content = Path(name).read_bytes()
            info = tarfile.TarInfo(f"./{key:03}{Path(name).suffix}")
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
            text = tarfile.TarInfo(f"{key:03}.txt")
            text.size = 2
            file.addfile(text, io.BytesIO(b"no"))


@pytest.mark.parametrize("workers", [0, 1])
def test_tar_files_are_scored_without_being_unpacked(model, scorer, images, workers):
    names = ["images/a.png", "images/broken.jpg", "images/inner/c.jpg"]
    pack("shard-0.tar", "w", names)
    pack("shard-1.tar.gz", "w:gz", names[::-1])
    result = run(
        model, "shard-0.tar", "shard-1.tar.gz", "--out", "out.csv", "--workers", str(workers)
    )
    assert result.exit_code == 0, result.output
    rows = table()
    assert [row["image"] for row in rows] == [
        "shard-0.tar/000.png",
        "shard-0.tar/001.jpg",
        "shard-0.tar/002.jpg",
        "shard-1.tar.gz/000.jpg",
        "shard-1.tar.gz/001.jpg",
        "shard-1.tar.gz/002.png",
    ]
    assert [bool(row["error"]) for row in rows] == [False, True, False, False, True, False]
    good = [row for row in rows if not row["error"]]
    assert_scores(good, scorer, [names[0], names[2], names[2], names[0]])


@pytest.mark.parametrize("damage", ["cut", "header"])
def test_a_damaged_tar_file_is_named_and_the_next_one_scored(scorer, images, damage):
    pack("bad.tar", "w", ["images/a.png", "images/b.jpg"])
    content = bytearray(Path("bad.tar").read_bytes())
    second = content.index(b"./001.jpg")
    if damage == "cut":
        content = content[: second + 600]
    else:
        content[second : second + 512] = b"?" * 512
    Path("bad.tar").write_bytes(content)
    pack("good.tar", "w", ["images/b.jpg"])
    score_dataset(scorer, ["bad.tar", "good.tar"], "out.csv", num_workers=0)
    rows = table()
    assert rows[0]["image"] == "bad.tar/000.png" and not rows[0]["error"]
    (error,) = [row for row in rows if row["image"] == "bad.tar"]
    assert "bad.tar is damaged" in error["error"]
    assert rows[-1]["image"] == "good.tar/000.jpg" and not rows[-1]["error"]


def test_videos_and_crops_are_scored_as_without_a_file(model, scorer, images):
    pytest.importorskip("av", reason="PyAV is not installed")
    make_video(Path("images/inner/clip.mp4"), 30, 10)
    make_video(Path("images/short.mp4"), 10, 10)
    result = run(model, "images", "--task", "video", "--out", "out.csv")
    assert result.exit_code == 0, result.output
    rows = table()
    assert [row["image"] for row in rows] == ["images/short.mp4", "images/inner/clip.mp4"]
    for row in rows:
        (expected,) = scorer(row["image"], task="video")
        assert float(row["score"]) == pytest.approx(expected.score, abs=1e-5)
    refused = run(model, "images/short.mp4", "--out", "again.csv")
    assert refused.exit_code == 1 and "choose --task video" in refused.stderr
    noise(3).resize((200, 150)).save("large.png")
    assert run(model, "large.png", "--crops", "--out", "crops.csv").exit_code == 0
    (expected,) = Scorer(scorer.model, scorer.processor, PRESET, crops=True)("large.png")
    assert float(table("crops.csv")[0]["score"]) == pytest.approx(expected.score, abs=1e-5)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A folder of images of which two cannot be read."""
    folder = tmp_path_factory.mktemp("many")
    for index in range(120):
        noise(index).save(folder / f"{index:03}.jpg")
    for index in (5, 77):
        (folder / f"{index:03}.jpg").write_bytes(b"broken")
    return folder


OPTIONS = ["--batch-size", "4", "--part-rows", "8", "--workers", "1"]


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_killed_run_goes_on_to_the_same_file(model, many, tmp_path, suffix):
    if suffix == "parquet":
        pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    whole, out = tmp_path / f"whole.{suffix}", tmp_path / f"out.{suffix}"
    assert run(model, many, "--out", whole, *OPTIONS).exit_code == 0
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "owl2_hf", *arguments(model, many, "--out", out, *OPTIONS)]
    parts = tmp_path / f"out.{suffix}.parts"
    with subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL) as process:
        while len(list(parts.glob(f"*.{suffix}"))) < 3:
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert not out.exists()
    written = list(parts.glob(f"*.{suffix}"))
    assert 3 <= len(written) < 15
    (parts / f"{written[0].name}.new").write_bytes(b"torn")
    result = run(model, many, "--out", out, *OPTIONS)
    assert result.exit_code == 0, result.output
    before = f"{8 * len(written)} of them scored before"
    assert f"120 rows in {out}, {before}, 2 without" in result.stderr
    assert out.read_bytes() == whole.read_bytes() and not parts.exists()


def test_two_processes_share_the_rows(model, many, tmp_path):
    whole, out = tmp_path / "whole.csv", tmp_path / "out.csv"
    assert run(model, many, "--out", whole, *OPTIONS).exit_code == 0
    torchrun(["-m", "owl2_hf", *arguments(model, many, "--out", out, *OPTIONS)])
    assert out.read_bytes() == whole.read_bytes()
    assert not (tmp_path / "out.csv.parts").exists()


def test_a_run_of_two_processes_is_finished_by_one(scorer, many, tmp_path, monkeypatch):
    """Parts belong to no process: whoever finds them takes them."""
    out, options = tmp_path / "out.csv", {"num_workers": 0, "part_rows": 8}
    from owl2_hf.scoring import dataset

    written = []
    write_part = dataset.Table.write_part

    def stop_after_three(self, part, rows):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(part)
        write_part(self, part, rows)

    class SecondOfTwo(dataset.Ranks):
        def __init__(self):
            self.rank, self.size, self.is_first = 1, 2, True

        def wait(self):
            pass

    with monkeypatch.context() as patch:
        patch.setattr(dataset, "Ranks", SecondOfTwo)
        patch.setattr(dataset.Table, "write_part", stop_after_three)
        with pytest.raises(KeyboardInterrupt):
            score_dataset(scorer, [many], out, **options)
    assert [int(part.name[:9]) for part in written] == [1, 3, 5]
    summary = score_dataset(scorer, [many], out, **options)
    assert (summary.rows, summary.errors, summary.found) == (120, 2, 24)
    assert [row["image"] for row in table(out)] == sorted(map(str, many.iterdir()))


def begin(scorer, sources, out, monkeypatch, **options):
    """A run that is interrupted behind its first part."""
    from owl2_hf.scoring.parts import Table

    write_part = Table.write_part

    def stop(self, part, rows):
        write_part(self, part, rows)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Table, "write_part", stop)
        with pytest.raises(KeyboardInterrupt):
            score_dataset(scorer, sources, out, num_workers=0, part_rows=4, **options)


def test_a_changed_folder_costs_only_the_parts_that_changed(scorer, images, monkeypatch):
    names = [str(images / "a.png")] * 4 + [str(images / "b.jpg")] * 3
    begin(scorer, names, "out.csv", monkeypatch)
    summary = score_dataset(
        scorer, [*names[:4], "images/z.webp"], "out.csv", num_workers=0, part_rows=4
    )
    assert (summary.rows, summary.found) == (5, 4)
    begin(scorer, names, "out.csv", monkeypatch, overwrite=True)
    summary = score_dataset(scorer, names[1:], "out.csv", num_workers=0, part_rows=4)
    assert (summary.rows, summary.found) == (6, 0)
    assert [row["image"] for row in table()] == names[1:]


def test_scores_of_other_settings_are_not_mixed(model, scorer, images, monkeypatch):
    begin(scorer, [str(images)], "out.csv", monkeypatch)
    other = Scorer(scorer.model, scorer.processor, PRESET, (0.0, 1.0), batch_size=4)
    with pytest.raises(ValueError, match="was started with another preset: use the same"):
        score_dataset(other, [str(images)], "out.csv", num_workers=0, part_rows=4)
    score_dataset(other, [str(images)], "out.csv", num_workers=0, part_rows=4, overwrite=True)
    assert all(float(row["score"]) <= 1 for row in table() if row["score"])
    result = run(model, images, "--out", "out.csv")
    assert result.exit_code == 1 and "already exists" in result.stderr


def test_two_runs_do_not_write_one_file(scorer, images, monkeypatch):
    filelock = pytest.importorskip("filelock")
    begin(scorer, [str(images)], "out.csv", monkeypatch)
    with (
        filelock.FileLock("out.csv.parts/lock"),
        pytest.raises(ValueError, match="another process"),
    ):
        score_dataset(scorer, [str(images)], "out.csv", num_workers=0, part_rows=4)


@pytest.mark.parametrize(
    ("rest", "expected"),
    [
        (["images", "--out", "out.txt"], "named .csv or .parquet, got 'out.txt'"),
        (["images", "--out", "out.csv", "--json"], "leave out --json and --csv"),
        (["images", "--workers", "1"], "--workers needs --out"),
        (["images/*.tiff", "--out", "out.csv"], "no file matches images/*.tiff"),
        (["none.jpg", "--out", "out.csv"], "'none.jpg' does not exist"),
        (["empty", "--out", "out.csv"], "contain no images"),
        (
            ["list.csv", "--out", "out.csv"],
            "expected the column image, got a, b; choose one with --column",
        ),
        (["images", "--out", "out.csv", "--task", "beauty"], "expected a task of quality"),
        (
            ["images", "--out", "out.csv", "--image-folder", "none"],
            "the image folder 'none' does not exist",
        ),
    ],
)
def test_a_mistake_is_one_line(model, images, rest, expected):
    Path("empty").mkdir()
    Path("list.csv").write_text("a,b\n1,2\n")
    result = run(model, *rest)
    assert result.exit_code == 1
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("owl2-hf")]
    assert expected in line
    assert not Path("out.csv").exists()


def test_names_that_are_no_utf8_come_out_whole(scorer, images):
    odd = os.fsdecode(b"images/inner/\xff.jpg")
    noise(1).save(odd)
    score_dataset(scorer, ["images/inner"], "out.csv", num_workers=1)
    assert b"images/inner/\xff.jpg," in Path("out.csv").read_bytes()
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    score_dataset(scorer, ["images/inner"], "out.parquet", num_workers=1)
    names = parquet.read_table("out.parquet")["image"].to_pylist()
    assert "images/inner/\\xff.jpg" in names


def test_an_image_that_the_model_chokes_on_is_named(scorer, images, monkeypatch):
    read = PrefixScorer._read

    def choke(self, inputs):
        if inputs["pixel_values"].mean() > 1.5:  # white
            raise ValueError("the model's logits are not finite")
        if len(inputs["pixel_values"]) > 1:
            raise ValueError("the model's logits are not finite")
        return read(self, inputs)

    monkeypatch.setattr(PrefixScorer, "_read", choke)
    Image.new("RGB", (8, 8), "white").save("white.png")
    score_dataset(scorer, ["white.png", "images/a.png"], "out.csv", num_workers=0)
    rows = table()
    assert "not finite" in rows[0]["error"] and not rows[1]["error"]
    with pytest.raises(ValueError, match="not finite"):
        score_dataset(scorer, ["white.png"] * 2, "white.csv", num_workers=0)


def test_the_text_in_front_of_the_image_is_read_once(scorer, images):
    shared = with_prefix(scorer)
    assert isinstance(shared, PrefixScorer)
    lengths = []
    hook = scorer.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    names = ["images/a.png", "images/b.jpg", "images/z.webp"]
    found = shared(names[:2]) + shared(names[2:])
    hook.remove()
    prefix, first, second = lengths
    assert prefix > 10 and first == second
    for one, name in zip(found, names, strict=True):
        (expected,) = scorer(name)
        assert one.score == pytest.approx(expected.score, abs=1e-5)
        assert one.logits == pytest.approx(expected.logits, abs=1e-4)
    video = [[names[0]], names[1:]]
    for one, expected in zip(shared(video, "video"), scorer(video, "video"), strict=True):
        assert one.score == pytest.approx(expected.score, abs=1e-5)
    in_front = custom_preset(PRESET, prompt="<|image|>Good? ASSISTANT:")
    for task_scorer in (Scorer, PrefixScorer):
        assert task_scorer(scorer.model, scorer.processor, in_front)(names[0])[0].score > 0


@pytest.mark.parametrize("kind", [Scorer, PrefixScorer])
def test_the_host_waits_as_often_for_a_batch_as_for_one_image(scorer, images, kind):
    own = kind(scorer.model, scorer.processor, PRESET)
    names = ["images/a.png", "images/b.jpg", "images/z.webp"]
    batches = [own.prepare(names[:count]) for count in (1, 3)]
    own._read(batches[0])  # reads what images share
    one, three = (host_syncs(lambda batch=batch: own._read(batch)) for batch in batches)
    for found in (one, three):
        assert found.pop("cpu") == 1  # the logits
        assert found.pop("tolist", 0) == (kind is PrefixScorer)  # what the batch has in common
    assert one == three


def test_a_model_in_half_precision_scores_as_the_scorer_does(scorer):
    half = Scorer(owl2_hf.load_default(dtype=torch.bfloat16)[0], scorer.processor, PRESET)
    assert with_prefix(half) is half


def test_a_terminal_shows_rate_and_time_left(model, many, tmp_path):
    pty = pytest.importorskip("pty", reason="no terminals on this system")
    import fcntl
    import struct
    import termios

    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    rest = arguments(model, many, "--out", tmp_path / "out.csv", *OPTIONS)
    command = [sys.executable, "-m", "owl2_hf", *rest]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=side)
    os.close(side)
    shown = b""
    while True:
        try:
            shown += (piece := os.read(main, 4096))
        except OSError:  # the other end is closed
            break
        if not piece:
            break
    os.close(main)
    assert process.wait() == 0 and process.stdout.read() == b""
    process.stdout.close()
    assert b"120/120" in shown and b"images/s" in shown


@pytest.fixture
def page(place, tmp_path, monkeypatch):  # noqa: F811
    """The folder that the page on data sets speaks of."""
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    import pyarrow

    monkeypatch.chdir(tmp_path)
    Path("path").symlink_to(place / "path")
    for folder in ("photos", "shards"):
        Path(folder).mkdir()
    for index, name in enumerate("ab"):
        noise(index).save(f"photos/{name}.jpg")
    Path("list.csv").write_text("image\nphotos/a.jpg\n")
    pack("shards/0.tar", "w", ["photos/a.jpg", "photos/b.jpg"])
    parquet.write_table(pyarrow.table({"image": ["a.jpg", "b.jpg"]}), "list.parquet")
    return DOCS / "score-datasets.md"


def test_the_page_on_data_sets_runs(page, capsys):
    commands = re.findall(r"^\$ owl2-hf (.*)", page.read_text(encoding="utf-8"), re.M)
    assert len(commands) == 2
    for command in commands:
        result = CliRunner().invoke(app, shlex.split(command))
        assert result.exit_code == 0, result.output
    header = re.findall(r"^image,.*error$", page.read_text(encoding="utf-8"), re.M)
    assert Path("scores.csv").read_text().splitlines()[:1] == header
    (code,) = [block for block in examples(page) if "ray" not in block]
    capsys.readouterr()
    exec(compile(code, "score-datasets.md", "exec"), {})
    assert capsys.readouterr().out == "2 0\n"
