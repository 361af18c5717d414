"""Loss capture: reweighting against its equation, worked out from the positions."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_grad.functional import LossCapture
from tests.functional.gradients.spellings import (
    BITS,
    CHOICES,
    CLASS_WEIGHTS,
    PROBABILITIES,
    WEIGHTS,
    B,
    C,
    T,
    legacy,
    normal,
    reweighted,
    same_bits,
    some,
    uniform,
)


def test_each_reduction() -> None:
    x, t = normal(B, C), CHOICES
    each = -x.log_softmax(1)[torch.arange(B), t]
    torch.testing.assert_close(reweighted(F.cross_entropy, x, t), (WEIGHTS * each).sum() / B)
    torch.testing.assert_close(reweighted(nn.CrossEntropyLoss(reduction="sum"), x, t), (WEIGHTS * each).sum())
    torch.testing.assert_close(reweighted(nn.CrossEntropyLoss(reduction="none"), x, t), WEIGHTS * each)
    torch.testing.assert_close(reweighted(legacy(size_average=False), x, t), (WEIGHTS * each).sum())


def test_without_reduction_the_shape_stays() -> None:
    x, t = normal(B * T, C), some(B, T).flatten()
    found = reweighted(nn.CrossEntropyLoss(reduction="none"), x, t, samples=B)
    expected = F.cross_entropy(x, t, reduction="none").reshape(B, T) * WEIGHTS[:, None]
    torch.testing.assert_close(found, expected.flatten())


@pytest.mark.parametrize("tokens", [False, True])
def test_ignored_positions_and_class_weights_leave_the_denominator_of_the_batch(tokens: bool) -> None:
    x, t = normal(B, C, T), some(B, T)
    logs = x.log_softmax(1)
    total, denominator = 0.0, 0.0
    for i in range(B):
        for p in range(T):
            if t[i, p] != -100:
                weight = CLASS_WEIGHTS[t[i, p]].item()
                total -= WEIGHTS[i].item() * weight * logs[i, t[i, p], p].item()
                denominator += weight
    if tokens:
        x, t = x.movedim(1, -1).reshape(-1, C), t.flatten()
    found = reweighted(nn.CrossEntropyLoss(CLASS_WEIGHTS), x, t, samples=B)
    assert found.item() == pytest.approx(total / denominator, rel=1e-5)


def test_batchmean_has_its_own_denominator() -> None:
    x, t = normal(B, C).log_softmax(1), PROBABILITIES
    found = reweighted(nn.KLDivLoss(reduction="batchmean"), x, t)
    torch.testing.assert_close(found, (WEIGHTS[:, None] * t * (t.log() - x)).sum() / B)


def test_weighted_squares_divide_by_their_weights() -> None:
    x, t, w = normal(B, C), normal(B, C), uniform(B, C)
    found = reweighted(lambda a, b: F.mse_loss(a, b, weight=w), x, t)
    torch.testing.assert_close(found, (WEIGHTS[:, None] * w * (x - t) ** 2).sum() / w.sum())


@pytest.mark.filterwarnings("ignore:Using a target size")
def test_a_loss_over_broadcast_shapes_stays_itself() -> None:
    x, t, w = normal(1, C), normal(B, C), uniform(1, C)
    found = reweighted(lambda a, b: F.mse_loss(a, b, weight=w), x, t, torch.ones(B))
    torch.testing.assert_close(found, F.mse_loss(x, t, weight=w))


def test_a_weight_of_nan_for_an_ignored_sample_changes_nothing() -> None:
    x, t = normal(B, C).requires_grad_(), some(B)
    weights = WEIGHTS.clone()
    expected = reweighted(F.cross_entropy, x, t, weights)
    weights[1] = math.nan
    found = reweighted(F.cross_entropy, x, t, weights)
    assert same_bits(found, expected)
    found.backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_none_leaves_the_loss_bit_for_bit() -> None:
    x = normal(B, C)
    with LossCapture(reweight=lambda call: None) as capture:
        assert same_bits(F.cross_entropy(x, CHOICES), F.cross_entropy(x, CHOICES))
    value = F.cross_entropy(x, CHOICES)
    with LossCapture(reweight=lambda call: None if call.name == "mse_loss" else WEIGHTS) as capture:
        assert not same_bits(F.cross_entropy(x, CHOICES), value)
        squares = F.mse_loss(x, BITS)
    assert same_bits(squares, F.mse_loss(x, BITS))
    assert [call.name for call in capture.calls] == ["cross_entropy", "mse_loss"]


def test_weights_may_come_from_the_losses_and_carry_gradients() -> None:
    x, t = normal(B, C).requires_grad_(), CHOICES
    scale = torch.tensor(2.0, requires_grad=True)
    with LossCapture(reweight=lambda call: scale * call.losses):
        F.cross_entropy(x, t).backward()
    assert scale.grad is not None
    each = F.cross_entropy(x, t, reduction="none")
    torch.testing.assert_close(scale.grad, each.square().mean().detach())
    gradient = x.grad
    x.grad = None
    (2.0 * each.detach() * each).mean().backward()  # the weights are held fixed
    torch.testing.assert_close(gradient, x.grad)


def test_weights_of_another_shape_raise() -> None:
    with pytest.raises(ValueError, match=r"weights of shape \(6,\); got \(3,\)"):
        reweighted(F.cross_entropy, normal(B, C), CHOICES, torch.ones(3))
