"""Blocks of gradients have the promised size, and projections keep inner products.

``test_per_sample_gradients.py`` compares the blocks of all kinds of modules with one backward pass for each sample.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_grad.functional import (
    PerSampleGradients,
    RademacherProjection,
    per_sample_gradient_norms,
    project_gradients,
)
from lightning_grad.functional.gradients._ghost import contributions, gradient_rows
from lightning_grad.functional.gradients.gradient_rows import _signs


class Mixed(nn.Module):
    """A tied weight, an operation without a rule and a parameter that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.tied, self.last = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.scale = nn.Parameter(torch.randn(3, 3))
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.tied(self.tied(self.first(x).tanh()).tanh())
        return torch.einsum("bi,ij->bj", self.last(x), self.scale)


@pytest.fixture
def case():
    torch.manual_seed(0)
    net = Mixed().double()
    x, y = torch.randn(7, 5, dtype=torch.float64), torch.randint(3, (7,))
    return net, lambda: F.cross_entropy(net(x), y, reduction="none")


def all_rows(net: nn.Module, losses: Tensor) -> dict[str, Tensor]:
    named = dict(net.named_parameters())
    each = [torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True) for loss in losses]
    rows = zip(*each, strict=True)
    return {
        name: torch.stack([torch.zeros_like(p) if g is None else g for g in row]).flatten(1)
        for (name, p), row in zip(named.items(), rows, strict=True)
    }


def test_blocks_are_as_small_as_the_limit_and_cover_everything_once(case, monkeypatch) -> None:
    net, losses = case
    expected, limit = all_rows(net, losses()), 60
    monkeypatch.setattr(contributions, "CHUNK", limit)
    monkeypatch.setattr(gradient_rows, "BLOCK", limit)
    seen: dict[str, list[tuple[int, Tensor]]] = {}
    gradients = PerSampleGradients(net)
    gradients.stream(losses, lambda name, start, rows: seen.setdefault(name, []).append((start, rows.clone())))
    assert gradients.samples == 7
    assert set(seen) == set(expected) - {"unused"}
    for name, blocks in seen.items():
        assert [start for start, _ in blocks][1:] == [start + len(rows) for start, rows in blocks][:-1]
        assert all(len(rows) == 1 or rows.numel() <= limit for _, rows in blocks), name
        torch.testing.assert_close(torch.cat([rows for _, rows in blocks]), expected[name])
    assert len(seen["tied.weight"]) == 7
    torch.testing.assert_close(gradients(losses), per_sample_gradient_norms(net, losses))
    assert all(p.grad is None for p in net.parameters())


class Largest(TorchDispatchMode):
    """Find the largest tensor that operations return, in entries of float32."""

    entries = 0

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        found = [leaf.untyped_storage().nbytes() // 4 for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.entries = max(self.entries, *found, 0)
        return result


def test_memory_does_not_grow_with_samples_times_parameters() -> None:
    torch.manual_seed(0)
    net, x, y = (
        nn.Sequential(nn.Linear(512, 1024), nn.Tanh(), nn.Linear(1024, 3)),
        torch.randn(64, 512),
        torch.arange(64) % 3,
    )
    limit = gradient_rows.BLOCK
    with Largest() as largest:
        found = project_gradients(net, lambda: F.cross_entropy(net(x), y, reduction="none"), dim=64)
    assert largest.entries <= limit
    weights = {name: value.detach() for name, value in net.named_parameters()}

    def loss(weights: dict[str, Tensor], one: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(net, weights, one), label)

    with Largest() as naive:
        rows = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(weights, x, y)
    assert naive.entries > 3 * limit, "the usual way stores one gradient for each sample"
    product = RademacherProjection(64, 64)
    for name, gradients in rows.items():
        product.add(name, 0, gradients.flatten(1))
    torch.testing.assert_close(found, product.values, atol=1e-4, rtol=1e-3)


def test_a_receiver_that_raises_leaves_the_object_usable(case) -> None:
    net, losses = case
    gradients = PerSampleGradients(net)

    def fail(name: str, start: int, rows: Tensor) -> None:
        raise KeyError(name)

    with pytest.raises(KeyError):
        gradients.stream(losses, fail)
    torch.testing.assert_close(gradients(losses), per_sample_gradient_norms(net, losses))


def test_refusals(case) -> None:
    net, losses = case
    with pytest.raises(RuntimeError, match="einsum"):
        PerSampleGradients(net, fallback="raise").stream(losses, lambda *block: None)
    with pytest.raises(ValueError, match="dim must be a positive multiple of 64; got 100"):
        RademacherProjection(2, 100)
    with pytest.raises(ValueError, match="dim must be a positive multiple of 64; got 0"):
        project_gradients(net, losses, dim=0)


# Projections.


def test_projection_is_the_product_with_a_matrix_of_signs(case) -> None:
    net, losses = case
    rows = all_rows(net, losses())
    expected = sum(
        row.float() @ _signs(name, 0, row.shape[1], 128, 5, row.device).float() for name, row in rows.items()
    )
    found = project_gradients(net, losses, dim=128, seed=5)
    torch.testing.assert_close(found, expected / 128**0.5, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found, project_gradients(net, losses, dim=128, seed=6))


def test_signs_are_random_and_do_not_depend_on_the_blocks() -> None:
    whole = _signs("w", 0, 3000, 256, 0, torch.device("cpu"))
    assert torch.equal(whole[1000:1010], _signs("w", 1000, 10, 256, 0, torch.device("cpu")))
    assert set(whole.unique().tolist()) == {-1, 1}
    signs = whole.double()
    assert abs(float(signs.mean())) < 4 / whole.numel() ** 0.5
    for vectors in (signs.mT, signs[:256]):  # columns and rows are almost orthogonal
        cosines = vectors @ vectors.mT / vectors.shape[1] - torch.eye(256)
        assert float(cosines.square().mean().sqrt()) < 1.1 * vectors.shape[1] ** -0.5
    assert not torch.equal(whole, _signs("v", 0, 3000, 256, 0, torch.device("cpu")))
    rows = torch.randn(4, 3000)
    one, several = RademacherProjection(4, 256), RademacherProjection(4, 256)
    one.add("w", 0, rows)
    several.add("w", 0, rows[:1])
    several.add("w", 1, rows[1:])
    torch.testing.assert_close(one.values, several.values, atol=1e-4, rtol=1e-5)


def test_inner_products_are_kept_up_to_the_stated_error() -> None:
    torch.manual_seed(0)
    rows = F.normalize(torch.randn(30, 5000) + torch.randn(5000), dim=1)
    exact = rows @ rows.mT
    errors = []
    for dim in (256, 4096):
        projection = RademacherProjection(30, dim)
        projection.add("w", 0, rows)
        error = projection.values @ projection.values.mT - exact
        errors.append(float(error.square().mean().sqrt()))
        assert errors[-1] < 1.2 * (2 / dim) ** 0.5
        assert abs(float(error.mean())) < errors[-1]
    assert errors[1] < 0.4 * errors[0]


def test_projections_are_added_up_in_float32_whatever_the_default_type() -> None:
    rows = torch.randn(2, 3000)
    expected = RademacherProjection(2, 64)
    expected.add("w", 0, rows)
    torch.set_default_dtype(torch.bfloat16)  # as in a run with precision="bf16-true"
    try:
        projection = RademacherProjection(2, 64)
        projection.add("w", 0, rows)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(projection.values, expected.values)
