"""Warn about deprecated names, which still work and will be removed.

CONTRIBUTING.md, "Deprecate a name", has the policy and an example.
"""

import warnings


def warn_deprecated(
    name: str, *, since: str, removed_in: str, instead: str, stacklevel: int = 2
) -> None:
    """Emit a `FutureWarning` that names the replacement.

    The warning points at the caller's code. Python shows it once for each place, also to users who
    run no tests.

    Args:
        name: What is deprecated, as a user writes it: a function, an option, a module.
        since: Version that deprecated it, such as "0.2.0".
        removed_in: First version without it.
        instead: What to write in its place.
        stacklevel: As for `warnings.warn`, counted from the function that calls this one: 1 is that
            function itself, 2 its caller. A module that warns when it is imported takes 2 as well.
    """
    warnings.warn(
        f"{name} is deprecated since owl2_hf {since} and will be removed in {removed_in}: use "
        f"{instead}.",
        FutureWarning,
        stacklevel=stacklevel + 1,
    )
