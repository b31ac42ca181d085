"""The result of a run of the checks: as an object, as lines of text, and as JSON."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from .versions import Installed, untested

OK, FAILED, SKIPPED = "ok", "failed", "skipped"


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Args:
        status: "ok", "failed" or "skipped".
        difference: Largest difference found. docs/check.md says between which values.
        tolerance: Largest difference that passes.
        message: Why it was skipped; or what differs and what to do about it; or what was measured.
    """

    name: str
    status: str
    difference: float | None
    tolerance: float | None
    seconds: float
    message: str

    def line(self) -> str:
        numbers = ""
        if self.difference is not None:
            numbers = f"{_number(self.difference):>8} of {_number(self.tolerance):>6}"
        start = f"{self.name:20} {self.status:8} {numbers:18} {self.seconds:5.1f} s"
        return f"{start}  {self.message}".rstrip()


@dataclass
class Report:
    """The result of a run of the checks.

    Args:
        platform: Operating system, processor and number of threads.
        device, dtype, attn_implementation: What the model ran with; `None` where it did not load.
    """

    version: str
    model: str
    platform: dict[str, Any]
    versions: list[Installed]
    device: str
    dtype: str | None = None
    attn_implementation: str | None = None
    checks: list[Check] = field(default_factory=list)

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if check.status == FAILED]

    @property
    def ok(self) -> bool:
        """Return whether at least one check ran and none failed."""
        return not self.failed and any(check.status == OK for check in self.checks)

    def header(self) -> list[str]:
        """Lines about this machine."""
        about = ", ".join(str(value) for value in self.platform.values())
        return [
            f"{'owl2_hf':16} {self.version}",
            f"{'platform':16} {about}",
            *(one.line() for one in self.versions),
        ]

    def subject(self) -> str:
        """A line about the model."""
        return f"{self.model} on {self.device}, {self.dtype}, {self.attn_implementation} attention"

    def summary(self) -> list[str]:
        """The last lines: whether all is well."""
        notes = [f"note: {note}" for note in untested(self.versions)]
        if not self.ok:
            return [*notes, f"{len(self.failed)} of {len(self.checks)} checks failed"]
        skipped = sum(check.status == SKIPPED for check in self.checks)
        tail = f", {skipped} skipped" if skipped else ""
        return [*notes, f"ok: {len(self.checks) - skipped} checks passed{tail}"]

    def to_dict(self) -> dict[str, Any]:
        """For `json.dumps`; a difference that is no finite number is `None`."""
        found = asdict(self)
        for check in found["checks"]:
            if check["difference"] is not None and not math.isfinite(check["difference"]):
                check["difference"] = None
        found["versions"] = {one.name: one.to_dict() for one in self.versions}
        return {"ok": self.ok, **found}

    def __str__(self) -> str:
        lines = [
            *self.header(),
            "",
            self.subject(),
            *(check.line() for check in self.checks),
            *self.summary(),
        ]
        return "\n".join(lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"
