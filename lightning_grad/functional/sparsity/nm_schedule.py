"""Recipes for N:M sparsity: the pattern and the decay value as pure functions of progress.

The masks are computed in :mod:`lightning_grad.functional.sparsity.nm_sparsity`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from lightning_grad.functional.choices import check_choice
from lightning_grad.functional.sparsity.nm_sparsity import NMPattern

Recipe = Literal["ste", "sr-ste", "step", "mdgf-linear", "mdgf-exponential", "sdgf-stepwise", "sdgf-geometric"]
RECIPES: tuple[str, ...] = get_args(Recipe)


@dataclass(frozen=True)
class NMPhase:
    """The pattern and decay value at one point of the run.

    Args:
        pattern: Current pattern; ``None`` while the weights are dense.
        decay: D, the factor of the weights outside the mask; 0 prunes them.
        final: True for the last pattern of the run with D = 0.
    """

    pattern: NMPattern | None
    decay: float
    final: bool


DENSE = NMPhase(None, 1.0, False)


def stepwise_patterns(target: NMPattern) -> list[NMPattern]:
    """Return the patterns of SdGf-stepwise: (M-1):M, then M/2:M, M/4:M ... down to N:M.

    Args:
        target: The last pattern.
            The released code never reaches a target whose M / N is not a power of two, such as 3:8; here the last
            pattern is always the target.

    Example:
        >>> [str(p) for p in stepwise_patterns(NMPattern(1, 8))]
        ['7:8', '4:8', '2:8', '1:8']
        >>> [str(p) for p in stepwise_patterns(NMPattern(3, 8))]
        ['7:8', '4:8', '3:8']

    References:
        Bambhaniya et al., "Progressive Gradient Flow for Robust N:M Sparsity Training in Transformers", 2024,
        arXiv 2402.04744, section 4 and the released code.
    """
    n, m = target.n, target.m
    kept = [m - 1] if m - 1 > n else []
    half = m // 2
    while half > n:
        if half < m - 1:
            kept.append(half)
        half //= 2
    return [NMPattern(k, m) for k in [*kept, n]]


def geometric_patterns(target: NMPattern, widest: int = 8) -> list[NMPattern]:
    """Return the patterns of SdGf-geometric: constant density, shrinking groups, 8N:8M, 4N:4M, 2N:2M, N:M.

    Args:
        target: The last pattern.
        widest: Factor of the first pattern, a power of two; 8 in the released code.

    Raises:
        ValueError: If ``widest`` is not a power of two.

    Example:
        >>> [str(p) for p in geometric_patterns(NMPattern(2, 4))]
        ['16:32', '8:16', '4:8', '2:4']
    """
    if widest < 1 or widest & (widest - 1):
        raise ValueError(f"geometric_start must be a power of two; got {widest}.")
    factors = [2**k for k in range(widest.bit_length() - 1, -1, -1)]
    return [NMPattern(target.n * f, target.m * f) for f in factors]


def linear_decay(position: float, length: float, rate: float | None = None) -> float:
    r"""Return the decay value of MdGf-linear, :math:`D = \max(0, 1 - \beta t)`.

    Args:
        position: Position in the decay phase, 0 to 1.
        length: Length of the decay phase in optimizer steps.
        rate: :math:`\beta` per step; ``None`` reaches 0 halfway through the phase.
            The released code uses 2e-4.

    Example:
        >>> linear_decay(0.25, length=100)
        0.5
    """
    slope = 2.0 if rate is None else rate * length
    return max(0.0, 1.0 - slope * position)


def exponential_decay(position: float, length: float, rate: float | None = None) -> float:
    r"""Return the decay value of MdGf-exponential, :math:`D = e^{-\beta t}`, which is never 0.

    Args:
        position: Position in the decay phase, 0 to 1.
        length: Length of the decay phase in optimizer steps.
        rate: :math:`\beta` per step; ``None`` is 7 / length, which ends near 1e-3.
            The released code uses 1e-4 for its vision transformer.

    Example:
        >>> round(exponential_decay(1.0, length=100), 6)
        0.000912
    """
    return math.exp(-(7.0 if rate is None else rate * length) * position)


@dataclass(frozen=True)
class NMSchedule:
    r"""Schedule of N:M patterns and decay values over a run.

    It has a dense phase, the phase of the recipe, and a fine-tuning phase with the target pattern and D = 0:

    .. math::
        \text{dense} \; [0, a) \quad \text{recipe} \; [a, 1 - b) \quad \text{target} \; [1 - b, 1]

    Args:
        recipe: One of :data:`RECIPES`, or pairs (fraction of the run at which it starts, pattern).
        dense_fraction: a, initial fraction of the run without pruning.
        finetune_fraction: b, final fraction of the run with the target pattern and D = 0.
        decay: :math:`\beta` of the two MdGf recipes per optimizer step; ``None`` fits it to the phase.
        geometric_start: Factor of the widest groups of SdGf-geometric.

    Raises:
        ValueError: For an unknown recipe, fractions whose sum reaches 1, pairs out of order, or a decay that is not
            positive.

    Example:
        >>> schedule = NMSchedule("sdgf-stepwise", finetune_fraction=0.2)
        >>> str(schedule.phase(0.5, NMPattern(1, 8), total_steps=100).pattern)
        '2:8'
    """

    recipe: Recipe | tuple[tuple[float, NMPattern], ...]
    dense_fraction: float = 0.0
    finetune_fraction: float = 0.0
    decay: float | None = None
    geometric_start: int = 8

    def __post_init__(self) -> None:
        for name in ("dense_fraction", "finetune_fraction"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must be a fraction of the run, 0 to 1; got {getattr(self, name)}.")
        if self.dense_fraction + self.finetune_fraction >= 1.0:
            raise ValueError(
                f"dense_fraction={self.dense_fraction} and finetune_fraction={self.finetune_fraction} leave no room "
                "for the recipe. Lower one of them: their sum must be below 1."
            )
        if self.decay is not None and not self.decay > 0:
            raise ValueError(f"decay must be above 0; got {self.decay}.")
        geometric_patterns(NMPattern(1, 1), self.geometric_start)
        if isinstance(self.recipe, tuple):
            self._check_stages(self.recipe)
        else:
            check_choice(self.recipe, RECIPES, "recipe")

    def _check_stages(self, stages: Sequence[tuple[float, NMPattern]]) -> None:
        starts = [start for start, _ in stages]
        if not starts or any(not 0.0 <= s < 1.0 for s in starts) or sorted(set(starts)) != starts:
            raise ValueError(
                "A schedule must be a list of (fraction of the run, pattern) with increasing fractions from 0 to below "
                f"1, such as [(0.0, '3:4'), (0.5, '2:4')]; got fractions {starts}."
            )

    def phase(self, progress: float, target: NMPattern, total_steps: float, size: int | None = None) -> NMPhase:
        """Return the pattern and decay value at a point of the run.

        Args:
            progress: Completed fraction of the run, 0 to 1.
            target: The last pattern of the run.
            total_steps: Length of the run in optimizer steps; only an explicit ``decay`` needs it.
            size: Size of the grouped dimension; patterns whose groups do not divide it are skipped.
        """
        if isinstance(self.recipe, tuple):
            return self._stage(progress, self.recipe, size)
        if progress < self.dense_fraction:
            return DENSE
        length = 1.0 - self.dense_fraction - self.finetune_fraction
        position = (progress - self.dense_fraction) / length
        if position >= 1.0 or progress >= 1.0 - self.finetune_fraction:
            return NMPhase(target, 0.0, True)
        if self.recipe.startswith("sdgf"):
            return self._frame(position, target, size)
        if self.recipe.startswith("mdgf"):
            decay_value = linear_decay if self.recipe == "mdgf-linear" else exponential_decay
            value = decay_value(position, length * total_steps, self.decay)
            return NMPhase(target, value, value == 0.0)
        return NMPhase(target, 0.0, True)

    def _frame(self, position: float, target: NMPattern, size: int | None) -> NMPhase:
        if self.recipe == "sdgf-stepwise":
            frames = stepwise_patterns(target)
        else:
            frames = geometric_patterns(target, self.geometric_start)
        frames = [f for f in frames if size is None or f.fits(size)]
        # The small addend absorbs rounding: position 0.75 may arrive as 0.7499999999999999.
        now = frames[min(int(position * len(frames) + 1e-9), len(frames) - 1)]
        return NMPhase(now, 0.0, now == target)

    @staticmethod
    def _stage(progress: float, stages: Sequence[tuple[float, NMPattern]], size: int | None) -> NMPhase:
        phase = DENSE
        for number, (start, pattern) in enumerate(stages, start=1):
            if progress >= start and (size is None or pattern.fits(size)):
                phase = NMPhase(pattern, 0.0, number == len(stages))
        return phase
