"""The cache of prepared images: the same pixels, whatever happens to its files."""

import json
import os
import signal
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import owl2_hf
from owl2_hf.processing import MplugOwl2ImageProcessor
from owl2_hf.training import image_cache
from owl2_hf.training.collator import Collator
from owl2_hf.training.image_cache import ImageCache
from owl2_hf.training.recipe import load_recipe
from owl2_hf.training.run import train

SIDE = 28
RECORD = 32 + 4 + 3 * SIDE * SIDE


@pytest.fixture
def images(tmp_path):
    """Noise in three shapes; EXIF turns the second, and the third has a palette."""
    generator = np.random.default_rng(0)
    paths = []
    for number, size in enumerate([(50, 33), (31, 70), (28, 28)]):
        pixels = generator.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        image, exif = Image.fromarray(pixels), Image.Exif()
        if number == 1:
            exif[0x0112] = 6
        if number == 2:
            image = image.convert("P")
        paths.append(str(tmp_path / f"{number}.png"))
        image.save(paths[-1], exif=exif)
    return paths


def processor(**kwargs):
    return MplugOwl2ImageProcessor(size={"height": SIDE, "width": SIDE}, **kwargs)


def pixels(one, images):
    return one(images, return_tensors="pt")["pixel_values"]


def files(cache):
    return sorted(cache.folder.glob("*.squares"))


@pytest.fixture
def prepared(monkeypatch):
    """Names of the images that were decoded."""
    names = []
    fetch = MplugOwl2ImageProcessor.fetch_images

    def watched(self, images):
        names.append(Path(images).name if isinstance(images, str) else type(images).__name__)
        return fetch(self, images)

    monkeypatch.setattr(MplugOwl2ImageProcessor, "fetch_images", watched)
    return names


@pytest.mark.parametrize("ratio", ["resize", "pad", "crop"])
@pytest.mark.parametrize("original_reading", [False, True])
def test_pixels_are_the_same_to_the_bit(tmp_path, images, prepared, ratio, original_reading):
    one = processor(image_aspect_ratio=ratio, original_reading=original_reading)
    expected = pixels(one, images)
    for _ in range(2):  # written, then read
        cache = ImageCache(tmp_path / "cache", one)
        prepared.clear()
        assert torch.equal(pixels(one, cache.fetch_images(images)), expected)
    assert prepared == []
    assert [file.stat().st_size for file in files(cache)] == [3 * RECORD]


def test_nesting_stays_and_what_cannot_be_kept_is_opened(tmp_path, images, prepared):
    cache = ImageCache(tmp_path / "cache", processor())
    content = Path(images[0]).read_bytes()
    opened = Image.new("RGB", (5, 9), "red")
    for _ in range(2):
        prepared.clear()
        found = cache.fetch_images([[images[0], opened], content])
        assert found[0][1] is opened
        assert found[0][0].size == found[1].size == (SIDE, SIDE)
    assert prepared == ["Image"] and files(cache)[0].stat().st_size == 2 * RECORD
    with pytest.raises(ValueError, match=r"nothing\.png"):
        cache.fetch_images(str(tmp_path / "nothing.png"))


def test_another_file_or_setting_is_prepared_again(tmp_path, images):
    one = processor()
    ImageCache(tmp_path / "cache", one).fetch_images(images)
    Image.new("RGB", (50, 33), "red").save(images[0])
    red = ImageCache(tmp_path / "cache", one).fetch_images(images[0])
    assert red.getpixel((3, 3)) == (255, 0, 0)
    padded = processor(image_aspect_ratio="pad")
    other = ImageCache(tmp_path / "cache", padded)
    assert torch.equal(pixels(padded, other.fetch_images(images)), pixels(padded, images))
    assert other.folder != ImageCache(tmp_path / "cache", one).folder


def damage(path, place, content=b"\xff\x00\xff"):
    with path.open("r+b") as file:
        file.seek(place)
        file.write(content)


def test_damaged_records_are_noticed_and_made_anew(tmp_path, images, prepared, caplog):
    one = processor()
    ImageCache(tmp_path / "cache", one).fetch_images(images)
    cache = ImageCache(tmp_path / "cache", one)
    (file,) = files(cache)
    damage(file, RECORD + 36 + 100)  # in the pixels of the second
    damage(file, 2 * RECORD + 1)  # in the key of the third
    prepared.clear()
    assert torch.equal(pixels(one, cache.fetch_images(images)), pixels(one, images))
    assert prepared == ["1.png", "2.png"]
    assert "record 2 is damaged" in caplog.text
    prepared.clear()
    ImageCache(tmp_path / "cache", one).fetch_images(images)
    assert prepared == []


def test_a_file_cut_short_keeps_its_whole_records(tmp_path, images, prepared):
    one = processor()
    ImageCache(tmp_path / "cache", one).fetch_images(images)
    cache = ImageCache(tmp_path / "cache", one)
    os.truncate(files(cache)[0], 3 * RECORD - 7)
    prepared.clear()
    assert torch.equal(pixels(one, cache.fetch_images(images)), pixels(one, images))
    assert prepared == ["2.png"]


def test_a_full_disk_does_not_end_the_run(tmp_path, images, caplog):
    one = processor()
    cache = ImageCache(tmp_path / "cache", one)

    class Full:
        def write(self, data):
            return len(data) // 2

    cache._writer = (os.getpid(), Full())
    assert torch.equal(pixels(one, cache.fetch_images(images)), pixels(one, images))
    assert caplog.text.count("(no space left on the disk)") == 1


def test_folders_that_are_no_cache_are_refused(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(ValueError, match=r"mine contains other files and no image-cache.json"):
        ImageCache(tmp_path / "mine", processor())
    with pytest.raises(ValueError, match="is a file: expected a folder"):
        ImageCache(tmp_path / "mine" / "thesis.txt", processor())
    ImageCache(tmp_path / "cache", processor())
    (tmp_path / "cache" / "image-cache.json").write_text('{"version": 2}')
    with pytest.raises(ValueError, match="is damaged or of another version: remove the folder"):
        ImageCache(tmp_path / "cache", processor())
    with pytest.raises(ValueError, match="makes crops, or does not resize"):
        ImageCache(tmp_path / "other", processor(image_aspect_ratio="anchors"))


def test_processes_write_files_of_their_own_and_read_all(tmp_path, images, prepared):
    model_processor = owl2_hf.load_default()[1]
    rows = [
        {
            "conversations": [
                {"from": "human", "value": "<image>What?"},
                {"from": "gpt", "value": "It."},
            ],
            "image": path,
        }
        for path in images * 4
    ]
    plain = Collator(model_processor)
    expected = [plain([row])["pixel_values"] for row in rows]
    for context, epochs, workers in (("fork", 2, 2), ("spawn", 1, 1)):
        collator = Collator(model_processor, image_cache=tmp_path / context)
        for _ in range(epochs):
            loader = DataLoader(
                rows, collate_fn=collator, num_workers=workers, multiprocessing_context=context
            )
            found = [batch["pixel_values"] for batch in loader]
            assert all(map(torch.equal, found, expected))
        assert 1 <= len(files(collator._cache)) <= 2
        prepared.clear()
        assert torch.equal(collator(rows[:1])["pixel_values"], expected[0])
        assert prepared == []


WRITES = """
import sys
from pathlib import Path
from PIL import Image
from owl2_hf.processing import MplugOwl2ImageProcessor
from owl2_hf.training.image_cache import ImageCache
cache = ImageCache(sys.argv[1], MplugOwl2ImageProcessor(size={"height": 28, "width": 28}))
for number in range(100_000):
    path = Path(sys.argv[2]) / f"{number % 100}-{number // 100}.png"
    Image.new("RGB", (9, 9), (number % 256, number // 256 % 256, 77)).save(path)
    cache.fetch_images(str(path))
    print(path, flush=True)
"""


def test_a_process_that_is_killed_leaves_what_it_wrote(tmp_path, prepared):
    (tmp_path / "images").mkdir()
    command = [sys.executable, "-c", WRITES, str(tmp_path / "cache"), str(tmp_path / "images")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        names = [process.stdout.readline().strip() for _ in range(20)]
        time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
    one = processor()
    cache = ImageCache(tmp_path / "cache", one)
    prepared.clear()
    assert torch.equal(pixels(one, cache.fetch_images(names)), pixels(one, names))
    assert prepared == []


def _make(folder):
    ImageCache(folder, processor())


def test_ranks_that_make_the_cache_at_once_agree(tmp_path):
    context = get_context("fork")
    ranks = [context.Process(target=_make, args=(tmp_path / "cache",)) for _ in range(8)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0] * 8
    (own,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    assert json.loads((own / image_cache.SETTINGS).read_text())["size"]["height"] == SIDE


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("opinions")
    generator = np.random.default_rng(1)
    lines, rows = ["image,mos,std"], []
    for index in range(8):
        noise = generator.integers(0, 256, (40, 30 + index, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{index}.png")
        lines.append(f"{index}.png,{1 + index / 2},0.5")
        turns = [
            {"from": "human", "value": "<image>What is it?"},
            {"from": "gpt", "value": "Noise."},
        ]
        rows.append({"image": f"{index}.png", "conversations": turns})
    (folder / "opinions.csv").write_text("\n".join(lines))
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder


@pytest.mark.parametrize("kind", ["hard", "soft", "rows"])
def test_a_run_has_the_same_losses_to_the_bit(folder, tmp_path, kind):
    settings = ["trainer.max_steps=4", "trainer.logging_steps=1", "trainer.use_cpu=true"]
    settings += ["model=default", "trainer.per_device_train_batch_size=4", "trainer.bf16=false"]
    settings += ["trainer.save_strategy=no", "trainer.learning_rate=1e-3"]
    settings += ["trainer.dataloader_num_workers=2"] if kind == "soft" else []
    if kind == "rows":
        settings += [f"data.train={folder / 'rows.json'}", "image_size=null"]
        name = "instruct"
    else:
        settings += [f"data.train={folder / 'opinions.csv'}", "scores.levels=[high, soft, bad]"]
        name = {"hard": "score", "soft": "score-soft"}[kind]
    histories = []
    for run, cache in (("without", "null"), ("first", "cache"), ("second", "cache")):
        place = "null" if cache == "null" else str(tmp_path / cache)
        own = [f"output_dir={tmp_path / run}", f"data.image_cache={place}"]
        train(load_recipe(name, [*settings, *own]))
        log = json.loads((tmp_path / run / "trainer_state.json").read_text())["log_history"]
        histories.append([(row["loss"], row["grad_norm"]) for row in log if "loss" in row])
    assert len(histories[0]) == 4
    assert histories[0] == histories[1] == histories[2]
    (made,) = (tmp_path / "cache").glob("*/")
    assert sum(file.stat().st_size for file in made.glob("*.squares")) > 0


def test_a_dry_run_writes_no_cache(folder, tmp_path):
    settings = ["model=default", f"data.train={folder / 'rows.json'}", "image_size=null"]
    settings += [f"output_dir={tmp_path / 'run'}", f"data.image_cache={tmp_path / 'cache'}"]
    train(load_recipe("instruct", [*settings, "trainer.bf16=false"]), dry_run=True)
    assert not (tmp_path / "cache").exists()
