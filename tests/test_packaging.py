"""What a release says of itself is the same everywhere."""

import re
import tomllib
from pathlib import Path

import yaml

import lightning_grad

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_version_and_date_are_those_of_the_newest_changes() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    newest = re.search(r"^## (\d\S*) - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest
    assert newest.groups() == (lightning_grad.__version__, str(citation["date-released"]))
    assert citation["version"] == lightning_grad.__version__
    assert citation["license"] == PROJECT["project"]["license"]


def test_every_extra_is_explained() -> None:
    text = (ROOT / "docs/install.md").read_text()
    assert set(PROJECT["project"]["optional-dependencies"]) == set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE))


def test_the_source_distribution_holds_what_it_names() -> None:
    for name in PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["only-include"]:
        assert (ROOT / name).exists(), name
