"""Old names work, say what to use, and go when they are due."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.version import Version

import owl2_hf
from owl2_hf.deprecation import warn_deprecated

SOURCES = Path(owl2_hf.__file__).parent
MOVED = {
    "owl2_hf.comparison": "owl2_hf.scoring.comparison",
    "owl2_hf.videos": "owl2_hf.scoring.frames",
}


def old_name():
    warn_deprecated("old_name()", since="0.2.0", removed_in="0.4.0", instead="new_name()")


def test_the_warning_says_since_when_until_when_and_what_to_use():
    expected = (
        r"^old_name\(\) is deprecated since owl2_hf 0\.2\.0 and will be removed in 0\.4\.0: "
        r"use new_name\(\)\.$"
    )
    with pytest.warns(FutureWarning, match=expected):
        old_name()


def test_the_warning_points_at_the_code_that_uses_the_old_name():
    with pytest.warns(FutureWarning) as caught:
        line = sys._getframe().f_lineno + 1
        old_name()
    assert (caught[0].filename, caught[0].lineno) == (__file__, line)


@pytest.mark.parametrize(("old", "new"), MOVED.items())
def test_a_module_that_moved_warns_and_gives_the_same_objects(old, new):
    sys.modules.pop(old, None)
    with pytest.warns(FutureWarning, match=f"^{old} is deprecated .* use {new}[.]$") as caught:
        module = importlib.import_module(old)
    assert Path(caught[0].filename).name == "__init__.py"  # of importlib, which asked for it
    for name in module.__all__:
        assert getattr(module, name) is getattr(importlib.import_module(new), name)


def test_a_user_who_imports_an_old_module_sees_the_warning_once_at_the_import(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os\nfrom owl2_hf.videos import read_frames\nfrom owl2_hf.videos import is_video_path\n"
    )
    result = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert result.returncode == 0
    assert result.stderr.count("FutureWarning") == 1
    assert f"{script}:2: FutureWarning: owl2_hf.videos is deprecated" in result.stderr


def deprecations():
    """File and arguments of every call of the helper in the package."""
    for file in SOURCES.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "warn_deprecated":
                given = {keyword.arg: ast.literal_eval(keyword.value) for keyword in node.keywords}
                yield file.name, ast.literal_eval(node.args[0]), given


def test_every_deprecation_lasts_two_minor_versions_and_is_not_overdue():
    found = list(deprecations())
    assert {name for _, name, _ in found} >= set(MOVED)
    for file, name, given in found:
        since, removed = Version(given["since"]), Version(given["removed_in"])
        is_long_enough = removed.major > since.major or removed.minor >= since.minor + 2
        assert is_long_enough, f"{file}: {name} goes too early"
        assert Version(owl2_hf.__version__) < removed, f"{file}: {name} is due: remove it"
