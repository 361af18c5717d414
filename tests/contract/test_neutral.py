"""G1 and G2: nothing to change in the module, and at its neutral setting a technique changes nothing."""

import pytest

from lightning_grad import callbacks
from lightning_grad.testing import assert_identical, fit, make_classifier, state_of
from tests.contract.settings import CANONICAL, TECHNIQUES


def test_every_exported_name_has_an_entry():
    assert set(callbacks.__all__) == {technique.name for technique in TECHNIQUES}


def _run(extra, module=None, **arguments):
    trainer, module = fit(extra, module, **arguments)
    metrics = {key: value for key, value in trainer.callback_metrics.items() if "/" not in key}
    return {**state_of(trainer, module), "metrics": metrics}


@pytest.mark.parametrize(
    ("technique", "accumulate"), [*((t, 1) for t in TECHNIQUES), *((t, 3) for t in CANONICAL)], ids=str
)
def test_neutral_setting_is_bitwise_no_callback(technique, accumulate):
    if not technique.has_neutral:
        assert technique.neutral or technique not in CANONICAL
        return
    plain = _run([], accumulate_grad_batches=accumulate)
    neutral = _run([technique.build_neutral()], accumulate_grad_batches=accumulate)
    assert_identical(plain, neutral)


@pytest.mark.parametrize("technique", [t for t in TECHNIQUES if not t.observes], ids=str)
def test_technique_is_not_neutral_otherwise(technique):
    plain = _run([])
    changed = _run([technique.build()])
    with pytest.raises(AssertionError):
        assert_identical(plain, changed)


def test_two_identical_runs_are_bitwise_the_same():
    assert_identical(_run([], make_classifier()), _run([], make_classifier()))
