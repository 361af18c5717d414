"""The move of SAM and ASAM, against its equation, and where there is nothing to move along."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_grad.functional import ascend_


def drawn(dtype: Any = torch.float64, scale: float = 1.0) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 4), (4,), (2, 3, 3, 3), ()]
    weights, gradients = ([torch.randn(s, generator=generator).to(dtype) for s in shapes] for _ in range(2))
    return weights, [gradient * scale for gradient in gradients]


def expected(weights: Any, gradients: Any, rho: Any, adaptive: bool, eta: float) -> tuple[list[Tensor], Tensor]:
    stretch = [w.abs() + eta if adaptive and w.ndim > 1 else torch.ones_like(w) for w in weights]
    norm = torch.cat([(t * g).flatten() for t, g in zip(stretch, gradients, strict=True)]).norm()
    lengths = rho if isinstance(rho, list) else [rho] * len(weights)
    moved = [w + r * t * t * g / norm for w, t, g, r in zip(weights, stretch, gradients, lengths, strict=True)]
    return moved, norm


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("rho", [0.05, 2.0, [0.1, 0.0, 0.1, 3.0]])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_it_is_the_equation(adaptive: bool, rho: Any, scale: float) -> None:
    weights, gradients = drawn(scale=scale)
    moved, norm = expected(weights, gradients, rho, adaptive, 0.01)
    moves = [after - before for after, before in zip(moved, weights, strict=True)]
    assert ascend_(weights, gradients, rho, adaptive) == pytest.approx(norm.item(), rel=1e-12)
    torch.testing.assert_close(weights, moved, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradients, moves, rtol=1e-7, atol=1e-14)


def test_the_move_of_asam_does_not_depend_on_the_scale_of_a_weight() -> None:
    """Two layers whose scales cancel are one function, and move to one function."""
    (w,), (g,) = ([tensors[0]] for tensors in drawn())
    small, large = w / 8, w * 8
    ascend_([small], [g * 8], 0.5, adaptive=True, eta=1e-12)
    ascend_([large], [g / 8], 0.5, adaptive=True, eta=1e-12)
    torch.testing.assert_close(small * 64, large)
    small, large = w / 8, w * 8
    ascend_([small], [g * 8], 0.5)
    ascend_([large], [g / 8], 0.5)
    assert not torch.allclose(small * 64, large), "that of SAM does"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0])
@pytest.mark.parametrize("adaptive", [False, True])
def test_without_a_direction_nothing_moves(bad: float, adaptive: bool) -> None:
    weights, gradients = drawn()
    before = [weight.clone() for weight in weights]
    for gradient in gradients:
        gradient.fill_(bad)
    ascend_(weights, gradients, 0.5, adaptive)
    assert all(torch.equal(a, b) for a, b in zip(weights, before, strict=True))


def test_half_precision_does_not_overflow_in_the_norm() -> None:
    weights, gradients = drawn(torch.float16, scale=300.0)
    norm = ascend_(weights, gradients, 1.0)
    assert norm.dtype == torch.float32
    assert torch.cat([g.flatten() for g in gradients]).float().norm() == pytest.approx(1.0, rel=1e-2)


def test_complex_weights_move_up_too() -> None:
    w = torch.tensor([1.0 + 1j, 2.0 - 3j], requires_grad=True)
    loss = w.abs().square().sum()
    loss.backward()
    ascend_([w], [w.grad], 0.1)
    assert w.abs().square().sum() > loss
