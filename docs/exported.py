"""The exported techniques with their families, cards and descriptions, for the other scripts in this folder.

The description of a technique is the first line of its docstring, its family is the folder of its module, and the title of a
family is the heading of its page.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lightning_grad import callbacks, strategies
from lightning_grad.core.compatibility import TITLES

ROOT = Path(__file__).resolve().parents[1]


def techniques() -> dict[str, list[type[Any]]]:
    """Return the exported techniques of each family, sorted by family, members in the order of ``__all__``."""
    exported = [getattr(package, name) for package in (callbacks, strategies) for name in package.__all__]
    families: dict[str, list[type[Any]]] = {}
    for technique in exported:
        if not inspect.isabstract(technique):
            families.setdefault(family_of(technique), []).append(technique)
    return dict(sorted(families.items()))


def all_techniques() -> list[type[Any]]:
    """Return the techniques of all families."""
    return [technique for members in techniques().values() for technique in members]


def family_of(technique: type[Any]) -> str:
    """Return the name of the family, as in the folders of docs, examples and functions."""
    parts = technique.__module__.split(".")
    return parts[2] if parts[1] == "callbacks" else "communication"


def package_of(technique: type[Any]) -> str:
    """Return the package from which users import a technique."""
    return ".".join(technique.__module__.split(".")[:2])


def card_of(technique: type[Any]) -> str:
    """Return the path of a technique's card in ``docs``."""
    return f"{family_of(technique)}/{technique.__module__.rpartition('.')[2]}.md"


def description_of(technique: type[Any]) -> str:
    """Return the first line of the docstring as Markdown, without its full stop."""
    first = (inspect.getdoc(technique) or "").partition("\n\n")[0]
    return as_markdown(" ".join(first.split()).removesuffix("."))


def as_markdown(text: str) -> str:
    """Return a line of a docstring with code and references in Markdown."""
    return re.sub(r":\w+:`[~.\w]*?(\w+)`", r"`\1`", text.replace("``", "`"))


def title_of(family: str) -> str:
    """Return the heading of the page of a family."""
    return title_of_page(f"{family}.md")


def title_of_page(page: str) -> str:
    """Return the heading of a page in ``docs``."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    heading = re.search(r"^# (.+)$", text, re.MULTILINE)
    return heading[1].replace("`", "") if heading else page


def works_with(technique: type[Any]) -> Iterator[str]:
    """Yield a line for each kind of compatibility answer of a technique."""
    answers = technique.compatibility.answers
    for works, words in {"yes": "Yes", "stand-in": "Tested with a stand-in only", "no": "Raises"}.items():
        names = [TITLES[name] for name, answer in answers.items() if answer.works == works]
        if names:
            yield f"{words}: {', '.join(names)}."


def write_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [f"| {' | '.join(line)} |\n" for line in (header, *rows)]
    return "".join([lines[0], "|---" * len(header) + "|\n", *lines[1:]])
