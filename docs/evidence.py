"""The page of evidence, the lines of cards and families that quote it, and the rows of README, from ``studies/results``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any

from exported import ROOT, card_of, title_of, write_table

sys.path.insert(0, str(ROOT))

from lightning_grad.cli.catalog import techniques
from studies.cells import TITLES, count, item, name, quoted, verdicts, waiting, wrapped
from studies.claims import CLAIMS
from studies.evidence import NOT_RUN, known_first, rows_about, rows_of, telling
from studies.page import Page
from studies.results import FOLDER, Store
from studies.verdict import UNDECIDED

PAGE, IMAGES = "docs/evidence.md", "docs/images"
NOT_YET = "Not measured yet.\n"
RESULTS = FOLDER


@cache
def page() -> Page:
    """Return the page of the committed results."""
    return Page(rows_of(CLAIMS.values(), Store(RESULTS)), "", "images/", title_of)


def files() -> dict[str, Callable[[], str]]:
    """Return the functions that write the page and its figures."""
    figures = page().figures()
    return {PAGE: lambda: str(page())} | {f"{IMAGES}/{file}": partial(figures.__getitem__, file) for file in figures}


def parts() -> dict[tuple[str, str], Callable[[], Iterator[str]]]:
    """Return the functions that write the parts of other pages, by file and name."""
    written: dict[tuple[str, str], Callable[[], Iterator[str]]] = {("README.md", "evidence"): readme_rows}
    for family in page().by_family():
        written[f"docs/{family}.md", "evidence"] = partial(family_rows, family)
        for technique in techniques()[family]:
            written[f"docs/{card_of(technique)}", "evidence"] = partial(card_rows, technique)
    return written


def readme_rows() -> Iterator[str]:
    """Yield how many claims have each verdict, and the five most telling rows."""
    shown = Page(page().rows, "docs/", "docs/images/", title_of)
    rows = [(shown.technique(row), f"{row.claim.text} {quoted(row)}", row.word) for row in telling(shown.rows, 5)]
    yield f"Of {count(shown.rows, 'claim')}, {verdicts(shown.rows) or 'none is decided yet'}.\n"
    yield (
        write_table(("Technique", "What was tested, and by how much it was better", "Verdict"), rows)
        if rows
        else NOT_YET
    )


def family_rows(family: str) -> Iterator[str]:
    """Yield the verdicts about a family."""
    rows = page().by_family()[family]
    yield from (item(f"{TITLES[row.group]}: {row.claim.text} {quoted(row)}") for row in rows if row.is_decided)
    for group in (UNDECIDED, NOT_RUN):
        if names := [waiting(row) for row in rows if row.group == group]:
            yield item(f"{TITLES[group]}: {', '.join(names)}.")
    yield f"\nAll arms, intervals and how they were measured: [evidence](evidence.md#{anchor_of(family)}).\n"


def card_rows(technique: type[Any]) -> Iterator[str]:
    """Yield the verdicts about a technique, by its own comparisons, those on known data first."""
    rows = rows_about(technique, page().rows)
    if not rows:
        yield wrapped("**Evidence.** No claim about it is on the page of [evidence](../evidence.md).")
        return
    link = f"[evidence](../evidence.md#{anchor_of(rows[0].family)})"
    told = [f"{TITLES[row.group]}: {row.claim.text} {quoted(row)}" for row in known_first(rows)]
    if not told:
        yield wrapped(f"**Evidence.** Not decided yet: {', '.join(map(name, rows))}, on the page of {link}.")
    elif len(told) == 1:
        yield wrapped(f"**Evidence.** {told[0]} All numbers are on the page of {link}.")
    else:
        yield wrapped(f"**Evidence.** All numbers are on the page of {link}.")
        yield from map(item, told)
        yield ""


def anchor_of(family: str) -> str:
    """Return the anchor of a family on the page.

    Example:
        >>> anchor_of("sharpness")
        'sharpness'
    """
    kept: Sequence[str] = [each for each in title_of(family).lower() if each.isalnum() or each in "-_ "]
    return "".join(kept).replace(" ", "-")
