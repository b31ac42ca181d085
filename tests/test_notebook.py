"""The notebook runs from top to bottom and shows what it says."""

from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
pytest.importorskip("ipykernel", reason="ipykernel is not installed")

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "tour.ipynb"


def texts(notebook):
    """What each cell shows, as text."""
    outputs = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    return [
        "".join(out.data.get("text/plain", "") for out in shown if "data" in out)
        for shown in outputs
    ]


def test_the_notebook_runs_and_answers_as_it_is_saved(tmp_path):
    saved = nbformat.read(NOTEBOOK, as_version=4)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": tmp_path}}
    ).execute()
    _, picture, answer, rows, scores, attention, tuned = texts(notebook)
    assert "Image" in picture and answer == texts(saved)[2] == "['tiger face']"
    assert rows == texts(saved)[3] and "banana" not in rows
    assert "'emoji-tiger-face'" in scores and "0." in attention
    assert "'banana'" in tuned and "'yellow fruit'" in tuned
