"""The penalty by hand, and its errors."""

import math

import pytest
import torch

from lightning_grad.functional import squared_log_normalizers, z_loss


def test_hand_worked() -> None:
    logits = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]])
    expected = [math.log(2.0) ** 2, math.log(4.0) ** 2]
    assert squared_log_normalizers(logits).tolist() == pytest.approx(expected)
    assert float(z_loss(logits, 0.5)) == pytest.approx(0.5 * sum(expected) / 2)
    assert float(z_loss(logits, 0.5, torch.tensor([False, True]))) == pytest.approx(0.5 * expected[1])
    assert float(z_loss(logits, 0.5, torch.tensor([False, False]))) == 0.0


def test_other_dimension_of_classes() -> None:
    logits = torch.randn(2, 3, 4)
    torch.testing.assert_close(z_loss(logits, 1.0, dim=1), z_loss(logits.movedim(1, -1), 1.0))


def test_it_pulls_the_normalizer_to_one() -> None:
    logits = torch.full((1, 4), 3.0, requires_grad=True)
    for _ in range(200):
        (gradient,) = torch.autograd.grad(z_loss(logits, 1.0), logits)
        logits = (logits - 0.3 * gradient).detach().requires_grad_()
    assert float(logits.detach().exp().sum()) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"coefficient": -1.0}, "coefficient must be at least 0"),
        ({"valid": torch.tensor([True])}, r"one entry .* \(2,\)"),
    ],
)
def test_wrong_arguments(arguments: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        z_loss(torch.zeros(2, 3), **arguments)
