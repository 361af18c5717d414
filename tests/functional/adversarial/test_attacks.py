"""Attacks equal those that are computed by hand or in plain float64, and keep within the ball and the bounds."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_grad.functional.adversarial.attacks import (
    IndependentLossError,
    attack_direction,
    fgsm,
    pgd,
    project_perturbation,
    random_perturbation,
)

NORMS = ("linf", "l2")
WEIGHT = torch.tensor([3.0, -4.0, 0.0])


def linear(x: Tensor) -> Tensor:
    return (x @ WEIGHT).sum()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def norms_of(delta: Tensor, norm: str) -> Tensor:
    flat = delta.double().reshape(len(delta), -1)
    return flat.abs().amax(1) if norm == "linf" else flat.norm(dim=1)


# By hand, on a linear model, whose gradient is its weight.


@pytest.mark.parametrize(
    ("norm", "steps", "step_size", "expected"),
    [
        ("linf", 1, None, [0.5, -0.5, 0.0]),  # 2.5 epsilon, projected
        ("linf", 1, 0.2, [0.2, -0.2, 0.0]),
        ("linf", 2, 0.2, [0.4, -0.4, 0.0]),
        ("linf", 4, 0.2, [0.5, -0.5, 0.0]),
        ("l2", 1, 0.2, [0.12, -0.16, 0.0]),
        ("l2", 2, 0.2, [0.24, -0.32, 0.0]),
        ("l2", 4, 0.2, [0.3, -0.4, 0.0]),
        ("l2", 10, None, [0.3, -0.4, 0.0]),
    ],
)
def test_steps_on_a_linear_model(norm: Any, steps: int, step_size: float | None, expected: list[float]) -> None:
    x = torch.tensor([[1.0, 2.0, 3.0], [-1.0, 0.0, 5.0]])
    found = pgd(linear, x, 0.5, steps, step_size, norm, random_start=False)
    torch.testing.assert_close(found, x + torch.tensor(expected))


def test_steps_until_the_ball_binds_are_of_two_and_a_half_epsilon_in_all() -> None:
    found = [pgd(linear, torch.zeros(1, 3), 0.5, steps, random_start=False)[0, 0].item() for steps in (2, 5, 10)]
    assert found == [0.5] * 3
    seen: list[float] = []

    def loss(x: Tensor) -> Tensor:
        seen.append(x[0, 0].item())
        return linear(x)

    pgd(loss, torch.zeros(1, 3), 0.5, 10, random_start=False)
    assert seen == pytest.approx([0.0, 0.125, 0.25, 0.375, *[0.5] * 6])


def test_fgsm_steps_by_epsilon_or_after_a_random_start_by_more() -> None:
    x = torch.zeros(2, 3)
    torch.testing.assert_close(fgsm(linear, x, 0.5, random_start=False), torch.tensor([[0.5, -0.5, 0.0]] * 2))
    torch.testing.assert_close(fgsm(linear, x, 0.5, 0.1, random_start=False), torch.tensor([[0.1, -0.1, 0.0]] * 2))
    start = random_perturbation(x, 0.5, generator=generator())
    expected = (start + 0.625 * WEIGHT.sign()).clamp(-0.5, 0.5)
    assert (expected.abs() < 0.5).any()
    torch.testing.assert_close(fgsm(linear, x, 0.5, generator=generator()), expected)


def test_bounds_that_bind() -> None:
    x = torch.tensor([[0.9, 0.1, 0.5]])
    found = pgd(linear, x, 0.3, 3, random_start=False, bounds=(0.0, 1.0))
    torch.testing.assert_close(found, torch.tensor([[1.0, 0.0, 0.5]]))
    # In l2 what the bound takes from one pixel is not given to another before the next step.
    seen: list[Tensor] = []

    def loss(x: Tensor) -> Tensor:
        seen.append(x.detach().clone())
        return linear(x)

    found = pgd(loss, x, 0.3, 2, 0.3, "l2", random_start=False, bounds=(0.0, 1.0))
    torch.testing.assert_close(seen[1], torch.tensor([[1.0, 0.0, 0.5]]))
    torch.testing.assert_close(found, torch.tensor([[1.0, 0.0, 0.5]]))


def test_mean_and_std_have_epsilon_steps_and_bounds_count_in_pixels() -> None:
    mean, std = [0.5, 0.25], [0.5, 0.1]
    pixels = torch.full((1, 2, 1, 1), 0.5)
    weight = torch.tensor([1.0, -1.0]).view(1, 2, 1, 1)
    x = (pixels - torch.tensor(mean).view(1, 2, 1, 1)) / torch.tensor(std).view(1, 2, 1, 1)

    def back(moved: Tensor) -> list[float]:
        return [v * s + m for v, s, m in zip(moved.flatten().tolist(), std, mean, strict=True)]

    space: dict[str, Any] = {"random_start": False, "mean": mean, "std": std}
    assert back(fgsm(lambda v: (v * weight).sum(), x, 0.1, **space)) == pytest.approx([0.6, 0.4])
    bound = fgsm(lambda v: (v * weight).sum(), x, 0.1, bounds=(0.45, 0.55), **space)
    assert back(bound) == pytest.approx([0.55, 0.45])
    # The gradient with respect to pixels is (2, -10), of norm sqrt(104).
    long = math.sqrt(104)
    found = pgd(lambda v: (v * weight).sum(), x, 0.1, 1, 0.1, "l2", **space)
    assert back(found) == pytest.approx([0.5 + 0.2 / long, 0.5 - 1.0 / long])


def test_one_mean_and_std_serve_all_channels() -> None:
    x = torch.randn(2, 3, 4, 4, generator=generator())
    one, each = (
        pgd(lambda v: v.square().sum(), x, 0.1, 3, mean=[0.5] * n, std=[0.2] * n, generator=generator()) for n in (1, 3)
    )
    torch.testing.assert_close(one, each)


# Against plain float64.


def reference(loss_of: Any, x: Tensor, epsilon: float, steps: int, size: float, norm: str, bounds: Any) -> Tensor:
    """Attack one sample after the other, entry by entry where that is plainer."""
    moved = x.clone()
    for _ in range(steps):
        point = moved.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(loss_of(point), point)
        for i in range(len(x)):
            g, delta = gradient[i], moved[i] - x[i]
            if norm == "linf":
                delta = (delta + size * g.sign()).clamp(-epsilon, epsilon)
            else:
                delta = delta + size * g / g.square().sum().sqrt()
                length = delta.square().sum().sqrt()
                delta = delta * epsilon / length if length > epsilon else delta
            moved[i] = x[i] + delta if bounds is None else (x[i] + delta).clamp(*bounds)
    return moved


def network(seed: int = 0, dtype: torch.dtype = torch.float32) -> Callable[[Tensor], Tensor]:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)).to(dtype)
    y = torch.tensor([0, 1, 2, 0])
    return lambda x: F.cross_entropy(net(x), y)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("bounds", [None, (0.1, 0.9)])
@pytest.mark.parametrize("steps", [1, 5])
def test_a_network_in_double_precision(norm: Any, bounds: Any, steps: int) -> None:
    x = 0.1 + 0.8 * torch.rand(4, 2, 4, 4, dtype=torch.float64, generator=generator())
    loss = network(dtype=torch.float64)
    found = pgd(loss, x, 0.3, steps, 0.1, norm, random_start=False, bounds=bounds)
    torch.testing.assert_close(found, reference(loss, x, 0.3, steps, 0.1, norm, bounds), rtol=1e-10, atol=1e-10)
    assert found.dtype == torch.float64


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("seed", range(3))
def test_the_ball_and_the_bounds_hold(norm: Any, dtype: torch.dtype, seed: int) -> None:
    x = torch.rand(4, 2, 4, 4, generator=generator(seed)).to(dtype)
    before = x.clone()
    for steps in (1, 4):
        found = pgd(network(seed, dtype), x, 0.25, steps, norm=norm, bounds=(0.0, 1.0), generator=generator())
        rounding = torch.finfo(dtype).eps  # of values below 1; in l2 of 32 of them
        limit = 0.25 + (rounding if norm == "linf" else rounding * 6)
        assert found.dtype == dtype
        assert 0.0 <= found.min() <= found.max() <= 1.0
        assert (norms_of(found.double() - x.double(), norm) <= limit).all()
        assert (found != x).any(dim=1).float().mean() > 0.5
    assert torch.equal(x, before)


@pytest.mark.parametrize("norm", NORMS)
def test_the_loss_rises_and_more_steps_raise_it_more(norm: Any) -> None:
    loss, x = network(), torch.rand(4, 2, 4, 4, generator=generator())
    shifted = x + random_perturbation(x, 0.2, norm, generator())
    one = fgsm(loss, x, 0.2, norm=norm, random_start=False)
    many = pgd(loss, x, 0.2, 20, norm=norm, random_start=False)
    assert loss(x) < loss(one) <= loss(many) + 1e-6
    assert loss(shifted) < loss(one)


# Random starts.


def test_a_random_start_is_uniform_in_the_cube() -> None:
    drawn = random_perturbation(torch.zeros(2000, 10), 0.5, generator=generator())
    assert drawn.abs().max() <= 0.5
    assert drawn.mean().abs() < 0.01
    assert drawn.var().item() == pytest.approx(0.25 / 3, rel=0.03)


@pytest.mark.parametrize("dimensions", [1, 2, 12])
def test_a_random_start_is_uniform_in_the_round_ball(dimensions: int) -> None:
    drawn = random_perturbation(torch.zeros(4000, dimensions), 0.5, "l2", generator())
    radius = drawn.norm(dim=1) / 0.5
    assert radius.max() <= 1.0 + 1e-6
    # The share of the ball's volume inside of a radius is uniform.
    share = (radius**dimensions).sort().values
    assert (share - torch.linspace(0, 1, 4000)).abs().max() < 0.04
    assert drawn.mean(0).abs().max() < 0.02


def test_the_random_start_is_where_the_attack_begins_and_keeps_to_the_bounds() -> None:
    seen: list[Tensor] = []

    def loss(x: Tensor) -> Tensor:
        seen.append(x.detach().clone())
        return linear(x)

    x = torch.tensor([[0.9, 0.1, 0.5]] * 50)
    pgd(loss, x, 0.5, 1, bounds=(0.0, 1.0), generator=generator())
    assert 0.0 <= seen[0].min() < 0.01
    assert 0.99 < seen[0].max() <= 1.0
    assert len(seen[0].unique(dim=0)) == 50


@pytest.mark.parametrize("norm", NORMS)
def test_a_generator_makes_it_reproducible(norm: Any) -> None:
    x, state = torch.zeros(2, 3), torch.get_rng_state()
    first, second, other = (pgd(linear, x, 0.5, 1, 0.01, norm, generator=generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)
    pgd(linear, x, 0.5, 1, 0.01, norm, random_start=False)
    assert torch.equal(torch.get_rng_state(), state)


# Gradients that are no ordinary numbers.


def given(gradient: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a loss whose gradient is this one."""

    class Given(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.sum()

        @staticmethod
        def backward(ctx: Any, above: Tensor) -> Tensor:
            return gradient

    return Given.apply


def test_nan_moves_nothing_and_infinity_all_the_way() -> None:
    strange = torch.tensor([[math.nan, math.inf, -math.inf, 1.0], [math.nan] * 4])
    x = torch.zeros(2, 4)
    found = pgd(given(strange), x, 0.5, 2, random_start=False)
    assert found.tolist() == [[0.0, 0.5, -0.5, 0.5], [0.0] * 4]
    found = pgd(given(strange), x, 0.5, 2, norm="l2", random_start=False)
    half = 0.5 / math.sqrt(2)
    torch.testing.assert_close(found, torch.tensor([[0.0, half, -half, 0.0], [0.0] * 4]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_length_one_whatever_the_size_of_the_gradient(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    for size in (info.smallest_normal, info.eps, 1.0, info.max / 8):
        gradient = torch.tensor([[3.0, -4.0], [4.0, 3.0]], dtype=dtype) * size
        expected = torch.tensor([[0.6, -0.8], [0.8, 0.6]])
        torch.testing.assert_close(attack_direction(gradient, "l2").float(), expected, rtol=5e-3, atol=5e-3)


def test_a_large_sample_does_not_hide_a_small_one() -> None:
    gradient = torch.tensor([[3e30, 4e30], [3e-30, 4e-30], [0.0, 0.0]])
    expected = torch.tensor([[0.6, 0.8], [0.6, 0.8], [0.0, 0.0]])
    torch.testing.assert_close(attack_direction(gradient, "l2"), expected)


@pytest.mark.parametrize("norm", NORMS)
def test_what_is_inside_the_ball_is_not_projected(norm: Any) -> None:
    inside = torch.tensor([[0.1, -0.2], [0.0, 0.0]])
    torch.testing.assert_close(project_perturbation(inside, 0.5, norm), inside)
    assert project_perturbation(inside, 0.0, norm).tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_half_precision_is_projected_onto_nothing() -> None:
    assert project_perturbation(torch.zeros(1, 2, dtype=torch.float16), 0.0, "l2").tolist() == [[0.0, 0.0]]


# Shapes and refusals.


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(3,), (3, 2), (3, 2, 4), (3, 2, 2, 2, 2)])
def test_any_number_of_dimensions(norm: Any, shape: tuple[int, ...]) -> None:
    x = torch.rand(shape, generator=generator())
    space: dict[str, Any] = {} if len(shape) == 1 else {"mean": [0.5, 0.4], "std": [0.5, 1.0]}
    found = pgd(lambda v: v.square().sum(), x, 0.1, 3, norm=norm, bounds=(-9, 9), generator=generator(), **space)
    assert found.shape == x.shape
    assert (found != x).all()


def test_epsilon_zero_gives_the_inputs_themselves() -> None:
    x = torch.rand(2, 3)
    for attack in (pgd, fgsm):
        assert attack(linear, x, 0.0) is x


@pytest.mark.parametrize(
    "loss",
    [lambda x: torch.ones(()), lambda x: (x.detach() @ WEIGHT).sum(), lambda x: torch.ones((), requires_grad=True)],
)
def test_inputs_that_are_not_used(loss: Any) -> None:
    with pytest.raises(IndependentLossError, match="does not depend on the inputs"):
        pgd(loss, torch.rand(2, 3), 0.1)
    assert issubclass(IndependentLossError, RuntimeError)


def test_no_gradient_of_a_parameter_or_input_is_touched() -> None:
    net, x = nn.Linear(3, 1), torch.rand(2, 3, requires_grad=True)
    net.weight.grad = torch.ones_like(net.weight)
    found = pgd(lambda v: net(v).sum(), x, 0.1, 3)
    assert net.weight.grad.tolist() == [[1.0] * 3]
    assert net.bias.grad is x.grad is None
    assert not found.requires_grad
    assert net.weight.requires_grad


def test_it_works_where_gradients_are_off() -> None:
    x = torch.zeros(1, 3)
    with torch.no_grad():
        found = pgd(linear, x, 0.5, random_start=False)
        assert not torch.is_grad_enabled()
    assert found.tolist() == [[0.5, -0.5, 0.0]]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"norm": "l1"}, r"norm must be 'linf' or 'l2'; got 'l1'\."),
        ({"epsilon": -0.1}, r"epsilon must be finite and at least 0; got -0\.1\."),
        ({"epsilon": math.inf}, r"epsilon must be finite and at least 0; got inf\."),
        ({"epsilon": math.nan}, r"epsilon must be finite and at least 0; got nan\."),
        ({"mean": [0.5]}, r"mean and std must be set together; got mean=\[0\.5\] and std=None\."),
        ({"std": [0.5], "bounds": (0, 1)}, r"mean and std must be set together"),
    ],
)
def test_settings_that_cannot_be(arguments: Any, said: str) -> None:
    for attack in (pgd, fgsm):
        with pytest.raises(ValueError, match=said):
            attack(linear, torch.rand(2, 3), **{"epsilon": 0.1, **arguments})


def test_an_attack_has_steps() -> None:
    with pytest.raises(ValueError, match=r"steps must be at least 1; got 0\."):
        pgd(linear, torch.rand(2, 3), 0.1, steps=0)


def test_inference_mode_is_refused_with_advice() -> None:
    said = r"inference mode.*torch\.inference_mode\(False\).*clone"
    with torch.inference_mode():
        x = torch.zeros(1, 3)
        with pytest.raises(RuntimeError, match=said):
            pgd(linear, torch.zeros(1, 3), 0.5)
        with torch.inference_mode(False):
            assert fgsm(linear, x.clone(), 0.5, random_start=False).tolist() == [[0.5, -0.5, 0.0]]
    with pytest.raises(RuntimeError, match=said):
        fgsm(linear, x, 0.5)


@pytest.mark.parametrize("norm", NORMS)
def test_an_empty_batch_is_returned_as_it_is(norm: Any) -> None:
    x = torch.rand(0, 3)
    for attack in (pgd, fgsm):
        assert attack(linear, x, 0.1, norm=norm) is x


def test_losses_of_each_sample_are_summed() -> None:
    x = torch.rand(3, 3, generator=generator())
    each, summed = (
        pgd(loss, x, 0.1, 3, generator=generator())
        for loss in (lambda v: (v @ WEIGHT).square(), lambda v: (v @ WEIGHT).square().sum())
    )
    assert torch.equal(each, summed)
