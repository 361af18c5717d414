"""Layer-wise clipping against torch, and normalization as worked by hand."""

import math

import pytest
import torch
from torch import nn

from lightning_grad.functional import (
    clip_layers_,
    layer_limits,
    normalize_layers_,
    total_norm,
)
from tests.functional.clipping.gradients import DTYPES, INF, NAN, as_parameters, assert_same_bits, copies, draw

LAYERS = torch.tensor([0, 0, 1, 2, 1, 0, 3, 3, 2])


@pytest.mark.parametrize("limits", [(0.1, 0.2, 0.3, 0.4), (1e-3, 1e3, 1e-3, 1e3), (INF, INF, 1.0, INF)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_layer_is_clipped_as_torch_would(dtype: torch.dtype, limits: tuple[float, ...]) -> None:
    rounding = {"rtol": 2e-2 if dtype == torch.bfloat16 else 1e-5, "atol": 0.0}
    for seed in range(5):
        gradients, parameters = draw(seed, dtype), as_parameters(draw(seed, dtype))
        norms, coefficients = clip_layers_(gradients, LAYERS, torch.tensor(limits))
        for layer, limit in enumerate(limits):
            own = [p for p, h in zip(parameters, LAYERS.tolist(), strict=True) if h == layer]
            norm = nn.utils.clip_grad_norm_(own, limit)
            torch.testing.assert_close(norms[layer].to(norm.dtype), norm, **rounding)
            assert coefficients[layer].item() == pytest.approx(
                min(1.0, limit / (float(norm) + 1e-6)), rel=rounding["rtol"]
            )
        torch.testing.assert_close(gradients, [p.grad for p in parameters], **rounding)


@pytest.mark.parametrize("weighted", [False, True])
def test_shares_of_one_norm_keep_the_total_under_it(weighted: bool) -> None:
    for seed in range(20):
        gradients = draw(seed, scale=10.0)
        sizes = torch.zeros(4).index_add_(0, LAYERS, torch.tensor([float(g.numel()) for g in gradients]))
        limits = layer_limits(sizes, 0.7, weighted)
        clip_layers_(gradients, LAYERS, limits)
        # Every layer is far above its share, so that nothing is given away either.
        assert 0.69 < float(total_norm(gradients)) <= 0.7 * (1 + 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_equal_and_weighted_shares(dtype: torch.dtype) -> None:
    sizes = torch.tensor([1, 3, 12], dtype=dtype)
    torch.testing.assert_close(layer_limits(sizes, 2.0), torch.full((3,), 2.0 / math.sqrt(3)))
    torch.testing.assert_close(
        layer_limits(sizes, 2.0, weighted=True), 2.0 * torch.tensor([1 / 16, 3 / 16, 3 / 4]).sqrt()
    )


def test_layers_are_normalised_as_worked_by_hand() -> None:
    gradients = [torch.tensor([3.0]), torch.tensor([0.0, 4.0]), torch.tensor([[0.6, 0.8]])]
    weights = [torch.tensor([0.0]), torch.tensor([6.0, 8.0]), torch.tensor([[5.0, 0.0]])]
    norms, factors = normalize_layers_(gradients, weights, torch.tensor([0, 0, 1]), 2, trust_coefficient=0.1)
    torch.testing.assert_close(norms, torch.tensor([5.0, 1.0]))
    torch.testing.assert_close(factors, torch.tensor([0.2, 0.5]))
    torch.testing.assert_close(gradients, [torch.tensor([0.6]), torch.tensor([0.0, 0.8]), torch.tensor([[0.3, 0.4]])])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_normalised_layers_have_the_norm_of_their_weights(dtype: torch.dtype) -> None:
    gradients, weights = draw(1, dtype), draw(2, dtype)
    normalize_layers_(gradients, weights, LAYERS, 4, trust_coefficient=0.5)
    for layer in range(4):
        own = [i for i, h in enumerate(LAYERS.tolist()) if h == layer]
        size = torch.cat([gradients[i].flatten() for i in own]).double().norm()
        expected = 0.5 * torch.cat([weights[i].flatten() for i in own]).double().norm()
        assert size.item() == pytest.approx(expected.item(), rel=1e-2 if dtype == torch.bfloat16 else 1e-5)


def test_layers_of_zero_weights_zero_or_infinite_gradients_are_left_alone() -> None:
    gradients = [
        torch.tensor([3.0, 4.0]),
        torch.zeros(2),
        torch.tensor([INF, 1.0]),
        torch.tensor([NAN, 1.0]),
        torch.ones(1),
    ]
    weights = [torch.zeros(2), torch.ones(2), torch.ones(2), torch.ones(2), torch.tensor([7.0])]
    before = copies(gradients)
    _, factors = normalize_layers_(gradients, weights, torch.arange(5), 5)
    assert factors.tolist() == pytest.approx([1.0, 1.0, 1.0, 1.0, 7.0])
    assert_same_bits(gradients[:4], before[:4])


def test_the_largest_factor_bounds_what_grows_and_not_what_shrinks() -> None:
    gradients, weights = [torch.tensor([0.01]), torch.tensor([10.0])], [torch.tensor([1.0]), torch.tensor([1.0])]
    _, factors = normalize_layers_(gradients, weights, torch.tensor([0, 1]), 2, max_ratio=3.0)
    torch.testing.assert_close(factors, torch.tensor([3.0, 0.1]))
    torch.testing.assert_close(gradients, [torch.tensor([0.03]), torch.tensor([1.0])])


def test_layers_that_need_no_scaling_are_not_written() -> None:
    gradients, weights = draw(1), draw(2)
    versions = [gradient._version for gradient in gradients]
    norms, _ = clip_layers_(gradients, LAYERS, torch.tensor([INF, 1e-3, INF, INF]))
    written = [gradient._version > version for gradient, version in zip(gradients, versions, strict=True)]
    assert written == (LAYERS == 1).tolist()
    expected = [
        before * (1e-3 / (norms[1] + 1e-6)) if h == 1 else before for before, h in zip(draw(1), LAYERS, strict=True)
    ]
    assert_same_bits(gradients, expected)
    versions = [gradient._version for gradient in gradients]
    normalize_layers_(gradients, [torch.zeros_like(weight) for weight in weights], LAYERS, 4)
    assert [gradient._version for gradient in gradients] == versions


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_layer_without_a_limit_is_left_alone_even_if_it_is_not_finite(value: float) -> None:
    gradients = [torch.tensor([value, 1.0]), torch.tensor([3.0, 4.0])]
    _, coefficients = clip_layers_(gradients, torch.tensor([0, 1]), torch.tensor([INF, 1.0]))
    assert_same_bits(gradients[:1], [torch.tensor([value, 1.0])])
    assert coefficients[0] == 1.0
    assert gradients[1].norm().item() == pytest.approx(1.0, rel=1e-5)
