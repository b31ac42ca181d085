"""Formulas made wrong on purpose, each with the test that must notice. `python -m tests.mutations`
tries them.
"""

from typing import NamedTuple

from . import of_models, of_scores, of_speed


class Mutation(NamedTuple):
    """A change of one formula.

    Args:
        file: Below src/owl2_hf.
        old: Text that occurs once in it.
        new: What stands there instead.
        test: Must fail then.
    """

    file: str
    old: str
    new: str
    test: str


MUTATIONS = [
    Mutation(file, old, new, f"{tests}::{test}")
    for part in (of_models, of_scores, of_speed)
    for (file, tests), cases in part.CASES.items()
    for old, new, test in cases
]
