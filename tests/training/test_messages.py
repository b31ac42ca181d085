"""Rows as messages, and what is wrong with bad ones."""

import copy
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from owl2_hf.cli import app
from owl2_hf.default import load_default
from owl2_hf.training.data import check_rows, load_rows
from owl2_hf.training.messages import pictures_of, to_messages

from ..test_videos import make_video
from .conftest import BLUE, RED, chat, image, llava, questions, text


@pytest.mark.parametrize("marker", ["<|image|>", "<image>"])
@pytest.mark.parametrize(
    ("value", "rest"),
    [
        ("{}\nWhat?", ["\nWhat?"]),
        ("What?\n{}", ["\nWhat?"]),
        ("a {} b", ["\na  b"]),
        ("{} and {} differ?", ["\nand  differ?"]),
        (" {} ", []),
    ],
)
def test_one_picture_comes_first_as_in_the_original(marker, value, rest):
    row = llava(value.replace("{}", marker), "yes", image=RED)
    assert questions(row) == [[image(RED), *map(text, rest)]]


def test_several_pictures_stay_at_their_markers():
    row = llava("<image> or <image>?", "a", "and <|image|>", "b", image=[RED, BLUE, RED])
    assert questions(row) == [
        [image(RED), text(" or "), image(BLUE), text("?")],
        [text("and "), image(RED)],
    ]


def test_a_row_without_pictures_is_text():
    row = llava("Hi <video> there", "Hello", image=None)
    assert to_messages(row) == [
        {"role": "user", "content": [text("Hi <video> there")]},
        {"role": "assistant", "content": [text("Hello")]},
    ]


def test_an_answer_in_front_is_dropped_as_in_the_original():
    row = llava("q", "a")
    row["conversations"].insert(0, {"from": "gpt", "value": "Welcome."})
    assert to_messages(row) == to_messages(llava("q", "a"))


def test_a_system_turn_is_kept():
    row = llava("q", "a")
    row["conversations"].insert(0, {"from": "system", "value": "Be kind."})
    assert to_messages(row)[0] == {"role": "system", "content": [text("Be kind.")]}


def test_markers_in_strings_stand_for_the_pictures_of_the_row():
    row = chat("<image>a <|image|>", "b", images=[RED, BLUE])
    assert questions(row) == [[image(RED), text("a "), image(BLUE)]]


def test_markers_without_an_image_stay_text():
    assert questions(chat("<|image|> a", "b")) == [[text("<|image|> a")]]
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "<image>", "image": None}]
    assert questions(chat(parts, "b", images=[RED])) == [[image(RED), text("<image>")]]


def test_pictures_may_stand_in_their_parts(folder):
    parts = [image("a.png"), {"type": "image", "path": str(folder / "b.png")}, text("a")]
    parts += [{"type": "image_url", "image_url": {"url": "https://example.org/c.png"}}]
    path = str(folder / "a.png")
    expected = [
        image(path),
        image(str(folder / "b.png")),
        text("a"),
        image("https://example.org/c.png"),
    ]
    assert questions(chat(parts, "b"), image_folder=folder, allow_outside=True) == [expected]


def test_undecoded_pictures_of_datasets_are_taken(folder):
    row = chat(
        "<image><image>",
        "b",
        images=[{"bytes": b"x", "path": "y"}, {"bytes": None, "path": "a.png"}],
    )
    assert questions(row, image_folder=folder) == [[image(b"x"), image(str(folder / "a.png"))]]


@pytest.mark.parametrize("marker", ["<video>", "<image>", "<|image|>"])
@pytest.mark.parametrize("video", ["clip", ["clip/1.png", "clip/2.png"]])
def test_a_video_is_a_folder_or_a_list_of_frames(folder, video, marker):
    [content] = questions(llava(f"What? {marker}", "a", video=video), image_folder=folder)
    frames = [str(folder / "clip" / name) for name in ("1.png", "2.png")]
    assert [content[0]["type"], [str(frame) for frame in content[0]["video"]]] == ["video", frames]
    assert content[1:] == [text("\nWhat?")]
    parts = [{"type": "video", "video": video}, text("What?")]
    assert [
        str(frame) for frame in questions(chat(parts, "a"), image_folder=folder)[0][0]["video"]
    ] == frames


def test_pictures_and_videos_of_one_row_go_to_their_own_markers(folder):
    row = chat("<video> <image>", "a", images=[RED], videos=["clip"])
    assert [part["type"] for part in questions(row, image_folder=folder)[0]] == [
        "video",
        "text",
        "image",
    ]


@pytest.mark.parametrize(
    "row", [llava("<image> a", "b", image=["x"]), chat([{"type": "image"}], "b", images=["x"])]
)
def test_to_messages_does_not_change_the_row(row, folder):
    (folder / "x").write_bytes(b"")
    before = copy.deepcopy(row)
    to_messages(row, folder)
    assert row == before


BAD = [
    ([], "expected an object, got list"),
    ({"text": "a"}, "expected 'conversations' .LLaVA. or 'messages', got keys: text"),
    ({"text": "a", "image_folder": None, "allow_outside": True}, "got keys: text.$"),
    ({"conversations": []}, "'conversations' has no turns"),
    ({"messages": "hi"}, "expected a list of turns in 'messages', got str"),
    ({"messages": ["hi"]}, "turn 1: expected an object, got str"),
    (
        {"conversations": [{"from": "bot", "value": "a"}]},
        "turn 1: expected 'from' to be .* got 'bot'",
    ),
    (
        {"messages": [{"role": "tool", "content": "a"}]},
        "turn 1: expected 'role' to be .* got 'tool'",
    ),
    (llava("a", None), "turn 2: expected a string as 'value', got NoneType"),
    (chat("a", 5), "turn 2: expected a string or a list of parts as 'content', got int"),
    (chat([{"type": "audio"}], "a"), "turn 1: expected parts of type .* got 'audio'"),
    (
        chat([{"type": "text", "text": None}], "a"),
        "turn 1: expected a string as 'text', got NoneType",
    ),
    (llava("a", "\ud800"), "turn 2: .* not valid Unicode at character 0"),
    (llava("a"), "expected an answer of the assistant in the last turn, got 'user'"),
    (llava("a", "b", "c"), "expected an answer of the assistant in the last turn, got 'user'"),
    (
        {"messages": [{"role": "assistant", "content": "a"}]},
        "expected 'system' or 'user' as the first turn, got 'ass",
    ),
    ({"conversations": [{"from": "gpt", "value": "a"}]}, "expected an answer .* got 'nothing'"),
    (
        {"messages": 2 * [{"role": "user", "content": "a"}]},
        "roles must alternate: expected 'assistant' after 'user'",
    ),
    (llava("a", "b", "c", " \n"), "answer 2 is empty"),
    (
        llava("a", "b", image=RED),
        "expected one <.image.>, or one part of type 'image', for each of 1 images, got 0",
    ),
    (
        llava("<image> a", "b", "<image> c", "d", image=RED),
        "for each of 1 images, got 2",
    ),
    (llava("<image> a", "b"), "for each of 0 images, got 1"),
    (llava("<image> a", "b", image="no.png"), "the image 'no.png' does not exist"),
    (llava("<image> a", "b", image=""), "expected an image as path, .* got ''"),
    (llava("<image> a", "b", image=3), "expected an image as path, .* got int"),
    (
        llava("<image> a", "b", image="../a.png", image_folder="/x"),
        "'../a.png' is outside the image folder '/x'",
    ),
    (
        llava("<video> a", "b", video=[]),
        "expected a folder of frames or a list of at least one .* got an empty list",
    ),
    (
        llava("<video> a", "b", video=3),
        "expected a folder of frames or a list of at least one .* got int",
    ),
    (
        llava("<video> a", "b", video="no.mp4"),
        "video 'no.mp4': expected a file, a folder of frames",
    ),
    (llava("a", "b", video=[RED]), "for each of 1 videos, got 0"),
]


def outside(folder):
    """Rows whose image is not from the folder, by what each of them names."""
    elsewhere = folder.parent / "elsewhere.png"
    Image.new("RGB", (4, 4)).save(elsewhere)
    names = [
        f"../{elsewhere.name}",
        str(elsewhere),
        elsewhere.as_posix().replace("/else", "/./else"),
    ]
    return {
        name: llava("<image> a", "b", image=name, image_folder="/", allow_outside=True)
        for name in names
    }


def test_pictures_come_from_the_folder_unless_told_otherwise(folder):
    rows = outside(folder)
    file = folder / "rows.json"
    file.write_text(json.dumps(list(rows.values())))
    for name, row in zip(rows, load_rows(file), strict=True):
        with pytest.raises(
            ValueError, match=r"is outside the image folder.*set allow_outside"
        ) as caught:
            to_messages(row)
        assert repr(name) in str(caught.value)
    for row in load_rows(file, allow_outside=True):
        assert Path(questions(row)[0][0]["image"]).samefile(folder.parent / "elsewhere.png")
    absolute = llava("<image> a", "b", image=str(folder / "a.png"))
    assert questions(absolute, image_folder=folder)[0][0]["image"] == str(folder / "a.png")


@pytest.mark.parametrize("name", ["../a.png", "x/../../a.png", "/etc/passwd"])
@pytest.mark.parametrize("start", [".", "", "sub", "../here/sub"])
def test_images_outside_a_relative_folder_are_refused(tmp_path, monkeypatch, start, name):
    (tmp_path / "here" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ValueError, match="is outside the image folder"):
        to_messages(llava("<image> a", "b", image=name), start)


def test_pictures_of_the_internet_are_fetched_only_when_told(folder):
    row = chat([{"type": "image", "url": "https://example.org/c.png?token=secret"}], "b")
    file = folder / "rows.json"
    file.write_text(json.dumps([row]))
    with pytest.raises(
        ValueError, match=r"'https://example.org/c.png' is not downloaded: set allow_outside"
    ) as caught:
        to_messages(load_rows(file)[0])
    assert "secret" not in str(caught.value)
    [row] = load_rows(file, allow_outside=True)
    assert questions(row)[0][0]["image"] == "https://example.org/c.png?token=secret"
    assert questions(chat([{"type": "image", "url": "https://example.org/c.png"}], "b"))


def test_a_recipe_and_both_commands_can_allow_it(folder, tmp_path):
    (folder / "rows.json").write_text(json.dumps(list(outside(folder).values())))
    command = ["data", "check", str(folder / "rows.json")]
    refused = CliRunner().invoke(app, command)
    assert refused.exit_code == 1 and refused.output.count("is outside the image folder") == 3
    assert (
        CliRunner().invoke(app, [*command, "--allow-outside", "--model", "default"]).exit_code == 0
    )
    train = [
        "train",
        "visual-branch",
        "--model",
        "default",
        "--data",
        str(folder / "rows.json"),
        "--dry-run",
    ]
    train += ["--out", str(tmp_path / "run")]
    assert "is outside the image folder" in CliRunner().invoke(app, train).output
    assert CliRunner().invoke(app, [*train, "--allow-outside"]).exit_code == 0


def test_relative_folders_are_joined_once_where_tokens_are_counted(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    Path("rows.json").write_text(json.dumps([llava("<image> a", "b", image="a.png")]))
    _, processor = load_default()
    report = check_rows("rows.json", folder.name, processor)
    assert not report.bad


@pytest.mark.parametrize(("row", "message"), BAD)
def test_a_bad_row_says_why(row, message):
    with pytest.raises(ValueError, match=message):
        to_messages(row)


JSON = st.recursive(
    st.none()
    | st.integers()
    | st.sampled_from(["", "<image>", "user", "human", "gpt", "assistant", "text", "image", "a"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "conversations",
                    "messages",
                    "from",
                    "value",
                    "role",
                    "content",
                    "type",
                    "text",
                    "image",
                    "url",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
)


@given(
    JSON
    | st.fixed_dictionaries(
        {"messages": st.lists(st.fixed_dictionaries({"role": JSON, "content": JSON}))}
    )
)
def test_a_bad_row_raises_only_value_errors(row):
    try:
        messages = to_messages(row)
    except ValueError:
        return
    assert messages[-1]["role"] == "assistant"


def test_a_video_file_is_one_frame_a_second(tmp_path):
    make_video(tmp_path / "clip.mp4", 25, 10)
    frames = pictures_of(
        to_messages(llava("<video> What happens?", "It moves.", video="clip.mp4"), tmp_path)
    )
    assert [frame.size for frame in frames] == [(32, 32)] * 2
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match=r"broken\.mp4' is not a readable image or video"):
        to_messages(llava("<video> What happens?", "It moves.", video="broken.mp4"), tmp_path)
