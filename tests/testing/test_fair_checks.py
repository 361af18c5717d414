"""Checks do not blame a callback for what another check finds, or for what every run does. The callbacks are Lightning's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    StochasticWeightAveraging,
    WeightAveraging,
)

from lightning_grad.testing import Row, assert_identical
from lightning_grad.testing.checks import CHECKS
from lightning_grad.testing.subject import Subject

# Advice of Lightning on the callbacks and on small data.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*SWA is currently only supported every epoch.*"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*"),
]


def rows_of(make: Callable[[], Any], *names: str, neutral: Any = None) -> list[Row]:
    """Run single checks on one subject."""
    subject = Subject(make, neutral)
    return [CHECKS[name].of(subject) for name in names]


def test_a_refusal_is_no_failure_of_another_check() -> None:
    names = ("g2_neutral_with_accumulation", "g5_resumes_with_accumulation", "g6_accumulation")
    rows = rows_of(
        lambda: GradientAccumulationScheduler({0: 1, 1: 2}),
        *names,
        neutral=lambda: GradientAccumulationScheduler({0: 1}),
    )
    assert all(row.status != "failed" and row.refused for row in rows), rows


def test_another_number_of_validations_makes_no_copy_differ() -> None:
    (row,) = rows_of(lambda: StochasticWeightAveraging(0.02, 2), "g3_module_copied_in_a_fit_is_plain")
    assert row.status == "ok", row


def test_a_callback_that_does_not_pickle_fails_one_check_only() -> None:
    pickles, copied = rows_of(
        lambda: EMAWeightAveraging(decay=0.8), "g3_pickles_and_copies", "g3_copy_in_a_fit_holds_no_run"
    )
    assert pickles.status == "failed"
    assert copied.status == "not applicable"
    assert "does not pickle" in copied.words
    (holds,) = rows_of(WeightAveraging, "g3_copy_in_a_fit_holds_no_run")
    assert holds.status == "failed"
    assert "AveragedModel" in holds.words


def test_a_missing_metric_is_no_matter_of_dictionaries() -> None:
    dictionaries, missing = rows_of(
        lambda: EarlyStopping("val_loss"), "g1_trains_with_dictionaries", "g6_no_validation"
    )
    assert dictionaries.status == "ok", dictionaries
    assert missing.status == "failed"
    assert "early_stopping.py" in missing.line


def test_the_line_is_where_the_first_error_was_raised() -> None:
    (row,) = rows_of(WeightAveraging, "g7_no_host_sync")
    assert row.status == "failed"
    assert "weight_averaging.py" in row.line


class SetsUpData(pl.Callback):
    """Loads the data before the fit does, as a search for a learning rate does."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        trainer.fit_loop.setup_data()


class LeavesAnAttribute(SetsUpData):
    """Leaves something that no fit leaves."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_fit_start(trainer, pl_module)
        trainer.extra = 1


def test_what_every_fit_sets_up_is_no_trace() -> None:
    name = "g3_no_trace_after_a_failed_start"
    assert rows_of(SetsUpData, name)[0].status == "ok"
    assert "['extra']" in rows_of(LeavesAnAttribute, name)[0].words


def test_names_that_only_one_list_has_are_told() -> None:
    with pytest.raises(AssertionError, match=r"^group: only one side has \['swa_lr'\]$"):
        assert_identical(["lr"], ["lr", "swa_lr"], "group")
    with pytest.raises(AssertionError, match=r"^: 1 entries are not 2$"):
        assert_identical(["lr"], ["lr", "lr"])
