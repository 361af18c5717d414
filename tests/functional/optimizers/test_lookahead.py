"""Slow weights against numbers worked out by hand, and where the weights do not change."""

import torch

from lightning_grad.functional import look_ahead_


def test_hand_worked() -> None:
    weights, slow = [torch.tensor([4.0, -1.0]), torch.zeros(0)], [torch.tensor([0.0, 3.0]), torch.zeros(0)]
    look_ahead_(weights, slow, 0.25)
    assert weights[0].tolist() == slow[0].tolist() == [1.0, 2.0]
    look_ahead_([], [])


def test_the_whole_way_changes_no_weight() -> None:
    weights, slow = [torch.randn(1000) * 1e3], [torch.randn(1000) * 1e-3]
    before = weights[0].clone()
    look_ahead_(weights, slow, 1.0)
    assert torch.equal(weights[0], before)
    assert torch.equal(slow[0], before)


def test_types_may_differ_among_the_weights() -> None:
    kinds = (torch.float32, torch.float64, torch.bfloat16, torch.complex64)
    weights, slow = [torch.ones(2, dtype=kind) for kind in kinds], [torch.zeros(2, dtype=kind) for kind in kinds]
    look_ahead_(weights, slow)
    assert all(torch.equal(weight, torch.full_like(weight, 0.5)) for weight in [*weights, *slow])
