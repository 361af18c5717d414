"""N:M sparsity as functions of tensors: patterns, masks, masked weights, the SR-STE term.

The schedules that say which pattern holds when are in ``nm_schedule.py``; the callback that uses both is
:class:`lightning_grad.callbacks.NMSparsity`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_grad.functional.sparsity._group_top import top_of_groups

Axis = Literal["input", "output"] | int
Gradient = Literal["masked", "ste"]


@dataclass(frozen=True)
class NMPattern:
    """Keep the ``n`` entries of largest magnitude in every group of ``m``.

    Args:
        n: Entries kept in a group, at least 1.
        m: Entries in a group, at least ``n``.

    Raises:
        ValueError: If not ``1 <= n <= m``.

    Example:
        >>> NMPattern.parse("2:4").density
        0.5
        >>> str(NMPattern(1, 16))
        '1:16'
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 1 <= self.n <= self.m:
            raise ValueError(
                f"An N:M pattern keeps N of every M weights, with 1 <= N <= M; got {self.n}:{self.m}. "
                "Write for example '2:4' or '1:8'."
            )

    @classmethod
    def parse(cls, text: str) -> NMPattern:
        """Read ``"N:M"``.

        Args:
            text: Two whole numbers with a colon between them.

        Raises:
            ValueError: If the text is not of that form, or the numbers make no pattern.
        """
        found = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", str(text))
        if found is None:
            raise ValueError(f"An N:M pattern is written like '2:4' (in YAML, in quotes); got {text!r}.")
        return cls(int(found[1]), int(found[2]))

    @property
    def density(self) -> float:
        """The share of weights that is kept, N / M."""
        return self.n / self.m

    def fits(self, size: int) -> bool:
        """Say whether a dimension of this size divides into whole groups."""
        return size % self.m == 0

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


def group_dim(weight: Tensor, axis: Axis = "input") -> int:
    """Return the dimension along which the groups of a weight lie.

    Args:
        weight: A weight in torch's layout, shape ``(out, in, *kernel)``; one-dimensional weights have one choice.
        axis: ``"input"`` for dimension 1, ``"output"`` for dimension 0, or the number of a dimension.

    Raises:
        ValueError: If the weight has no such dimension.
    """
    if isinstance(axis, str) and axis not in ("input", "output"):
        raise ValueError(f"axis is 'input', 'output' or a dimension's number; got {axis!r}.")
    dim = {"input": min(1, weight.ndim - 1), "output": 0}[axis] if isinstance(axis, str) else int(axis)
    if not -weight.ndim <= dim < weight.ndim:
        raise ValueError(
            f"axis={axis!r} needs a weight of more dimensions than {tuple(weight.shape)} has. Set axis to 'input' or "
            "'output', or exclude this weight."
        )
    return dim % weight.ndim


def nm_mask(weight: Tensor, n: int, m: int, axis: Axis = "input") -> Tensor:
    r"""Mark the ``n`` weights of largest magnitude in every group of ``m`` consecutive ones.

    .. math::
        \text{mask}_i = 1 \iff \#\{j \in g(i) : |w_j| > |w_i| \text{ or } (|w_j| = |w_i|,\ j < i)\} < n

    where :math:`g(i)` is the group of entry :math:`i`. Exactly ``n`` entries a group are kept whatever the values: among
    equal magnitudes the lowest index comes first, and NaN counts as the smallest.

    Args:
        weight: Any floating tensor. Linear weights are ``(out, in)``; in convolutions ``(out, in, *kernel)`` a group
            holds ``m`` consecutive input channels at one position of the kernel. A DTensor may be sharded along every
            dimension but the groups' own.
        n: Entries kept in a group.
        m: Entries in a group; divides the size of the dimension.
        axis: ``"input"`` (dimension 1), ``"output"`` (dimension 0), or a dimension's number.

    Returns:
        Tensor: Ones and zeros in the shape and dtype of ``weight``.

    Raises:
        ValueError: If not ``1 <= n <= m``, if ``m`` does not divide the dimension, or if a DTensor is sharded along it.

    Example:
        >>> nm_mask(torch.tensor([[0.1, -3.0, 2.0, 0.5]]), 2, 4)
        tensor([[0., 1., 1., 0.]])

    References:
        Zhou et al., "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch", 2021, arXiv 2102.04010.
    """
    pattern, dim = NMPattern(n, m), group_dim(weight, axis)
    if not pattern.fits(weight.shape[dim]):
        raise ValueError(
            f"Groups of {m} do not divide dimension {dim} of a weight of shape {tuple(weight.shape)}: choose an M that "
            f"divides {weight.shape[dim]}, or another axis."
        )
    if hasattr(weight, "to_local"):
        return _mask_of_shards(weight, pattern, dim)
    with torch.no_grad():
        grouped = weight.detach().reshape(-1, m, weight.shape[dim + 1 :].numel())
        magnitude = torch.empty((m, grouped.shape[0], grouped.shape[2]), dtype=weight.dtype, device=weight.device)
        torch.abs(grouped.transpose(0, 1), out=magnitude)
        torch.nan_to_num(magnitude, nan=-1.0, posinf=torch.inf, out=magnitude)
        # One copy that turns and converts at once; ``to`` would keep the turned layout, and ``reshape`` copy again.
        mask = torch.empty(grouped.shape, dtype=weight.dtype, device=weight.device)
        return mask.copy_(top_of_groups(magnitude, n).transpose(0, 1)).reshape(weight.shape)


def _mask_of_shards(weight: Tensor, pattern: NMPattern, dim: int) -> Tensor:
    """Mask a DTensor shard by shard, which is the mask of the whole as long as no group is cut."""
    from torch.distributed.tensor import DTensor

    assert isinstance(weight, DTensor)
    # By attribute: the placement of FSDP2 beside tensor parallelism (_StridedShard) is no Shard.
    if any(getattr(placement, "dim", None) == dim for placement in weight.placements):
        raise ValueError(
            f"The weight of shape {tuple(weight.shape)} is sharded along dimension {dim}, in which the groups of "
            f"{pattern} lie: shard it along another dimension, or choose another axis."
        )
    local = nm_mask(weight.to_local(), pattern.n, pattern.m, dim)
    # Shards need not be of one size, so the shape of the whole cannot be told from one of them.
    mesh, placements = weight.device_mesh, weight.placements
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=weight.shape, stride=weight.stride())


def is_nm(weight: Tensor, n: int, m: int, axis: Axis = "input") -> bool:
    """Say whether no group of ``m`` holds more than ``n`` entries that are not zero.

    Args:
        weight: Any tensor; the shape conventions are those of :func:`nm_mask`.
        n: Entries allowed in a group.
        m: Entries in a group.
        axis: As in :func:`nm_mask`.

    Returns:
        bool: ``False`` also where ``m`` does not divide the dimension. Reads the values, so it waits for a GPU.

    Example:
        >>> is_nm(torch.tensor([[0.0, -3.0, 2.0, 0.0]]), 2, 4)
        True
    """
    dim = group_dim(weight, axis)
    if not NMPattern(n, m).fits(weight.shape[dim]):
        return False
    grouped = weight.detach().reshape(-1, m, weight.shape[dim + 1 :].numel())
    return bool((grouped != 0).sum(1).le(n).all())


class _StraightThrough(torch.autograd.Function):
    """Forward: the product. Backward: the gradient as if the factor were one."""

    @staticmethod
    def forward(ctx: object, weight: Tensor, factor: Tensor) -> Tensor:
        return weight * factor

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def scale_weight(weight: Tensor, factor: Tensor, straight_through: bool = False) -> Tensor:
    r"""Multiply a dense weight by its mask, with a choice of what the pruned weights learn.

    .. math::
        \tilde W = W \odot S, \qquad \frac{\partial L}{\partial W} = G \odot S \text{ or } G,
        \qquad G = \frac{\partial L}{\partial \tilde W}

    with :math:`S = m + (1 - m) D`, the mask m and its decay value D.

    Args:
        weight: Dense weight W, any shape.
        factor: S, of the same shape and dtype, without gradient.
        straight_through: Pass G on as it is, so that pruned weights learn like kept ones (the straight-through
            estimator); otherwise the chain rule.

    Returns:
        Tensor: The effective weight.

    Example:
        >>> w = torch.tensor([2.0, 3.0], requires_grad=True)
        >>> scale_weight(w, torch.tensor([1.0, 0.0]), straight_through=True).sum().backward()
        >>> w.grad
        tensor([1., 1.])
    """
    return _StraightThrough.apply(weight, factor) if straight_through else weight * factor  # type: ignore[no-untyped-call]


def prune_weight(weight: Tensor, factor: Tensor) -> Tensor:
    """Return ``weight * factor`` without gradient and with exact zeros: NaN and infinity are pruned as well.

    Args:
        weight: Dense weight, any shape.
        factor: As in :func:`scale_weight`.

    Example:
        >>> prune_weight(torch.tensor([2.0, float("nan")]), torch.tensor([1.0, 0.0]))
        tensor([2., 0.])
    """
    return (weight.detach() * factor).masked_fill_(factor == 0, 0.0)


def add_sr_ste_(gradient: Tensor, weight: Tensor, factor: Tensor, strength: float = 2e-4) -> Tensor:
    r"""Add the SR-STE term to a gradient, in place.

    .. math::
        G \leftarrow G + \lambda (1 - m) \odot W

    The plus sign shrinks the pruned weights, which steadies the mask.

    Args:
        gradient: G, changed in place.
        weight: Dense weight W, same shape.
        factor: Mask m, same shape.
        strength: :math:`\lambda`; 2e-4 in the paper (section 4).

    Returns:
        Tensor: ``gradient``.

    Example:
        >>> add_sr_ste_(torch.zeros(2), torch.tensor([4.0, 1.0]), torch.tensor([1.0, 0.0]), 0.5)
        tensor([0.0000, 0.5000])

    References:
        Zhou et al., 2021, arXiv 2102.04010, equation 9.
    """
    return gradient.addcmul_(1 - factor, weight.detach(), value=strength)


def mask_distance(mask: Tensor, other: Tensor) -> Tensor:
    r"""Return the share of entries in which two masks differ.

    Between the masks of two steps it is the share of flips; against the final mask of a phase it is the sparse
    architecture divergence (SAD) of SR-STE, divided by the number of weights.

    Args:
        mask: Mask, any shape and dtype.
        other: Mask of the same shape.

    Returns:
        Tensor: Scalar in [0, 1], on the device of the masks.

    Example:
        >>> mask_distance(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.0]))
        tensor(0.5000)

    References:
        Zhou et al., 2021, arXiv 2102.04010, section 3.2 (SAD).
    """
    return (mask != other).float().mean()


def masked_gradient_variance(gradient: Tensor, previous: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    r"""Estimate the gradient variance of pruned and of kept weights from two consecutive gradients.

    .. math::
        \hat\sigma^2 = \operatorname{mean}_i \tfrac12 (g_{t,i} - g_{t-1,i})^2

    over the pruned and over the kept entries apart: an unbiased estimate of the variance of a gradient entry, as long as
    its mean moves little in one step. It works with every optimizer, and costs nothing on the steps that are not logged.

    Args:
        gradient: Gradient of this step, any shape.
        previous: Gradient of the step before, same shape.
        mask: Mask, same shape.

    Returns:
        tuple[Tensor, Tensor]: Scalars for pruned and for kept weights, in squared units of the gradient; NaN where there
        are none.

    Example:
        >>> masked_gradient_variance(torch.tensor([2.0, 1.0]), torch.tensor([0.0, 0.0]), torch.tensor([1.0, 0.0]))
        (tensor(0.5000), tensor(2.))
    """
    squared = (gradient.float() - previous.float()).square_().mul_(0.5)
    kept = mask != 0
    # Summed apart: the difference from the total would drown the pruned, whose gradients may be a thousand times smaller.
    count, of_pruned, of_kept = kept.sum(), squared.masked_fill(kept, 0.0).sum(), squared.masked_fill(~kept, 0.0).sum()
    return of_pruned / (mask.numel() - count), of_kept / count
