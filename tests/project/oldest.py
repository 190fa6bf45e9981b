"""Constraints for pip: the oldest allowed version of each package. `python -m tests.project.oldest` prints them."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

_PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


def oldest(extras: tuple[str, ...] = ("test", "testing", "campaign", "plot", "sim")) -> dict[str, Version]:
    """Return the lowest version that pyproject.toml allows of each package, on this Python."""
    project = tomllib.loads(_PYPROJECT.read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    found: dict[str, Version] = {}
    for requirement in map(Requirement, lines):
        if requirement.name == project["name"]:
            continue  # an extra that brings others
        if requirement.marker is None or requirement.marker.evaluate():
            (bound,) = requirement.specifier
            assert bound.operator == ">=", f"{requirement}: a lower bound is all that is said of a package"
            version = Version(bound.version)
            found[requirement.name] = max(version, found.get(requirement.name, version))
    return found


if __name__ == "__main__":
    sys.stdout.writelines(f"{name}=={version}\n" for name, version in oldest().items())
