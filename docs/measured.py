"""The tables of docs/benchmarks.md and the memory of each technique, from the files that ``make bench`` writes.

A table has the place of its marker: ``<!-- begin: clipping_64_m_entries -->`` is the table "64 M entries" of
``benchmarks/clipping.py``. What was not measured yet says so.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from exported import ROOT

sys.path.insert(0, str(ROOT))

from benchmarks import rows
from benchmarks.rows import (
    AGAIN,
    HELD,
    LOOKS,
    MISSED,
    MOST,
    NOISE,
    OK,
    PEAK,
    Results,
    Row,
    marker_of,
    noise_of,
    table_of,
    unit_of,
)

PAGE = "docs/benchmarks.md"
NOT_YET = "Not measured yet.\n"
_OVER = "Digits over "
_SMALL = 0.05  # times the weights: what the tables of memory call nothing


def results() -> dict[str, Results]:
    """Return what each script has measured."""
    paths = {script: rows.RESULTS / f"{script}.json" for script in rows.SCRIPTS}
    return {script: Results.read(path) for script, path in paths.items() if path.exists()}


def parts(markers: list[str]) -> dict[str, Callable[[], Iterator[str]]]:
    """Return the functions that write the parts of the page, by the names of its markers."""
    written: dict[str, Callable[[], Iterator[str]]] = {"machine": machine, "budgets": budgets}
    tables = [name for name in markers if name.startswith(tuple(f"{script}_" for script in rows.SCRIPTS))]
    return written | {name: partial(table, name) for name in tables}


def measured_tables() -> dict[str, list[Row]]:
    """Return the rows of all tables by the name of their marker."""
    return {
        marker_of(script, title): list(found)
        for script, result in results().items()
        for title, found in result.tables.items()
    }


def table(name: str) -> Iterator[str]:
    """Yield one table."""
    found = measured_tables().get(name)
    if found is None:
        yield NOT_YET
    elif not found:
        yield "This machine could not measure it.\n"
    else:
        yield table_of(found) + "\n"


def which_strategy() -> Iterator[str]:
    """Yield time and traffic of each strategy over each link side by side, and the soonest over each."""
    found = results().get("several_machines")
    links = {} if found is None else {t: list(r) for t, r in found.tables.items() if t.startswith(_OVER) and r}
    if not links:
        yield NOT_YET
        return
    header = ["Strategy", *(f"{what} over {title.removeprefix(_OVER)}" for title in links for what in ("s", "MB"))]
    names = [row.name for row in next(iter(links.values())) if not row.name.endswith(AGAIN)]
    cells = {(title, row.name): row.columns for title, table in links.items() for row in table}
    lines = [
        [name, *(_short(cells[title, name][column]) for title in links for column in list(cells[title, name])[:2])]
        for name in names
    ]
    yield rows.markdown_table(header, lines) + "\n"
    for title in links:
        seconds = {name: next(iter(cells[title, name].values())) for name in names}
        reached = {name: value for name, value in seconds.items() if not isinstance(value, str)}
        soonest = sorted(reached, key=lambda name: reached[name])[:3]
        text = ", ".join(f"{name} ({_short(reached[name])} s)" for name in soonest)
        yield textwrap.fill(f"**Soonest over {title.removeprefix(_OVER)}:** {text}.", 120) + "\n"


def _short(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.1f}"


def machine() -> Iterator[str]:
    """Yield a line for each machine that measured, with its scripts if there are several."""
    scripts: dict[str, list[str]] = {}
    for script, found in results().items():
        scripts.setdefault(found.machine, []).append(f"`{script}.py`")
    if not scripts:
        yield NOT_YET
    for name, of in scripts.items():
        where = "" if len(scripts) == 1 else f" ({', '.join(of)})"
        yield textwrap.fill(f"**Machine{where}.** {name}.", 120) + "\n"


def budgets() -> Iterator[str]:
    """Yield the sum of all budgets and a table of them."""
    held = [
        (script, title, row, row.baseline or unit_of(found), noise_of(found))
        for script, result in results().items()
        for title, found in result.tables.items()
        for row in found
        if row.budget is not None and row.ratio is not None
    ]
    if not held:
        yield NOT_YET
        return
    verdicts = [row.verdict(noise) for _, _, row, _, noise in held]
    counts = {verdict: verdicts.count(verdict) for verdict in (OK, NOISE, MISSED)}
    yield (
        f"Of {len(held)} budgets, {counts[OK]} hold, {counts[NOISE]} are missed by no more than the noise, and "
        f"{counts[MISSED]} are missed.\n"
    )
    header = ("script", "table", "variant", "ratio", "to", "budget", "noise", "verdict")
    lines = [
        (script, title, row.name, f"{row.ratio:.3f}", unit, row.limit, _noise(noise), row.verdict(noise))
        for script, title, row, unit, noise in held
    ]
    yield rows.markdown_table(header, lines) + "\n"


def _noise(noise: float | None) -> str:
    return "" if noise is None else f"{noise:.3f}"


# Memory and the cost of looks, in the cards.


def memory_of(technique: type[Any]) -> Iterator[str]:
    """Yield the line of a card about memory, and for a probe that about the time of a look."""
    yield textwrap.fill(f"**Memory.** {_memory(technique.__name__)}", 120) + "\n"
    looks = list(_looks(technique.__name__))
    if looks:
        yield textwrap.fill(f"**Time.** {' '.join(looks)} ([measured](../benchmarks.md#looks-of-probes))", 120) + "\n"


def _looks(name: str) -> Iterator[str]:
    """Yield a sentence for each way of looking that was measured."""
    found = results().get("diagnostics")
    for row in [] if found is None else found.tables.get(LOOKS, ()):
        probe, _, samples = row.name.partition(", ")
        if probe == name and row.ratio is not None:
            yield f"A look ({samples}) takes {row.ratio:.3g} times as long as {row.baseline}."


def _memory(name: str) -> str:
    found = results().get("memory")
    tables = [] if found is None else found.tables.values()
    columns = next((row.columns for each in tables for row in each if row.name == name), None)
    if columns is None:
        return NOT_YET.strip()
    held, most, peak = (float(columns[key]) for key in (HELD, MOST, PEAK))
    if held < -_SMALL:
        return (
            f"Between steps, weights, gradients, optimizer state and the technique together take {-held:.2f} times the bytes "
            f"of the weights less than without it. The peak of the process is {-peak:.2f} times these bytes lower "
            "([measured](../benchmarks.md#memory))."
        )
    around = f", and {_times(most)} around a log step" if most - held > _SMALL else ""
    return (
        f"In addition to weights, gradients and optimizer state, it holds {_times(held)} the bytes of the weights between "
        f"steps{around}. The peak of the process is {_times(peak)} these bytes higher ([measured](../benchmarks.md#memory))."
    )


def _times(multiple: float) -> str:
    return f"less than {_SMALL} times" if multiple < _SMALL else f"{multiple:.2f} times"
