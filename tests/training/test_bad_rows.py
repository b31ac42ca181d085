"""A look over all rows before a run."""

import pytest

from owl2_hf.training.data import load_rows, look_over

from .conftest import RED, llava, write


@pytest.mark.parametrize("num_workers", [0, 2])
def test_look_over_finds_all_bad_rows(tmp_path, num_workers):
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


def test_look_over_neither_decodes_nor_downloads_images(tmp_path, monkeypatch):
    RED.save(tmp_path / "good.png")
    images = ["good.png", (tmp_path / "good.png").read_bytes(), RED, "https://example.org/a.png"]
    rows = [llava("<image> a", "b", image=image) for image in images]
    monkeypatch.setattr("owl2_hf.training.bad_rows.open_image", None)
    assert look_over(load_rows(rows, tmp_path, allow_outside=True)) == []
