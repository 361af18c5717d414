"""The report of a claim: its verdict, the numbers behind it, and where they come from."""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

from studies.claim import Claim
from studies.common import print_rows, write_results
from studies.plan import Plan, minutes
from studies.results import Line
from studies.verdict import LEVEL, Comparison, compare, judge, standard_error

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def print_estimate(plans: Sequence[Plan], texts: bool = False) -> None:
    """Print what is to do for each claim, and how long all take together."""
    for plan in plans:
        print(plan)
        if texts:
            print(f"    {plan.claim.text}")
    if len(plans) > 1:
        print(f"together: {sum(plan.missing for plan in plans)} trainings, {minutes(sum(plan.left for plan in plans))}")


def print_report(plan: Plan) -> None:
    """Print what is known about a claim."""
    claim, lines = plan.claim, plan.reported
    comparisons = compare(claim, [line.result(claim) for line in lines])
    print(f"\n{claim.name}: {judge(comparisons)}\n{textwrap.indent(wrapped(claim.text, 88), '    ')}")
    if not lines:
        return
    print()
    print_rows(("arm", "rate", f"{claim.metric} {claim.unit}".rstrip(), "seeds"), arm_rows(claim, lines))
    print()
    header = ("arm", "against", claim.compared[0], f"{100 * LEVEL:g} % interval", "seeds", "verdict")
    print_rows(header, [comparison_row(claim, each) for each in comparisons])
    print(f"\nnumbers: mean ± standard error; differences paired by seed; comparisons: {len(comparisons)}")
    if len(comparisons) > 1:
        print("intervals: for each comparison alone, not corrected for their number")
    if any(math.isinf(value) for each in comparisons for value in each.differences):
        print("with an infinite difference: smallest to largest difference in place of the interval")
    if any(each.margin for each in comparisons):
        margins = {each.arm: number(claim, each.margin) for each in comparisons}
        told = (
            margins.values()
            if len(set(margins.values())) == 1
            else (f"{value} ({arm})" for arm, value in margins.items())
        )
        print(f"a difference counts if it is above {', '.join(dict.fromkeys(told))}")
    if plan.edges:
        print(f"best rate at the end of the grid, so a better one may be outside: {', '.join(plan.edges)}")
    print_origins(plan)


def wrapped(text: str, width: int, indent: str = "") -> str:
    """Wrap a text between words, with an indent from the second line on."""
    return textwrap.fill(text, width, break_on_hyphens=False, subsequent_indent=indent)


def arm_rows(claim: Claim[Any], lines: Sequence[Line]) -> list[tuple[str, ...]]:
    """Return a row for each arm that has results."""
    rows: list[tuple[str, ...]] = []
    for arm in claim.arms:
        own = [line for line in lines if line.arm == arm]
        values = [claim.scale * float(line.metrics[claim.metric]) for line in own]
        if own:
            rate = "-" if own[0].rate is None else f"{own[0].rate:g}"
            rows.append((arm, rate, mean_and_error(values), str(len(own))))
    return rows


def mean_and_error(values: Sequence[float]) -> str:
    """Format a mean and its standard error, if there are several values; diverged trainings are counted instead.

    Example:
        >>> mean_and_error([1.0, 3.0]), mean_and_error([1.0, 1.002]), mean_and_error([1.0, math.nan])
        ('2.00 ± 1.00', '1.0010 ± 0.0010', '1 of 2 diverged')
    """
    finite = [value for value in values if math.isfinite(value)]
    if len(finite) < len(values):
        return f"{len(values) - len(finite)} of {len(values)} diverged"
    if len(values) < 2:
        return f"{values[0]:.2f}"
    error = standard_error(values)
    places = places_of(error)
    return f"{statistics.mean(values):.{places}f} ± {error:.{places}f}"


def places_of(width: float, least: int = 2) -> int:
    """Return how many decimals show two digits of a width, at most four.

    Example:
        >>> places_of(0.5), places_of(0.012), places_of(0.0), places_of(20.0, least=0)
        (2, 3, 2, 0)
    """
    return min(4, max(least, 1 - math.floor(math.log10(width)))) if width else 2


def comparison_row(claim: Claim[Any], comparison: Comparison) -> tuple[str, ...]:
    """Return the row of a comparison."""
    count, names = len(comparison.differences), (comparison.arm, comparison.reference)
    low, high = (number(claim, end) for end in comparison.interval)
    between = f"{low} to {high}" if count > 1 else "-"
    return (*names, number(claim, comparison.mean) if count else "-", between, str(count), comparison.word)


def number(claim: Claim[Any], difference: float) -> str:
    """Format a difference in the unit of the claim."""
    return f"{claim.compared[1] * difference:+.2f}"


def shown_unit(claim: Claim[Any]) -> str:
    """Return what a difference counts, in words, such as ``"points of test accuracy"``."""
    label, metric = claim.compared[0], words_of(claim.metric)
    unit = label.removeprefix("better by").strip()
    if unit == label:
        return label
    return metric if metric.startswith(unit) else f"{unit} of {metric}"


def words_of(metric: str) -> str:
    """Return a measurement in words.

    Example:
        >>> words_of("test_accuracy"), words_of("share")
        ('test accuracy', 'found wrong labels')
    """
    return {"share": "found wrong labels", "eigenvalue": "largest eigenvalue"}.get(metric, metric.replace("_", " "))


def print_origins(plan: Plan) -> None:
    """Print where the results come from, and warn if they are not all from the same code, versions and hardware."""
    groups: dict[tuple[str, str], list[Line]] = {}
    for line in plan.reported:
        groups.setdefault(line.origin.same, []).append(line)
    for own in groups.values():
        print(wrapped(f"{len(own)} results of {own[-1].origin}", 100, "    "))
    if len(groups) > 1:
        print("Note: these results are of different code, versions or hardware.")
    elif groups and plan.origin.code not in {code for code, _ in groups}:
        print(f"Note: the code has changed since (now {plan.origin.code}).")
    if any(line.origin.same != plan.origin.same for line in plan.reported):
        print("--verify tries one training of each arm by the current code, --fresh trains all of them again.")


def show_family(plan: Plan) -> None:
    """Print the tables of the family, and write its figures and ``results.csv``."""
    lines = plan.reported
    complete = [seed for seed in plan.seeds if sum(line.seed == seed for line in lines) == len(plan.claim.arms)]
    if not complete:
        print(f"{plan.claim.name}: no seed has all arms yet, so there are no tables and figures.")
        return
    claim = replace(plan.claim, seeds=len(complete))
    results = [line.result(claim) for line in lines if line.seed in complete]
    write(claim, results)


def write(claim: Claim[Any], results: Sequence[Any]) -> None:
    """Write ``results.csv`` and the figures of a claim, and print its table."""
    claim.output.mkdir(parents=True, exist_ok=True)
    write_results(results, claim.output / "results.csv")
    family: Any = import_module(f"studies.figures.{type(claim).__module__.rpartition('.')[2]}")
    print()
    family.print_table(claim, results)
    try:
        drawn: dict[str, Figure] = family.draw(claim, results)
    except FileNotFoundError as error:
        print(f"\nCannot draw figures without the logs of the trainings: there is no {error.filename}.")
        print("The logs stay on the machine that trained. Train again with --results and a new folder.")
        return
    for name, figure in drawn.items():
        figure.savefig(claim.output / f"{name}.png", dpi=140)
