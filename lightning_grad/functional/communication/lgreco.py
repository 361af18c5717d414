r"""L-GreCo: choose a compression level for each layer, so little is sent at a given error."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_grad.functional.communication.powersgd import orthonormalize, thin_product
from lightning_grad.functional.communication.topk_selection import select_largest

_REFINEMENTS = 2  # passes of the subspace iteration after the first


def choose_levels(
    errors: Sequence[Sequence[float]],
    sizes: Sequence[Sequence[float]],
    uniform: Sequence[int],
    bins: int = 10_000,
) -> list[int]:
    r"""Return the level of each layer that minimizes the total size at no more error than a uniform setting.

    .. math::
        \min_{c} \sum_l s_l(c_l) \quad \text{subject to} \quad \sum_l e_l(c_l) \le E = \sum_l e_l(u_l)

    where :math:`e_l(c)` and :math:`s_l(c)` are the error and the size of layer :math:`l` at level :math:`c`, and
    :math:`u_l` is its level in the uniform setting. A dynamic program over the layers solves it. Its state is the error
    so far in excess of each layer's smallest error, in units of the largest possible excess divided by ``bins``. Units
    are rounded up, so the bound holds exactly. Rounding can cost an optimal choice that meets the bound by less than
    one unit per layer. If nothing smaller than the uniform setting is found, the uniform setting is returned.

    Its time is proportional to layers times levels times bins.

    Args:
        errors: Squared error of each layer at each of its levels; layers may have different numbers of levels.
        sizes: Size of each layer at each of its levels, in any unit.
        uniform: Index of the level of each layer in the uniform setting.
        bins: Number of units of the error.

    Returns:
        list[int]: Index of the level of each layer.

    Raises:
        ValueError: If the arguments disagree in length, ``uniform`` is not an index, an error or a size is negative or
            not finite, or ``bins`` is below 1.

    Example:
        >>> errors = [[9.0, 4.0, 0.0], [1.0, 0.5, 0.0]]  # the second layer matters little
        >>> sizes = [[1, 2, 4], [10, 20, 40]]
        >>> choose_levels(errors, sizes, uniform=[1, 1])
        [2, 0]

    References:
        - Alimohammadi et al. (2022), L-GreCo: Layerwise-Adaptive Gradient Compression for Efficient and Accurate Deep
          Learning, arXiv 2210.17357, algorithm 1. Differences: units count the excess over each layer's smallest error,
          which makes them finer, and the result never has a larger size than the uniform setting.
    """
    _check(errors, sizes, uniform, bins)
    least = [min(layer) for layer in errors]
    excess = sum(layer[level] for layer, level in zip(errors, uniform, strict=True)) - sum(least)
    # Best size of the layers so far with an excess of at most this many units.
    best = torch.zeros(bins + 1, dtype=torch.float64)
    units: list[list[int]] = []
    chosen: list[Tensor] = []
    for layer, smallest, size in zip(errors, least, sizes, strict=True):
        units.append([_units(error - smallest, excess, bins) for error in layer])
        best, choice = _add_layer(best, units[-1], size)
        chosen.append(choice)
    levels, left = [], bins
    for layer_units, choice in zip(reversed(units), reversed(chosen), strict=True):
        levels.append(int(choice[left]))
        left -= layer_units[levels[-1]]
    levels.reverse()
    return levels if total_at(sizes, levels) < total_at(sizes, uniform) else list(uniform)


def _units(error: float, excess: float, bins: int) -> int:
    if error <= 0.0:
        return 0
    return bins + 1 if error > excess else math.ceil(error / excess * bins)


def _add_layer(best: Tensor, units: Sequence[int], sizes: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Return the best sizes with one more layer, and its level in each of them."""
    total = torch.full_like(best, torch.inf)
    choice = torch.zeros(len(best), dtype=torch.int16)
    for level, (used, size) in enumerate(zip(units, sizes, strict=True)):
        if used >= len(best):
            continue
        candidate = best[: len(best) - used] + size
        choice[used:].masked_fill_(candidate < total[used:], level)
        torch.minimum(total[used:], candidate, out=total[used:])
    return total, choice


def total_at(values: Sequence[Sequence[float]], levels: Sequence[int]) -> float:
    """Return the sum of the values of all layers, each at its level."""
    return sum(layer[level] for layer, level in zip(values, levels, strict=True))


def _check(
    errors: Sequence[Sequence[float]], sizes: Sequence[Sequence[float]], uniform: Sequence[int], bins: int
) -> None:
    if bins < 1:
        raise ValueError(f"bins must be at least 1; got {bins}.")
    lengths = [[len(layer) for layer in values] for values in (errors, sizes)]
    if lengths[0] != lengths[1] or len(uniform) != len(errors):
        raise ValueError(
            "errors, sizes and uniform must have the same layers, and errors and sizes the same levels; got "
            f"{len(errors)}, {len(sizes)} and {len(uniform)} layers with {lengths[0]} and {lengths[1]} levels."
        )
    for place, (level, length) in enumerate(zip(uniform, lengths[0], strict=True)):
        if not 0 <= level < length:
            raise ValueError(f"uniform[{place}] must be an index of the {length} levels of layer {place}; got {level}.")
    for name, values in (("errors", errors), ("sizes", sizes)):
        wrong = [value for layer in values for value in layer if not 0.0 <= value < math.inf]
        if wrong:
            raise ValueError(f"{name} must be at least 0 and finite; got {wrong[0]}.")


def sparse_errors(values: Tensor, counts: Sequence[int]) -> Tensor:
    r"""Return the squared error of keeping only the largest entries of a vector, for several numbers of entries.

    .. math::
        e(k) = \|v\|^2 - \sum_{i \in \operatorname{top}_k |v|} v_i^2

    Args:
        values: v, (n,), floating.
        counts: Numbers of entries :math:`k` to keep, each 1 to n.

    Returns:
        Tensor: float64, (len(counts),).

    Example:
        >>> sparse_errors(torch.tensor([3.0, -1.0, 2.0]), [1, 2, 3])
        tensor([5., 1., 0.], dtype=torch.float64)
    """
    largest = values[select_largest(values, max(counts))].abs()
    kept = largest.sort(descending=True).values.double().square_().cumsum(0)
    rest = torch.linalg.vector_norm(values, dtype=torch.float64).square()
    errors: Tensor = rest - kept[[count - 1 for count in counts]]
    return errors.clamp_(min=0.0)


def low_rank_errors(matrix: Tensor, ranks: Sequence[int], start: Tensor) -> Tensor:
    r"""Return the squared error of low-rank approximations of a matrix, for several ranks.

    .. math::
        e(k) = \|M\|^2 - \sum_{i \le k} \sigma_i^2

    The singular values :math:`\sigma_i` are those of M projected on a subspace, which three passes of subspace
    iteration turn toward the largest ones. They are exact if ``start`` has as many columns as M has rows or columns.
    Otherwise an error is at least that of the best approximation, and at most that of one that exists.

    Args:
        matrix: M, (n, m), floating, contiguous or transposed.
        ranks: Numbers of columns :math:`k` of the factors, each 1 to the number of columns of ``start``.
        start: Initial right factor, (m, r), r at most n and m; a few columns more than the largest rank make the
            errors more accurate.

    Returns:
        Tensor: float64, (len(ranks),); infinite if M or a product overflows.

    Example:
        >>> low_rank_errors(torch.diag(torch.tensor([3.0, 2.0, 1.0])), [1, 2, 3], torch.eye(3)).round(decimals=4)
        tensor([5., 1., 0.], dtype=torch.float64)

    References:
        - Halko, Martinsson, Tropp (2011), Finding structure with randomness, arXiv 0909.4061, algorithm 4.4.
    """
    right = start
    for _ in range(1 + _REFINEMENTS):
        left = orthonormalize(thin_product(matrix, right))
        right = thin_product(matrix.mT, left)
    finite = right.isfinite().all()
    kept = torch.linalg.svdvals(right.nan_to_num(0.0, 0.0, 0.0)).double().square_().cumsum(0)  # raises for others
    rest = torch.linalg.vector_norm(matrix, dtype=torch.float64).square()
    errors: Tensor = rest - kept[[rank - 1 for rank in ranks]]
    return torch.where(finite, errors.clamp_(min=0.0), torch.inf)


def feedback_errors(errors: Tensor, total: Tensor) -> Tensor:
    r"""Return the squared norm that unsent values reach under error feedback, from the squared errors of one message.

    .. math::
        r = (1 - \delta) (r + E) \quad\Rightarrow\quad r = E \, \frac{1 - \delta}{\delta} = \frac{E e}{E - e},
        \qquad \delta = 1 - \frac{e}{E}

    where :math:`e` is the squared error of one message, :math:`E` the squared norm of the gradient, and :math:`\delta`
    the share of the squared norm that a message carries. The gradients of two steps are taken as uncorrelated. Two
    levels that send little have nearly equal errors of one message, about :math:`E`, but the lower one makes values
    wait much longer.

    Args:
        errors: e, (k,), each 0 to E.
        total: E, 0-dimensional.

    Returns:
        Tensor: (k,); 0 if E is 0.

    Example:
        >>> feedback_errors(torch.tensor([0.0, 2.0, 3.0, 3.6]), torch.tensor(4.0)).round(decimals=4)
        tensor([ 0.,  4., 12., 36.])

    References:
        - Stich, Cordonnier, Jaggi (2018), Sparsified SGD with Memory, arXiv 1809.07599, study such a memory by the
          contraction :math:`\delta` of its compressor. The formula is this package's own.
    """
    kept = (total - errors).clamp(min=torch.finfo(total.dtype).eps * total)
    return torch.where(total > 0, total * errors / kept, 0.0)
