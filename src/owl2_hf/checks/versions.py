"""Find installed versions, and whether this release was tested with them."""

import platform
from dataclasses import dataclass
from importlib import metadata

from packaging.version import InvalidVersion, Version

from .tested import REQUIRED, TESTED, Tested


@dataclass(frozen=True)
class Installed:
    """A package of this machine.

    Args:
        version: `None` where it is not installed.
        note: Empty where the version is among the tested ones.
    """

    name: str
    version: str | None
    note: str

    def to_dict(self) -> dict[str, str | bool | None]:
        return {"version": self.version, "tested": not self.note, "note": self.note}

    def line(self) -> str:
        tested = " to ".join(dict.fromkeys(TESTED[self.name]))
        return f"{self.name:16} {self.version or '-':16} {self.note or f'tested: {tested}'}"


def installed_versions() -> list[Installed]:
    """All that the model needs, and what else is installed of the packages that matter."""
    found = {name: _version(name) for name in TESTED}
    return [
        Installed(name, version, _note(version, TESTED[name]))
        for name, version in found.items()
        if version or name in REQUIRED
    ]


def untested(packages: list[Installed]) -> list[str]:
    """What is worth a note, in words."""
    found = [one for one in packages if one.version and one.note]
    return [f"{one.name} {one.version} is {one.note}" for one in found]


def _version(name: str) -> str | None:
    if name == "python":
        return platform.python_version()
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _note(version: str | None, tested: Tested) -> str:
    if version is None:
        return "not installed"
    try:
        release = Version(version).release
    except InvalidVersion:
        return "of an unknown version"
    oldest, newest = (Version(bound).release for bound in tested)
    if release < oldest:
        return f"older than {tested.oldest}, the oldest tested version"
    if release[: len(newest)] > newest:  # 3.11.7 is a 3.11
        return f"newer than {tested.newest}, the newest tested version"
    return ""
