"""The step with a frozen variance against torch's Adam and numbers worked by hand."""

from typing import Any

import pytest
import torch
from torch import nn

from lightning_grad.functional import frozen_adam_, gradient_of_momentum

BETAS = (0.9, 0.99)


def test_the_gradient_moves_the_momentum_to_where_it_shall_be() -> None:
    before, after = torch.randn(2, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gradient = gradient_of_momentum(after, before, 0.9)
    torch.testing.assert_close(before.lerp(gradient, 0.1), after, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"amsgrad": True}], ids=["plain", "decay", "amsgrad"])
def test_it_is_adam_where_the_variance_would_not_move(kind: type[torch.optim.Adam], options: dict[str, Any]) -> None:
    """Of gradients of one magnitude, Adam's own bias-corrected variance stays what it is."""
    if kind is torch.optim.Adam and "weight_decay" in options:
        pytest.skip("decay in the gradient changes its magnitude")
    generator = torch.Generator().manual_seed(1)
    weight = nn.Parameter(torch.randn(20, dtype=torch.float64, generator=generator))
    adam = kind([weight], lr=0.1, betas=BETAS, **options)
    mine: dict[str, Any] = {}
    for step in range(1, 12):
        weight.grad = 0.3 * torch.randn(20, dtype=torch.float64, generator=generator).sign()
        if step == 4:
            mine = {key: value.clone() for key, value in adam.state[weight].items()}
            mine["weight"] = weight.detach().clone()
        adam.step()
        if mine:
            variances = [mine[key] for key in ("exp_avg_sq", "max_exp_avg_sq") if key in mine]
            (group,) = adam.param_groups
            decay = (group["weight_decay"], kind is torch.optim.AdamW)
            frozen_adam_(
                mine["weight"], weight.grad, mine["exp_avg"], variances, step, 0.1, BETAS, 1e-8, *decay, floor=0.5
            )
            torch.testing.assert_close(mine["weight"], weight.detach(), rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(variances[0], adam.state[weight]["exp_avg_sq"], rtol=1e-12, atol=1e-12)


def test_the_corrected_variance_never_changes() -> None:
    weight, momentum, variance = torch.zeros(3), torch.zeros(3), torch.tensor([1e-8, 1e-3, 2.0])
    corrected = variance / (1 - BETAS[1] ** 5)
    for step in range(6, 400):
        frozen_adam_(weight, torch.full((3,), 100.0), momentum, [variance], step, 0.1, BETAS)
    torch.testing.assert_close(variance / (1 - BETAS[1] ** 399), corrected, rtol=1e-4, atol=0)


def test_the_floor_is_a_share_of_the_mean() -> None:
    """Variances 0 and 2 have the mean 1, so a floor of 0.25 makes the first step 1 / 0.5."""
    weight, momentum, variance = torch.zeros(2), torch.ones(2), torch.tensor([0.0, 2.0])
    large = 10**6  # all bias is gone
    frozen_adam_(weight, torch.ones(2), momentum, [variance], large, 1.0, BETAS, 0.0, floor=0.25)
    torch.testing.assert_close(weight, torch.tensor([-2.0, -(0.5**0.5)]))
    assert variance.tolist() == [0.0, 2.0], "the floor is not kept"


def test_a_step_that_is_a_tensor_gives_the_same() -> None:
    for step in (7, torch.tensor(7.0, dtype=torch.float64)):
        weight, momentum, variance = torch.zeros(2), torch.ones(2), torch.tensor([1.0, 2.0])
        frozen_adam_(weight, torch.ones(2), momentum, [variance], step, 0.1, BETAS)
        torch.testing.assert_close(weight, torch.tensor([-0.1, -0.1 / 2**0.5]) / (1 - 0.9**7) * (1 - 0.99**6) ** 0.5)
