"""The tree stays easy to find one's way in: short files, and no circle of imports between them."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"
PACKAGE = SOURCE / "owl2_hf"
MAX_LINES = 400

# Imports that a circle may hold, with the reason.
ALLOWED = {
    # Names for type checkers; at run time they are imported when they are asked for.
    ("owl2_hf", None),
    # A folder of the Hub that names the classifier needs its file beside the model's.
    (
        "owl2_hf.modeling.modeling_mplug_owl2",
        "owl2_hf.modeling.modeling_mplug_owl2_classification",
    ),
    # The two packages register themselves, by a function that imports them when it is called.
    ("owl2_hf.registration", "owl2_hf.modeling"),
    ("owl2_hf.registration", "owl2_hf.processing"),
}


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(SOURCE).with_suffix("").parts)
        yield name.removesuffix(".__init__"), path


def imports(name, path, known):
    """Modules of the package that a file imports, anywhere in it."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom):
            continue
        base = package[: len(package) - node.level + 1] if node.level else []
        source = ".".join([*base, *([node.module] if node.module else [])])
        for alias in node.names:
            found = f"{source}.{alias.name}" if f"{source}.{alias.name}" in known else source
            if found in known and found != name:
                yield found


def test_no_files_import_each_other_in_a_circle():
    known = dict(modules())
    graph = {
        name: {
            found
            for found in imports(name, path, known)
            if (name, None) not in ALLOWED and (name, found) not in ALLOWED
        }
        for name, path in known.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' <- '.join(error.args[1])}")


@pytest.mark.parametrize("path", [path for _, path in modules()], ids=lambda path: path.stem)
def test_files_over_the_line_limit_give_a_reason(path):
    text = path.read_text(encoding="utf-8")
    if text.count("\n") > MAX_LINES:
        reason = ast.get_docstring(ast.parse(text)) or ""
        assert "one file" in reason.lower(), (
            f"{path}: more than {MAX_LINES} lines, without a reason"
        )
