"""N:M sparsity as functions of tensors: patterns, masks, masked weights, the SR-STE term.

Schedules of patterns are in ``nm_schedule.py``. The callback that uses both is
:class:`lightning_grad.callbacks.NMSparsity`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_grad.functional.gradients.shards import on_shard, sharded_dims
from lightning_grad.functional.gradients.tensor_lists import is_sharded, whole
from lightning_grad.functional.sparsity._chunked_mask import chunked_mask, is_chunkable
from lightning_grad.functional.sparsity._group_top import top_of_groups

Axis = Literal["input", "output"] | int
Gradient = Literal["masked", "ste"]

# Entries of a weight up to which joining is faster than a call of its own, and entries joined at once. With more, new
# memory costs more than the calls on a CPU; on a GPU, this limits the memory.
_ON_CPU, _ON_GPU = (1 << 15, 1 << 18), (1 << 22, 1 << 24)


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
            text: Two integers separated by a colon.

        Raises:
            ValueError: If the text does not have this form, or not ``1 <= N <= M``.
        """
        found = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", str(text))
        if found is None:
            raise ValueError(f"An N:M pattern must be written like '2:4' (quoted in YAML); got {text!r}.")
        return cls(int(found[1]), int(found[2]))

    @property
    def density(self) -> float:
        """The fraction of weights that is kept, N / M."""
        return self.n / self.m

    def fits(self, size: int) -> bool:
        """Return True if M divides the size of a dimension."""
        return size % self.m == 0

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


def group_dim(weight: Tensor, axis: Axis = "input") -> int:
    """Return the dimension along which a weight is grouped.

    Args:
        weight: A weight in torch's layout, shape ``(out, in, *kernel)``, or a vector.
        axis: ``"input"`` for dimension 1, ``"output"`` for dimension 0, or the index of a dimension.

    Raises:
        ValueError: If the weight has no such dimension.
    """
    if isinstance(axis, str) and axis not in ("input", "output"):
        raise ValueError(f"axis must be 'input', 'output' or the index of a dimension; got {axis!r}.")
    dim = {"input": min(1, weight.ndim - 1), "output": 0}[axis] if isinstance(axis, str) else int(axis)
    if not -weight.ndim <= dim < weight.ndim:
        raise ValueError(
            f"axis={axis!r} is out of range for a weight of shape {tuple(weight.shape)}. Set axis to 'input' or "
            "'output', or exclude this weight."
        )
    return dim % weight.ndim


def nm_mask(weight: Tensor, n: int, m: int, axis: Axis = "input") -> Tensor:
    r"""Return a mask of the ``n`` largest magnitudes in every group of ``m`` consecutive weights.

    .. math::
        \text{mask}_i = 1 \iff \#\{j \in g(i) : |w_j| > |w_i| \text{ or } (|w_j| = |w_i|,\ j < i)\} < n

    where :math:`g(i)` is the group of entry :math:`i`. Exactly ``n`` entries per group are kept for all values: ties go
    to the lowest index, and NaN counts as the smallest magnitude.

    Args:
        weight: Any floating-point tensor.
            Linear weights are ``(out, in)``. In convolutions ``(out, in, *kernel)`` a group is ``m`` consecutive input
            channels at one kernel position. A DTensor may be sharded along every dimension except the grouped one.
        n: Entries kept in a group.
        m: Entries in a group; must divide the size of the dimension.
        axis: ``"input"`` (dimension 1), ``"output"`` (dimension 0), or the index of a dimension.

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
    _check_fit(pattern, weight.shape, dim)
    if is_sharded(weight):
        return _mask_of_shards(weight, pattern, dim)
    with torch.no_grad():
        grouped = weight.detach().reshape(-1, m, weight.shape[dim + 1 :].numel())
        mask = chunked_mask(grouped, n) if n < m and is_chunkable(weight) else None
        return (_mask_of_groups(grouped, n) if mask is None else mask).reshape(weight.shape)


def _check_fit(pattern: NMPattern, shape: torch.Size, dim: int) -> None:
    if not pattern.fits(shape[dim]):
        raise ValueError(
            f"Groups of {pattern.m} do not divide dimension {dim} of a weight of shape {tuple(shape)}. Choose an M that "
            f"divides {shape[dim]}, or another axis."
        )


def _mask_of_groups(grouped: Tensor, n: int) -> Tensor:
    """Return the mask of a weight of shape (groups, M, positions); never waits for the device."""
    groups, m, positions = grouped.shape
    magnitude = torch.empty((m, groups, positions), dtype=grouped.dtype, device=grouped.device)
    torch.abs(grouped.transpose(0, 1), out=magnitude)
    torch.nan_to_num(magnitude, nan=-1.0, posinf=torch.inf, out=magnitude)
    # One copy transposes and converts; ``to`` would keep the transposed layout, and ``reshape`` would copy again.
    mask = torch.empty(grouped.shape, dtype=grouped.dtype, device=grouped.device)
    return mask.copy_(top_of_groups(magnitude, n).transpose(0, 1))


def nm_masks(weights: Sequence[Tensor], n: int, m: int, axes: Sequence[Axis], outside: float = 0.0) -> list[Tensor]:
    """Return the masks of many weights, as :func:`nm_mask` does, with joined calls for the small ones.

    A joined call needs as many operations for hundreds of weights as for one. The masks that it returns share memory.

    Args:
        weights: Weights, each as in :func:`nm_mask`.
        n: Entries kept in a group.
        m: Entries in a group.
        axes: The axis of each weight.
        outside: Value of the entries outside the mask, 0 to 1.
    """
    masks: dict[int, Tensor] = {}
    joined: dict[tuple[torch.dtype, torch.device, int], list[int]] = {}
    entries = 0
    for i, weight in enumerate(weights):
        (small, most), size = _ON_CPU if weight.is_cpu else _ON_GPU, weight.numel()
        if type(weight) in (Tensor, nn.Parameter) and size <= small:
            entries += size
            joined.setdefault((weight.dtype, weight.device, entries // most), []).append(i)
        else:
            masks[i] = _at_least(outside, nm_mask(weight, n, m, axes[i]))
    for of in joined.values():
        some = _joined_masks([weights[i] for i in of], NMPattern(n, m), [axes[i] for i in of], outside)
        masks |= {of[i]: mask for i, mask in some.items()}
    return [masks[i] for i in range(len(weights))]


@torch.no_grad()
def _joined_masks(
    weights: Sequence[Tensor], pattern: NMPattern, axes: Sequence[Axis], outside: float
) -> dict[int, Tensor]:
    """Return the masks of weights of one dtype and device, by position; weights of the same shape are stacked first."""
    kinds: dict[tuple[torch.Size, int], list[int]] = {}
    for i, (weight, axis) in enumerate(zip(weights, axes, strict=True)):
        kinds.setdefault((weight.shape, group_dim(weight, axis)), []).append(i)
    stacks = []
    for (shape, dim), of in kinds.items():
        _check_fit(pattern, shape, dim)
        stack = torch.stack([weights[i] for i in of])
        stacks.append(stack.reshape(-1, pattern.m, shape[dim + 1 :].numel()).movedim(1, 2))
    rows = [stack.reshape(-1, pattern.m) for stack in stacks]
    mask = nm_mask(rows[0] if len(rows) == 1 else torch.cat(rows), pattern.n, pattern.m)
    parts = torch.split(_at_least(outside, mask).view(-1), [stack.numel() for stack in stacks])
    masks: dict[int, Tensor] = {}
    for (shape, _), of, stack, part in zip(kinds, kinds.values(), stacks, parts, strict=True):
        masks.update(zip(of, part.view(stack.shape).movedim(2, 1).reshape(len(of), *shape).unbind(), strict=True))
    return masks


def _at_least(outside: float, mask: Tensor) -> Tensor:
    return mask.clamp_(min=outside) if outside > 0.0 else mask


def _mask_of_shards(weight: Tensor, pattern: NMPattern, dim: int) -> Tensor:
    """Mask each shard of a DTensor, which equals the mask of the whole tensor if no group is split."""
    if dim in sharded_dims(weight):
        raise ValueError(
            f"The weight of shape {tuple(weight.shape)} is sharded along dimension {dim}, which the pattern {pattern} "
            "groups. Shard it along another dimension, or choose another axis."
        )
    # With fewer rows than ranks, the shard of some ranks is empty.
    return on_shard(
        lambda own: nm_mask(own, pattern.n, pattern.m, dim) if own.numel() else own.detach().clone(), weight
    )


def is_nm(weight: Tensor, n: int, m: int, axis: Axis = "input") -> bool:
    """Return True if every group of ``m`` has at most ``n`` nonzero entries.

    Args:
        weight: Any tensor, with the shape conventions of :func:`nm_mask`. A DTensor is gathered, by all ranks.
        n: Nonzero entries allowed in a group.
        m: Entries in a group.
        axis: As in :func:`nm_mask`.

    Returns:
        bool: ``False`` also if ``m`` does not divide the dimension. Synchronizes with the device.

    Example:
        >>> is_nm(torch.tensor([[0.0, -3.0, 2.0, 0.0]]), 2, 4)
        True
    """
    weight, dim = whole(weight), group_dim(weight, axis)
    if not NMPattern(n, m).fits(weight.shape[dim]):
        return False
    grouped = weight.detach().reshape(-1, m, weight.shape[dim + 1 :].numel())
    return bool((grouped != 0).sum(1).le(n).all())


class _StraightThrough(torch.autograd.Function):
    """Multiply in the forward pass; pass the gradient unchanged in the backward pass."""

    @staticmethod
    def forward(ctx: object, weight: Tensor, factor: Tensor) -> Tensor:
        return weight * factor

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def scale_weight(weight: Tensor, factor: Tensor, straight_through: bool = False) -> Tensor:
    r"""Multiply a dense weight by its mask, and choose whether pruned weights receive gradients.

    .. math::
        \tilde W = W \odot S, \qquad \frac{\partial L}{\partial W} = G \odot S \text{ or } G,
        \qquad G = \frac{\partial L}{\partial \tilde W}

    where :math:`S = m + (1 - m) D` for a mask m and a decay value D.

    Args:
        weight: Dense weight W, any shape.
        factor: S, of the same shape and dtype, without gradient.
        straight_through: Pass G unchanged (straight-through estimator); False applies the chain rule.
            With the straight-through estimator pruned weights learn like kept ones.

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
    """Return ``weight * factor`` without gradient; entries with factor 0 become exactly 0, even NaN and infinity.

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

    The term shrinks the pruned weights, which stabilizes the mask.

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
    r"""Return the fraction of entries in which two masks differ.

    For the masks of two steps this is the flip rate. For a mask and the final mask of a phase it is the sparse
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

    separately over pruned and kept entries. It is an unbiased estimate of the variance of a gradient entry, provided
    that its mean changes little in one step. It works with every optimizer, and costs nothing on steps without logging.

    Args:
        gradient: Gradient of this step, any shape.
        previous: Gradient of the previous step, same shape.
        mask: Mask, same shape.

    Returns:
        tuple[Tensor, Tensor]: Scalars for pruned and for kept weights, in squared units of the gradient; NaN for an
        empty group.

    Example:
        >>> masked_gradient_variance(torch.tensor([2.0, 1.0]), torch.tensor([0.0, 0.0]), torch.tensor([1.0, 0.0]))
        (tensor(0.5000), tensor(2.))
    """
    squared = (gradient.float() - previous.float()).square_().mul_(0.5)
    kept = mask != 0
    # Two separate sums: total minus kept would lose the pruned ones, whose gradients may be a thousand times smaller.
    count, of_pruned, of_kept = kept.sum(), squared.masked_fill(kept, 0.0).sum(), squared.masked_fill(~kept, 0.0).sum()
    return of_pruned / (mask.numel() - count), of_kept / count
