"""The runner: trains what the plan of a claim misses, stores each result, and continues where it stopped."""

from __future__ import annotations

import math
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from lightning.pytorch import seed_everything

from studies.claim import Claim, Result, Run
from studies.common import Ticker, hush
from studies.plan import Plan, describe, minutes
from studies.repeats import differences, standing
from studies.report import print_estimate
from studies.results import Line, Store, line_of, origin_of

R = TypeVar("R", bound=Result)
PAUSE = 1.0  # seconds between looks at what another process trains


@dataclass
class Study:
    """A claim to run: its seeds, where its results are, and how long it may take.

    Args:
        claim: The claim.
        seeds: Seeds to report.
        store: Where results are read and written.
        fresh: Ignore results of other code, versions or hardware.
        clock: Function that returns the time in seconds.
    """

    claim: Claim[Any]
    seeds: Sequence[int]
    store: Store
    fresh: bool = False
    clock: Callable[[], float] = time.monotonic
    _expected: float = 0.0
    _taken: float = 0.0

    def plan(self) -> Plan:
        """Return what the results so far leave to do."""
        origin = origin_of(self.claim)
        lines = self.store.read(self.claim, origin if self.fresh else None)
        return Plan(self.claim, self.seeds, lines, origin, self._taken / self._expected if self._expected else 1.0)

    def run(self, deadline: float = math.inf) -> int:
        """Run what is missing, until the deadline if there is one, and return the number of missing trainings."""
        hush()
        told = False
        while (plan := self.plan()).missing:
            for run in plan.ready:
                # Stop, do not look for a shorter training: the fast arms would get ahead of the slow ones.
                if not self.fits(run, plan, deadline):
                    return plan.missing
                if self.attempt(run, plan):
                    break
            else:
                if not told:
                    print("Waiting for another process, which runs the rest ...", flush=True)
                told = True
                time.sleep(PAUSE)
                if self.clock() > deadline:
                    return plan.missing
        return 0

    def verify(self) -> bool:
        """Train one result of each arm again if other code made it, and return whether all numbers are the same."""
        hush()
        plan = self.plan()
        stands = standing(self.store.history(self.claim), plan.origin.code)
        others = [line for line in plan.reported if line.origin.code != plan.origin.code]
        firsts = {(line.arm, line.origin.code): line for line in reversed(others)}
        found = [self.repeat(line, plan) for place, line in reversed(firsts.items()) if place not in stands]
        return not any(found)

    def repeat(self, old: Line, plan: Plan) -> list[str]:
        """Train a result once more, and return what is different."""
        if old.origin.place != plan.origin.place:
            print(f"{describe(old.key)}: made on other hardware or with other versions, so it cannot be compared.")
            return []
        start = self.clock()
        result = train(self.claim, old.key, "once more")
        new = line_of(self.claim, result, self.clock() - start, plan.origin)
        self.store.append(self.claim, new)
        found = differences(old, new)
        print(f"{describe(old.key)}: {'; '.join(found) or 'the same numbers'}.", flush=True)
        return found

    def fits(self, run: Run, plan: Plan, deadline: float) -> bool:
        """Return True if a training probably ends before the deadline."""
        return self.clock() + plan.seconds(run) <= deadline

    def starts(self, deadline: float) -> bool:
        """Return True if something is missing, and the next training fits or another process has it."""
        plan = self.plan()
        return bool(plan.missing) and all(self.fits(run, plan, deadline) for run in plan.ready[:1])

    def attempt(self, run: Run, plan: Plan) -> bool:
        """Run one training and store its result. Return False if another process has it."""
        with self.store.reserve(self.claim, run) as free:
            if not free or run not in self.plan().ready:
                return False
            start = self.clock()
            note = f"{plan.total - plan.missing + 1} of {plan.total}, {minutes(plan.left)} left"
            result = train(self.claim, run, note)
            taken = self.clock() - start
            self.store.append(self.claim, line_of(self.claim, result, taken, plan.origin))
        self._expected, self._taken = self._expected + plan.seconds(run) / plan.pace, self._taken + taken
        return True


def train(claim: Claim[R], run: Run, note: str) -> R:
    """Set the seeds, run one training, and show its progress."""
    seed_everything(run.seed, verbose=False)
    try:
        return claim.train(replace(run, show=Ticker(describe(run), note)))
    except SystemExit as stop:  # after Ctrl-C, a fit of Lightning ignores the signal from then on, and exits
        signal.signal(signal.SIGINT, signal.default_int_handler)
        raise KeyboardInterrupt from stop
    except Exception as error:
        error.add_note(f"The training was: {claim.name}, {describe(run)}.")
        raise


def train_all(claim: Claim[R], seeds: int) -> list[R]:
    """Run a claim without stored results, each arm at the first rate, and return the results."""
    hush()
    claim.output.mkdir(parents=True, exist_ok=True)
    rate = claim.rates[0] if claim.rates else None
    runs = [Run(arm, seed, rate) for seed in range(seeds) for arm in claim.arms]
    return [train(claim, run, f"{number} of {len(runs)}") for number, run in enumerate(runs, start=1)]


def run_claims(studies: Sequence[Study], budget: float | None) -> list[str]:
    """Run several claims, and return the names of those that failed.

    Args:
        studies: The claims to run.
        budget: Minutes for all together, those first that need the least; ``None`` for no limit.
    """
    print_estimate([study.plan() for study in studies])
    failed: list[str] = []
    deadline = math.inf
    if budget is not None:  # what needs the least time comes first, so as many claims as possible are decided
        deadline = time.monotonic() + 60 * budget
        studies = sorted(studies, key=lambda study: study.plan().left)
    for study in studies:
        name = study.claim.name
        if not study.starts(deadline):
            continue
        print(f"\n{name}:", flush=True)
        try:
            study.run(deadline)
        except Exception:
            print(f"{name} failed:\n{traceback.format_exc()}", file=sys.stderr)
            failed.append(name)
    for study in studies:
        if study.claim.name not in failed and (missing := study.plan().missing):
            print(f"{study.claim.name}: the budget ends before {missing} trainings. The same command continues.")
    return failed


def verify_claims(studies: Sequence[Study]) -> list[str]:
    """Train some results of other code again, and return the names of the claims whose numbers are not the same."""
    changed = []
    for study in studies:
        print(f"\n{study.claim.name}:", flush=True)
        if not study.verify():
            changed.append(study.claim.name)
            print(f"{study.claim.name}: the current code gives other numbers. --fresh trains all of them again.")
    return changed
