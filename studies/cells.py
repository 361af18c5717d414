"""Cells and sentences of the page of evidence: what a row says in words, and Markdown. The page is in ``page.py``."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from lightning_grad.cli.catalog import family_of
from studies.claim import plain
from studies.evidence import NOT_RUN, Row
from studies.report import arm_rows, places_of, shown_unit, words_of
from studies.results import Line
from studies.tasks import TASKS
from studies.verdict import CONTRADICTED, HOLDS, NOT_SHOWN, PART, UNDECIDED, Comparison

TITLES = {
    HOLDS: "Holds",
    PART: "Holds in part",
    CONTRADICTED: "Contradicted",
    NOT_SHOWN: "Not shown",
    UNDECIDED: "Seeds are missing",
    NOT_RUN: "Not run yet",
}
VERBS = {  # of one, and of several
    HOLDS: ("holds", "hold"),
    PART: ("holds in part", "hold in part"),
    CONTRADICTED: ("is contradicted", "are contradicted"),
    NOT_SHOWN: ("is not shown", "are not shown"),
}
PROJECT = "A claim of this project"
QUIET = ("task", "data")  # settings that the row tells otherwise
SETTINGS = {"flip": "share of wrong labels"}


def linked(name: str, links: dict[str, str]) -> str:
    """Return a name with its link, if it has one."""
    return f"[`{name}`]({links[name]})" if name in links else name


def card_of(technique: type) -> str:
    """Return the path of a technique's card in ``docs``."""
    return f"{family_of(technique)}/{technique.__module__.rpartition('.')[2]}.md"


def waiting(row: Row) -> str:
    """Return the name of a claim without a verdict, and what is missing."""
    return name(row) if row.group == NOT_RUN else f"{name(row)}{row.word.removeprefix(UNDECIDED)}"


def name(row: Row) -> str:
    """Return the name of a claim, as code."""
    return f"`{row.claim.name}`"


def claimed(row: Row) -> str:
    """Return what the paper says, and what was tested."""
    tested = f"Tested: {row.claim.text}"
    paper = row.claim.paper
    return f"{paper.says.rstrip('.')} ({source(paper.source)}).<br>{tested}" if paper else f"{PROJECT}.<br>{tested}"


def source(words: str) -> str:
    """Return the names of papers with links to arXiv.

    Example:
        >>> source("SAM (2010.01412); a book")
        '[SAM (2010.01412)](https://arxiv.org/abs/2010.01412); a book'
    """
    numbers = [(part, re.search(r"\d{4}\.\d{4,5}", part)) for part in words.split("; ")]
    return "; ".join(f"[{part}](https://arxiv.org/abs/{found[0]})" if found else part for part, found in numbers)


def verdict(row: Row) -> str:
    """Return the verdict, and how many of its trainings were made by other code that may give other numbers."""
    older = f"<br>({len(row.old)} of {len(row.lines)} trainings by other code)" if row.old else ""
    return f"**{row.word}**{older}"


def measured(row: Row) -> str:
    """Return all comparisons of a row, once no seed is missing."""
    if not row.is_decided:
        return "-"
    shown = [f"`{each.arm}` against `{each.reference}`: {numbers(row, each)}" for each in row.comparisons]
    device = "" if row.device == "CPU" else f", {row.device}"
    return "<br>".join([*shown, f"in {shown_unit(row.claim)}, on {row.data}{device}{margin(row)}", *edges(row)])


def edges(row: Row) -> Iterator[str]:
    """Yield which arms have their best rate at an end of the grid, if one has."""
    if row.edges:
        arms = "all arms" if len(row.edges) == len(row.claim.arms) else ", ".join(f"`{arm}`" for arm in row.edges)
        yield f"best rate at an end of the grid: {arms}"


def margin(row: Row) -> str:
    """Return the margins of a claim, if one is not 0."""
    form, claim = digits(row), row.claim
    own = [f"`{arm}` above {form(value)}" for arm, value in claim.margins.items() if arm in claim.arms]
    usual = f"holds above {form(claim.margin)}" if claim.margin or own else ""
    return "".join(f"; {part}" for part in (usual, *own) if part)


def numbers(row: Row, comparison: Comparison) -> str:
    """Return the difference, its interval and the number of seeds, or how many trainings failed."""
    differences, form = comparison.differences, digits(row)
    finite = [value for value in differences if math.isfinite(value)]
    seeds = f"n = {len(differences)}"
    if not differences:
        return "no seed yet"
    if len(finite) < len(differences):
        rest = f", in the others {form(min(finite))} to {form(max(finite))}" if finite else ""
        return f"{failures(comparison)}{rest}, {seeds}"
    between = "" if len(differences) < 2 else f" ({' to '.join(map(form, comparison.interval))})"
    return f"**{form(comparison.mean)}**{between}, {seeds}"


def failures(comparison: Comparison) -> str:
    """Return in how many seeds only one of both trainings fails.

    Example:
        >>> failures(Comparison("b", "a", [math.inf, 0.1, 0.2]))
        'the other one fails in 1 of 3 seeds'
    """
    total = len(comparison.differences)
    ours, theirs = (sum(value == sign * math.inf for value in comparison.differences) for sign in (-1, 1))
    parts = [(ours, "it fails"), (theirs, "the other one fails")]
    return ", ".join(f"{words} in {number} of {total} seeds" for number, words in parts if number)


def digits(row: Row) -> Callable[[float], str]:
    """Return a function that formats differences of a row, with two digits of the narrowest interval."""
    scale = row.claim.compared[1]
    widths = [scale * (each.interval[1] - each.interval[0]) / 2 for each in row.comparisons]
    places = places_of(min((width for width in widths if 0 < width < math.inf), default=0.0), least=0)
    return lambda difference: signed(scale * difference, places)


def signed(value: float, places: int) -> str:
    """Format a number with its sign, and with up to two more decimals if it would be 0 without them.

    Example:
        >>> signed(2.346, 2), signed(0.004, 2), signed(1e-17, 2)
        ('+2.35', '+0.004', '+0.00')
    """
    own = next((number for number in range(places, places + 3) if round(value, number)), places)
    return f"{round(value, own) + 0.0:+.{own}f}".replace("-", "\N{MINUS SIGN}")  # + 0.0 makes -0.0 positive


def quoted(row: Row) -> str:
    """Return the numbers of a row in brackets: of several comparisons, how many decide, the worst and the best."""
    if not row.is_decided:
        return f"({row.word})"
    unit = re.sub("^points of .*", "points", shown_unit(row.claim))
    told = [difference(row, each) for each in row.extremes]
    if len(told) == 1:
        return f"({row.data}: {told[0]} {unit}{margin(row)})"
    names = [f"`{each.arm}` against `{each.reference}`" for each in row.extremes]
    worst, best = (f"{name} {text}" for name, text in zip(names, told, strict=True))
    return f"({deciding(row)}; {row.data}, {unit}: worst {worst}, best {best}{margin(row)})"


def deciding(row: Row) -> str:
    """Return how many comparisons of a row decide its verdict."""
    word = HOLDS if row.group == PART else row.group
    total = len(row.comparisons)
    found, against = (sum(each.word == own for each in row.comparisons) for own in (word, CONTRADICTED))
    opposed = f", {against} {VERBS[CONTRADICTED][against > 1]}" if row.group == PART and against else ""
    return f"{found} of {total} comparisons {VERBS[word][found > 1]}{opposed}"


def difference(row: Row, comparison: Comparison) -> str:
    """Return a difference with its interval in square brackets."""
    return numbers(row, comparison).rpartition(", n = ")[0].replace("**", "").replace("(", "[").replace(")", "]")


def arms(row: Row) -> Iterator[tuple[str, ...]]:
    """Yield the cells of the arms of a row, with the line that a user writes if the claim has one."""
    table: Mapping[str, object] = getattr(row.claim, "table", {})
    for place, (arm, rate, mean, seeds) in enumerate(arm_rows(row.claim, row.lines)):
        unit = f" {row.claim.unit}".rstrip() if "of" not in mean else ""
        shown = f"`{arm}`: `{table[arm]}`" if arm in table else f"`{arm}`"
        yield name(row) if place == 0 else "", shown, rate, f"{mean}{unit}", seeds, processor_time(row, arm)


def processor_time(row: Row, arm: str) -> str:
    """Return the mean processor time of the trainings of an arm, if it was measured."""
    seconds = [line.metrics["cpu_seconds"] for line in row.lines if line.arm == arm and "cpu_seconds" in line.metrics]
    return f"{sum(seconds) / len(seconds):.1f} s" if seconds else "-"


def settings(row: Row) -> str:
    """Return the settings of a row in words."""
    claim, task = row.claim, TASKS.get(getattr(row.claim, "task", ""))
    words = SETTINGS | ({"length": task.unit} if task else {})
    own = {key: value for key, value in claim.settings.items() if key not in QUIET and value}
    told = "".join(f", {words_of(words.get(key, key))} = {plain(value)}" for key, value in own.items())
    grid = f"Rates: {', '.join(f'{rate:g}' for rate in claim.rates)}." if len(claim.rates) > 1 else ""
    machines = len({str(line.origin.hardware) for line in row.lines})
    several = f"Its trainings are of {machines} machines." if machines > 1 else ""
    unit = shown_unit(claim)
    compared = f" (compared: {unit})" if unit == claim.compared[0] else ""
    parts = (f"{name(row)}: {row.data}, {words_of(claim.metric)}{compared}{told}.", grid, several)
    return " ".join(part for part in parts if part)


def machine(line: Line) -> str:
    """Return the hardware and the versions of a line."""
    hardware = line.origin.hardware
    processor = hardware["gpu"] or hardware["cpu"]
    threads = f"{hardware['threads']} thread{'s' if hardware['threads'] != 1 else ''}"
    return f"{processor} ({threads}), {', '.join(f'{name} {number}' for name, number in line.origin.versions.items())}"


def about(task: object) -> str:
    """Return the first sentence of the docstring of a task, without what it refers to."""
    return (task.__doc__ or "").splitlines()[0].partition(";")[0].rstrip(".") + "."


def grouped(lines: Iterable[Line], key: Callable[[Line], object]) -> list[list[Line]]:
    """Return the lines in groups of equal keys, the largest first."""
    groups: dict[object, list[Line]] = {}
    for line in lines:
        groups.setdefault(key(line), []).append(line)
    return sorted(groups.values(), key=len, reverse=True)


def count(things: Iterable[object], word: str) -> str:
    """Return the number of things with their word.

    Example:
        >>> count([1], "training"), count([], "claim")
        ('1 training', '0 claims')
    """
    number = len(list(things))
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def wrapped(text: str) -> str:
    """Return a paragraph in lines of at most 120 characters."""
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False) + "\n"


def item(text: str) -> str:
    """Return an item of a list in lines of at most 120 characters."""
    return textwrap.fill(
        text, 120, initial_indent="- ", subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )


def verdicts(rows: Sequence[Row]) -> str:
    """Return how many rows have each verdict, in words.

    Example:
        >>> verdicts([])
        ''
    """
    numbers = {group: sum(row.group == group for row in rows) for group in VERBS}
    return ", ".join(f"{number} {VERBS[group][number > 1]}" for group, number in numbers.items() if number)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in (header, *rows)]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:], ""])
