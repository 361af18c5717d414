"""The page of evidence in Markdown. All its numbers come from the files of results, or from the claims."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from lightning_grad.cli.catalog import family_of
from studies import forest
from studies.claim import plain
from studies.evidence import NOT_RUN, ORDER, Row, preferred
from studies.plan import CHOICE_SEED
from studies.report import arm_rows, is_edge, places_of, shown_unit, words_of
from studies.results import Line
from studies.tasks import TASKS
from studies.verdict import CONTRADICTED, HOLDS, LEVEL, NOT_SHOWN, PART, UNDECIDED, Comparison

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
MEANINGS = {
    HOLDS: "The trainings show what is claimed, in all comparisons.",
    PART: "They show it in some comparisons, but not in all.",
    CONTRADICTED: "They show the opposite, at this size: these trainings are short, see the [method](#method).",
    NOT_SHOWN: "The intervals are too wide for a yes or a no.",
}
CHANCE = 1 - LEVEL
PROJECT = "A claim of this project"


class Page:
    """The page of evidence.

    Args:
        rows: The rows, in their order.
        docs: Path from the page to the folder ``docs``, with a slash at its end, or nothing.
        images: Path from the page to the figures, with a slash at its end, or nothing.
        title_of: Function that returns the title of a family.
    """

    def __init__(self, rows: Sequence[Row], docs: str, images: str, title_of: Callable[[str], str]) -> None:
        self.rows = rows
        self.docs = docs
        self.images = images
        self.title_of = title_of

    def __str__(self) -> str:
        parts = [self.head(), self.short(), self.table(), self.families(), self.method(), self.tracing()]
        return "\n".join("\n".join(part) for part in parts)

    def figures(self) -> dict[str, str]:
        """Return the figures by the names of their files."""
        found = {family: [row for row in rows if row.has_differences] for family, rows in self.by_family().items()}
        return {
            f"evidence_{family}.svg": forest.draw(rows, f"{self.title_of(family)}: differences and their intervals")
            for family, rows in found.items()
            if rows
        }

    def by_family(self) -> dict[str, list[Row]]:
        """Return the rows of each family."""
        names = sorted({row.family for row in self.rows})
        return {name: [row for row in self.rows if row.family == name] for name in names}

    # Parts of the page.

    def head(self) -> Iterator[str]:
        """Yield the title and what the page is about."""
        yield "# Evidence\n"
        yield wrapped(
            "Does it help? Each claim about a technique was measured again here, most of them claims of the paper that "
            "introduced it. Every number has its uncertainty, and every row can be traced to single trainings. This page "
            "is written from the files of results; nothing in it is typed by hand."
        )

    def short(self) -> Iterator[str]:
        """Yield the verdicts, each with what it says: of claims on known data if there are any, else of all."""
        known = preferred(self.rows)
        others = [row for row in self.rows if row.is_decided and row not in known]
        yield "## Does it help?\n"
        yield wrapped(
            f"Of {count(self.rows, 'claim')}, {' and '.join(self.counts()) or 'none is decided yet'}. The number in brackets "
            f"is a difference, positive if the technique is better, with its {100 * LEVEL:g} % interval. Of several "
            "comparisons, it is the one that supports the verdict least."
        )
        for group in ORDER[: ORDER.index(UNDECIDED)]:
            yield from self.group(group, [row for row in known if row.group == group])
        if others:
            found = [(group, [name(row) for row in others if row.group == group]) for group in ORDER]
            told = [f"*{group}*: {', '.join(names)}" for group, names in found if names]
            yield wrapped(f"**On small data that needs no download.** {'; '.join(told)}.")
        if rows := self.of(UNDECIDED):
            yield wrapped(f"**{TITLES[UNDECIDED]}.** {', '.join(map(waiting, rows))}.")
        if rows := self.of(NOT_RUN):
            yield wrapped(f"**{TITLES[NOT_RUN]}.** {count(rows, 'claim')}, named below with their families.")

    def group(self, group: str, rows: Sequence[Row]) -> Iterator[str]:
        """Yield the rows of one verdict."""
        if rows:
            yield f"**{TITLES[group]}.** {MEANINGS[group]}\n"
            yield from (item(self.sentence(row)) for row in rows)
            yield ""

    def counts(self) -> list[str]:
        """Return how many claims have each verdict."""
        numbers = {group: len(self.of(group)) for group in VERBS}
        found = [f"{number} {VERBS[group][number > 1]}" for group, number in numbers.items() if number]
        return [", ".join(found[:-1]), found[-1]] if len(found) > 1 else found

    def of(self, group: str) -> list[Row]:
        """Return the rows with a verdict."""
        return [row for row in self.rows if row.group == group]

    def sentence(self, row: Row) -> str:
        """Return one line that quotes a row."""
        return f"{self.technique(row)}: {row.claim.text} {quoted(row)}"

    def table(self) -> Iterator[str]:
        """Yield the table of all claims."""
        yield "## All claims\n"
        shown = [row for row in self.rows if row.lines]
        if not shown:
            yield "None has results yet.\n"
            return
        yield wrapped(
            "*Measured*: by how much an arm is better than the other one, the interval in brackets, and the number of seeds n "
            "(a negative number: it is worse)."
        )
        yield markdown_table(
            ("Technique", "What is claimed", "Measured", "Verdict", "Command"),
            ((self.technique(row), claimed(row), measured(row), verdict(row), f"`{row.command}`") for row in shown),
        )

    def families(self) -> Iterator[str]:
        """Yield the figure of each family, and the lines behind it."""
        for family, rows in self.by_family().items():
            run = [row for row in rows if row.lines]
            yield f"## {self.title_of(family)}\n"
            yield f"How to use them: [{self.title_of(family)}]({self.docs}{family}.md).\n"
            if any(row.has_differences for row in run):
                image = f"{self.images}evidence_{family}.svg"
                yield f"![{self.title_of(family)}: differences of each claim and their intervals]({image})\n"
            if run:
                yield markdown_table(
                    ("Claim", "Arm", "Rate", "Mean ± standard error", "Seeds", "Processor time"),
                    (cells for row in run for cells in arms(row)),
                )
                yield from (item(settings(row)) for row in run)
                yield ""
            if rest := [name(row) for row in rows if row.group == NOT_RUN]:
                yield wrapped(f"{TITLES[NOT_RUN]}: {', '.join(rest)}. `python -m studies --only NAME` runs a claim.")

    def method(self) -> Iterator[str]:
        """Yield how the numbers came about."""
        yield "## Method\n"
        yield from (item(text) for text in self.rules())
        yield ""

    def rules(self) -> Iterator[str]:
        """Yield the rules of the comparisons, and what they ran on."""
        comparisons = [each for row in self.rows if row.is_decided for each in row.comparisons]
        used = {getattr(row.claim, "task", "") for row in self.rows}
        tasks = [f" *{name}*: {about(task)}" for name, task in TASKS.items() if name in used]
        yield (
            "**Data and networks.** Each claim names its data, and its settings are below the figure of its family."
            f"{''.join(tasks)}"
        )
        yield (
            "**Size.** The networks are small and the trainings are short: one processor thread takes a minute or less for "
            "each. Papers train far larger networks for far longer, and some effects need that. *Holds* and "
            "*contradicted* are about this size. If your run is larger, try the technique on it."
        )
        yield (
            "**Rates.** Each arm has its own learning rate: the best of the grid of its claim, by validation, on seed "
            f"{CHOICE_SEED}, which is not reported. Where the best one is at an end of the grid, the settings say so."
        )
        yield (
            "**Seeds.** Arms of one seed start from the same data, split and order where the technique allows it. Differences "
            f"are paired by seed, and their intervals are Student's at {100 * LEVEL:g} %."
        )
        yield (
            f"**Number of comparisons.** The decided rows have {len(comparisons)}. Intervals are not corrected for this "
            f"number: if no technique did anything, about {CHANCE / 2 * len(comparisons):.1f} of them would be above 0 by "
            "chance. So a single row that holds narrowly is weak evidence."
        )
        yield (
            f"**Verdict.** *{HOLDS}*: the whole interval is above the margin of the claim (0, or what the claim allows to "
            f"lose), in all comparisons; *{PART}*: in some of them, and others may be below; *{CONTRADICTED}*: in none, and "
            f"at least one is entirely below; *{NOT_SHOWN}*: neither. The rule was fixed before the results."
        )
        yield (
            "**Steps and time.** Arms have equal steps, up to the rounding of epochs, unless a technique is there to save "
            "steps. Claims *at equal time* also compare it with a longer training without it. *Processor time* is the mean of "
            "a training without its validations, where it was measured."
        )
        yield (
            "**Failures.** A training that ends in nan, or never reaches the target of its claim, is worse than any other. A "
            "seed in which both trainings fail says nothing, and its pair is dropped."
        )
        yield from self.origins()

    def origins(self) -> Iterator[str]:
        """Yield the machines, versions and code behind the lines."""
        lines = [line for row in self.rows for line in row.lines]
        if not lines:
            return
        groups = grouped(lines, lambda line: (str(line.origin.hardware), str(line.origin.versions)))
        told = [f"{count(own, 'training')} on {machine(own[0])}" for own in groups]
        gpu = "" if any(line.origin.device == "cuda" for line in lines) else " No GPU was at hand."
        yield f"**Machines and versions.** {'; '.join(told)}.{gpu}"
        other = [line for row in self.rows for line in row.other]
        old = [line for row in self.rows for line in row.old]
        hours = sum(line.seconds for line in lines) / 3600
        commits = {line.origin.commit for line in lines}
        dirty = sum(line.origin.dirty for line in lines)
        changed = f", {dirty} of them with changes that were not committed" if dirty else ""
        names = f" ({', '.join(name(row) for row in self.rows if row.old)})" if old else ""
        yield (
            f"**Code.** {count(lines, 'training')} at the chosen rates took {hours:.1f} h, at {count(commits, 'commit')}"
            f"{changed}. A digest in each line follows the code that its claim uses: {len(lines) - len(other):,} have the "
            f"digest of the current code. The others have that of older code. For {len(other) - len(old):,} of them, the "
            "current code was tried on one training of the same arm, and gave the same numbers, digit for digit; for "
            f"{len(old):,}, it was not{names}."
        )

    def tracing(self) -> Iterator[str]:
        """Yield how to come from a row to its trainings."""
        yield "## From a row to its trainings\n"
        yield wrapped(
            "The row of the claim NAME rests on `studies/results/<NAME>.jsonl`: one line of JSON for each training, with arm, "
            "seed, rate, settings, all measurements, seconds, hardware, versions and commit. The tables above give the rate "
            "of each arm; the lines with this arm and rate, and a seed that is not "
            f"{CHOICE_SEED}, are those behind the row. This prints a claim with all its numbers and origins, and trains "
            "nothing:"
        )
        yield "```sh\npython -m studies --only NAME --data FOLDER --report\n```\n"
        yield wrapped(
            "To measure again on your machine, give a folder of your own: `make study RESULTS=runs/mine DATA=FOLDER "
            "BUDGET=20` trains for 20 minutes, and writes this page from its results to `runs/studies/evidence.md`. The "
            "folder holds CIFAR-10 and the text; without `DATA`, the claims train on digits and on source code of Python, "
            "which need no download."
        )

    def technique(self, row: Row) -> str:
        """Return the techniques of a row with links to their cards, or the family of the claim."""
        links = {each.__name__: f"{self.docs}{card_of(each)}" for each in row.techniques}
        words = row.claim.paper.technique.replace("`", "") if row.claim.paper else ""
        if words and not set(re.findall(r"\w+", words)) & set(links):
            words += f" ({', '.join(links)})" if links else ""
        shown = re.sub(r"\w+", lambda word: linked(word[0], links), words or ", ".join(links))
        return shown or f"[{self.title_of(row.family)}]({self.docs}{row.family}.md)"


# Cells and sentences.


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
    """Return all comparisons of a row."""
    if not row.lines:
        return "-"
    shown = [f"`{each.arm}` against `{each.reference}`: {numbers(row, each)}" for each in row.comparisons]
    device = "" if row.device == "CPU" else f", {row.device}"
    return "<br>".join([*shown, f"in {shown_unit(row.claim)}, on {row.data}{device}{margin(row)}"])


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
    return lambda difference: f"{scale * difference:+.{places}f}".replace("-", "\N{MINUS SIGN}")


def quoted(row: Row) -> str:
    """Return the numbers of a row in brackets."""
    if not row.is_decided:
        return f"({row.word})"
    total, deciding = len(row.comparisons), HOLDS if row.group == PART else row.group
    found, against = (sum(each.word == word for each in row.comparisons) for word in (deciding, CONTRADICTED))
    several = f"{found} of {total} comparisons {VERBS[deciding][found > 1]}; " if total > 1 else ""
    if row.group == PART and against:
        several = several.replace(";", f", {against} {VERBS[CONTRADICTED][against > 1]};")
    differs = numbers(row, row.weakest).rpartition(", n = ")[0].replace("**", "").replace("(", "[").replace(")", "]")
    unit = re.sub("^points of .*", "points", shown_unit(row.claim))
    return f"({several}{row.data}: {differs} {unit})"


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
    plan, claim = row.plan, row.claim
    own = {key: plain(value) for key, value in claim.settings.items() if key != "data" and value is not None}
    told = ", ".join(f"{key} = {value}" for key, value in own.items())
    grid = f"Rates: {', '.join(f'{rate:g}' for rate in claim.rates)}." if len(claim.rates) > 1 else ""
    edges = [f"`{arm}`" for arm, rate in (plan.rates if plan else {}).items() if is_edge(claim, rate)]
    edge = f"Best at an end of the grid: {', '.join(edges)}." if edges else ""
    machines = len({str(line.origin.hardware) for line in row.lines})
    several = f"Its trainings are of {machines} machines." if machines > 1 else ""
    parts = (
        f"{name(row)}: {row.data}, {words_of(claim.metric)}{', ' if told else ''}{told}.",
        grid,
        edge,
        several,
    )
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


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in (header, *rows)]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:], ""])


def write(page: Page, folder: Path) -> Path:
    """Write the page and its figures to a folder, and return the path of the page."""
    folder.mkdir(parents=True, exist_ok=True)
    for file, text in page.figures().items():
        (folder / file).write_text(text, encoding="utf-8")
    path = folder / "evidence.md"
    path.write_text(str(page), encoding="utf-8")
    return path
