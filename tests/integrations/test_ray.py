"""Scores on Ray Data, on one node."""

import os
import re
import signal
from pathlib import Path

import pytest
import torch

pytest.importorskip("ray.data", reason="ray is not installed: pip install 'owl2_hf[ray]'")
import ray
from pyarrow import parquet, table

import owl2_hf
from owl2_hf.integrations import ray as integration
from owl2_hf.scoring import Scorer, custom_preset

from ..scoring.test_dataset import PRESET, assert_scores, noise, page, place  # noqa: F401
from ..test_docs import examples

LEVELS = ["high", "soft", "bad"]


@pytest.fixture(scope="module", autouse=True)
def cluster():
    # Reading and writing need processors beside those of the actors.
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A folder with images, some of which cannot be read, and Parquet files that list them."""
    folder = tmp_path_factory.mktemp("ray")
    names = [f"{index:02}.jpg" for index in range(40)]
    for index, name in enumerate(names):
        noise(index).save(folder / name)
    (folder / "07.jpg").write_bytes(b"broken")
    (folder / "09.jpg").unlink()
    (folder / "lists").mkdir()
    for part in range(2):
        own = names[20 * part : 20 * part + 20]
        columns = {"image": own, "id": [int(name[:2]) for name in own], "std": [0.5] * 20}
        parquet.write_table(table(columns), folder / "lists" / f"{part}.parquet")
    return folder


class KilledOnce(integration.Actor):
    """An actor that is killed in its third batch, unless another was before it."""

    calls = 0

    def __call__(self, table):
        self.calls += 1
        mark = Path(os.environ["OWL2_HF_TEST_MARK"])
        if self.calls == 3 and not mark.exists():
            mark.write_text("killed")
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(table)


@pytest.mark.parametrize("is_killed", [False, True])
def test_every_row_is_scored_once_even_when_an_actor_is_killed(
    rows, tmp_path, monkeypatch, is_killed
):
    mark = tmp_path / "mark"
    options = {}
    if is_killed:
        monkeypatch.setattr(integration, "Actor", KilledOnce)
        options["runtime_env"] = {"env_vars": {"OWL2_HF_TEST_MARK": str(mark)}}
    found = integration.add_scores(
        ray.data.read_parquet(str(rows / "lists")),
        "default",
        levels=LEVELS,
        batch_size=4,
        dtype="float32",
        image_folder=str(rows),
        num_actors=2 - is_killed,
        **options,
    )
    found.write_parquet(str(tmp_path / "scores"))
    assert mark.exists() == is_killed
    scored = sorted(parquet.read_table(tmp_path / "scores").to_pylist(), key=lambda row: row["id"])
    assert [row["id"] for row in scored] == list(range(40))
    assert list(scored[0]) == ["image", "id", "input_std", "score", "std", *LEVELS, "error"]
    bad = {row["id"]: row for row in scored if row["error"]}
    assert list(bad) == [7, 9] and bad[7]["score"] is None
    assert "is not an image" in bad[7]["error"] and "does not exist" in bad[9]["error"]
    good = [row for row in scored if not row["error"]]
    scorer = Scorer(*owl2_hf.load_default(dtype=torch.float32), PRESET)
    assert_scores(good, scorer, [str(rows / row["image"]) for row in good])


def test_settings_reach_the_actors(rows):
    found = integration.add_scores(
        ray.data.from_items([{"photo": (rows / "00.jpg").read_bytes()}]),
        "default",
        levels=["yes", "no"],
        prompt="USER: <|image|>Is it red? ASSISTANT:",
        scale=(0.0, 1.0),
        dtype="float32",
        column="photo",
        crops=True,
    ).take_all()
    preset = custom_preset(
        "one-align", prompt="USER: <|image|>Is it red? ASSISTANT:", levels=["yes", "no"]
    )
    scorer = Scorer(*owl2_hf.load_default(dtype=torch.float32), preset, (0.0, 1.0), crops=True)
    (row,) = found
    assert row["score"] == pytest.approx(scorer(str(rows / "00.jpg"))[0].score, abs=1e-5)


def test_the_example_of_the_page_runs(page):  # noqa: F811
    (code,) = [block for block in examples(page) if "import ray" in block]
    # Ray's processes may have been started anywhere.
    code = re.sub(r'"(path/|photos|list|scores)', rf'"{Path.cwd()}/\1', code)
    exec(compile(code, "score-datasets.md", "exec"), {})
    scores = parquet.read_table("scores")
    assert scores.num_rows == 2 and scores["error"].null_count == 2
