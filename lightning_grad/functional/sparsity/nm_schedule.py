"""Which N:M pattern and which decay value hold at which point of a run: the recipes as pure functions of progress.

The masks themselves are in :mod:`lightning_grad.functional.sparsity.nm_sparsity`.
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
    """What holds at one moment of the run.

    Args:
        pattern: The pattern in force; ``None`` while the weights are dense.
        decay: D, the factor of the weights outside the mask; 0 prunes them.
        final: Whether the pattern in force is the one the run ends with, with D = 0.
    """

    pattern: NMPattern | None
    decay: float
    final: bool


DENSE = NMPhase(None, 1.0, False)


def stepwise_patterns(target: NMPattern) -> list[NMPattern]:
    """Return the frames of SdGf-stepwise: (M-1):M, then M/2:M, M/4:M ... down to N:M.

    Args:
        target: The pattern of the last frame. The released code never reaches one whose N is no power of two times
            smaller than M (3:8, say); here the last frame is always the target.

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
    """Return the frames of SdGf-geometric: the target's density over groups that shrink, 8N:8M, 4N:4M, 2N:2M, N:M.

    Args:
        target: The pattern of the last frame.
        widest: Factor of the first frame, a power of two; 8 in the released code.

    Raises:
        ValueError: If ``widest`` is no power of two.

    Example:
        >>> [str(p) for p in geometric_patterns(NMPattern(2, 4))]
        ['16:32', '8:16', '4:8', '2:4']
    """
    if widest < 1 or widest & (widest - 1):
        raise ValueError(f"geometric_start is the factor of the first, widest groups, a power of two; got {widest}.")
    factors = [2**k for k in range(widest.bit_length() - 1, -1, -1)]
    return [NMPattern(target.n * f, target.m * f) for f in factors]


def linear_decay(position: float, length: float, rate: float | None = None) -> float:
    r"""Return the decay value of MdGf-linear, :math:`D = \max(0, 1 - \beta t)`.

    Args:
        position: Where in the decay phase, 0 to 1.
        length: Length of the decay phase in optimizer steps.
        rate: :math:`\beta` for one step; ``None`` reaches 0 at half of the phase. The released code has 2e-4.

    Example:
        >>> linear_decay(0.25, length=100)
        0.5
    """
    slope = 2.0 if rate is None else rate * length
    return max(0.0, 1.0 - slope * position)


def exponential_decay(position: float, length: float, rate: float | None = None) -> float:
    r"""Return the decay value of MdGf-exponential, :math:`D = e^{-\beta t}`, which is never 0.

    Args:
        position: Where in the decay phase, 0 to 1.
        length: Length of the decay phase in optimizer steps.
        rate: :math:`\beta` for one step; ``None`` is 7 / length, which ends near 1e-3. The released code has 1e-4 for
            its vision transformer.

    Example:
        >>> round(exponential_decay(1.0, length=100), 6)
        0.000912
    """
    return math.exp(-(7.0 if rate is None else rate * length) * position)


@dataclass(frozen=True)
class NMSchedule:
    r"""Which pattern and decay value hold at which share of the run.

    A dense phase, then the recipe's own phase, then a fine-tuning phase with the target pattern and D = 0:

    .. math::
        \text{dense} \; [0, a) \quad \text{recipe} \; [a, 1 - b) \quad \text{target} \; [1 - b, 1]

    Args:
        recipe: One of :data:`RECIPES`, or pairs (share of the run from which it holds, pattern).
        dense_fraction: a, share of the run before anything is pruned.
        finetune_fraction: b, share of the run in which the target pattern holds with D = 0.
        decay: :math:`\beta` of the two MdGf recipes for one optimizer step; ``None`` fits it to the phase.
        geometric_start: Factor of the widest groups of SdGf-geometric.

    Raises:
        ValueError: For an unknown recipe, fractions that leave the recipe no phase, pairs out of order, or a negative
            decay.

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
                raise ValueError(f"{name} is a share of the run, 0 to 1; got {getattr(self, name)}.")
        if self.dense_fraction + self.finetune_fraction >= 1.0:
            raise ValueError(
                f"dense_fraction={self.dense_fraction} and finetune_fraction={self.finetune_fraction} leave no room for "
                "the recipe between them: their sum must be below 1."
            )
        if self.decay is not None and not self.decay > 0:
            raise ValueError(f"decay is the coefficient beta for one optimizer step, above 0; got {self.decay}.")
        geometric_patterns(NMPattern(1, 1), self.geometric_start)
        if isinstance(self.recipe, tuple):
            self._check_stages(self.recipe)
        else:
            check_choice(self.recipe, RECIPES, "recipe")

    def _check_stages(self, stages: Sequence[tuple[float, NMPattern]]) -> None:
        starts = [start for start, _ in stages]
        if not starts or any(not 0.0 <= s < 1.0 for s in starts) or sorted(set(starts)) != starts:
            raise ValueError(
                "A schedule is a list of (share of the run, pattern) with rising shares from 0 to below 1, such as "
                f"[(0.0, '3:4'), (0.5, '2:4')]; got shares {starts}."
            )

    def phase(self, progress: float, target: NMPattern, total_steps: float, size: int | None = None) -> NMPhase:
        """Return what holds at a point of the run.

        Args:
            progress: Share of the run that is done, 0 to 1.
            target: The pattern the run ends with.
            total_steps: Length of the run in optimizer steps; only an explicit ``decay`` needs it.
            size: Size of the dimension in which the groups lie; a frame whose groups do not divide it is passed over.
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
        # The small addend makes frames equal to the step: position 0.75 may come as 0.7499999999999999.
        now = frames[min(int(position * len(frames) + 1e-9), len(frames) - 1)]
        return NMPhase(now, 0.0, now == target)

    @staticmethod
    def _stage(progress: float, stages: Sequence[tuple[float, NMPattern]], size: int | None) -> NMPhase:
        phase = DENSE
        for number, (start, pattern) in enumerate(stages, start=1):
            if progress >= start and (size is None or pattern.fits(size)):
                phase = NMPhase(pattern, 0.0, number == len(stages))
        return phase
