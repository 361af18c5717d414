"""Rows of benchmarks: how they are judged, shown and stored. Imports no torch, because the documentation reads them too."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

# What `make bench` runs, in this order.
SCRIPTS = (
    "sparsity",
    "clipping",
    "optimizers",
    "quantization",
    "sharpness",
    "batch_size",
    "fine_tuning",
    "diagnostics",
    "data_pruning",
    "adversarial",
    "communication",
    "several_machines",
    "topk_selection",
    "small_layers",
    "memory",
)
RESULTS = Path(__file__).parent / "results"
AGAIN = ", again"
HELD, MOST, PEAK = "between steps", "at a log step", "peak"  # columns of memory.py, which cards quote
LOOKS = "Looks of probes"  # a table of diagnostics.py, which cards quote
OK, NOISE, MISSED = "ok", "within the noise", "missed"


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Args:
        name: Variant. If it ends with ``, again``, the row repeats a baseline and shows the noise.
        milliseconds: Time of the variant; ``None`` if time is not what the table compares.
        ratio: Ratio to the baseline; ``None`` if it could not be measured.
        budget: Largest allowed ratio; with ``at_least``, the smallest.
        at_least: See ``budget``.
        baseline: Name of what the ratio is to. Rows without it in the whole table: the first row.
        columns: Further numbers or words, by the heading of their column.
    """

    name: str
    milliseconds: float | None
    ratio: float | None
    budget: float | None = None
    at_least: bool = False
    baseline: str = ""
    columns: Mapping[str, float | str] = field(default_factory=dict)

    @property
    def excess(self) -> float | None:
        """By how much the ratio misses its budget; negative if it is better."""
        if self.budget is None or self.ratio is None:
            return None
        return self.budget - self.ratio if self.at_least else self.ratio - self.budget

    @property
    def is_over(self) -> bool:
        """Whether the ratio misses its budget."""
        return self.excess is not None and self.excess > 0

    @property
    def limit(self) -> str:
        """The budget as text."""
        return "" if self.budget is None else f"{'>=' if self.at_least else '<='} {self.budget:.2f}"

    def verdict(self, noise: float | None) -> str:
        """Compare the ratio with its budget.

        Args:
            noise: How far the baseline of the table came out from itself, see :func:`noise_of`.
        """
        if self.excess is None:
            return ""
        if self.excess <= 0:
            return OK
        return NOISE if noise is not None and self.excess <= noise else MISSED


def noise_of(rows: Sequence[Row]) -> float | None:
    """Return the largest distance from 1 of the rows that repeat a baseline; ``None`` without such rows.

    >>> noise_of([Row("plain", 10.0, 1.0), Row("plain, again", 9.8, 0.98), Row("clipped", 11.0, 1.1)])
    0.02
    """
    repeated = [round(abs(row.ratio - 1), 6) for row in rows if row.name.endswith(AGAIN) and row.ratio is not None]
    return max(repeated, default=None)


def unit_of(rows: Sequence[Row]) -> str:
    """Return what all ratios of a table are to; empty if they differ, or if no row says it.

    >>> unit_of([Row("plain", 10.0, 1.0), Row("clipped", 11.0, 1.1)])
    'plain'
    """
    named = {row.baseline for row in rows if row.baseline}
    if not named:
        return rows[0].name if rows and rows[0].ratio == 1 else ""
    return named.pop() if len(named) == 1 else ""


# Tables in Markdown.


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown; all columns but the first are right-aligned."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def table_of(rows: Sequence[Row], unit: str = "") -> str:
    """Return rows as a table in Markdown, without the columns that all of them leave empty.

    Args:
        rows: The rows.
        unit: What the ratios are to, if the rows do not name it.
    """
    unit, noise = unit_of(rows) or unit, noise_of(rows)
    headings = list(dict.fromkeys(heading for row in rows for heading in row.columns))
    header = ["variant", "median ms", *headings, f"ratio to {unit}" if unit else "ratio", "to", "budget", "verdict"]
    lines = [
        [
            row.name,
            "" if row.milliseconds is None else f"{row.milliseconds:.2f}",
            *(_as_text(row.columns.get(heading, "")) for heading in headings),
            "" if row.ratio is None else f"{row.ratio:.3f}" if row.ratio < 100 else f"{row.ratio:.1f}",
            "" if unit else row.baseline,
            row.limit,
            row.verdict(noise),
        ]
        for row in rows
    ]
    used = [index for index in range(len(header)) if any(line[index] for line in lines)]
    return markdown_table([header[i] for i in used], [[line[i] for i in used] for line in lines])


def _as_text(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else f"{value:.2f}"


# Files of results.


@dataclass(frozen=True)
class Results:
    """What a script has measured.

    Args:
        machine: The machine and the versions.
        rounds: Rounds of the script.
        tables: Rows by the title of their table. A table without rows could not be measured on this machine.
    """

    machine: str
    rounds: int
    tables: Mapping[str, Sequence[Row]]

    def write(self, path: Path) -> None:
        """Write a file of JSON."""
        tables = {title: [asdict(row) for row in rows] for title, rows in self.tables.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"machine": self.machine, "rounds": self.rounds, **tables}, indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Results:
        """Read such a file."""
        found = json.loads(path.read_text(encoding="utf-8"))
        known = {each.name for each in fields(Row)}
        tables = {
            title: [Row(**{key: value for key, value in row.items() if key in known}) for row in rows]
            for title, rows in found.items()
            if title not in ("machine", "rounds")
        }
        return cls(found["machine"], found["rounds"], tables)


def marker_of(script: str, title: str) -> str:
    """Return the name of a table in docs/benchmarks.md.

    >>> marker_of("clipping", "64 M entries, hooks")
    'clipping_64_m_entries_hooks'
    """
    words = re.findall(r"\w+", title.lower())
    return "_".join([script, *words])
