"""Opinions from every kind of file, and what is said about bad ones."""

import json

import pytest
from PIL import Image
from typer.testing import CliRunner

from owl2_hf.cli import app
from owl2_hf.scoring.opinions import check_opinions, is_opinions, load_opinions

ROWS = [
    {"image": "a.png", "mos": 1.5, "std": 0.5, "split": "train", "dataset": "one"},
    {"image": "b.png", "mos": 4.5, "std": 0.0, "split": "test", "dataset": "one"},
    {"image": "c.png", "mos": 70.0, "std": None, "split": None, "dataset": "two"},
]


@pytest.fixture
def folder(tmp_path):
    for index, name in enumerate("abc"):
        Image.new("RGB", (6, 5), (40 * index, 0, 0)).save(tmp_path / f"{name}.png")
    return tmp_path


NAMES = ("image", "mos", "std", "split", "dataset", "reference")


def write_csv(path, rows, names=NAMES):
    lines = [
        ",".join(names),
        *(",".join("" if row.get(n) is None else str(row[n]) for n in names) for row in rows),
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write(folder, kind):
    if kind == "csv":
        return write_csv(folder / "rows.csv", ROWS)
    if kind == "json":
        (folder / "rows.json").write_text(json.dumps(ROWS))
    elif kind == "jsonl":
        (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    elif kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
        parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
        parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "rows.parquet")
    else:
        datasets = pytest.importorskip("datasets", reason="datasets is not installed")
        datasets.Dataset.from_list(ROWS).save_to_disk(str(folder / "rows.saved"))
    return folder / f"rows.{kind}"


@pytest.mark.parametrize("kind", ["csv", "json", "jsonl", "parquet", "saved"])
def test_every_kind_of_file_gives_the_same_opinions(folder, kind):
    source = write(folder, kind)
    assert is_opinions(source)
    opinions = load_opinions(source, image_folder=folder)
    assert [(row.mos, row.std, row.split, row.dataset) for row in opinions] == [
        (1.5, 0.5, "train", "one"),
        (4.5, 0.0, "test", "one"),
        (70.0, None, None, "two"),
    ]
    assert [row.image for row in opinions] == [str(folder / f"{name}.png") for name in "abc"]
    assert opinions.ranges == {"one": (1.5, 4.5), "two": (70.0, 70.0)}
    assert [row.row for row in opinions] == ([2, 3, 4] if kind == "csv" else [1, 2, 3])


def test_a_part_keeps_the_range_of_the_whole(folder):
    opinions = load_opinions(write(folder, "csv"), split="train")
    assert len(opinions) == 1 and opinions.ranges["one"] == (1.5, 4.5)
    with pytest.raises(
        ValueError, match=r"rows\.csv: no row has split 'val'; the file has 'test', 'train'"
    ):
        load_opinions(folder / "rows.csv", split="val")


def test_parts_of_a_saved_data_set_are_splits_and_images_may_lie_in_it(folder):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    features = datasets.Features({"image": datasets.Image(), "mos": datasets.Value("float32")})
    parts = {
        name: datasets.Dataset.from_list(
            [{"image": str(folder / f"{image}.png"), "mos": mos}], features=features
        )
        for name, image, mos in (("train", "a", 1.0), ("test", "b", 2.0))
    }
    datasets.DatasetDict(parts).save_to_disk(str(folder / "saved"))
    opinions = load_opinions(folder / "saved")
    assert [(row.split, row.mos) for row in opinions] == [("train", 1.0), ("test", 2.0)]
    assert opinions.rows[1].image.getpixel((0, 0)) == (40, 0, 0)


def test_files_of_q_align_and_deqa_score_are_read_as_they_are(folder):
    row = {
        "id": "a.png->1.96",
        "image": "a.png",
        "conversations": [
            {"from": "human", "value": "How would you rate the quality of this image?\n<|image|>"},
            {"from": "gpt", "value": "The quality of the image is fair."},
        ],
        "gt_score": "1.960618923",
    }
    soft = {
        **row,
        "image": "b.png",
        "gt_score": 3.5,
        "std": 0.7,
        "level_probs": [0.1, 0.4, 0.4, 0.1, 0.0],
    }
    (folder / "train.json").write_text(json.dumps([row, soft]))
    assert is_opinions(folder / "train.json")
    first, second = load_opinions(folder / "train.json")
    assert (first.mos, first.std, first.level_probs) == (1.960618923, None, None)
    assert first.answer == "The quality of the image is fair."
    assert (second.mos, second.std, second.level_probs) == (3.5, 0.7, (0.1, 0.4, 0.4, 0.1, 0.0))


def test_deqa_scores_two_files_are_one_source(folder):
    (folder / "images").mkdir()
    for name in "abc":
        (folder / f"{name}.png").rename(folder / "images" / f"{name}.png")
    moses = {
        "images/a.png": {"mos": 1.0, "std": 0.5},
        "images/b.png": {"mos": "2", "std": "0.25"},
        "images/c.png": {"mos": 9},
    }
    (folder / "mos.json").write_text(json.dumps(moses, indent=1))
    everything = load_opinions(folder / "mos.json")
    assert len(everything) == 3 and everything.rows[0].split is None
    (folder / "split.json").write_text(json.dumps({"train": ["a.png"], "test": ["b.png"]}))
    for source in (folder, folder / "mos.json"):
        assert is_opinions(source)
        opinions = load_opinions(source)
        assert [(row.mos, row.std, row.split) for row in opinions] == [
            (1.0, 0.5, "train"),
            (2.0, 0.25, "test"),
        ]
    (folder / "split.json").write_text(json.dumps({"train": ["a.png"], "test": ["a.png"]}))
    with pytest.raises(ValueError, match=r"'a\.png' is in 'train' and in 'test'"):
        load_opinions(folder)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": "a.png"}, "row 2: expected a value of 'mos', got keys: image"),
        ({"mos": 2}, "row 2: expected a value of 'image', got keys: mos"),
        ({"image": "a.png", "mos": "good"}, "row 2: expected a number as 'mos', got 'good'"),
        ({"image": "a.png", "mos": "nan"}, "row 2: expected a number as 'mos', got 'nan'"),
        ({"image": "a.png", "mos": True}, "row 2: expected a number as 'mos', got True"),
        ({"image": "a.png", "mos": 2, "std": -1}, "row 2: expected a 'std' of at least 0, got -1"),
        ({"image": "lost.png", "mos": 2}, "row 2: the image"),
        ({"image": "../a.png", "mos": 2}, "row 2: '../a.png' is outside the image folder"),
        (
            {"image": "a.png", "mos": 2, "level_probs": [0.5, 0.9]},
            "row 2: expected 'level_probs' of at least 0",
        ),
        (["a.png", 2], "row 2: expected an object with 'image' and 'mos', got list"),
    ],
)
def test_a_bad_row_is_named_with_its_file(folder, row, message):
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, [ROWS[0], row])))
    with pytest.raises(ValueError) as error:
        load_opinions(folder / "rows.jsonl")
    assert str(error.value).startswith(f"{folder / 'rows.jsonl'}: {message}") and "\n" not in str(
        error.value
    )
    report = check_opinions(folder / "rows.jsonl")
    assert [f"row {bad.row}: {bad.reason}".startswith(message) for bad in report.bad] == [True]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"image;mos\na.png;1\n", r"expected the columns image and mos, got image;mos"),
        (b"image,mos\na.png,1,2\n", r"row 2: expected 2 values, got 3"),
        (b"image,mos,std\na.png,1\n", r"row 2: expected 3 values, got 2"),
        (b"image,mos\n\xff\xfe,1\n", "is not UTF-8"),
        (b'image,mos\n"a.png,1\n', "is not a CSV file"),
        (b"image,mos\n", "has no rows"),
        (b"", "expected the columns image and mos, got none"),
    ],
)
def test_a_broken_csv_is_refused(folder, content, message):
    (folder / "rows.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load_opinions(folder / "rows.csv")
    assert str(folder / "rows.csv") in str(error.value)


def test_other_broken_sources_are_refused(folder):
    (folder / "rows.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match=r"rows\.parquet is not a Parquet file"):
        load_opinions(folder / "rows.parquet")
    (folder / "mos.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"mos\.json: expected an object, got list"):
        load_opinions(folder)
    with pytest.raises(ValueError, match=r"'lost\.csv' does not exist"):
        load_opinions("lost.csv")
    with pytest.raises(ValueError, match=r"the image folder .* does not exist"):
        load_opinions(folder / "rows.parquet", folder / "nowhere")
    assert not is_opinions(folder / "a.png") and not is_opinions("some/data")


def check(*arguments):
    return CliRunner().invoke(app, ["data", "check", *map(str, arguments)])


def test_the_command_counts_and_names_what_is_bad(folder):
    (folder / "copy.png").write_bytes((folder / "a.png").read_bytes())
    (folder / "broken.png").write_bytes(b"no image")
    names = ["a.png", "b.png", "copy.png", "b.png", "broken.png", "c.png"]
    parts = ["train", "train", "test", "train", "test", "test"]
    rows = [
        {"image": name, "mos": index, "std": 0 if index else None, "split": part}
        for index, (name, part) in enumerate(zip(names, parts, strict=True))
    ]
    result = check(write_csv(folder / "rows.csv", rows))
    assert result.exit_code == 1, result.output
    lines = result.stdout.splitlines()
    assert (
        lines[0].startswith("row 4: its image")
        and "is in 'test' here and in 'train' in row 2" in lines[0]
    )
    assert lines[1].startswith("row 6: ") and "broken.png" in lines[1]
    assert lines[2].startswith("row 5: its image") and lines[2].endswith("is also in row 3.")
    assert lines[3] == "6 rows of opinions, 2 bad, 1 duplicates"
    assert (
        lines[4]
        == "opinions: 4 rows (3 train, 1 test), MOS 0 to 5, mean 2.25; std is missing in 1 and 0 in 3"
    )
    found = json.loads(check(folder / "rows.csv", "--json").stdout)
    assert (
        found["datasets"][""]["splits"] == {"train": 3, "test": 1} and len(found["duplicates"]) == 1
    )
    by_path = check(folder / "rows.csv", "--skip-pictures")
    assert "0 bad, 1 duplicates" in by_path.stdout and by_path.exit_code == 0


def test_the_command_refuses_opinions_without_any_difference(folder):
    result = check(
        write_csv(folder / "rows.csv", [{"image": "a.png", "mos": 3}, {"image": "b.png", "mos": 3}])
    )
    assert result.exit_code == 1 and "every MOS is the same" in result.stdout


def test_conversations_beside_opinions_are_looked_at_too(folder):
    row = {"image": "a.png", "mos": 3, "conversations": [{"from": "human", "value": "<image>"}]}
    (folder / "rows.json").write_text(json.dumps([row, {**row, "conversations": None, "mos": 2}]))
    result = check(folder / "rows.json")
    assert result.exit_code == 1 and result.stdout.startswith(
        "row 1: expected an answer of the assistant"
    )


def test_tokens_of_opinions_are_not_counted(folder):
    result = check(write_csv(folder / "rows.csv", ROWS), "--opinions", "--model", "default")
    assert result.exit_code == 1 and "leave out --opinions or --model" in result.stderr


def test_a_reference_image_in_two_splits_is_bad(folder):
    rows = [
        {"image": "a.png", "mos": 1, "split": "train", "reference": "I01.png"},
        {"image": "b.png", "mos": 2, "split": "test", "reference": "I01.png"},
        {"image": "c.png", "mos": 3, "split": "test", "reference": "I02.png"},
    ]
    assert load_opinions(write_csv(folder / "rows.csv", rows)).rows[2].reference == "I02.png"
    result = check(folder / "rows.csv")
    assert result.exit_code == 1 and result.stdout.splitlines()[:2] == [
        "row 3: its reference 'I01.png' is in 'test' here and in 'train' in row 2: keep it in "
        "one split.",
        "3 rows of opinions, 1 bad, 0 duplicates",
    ]
    apart = [{**row, "dataset": row["split"]} for row in rows]
    assert check(write_csv(folder / "apart.csv", apart)).exit_code == 0


def test_q_aligns_rows_without_a_mos_have_it_in_their_id(folder):
    turns = [
        {"from": "human", "value": "Rate the quality of this image.\n<|image|>"},
        {"from": "gpt", "value": "The quality of the image is fair."},
    ]
    rows = [
        {"id": f"koniq->x/{name}->{mos}", "image": name, "conversations": turns}
        for name, mos in (("a.png", "45.75"), ("b.png", "-3"))
    ]
    (folder / "train.json").write_text(json.dumps(rows))
    found = load_opinions(folder / "train.json")
    assert [row.mos for row in found] == [45.75, -3.0]
    assert is_opinions(folder / "train.json") and check(folder / "train.json").exit_code == 0
    rows[1]["id"] = "b.png"
    (folder / "train.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match="row 2: expected a value of 'mos'"):
        load_opinions(folder / "train.json")


def test_q_aligns_files_to_test_on_call_an_image_img_path(folder):
    (folder / "agi.json").write_text(json.dumps([{"img_path": "a.png", "gt_score": "0.9656"}]))
    (row,) = load_opinions(folder / "agi.json")
    assert row.mos == 0.9656 and row.image == str(folder / "a.png")
