"""G1: the callback trains a module that was not written for it."""

from __future__ import annotations

from lightning_grad.testing.checks.registry import check
from lightning_grad.testing.checks.trained import assert_trained, works_or_refuses
from lightning_grad.testing.subject import Subject


@check("quick")
def g1_trains_an_unmodified_module(subject: Subject) -> None:
    """A fit with only the callback ends with finite weights."""
    assert_trained(subject.bare(), subject.plain.bare())


@check("full")
def g1_trains_with_dictionaries(subject: Subject) -> str:
    """The callback works or refuses if batches and results of a step are dictionaries."""
    return works_or_refuses(subject.on("dictionaries"))
