"""The subjects of the contract suite: each technique with its runs, which are made once and which every test looks at.

``None`` stands for no technique. ``conftest.py`` orders the tests of this folder by technique, so the latest subjects are
all that is kept. Tests read their runs and change nothing.
"""

from __future__ import annotations

import functools
from typing import Any

from lightning_grad.testing.runs import Broken, Run, Watched
from lightning_grad.testing.subject import Subject
from tests.contract.settings import Technique

KEPT = 4  # subjects: the technique at hand, and some that a test has beside it
PLAIN = Subject(None).plain


@functools.lru_cache(maxsize=KEPT)
def subject(technique: Technique) -> Subject:
    """Return the subject of a technique."""
    neutral = technique.build_neutral if technique.has_neutral else str(technique.neutral or "a neighbour is tested")
    return Subject(technique.build, neutral)


def subject_of(technique: Technique | None) -> Subject:
    """Return the subject of a technique, or of none."""
    return PLAIN if technique is None else subject(technique)


def bare(technique: Technique | None, accumulate: int = 1) -> Run:
    """Return the fit with the technique and nothing else."""
    return subject_of(technique).bare(accumulate)


def watched(technique: Technique | None, accumulate: int = 1) -> Watched:
    """Return the fit in which everything is saved and looked at."""
    return subject_of(technique).watched(accumulate)


def broken(technique: Technique | None, how: str = "exception") -> Broken:
    """Return the fit that breaks off."""
    return subject_of(technique).broken(how)


def run(callbacks: list[Any], **arguments: Any) -> Run:
    """Fit a fresh module with callbacks."""
    found: Run = Subject(None).run(callbacks, **arguments)
    return found
