r"""Curvature of a loss: products with its Hessian, the largest eigenvalues, the trace and the density of all eigenvalues.

None of the functions stores the Hessian, and those below :class:`HessianProduct` take any function that multiplies a
vector by a symmetric matrix.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_grad.functional.gradients.autograd import REENTRANT, nodes_of
from lightning_grad.functional.plain_tensors import PlainTensors, plain_tensor

Product = Callable[[Tensor], Tensor]

_LEAST_STEPS = 10  # of the Lanczos iteration, so the density has enough nodes
_BREAKDOWN = 1e-6  # times the largest coefficient: the Krylov space is exhausted


class HessianProduct:
    r"""Multiply vectors by the Hessian of a loss, :math:`H v = \nabla_\theta (\nabla_\theta L \cdot v)`.

    The graph of the gradient is computed once and kept, so each product is one backward pass through it.

    Args:
        loss: A scalar with its graph.
        parameters: The parameters, in the order of the entries of vectors.

    Attributes:
        size: Number of entries of a vector.

    Raises:
        RuntimeError: If the graph contains a reentrant activation checkpoint.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> HessianProduct(x[0] ** 2 * x[1], [x])(torch.tensor([1.0, 0.0]))
        tensor([4., 2.])
    """

    def __init__(self, loss: Tensor, parameters: Sequence[Tensor]) -> None:
        self._parameters = list(parameters)
        self.size = sum(parameter.numel() for parameter in self._parameters)
        if any(node.name() == REENTRANT for node in nodes_of(loss)):  # autograd would take its parameters for unused
            raise RuntimeError(
                "HessianProduct cannot see into torch.utils.checkpoint.checkpoint(..., use_reentrant=True). Set "
                "use_reentrant=False."
            )
        with PlainTensors():
            found = torch.autograd.grad(loss, self._parameters, create_graph=True, allow_unused=True)
        # A gradient without a graph does not depend on any parameter, and adds nothing to the product.
        self._gradients = [(i, g) for i, g in enumerate(found) if g is not None and g.requires_grad]

    def __call__(self, vector: Tensor) -> Tensor:
        """Return the product with a vector, (size,)."""
        pieces = torch.split(vector, [parameter.numel() for parameter in self._parameters])
        if not self._gradients:
            return torch.zeros_like(vector)
        rows = [pieces[i].view(gradient.shape).to(gradient.device, gradient.dtype) for i, gradient in self._gradients]
        gradients = [gradient for _, gradient in self._gradients]
        with PlainTensors():
            found = torch.autograd.grad(gradients, self._parameters, rows, retain_graph=True, allow_unused=True)
            dense = (torch.zeros_like(p) if g is None else g for p, g in zip(self._parameters, found, strict=True))
            return torch.cat([plain_tensor(gradient).reshape(-1) for gradient in dense]).to(vector)


@dataclass(frozen=True)
class Ritz:
    """What a Lanczos iteration found of a symmetric matrix: numbers in float64, on the CPU, in ascending order.

    Args:
        values: Approximate eigenvalues, (steps,); those at both ends are the most exact.
        weights: Share of the start vector in the direction of each, (steps,); they add up to 1.
        errors: Bound of the distance from each value to the nearest eigenvalue, (steps,).
        largest: Approximate eigenvectors of the largest values, (n,) each, in ascending order of the values.
    """

    values: Tensor
    weights: Tensor
    errors: Tensor
    largest: Sequence[Tensor]


def lanczos(
    product: Product,
    start: Tensor,
    steps: int,
    num_eigenvalues: int = 1,
    tolerance: float = 1e-4,
    excluded: Sequence[Tensor] = (),
    above: float = -math.inf,
) -> Ritz:
    r"""Approximate the eigenvalues of a symmetric matrix at both ends of its spectrum.

    The iteration builds an orthonormal basis of :math:`v, H v, H^2 v, \ldots`, in which H is tridiagonal. Each vector is
    orthogonalized against all earlier ones, so rounding does not create copies of eigenvalues. An eigenvalue with several
    eigenvectors is found once: see :func:`largest_eigenvalues`. It holds one vector for each product.

    Args:
        product: Multiplies a vector (n,) by the matrix.
        start: v, (n,), for example from :func:`random_signs`.
        steps: Largest number of products.
        num_eigenvalues: Stop, after at least ten products, once that many of the largest eigenvalues are exact.
        tolerance: Relative error at which an eigenvalue counts as exact.
        excluded: Orthonormal eigenvectors; their eigenvalues are ignored.
        above: Stop after ten products, too, if no larger eigenvalue has appeared.

    Example:
        >>> matrix = torch.diag(torch.tensor([1.0, 2.0, 5.0]))
        >>> lanczos(matrix.mv, torch.ones(3), 3).values
        tensor([1.0000, 2.0000, 5.0000], dtype=torch.float64)

    References:
        Golub and Van Loan, "Matrix Computations", 4th edition, section 10.1.
    """
    first = _orthogonal(start, excluded)
    basis = [first / first.norm()]
    diagonal, off_diagonal = list[float](), list[float]()
    most = min(steps, len(start) - len(excluded))
    while True:
        image = product(basis[-1])
        diagonal.append(_dot(basis[-1], image))
        image = _orthogonal(image, [*excluded, *basis])
        off_diagonal.append(float(image.norm()))
        values, vectors = _tridiagonal_eigh(diagonal, off_diagonal[:-1])
        errors = off_diagonal[-1] * vectors[-1].abs()
        is_exact = bool((errors <= tolerance * values.abs())[-num_eigenvalues:].all())
        is_enough = len(basis) >= max(_LEAST_STEPS, num_eigenvalues) and (is_exact or float(values[-1]) <= above)
        is_exhausted = off_diagonal[-1] <= _BREAKDOWN * max(map(abs, (*diagonal, *off_diagonal)))
        if is_enough or is_exhausted or len(basis) == most:
            break
        basis.append(image / off_diagonal[-1])
    top = vectors[:, -num_eigenvalues:].T.tolist()
    largest = [sum((v * x for v, x in zip(basis, row, strict=True)), torch.zeros_like(start)) for row in top]
    return Ritz(values, vectors[0].square(), errors, largest)


def _orthogonal(vector: Tensor, basis: Sequence[Tensor]) -> Tensor:
    for _ in range(2):  # once is not enough in float32
        for each in basis:
            vector = torch.addcmul(vector, each, each @ vector, value=-1)
    return vector


def largest_eigenvalues(
    product: Product, found: Ritz, count: int, generator: torch.Generator, steps: int = 60, tolerance: float = 1e-4
) -> tuple[list[float], list[float]]:
    """Return the largest eigenvalues, each as often as it occurs.

    An iteration from one vector finds only one eigenvector of each eigenvalue. So further iterations, orthogonal to the
    eigenvectors that are known, look for larger eigenvalues than the smallest known one, until there is none. The first
    of them usually ends after ten products.

    Args:
        product: Multiplies a vector (n,) by the matrix.
        found: Result of :func:`lanczos` with ``num_eigenvalues=count``.
        count: Number of eigenvalues; fewer are returned if the matrix is smaller.
        generator: Draws the start vectors.
        steps: Largest number of products of each iteration.
        tolerance: Relative error at which an eigenvalue counts as exact.

    Returns:
        tuple: The eigenvalues, in descending order, and bounds of their errors.

    Example:
        >>> matrix, generator = torch.diag(torch.tensor([1.0, 5.0, 5.0])), torch.Generator().manual_seed(0)
        >>> found = lanczos(matrix.mv, torch.ones(3), 3, num_eigenvalues=2)
        >>> [round(value, 3) for value in largest_eigenvalues(matrix.mv, found, 2, generator)[0]]
        [5.0, 5.0]
    """
    ends = zip(found.values.tolist()[-count:], found.errors.tolist()[-count:], found.largest[-count:], strict=True)
    known = sorted(ends, key=lambda each: -each[0])
    size = len(known[0][2])
    while count > 1 and len(known) < size:
        least = known[-1][0] + tolerance * abs(known[0][0]) if len(known) >= count else -math.inf
        # Not signs: few of them may lie in the span of the known eigenvectors.
        start = torch.randn(size, generator=generator).to(known[0][2])
        more = lanczos(product, start, steps, 1, tolerance, [vector for *_, vector in known], least)
        if float(more.values[-1]) <= least:
            break
        known.append((float(more.values[-1]), float(more.errors[-1]), more.largest[-1]))
        known = sorted(known, key=lambda each: -each[0])[:count]
    return [value for value, *_ in known], [error for _, error, _ in known]


def _dot(one: Tensor, other: Tensor) -> float:
    kind = torch.float32 if one.device.type == "mps" else torch.float64  # Apple's GPU has no float64
    return float(one.to(kind) @ other.to(kind))


def _tridiagonal_eigh(diagonal: Sequence[float], off_diagonal: Sequence[float]) -> tuple[Tensor, Tensor]:
    off = torch.tensor(off_diagonal, dtype=torch.float64)
    matrix = torch.tensor(diagonal, dtype=torch.float64).diag() + off.diag(1) + off.diag(-1)
    values, vectors = torch.linalg.eigh(matrix)
    return values, vectors


def random_signs(size: int, generator: torch.Generator, like: Tensor) -> Tensor:
    """Return a vector of random signs (Rademacher), with the dtype and device of another tensor; drawn on the CPU."""
    signs = torch.randint(0, 2, (size,), generator=generator, dtype=torch.int8)
    return signs.to(like.device).to(like.dtype).mul_(2).sub_(1)


def hutchinson_trace(product: Product, vectors: Iterable[Tensor]) -> tuple[float, float]:
    r"""Estimate the trace of a matrix, :math:`\frac 1 m \sum_i z_i^T H z_i`, from vectors of random signs.

    Args:
        product: Multiplies a vector (n,) by the matrix.
        vectors: :math:`z_i`, (n,) each; a generator keeps only one of them in memory.

    Returns:
        tuple: The estimate and its standard error, which is nan for a single vector.

    Example:
        >>> hutchinson_trace(torch.diag(torch.tensor([1.0, 2.0])).mv, [torch.tensor([1.0, -1.0]), torch.ones(2)])
        (3.0, 0.0)

    References:
        Hutchinson, "A stochastic estimator of the trace of the influence matrix for Laplacian smoothing splines", 1990.
    """
    found = torch.tensor([_dot(vector, product(vector)) for vector in vectors], dtype=torch.float64)
    spread = float(found.std()) if len(found) > 1 else math.nan
    return float(found.mean()), spread / math.sqrt(len(found))


def spectral_density(found: Sequence[Ritz], points: int = 256, width: float = 0.01) -> tuple[Tensor, Tensor]:
    r"""Estimate the density of the eigenvalues by stochastic Lanczos quadrature.

    .. math::
        \phi(t) = \frac 1 m \sum_{i=1}^m \sum_j w_{ij} \mathcal N(t; \lambda_{ij}, \sigma^2)

    with the values :math:`\lambda_{ij}` and the weights :math:`w_{ij}` of a Lanczos iteration from each of m random
    vectors.

    Args:
        found: Result of :func:`lanczos` from each random vector.
        points: Number of points t, evenly spaced.
        width: :math:`\sigma` as a share of the range of the values.

    Returns:
        tuple: t and :math:`\phi`, (points,) each, float64; the density integrates to about 1.

    References:
        Ghorbani, Krishnan and Xiao, "An Investigation into Neural Net Optimization via Hessian Eigenvalue Density", 2019,
        arXiv 1901.10159.
    """
    low = min(float(each.values[0]) for each in found)
    high = max(float(each.values[-1]) for each in found)
    sigma = width * max(high - low, 1e-6 * max(abs(low), abs(high)), 1e-12)
    at = torch.linspace(low - 5 * sigma, high + 5 * sigma, points, dtype=torch.float64)
    density = torch.zeros_like(at)
    for each in found:
        bells = torch.exp(-0.5 * ((at[:, None] - each.values) / sigma).square()) / (sigma * math.sqrt(2 * math.pi))
        density += bells @ each.weights / len(found)
    return at, density


def stability_edge(optimizer: Optimizer) -> float | None:
    r"""Return the largest curvature at which gradient descent on a quadratic function is stable.

    It is :math:`2 / \eta` for SGD with learning rate :math:`\eta`, :math:`(2 + 2 \beta) / \eta` with momentum
    :math:`\beta`, and :math:`(2 + 2 \beta) / (\eta (1 + 2 \beta))` with Nesterov momentum, each minus the largest weight
    decay of a group.

    Args:
        optimizer: Any optimizer.

    Returns:
        float | None: ``None`` if it is not SGD, has dampening or maximizes, or if its groups differ in more than weight decay.

    Example:
        >>> stability_edge(torch.optim.SGD([torch.zeros(1)], lr=0.5)), stability_edge(torch.optim.Adam([torch.zeros(1)]))
        (4.0, None)

    References:
        Cohen et al., "Gradient Descent on Neural Networks Typically Occurs at the Edge of Stability", 2021, arXiv
        2103.00065.
    """
    if type(optimizer).__name__ != "SGD":
        return None
    names = ("lr", "momentum", "nesterov", "dampening", "maximize")
    found = {tuple(float(group.get(name, 0.0)) for name in names) for group in optimizer.param_groups}
    lr, momentum, nesterov, dampening, maximize = next(iter(found))
    if len(found) > 1 or lr == 0 or dampening or maximize:
        return None
    edge = (2 + 2 * momentum) / lr / ((1 + 2 * momentum) if nesterov else 1.0)
    return edge - max(float(group.get("weight_decay", 0.0)) for group in optimizer.param_groups)
