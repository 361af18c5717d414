"""The areas against brute force, planted constants, other schedules, and the forecasts that must not be trusted."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_grad.functional import AnnealingConstants, annealing_areas, fit_annealing_law, forecast_loss

STEPS = 6000
LAW = AnnealingConstants(floor=2.6, scale=3.0, alpha=0.35, annealing=3e-4)


def constant(steps: int = STEPS) -> list[float]:
    return [1.0] * steps


def cosine(steps: int = STEPS, warmup: int = 0) -> list[float]:
    rates = [(step + 1) / warmup for step in range(warmup)]
    return rates + [0.1 + 0.45 * (1 + math.cos(math.pi * step / (steps - warmup))) for step in range(steps - warmup)]


def wsd(steps: int = STEPS) -> list[float]:
    return [min(1.0, 0.05 + 4.75 * (1 - step / steps)) for step in range(steps)]


def cyclic(steps: int = STEPS) -> list[float]:
    return [0.5 + 0.5 * math.cos(step / 40) for step in range(steps)]


def noisy(rates: list[float], noise: float, seed: int = 0) -> tuple[list[float], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return rates, LAW.losses(rates) * (1 + noise * torch.randn(len(rates), generator=generator).double())


def areas_by_brute_force(rates: list[float], decay: float) -> tuple[list[float], list[float]]:
    peak = rates.index(max(rates))
    first, second = [], []
    for s in range(len(rates)):
        first.append(sum(rates[: s + 1]))
        terms = [
            (rates[k - 1] - rates[k]) * decay ** (i - k) for i in range(peak + 1, s + 1) for k in range(peak + 1, i + 1)
        ]
        second.append(sum(terms))
    return first, second


@pytest.mark.parametrize("decay", [0.0, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("rates", [constant(5), cosine(40), cosine(40, warmup=10), wsd(30), cyclic(60), [0.0, 0.0]])
def test_areas_are_those_of_the_double_sum(rates: list[float], decay: float) -> None:
    for found, expected in zip(annealing_areas(rates, decay), areas_by_brute_force(rates, decay), strict=True):
        assert found.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_a_sum_that_counts_the_warm_up_as_annealing_differs() -> None:
    """Naive: the double sum from the first step on is negative in a warm-up."""
    rates = cosine(400, warmup=100)
    naive = [(rates[i - 1] - rates[i]) for i in range(1, 100)]
    assert sum(naive) < 0.0 == float(annealing_areas(rates)[1][99])


@pytest.mark.parametrize("seed", range(2))
def test_planted_constants(seed: int) -> None:
    curves = [noisy(rates, 0.01, seed + number) for number, rates in enumerate([constant(), cosine(warmup=200)])]
    found = fit_annealing_law(curves)
    for name in ("floor", "scale", "alpha", "annealing"):
        assert getattr(found, name) == pytest.approx(getattr(LAW, name), rel=0.05), name
    assert found.residual < 0.01


@pytest.mark.parametrize("given", [cosine, lambda: cosine(warmup=300)], ids=["cosine", "with warm-up"])
@pytest.mark.parametrize("other", [wsd, constant, lambda: cosine(2 * STEPS)], ids=["wsd", "constant", "twice as long"])
def test_the_loss_under_another_schedule(given: Any, other: Any) -> None:
    expected = float(LAW.losses(other())[-1])
    found = forecast_loss([noisy(given(), 0.02)], other())
    assert found.loss == pytest.approx(expected, rel=0.02)
    assert found.band < 0.05
    assert not found.problem
    naive = float(noisy(given(), 0.02)[1][-300:].mean())  # the loss at the end of the curve
    assert other is not constant or abs(naive / expected - 1) > 0.02


def test_the_rest_of_a_run() -> None:
    rates, losses = noisy(cosine(), 0.02)
    found = forecast_loss([(rates[:3300], losses[:3300])], rates)
    assert found.loss == pytest.approx(float(LAW.losses(rates)[-1]), rel=0.02)
    assert found.low <= found.loss <= found.high


def test_it_is_as_good_as_l_bfgs_of_scipy() -> None:
    optimize = pytest.importorskip("scipy.optimize")
    rates, losses = noisy(cosine(), 0.01)
    first, second = (area[::10] for area in annealing_areas(rates))
    known, units = losses[::10], (float(first[-1]), float(second[-1]))

    def cost(law: AnnealingConstants) -> float:
        predicted = law.floor + law.scale * first**-law.alpha - law.annealing * second
        return float(torch.nn.functional.huber_loss(predicted.clamp(min=1e-9).log(), known.log(), delta=1e-3))

    def of(logs: Any) -> AnnealingConstants:
        floor, scale, alpha, annealing = (math.exp(value) for value in logs)
        return AnnealingConstants(floor, scale * units[0] ** alpha, alpha, annealing / units[1])

    starts = [[math.log(v) for v in (floor, 0.1, alpha, 0.1)] for floor in (1.5, 2.5) for alpha in (0.3, 0.8)]
    options: dict[str, Any] = {"method": "L-BFGS-B", "options": {"maxiter": 100}}
    best = min(
        (optimize.minimize(lambda logs: 1e4 * cost(of(logs)), s, **options) for s in starts), key=lambda r: r.fun
    )
    assert 1e4 * cost(fit_annealing_law([(rates, losses)])) < 1.02 * best.fun


@pytest.mark.parametrize(
    ("steps", "rates", "words"),
    [
        (1000, cosine(), r"have 1000 steps; the law needs 3000 \(3 / \(1 - 0.999\)\)"),
        (4000, wsd(), r"have seen 0% of the schedule's annealing"),
    ],
)
def test_a_forecast_that_is_not_to_be_trusted(steps: int, rates: list[float], words: str) -> None:
    _, losses = noisy(rates, 0.01)
    found = forecast_loss([(rates[:steps], losses[:steps])], rates)
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(found.problem)


def test_curves_that_the_law_does_not_fit_have_a_wide_band() -> None:
    rates = cosine()
    losses = torch.linspace(3.0, 0.4, len(rates)) + 0.5 * torch.linspace(0, 20, len(rates)).sin().abs()
    found = forecast_loss([(rates[:3500], losses[:3500])], rates)
    assert "Refits differ by" in found.problem or "a loss is above 0" in found.problem


def test_unknown_losses_are_skipped() -> None:
    rates, losses = noisy(cosine(), 0.0)
    every = losses.clone().index_fill_(0, torch.arange(0, STEPS, 2), math.nan)
    assert forecast_loss([(rates, every)], wsd(), refits=0).loss == pytest.approx(
        float(LAW.losses(wsd())[-1]), rel=1e-3
    )


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: annealing_areas([]), "rates must be"),
        (lambda: annealing_areas([1.0, -1.0]), "rates must be"),
        (lambda: annealing_areas([1.0], decay=1.5), "decay must be from 0 to 1; got 1.5"),
        (lambda: fit_annealing_law([]), "at least one pair"),
        (lambda: fit_annealing_law([([1.0, 1.0], [2.0])]), "as many losses as rates; got 2 rates"),
        (lambda: fit_annealing_law([([1.0] * 20, [0.0] * 20)]), "Losses must be above 0"),
        (lambda: fit_annealing_law([([1.0] * 20, [math.nan] * 20)]), "at least 8 known losses .* got 0"),
        (lambda: forecast_loss([noisy(cosine(100), 0.0)], constant(9), refits=-1), "refits must be at least 0"),
    ],
)
def test_wrong_arguments(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()
