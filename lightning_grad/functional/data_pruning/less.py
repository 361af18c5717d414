r"""Influence of samples on a target: LESS.

A step on sample z changes the loss of a target, to first order, by minus the learning rate times the inner product of
the target's gradient with the direction of the step. With Adam, that direction is not the gradient of z, but the
quotient of the moments after it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_grad.functional.gradients.gradient_rows import RademacherProjection


@dataclass(frozen=True, eq=False)
class AdamMoments:
    r"""The moments that Adam keeps of one parameter.

    Args:
        mean: m, in any shape: the mean of the gradients (``exp_avg``).
        square: v, in the same shape: the mean of their squares (``exp_avg_sq``).
        step: t, the number of steps so far.
        betas: :math:`\beta_1, \beta_2`.
        eps: :math:`\varepsilon`.
        largest: The largest v so far, with AMSGrad.
    """

    mean: Tensor
    square: Tensor
    step: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    largest: Tensor | None = None

    def directions(self, gradients: Tensor) -> Tensor:
        r"""Return the direction of Adam's next step for each of several gradients, without the learning rate.

        .. math::
            \Gamma(g) = \frac{\hat m}{\sqrt{\hat v} + \varepsilon}, \qquad
            \hat m = \frac{\beta_1 m + (1 - \beta_1) g}{1 - \beta_1^{t + 1}}, \qquad
            \hat v = \frac{\beta_2 v + (1 - \beta_2) g^2}{1 - \beta_2^{t + 1}}

        Args:
            gradients: g, (B, entries): gradients of the parameter.

        Returns:
            Tensor: (B, entries). Minus the learning rate times it is the step, without weight decay.

        Example:
            >>> moments = AdamMoments(torch.zeros(2), torch.zeros(2), step=0)
            >>> moments.directions(torch.tensor([[3.0, -4.0]]))  # the first step has the size 1
            tensor([[ 1.0000, -1.0000]])
        """
        first, second = self.betas
        mean, square = self.mean.flatten().to(gradients), self.square.flatten().to(gradients)
        moved = torch.lerp(gradients, mean, first)
        size = (square * second).addcmul(gradients, gradients, value=1 - second)
        if self.largest is not None:
            size = torch.maximum(size, self.largest.flatten().to(gradients))
        size = size.div_(1 - second ** (self.step + 1)).sqrt_().add_(self.eps)
        return moved.div_(1 - first ** (self.step + 1)).div_(size)


class GradientCosines:
    r"""Compute the cosines between some gradients and the direction of each sample, from blocks of gradients.

    .. math::
        c_{bj} = \frac{\langle a_j, \Gamma(g_b) \rangle}{\lVert a_j \rVert \, \lVert \Gamma(g_b) \rVert}

    Nothing in the size of B gradients is stored: inner products and squared norms add up over the blocks. With ``dim``,
    targets and directions are projected first (:class:`~lightning_grad.functional.RademacherProjection`), as LESS does to
    keep the directions of whole data sets. A cosine then has a standard error of up to :math:`\sqrt{2 / d}`, and costs d
    products for each entry in place of one for each target.

    Args:
        samples: B.
        targets: The J gradients :math:`a_j`, each by parameter in any shape.
        moments: Adam's moments by parameter. Where there are none, :math:`\Gamma(g) = g`.
        dim: d, a multiple of 64. Default: no projection.
        seed: Seed of the projection.

    Example:
        >>> cosines = GradientCosines(samples=2, targets=[{"weight": torch.tensor([[1.0, 0.0]])}])
        >>> cosines.add("weight", 0, torch.tensor([[3.0, 4.0], [-2.0, 0.0]]))
        >>> cosines.values
        tensor([[ 0.6000],
                [-1.0000]])

    References:
        Xia et al., "LESS: Selecting Influential Data for Targeted Instruction Tuning", 2024, arXiv 2402.04333, section 3.
    """

    def __init__(
        self,
        samples: int,
        targets: Sequence[Mapping[str, Tensor]],
        moments: Mapping[str, AdamMoments] | None = None,
        dim: int | None = None,
        seed: int = 0,
    ) -> None:
        self._moments = moments or {}
        self._seen: set[str] = set()
        self._targets = {name: torch.stack([each[name].flatten() for each in targets]) for name in targets[0]}
        self._dots = torch.zeros(samples, len(targets), dtype=torch.float32)
        self._squares = torch.zeros(samples, dtype=torch.float32)
        self._projection = None if dim is None else RademacherProjection(samples, dim, seed)
        self._projected = None if dim is None else RademacherProjection(len(targets), dim, seed)
        if self._projected is None:
            return
        for name, target in self._targets.items():
            self._projected.add(name, 0, target)
        self._targets = {}

    def begin(self, samples: int) -> None:
        """Start with the gradients of B other samples; the targets, projected or not, are kept."""
        self._seen.clear()
        self._dots = self._dots.new_zeros(samples, self._dots.shape[1])
        self._squares = self._squares.new_zeros(samples)
        if self._projection is not None:
            self._projection.values = self._projection.values.new_zeros(samples, self._projection.values.shape[1])

    def add(self, name: str, start: int, rows: Tensor) -> None:
        """Add one block: the argument ``receive`` of :meth:`PerSampleGradients.stream`."""
        self._seen.add(name)
        moments = self._moments.get(name)
        self._take(name, start, rows if moments is None else moments.directions(rows))

    def _take(self, name: str, start: int, directions: Tensor) -> None:
        if self._projection is not None:
            self._projection.add(name, start, directions)
            return
        self._dots, self._squares = self._dots.to(directions.device), self._squares.to(directions.device)
        part = slice(start, start + len(directions))
        self._dots[part] += directions @ self._targets[name].to(directions).T
        self._squares[part] += directions.square().sum(1)

    @property
    def values(self) -> Tensor:
        """The cosines (B, J) of all blocks so far; 0 for samples without a direction, nan for one that is not finite."""
        self._add_silent()
        if self._projection is not None and self._projected is not None:
            rows = F.normalize(self._projection.values, dim=1)
            return rows @ F.normalize(self._projected.values.to(rows), dim=1).T
        parts = [torch.linalg.vector_norm(target.float(), dim=1) for target in self._targets.values()]
        norms: Tensor = torch.linalg.vector_norm(torch.stack(parts), dim=0).to(self._dots)
        products = self._squares.sqrt()[:, None] * norms
        return torch.where(products == 0.0, 0.0, self._dots / products)

    def _add_silent(self) -> None:
        """Add the directions of parameters that had no gradient: Adam's mean moves them all the same."""
        for name in self._moments.keys() - self._seen:
            self._seen.add(name)
            mean = self._moments[name].mean
            alike = self._moments[name].directions(torch.zeros(1, mean.numel(), device=mean.device))
            self._take(name, 0, alike.expand(len(self._dots), -1))
