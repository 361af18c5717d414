"""``check_callback`` finds what a callback breaks, and nothing else; it keeps to what it says, and leaves no trace itself."""

from __future__ import annotations

import pytest

from lightning_grad.testing import check_callback
from lightning_grad.testing.checks import CHECKS
from tests.testing.broken import BROKEN, CAREFUL, FIT_FAILS, Broken, rows_of

# They read a fit with the callback alone, and one that is watched and saved. Each broken callback is put through them, and
# through those that it must fail; ``python -m tests.testing.broken`` puts each through all.
CHEAP = (
    "g1_trains_an_unmodified_module",
    "g3_no_trace_after_success",
    "g3_pickles_and_copies",
    "g3_copy_in_a_fit_holds_no_run",
    "g3_module_copied_in_a_fit_is_plain",
    "g4_state_dict_keys_in_a_fit",
    "g4_checkpoint_loads_by_default",
    "g4_other_checkpoints_hold_the_same_weights",
    "g5_saving_changes_nothing",
    "g8_warns_once",
)


def test_every_check_is_failed_by_a_callback() -> None:
    assert set(CHECKS) == {name for broken in (*BROKEN, *FIT_FAILS) for name in broken.fails}


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.make.__name__)
def test_exactly_the_broken_guarantees_fail(broken: Broken) -> None:
    rows = rows_of(broken, {*CHEAP, *broken.fails})
    assert [row.check for row in rows.failed] == [name for name in CHECKS if name in broken.fails], f"\n{rows}"
    assert broken.words in " ".join(row.words for row in rows.failed), f"\n{rows}"


@pytest.mark.parametrize("careful", CAREFUL, ids=lambda careful: careful.make.__name__)
def test_a_careful_callback_passes_every_check(careful: Broken) -> None:
    rows = rows_of(careful)
    assert not rows.failed, f"\n{rows}"
    applied = {row.check for row in rows if row.status == "ok"}
    allowed = {"g2_neutral_is_identity", "g2_neutral_with_accumulation"} if careful.neutral is None else set()
    assert set(CHECKS) - applied <= allowed, f"\n{rows}"


@pytest.mark.parametrize("broken", FIT_FAILS, ids=lambda broken: broken.make.__name__)
def test_if_the_fit_fails_nothing_else_is_tried(broken: Broken) -> None:
    first, *others = check_callback(broken.make)
    assert (first.check, first.status) == (broken.fails[0], "failed")
    assert broken.words in first.words
    assert {row.status for row in others} == {"not applicable"}
