"""Published data sets, each from a made-up folder of its layout."""

import math
import zipfile
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import owl2_hf
from owl2_hf.cli import app
from owl2_hf.scoring import load_opinions
from owl2_hf.scoring.benchmarks import BENCHMARKS, read_benchmark

SHEET = 'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'


def images(folder, *names):
    for index, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6), (50 * index, 0, 0)).save(folder / name)


def workbook(path, rows, first_row=1, first_column="A"):
    """A workbook as Excel writes it: texts in a table of their own, numbers in their cells."""
    texts = sorted({value for row in rows for value in row if isinstance(value, str)})
    lines = []
    for number, row in enumerate(rows, first_row):
        cells = []
        for index, value in enumerate(row):
            place = f"{chr(ord(first_column) + index)}{number}"
            if isinstance(value, str):
                cells.append(f'<c r="{place}" t="s"><v>{texts.index(value)}</v></c>')
            else:
                cells.append(f'<c r="{place}"><v>{value}</v></c>')
        lines.append(f'<row r="{number}">{"".join(cells)}</row>')
    items = "".join(f"<si><t>{escape(text)}</t></si>" for text in texts)
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("xl/sharedStrings.xml", f"<sst {SHEET}>{items}</sst>")
        archive.writestr("xl/worksheets/sheet1.xml", f"<worksheet {SHEET}><sheetData/></worksheet>")
        content = "".join(lines)
        archive.writestr(
            "xl/worksheets/sheet2.xml",
            f"<worksheet {SHEET}><sheetData>{content}</sheetData></worksheet>",
        )


def koniq(root):
    images(root, "1024x768/1.jpg", "1024x768/2.jpg")
    (root / "koniq10k_distributions_sets.csv").write_text(
        "image_name,c1,c2,c3,c4,c5,c_total,MOS,SD,set\n1.jpg,0,0,50,50,0,100,62.5,0.5,training\n2.jpg,1,0,0,0,1,2,50,2,test\n"
    )
    return [("1024x768/1.jpg", 3.5, 0.5, "train"), ("1024x768/2.jpg", 3.0, 2.0, "test")]


def spaq(root):
    images(root, "TestImage/00001.jpg", "TestImage/00002.jpg")
    rows = [["Image name", "MOS", "Brightness"], ["00001.jpg", 28.6, 33], ["00002.jpg", 70, 51]]
    workbook(root / "Annotations" / "MOS and Image attribute scores.xlsx", rows)
    return [("TestImage/00001.jpg", 28.6, None, None), ("TestImage/00002.jpg", 70.0, None, None)]


def kadid(root):
    images(root, "images/I01_01_01.png", "images/I01_01_02.png")
    (root / "dmos.csv").write_text(
        "dist_img,ref_img,dmos,var\nI01_01_01.png,I01.png,4.57,0.49\nI01_01_02.png,I01.png,4,1\n"
    )
    return [("images/I01_01_01.png", 4.57, 0.7, None), ("images/I01_01_02.png", 4.0, 1.0, None)]


def livec(root):
    savemat = pytest.importorskip("scipy.io", reason="scipy is not installed").savemat
    images(root, "Images/3.bmp", "Images/4.JPG", "Images/trainingImages/t1.bmp")
    names = np.empty((3, 1), dtype=object)
    names[:, 0] = ["t1.bmp", "3.bmp", "4.JPG"]
    (root / "Data").mkdir()
    savemat(root / "Data" / "AllImages_release.mat", {"AllImages_release": names})
    savemat(
        root / "Data" / "AllMOS_release.mat", {"AllMOS_release": np.array([[50.0, 63.9, 12.5]])}
    )
    savemat(
        root / "Data" / "AllStdDev_release.mat",
        {"AllStdDev_release": np.array([[1.0, 18.5, 20.0]])},
    )
    return [("Images/3.bmp", 63.9, 18.5, None), ("Images/4.JPG", 12.5, 20.0, None)]


def agiqa(root):
    images(root, "a_normal_000.jpg", "b_normal_001.jpg")
    (root / "data.csv").write_text(
        "name,prompt,adj1,adj2,style,mos_quality,std_quality,mos_align,std_align\n"
        'a_normal_000.jpg,"a cat, a dog",,,anime style,1.25,0.3,2.0,0.1\nb_normal_001.jpg,x,,,,3.5,0.2,1.0,0.1\n'
    )
    return [("a_normal_000.jpg", 1.25, 0.3, None), ("b_normal_001.jpg", 3.5, 0.2, None)]


def csiq(root):
    images(root, "dst_imgs/awgn/1600.AWGN.1.png", "dst_imgs/jpeg2000/trolley.jpeg2000.3.png")
    head = ["image", "dst_idx", "dst_type", "dst_lev", "dmos_std", "dmos"]
    rows = [head, [1600, 1, "noise", 1, 0.0586, 0.062], ["trolley", 3, "jpeg 2000", 3, 0.1, 0.75]]
    workbook(root / "csiq.DMOS.xlsx", rows, first_row=4, first_column="D")
    return [
        ("dst_imgs/awgn/1600.AWGN.1.png", 0.938, 0.0586, None),
        ("dst_imgs/jpeg2000/trolley.jpeg2000.3.png", 0.25, 0.1, None),
    ]


def ava(root):
    images(root, "images/953619.jpg", "images/953958.jpg")
    lines = ["1 953619 0 0 0 0 1 1 0 0 0 0 1 22 1396", "2 953958 1 0 0 0 0 0 0 0 0 1 15 21 1396"]
    (root / "AVA.txt").write_text("\n".join([*lines, "3 7 1 1 1 1 1 1 1 1 1 1 0 0 1"]))
    return [("images/953619.jpg", 5.5, 0.5, None), ("images/953958.jpg", 5.5, 4.5, None)]


def lsvq(root):
    for name in ("ia-batch1/a.mp4", "yfcc-batch2/b.mp4", "yfcc-batch2/c.mp4"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"video")
    for part, name, mos in (
        ("train", "ia-batch1/a", 70.5),
        ("test", "yfcc-batch2/b", 30),
        ("test_1080p", "yfcc-batch2/c", 55),
    ):
        (root / f"LSVQ_whole_{part}.csv").write_text(
            f"name,p1,height,width,mos_p1,mos\n{name},0,720,1280,1,{mos}\n"
        )
    return [
        ("ia-batch1/a.mp4", 70.5, None, "train"),
        ("yfcc-batch2/b.mp4", 30.0, None, "test"),
        ("yfcc-batch2/c.mp4", 55.0, None, "test-1080p"),
    ]


LAYOUTS = {make.__name__: make for make in (koniq, spaq, kadid, livec, agiqa, csiq, ava, lsvq)}


def test_every_reader_has_a_layout_here():
    assert LAYOUTS.keys() == BENCHMARKS.keys()


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_published_layout_is_read(name, tmp_path):
    expected = LAYOUTS[name](tmp_path)
    opinions = read_benchmark(name, tmp_path)
    assert [str(Path(row.image).relative_to(tmp_path)) for row in opinions] == [
        row[0] for row in expected
    ]
    assert [row.mos for row in opinions] == pytest.approx([row[1] for row in expected])
    for row, (_, _, std, split) in zip(opinions, expected, strict=True):
        assert row.split == split and row.dataset == name
        assert row.std == (None if std is None else pytest.approx(std))
    assert load_opinions(f"{name}:{tmp_path}").rows == opinions.rows


@pytest.mark.parametrize("name", LAYOUTS)
def test_missing_files_of_a_benchmark_are_named(name, tmp_path):
    (tmp_path / "empty").mkdir()
    LAYOUTS[name](tmp_path)
    with pytest.raises(ValueError, match=rf"^{name}: .* does not exist in .*; expected") as error:
        read_benchmark(name, tmp_path / "empty")
    assert "\n" not in str(error.value)
    for path in tmp_path.rglob("*"):
        if path.suffix in (".jpg", ".png", ".bmp", ".JPG", ".mp4"):
            path.unlink()
    message = "files are missing in" if name in ("ava", "lsvq") else "row .* does not exist"
    with pytest.raises(ValueError, match=rf"^{name}: .*{message}.* expected"):
        read_benchmark(name, tmp_path)


@pytest.mark.parametrize(
    ("name", "file", "old", "new", "message"),
    [
        ("kadid", "dmos.csv", "4.57", "high", "row 2: expected a number as 'dmos', got 'high'"),
        ("kadid", "dmos.csv", "dmos", "score", "row 2: expected a value of 'dmos'"),
        (
            "kadid",
            "dmos.csv",
            "I01_01_01.png",
            "../../secret.png",
            "row 2: .* is outside the image folder",
        ),
        ("kadid", "dmos.csv", "0.49", "-0.49", "row 2: expected a 'var' of at least 0, got -0.49"),
        ("koniq", "koniq10k_distributions_sets.csv", "50,50", "0,0", "row 2: expected counts"),
        (
            "ava",
            "AVA.txt",
            "953958 1",
            "953958 x",
            "row 2: expected an index, an image and ten counts",
        ),
        ("csiq", "csiq.DMOS.xlsx", None, None, "is not a readable Excel workbook"),
        (
            "livec",
            "Data/AllMOS_release.mat",
            None,
            None,
            "is not a MATLAB file with AllMOS_release",
        ),
    ],
)
def test_a_bad_file_is_named_with_its_row(name, file, old, new, message, tmp_path):
    LAYOUTS[name](tmp_path)
    if old is None:
        (tmp_path / file).write_bytes(b"nonsense")
    else:
        (tmp_path / file).write_text((tmp_path / file).read_text().replace(old, new))
    with pytest.raises(ValueError, match=message) as error:
        read_benchmark(name, tmp_path)
    assert name in str(error.value) or file in str(error.value)


def test_a_workbook_without_the_columns_or_too_large_is_refused(tmp_path, monkeypatch):
    spaq(tmp_path)
    file = tmp_path / "Annotations" / "MOS and Image attribute scores.xlsx"
    workbook(file, [["Image", "Score"], ["a", 1]])
    with pytest.raises(
        ValueError, match="expected the columns Image name and MOS in a sheet, got none"
    ):
        read_benchmark("spaq", tmp_path)
    monkeypatch.setattr("owl2_hf.scoring.benchmarks._MAX_BYTES", 10)
    with pytest.raises(ValueError, match="is not a readable Excel workbook"):
        read_benchmark("spaq", tmp_path)


def test_lsvqs_own_table_names_the_parts(tmp_path):
    lsvq(tmp_path)
    for path in tmp_path.glob("LSVQ_*.csv"):
        path.unlink()
    (tmp_path / "labels_train_test.csv").write_text(
        "name,mos,is_test\nia-batch1/a,70,False\nyfcc-batch2/b,30,True\n"
    )
    (tmp_path / "labels_test_1080p.csv").write_text("name,mos\nyfcc-batch2/c,55\n")
    assert [row.split for row in read_benchmark("lsvq", tmp_path)] == [
        "train",
        "test",
        "test-1080p",
    ]


def test_the_command_judges_by_a_benchmark(tmp_path):
    pytest.importorskip("scipy", reason="scipy is not installed")
    names = [f"{index}.jpg" for index in range(5)]
    images(tmp_path, *(f"512x384/{name}" for name in names))
    lines = [f"{name},{index},0,0,0,9" for index, name in enumerate(names)]
    head = "image_name,c1,c2,c3,c4,c5"
    (tmp_path / "koniq10k_scores_and_distributions.csv").write_text("\n".join([head, *lines]))
    assert math.isclose(read_benchmark("koniq", tmp_path).rows[1].mos, 4.6)
    model = [
        "--levels",
        "yes,no",
        "--prompt",
        "USER: <|image|>Is it red? ASSISTANT:",
        "--samples",
        "5",
        "--csv",
    ]
    command = ["evaluate-scores", str(owl2_hf.default.default_dir()), *model]
    result = CliRunner().invoke(app, [*command, "--benchmark", "koniq", "--root", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[1].startswith("koniq,5,")
    unknown = CliRunner().invoke(
        app, [*command, "--benchmark", "koniq-20k", "--root", str(tmp_path)]
    )
    assert unknown.exit_code == 1 and "expected a benchmark of koniq, spaq" in unknown.stderr
    for wrong in (
        [],
        ["--benchmark", "koniq"],
        ["rows.csv", "--benchmark", "koniq", "--root", str(tmp_path)],
    ):
        result = CliRunner().invoke(app, [*command, *wrong])
        assert (
            result.exit_code == 2
            and "pass a file of opinions, or --benchmark with --root" in result.stderr
        )


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_command_checks_a_folder_as_training_takes_it(name, tmp_path):
    expected = LAYOUTS[name](tmp_path)
    result = CliRunner().invoke(app, ["data", "check", f"{name}:{tmp_path}", "--skip-pictures"])
    if name == "ava":  # the opinions of its two images are equal, and a third one is missing
        assert "every MOS is the same" in result.stdout
        assert "1 files are missing and skipped" in result.stdout
    else:
        assert result.exit_code == 0, result.output
        assert result.stdout.startswith(f"{len(expected)} rows of opinions, 0 bad")
    assert len(load_opinions(f"{name}:{tmp_path}")) == len(expected)


def test_the_check_names_every_bad_image_of_a_folder(tmp_path):
    kadid(tmp_path)
    (tmp_path / "images" / "I01_01_01.png").write_bytes(b"broken")
    (tmp_path / "images" / "I01_01_02.png").unlink()
    result = CliRunner().invoke(app, ["data", "check", f"kadid:{tmp_path}"])
    assert result.exit_code == 1
    first, second, counts = result.stdout.splitlines()
    assert first.startswith("row 2: ") and "I01_01_01.png" in first
    assert second.startswith("row 3: the image")
    assert counts == "2 rows of opinions, 2 bad, 0 duplicates"
    missing = CliRunner().invoke(app, ["data", "check", f"spaq:{tmp_path}"])
    assert missing.exit_code == 1 and "Annotations/MOS" in missing.stderr


def test_images_of_one_reference_are_told(tmp_path):
    kadid(tmp_path)
    assert [row.reference for row in read_benchmark("kadid", tmp_path)] == ["I01.png", "I01.png"]
