"""Videos as files: which frames count, what they score, and what is wrong with them."""

import json
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import owl2_hf
from owl2_hf.cli import app
from owl2_hf.scoring import Preset, Scorer, score_each, score_paths
from owl2_hf.scoring.frames import is_video_path, read_frames

PROMPT = "USER: <|image|>Is it red? ASSISTANT:"
YES_NO = Preset({"quality": PROMPT, "video": PROMPT}, ("yes", "no"), (1.0, 0.0), scale=(0.0, 1.0))


def shade(index):
    return 7 * index % 256


def make_video(path, num_frames, rate, codec="mpeg4"):
    """Grey frames whose brightness tells their place."""
    av = pytest.importorskip("av", reason="PyAV is not installed")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for index in range(num_frames):
            picture = Image.new("RGB", (32, 32), (shade(index),) * 3)
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize(
    ("name", "num_frames", "rate", "expected"),
    [
        ("three seconds.mp4", 34, 10, [0, 10, 20]),
        ("thirds.mp4", 20, "20/3", [0, 6, 13]),  # 6.67 frames a second
        ("shorter.avi", 4, 10, [0]),
        ("untold length.mkv", 25, 10, [0, 10]),
    ],
)
def test_one_frame_a_second_is_taken(tmp_path, name, num_frames, rate, expected):
    frames = read_frames(make_video(tmp_path / name, num_frames, Fraction(rate)))
    assert [frame.size for frame in frames] == [(32, 32)] * len(expected)
    brightness = [np.asarray(frame).mean() for frame in frames]
    assert brightness == pytest.approx([shade(index) for index in expected], abs=3)


def test_every_frame_of_an_animation_is_taken(tmp_path):
    frames = [Image.new("RGB", (4, 4), (value, 0, 0)) for value in (0, 90, 200)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert [frame.getpixel((0, 0))[0] for frame in read_frames(tmp_path / "a.gif")] == [0, 90, 200]
    frames[1].save(tmp_path / "b.png")
    assert [frame.getpixel((0, 0))[0] for frame in read_frames(str(tmp_path / "b.png"))] == [90]


@pytest.fixture(scope="module")
def default():
    return owl2_hf.load_default(dtype=torch.float32)


def test_a_video_scores_as_the_list_of_its_frames(default, tmp_path):
    scorer = Scorer(*default, YES_NO)
    paths = [make_video(tmp_path / "a.mp4", 30, 10), make_video(tmp_path / "b.mp4", 12, 10)]
    expected = [scorer(read_frames(path), task="video")[0] for path in paths]
    assert expected[0].logits != expected[1].logits
    together = scorer([str(path) for path in paths], task="video")
    for found in (
        together,
        [scorer(path, task="video")[0] for path in paths],
        score_each(scorer, paths, "video"),
    ):
        for one, other in zip(found, expected, strict=True):
            assert one.logits == pytest.approx(other.logits, abs=2e-5)


def test_a_task_of_images_scores_each_frame_of_a_video(default, tmp_path):
    scorer = Scorer(*default, YES_NO, batch_size=2)
    clip = str(make_video(tmp_path / "a.mp4", 30, 10))
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    Image.new("RGB", (32, 32), (200, 0, 0)).save(tmp_path / "red.png")
    found = list(score_paths(scorer, [clip, str(broken), str(tmp_path / "red.png")]))
    names = [f"{clip}#t=0", f"{clip}#t=1", f"{clip}#t=2", str(broken), str(tmp_path / "red.png")]
    assert [name for name, _ in found] == names
    for (_, one), other in zip(found, scorer(read_frames(clip)), strict=False):
        assert one.logits == pytest.approx(other.logits, abs=2e-5)
    assert isinstance(found[3][1], ValueError) and not isinstance(found[4][1], ValueError)


@pytest.fixture(scope="module")
def folder(default, tmp_path_factory):
    target = tmp_path_factory.mktemp("videos") / "model"
    for part in default:
        part.save_pretrained(target)
    return target


def run(folder, *arguments):
    own = [
        "--task",
        "video",
        "--model",
        str(folder),
        "--levels",
        "yes,no",
        "--prompt",
        PROMPT,
        "--json",
    ]
    return CliRunner().invoke(app, ["score", *map(str, arguments), *own])


def test_the_command_names_a_broken_video_and_scores_the_rest(folder, default, tmp_path):
    videos = tmp_path / "videos"
    videos.mkdir()
    make_video(videos / "a.mp4", 30, 10)
    (videos / "b.mp4").write_bytes((videos / "a.mp4").read_bytes()[:200])
    make_video(videos / "c.mkv", 12, 10)
    result = run(folder, videos)
    assert result.exit_code == 1
    errors = [line for line in result.stderr.splitlines() if line.startswith("owl2-hf: ")]
    assert (
        len(errors) == 1 and "b.mp4" in errors[0] and "not a readable image or video" in errors[0]
    )
    found = {line["image"]: line["score"] for line in map(json.loads, result.stdout.splitlines())}
    assert list(found) == [str(videos / "a.mp4"), str(videos / "c.mkv")]
    preset = Preset({"video": PROMPT}, ("yes", "no"), (1.0, 0.0))
    for path, score in found.items():
        assert score == pytest.approx(
            Scorer(*default, preset)(path, task="video")[0].score, abs=1e-4
        )
    assert run(folder, videos / "a.mp4").exit_code == 0


def test_files_that_are_not_videos_are_named(tmp_path, monkeypatch):
    pytest.importorskip("av", reason="PyAV is not installed")
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "empty.mp4").write_bytes(b"")
    for name in ("text.mp4", "empty.mp4"):
        with pytest.raises(ValueError, match=f"{name}' is not a readable image or video"):
            read_frames(tmp_path / name)
    with pytest.raises(ValueError, match="the file does not exist"):
        read_frames(tmp_path / "missing.mp4")
    Image.new("RGB", (40, 40)).save(
        tmp_path / "a.gif", save_all=True, append_images=[Image.effect_noise((40, 40), 50)]
    )
    content = (tmp_path / "a.gif").read_bytes()
    (tmp_path / "half.gif").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"half\.gif'.* is damaged"):
        read_frames(tmp_path / "half.gif")
    monkeypatch.setattr("transformers.utils.is_av_available", lambda: False)
    with pytest.raises(ValueError, match=r"install PyAV: pip install 'owl2_hf\[video\]'"):
        read_frames(tmp_path / "text.mp4")


def test_videos_are_told_by_their_suffix():
    assert is_video_path("a/b.MP4") and not is_video_path("a/b.png") and not is_video_path(b"a.mp4")
