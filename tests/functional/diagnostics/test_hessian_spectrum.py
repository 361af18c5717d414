"""Products, eigenvalues, trace and density against the dense Hessian; the edge of stability against gradient descent."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_grad.functional import (
    HessianProduct,
    hutchinson_trace,
    lanczos,
    largest_eigenvalues,
    random_signs,
    spectral_density,
    stability_edge,
)
from tests.cases import cases


@pytest.fixture(scope="module")
def trained() -> tuple[HessianProduct, Tensor]:
    """Return products with the Hessian of a small network after a few steps, and the dense Hessian."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 4))
    x, y = torch.randn(60, 6), torch.randint(4, (60,))
    optimizer = torch.optim.SGD(net.parameters(), 0.5)
    for _ in range(30):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    product = HessianProduct(F.cross_entropy(net(x), y), list(net.parameters()))
    names, values = zip(*net.named_parameters(), strict=True)

    def loss(*parameters: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(net, dict(zip(names, parameters, strict=True)), x), y)

    blocks = torch.autograd.functional.hessian(loss, tuple(values))
    rows = [torch.cat([b.reshape(p.numel(), -1) for b in row], 1) for row, p in zip(blocks, values, strict=True)]
    return product, torch.cat(rows).double()


def test_products_are_those_of_the_dense_hessian(trained: Any) -> None:
    product, dense = trained
    assert product.size == len(dense)
    vector = torch.randn(product.size, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(product(vector).double(), dense @ vector.double(), atol=1e-5, rtol=1e-4)


def test_largest_and_smallest_eigenvalues_are_those_of_the_dense_hessian(trained: Any) -> None:
    product, dense = trained
    expected = torch.linalg.eigvalsh(dense)
    start = random_signs(product.size, torch.Generator().manual_seed(0), torch.zeros(1))
    found = lanczos(product, start, 60, num_eigenvalues=3)
    assert len(found.values) < 60, "it ends once the largest ones are exact"
    torch.testing.assert_close(found.values[-3:], expected[-3:], atol=0, rtol=1e-3)
    torch.testing.assert_close(found.values[:1], expected[:1], atol=0, rtol=2e-2)
    nearest = (found.values[:, None] - expected).abs().amin(1)
    assert (nearest <= found.errors + 1e-4).all()
    assert found.weights.sum() == pytest.approx(1)
    early = lanczos(product, start, 4, num_eigenvalues=3)
    assert not torch.allclose(early.values[-3:], expected[-3:], rtol=1e-3), "four steps do not suffice"


def test_the_iteration_ends_where_nothing_is_left() -> None:
    found = lanczos(lambda v: 2 * v, torch.ones(5), 5)
    assert found.values.tolist() == pytest.approx([2.0])
    zero = lanczos(torch.zeros_like, torch.ones(5), 5)
    assert zero.values.tolist() == [0.0]
    matrix = torch.diag(torch.tensor([-3.0, 1.0, 1.0, 4.0]))
    assert lanczos(matrix.mv, torch.ones(4), 4).values.tolist() == pytest.approx([-3, 1, 4], abs=1e-5)


@cases(
    "values",
    [
        [5.0] * 3 + [3.0, *torch.linspace(-1, 1, 196).tolist()],
        [2.0] * 4,
        [0.0] * 6,
        [-1.0, -2.0, -3.0, -4.0],
        [-9.0, 1.0],
        [7.0, 4.0, 4.0, *torch.linspace(-2, 0, 97).tolist()],
    ],
)
def test_eigenvalues_are_found_as_often_as_they_occur(values: list[float]) -> None:
    generator, size = torch.Generator().manual_seed(0), len(values)
    turned = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    matrix = (turned * torch.tensor(values, dtype=torch.float64)) @ turned.mT
    start = random_signs(size, generator, matrix)
    found = lanczos(matrix.mv, start, 60, num_eigenvalues=3)
    largest, errors = largest_eigenvalues(matrix.mv, found, 3, generator)
    expected = sorted(values, reverse=True)[:3]
    assert largest == pytest.approx(expected, rel=1e-4, abs=1e-9)
    assert max(errors) < 1e-3
    if expected == [5.0] * 3:
        assert found.values[-3] == pytest.approx(3), "one iteration does not find all of them"


def test_without_repeated_eigenvalues_ten_more_products_suffice(trained: Any) -> None:
    product, dense = trained
    calls = []

    def counted(vector: Tensor) -> Tensor:
        calls.append(vector)
        return product(vector)

    generator = torch.Generator().manual_seed(0)
    found = lanczos(product, random_signs(product.size, generator, torch.zeros(1)), 60, num_eigenvalues=3)
    largest, _ = largest_eigenvalues(counted, found, 3, generator)
    assert largest == pytest.approx(torch.linalg.eigvalsh(dense).flip(0)[:3].tolist(), rel=1e-3)
    assert len(calls) == 10
    assert largest_eigenvalues(counted, found, 1, generator)[0] == largest[:1]
    assert len(calls) == 10, "the largest one needs no search"


def test_eigenvalues_of_a_small_matrix_do_not_depend_on_the_seed() -> None:
    matrix = torch.diag(torch.tensor([1.0, 5.0, 5.0]))
    found = lanczos(matrix.mv, torch.ones(3), 3, num_eigenvalues=2)
    for seed in range(20):  # random signs would lie in the span of the known eigenvectors for half of them
        largest, _ = largest_eigenvalues(matrix.mv, found, 2, torch.Generator().manual_seed(seed))
        assert largest == pytest.approx([5, 5], rel=1e-5)


def test_checkpoints_are_seen_unless_they_are_reentrant() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    parameters = list(net.parameters())
    vector = torch.randn(21, dtype=torch.float64)
    expected = HessianProduct(net(x).square().mean(), parameters)(vector)
    found = HessianProduct(net[2](checkpoint(net[:2], x, use_reentrant=False)).square().mean(), parameters)(vector)
    torch.testing.assert_close(found, expected)
    loss = net[2](checkpoint(net[:2], x, use_reentrant=True)).square().mean()
    assert torch.autograd.grad(loss, parameters[0], create_graph=True, allow_unused=True) == (None,), "taken for unused"
    with pytest.raises(RuntimeError, match=r"cannot see into.*Set use_reentrant=False"):
        HessianProduct(loss, parameters)


def test_a_loss_that_is_linear_in_a_parameter_or_does_not_use_it() -> None:
    linear, unused = torch.ones(2, requires_grad=True), torch.ones(1, requires_grad=True)
    assert HessianProduct(3 * linear.sum(), [linear, unused])(torch.ones(3)).tolist() == [0, 0, 0]


def test_trace_lies_within_its_standard_error(trained: Any) -> None:
    product, dense = trained
    generator = torch.Generator().manual_seed(3)
    vectors = [random_signs(product.size, generator, torch.zeros(1)) for _ in range(100)]
    estimate, error = hutchinson_trace(product, vectors)
    assert abs(estimate - float(dense.trace())) < 3 * error
    values = torch.stack([vector.double() @ dense @ vector.double() for vector in vectors])
    assert estimate == pytest.approx(float(values.mean()), rel=1e-4)
    assert error == pytest.approx(float(values.std() / 10), rel=1e-3)
    assert 0 < error < 0.1 * estimate
    assert math.isnan(hutchinson_trace(product, vectors[:1])[1])


def test_density_is_that_of_the_eigenvalues(trained: Any) -> None:
    product, dense = trained
    expected = torch.linalg.eigvalsh(dense)
    generator = torch.Generator().manual_seed(0)
    found = [lanczos(product, random_signs(product.size, generator, torch.zeros(1)), 40) for _ in range(8)]
    at, density = spectral_density(found, points=2000)
    step = float(at[1] - at[0])
    assert float(density.sum()) * step == pytest.approx(1, abs=1e-3)
    span = float(expected[-1] - expected[0])

    def distance(values: Tensor, weights: Tensor) -> float:  # of the distributions, as a share of the range
        shares = (weights * (values <= at[:, None])).sum(1)
        exact = (expected <= at[:, None]).double().mean(1)
        return float((shares - exact).abs().sum()) * step / span

    several = torch.cat([each.values for each in found]), torch.cat([each.weights for each in found]) / len(found)
    assert distance(*several) < 0.01
    assert distance(found[0].values, found[0].weights) < 0.03
    even = torch.full_like(found[0].weights, 1 / len(found[0].weights))
    assert distance(found[0].values, even) > 0.1, "the values alone are not the density"


# The edge of stability.


def converges(curvature: float, **arguments: Any) -> bool:
    weight = torch.ones(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([weight], **arguments)
    for _ in range(600):
        optimizer.zero_grad()
        (0.5 * curvature * weight**2).sum().backward()
        optimizer.step()
    return bool(weight.abs() < 1)


@cases(
    "arguments",
    [
        {"lr": 0.1},
        {"lr": 0.1, "weight_decay": 2.0},
        {"lr": 0.1, "momentum": 0.6},
        {"lr": 0.1, "momentum": 0.6, "nesterov": True},
    ],
)
def test_gradient_descent_diverges_above_the_edge_and_converges_below(arguments: dict[str, Any]) -> None:
    edge = stability_edge(torch.optim.SGD([torch.zeros(1)], **arguments))
    assert edge is not None
    assert converges(0.98 * edge, **arguments)
    assert not converges(1.02 * edge, **arguments)


def test_other_optimizers_have_no_edge() -> None:
    weights = [torch.zeros(1), torch.zeros(1)]
    assert stability_edge(torch.optim.AdamW(weights)) is None
    assert stability_edge(torch.optim.SGD(weights, 0.1, momentum=0.5, dampening=0.5)) is None
    assert stability_edge(torch.optim.SGD([{"params": weights[:1], "lr": 0.2}, {"params": weights[1:]}], 0.1)) is None
    assert stability_edge(torch.optim.SGD(weights, 0.0)) is None
    decayed = [{"params": weights[:1], "weight_decay": 0.5}, {"params": weights[1:]}]
    assert stability_edge(torch.optim.SGD(decayed, 0.1)) == pytest.approx(19.5), "biases often have no weight decay"
