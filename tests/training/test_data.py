"""Rows from every source, and the check of all of them."""

import json
import re
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from owl2_hf.cli import app
from owl2_hf.training.data import check_rows, load_rows
from owl2_hf.training.messages import to_messages

from .conftest import RED, ROWS, chat, image, llava, questions, text, write


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
    ("arguments", "message"),
    [
        (["no.json"], "'no.json' does not exist"),
        ([5], "expected a path, the id of a data set or rows, got int"),
        ([ROWS, "/no/folder"], "the image folder '/no/folder' does not exist"),
    ],
)
def test_a_source_that_does_not_exist_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_rows(*arguments)


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
        report.bad, ["does not exist", "not an image", "answer 1 is empty"], strict=True
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
    assert "row 2 (id 'gone'): the image" in result.stdout
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
    assert "tokens per row: longest" in run(path, "--model", model).stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-length", "5"], "--max-length needs --model"),
        (["--skip-pictures", "--model", "x"], "--model opens the images"),
        (["--image-folder", "/no/folder"], "the image folder"),
    ],
)
def test_the_command_refuses_what_makes_no_sense(mixed, arguments, message):
    result = run(mixed, *arguments)
    assert result.exit_code == 1
    assert message in result.stderr


DOCS = Path(__file__).parents[2] / "docs" / "data.md"
EXAMPLES = re.findall(r"```json\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)


def test_the_rows_of_the_documentation_are_good(tmp_path):
    (tmp_path / "frames").mkdir()
    for name in ("cat.png", "dog.png", "frames/0.png", "frames/1.png"):
        RED.save(tmp_path / name)
    report = check_rows(write(tmp_path / "rows.json", list(map(json.loads, EXAMPLES))))
    assert (report.rows, report.bad, report.images) == (6, [], 9)
