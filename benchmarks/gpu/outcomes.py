"""The JSON file of `benchmarks.gpu`, read and written without torch.

    {"machine": {...}, "results": {part: {step: outcome}}}

An outcome has one of these keys: "result" (what was measured), "error", "not run" (why), or "begun"
while the step runs. Of a result, "aims" and the numbers in "shown" (name -> number) are printed.
"""

import json
import os
from pathlib import Path
from typing import Any

RESULT, ERROR, NOT_RUN, BEGUN = "result", "error", "not run", "begun"
LIMITS = ("at most", "at least")


def read(path: Path) -> dict[str, Any] | None:
    """The content of the file; `None` if there is none.

    Raises:
        ValueError: If it is no such file.
    """
    if not path.is_file():
        return None
    mend = f"expected results of benchmarks.gpu in {path}"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{mend}, got a file that is no JSON ({error}); move it away") from None
    if not (isinstance(content, dict) and {"machine", "results"} <= content.keys()):
        raise ValueError(f"{mend}, got other JSON; move it away or give another --json")
    return content


def write(path: Path, content: dict[str, Any]) -> None:
    """Write the file so that it is whole at any moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    draft.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    draft.replace(path)


def lines_of(outcome: dict[str, Any]) -> list[str]:
    """An outcome as lines of text."""
    for key in (NOT_RUN, ERROR):
        if key in outcome:
            return [f"{key}: {outcome[key]}"]
    if BEGUN in outcome:
        return ["started, not finished"]
    result = outcome.get(RESULT, {})
    lines = [f"{name}: {in_numbers(one)}" for name, one in result.get("aims", {}).items()]
    lines += [f"{name}: {value:,.4g}" for name, value in result.get("shown", {}).items()]
    return lines or [f"done in {outcome.get('seconds', 0)} s"]


def in_numbers(one: dict[str, Any]) -> str:
    """An aim as text: "1.031 (at most 1.05): reached"."""
    return f"{one['value']:.4g} ({limit_of(one)}): {'' if one['reached'] else 'not '}reached"


def limit_of(one: dict[str, Any]) -> str:
    return ", ".join(f"{name} {one[name]:g}" for name in LIMITS if name in one)


def table(results: dict[str, dict[str, Any]]) -> str:
    """All outcomes as text for a terminal."""
    lines = []
    for part, steps in results.items():
        lines.append(part)
        for name, outcome in steps.items():
            first, *rest = lines_of(outcome)
            lines.append(f"  {name:52} {first}")
            lines += [f"  {'':52} {line}" for line in rest]
    return "\n".join(lines)
