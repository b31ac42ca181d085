"""The list of mutations fits the sources and the tests; `make mutations` tries them."""

import ast
from collections import Counter
from pathlib import Path

import pytest

from .mutations.cases import MUTATIONS, Mutation
from .mutations.run import ROOT, copy_sources, outcomes_of, survives

SOURCES = ROOT / "src" / "owl2_hf"
FILES = sorted({mutation.file for mutation in MUTATIONS})
# Where the formulas are.
MATHEMATICS = {
    "modeling/modeling_mplug_owl2_text.py",
    "modeling/modeling_mplug_owl2_abstractor.py",
    "modeling/modeling_mplug_owl2_h_reducer.py",
    "modeling/modeling_mplug_owl2_vision.py",
    "modeling/modeling_mplug_owl2.py",
    "modeling/cpu_kernels_mplug_owl2.py",
    "processing/image_processing_mplug_owl2.py",
    "scoring/labels.py",
    "scoring/losses.py",
    "modeling/scoring_mplug_owl2.py",
    "scoring/tensors.py",
    "scoring/statistics.py",
    "training/score_trainer.py",
    "training/trainer.py",
}


@pytest.mark.parametrize("file", FILES)
def test_the_text_of_each_mutation_occurs_once_and_stays_python(file):
    text = (SOURCES / file).read_text(encoding="utf-8")
    for mutation in MUTATIONS:
        if mutation.file == file:
            assert text.count(mutation.old) == 1, mutation.old
            assert mutation.old != mutation.new
            ast.parse(text.replace(mutation.old, mutation.new))


def test_every_file_with_formulas_has_mutations():
    assert set(FILES) >= MATHEMATICS
    assert len(MUTATIONS) >= 90
    counts = Counter((mutation.file, mutation.old, mutation.new) for mutation in MUTATIONS)
    assert max(counts.values()) == 1


def test_the_named_tests_are_there():
    for mutation in MUTATIONS:
        file, _, name = mutation.test.partition("::")
        functions = {
            node.name
            for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body
            if isinstance(node, ast.FunctionDef)
        }
        assert name in functions, mutation.test


def test_a_mutation_that_changes_nothing_survives_and_one_that_does_not(tmp_path):
    pytest.importorskip("resource", reason="processes are forked here: Linux and macOS alone")
    tree = copy_sources(tmp_path)
    test = "tests/scoring/test_labels.py::test_two_levels_share_what_lies_between_them"
    old = "    label = [0.0] * num_levels\n"
    mutation = Mutation("scoring/labels.py", old, "    label = num_levels * [0.0]\n", test)
    before = (tree / "src" / "owl2_hf" / "scoring" / "labels.py").read_text(encoding="utf-8")
    assert survives(mutation, tree) == "SURVIVED"
    assert survives(mutation._replace(new="    label = [0.1] * num_levels\n"), tree) is None
    assert "occurs 0 times" in survives(mutation._replace(old="no such text"), tree)
    broken = survives(mutation._replace(new="    label = (\n"), tree)
    assert "nothing is known" in broken
    after = Path(tree / "src" / "owl2_hf" / "scoring" / "labels.py").read_text(encoding="utf-8")
    assert after == before
    assert outcomes_of(tree, [test])[0] == 0
