"""Rows of every format, and what is wrong with bad ones."""

import copy
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader
from typer.testing import CliRunner

from owl2_hf.cli import app
from owl2_hf.default import load_default
from owl2_hf.training.data import check_rows, load_rows, look_over
from owl2_hf.training.messages import pictures_of, to_messages

from ..test_videos import make_video

RED, BLUE = Image.new("RGB", (5, 3), "red"), Image.new("RGB", (3, 5), "blue")


def llava(*values, **row):
    turns = [
        {"from": "gpt" if index % 2 else "human", "value": value}
        for index, value in enumerate(values)
    ]
    return {"conversations": turns, **row}


def chat(*contents, **row):
    turns = [
        {"role": "assistant" if i % 2 else "user", "content": content}
        for i, content in enumerate(contents)
    ]
    return {"messages": turns, **row}


def text(value):
    return {"type": "text", "text": value}


def image(value):
    return {"type": "image", "image": value}


def questions(row, **kwargs):
    return [
        message["content"] for message in to_messages(row, **kwargs) if message["role"] == "user"
    ]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "clip").mkdir()
    for name, picture in (
        ("a.png", RED),
        ("b.png", BLUE),
        ("clip/1.png", RED),
        ("clip/2.png", BLUE),
    ):
        picture.save(tmp_path / name)
    (tmp_path / "broken.png").write_bytes(b"no image")
    return tmp_path


# LLaVA rows


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


# `messages` rows


def test_markers_in_strings_stand_for_the_pictures_of_the_row():
    row = chat("<image>a <|image|>", "b", images=[RED, BLUE])
    assert questions(row) == [[image(RED), text("a "), image(BLUE)]]


def test_text_stays_text_where_it_is_no_place_of_a_picture():
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
def test_the_row_stays_as_it_is(row, folder):
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
    (llava("a", "\ud800"), "turn 2: .* not Unicode at character 0"),
    (llava("a"), "expected an answer of the assistant as the last turn, got 'user'"),
    (llava("a", "b", "c"), "expected an answer of the assistant as the last turn, got 'user'"),
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
        "the turns have 0 <.image.> for 1 images: give each image one marker",
    ),
    (
        llava("<image> a", "b", "<image> c", "d", image=RED),
        "the turns have 2 <.image.> for 1 images",
    ),
    (llava("<image> a", "b"), "the turns have 1 <.image.> for 0 images"),
    (llava("<image> a", "b", image="no.png"), "there is no image 'no.png'"),
    (llava("<image> a", "b", image=""), "expected an image as path, .* got ''"),
    (llava("<image> a", "b", image=3), "expected an image as path, .* got int"),
    (
        llava("<image> a", "b", image="../a.png", image_folder="/x"),
        "'../a.png' leads out of the image folder '/x'",
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
    (llava("a", "b", video=[RED]), "the turns have 0 <video> for 1 videos"),
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
            ValueError, match=r"leads out of the image folder.*set allow_outside"
        ) as caught:
            to_messages(row)
        assert repr(name) in str(caught.value)
    for row in load_rows(file, allow_outside=True):
        assert Path(questions(row)[0][0]["image"]).samefile(folder.parent / "elsewhere.png")
    absolute = llava("<image> a", "b", image=str(folder / "a.png"))
    assert questions(absolute, image_folder=folder)[0][0]["image"] == str(folder / "a.png")


@pytest.mark.parametrize("name", ["../a.png", "x/../../a.png", "/etc/passwd"])
@pytest.mark.parametrize("start", [".", "", "sub", "../here/sub"])
def test_relative_folders_are_not_left_either(tmp_path, monkeypatch, start, name):
    (tmp_path / "here" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ValueError, match="leads out of the image folder"):
        to_messages(llava("<image> a", "b", image=name), start)


def test_pictures_of_the_internet_are_fetched_only_when_told(folder):
    row = chat([{"type": "image", "url": "https://example.org/c.png?token=secret"}], "b")
    file = folder / "rows.json"
    file.write_text(json.dumps([row]))
    with pytest.raises(
        ValueError, match=r"'https://example.org/c.png' is not fetched: set allow_outside"
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
    assert refused.exit_code == 1 and refused.output.count("leads out of the image folder") == 3
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
    assert "leads out of the image folder" in CliRunner().invoke(app, train).output
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
def test_nothing_but_a_value_error_comes_of_a_bad_row(row):
    try:
        messages = to_messages(row)
    except ValueError:
        return
    assert messages[-1]["role"] == "assistant"


# Sources


ROWS = [llava(f"q{index}", "a", id=str(index)) for index in range(5)]


def write(path, rows):
    lines = path.suffix == ".jsonl"
    path.write_text("\n\n".join(map(json.dumps, rows)) if lines else json.dumps(rows, indent=1))
    return path


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
@pytest.mark.parametrize("streaming", [False, True])
def test_files_are_read_without_the_package_datasets(tmp_path, monkeypatch, name, streaming):
    monkeypatch.setitem(sys.modules, "datasets", None)
    rows = load_rows(write(tmp_path / name, ROWS), streaming=streaming)
    assert [row["id"] for row in rows] == list("01234")
    assert hasattr(rows, "__len__") is not streaming
    if not streaming:
        assert [len(rows), rows[3]["id"], rows[-1]["id"]] == [5, "3", "4"]


@pytest.mark.parametrize("streaming", [False, True])
def test_workers_share_the_rows_out(tmp_path, streaming):
    rows = load_rows(write(tmp_path / "rows.jsonl", ROWS), streaming=streaming)
    loader = DataLoader(
        rows, batch_size=2, num_workers=2, collate_fn=lambda rows: [row["id"] for row in rows]
    )
    assert sorted(identity for batch in loader for identity in batch) == list("01234")


def test_lines_are_found_by_their_place_alone(tmp_path):
    path = write(
        tmp_path / "rows.jsonl",
        [{"id": str(index), "text": "ü" * (index % 7)} for index in range(2000)],
    )
    rows = load_rows(path)
    assert (rows.rows._places.dtype, rows.rows._places.shape) == (np.int64, (2000, 2))
    assert [rows[index]["id"] for index in (0, 7, 1999)] == ["0", "7", "1999"]


@pytest.mark.parametrize("streaming", [False, True])
def test_datasets_are_taken_as_folders_and_as_they_are(tmp_path, streaming):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"messages": [{"role": datasets.Value("string"), "content": datasets.Value("string")}],
         "images": datasets.Sequence(datasets.Image())}
    )  # fmt: skip
    built = datasets.Dataset.from_list(
        [chat("<image> a", "b", images=[RED]), chat("c", "d", images=[])], features
    )
    built.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": built}).save_to_disk(tmp_path / "splits")
    for source in (built, tmp_path / "one", tmp_path / "splits", built.to_iterable_dataset()):
        rows = list(load_rows(source, streaming=streaming))
        content = to_messages(rows[0])[0]["content"]
        assert [content[0]["image"].getpixel((0, 0)), content[1:]] == [(255, 0, 0), [text(" a")]]
        assert check_rows(source, streaming=streaming).text_only == 1
    with pytest.raises(ValueError, match="has no split 'test', only 'train'"):
        load_rows(tmp_path / "splits", split="test")
    with pytest.raises(ValueError, match="got splits train: choose one"):
        load_rows(datasets.DatasetDict({"train": built}))


def test_paths_of_a_streamed_data_set_start_from_the_image_folder(folder):
    datasets = pytest.importorskip("datasets")
    stream = datasets.Dataset.from_list(
        [llava("<image>", "b", image="a.png")]
    ).to_iterable_dataset()
    [row] = load_rows(stream, folder)
    assert questions(row) == [[image(str(folder / "a.png"))]]


def test_without_the_package_datasets_it_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        ValueError, match=r"me/data needs the package datasets: pip install 'owl2_hf\[train\]'"
    ):
        load_rows("me/data")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.json", "5", "expected a JSON list of rows, or one JSON object a line"),
        ("rows.json", "[5", "is not valid JSON"),
        ("rows.json", "[]", "holds no rows"),
        ("rows.jsonl", "", "holds no rows"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_rows(tmp_path / name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no.json"], "there is no file or folder 'no.json'"),
        ([5], "expected a path, the id of a data set or rows, got int"),
        ([ROWS, "/no/folder"], "there is no image folder '/no/folder'"),
    ],
)
def test_a_source_that_does_not_exist_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_rows(*arguments)


def test_a_broken_line_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": 1}\n\n{"id": \n')
    for rows in (load_rows(path), load_rows(path, streaming=True)):
        with pytest.raises(ValueError, match=r"rows.jsonl, line 3: not valid JSON at column 7"):
            list(rows)


# The report


@pytest.fixture
def mixed(folder):
    rows = [
        llava("<image> a", "b", id="good", image="a.png"),
        llava("<image> a", "b", id="gone", image="no.png"),
        llava("<image> a", "b", id="broken", image="broken.png"),
        llava("a", "b", "c", "d"),
        llava("<image> <image>", "", id=7, image=["a.png", "b.png"]),
    ]
    return write(folder / "rows.json", rows)


def test_every_bad_row_is_named_and_the_others_counted(mixed):
    report = check_rows(mixed)
    assert [(bad.row, bad.id) for bad in report.bad] == [(2, "gone"), (3, "broken"), (5, "7")]
    for bad, reason in zip(
        report.bad, ["there is no image", "not an image", "answer 1 is empty"], strict=True
    ):
        assert reason in bad.reason
    counts = (report.rows, report.text_only, report.images, report.turns, report.answers)
    assert counts == (5, 1, 1, 6, 3)
    assert [bad.id for bad in check_rows(mixed, open_images=False).bad] == ["gone", "7"]


def test_broken_lines_do_not_stop_the_check(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('\n{"id": \n' + json.dumps(ROWS[0]) + "\n\n[1]\n")
    for streaming in (False, True):
        report = check_rows(path, streaming=streaming)
        assert [(bad.row, bad.reason.split()[0]) for bad in report.bad] == [
            (2, "not"),
            (5, "expected"),
        ]
        assert report.rows == 3


def run(*arguments):
    return CliRunner().invoke(app, ["data", "check", *map(str, arguments)])


def test_the_command_names_bad_rows_and_fails(mixed):
    result = run(mixed)
    assert result.exit_code == 1
    assert "row 2 (id 'gone'): there is no image" in result.stdout
    assert "5 rows, 3 bad, 1 text only; 1 images, 6 turns, 3 answers" in result.stdout
    assert [bad["id"] for bad in json.loads(run(mixed, "--json").stdout)["bad"]] == [
        "gone",
        "broken",
        "7",
    ]
    assert "2 bad" in run(mixed, "--skip-pictures").stdout


def test_the_command_counts_tokens_with_a_model(folder, golden_dir):
    path = write(
        folder / "rows.json",
        [llava("<image> What?", "A dog.", image="a.png"), llava("Hi", "Hello")],
    )
    model = golden_dir("A") / "hf"
    result = run(path, "--model", model, "--max-length", "8", "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["truncated"] == report["without_labels"] == 2
    assert report["tokens_longest"] > report["tokens_mean"] > 8
    assert "tokens of a row: longest" in run(path, "--model", model).stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-length", "5"], "--max-length counts tokens, which needs --model"),
        (["--skip-pictures", "--model", "x"], "--model looks into images"),
        (["--image-folder", "/no/folder"], "there is no image folder"),
    ],
)
def test_the_command_refuses_what_makes_no_sense(mixed, arguments, message):
    result = run(mixed, *arguments)
    assert result.exit_code == 1
    assert message in result.stderr


# Documentation


DOCS = Path(__file__).parents[2] / "docs" / "data.md"
EXAMPLES = re.findall(r"```json\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)


def test_the_rows_of_the_documentation_are_good(tmp_path):
    (tmp_path / "frames").mkdir()
    for name in ("cat.png", "dog.png", "frames/0.png", "frames/1.png"):
        RED.save(tmp_path / name)
    report = check_rows(write(tmp_path / "rows.json", list(map(json.loads, EXAMPLES))))
    assert (report.rows, report.bad, report.images) == (6, [], 9)


def test_a_video_file_is_one_frame_a_second(tmp_path):
    make_video(tmp_path / "clip.mp4", 25, 10)
    frames = pictures_of(
        to_messages(llava("<video> What happens?", "It moves.", video="clip.mp4"), tmp_path)
    )
    assert [frame.size for frame in frames] == [(32, 32)] * 2
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match=r"broken\.mp4' is neither an image nor a video"):
        to_messages(llava("<video> What happens?", "It moves.", video="broken.mp4"), tmp_path)


# What is seen before a run


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_look_over_all_rows_names_the_bad_ones(tmp_path, num_workers):
    RED.save(tmp_path / "good.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    rows = [llava("<image> a", "b", id=f"r{number}", image="good.png") for number in range(600)]
    rows[35]["image"], rows[598]["image"] = "broken.png", "gone.png"
    rows[7]["conversations"] = []
    loaded = load_rows(write(tmp_path / "rows.jsonl", rows))  # with an empty line behind each
    found = look_over(loaded, num_workers)
    assert [(bad.row, bad.id) for bad in found] == [(15, "r7"), (71, "r35"), (1197, "r598")]
    assert "is not an image in one of the formats" in found[1].reason
    assert [bad.row for rank in (0, 1) for bad in look_over(loaded, num_workers, rank, 2)] == [
        1197,
        15,
        71,
    ]


def test_a_look_neither_decodes_nor_fetches(tmp_path, monkeypatch):
    RED.save(tmp_path / "good.png")
    images = ["good.png", (tmp_path / "good.png").read_bytes(), RED, "https://example.org/a.png"]
    rows = [llava("<image> a", "b", image=image) for image in images]
    monkeypatch.setattr("owl2_hf.training.data.open_image", None)
    assert look_over(load_rows(rows, tmp_path, allow_outside=True)) == []


@pytest.mark.parametrize("streaming", [False, True])
def test_lines_that_cannot_be_read_stay_as_bad_rows(tmp_path, streaming):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(llava("a", "b", id="1")) + "\n\n{broken\n")
    first, second = load_rows(path, streaming=streaming, skip_bad=True)
    assert to_messages(first)[0]["role"] == "user"
    with pytest.raises(ValueError, match="not valid JSON at column 2"):
        to_messages(second)
