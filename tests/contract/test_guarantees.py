"""G1 to G8: every technique passes the checks that anybody's callback is put through."""

from __future__ import annotations

import re
from typing import Any

import pytest

from lightning_grad import callbacks
from lightning_grad.testing import Row, assert_identical, on_ranks
from lightning_grad.testing.checks import CHECKS, Check
from lightning_grad.testing.checks.g2_neutral import compared
from lightning_grad.testing.checks.g5_resume import resumes_without
from lightning_grad.testing.checks.g6_composition import train_on_this_rank
from lightning_grad.testing.checks.trained import replaces_optimizers
from lightning_grad.testing.subject import Subject
from tests.contract.recorded import PLAIN, bare, subject
from tests.contract.settings import BROAD, CANONICAL, DIFFERENT, TECHNIQUES, Technique

EXPECTED_WARNINGS = re.compile(
    "the best checkpoint"  # these runs monitor val_loss from the first epoch on
    "|this fit has no validation"
    "|smaller than the logging interval"
    "|LeafSpec"  # Lightning about its own use of torch
    "|Be aware that when using `ckpt_path`"
    "|Detected call of `lr_scheduler.step"  # the optimizer rightly skips its first step
    "|should not be instantiated"  # torch about its own tracing
    "|The .grad attribute of a Tensor that is not a leaf"
)
ON_SHARED_RANKS = "g6_two_ranks"  # all techniques train after one fork
COMPILED = {"g6_compiled_submodules"}
FROZEN = "g6_frozen_parameters"
NARROW = {
    "g1_trains_an_unmodified_module",
    "g2_neutral_is_identity",
    "g3_no_trace_after_success",
    "g3_copy_in_a_fit_holds_no_run",
    "g3_module_copied_in_a_fit_is_plain",
    "g4_state_dict_keys_in_a_fit",
    "g4_checkpoint_computes_what_was_validated",
    "g4_checkpoint_loads_by_default",
    "g4_other_checkpoints_hold_the_same_weights",
    "g5_saving_changes_nothing",
    "g5_resumes_within_an_epoch",
    "g5_resumes_after_exceptions",
    "g7_no_host_sync",
    "g8_warns_once",
    "g8_yaml_round_trip",
}
"""What another setting of a mechanism that a neighbour covers could break, and what reads the same runs."""
OF_THE_FIRST = {
    "g2_neutral_with_accumulation",
    "g4_a_run_without_it_continues",
    "g4_continues_a_run_without_it",
    "g5_resumes_at_an_epochs_end",
    "g5_resumes_with_accumulation",
    "g6_manual_optimization_with_two_optimizers",
    "g6_optimizer_without_second_moment",
    FROZEN,
}
"""What the first setting of a class is held to, for all of them."""


def is_held_to(technique: Technique, check: Check) -> bool:
    if check.name == ON_SHARED_RANKS:
        return False
    if check.name in COMPILED:
        return technique.compile
    if check.name == FROZEN and "include" in technique.arguments:
        return False  # it names weights that the check freezes
    if check.name in OF_THE_FIRST:
        return technique in CANONICAL or bool(check.feature and technique in DIFFERENT)
    return technique.broad or check.name in NARROW


HELD_TO = [(technique, check) for technique in TECHNIQUES for check in CHECKS.values() if is_held_to(technique, check)]


@pytest.mark.parametrize(("technique", "check"), HELD_TO, ids=str)
def test_guarantee(technique: Technique, check: Check) -> None:
    row = check.of(subject(technique))
    assert_as_declared(technique, check, row)
    warned, subject(technique).warned[:] = subject(technique).warned[:], []
    assert not [text for text in warned if not EXPECTED_WARNINGS.search(text)]


def assert_as_declared(technique: Technique, check: Check, row: Row) -> None:
    """Raise unless a check is passed, refused where ``compatibility`` says so, or does not apply for a known reason."""
    if check.guarantee == "g2" and not technique.has_neutral:
        assert row.status == "not applicable"
        assert technique.neutral or technique not in CANONICAL
        return
    if check.name == "g4_a_run_without_it_continues" and replaces_optimizers(subject(technique)):
        assert row.status == "not applicable"
        return
    if technique.build().why_not_portable and row.words == technique.build().why_not_portable:
        assert row.status == "not applicable"
        return
    if check.guarantee == "g7" and hasattr(technique.build(), "syncs_per_step"):
        assert row.status == "not applicable"
        assert len(technique.build().syncs_per_step) > 20, "what it waits for, and why"
        return
    if "accumulation" in check.name and technique.works_with.accumulation.is_no and not check.feature:
        assert "accumulate_grad_batches" in row.words
        return
    assert row.status == "ok", f"{row.words} {row.line}"
    if check.guarantee in ("g5", "g7"):
        assert not row.words, "all of it was compared"
    if check.name == "g6_no_validation" and row.refused:
        assert "validation" in row.words
        return
    assert row.refused == bool(check.feature and technique.works_with.answers[check.feature].is_no), row.words


@pytest.mark.parametrize("technique", [t for t in CANONICAL if "include" in t.arguments], ids=str)
def test_frozen_weights_that_are_not_named_stay_what_they_are(technique: Technique) -> None:
    row = CHECKS[FROZEN].of(Subject(lambda: technique.build(include=["hidden"])))
    assert (row.status, row.refused) == ("ok", False), row.words


def test_two_ranks_agree() -> None:
    first, second = on_ranks(2, lambda: {str(technique): train_on_this_rank(subject(technique)) for technique in BROAD})
    assert first.keys() == {str(technique) for technique in BROAD}
    assert not [found for found in first.values() if isinstance(found, str)], "none refuses two ranks"
    assert_identical(first, second)


def test_every_exported_name_has_an_entry() -> None:
    assert set(callbacks.__all__) == {technique.name for technique in TECHNIQUES}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_run_without_a_technique_resumes_from_every_step(accumulate: int) -> None:
    """The premise: a check of G5 skips the steps from which the plain run does not resume."""
    for index in range(len(PLAIN.watched(accumulate).saved("steps")) - 1):
        assert resumes_without(PLAIN, "steps", index, accumulate)


@pytest.mark.parametrize("technique", TECHNIQUES, ids=str)
def test_metrics_of_a_technique_have_a_namespace(technique: Technique) -> None:
    assert all("/" in key for key in bare(technique).metrics.keys() - bare(None).metrics.keys())


@pytest.mark.parametrize("technique", [t for t in TECHNIQUES if not t.observes], ids=str)
def test_technique_is_not_neutral_otherwise(technique: Any) -> None:
    plain = bare(None)
    with pytest.raises(AssertionError):
        assert_identical(compared(plain, plain), compared(bare(technique), plain))
