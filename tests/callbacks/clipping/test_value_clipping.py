"""Value clipping in a fit: entries, and what is not finite."""

import pytest
import torch

from lightning_grad.callbacks import ValueClipping
from tests.callbacks.clipping import Dictated, Gradients, rows_of, train

NAN, INF = float("nan"), float("inf")


def test_infinity_becomes_the_bound_and_nan_stays() -> None:
    after = Gradients()
    train([ValueClipping(0.5), after], Dictated(), rows_of(torch.tensor([[INF, -INF, NAN, 0.25]])))
    found = after.seen[0]["w"]
    assert found[2].isnan()
    assert found[[0, 1, 3]].tolist() == [0.5, -0.5, 0.25]


def test_each_pattern_has_its_bound_and_no_match_is_left_alone() -> None:
    after = Gradients()
    data = torch.tensor([[3.0, -3.0, 0.1, 0.0] * 3])
    train([ValueClipping({"a": 1.0, "[ab]": 2.0}), after], Dictated(("a", "b", "c")), rows_of(data))
    assert after.seen[0]["a"].tolist() == pytest.approx([1.0, -1.0, 0.1, 0.0])
    assert after.seen[0]["b"].tolist() == pytest.approx([2.0, -2.0, 0.1, 0.0])
    assert torch.equal(after.seen[0]["c"], data[0, :4])


def test_the_share_of_entries_at_the_bound_is_logged() -> None:
    data = torch.tensor([[3.0, -3.0, 0.1, 0.0, 0.1, 0.1, -0.6, 0.2]])
    trainer = train([ValueClipping(0.5)], Dictated(("a", "b")), rows_of(data), log_every_n_steps=1)
    found = {key: value.item() for key, value in trainer.callback_metrics.items()}
    assert found == {"grad/value_clipping/clipped_entries": pytest.approx(3 / 8)}
