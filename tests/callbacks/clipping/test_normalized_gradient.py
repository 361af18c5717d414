"""Normalized gradients in a fit: the length of each step, of the whole and of layers."""

from typing import Any

import pytest
import torch

from lightning_grad.callbacks import NormalizedGradient
from lightning_grad.functional import normalize_gradients_
from tests.callbacks.clipping import Dictated, Gradients, Regression, pairs, rows_of, small_net, train

FIRST, LAST = ["net.0.weight", "net.0.bias"], ["net.2.weight", "net.2.bias"]


def norms_after(callback: Any, *names: str) -> list[float]:
    after = Gradients()
    train([callback, after], Regression(small_net()), pairs())
    return after.norms(*names)


def test_the_whole_gradient_has_norm_one() -> None:
    assert norms_after(NormalizedGradient(), *FIRST, *LAST) == pytest.approx([1.0] * 6, rel=1e-5)
    assert norms_after(NormalizedGradient(), *FIRST) != pytest.approx([1.0] * 6, rel=1e-2)


def test_each_layer_has_norm_one() -> None:
    for names in (FIRST, LAST):
        assert norms_after(NormalizedGradient("layer"), *names) == pytest.approx([1.0] * 6, rel=1e-5)


def test_with_sgd_a_step_has_the_length_of_the_rate() -> None:
    """On a plateau and on a cliff alike."""
    rows = torch.tensor([[1e-12, 0, 0, 0], [0, 1e12, 0, 0], [3.0, 4.0, 0, 0]])
    module = Dictated()
    train([NormalizedGradient()], module, rows_of(rows))
    torch.testing.assert_close(module.w.detach(), -0.1 * torch.tensor([1.6, 1.8, 0.0, 0.0]))


@pytest.mark.parametrize("bad", [0.0, float("inf"), float("nan")])
def test_a_gradient_without_a_norm_is_not_changed(bad: float) -> None:
    gradients, layers = [torch.full((3,), bad), torch.ones(4)], torch.tensor([0, 1])
    normalize_gradients_(gradients, layers, 2)
    assert gradients[0].equal(torch.full((3,), bad)) or bad != bad
    assert gradients[1].norm() == pytest.approx(1.0)
    together = [torch.full((3,), bad)]
    normalize_gradients_(together)
    assert together[0].equal(torch.full((3,), bad)) or together[0].isnan().all()


def test_a_norm_too_small_to_be_inverted_counts_as_zero() -> None:
    """1 / 1e-40 is infinite in float32."""
    gradient = torch.tensor([1e-40])
    normalize_gradients_([gradient])
    assert gradient.equal(torch.tensor([1e-40]))
