"""The pages of techniques and families, for the other scripts in this folder; the title of a family is its page's heading."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lightning_grad.cli.catalog import family_of, summary_of, techniques

ROOT = Path(__file__).resolve().parents[1]


def all_techniques() -> list[type[Any]]:
    """Return the techniques of all families."""
    return [technique for members in techniques().values() for technique in members]


def card_of(technique: type[Any]) -> str:
    """Return the path of a technique's card in ``docs``."""
    return f"{family_of(technique)}/{technique.__module__.rpartition('.')[2]}.md"


def description_of(technique: type[Any]) -> str:
    """Return the first line of the docstring as Markdown, without its full stop."""
    return as_markdown(summary_of(technique))


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


def write_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [f"| {' | '.join(line)} |\n" for line in (header, *rows)]
    return "".join([lines[0], "|---" * len(header) + "|\n", *lines[1:]])
