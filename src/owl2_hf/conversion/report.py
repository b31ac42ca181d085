"""The report of a conversion."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class ConversionReport:
    """The result of a conversion, also written to conversion_report.json beside the weights.

    The report can be published: it holds folder names without their parent folders. It does not
    depend on the time, so equal conversions give equal files.
    """

    source: str
    layout: str
    target: str
    to: str
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    num_tensors_read: int = 0
    num_tensors: int = 0
    num_parameters: int = 0
    dtype: str = ""
    dropped: dict[str, str] = field(default_factory=dict)
    rebuilt: list[str] = field(default_factory=list)
    casts: dict[str, int] = field(default_factory=dict)
    nonfinite: dict[str, int] = field(default_factory=dict)
    tokenizer: str | None = None
    scorer: str | None = None
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def is_noop(self) -> bool:
        """The source is in this package's format already: nothing was written."""
        return not self.files

    def summary(self) -> str:
        """One line for people."""
        if self.to == "adapter":
            return f"a PEFT adapter from {self.layout}"
        tokenizer = "no tokenizer" if self.tokenizer is None else f"tokenizer from {self.tokenizer}"
        return (
            f"{self.num_parameters:,} parameters in {self.num_tensors} tensors, {self.dtype}, from "
            f"{self.layout}; {len(self.dropped)} dropped, {len(self.rebuilt)} rebuilt; {tokenizer}"
            + (f"; scores as {self.scorer}" if self.scorer else "")
        )
