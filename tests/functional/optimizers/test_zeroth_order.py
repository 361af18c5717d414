"""Moves along directions that are drawn again from their seed."""

import torch

from lightning_grad.functional import move_along_


def test_a_direction_is_the_same_when_it_is_drawn_again() -> None:
    first, again, other = ([torch.zeros(5, 3), torch.zeros(7)] for _ in range(3))
    move_along_(first, [1.0, 2.0], seed=3)
    torch.randn(10)
    move_along_(again, [torch.tensor(1.0), torch.tensor(2.0)], seed=3)
    move_along_(other, [1.0, 2.0], seed=4)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


def test_it_is_normal_and_leaves_the_global_stream_alone() -> None:
    state = torch.get_rng_state()
    (drawn,) = weights = [torch.zeros(20_000)]
    move_along_(weights, [1.0], seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert abs(drawn.mean().item()) < 0.03
    assert abs(drawn.std().item() - 1) < 0.03
