"""Put any Lightning callback through the eight guarantees."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from lightning_grad.testing.checks import CHECKS, Check
from lightning_grad.testing.checks.registry import Level
from lightning_grad.testing.environment import settled
from lightning_grad.testing.projects import projects_of
from lightning_grad.testing.rows import Row, Rows
from lightning_grad.testing.subject import Subject

Modules = Mapping[str, Callable[[], Any]] | Sequence[Callable[[], Any]]


def check_callback(
    make: Callable[[], Any],
    neutral: Callable[[], Any] | str | None = None,
    *,
    level: Level = "quick",
    expected_failed: Mapping[str, str] | None = None,
    modules: Modules | None = None,
    raises: bool = False,
) -> Rows:
    """Put a Lightning callback through the eight guarantees, and return one row for each check.

    It works for every callback, also one that knows nothing of this package. The callback trains small modules on the CPU,
    in one thread, with random streams, warnings and logs restored at the end. Each check stands alone, so a failure hides
    no other; only if the fit itself fails is nothing else tried.

    Args:
        make: Function that builds a new callback, such as the class, or ``lambda: MyCallback(0.1)``.
        neutral: Function that builds one at a setting at which it changes nothing. Without it, or with the reason why there
            is none, G2 is not checked.
        level: ``"quick"`` takes a few seconds; ``"full"`` takes at most a minute, and adds Ctrl-C, every kind of checkpoint,
            EMA, precisions, compiled modules and two processes.
        expected_failed: Reasons by guarantee (``"g2"``) or check (``"g2_neutral_is_identity"``). These checks run, but do not
            fail.
        modules: Functions that build other modules to train, by name or in a list. Each returns a LightningModule that
            loads its own data, ``(module, train_loader)``, ``(module, train_loader, validation_loader)`` or
            ``(module, datamodule)``. Default: a small classifier of this package, and variants of it.
        raises: Whether to raise if a check failed, after all have run.

    Returns:
        Rows: A list of :class:`Row`. ``print`` shows it as a table.

    Raises:
        AssertionError: With ``raises=True``, with the rows that failed.
        TypeError: If ``make`` builds no callback, or ``modules`` no module.
        ValueError: If ``make`` returns the same callback twice, or ``expected_failed`` names no check.

    Example:
        >>> from lightning.pytorch.callbacks import LambdaCallback
        >>> rows = check_callback(LambdaCallback, neutral=LambdaCallback)
        >>> [row.check for row in rows.failed]
        []
        >>> rows[0].check, rows[0].status
        ('g1_trains_an_unmodified_module', 'ok')
    """
    expected = _expected(expected_failed or {})
    chosen = [check for check in CHECKS.values() if level == "full" or check.level == level]
    if level not in get_args(Level):
        raise ValueError(f"level must be 'quick' or 'full'; got {level!r}.")
    with settled():
        kind = _kind_of(make)
        projects = projects_of(modules)
        found: list[Row] = []
        for project in projects:
            subject = Subject(make, neutral, project)
            suffix = "" if modules is None else f"[{project.name}]"
            rows = _rows(subject, chosen, f"{kind.__name__}{suffix}")
            found += [_as_expected(row, expected)._replace(check=f"{row.check}{suffix}") for row in rows]
    rows = Rows(found, f"{kind.__name__}, {level} level")
    if raises and rows.failed:
        raise AssertionError(f"\n{rows.failed}")
    return rows


def _rows(subject: Subject, chosen: list[Check], title: str) -> list[Row]:
    """Run the checks one by one; if the callback does not train the module at all, the others say so."""
    rows: list[Row] = []
    for check in Tqdm(chosen, desc=title, leave=False, disable=None):
        if rows and rows[0].status == "failed":
            rows.append(Row(check.name, "not applicable", f"The fit itself fails; see {rows[0].check}."))
        else:
            rows.append(check.of(subject))
    return rows


def _kind_of(make: Any) -> type:
    """Return the class of what ``make`` builds."""
    words = (
        "make must be a function that builds a new callback at each call, such as the class or lambda: MyCallback(0.1)"
    )
    if not callable(make):
        raise TypeError(f"{words}; got an object of type {type(make).__name__}.")
    first, second = make(), make()
    if not any(cls.__name__ == "Callback" for cls in type(first).__mro__):
        raise TypeError(f"{words}; it returned an object of type {type(first).__name__}.")
    if first is second:
        raise ValueError(f"{words}; it returned the same {type(first).__name__} twice.")
    return type(first)


def _expected(reasons: Mapping[str, str]) -> dict[str, str]:
    """Return the reason for each check that is expected to fail."""
    known = [*CHECKS, *dict.fromkeys(check.guarantee for check in CHECKS.values())]
    for name in reasons:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f" Did you mean {near[0]!r}?" if near else f" Guarantees are {', '.join(known[len(CHECKS) :])}."
            raise ValueError(f"expected_failed names {name!r}, which is no check.{hint}")
    return {
        check.name: reasons.get(check.name, reasons.get(check.guarantee, ""))
        for check in CHECKS.values()
        if {check.name, check.guarantee} & reasons.keys()
    }


def _as_expected(row: Row, expected: Mapping[str, str]) -> Row:
    if row.check not in expected:
        return row
    if row.status == "failed":
        return row._replace(status="expected failure", words=f"{expected[row.check]} ({row.words})")
    return row
