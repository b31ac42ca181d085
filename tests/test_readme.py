"""What the README shows runs as it stands."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from owl2_hf.cli import app

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_python_example_prints_what_the_command_prints(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})
    (shown,) = re.findall(r"\$ make demo.*?\n(.*?)\n", README)
    assert capsys.readouterr().out.strip() == shown.strip()


def test_the_commands_are_targets_of_the_makefile():
    makefile = (Path(__file__).parents[1] / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"\$ make (\w+)", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_the_readme_shows_the_scores_that_the_bundled_scorer_gives():
    shown = re.findall(r"\n([\d.]+) of 1 to 5, std ([\d.]+)  \S*?([\w-]+\.png)", README)
    found = CliRunner().invoke(app, ["score"])
    assert found.exit_code == 0, found.output
    lines = re.findall(r"([\d.]+) of 1 to 5, std ([\d.]+)  \S*?([\w-]+\.png)\n", found.stdout)
    assert [line[2] for line in shown] == [line[2] for line in lines] and len(shown) == 2
    for own, expected in zip(shown, lines, strict=True):
        assert [float(value) for value in own[:2]] == pytest.approx(
            [float(value) for value in expected[:2]], abs=2e-4
        )
