r"""Curvature of a loss: products with its Hessian, the largest eigenvalues, the trace and the density of all eigenvalues.

None of the functions stores the Hessian, and those below :class:`HessianProduct` take any function that multiplies a
vector by a symmetric matrix.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

Product = Callable[[Tensor], Tensor]

_LEAST_STEPS = 10  # of the Lanczos iteration, so that the density has enough nodes
_BREAKDOWN = 1e-6  # times the largest coefficient: the Krylov space is exhausted


class HessianProduct:
    r"""Multiply vectors by the Hessian of a loss, :math:`H v = \nabla_\theta (\nabla_\theta L \cdot v)`.

    The graph of the gradient is computed once and kept, so each product is one backward pass through it.

    Args:
        loss: A scalar with its graph.
        parameters: The parameters, in the order of the entries of vectors.

    Attributes:
        size: Number of entries of a vector.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> HessianProduct(x[0] ** 2 * x[1], [x])(torch.tensor([1.0, 0.0]))
        tensor([4., 2.])
    """

    def __init__(self, loss: Tensor, parameters: Sequence[Tensor]) -> None:
        self._parameters = list(parameters)
        self.size = sum(parameter.numel() for parameter in self._parameters)
        found = torch.autograd.grad(loss, self._parameters, create_graph=True, allow_unused=True)
        # A gradient without a graph does not depend on any parameter, and adds nothing to the product.
        self._gradients = [(i, g) for i, g in enumerate(found) if g is not None and g.requires_grad]

    def __call__(self, vector: Tensor) -> Tensor:
        """Return the product with a vector, (size,)."""
        pieces = torch.split(vector, [parameter.numel() for parameter in self._parameters])
        if not self._gradients:
            return torch.zeros_like(vector)
        rows = [pieces[i].view_as(gradient).to(gradient) for i, gradient in self._gradients]
        gradients = [gradient for _, gradient in self._gradients]
        found = torch.autograd.grad(gradients, self._parameters, rows, retain_graph=True, allow_unused=True)
        dense = (torch.zeros_like(p) if g is None else g for p, g in zip(self._parameters, found, strict=True))
        return torch.cat([gradient.reshape(-1) for gradient in dense]).to(vector)


@dataclass(frozen=True)
class Ritz:
    """What a Lanczos iteration found of a symmetric matrix: float64, on the CPU, in ascending order.

    Args:
        values: Approximate eigenvalues, (steps,); those at both ends are the most exact.
        weights: Share of the start vector in the direction of each, (steps,); they add up to 1.
        errors: Bound of the distance from each value to the nearest eigenvalue, (steps,).
    """

    values: Tensor
    weights: Tensor
    errors: Tensor


def lanczos(product: Product, start: Tensor, steps: int, num_eigenvalues: int = 1, tolerance: float = 1e-4) -> Ritz:
    r"""Approximate the eigenvalues of a symmetric matrix at both ends of its spectrum.

    The iteration builds an orthonormal basis of :math:`v, H v, H^2 v, \ldots`, in which H is tridiagonal. Each vector is
    orthogonalized against all earlier ones, so no eigenvalue appears twice. It holds up to ``steps`` vectors.

    Args:
        product: Multiplies a vector (n,) by the matrix.
        start: v, (n,), for example from :func:`random_signs`.
        steps: Largest number of products.
        num_eigenvalues: Stop, after at least ten products, once that many of the largest eigenvalues are exact.
        tolerance: Relative error at which an eigenvalue counts as exact.

    Example:
        >>> matrix = torch.diag(torch.tensor([1.0, 2.0, 5.0]))
        >>> lanczos(matrix.mv, torch.ones(3), 3).values
        tensor([1.0000, 2.0000, 5.0000], dtype=torch.float64)

    References:
        Golub and Van Loan, "Matrix Computations", 4th edition, section 10.1.
    """
    basis = torch.empty(min(steps, len(start)), len(start), dtype=start.dtype, device=start.device)
    basis[0] = start / start.norm()
    diagonal, off_diagonal = list[float](), list[float]()
    for step in range(len(basis)):
        image = product(basis[step])
        diagonal.append(_dot(basis[step], image))
        for _ in range(2):  # once is not enough in float32
            image = image - basis[: step + 1].mT @ (basis[: step + 1] @ image)
        off_diagonal.append(float(image.norm()))
        found = _ritz(diagonal, off_diagonal)
        scale = max(map(abs, (*diagonal, *off_diagonal)))
        top = found.errors[-num_eigenvalues:] <= tolerance * found.values[-num_eigenvalues:].abs()
        is_exact = step + 1 >= max(_LEAST_STEPS, num_eigenvalues) and bool(top.all())
        if is_exact or off_diagonal[-1] <= _BREAKDOWN * scale or step + 1 == len(basis):
            break
        basis[step + 1] = image / off_diagonal[-1]
    return found


def _dot(one: Tensor, other: Tensor) -> float:
    kind = torch.float32 if one.device.type == "mps" else torch.float64  # Apple's GPU has no float64
    return float(one.to(kind) @ other.to(kind))


def _ritz(diagonal: Sequence[float], off_diagonal: Sequence[float]) -> Ritz:
    off = torch.tensor(off_diagonal[:-1], dtype=torch.float64)
    matrix = torch.tensor(diagonal, dtype=torch.float64).diag() + off.diag(1) + off.diag(-1)
    values, vectors = torch.linalg.eigh(matrix)
    return Ritz(values, vectors[0].square(), off_diagonal[-1] * vectors[-1].abs())


def random_signs(size: int, generator: torch.Generator, like: Tensor) -> Tensor:
    """Return a vector of random signs (Rademacher), with the dtype and device of another tensor; drawn on the CPU."""
    signs = torch.randint(0, 2, (size,), generator=generator, dtype=torch.int8)
    return signs.to(like.device).to(like.dtype).mul_(2).sub_(1)


def hutchinson_trace(product: Product, vectors: Sequence[Tensor]) -> tuple[float, float]:
    r"""Estimate the trace of a matrix, :math:`\frac 1 m \sum_i z_i^T H z_i`, from vectors of random signs.

    Args:
        product: Multiplies a vector (n,) by the matrix.
        vectors: :math:`z_i`, (n,) each.

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
        arXiv 1901.10159, section 2.
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
    :math:`\beta`, and :math:`(2 + 2 \beta) / (\eta (1 + 2 \beta))` with Nesterov momentum, each minus the weight decay.

    Args:
        optimizer: Any optimizer.

    Returns:
        float | None: ``None`` if it is not SGD, has dampening or maximizes, or if its groups differ.

    Example:
        >>> stability_edge(torch.optim.SGD([torch.zeros(1)], lr=0.5)), stability_edge(torch.optim.Adam([torch.zeros(1)]))
        (4.0, None)

    References:
        Cohen et al., "Gradient Descent on Neural Networks Typically Occurs at the Edge of Stability", 2021, arXiv
        2103.00065, section 2 and appendix B.
    """
    if type(optimizer).__name__ != "SGD":
        return None
    names = ("lr", "momentum", "nesterov", "dampening", "weight_decay", "maximize")
    found = {tuple(float(group.get(name, 0.0)) for name in names) for group in optimizer.param_groups}
    lr, momentum, nesterov, dampening, weight_decay, maximize = next(iter(found))
    if len(found) > 1 or lr == 0 or dampening or maximize:
        return None
    edge = (2 + 2 * momentum) / lr / ((1 + 2 * momentum) if nesterov else 1.0)
    return edge - weight_decay
