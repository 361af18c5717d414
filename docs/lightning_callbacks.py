"""Put Lightning's own callbacks through ``check_callback``, and write the tables of ``docs/testing_callbacks.md``.

``python docs/lightning_callbacks.py`` takes about two minutes. ``make docs`` does not run it: run it again when a check or the
version of Lightning changes. A test compares the callbacks and the checks of the tables with those of the code.
"""

from __future__ import annotations

import os
import platform
import re
import textwrap
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import lightning
import torch
from exported import ROOT, write_table
from lightning.pytorch import LightningModule, callbacks
from torch import Tensor, nn

from lightning_grad.testing import CLASSES, TOKENS, WIDTH, Rows, check_callback, loaders
from lightning_grad.testing.checks import CHECKS

PAGE = ROOT / "docs/testing_callbacks.md"
PART = re.compile(r"<!-- measured: (\w+) -->\n(.*?)<!-- end -->", re.DOTALL)
GUARANTEES = list(dict.fromkeys(check.guarantee.upper() for check in CHECKS.values()))
_LONG = 150


class Perceptron(LightningModule):
    """A small network with a learning rate of its own and no attention, which two of the callbacks need."""

    def __init__(self) -> None:
        super().__init__()
        self.lr = 0.01
        self.hidden = nn.Linear(TOKENS * WIDTH, 32)
        self.norm = nn.BatchNorm1d(32)
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.norm(self.hidden(x.flatten(1))).relu())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def perceptron() -> Any:
    """Return the module with its loaders, which can resume within an epoch."""
    return Perceptron(), *loaders(resumable=True)


def take_current(averaged: Tensor, current: Tensor, num_averaged: Tensor) -> Tensor:
    """Return the current weights as their average."""
    return current


@dataclass(frozen=True)
class Case:
    """A callback of Lightning, at a setting that does something and at one that should change nothing."""

    callback: str
    arguments: Mapping[str, Any]
    neutral: Mapping[str, Any]
    modules: Mapping[str, Any] | None = None

    def build(self, arguments: Mapping[str, Any]) -> Any:
        """Build the callback."""
        return getattr(callbacks, self.callback)(**arguments)

    def call(self, arguments: Mapping[str, Any]) -> str:
        """Return the call that builds the callback, as code."""
        words = (f"{name}={getattr(value, '__name__', repr(value))}" for name, value in arguments.items())
        return f"{self.callback}({', '.join(words)})"

    @property
    def module(self) -> str:
        """The name of the module."""
        return "the reference module" if self.modules is None else ", ".join(f"`{name}`" for name in self.modules)

    @property
    def title(self) -> str:
        """The name of the callback, with that of the module unless it is the reference module."""
        return f"`{self.callback}`" if self.modules is None else f"`{self.callback}` on {self.module}"


_EARLY = {"monitor": "val_loss", "min_delta": 0.5}
_SWA = {"swa_lrs": 0.02, "annealing_epochs": 2}
_PRUNING = {"pruning_fn": "l1_unstructured"}
_FINDER = {"min_lr": 1e-4, "max_lr": 0.1, "num_training_steps": 20}
_OWN = {"Perceptron": perceptron}

CASES = (
    Case("EarlyStopping", {**_EARLY, "patience": 2}, {**_EARLY, "patience": 1000}),
    Case("StochasticWeightAveraging", {**_SWA, "swa_epoch_start": 2}, {**_SWA, "swa_epoch_start": 1000}),
    Case("WeightAveraging", {}, {"avg_fn": take_current}),
    Case("EMAWeightAveraging", {"decay": 0.8}, {"decay": 0.0}),
    Case("GradientAccumulationScheduler", {"scheduling": {0: 1, 1: 2}}, {"scheduling": {0: 1}}),
    Case("ModelPruning", {**_PRUNING, "amount": 0.2}, {**_PRUNING, "apply_pruning": False}),
    Case("ModelPruning", {**_PRUNING, "amount": 0.2}, {**_PRUNING, "apply_pruning": False}, _OWN),
    Case("LearningRateFinder", _FINDER, {**_FINDER, "update_attr": False}),
    Case("LearningRateFinder", _FINDER, {**_FINDER, "update_attr": False}, _OWN),
)


@dataclass(frozen=True)
class Outcome:
    """The rows of a case, and the seconds of processor time that they took."""

    case: Case
    rows: Rows
    seconds: float


def examine(case: Case) -> Outcome:
    """Run all checks of a case."""
    before = os.times()
    rows = check_callback(
        lambda: case.build(case.arguments), lambda: case.build(case.neutral), level="full", modules=case.modules
    )
    after = os.times()
    return Outcome(case, rows, sum(after[:4]) - sum(before[:4]))


def write(outcomes: list[Outcome]) -> dict[str, str]:
    """Return the measured parts of the page: a summary, and the failures of each callback."""
    by_callback: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        by_callback.setdefault(outcome.case.callback, []).append(outcome)
    return {"summary": _summary(outcomes)} | {name: _section(group) for name, group in by_callback.items()}


def _summary(outcomes: list[Outcome]) -> str:
    versions = f"torch {torch.__version__}, lightning {lightning.__version__}, Python {platform.python_version()}"
    about = f"{len(CHECKS)} checks at the full level with {versions}. Time is processor time in one thread."
    return f"{about}\n\n{write_table(heads(), [_row(outcome) for outcome in outcomes])}"


def heads() -> tuple[str, ...]:
    """Return the head of the summary: the guarantees, with their numbers of checks."""
    counts = Counter(check.guarantee.upper() for check in CHECKS.values())
    return ("Callback", *(f"{name} ({counts[name]})" for name in GUARANTEES), "Time")


def _row(outcome: Outcome) -> tuple[str, ...]:
    cells = []
    for guarantee in GUARANTEES:
        statuses = [row.status for row in outcome.rows if row.guarantee == guarantee]
        failed = statuses.count("failed")
        cells.append(f"{failed} failed" if failed else "ok" if "ok" in statuses else "n/a")
    return outcome.case.title, *cells, f"{outcome.seconds:.0f} s"


def _section(outcomes: list[Outcome]) -> str:
    case = outcomes[0].case
    settings = f"Built as `{case.call(case.arguments)}`; neutral: `{case.call(case.neutral)}`."
    parts = [textwrap.fill(settings, 120, break_long_words=False) + "\n"]
    for outcome in outcomes:
        if len(outcomes) > 1:
            parts.append(f"On {outcome.case.module}:\n")
        parts.append(write_table(("Check", "Found"), _failures(outcome)))
    return "\n".join(parts)


def _failures(outcome: Outcome) -> list[tuple[str, str]]:
    """Return a row for each finding; checks that found the same share it."""
    names: dict[tuple[str, str], list[str]] = {}
    for row in outcome.rows.failed:
        names.setdefault((row.words, row.line), []).append(f"`{row.check.partition('[')[0]}`")
    return [(", ".join(checks), _found(*found)) for found, checks in names.items()]


def _found(words: str, line: str) -> str:
    """Return a finding in Markdown, with the path below site-packages."""
    short = re.sub(r"([_*<>`|\[\]])", r"\\\1", textwrap.shorten(words, _LONG, placeholder=" ..."))
    place = re.sub(r".*/site-packages/", "", line)
    return f"{short} (`{place}`)" if place else short


def fill(text: str, parts: Mapping[str, str]) -> str:
    """Return the page with new measured parts."""
    missing = parts.keys() - {part[1] for part in PART.finditer(text)}
    if missing:
        raise ValueError(f"{PAGE.name} has no lines <!-- measured: {missing.pop()} --> and <!-- end -->. Add them.")
    return PART.sub(lambda part: f"<!-- measured: {part[1]} -->\n\n{parts[part[1]]}\n<!-- end -->", text)


def outdated(text: str) -> list[str]:
    """Return what in the page does not fit the cases and checks of today; it does not run them again."""
    parts = dict(PART.findall(text))
    summary = parts.get("summary", "")
    table = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in summary.splitlines() if "|" in line]
    unknown = {name for part in parts.values() for name in re.findall(r"`(g\d_\w+)`", part)} - CHECKS.keys()
    calls = {case.call(arguments) for case in CASES for arguments in (case.arguments, case.neutral)}
    answers = (
        ("parts", [*parts] == ["summary", *dict.fromkeys(case.callback for case in CASES)]),
        ("number of checks", summary.lstrip().startswith(f"{len(CHECKS)} checks ")),
        ("versions", bool(re.search(r"torch \d+\.\d+\S*, lightning \d+\.\d+\S*, Python \d", summary))),
        ("head of the summary", table[:1] == [heads()]),
        ("callbacks", [row[0] for row in table[2:]] == [case.title for case in CASES]),
        ("names of checks", not unknown),
        ("arguments", all(call in " ".join("".join(parts.values()).split()) for call in calls)),
    )
    return [what for what, holds in answers if not holds]


def main() -> None:
    """Examine all callbacks, and write the tables into the page."""
    outcomes = []
    for case in CASES:
        outcomes.append(examine(case))
        print(f"{case.title}: {outcomes[-1].rows.summary()}", flush=True)
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8"), write(outcomes)), encoding="utf-8")


if __name__ == "__main__":
    main()
