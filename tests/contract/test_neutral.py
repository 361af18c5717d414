"""G1 and G2: nothing to change in the module, and at its neutral setting a technique changes nothing."""

import pytest

from lightning_grad import callbacks
from lightning_grad.testing import assert_identical
from tests.contract.recorded import bare, run
from tests.contract.settings import CANONICAL, TECHNIQUES


def test_every_exported_name_has_an_entry():
    assert set(callbacks.__all__) == {technique.name for technique in TECHNIQUES}


def _compared(run):
    """Return what must be bitwise the same, but for the technique's own state and metrics."""
    return {**{key: value for key, value in run.left.items() if key != "callbacks"}, "metrics": run.metrics}


@pytest.mark.parametrize(
    ("technique", "accumulate"), [*((t, 1) for t in TECHNIQUES), *((t, 3) for t in CANONICAL)], ids=str
)
def test_neutral_setting_is_bitwise_no_callback(technique, accumulate):
    if not technique.has_neutral:
        assert technique.neutral or technique not in CANONICAL
        return
    neutral = run([technique.build_neutral()], resumable=True, accumulate_grad_batches=accumulate)
    assert_identical(_compared(bare(None, accumulate)), _compared(neutral))


@pytest.mark.parametrize("technique", [t for t in TECHNIQUES if not t.observes], ids=str)
def test_technique_is_not_neutral_otherwise(technique):
    with pytest.raises(AssertionError):
        assert_identical(_compared(bare(None)), _compared(bare(technique)))


def test_two_identical_runs_are_bitwise_the_same():
    assert_identical(_compared(run([])), _compared(run([])))
