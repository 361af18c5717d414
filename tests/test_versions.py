"""The least versions that are declared are those that `make test-oldest` installs, and those that the documentation names."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
EXTRAS_OF_USERS = ("wandb", "plot", "cli", "optimizers", "examples")


def pins(name: str) -> dict[str, Version]:
    """Read the exact versions of a list of requirements."""
    lines = (line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#"))
    found = [Requirement(line) for line in lines]
    return {canonicalize_name(r.name): Version(next(iter(r.specifier)).version) for r in found}


def declared() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    return [Requirement(text) for text in (*project["dependencies"], *(r for e in EXTRAS_OF_USERS for r in extras[e]))]


@pytest.mark.parametrize("requirement", declared(), ids=str)
def test_the_least_versions_are_the_tested_ones(requirement: Requirement) -> None:
    (least,) = (Version(s.version) for s in requirement.specifier if s.operator == ">=")
    assert pins("requirements-oldest.txt")[canonicalize_name(requirement.name)] == least


@pytest.mark.parametrize(("column", "file"), [(1, "requirements-oldest.txt"), (2, "constraints.txt")])
def test_the_documentation_names_the_tested_versions(column: int, file: str) -> None:
    text = (ROOT / "docs/compatibility.md").read_text()
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in text.splitlines() if "|" in line]
    named = {row[0]: row[column] for row in rows if len(row) == 3 and re.fullmatch(r"\d[\d.]*", row[column])}
    installed = pins(file)
    assert {"torch", "lightning", "torchmetrics", "numpy"} <= named.keys()
    for package, version in named.items():
        if package != "Python":
            assert installed[canonicalize_name(package)] == Version(version), package
