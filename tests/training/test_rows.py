"""Rows of files, by index and as a stream."""

import json
import sys

import numpy as np
import pytest
from torch.utils.data import DataLoader

from owl2_hf.training.data import load_rows
from owl2_hf.training.messages import to_messages

from .conftest import ROWS, llava, write


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


def test_json_lines_keep_only_the_positions_of_their_rows(tmp_path):
    path = write(
        tmp_path / "rows.jsonl",
        [{"id": str(index), "text": "ü" * (index % 7)} for index in range(2000)],
    )
    rows = load_rows(path)
    assert (rows.rows._places.dtype, rows.rows._places.shape) == (np.int64, (2000, 2))
    assert [rows[index]["id"] for index in (0, 7, 1999)] == ["0", "7", "1999"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.json", "5", "expected a JSON list of rows, or one JSON object per line"),
        ("rows.json", "[5", "is not valid JSON"),
        ("rows.json", "[]", "has no rows"),
        ("rows.jsonl", "", "has no rows"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_rows(tmp_path / name)


def test_a_broken_line_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": 1}\n\n{"id": \n')
    for rows in (load_rows(path), load_rows(path, streaming=True)):
        with pytest.raises(ValueError, match=r"rows.jsonl, line 3: not valid JSON at column 7"):
            list(rows)


@pytest.mark.parametrize("streaming", [False, True])
def test_lines_that_cannot_be_read_stay_as_bad_rows(tmp_path, streaming):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(llava("a", "b", id="1")) + "\n\n{broken\n")
    first, second = load_rows(path, streaming=streaming, skip_bad=True)
    assert to_messages(first)[0]["role"] == "user"
    with pytest.raises(ValueError, match="not valid JSON at column 2"):
        to_messages(second)
