"""AutoClip in a fit: the percentile of the norms, and norms that are not finite."""

import numpy as np
import pytest
import torch

from lightning_grad.callbacks import AutoClip
from lightning_grad.testing import assert_identical
from tests.callbacks.clipping import (
    Dictated,
    Gradients,
    Regression,
    Spoil,
    pairs,
    rows_of,
    rows_with_norms,
    small_net,
    train,
)

NAN, INF = float("nan"), float("inf")
NORMS = [3.0, 1.0, 2.0, 8.0, 0.5, 2.5, 1.5, 4.0]


@pytest.mark.parametrize("percentile", [0.0, 10.0, 50.0, 100.0])
@pytest.mark.parametrize("window", [3, 100])
def test_gradients_are_clipped_to_the_percentile_of_the_last_norms(window: int, percentile: float) -> None:
    after = Gradients()
    train([AutoClip(percentile, window), after], Dictated(), rows_of(rows_with_norms(NORMS)))
    seen = [NORMS[max(0, t + 1 - window) : t + 1] for t in range(len(NORMS))]
    expected = [min(norm, np.percentile(last, percentile)) for norm, last in zip(NORMS, seen, strict=True)]
    assert after.norms() == pytest.approx(expected, rel=1e-5)


def test_the_hundredth_percentile_changes_no_bit() -> None:
    before, after = Gradients(), Gradients()
    train([before, AutoClip(100.0), after], Dictated(), rows_of(rows_with_norms(NORMS)))
    assert_identical(before.seen, after.seen)


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("position", [0, 1, 3, 6], ids=["first", "second", "ring full", "ring written again"])
@pytest.mark.parametrize("by", ["batch", "gradient"])
def test_a_step_that_is_not_finite_is_as_if_it_had_not_come(by: str, position: int, bad: float) -> None:
    rows = rows_with_norms(NORMS)
    expected, finite = Gradients(), AutoClip(25.0, window=3)
    train([finite, expected], Dictated(), rows_of(rows))
    spoilt = torch.full((1, rows.shape[1]), bad if by == "batch" else 1.0)
    found, callback = Gradients(), AutoClip(25.0, window=3)
    callbacks = [Spoil({position: bad}), callback, found] if by == "gradient" else [callback, found]
    train(callbacks, Dictated(), rows_of(torch.cat([rows[:position], spoilt, rows[position:]])))
    assert not found.seen.pop(position)["w"].isfinite().any(), "it is left for SkipNonFinite"
    assert_identical(found.seen, expected.seen)
    state, other = (c.state_dict()["optimizers"]["0"]["states"][""] for c in (callback, finite))
    assert_identical(state, other)
    assert state["count"].item() == len(NORMS)


def test_each_pattern_has_norms_of_its_own() -> None:
    before, after = Gradients(), Gradients()
    callbacks = [before, AutoClip({"net.0": 0.0, "*": 50.0}), after]
    train(callbacks, Regression(small_net()), pairs())
    for names, percentile in ((("net.0.weight", "net.0.bias"), 0.0), (("net.2.weight", "net.2.bias"), 50.0)):
        raw = before.norms(*names)
        expected = [min(norm, np.percentile(raw[: t + 1], percentile)) for t, norm in enumerate(raw)]
        assert after.norms(*names) == pytest.approx(expected, rel=1e-4)
