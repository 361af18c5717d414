"""Put any Lightning callback through the eight guarantees."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, get_args

from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from lightning_grad.functional.choices import hint_for
from lightning_grad.testing.checks import CHECKS, Check
from lightning_grad.testing.checks.registry import Level
from lightning_grad.testing.environment import settled
from lightning_grad.testing.project import Project
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
    in one thread. What it prints, logs and warns is hidden, and random states are restored at the end. Each check stands
    alone, so a failure hides no other; only if the fit itself fails is nothing else tried.

    Args:
        make: Function that builds a new callback, such as the class, or ``lambda: MyCallback(0.1)``.
        neutral: Function that builds one at a setting at which it changes nothing. Without it, or with the reason why there
            is none, G2 is not checked.
        level: ``"quick"`` takes a few seconds; ``"full"`` takes at most a minute, and adds Ctrl-C, every kind of checkpoint,
            EMA, precisions, compiled modules and two processes.
        expected_failed: Reasons by guarantee (``"g2"``) or check (``"g2_neutral_is_identity"``). These checks run, but do not
            fail. If all of them pass, their rows say that the entry can go.
        modules: Functions that build other modules to train, by name or in a list. Each returns a LightningModule that
            loads its own data, ``(module, train_loader)``, ``(module, train_loader, validation_loader)`` or
            ``(module, datamodule)``. Default: a small classifier of this package, and variants of it.
        raises: Whether to raise if a check failed, after all have run.

    Returns:
        Rows: A list of :class:`Row`. ``print`` shows it as a table.

    Raises:
        AssertionError: With ``raises=True``, with the rows that failed.
        TypeError: If ``make`` or ``neutral`` builds no callback, or ``modules`` no module.
        ValueError: If ``make`` returns the same callback twice, ``expected_failed`` names no check, or a module does not train
            without the callback.

    Example:
        >>> from lightning.pytorch.callbacks import LambdaCallback
        >>> rows = check_callback(LambdaCallback, neutral=LambdaCallback)
        >>> [row.check for row in rows.failed]
        []
        >>> rows[0].check, rows[0].status
        ('g1_trains_an_unmodified_module', 'ok')
    """
    if level not in get_args(Level):
        raise ValueError(f"level must be 'quick' or 'full'; got {level!r}.")
    expected = _expected({} if expected_failed is None else expected_failed)
    chosen = [check for check in CHECKS.values() if level == "full" or check.level == level]
    shown = sys.stderr
    with settled():
        kind = _kind_of(make, "make")
        if not (neutral is None or isinstance(neutral, str)):
            _kind_of(neutral, "neutral")
        projects = projects_of(modules)
        for project in projects:
            _assert_trains(project)
        found: list[Row] = []
        for project in projects:
            suffix = "" if modules is None else f"[{project.name}]"
            bar = Tqdm(chosen, desc=f"{kind.__name__}{suffix}", leave=False, disable=None, file=shown)
            rows = _rows(Subject(make, neutral, project), bar)
            found += [row._replace(check=f"{row.check}{suffix}") for row in _as_expected(rows, expected)]
    rows = Rows(found, f"{kind.__name__}, {level} level")
    if raises and rows.failed:
        raise AssertionError(f"\n{rows.failed}")
    return rows


def _rows(subject: Subject, chosen: Iterable[Check]) -> list[Row]:
    """Run the checks one by one; if the callback does not train the module at all, the others say so."""
    rows: list[Row] = []
    for check in chosen:
        if rows and rows[0].status == "failed":
            words = (
                f"The fit itself fails; see {rows[0].check}. If the callback needs another module, give it by modules=."
            )
            rows.append(Row(check.name, "not applicable", words))
        else:
            rows.append(check.of(subject))
    return rows


def _assert_trains(project: Project) -> None:
    project.make()  # which raises an error of its own if it returns no module
    try:
        Subject(None, project=project).plain.bare()
    except Exception as error:
        raise ValueError(
            f"{project.name} does not train without the callback: {type(error).__name__}: {error}. It must train for four "
            "epochs on the CPU."
        ) from error


def _kind_of(make: Any, name: str) -> type:
    """Return the class of what ``make`` builds."""
    words = (
        f"{name} must be a function that builds a new callback at each call, such as the class or "
        "lambda: MyCallback(0.1)"
    )
    if not callable(make):
        raise TypeError(f"{words}; got an object of type {type(make).__name__}.")
    try:
        first, second = make(), make()
    except Exception as error:
        error.add_note(f"{words}. It is called without arguments.")
        raise
    if not any(cls.__name__ == "Callback" for cls in type(first).__mro__):
        raise TypeError(f"{words}; it returned an object of type {type(first).__name__}.")
    if first is second:
        raise ValueError(f"{words}; it returned the same {type(first).__name__} twice.")
    return type(first)


def _expected(reasons: Any) -> dict[str, tuple[str, str]]:
    """Return the entry and its reason for each check that is expected to fail."""
    if not isinstance(reasons, Mapping):
        kind = type(reasons).__name__
        raise TypeError(f"expected_failed must map checks or guarantees to reasons, as {{'g2': 'why'}}; got a {kind}.")
    known = [*CHECKS, *dict.fromkeys(check.guarantee for check in CHECKS.values())]
    for name in reasons:
        if name not in known:
            hint = hint_for(str(name), known) or f" Guarantees are {', '.join(known[len(CHECKS) :])}."
            raise ValueError(f"expected_failed names {name!r}, which is no check.{hint}")
    return {
        check.name: next((entry, reasons[entry]) for entry in (check.name, check.guarantee) if entry in reasons)
        for check in CHECKS.values()
        if {check.name, check.guarantee} & reasons.keys()
    }


def _as_expected(rows: list[Row], expected: Mapping[str, tuple[str, str]]) -> list[Row]:
    """Mark failures that were expected, and say so if none of an entry came."""
    failed = {expected[row.check][0] for row in rows if row.check in expected and row.status == "failed"}
    marked = []
    for row in rows:
        entry, reason = expected.get(row.check, ("", ""))
        if entry and row.status == "failed":
            row = row._replace(status="expected failure", words=f"{reason} ({row.words})")
        elif entry and entry not in failed and row.status == "ok":
            row = row._replace(words=f"{row.words} Passes, so remove {entry!r} from expected_failed.".strip())
        marked.append(row)
    return marked
