"""Norms against autograd, draws against their probabilities, and the weighted gradient against that of all samples."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_grad.functional import LossCapture, draw_samples, sampling_probabilities, sampling_weights
from lightning_grad.functional.data_pruning.gradient_norm_sampling import (
    loss_gradient_bounds,
    output_gradient_norms,
    variance_ratio,
)

NAN, INF = math.nan, math.inf
BATCH, CLASSES, DRAWS = 16, 4, 4000


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


CLASS = torch.tensor([0, 3, 1, 1, 2])
IGNORED = torch.tensor([[0, 3, -100], [1, -100, -100], [2, 2, 1], [-100, -100, -100], [3, 0, 0]])
BINARY = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0], dtype=torch.float64)
# Each a loss of the network's output, whose gradient by that output is taken by autograd.
LOSSES: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "cross_entropy": ((5, 4), lambda z: F.cross_entropy(z, CLASS)),
    "class weights": ((5, 4), lambda z: F.cross_entropy(z, CLASS, random(4).abs())),
    "summed": ((5, 4), lambda z: F.cross_entropy(z, CLASS, reduction="sum")),
    "probabilities": ((5, 4), lambda z: F.cross_entropy(z, random(5, 4).softmax(1))),
    "log_softmax and nll_loss": ((5, 4), lambda z: F.nll_loss(z.log_softmax(1), CLASS)),
    "log_softmax and kl_div": (
        (5, 4),
        lambda z: F.kl_div(z.log_softmax(1), random(5, 4, seed=1).softmax(1), reduction="batchmean"),
    ),
    "binary, with logits": ((5,), lambda z: F.binary_cross_entropy_with_logits(z, BINARY)),
    "sigmoid and binary": ((5,), lambda z: F.binary_cross_entropy(z.sigmoid(), BINARY)),
    "labels": ((5, 3), lambda z: F.binary_cross_entropy_with_logits(z, (random(5, 3, seed=2) > 0).double())),
    "squared": ((5, 3), lambda z: F.mse_loss(z, random(5, 3, seed=2))),
    "absolute": ((5, 3), lambda z: F.l1_loss(z, random(5, 3, seed=2))),
    "huber": ((5, 3), lambda z: F.huber_loss(z, random(5, 3, seed=2), delta=0.5)),
    "poisson": ((5,), lambda z: F.poisson_nll_loss(z, BINARY)),
    "gaussian": ((5, 2), lambda z: F.gaussian_nll_loss(z, random(5, 2, seed=2), random(5, 2, seed=3).abs())),
}


def norms_of(shape: tuple[int, ...], loss: Callable[[Tensor], Tensor], samples: int | None = None) -> tuple[Any, Any]:
    """Return the norms, and those of the gradient of the batch by the rows of the output."""
    output = random(*shape, seed=4).requires_grad_()
    with LossCapture(samples) as capture:
        value = loss(output)
    (gradient,) = torch.autograd.grad(value, output)
    return output_gradient_norms(capture.only()).double(), gradient.flatten(1).norm(dim=1) if shape[
        1:
    ] else gradient.abs()


@pytest.mark.parametrize("kind", LOSSES)
def test_norms_are_those_of_the_gradient_by_the_output(kind: str) -> None:
    found, expected = norms_of(*LOSSES[kind])
    torch.testing.assert_close(found / found.sum(), expected / expected.sum(), rtol=1e-5, atol=1e-7)


def test_norms_of_positions_are_added_up() -> None:
    """The gradients of ignored positions are zero, and that of a sample is at most the sum over its positions."""
    logits = random(5, 4, 3, seed=4).requires_grad_()
    with LossCapture() as capture:
        loss = F.cross_entropy(logits, IGNORED)
    (gradient,) = torch.autograd.grad(loss, logits)
    found = output_gradient_norms(capture.only()).double()
    expected = gradient.norm(dim=1).sum(1) * (IGNORED >= 0).sum()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert found[3] == 0.0


def test_an_output_without_rows_of_samples_falls_back_to_the_loss() -> None:
    shift = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    target = random(5)
    with LossCapture() as capture, pytest.warns(UserWarning, match="broadcasting"):
        F.mse_loss(shift, target)
    torch.testing.assert_close(output_gradient_norms(capture.only()), target.abs())


def test_the_bound_by_the_loss() -> None:
    losses = torch.tensor([0.0, 4.0, NAN, 2.25, INF])
    assert loss_gradient_bounds(losses).tolist() == pytest.approx([0.0, 2.0, NAN, 1.5, INF], nan_ok=True)
    assert loss_gradient_bounds(torch.tensor([-2.0, 2.0, NAN])).tolist() == pytest.approx([0.0, 2.0, NAN], nan_ok=True)
    assert loss_gradient_bounds(torch.empty(0)).tolist() == []
    x, residual = random(40, 3, seed=1), random(40, seed=2)
    gradients = 2 * residual[:, None] * F.normalize(x)  # of squared errors of a linear model with inputs of length 1
    torch.testing.assert_close(gradients.norm(dim=1), 2 * loss_gradient_bounds(residual.square()))


def test_probabilities() -> None:
    norms = torch.tensor([1.0, 3.0, NAN, 0.0, INF])  # the unknown ones count as 4 / 3
    for smooth in (0.0, 0.3, 1.0):
        expected = [smooth * v / (4 + 8 / 3) + (1 - smooth) / 5 for v in (1.0, 3.0, 4 / 3, 0.0, 4 / 3)]
        assert sampling_probabilities(norms, smooth).tolist() == pytest.approx(expected)
    for unknown in ([0.0, 0.0], [NAN, INF], [NAN, 0.0]):
        assert sampling_probabilities(torch.tensor(unknown), 1.0).tolist() == [0.5, 0.5]


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match=r"one entry for each sample, \(n,\); got shape \(2, 2\)"):
        sampling_probabilities(torch.zeros(2, 2), 0.5)
    with pytest.raises(ValueError, match=r"smooth must be from 0 to 1; got 1\.5"):
        sampling_probabilities(torch.ones(2), 1.5)
    with pytest.raises(ValueError, match="norms must be at least 0; got -1"):
        sampling_probabilities(torch.tensor([-1.0, 2.0]), 0.5)


def test_draws_follow_their_probabilities() -> None:
    p = torch.tensor([0.0, 0.1, 0.6, 0.3, 0.0])
    counts = torch.bincount(draw_samples(p, 20_000, generator()), minlength=5)
    assert counts[[0, 4]].tolist() == [0, 0]
    assert ((counts / 20_000 - p).abs() <= 3 * (p * (1 - p) / 20_000).sqrt()).all()
    assert torch.equal(draw_samples(p, 9, generator(3)), draw_samples(p, 9, generator(3)))
    assert not torch.equal(draw_samples(p, 9, generator(3)), draw_samples(p, 9, generator(4)))


def skewed() -> Tensor:
    """Return gradients of 400 samples, of which few are large."""
    return random(400, 5) * torch.logspace(-2, 1, 400, dtype=torch.float64)[:, None]


def estimates(smooth: float, weighted: bool = True) -> tuple[Tensor, Tensor]:
    """Return means over drawn batches, and the norm of the gradient of each sample."""
    gradients = skewed()
    p = sampling_probabilities(gradients.norm(dim=1), smooth)
    weights = sampling_weights(p).double() if weighted else torch.ones(400)
    drawn = draw_samples(p, BATCH * DRAWS, generator(1)).reshape(DRAWS, BATCH)
    return (weights[drawn][..., None] * gradients[drawn]).mean(1), p


def errors(found: Tensor) -> Tensor:
    """Return the distance to the mean over all samples, in standard errors."""
    return (found.mean(0) - skewed().mean(0)).abs() / (found.std(0) / DRAWS**0.5)


@pytest.mark.parametrize("smooth", [0.0, 0.5, 0.9, 1.0])
def test_the_weighted_gradient_is_unbiased(smooth: float) -> None:
    found, p = estimates(smooth)
    assert errors(found).square().mean().sqrt() < 2.0
    torch.testing.assert_close(
        (p * sampling_weights(p))[:, None].mul(skewed()).sum(0), skewed().mean(0), rtol=1e-6, atol=0
    )
    assert (p * sampling_weights(p)).sum().item() == pytest.approx(1.0), "the mean weight of a draw"
    assert sampling_weights(p).max() <= 1.0 / max(1.0 - smooth, 1e-9) * (1 + 1e-6)


def test_without_weights_it_is_biased() -> None:
    assert errors(estimates(0.9, weighted=False)[0]).max() > 10.0


def test_the_variance_is_lower_than_that_of_uniform_draws() -> None:
    uniform, half, full = (estimates(smooth)[0].var(0).sum() for smooth in (0.0, 0.5, 0.9))
    assert half < 0.6 * uniform
    assert full < half


def test_the_ratio_of_variances() -> None:
    norms = skewed().norm(dim=1)
    for smooth in (0.0, 0.5, 0.9):
        p = sampling_probabilities(norms, smooth)
        squares = sampling_weights(p).double()[:, None].mul(skewed()).square().sum(1)
        expected = (p * squares).sum() / norms.square().mean()
        assert variance_ratio(norms, p) == pytest.approx(expected.item(), rel=1e-5)
    assert variance_ratio(torch.zeros(3), torch.full((3,), 1 / 3)) == 1.0
    assert variance_ratio(torch.tensor([NAN, 1.0]), torch.tensor([0.5, 0.5])) == 1.0
