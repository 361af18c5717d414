"""The scaling law with learning-rate annealing: the loss of a run, from its learning rates (Tissue et al., 2024).

:func:`fit_annealing_law` finds the four constants of the law from finished or running curves, and
:func:`forecast_loss` says what another schedule, or the rest of this one, would give, and how far refits agree.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

Curve = tuple[Sequence[float] | Tensor, Sequence[float] | Tensor]
"""Learning rates and losses of the steps of a run, of the same length; a loss may be nan if it is unknown."""

HUBER = 1e-3  # of the logarithm of the loss, as in the paper
_POINTS = 96  # means of neighboring steps that a curve is reduced to
_BLOCKS = 8  # of points; a refit leaves one out
_ITERATIONS = 80
_LEAST_POINTS = 8
_STARTS = [(floor, alpha) for floor in (0.3, 0.7, 0.95) for alpha in (0.2, 0.5, 1.0)]  # share of the least loss; alpha


def annealing_areas(rates: Sequence[float] | Tensor, decay: float = 0.999) -> tuple[Tensor, Tensor]:
    r"""Return the two areas of a learning-rate schedule that decide the loss, after each step.

    .. math::
        S_1(s) = \sum_{i=1}^s \eta_i, \qquad
        S_2(s) = \sum_{i=p+1}^s \sum_{k=p+1}^i (\eta_{k-1} - \eta_k) \, \lambda^{i-k}

    S1 is the area under the schedule. S2 is the area of its annealing: each fall of the rate counts from then on, with a
    memory of :math:`1 / (1 - \lambda)` steps. p is the step with the highest rate; a warm-up before it is no negative
    annealing (our choice). Computed in O(n), by :math:`m_i = \lambda m_{i-1} + \eta_{i-1} - \eta_i`.

    Args:
        rates: :math:`\eta`, (n,), the learning rate of each step.
        decay: :math:`\lambda`, from 0 to 1 (0.999 in the paper).

    Returns:
        tuple: S1 and S2, (n,), float64, on the CPU.

    Raises:
        ValueError: If there are no rates, one is negative or not finite, or decay is outside [0, 1].

    Example:
        >>> annealing_areas([1.0, 1.0, 0.5], decay=0.9)
        (tensor([1.0000, 2.0000, 2.5000], dtype=torch.float64), tensor([0.0000, 0.0000, 0.5000], dtype=torch.float64))
    """
    rates = torch.as_tensor(rates, dtype=torch.float64, device="cpu")
    if rates.ndim != 1 or not len(rates) or not bool((rates.isfinite() & (rates >= 0.0)).all()):
        raise ValueError(f"rates must be (n,) finite learning rates of at least 0; got shape {tuple(rates.shape)}.")
    if not 0.0 <= decay <= 1.0:
        raise ValueError(f"decay must be from 0 to 1; got {decay}.")
    falls = torch.zeros_like(rates)
    falls[1:] = rates[:-1] - rates[1:]
    falls[: int(rates.argmax()) + 1] = 0.0
    momentum = list(accumulate(falls.tolist(), lambda before, fall: decay * before + fall))
    return rates.cumsum(0), torch.tensor(momentum, dtype=torch.float64).cumsum(0)


@dataclass(frozen=True)
class AnnealingConstants:
    r"""The constants of the law :math:`L = L_0 + A \, S_1^{-\alpha} - C \, S_2`.

    Args:
        floor: :math:`L_0`, the loss of an endless run.
        scale: A.
        alpha: The exponent.
        annealing: C, what annealing gains.
        decay: :math:`\lambda` of :func:`annealing_areas`.
        residual: Mean absolute residual of the fit, as a share of the loss; nan if the constants were not fitted.
    """

    floor: float
    scale: float
    alpha: float
    annealing: float
    decay: float = 0.999
    residual: float = math.nan

    def losses(self, rates: Sequence[float] | Tensor) -> Tensor:
        """Return the loss after each step of a schedule, (n,), float64.

        Example:
            >>> law = AnnealingConstants(floor=2.0, scale=1.0, alpha=0.5, annealing=0.1)
            >>> law.losses([1.0, 1.0, 1.0, 1.0])[-1]
            tensor(2.5000, dtype=torch.float64)
        """
        first, second = annealing_areas(rates, self.decay)
        return self.floor + self.scale * first**-self.alpha - self.annealing * second


@dataclass(frozen=True)
class LossForecast:
    """The loss that a schedule is expected to give.

    Args:
        loss: The loss at its end.
        low: Lowest loss of all refits.
        high: Highest loss of all refits.
        constants: Constants of the fit.
        problem: Why the forecast is not to be trusted, as a sentence; empty if nothing speaks against it.
    """

    loss: float
    low: float
    high: float
    constants: AnnealingConstants
    problem: str = ""

    @property
    def band(self) -> float:
        """Width of the band of all refits, as a share of the loss."""
        return (self.high - self.low) / abs(self.loss) if self.loss else math.inf


def fit_annealing_law(curves: Sequence[Curve], decay: float = 0.999) -> AnnealingConstants:
    r"""Fit the constants of the annealing law to one or more curves of the same model and data.

    .. math::
        \min_{L_0, A, \alpha, C > 0} \; \sum_s \operatorname{Huber}_{0.001}
        \bigl( \log (L_0 + A \, S_1(s)^{-\alpha} - C \, S_2(s)) - \log L_s \bigr)

    Each curve counts from its highest learning rate on, and neighboring steps are averaged first. Two curves with
    different schedules determine the constants better than one. A curve without annealing does not determine C.

    The paper minimizes by L-BFGS. Here a damped Gauss-Newton method on the logarithms of the constants does, from several
    starts at once, which needs no other package.

    Args:
        curves: Learning rates and losses of each run. Losses must be above 0, or nan if unknown.
        decay: :math:`\lambda` (0.999 in the paper).

    Returns:
        AnnealingConstants: The constants.

    Raises:
        ValueError: If there is no curve, lengths differ, a loss is not above 0, or there are fewer than 8 known losses
            after the highest learning rate.

    Example:
        >>> law = AnnealingConstants(floor=2.6, scale=0.5, alpha=0.5, annealing=4e-4)
        >>> schedules = [[1.0] * 2000, [1.0] * 1000 + [0.1] * 1000]
        >>> fitted = fit_annealing_law([(rates, law.losses(rates)) for rates in schedules])
        >>> round(fitted.floor, 2), round(fitted.alpha, 2)
        (2.6, 0.5)

    References:
        Tissue, Wang and Wang, "Scaling Law with Learning Rate Annealing", 2024, arXiv 2408.11029, equation 1.
    """
    points = _Points.of(curves, decay)
    return points.constants(points.fit(torch.ones(1, len(points.losses), dtype=torch.float64))[0], decay)


def forecast_loss(
    curves: Sequence[Curve], rates: Sequence[float] | Tensor, decay: float = 0.999, refits: int = 16, seed: int = 0
) -> LossForecast:
    r"""Forecast the final loss of a schedule from curves, with the band of refits.

    It refits without each eighth of the points in turn, and on random blocks of points (bootstrap). The band is the range
    of all these forecasts. It does not contain what the law itself misses.

    The forecast is not to be trusted (``problem``) if the curves are shorter than 3 memories of the annealing, 3000
    steps for :math:`\lambda = 0.999`; if less than a tenth of the schedule's annealing has been seen, which leaves C
    undetermined; or if the band is wider than 5 %. On a run of 360 steps, forecasts from its first half were worthless
    although the fit was good.

    Args:
        curves: As in :func:`fit_annealing_law`. To forecast the rest of a run, its curve so far.
        rates: Learning rates of all steps of the schedule to forecast.
        decay: :math:`\lambda`.
        refits: Number of refits on random blocks.
        seed: Seed of the random blocks.

    Returns:
        LossForecast: The forecast.

    Raises:
        ValueError: As in :func:`fit_annealing_law`, or for refits below 0.

    Example:
        >>> law = AnnealingConstants(floor=2.6, scale=0.5, alpha=0.5, annealing=4e-4)
        >>> linear, constant = [1.0 - step / 8000 for step in range(8000)], [1.0] * 8000
        >>> forecast = forecast_loss([(linear, law.losses(linear))], constant)
        >>> round(forecast.loss, 1), forecast.problem
        (2.6, '')

    References:
        Tissue et al., 2024, arXiv 2408.11029. The band and its limits are our choice.
    """
    if refits < 0:
        raise ValueError(f"refits must be at least 0; got {refits}.")
    points = _Points.of(curves, decay)
    solutions = points.fit(
        torch.cat([torch.ones(1, len(points.losses), dtype=torch.float64), points.refits(refits, seed)])
    )
    first, second = (area[-1] for area in annealing_areas(rates, decay))
    losses = points.predict(solutions, first / points.first, second / points.second).squeeze(1)
    constants = points.constants(solutions[0], decay)
    found = LossForecast(float(losses[0]), float(losses.min()), float(losses.max()), constants)
    seen = max(float(annealing_areas(of[0], decay)[1][-1]) for of in curves)
    return replace(found, problem=_problem(found, curves, seen, float(second)))


def _problem(found: LossForecast, curves: Sequence[Curve], seen: float, second: float) -> str:
    """Return why a forecast is not to be trusted.

    Args:
        found: The forecast.
        curves: The curves.
        seen: The largest final S2 of the curves.
        second: The final S2 of the schedule.
    """
    decay = found.constants.decay
    least, steps = math.ceil(3.0 / max(1.0 - decay, 1e-9)), max(len(of[0]) for of in curves)
    if steps < least:
        return f"The curves have {steps} steps; the law needs {least} (3 / (1 - {decay:g}))."
    if second > 0.0 and seen < 0.1 * second:
        return f"The curves have seen {max(seen / second, 0.0):.0%} of the schedule's annealing; the law needs 10 %."
    if not found.loss > 0.0 or found.low <= 0.0:
        return f"The forecast is {found.low:.3g} to {found.high:.3g}, but a loss is above 0."
    if found.band > 0.05:
        return f"Refits differ by {found.band:.0%} of the loss; the limit is 5 %."
    return ""


@dataclass(frozen=True)
class _Points:
    """Points of curves, as multiples of their largest areas; a point is the mean of neighboring steps.

    Args:
        x: S1, (n,).
        z: S2, (n,).
        losses: The losses, (n,).
        weights: Weight of each point in the fit, (n,).
        first: Unit of S1.
        second: Unit of S2.
    """

    x: Tensor
    z: Tensor
    losses: Tensor
    weights: Tensor
    first: float
    second: float

    @classmethod
    def of(cls, curves: Sequence[Curve], decay: float) -> _Points:
        if not len(curves):
            raise ValueError("curves must hold at least one pair (rates, losses); got none.")
        rows = torch.cat([_means(*curve, decay) for curve in curves])
        if len(rows) < _LEAST_POINTS:
            raise ValueError(
                f"A fit needs at least {_LEAST_POINTS} known losses after the highest learning rate; got {len(rows)}. "
                "Train for more steps."
            )
        x, z, losses, counts = rows.unbind(1)
        first, second = float(x.max()), float(z.abs().max()) or 1.0
        # The Huber loss of large residuals is linear, and a mean over n steps has 1 / sqrt(n) of the noise.
        return cls(x / first, z / second, losses, counts.sqrt(), first, second)

    def refits(self, number: int, seed: int) -> Tensor:
        """Return weights of the points for refits, (refits, n): without each block in turn, and of random blocks."""
        blocks = torch.arange(len(self.losses)) * _BLOCKS // len(self.losses)
        without = (blocks != torch.arange(_BLOCKS)[:, None]).double()
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(2 * _BLOCKS, (number, 2 * _BLOCKS), generator=generator)
        times = torch.zeros(number, 2 * _BLOCKS, dtype=torch.float64).scatter_add_(
            1, drawn, torch.ones_like(drawn).double()
        )
        halves = torch.arange(len(self.losses)) * 2 * _BLOCKS // len(self.losses)
        return torch.cat([without, times[:, halves]])

    @staticmethod
    def predict(logs: Tensor, x: Tensor, z: Tensor) -> Tensor:
        """Return the losses at points (n,) for logarithms of constants (k, 4), (k, n)."""
        floor, scale, alpha, annealing = logs.exp().unsqueeze(2).unbind(1)
        return floor + scale * x**-alpha - annealing * z

    def fit(self, weights: Tensor) -> Tensor:
        """Return the logarithms of the best constants for each row of weights, (k, 4), in the units of the points."""
        least, spread = self.losses.min(), self.losses.max() - self.losses.min()
        spread = spread.clamp(min=1e-3 * float(least))
        starts = torch.tensor([[math.log(floor), 0.0, math.log(alpha), 0.0] for floor, alpha in _STARTS]).double()
        starts[:, 0] += least.log()
        starts[:, 1] = (0.3 * spread).log()
        starts[:, 3] = (0.3 * spread).log()
        logs = starts.repeat(len(weights), 1)
        weights = (weights * self.weights).repeat_interleave(len(_STARTS), 0)
        costs, damping = self._costs(logs, weights), torch.full((len(logs), 1), 1e-2, dtype=torch.float64)
        for _ in range(_ITERATIONS):
            moved = logs + self._step(logs, weights, damping)
            now = self._costs(moved, weights)
            better = now < costs
            logs = torch.where(better[:, None], moved, logs)
            costs = torch.where(better, now, costs)
            damping = torch.where(better[:, None], damping / 3.0, damping * 4.0).clamp(1e-9, 1e9)
        best = costs.reshape(-1, len(_STARTS)).argmin(1)
        return logs.reshape(-1, len(_STARTS), 4)[torch.arange(len(best)), best]

    def _residuals(self, logs: Tensor) -> tuple[Tensor, Tensor]:
        predicted = self.predict(logs, self.x, self.z)
        return predicted, predicted.clamp(min=1e-30).log() - self.losses.log()

    def _costs(self, logs: Tensor, weights: Tensor) -> Tensor:
        predicted, residuals = self._residuals(logs)
        size = residuals.abs()
        huber = torch.where(size < HUBER, size.square() / 2.0, HUBER * (size - HUBER / 2.0))
        costs = (weights * huber).sum(1)
        return torch.where((predicted > 0.0).all(1) & (logs.abs() < 40.0).all(1), costs, torch.inf)

    def _step(self, logs: Tensor, weights: Tensor, damping: Tensor) -> Tensor:
        """Return a damped Gauss-Newton step; residuals above the Huber limit get less weight."""
        predicted, residuals = self._residuals(logs)
        floor, scale, alpha, annealing = logs.exp().unsqueeze(2).unbind(1)
        power = scale * self.x**-alpha
        columns = [floor.expand_as(power), power, -power * alpha * self.x.log(), -annealing * self.z.expand_as(power)]
        slopes = torch.stack(columns, 2) / predicted.clamp(min=1e-30).unsqueeze(2)
        weights = weights * (HUBER / residuals.abs().clamp(min=HUBER))
        weighted = slopes * weights.unsqueeze(2)
        curvature = slopes.mT @ weighted
        diagonal = curvature.diagonal(dim1=1, dim2=2)
        curvature = curvature + torch.diag_embed(damping * diagonal + 1e-12)
        gradient = (weighted * residuals.unsqueeze(2)).sum(1)
        step: Tensor = torch.linalg.solve(curvature, -gradient)
        return step.clamp(-1.0, 1.0)

    def constants(self, logs: Tensor, decay: float) -> AnnealingConstants:
        """Return constants in the units of the curves."""
        floor, scale, alpha, annealing = logs.exp().tolist()
        residual = float(self._residuals(logs[None])[1].abs().mean())
        return AnnealingConstants(floor, scale * self.first**alpha, alpha, annealing / self.second, decay, residual)


def _means(rates: Sequence[float] | Tensor, losses: Sequence[float] | Tensor, decay: float) -> Tensor:
    """Return S1, S2, loss and number of steps of the points of a curve, (points, 4); early points hold fewer steps."""
    losses = torch.as_tensor(losses, dtype=torch.float64, device="cpu")
    if losses.shape != (len(rates),):
        raise ValueError(
            f"Each curve needs as many losses as rates; got {len(rates)} rates and losses {tuple(losses.shape)}."
        )
    if bool((losses <= 0.0).any()):
        raise ValueError(f"Losses must be above 0, because their logarithms are fitted; got {float(losses.min()):.3g}.")
    first, second = annealing_areas(rates, decay)
    peak = int(torch.as_tensor(rates, dtype=torch.float64).argmax())
    known = (torch.arange(len(losses)) >= peak) & losses.isfinite() & (first > 0.0)
    rows = torch.stack([first, second, losses], 1)[known]
    edges = sorted({round(len(rows) * (number / _POINTS) ** 2) for number in range(_POINTS + 1)})
    means = [torch.cat([rows[a:b].mean(0), torch.tensor([float(b - a)]).double()]) for a, b in pairwise(edges)]
    return torch.stack(means) if means else torch.empty(0, 4, dtype=torch.float64)
