"""The page of evidence in Markdown. All its numbers come from the files of results, or from the claims.

Its cells and sentences are in ``cells.py``, and the rows in ``evidence.py``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from lightning_grad.cli.catalog import techniques
from studies import forest
from studies.cells import (
    TITLES,
    about,
    arms,
    card_of,
    claimed,
    count,
    grouped,
    item,
    linked,
    machine,
    markdown_table,
    measured,
    name,
    quoted,
    settings,
    verdict,
    verdicts,
    waiting,
    wrapped,
)
from studies.evidence import NOT_RUN, ORDER, Row, known_first, rows_about
from studies.plan import CHOICE_SEED
from studies.tasks import TASKS
from studies.verdict import CONTRADICTED, HOLDS, LEVEL, NOT_SHOWN, PART, UNDECIDED

MEANINGS = {
    HOLDS: "The trainings show what is claimed, in all comparisons.",
    PART: "They show it in some comparisons, but not in all.",
    CONTRADICTED: (
        "No comparison shows it, and at least one shows the opposite, at this size: these trainings are short, see the "
        "[method](#method)."
    ),
    NOT_SHOWN: "The intervals are too wide for a yes or a no.",
}
CHANCE = 1 - LEVEL


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
        """Yield the verdicts: how many each technique has, and what is claimed, on known data if there is a claim on it."""
        yield "## Does it help?\n"
        yield wrapped(
            f"Of {count(self.rows, 'claim')}, {verdicts(self.rows) or 'none is decided yet'}. Numbers in brackets "
            f"are differences, positive if the technique is better, each with its {100 * LEVEL:g} % interval. Of several "
            "comparisons, they are the worst and the best one."
        )
        yield from self.by_technique()
        decided = known_first(self.rows)
        shown = [row for row in decided if row.is_on_known_data] or decided
        for group in ORDER[: ORDER.index(UNDECIDED)]:
            yield from self.group(group, [row for row in shown if row.group == group])
        if others := decided[len(shown) :]:
            yield wrapped(
                f"**On small data that needs no download.** {verdicts(others)}; see the [table](#all-claims)."
            )
        if rows := self.of(UNDECIDED):
            yield wrapped(f"**{TITLES[UNDECIDED]}.** {', '.join(map(waiting, rows))}.")
        if rows := self.of(NOT_RUN):
            yield wrapped(f"**{TITLES[NOT_RUN]}.** {count(rows, 'claim')}, named below with their families.")

    def by_technique(self) -> Iterator[str]:
        """Yield a table of the verdicts of each technique, by its own comparisons; its card quotes them."""
        table = []
        for members in techniques().values():
            for technique in members:
                rows = known_first(rows_about(technique, self.rows))
                known = [row for row in rows if row.is_on_known_data]
                link = linked(technique.__name__, {technique.__name__: f"{self.docs}{card_of(technique)}"})
                table.append((link, verdicts(known) or "-", verdicts(rows[len(known) :]) or "-", bool(rows)))
        if found := [cells for *cells, has_rows in table if has_rows]:
            yield wrapped(
                "How many claims about each technique have which verdict, by the comparisons of this technique alone. Its "
                "card quotes them."
            )
            yield markdown_table(("Technique", "On known data", "On small data"), found)

    def group(self, group: str, rows: Sequence[Row]) -> Iterator[str]:
        """Yield the rows of one verdict."""
        if rows:
            yield wrapped(f"**{TITLES[group]}.** {MEANINGS[group]}")
            yield from (item(self.sentence(row)) for row in rows)
            yield ""

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
        exact = sum(each.margin == 0 for each in comparisons)
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
            f"{CHOICE_SEED}, which is not reported. Where the best one is at an end of the grid, a better one may be outside: "
            "the table of all claims says so. Claims without listed rates train all arms at one fixed rate."
        )
        yield (
            "**Seeds.** Arms of one seed start from the same data, split and order where the technique allows it. Differences "
            f"are paired by seed, and their intervals are Student's at {100 * LEVEL:g} %."
        )
        yield (
            f"**Number of comparisons.** The decided rows have {len(comparisons)}. Intervals are not corrected for this "
            f"number: {exact} of them ask for any gain at all, so if no technique did anything, about "
            f"{CHANCE / 2 * exact:.1f} of these would hold by chance, and as many would be contradicted. A single row that "
            "does so narrowly is weak evidence."
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
            "seed in which both trainings fail says nothing, and its pair is dropped. Where one of both fails, no interval "
            "exists: the smallest and the largest difference stand in for it."
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
        names = ", ".join(name(row) for row in self.rows if row.old)
        untried = f"; for {len(old):,}, it was not ({names})" if old else ""
        yield (
            f"**Code.** {count(lines, 'training')} at the chosen rates took {hours:.1f} h, at {count(commits, 'commit')}"
            f"{changed}. A digest in each line follows the code that its claim uses: {len(lines) - len(other):,} have the "
            f"digest of the current code. The others have that of older code. For {len(other) - len(old):,} of them, the "
            "current code was tried on one training of the same arm, and gave the same numbers, digit for digit"
            f"{untried}."
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
            "BUDGET=20` trains for 20 minutes, those claims first that need the least, and writes this page from its results "
            "to `runs/studies/evidence.md`. The folder holds CIFAR-10 and the text; without `DATA`, the claims train on "
            "digits and on source code of Python, which need no download."
        )

    def technique(self, row: Row) -> str:
        """Return the techniques of a row with links to their cards, or the family of the claim."""
        links = {each.__name__: f"{self.docs}{card_of(each)}" for each in row.techniques}
        words = row.claim.paper.technique.replace("`", "") if row.claim.paper else ""
        if words and not set(re.findall(r"\w+", words)) & set(links):
            words += f" ({', '.join(links)})" if links else ""
        shown = re.sub(r"\w+", lambda word: linked(word[0], links), words or ", ".join(links))
        return shown or f"[{self.title_of(row.family)}]({self.docs}{row.family}.md)"


def write(page: Page, folder: Path) -> Path:
    """Write the page and its figures to a folder, and return the path of the page."""
    folder.mkdir(parents=True, exist_ok=True)
    for file, text in page.figures().items():
        (folder / file).write_text(text, encoding="utf-8")
    path = folder / "evidence.md"
    path.write_text(str(page), encoding="utf-8")
    return path
