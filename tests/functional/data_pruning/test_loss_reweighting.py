"""Loss weights against a transcription of the released code, and where that code fails."""

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_grad.functional.data_pruning.loss_reweighting import RULES, annealed_temperature, loss_weights

NAN, INF = float("nan"), float("inf")


def released(losses: Tensor, rule: str, r: float) -> Tensor:
    """The steps of github.com/sowmaster/Sample-Level-Loss-Reweighting-ICLR-2025, with delta = 1, in float64."""
    low, high = losses.min().item(), losses.max().item()
    h = 2.0 * losses / max(high - low, 1e-6) - (high + low) / max(high - low, 1e-6)
    strategies = {
        "linupper": torch.minimum(h + 1.0, torch.ones_like(h)),
        "quadratic": 1 - h**2,
        "extremes": torch.abs(h),
    }
    f = strategies[rule]
    scaled = torch.exp((f - f.max().item()) / r)
    return scaled / scaled.sum()


def draw(seed: int, n: int = 32) -> Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 10.0 ** (seed % 5 - 2)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("temperature", [0.1, 1.0, 7.5])
def test_weights_are_those_of_the_released_code(rule: str, temperature: float) -> None:
    for seed in range(20):
        losses = draw(seed)
        torch.testing.assert_close(loss_weights(losses, rule, temperature), released(losses, rule, temperature))
        found = loss_weights(losses.float(), rule, temperature)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), released(losses, rule, temperature), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("rule", "f"),
    [("linupper", [0.0, 0.5, 1.0, 1.0, 1.0]), ("quadratic", [0, 0.75, 1, 0.75, 0]), ("extremes", [1, 0.5, 0, 0.5, 1])],
)
def test_rules_by_hand(rule: str, f: list[float]) -> None:
    losses = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])  # h = -1, -0.5, 0, 0.5, 1
    e = torch.tensor([math.exp(value / 0.5) for value in f])
    torch.testing.assert_close(loss_weights(losses, rule, 0.5), e / e.sum())


@pytest.mark.parametrize("rule", RULES)
def test_weights_do_not_depend_on_unit_and_offset_of_the_losses(rule: str) -> None:
    losses = draw(2)
    torch.testing.assert_close(loss_weights(losses * 1e3 + 7.0, rule), loss_weights(losses, rule))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("losses", [[2.0] * 4, [0.0] * 4, [1e-30] * 4])
def test_equal_losses_weigh_alike(rule: str, losses: list[float]) -> None:
    assert loss_weights(torch.tensor(losses), rule).tolist() == [0.25] * 4


@pytest.mark.parametrize("rule", RULES)
def test_infinite_temperature_weighs_all_alike(rule: str) -> None:
    assert loss_weights(draw(3, 8), rule, INF).tolist() == [0.125] * 8
    found = loss_weights(torch.tensor([1.0, NAN, 3.0]), rule, INF)
    assert found.tolist() == [0.5, 0.0, 0.5]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_losses_that_are_not_finite_have_no_part(rule: str, value: float) -> None:
    losses = draw(4)
    found = loss_weights(torch.cat([losses[:5], torch.tensor([value], dtype=torch.float64), losses[5:]]), rule)
    assert found[5] == 0
    torch.testing.assert_close(torch.cat([found[:5], found[6:]]), loss_weights(losses, rule))


def test_no_finite_loss_gives_no_weight() -> None:
    assert loss_weights(torch.tensor([NAN, NAN])).tolist() == [0.0, 0.0]
    assert loss_weights(torch.tensor([])).shape == (0,)
    assert loss_weights(torch.tensor([3.0])).tolist() == [1.0]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("temperature", [1e-4, 1.0])
def test_extreme_losses_and_temperatures_do_not_overflow(rule: str, temperature: float) -> None:
    losses = torch.tensor([-3e38, 0.0, 1.0, 3e38])
    found = loss_weights(losses, rule, temperature)
    assert found.isfinite().all()
    assert found.sum().item() == pytest.approx(1.0)
    tiny = loss_weights(torch.tensor([1e-38, 2e-38, 3e-38]), rule, 1.0)
    torch.testing.assert_close(tiny, loss_weights(torch.tensor([1.0, 2.0, 3.0]), rule, 1.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    losses = draw(2).to(dtype)
    found = loss_weights(losses)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, loss_weights(losses.float()))


def test_weights_carry_no_graph() -> None:
    losses = draw(2).requires_grad_()
    assert not loss_weights(losses).requires_grad
    (loss_weights(losses) * losses).sum().backward()
    torch.testing.assert_close(losses.grad, loss_weights(losses))


class NoSync(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        assert func.__name__ not in ("_local_scalar_dense.default", "nonzero.default"), "the host waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("rule", RULES)
def test_nothing_waits_for_the_device(rule: str) -> None:
    losses = torch.tensor([1.0, NAN, 2.0, 2.0])
    with NoSync():
        loss_weights(losses, rule, 0.5)
        with pytest.raises(AssertionError, match="waits"):
            losses.max().item()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rule": "upper"}, "rule must be 'linupper', 'quadratic' or 'extremes'; got 'upper'"),
        ({"temperature": 0.0}, "above 0"),
        ({"temperature": NAN}, "above 0"),
        ({"losses": torch.zeros(2, 2)}, r"\(B,\); got shape \(2, 2\)"),
    ],
)
def test_wrong_arguments_raise(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loss_weights(**{"losses": torch.zeros(3), **arguments})  # type: ignore[arg-type]


# The temperature.


def test_temperature_is_geometric_after_the_warmup() -> None:
    assert annealed_temperature(0.0) == annealed_temperature(0.0499) == INF
    path = [annealed_temperature(0.05 + 0.95 * t / 10, 8.0, 0.5) for t in range(11)]
    assert path[0] == pytest.approx(8.0)
    assert path[5] == pytest.approx(2.0)
    assert path[10] == pytest.approx(0.5)
    ratios = [b / a for a, b in itertools.pairwise(path)]
    assert ratios == pytest.approx([ratios[0]] * 10)


def test_released_schedule_is_a_special_case() -> None:
    path = [
        annealed_temperature(step / 20_000, start=1.0, end=1.0, warmup_fraction=0.05) for step in (0, 999, 1000, 20_000)
    ]
    assert path == [INF, INF, 1.0, 1.0]


def test_ends_of_the_schedule() -> None:
    assert annealed_temperature(0.0, 4.0, 1.0, warmup_fraction=0.0) == 4.0
    assert annealed_temperature(1.0, 4.0, 1.0, warmup_fraction=1.0) == pytest.approx(1.0)
    assert annealed_temperature(0.99, 4.0, 1.0, warmup_fraction=1.0) == INF
    assert annealed_temperature(1.2, 4.0, 1.0) == pytest.approx(1.0), "a run that goes on keeps the last one"


@pytest.mark.parametrize(
    "arguments", [{"start": 0.0}, {"end": -1.0}, {"start": INF}, {"warmup_fraction": 1.5}, {"end": NAN}]
)
def test_wrong_schedules_raise(arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        annealed_temperature(0.5, **arguments)
