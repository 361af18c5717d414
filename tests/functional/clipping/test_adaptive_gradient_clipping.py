"""Adaptive gradient clipping against the formula of timm, bit for bit."""

import pytest
import torch
from torch import Tensor

from lightning_grad.functional import clip_adaptively_
from lightning_grad.functional.clipping import adaptive_gradient_clipping
from lightning_grad.functional.clipping.adaptive_gradient_clipping import unit_norms
from tests.cases import cases
from tests.functional.clipping.gradients import DTYPES, INF, NAN, SHAPES, assert_same_bits, copies, draw
from tests.functional.sparsity.test_joined_masks import Computed


def timm_unit_norms(x: Tensor) -> Tensor:
    return x.norm(2.0) if x.ndim <= 1 else x.norm(2.0, dim=tuple(range(1, x.ndim)), keepdim=True)


def timm_agc(gradient: Tensor, weight: Tensor, ratio: float, eps: float) -> Tensor:
    max_norm = timm_unit_norms(weight).clamp_(min=eps).mul_(ratio)
    norm = timm_unit_norms(gradient)
    clipped = gradient * (max_norm / norm.clamp(min=1e-6))
    return torch.where(norm < max_norm, gradient, clipped)


def check_agc(gradients: list[Tensor], weights: list[Tensor], ratio: float = 0.01, eps: float = 1e-3) -> list[Tensor]:
    expected = [timm_agc(g, w, ratio, eps) for g, w in zip(gradients, weights, strict=True)]
    before = copies(weights)
    coefficients = clip_adaptively_(gradients, weights, ratio, eps)
    assert_same_bits(gradients, expected)
    assert_same_bits(weights, before)
    return coefficients


@pytest.mark.parametrize("ratio", [1e-4, 0.01, 1.0, INF])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_agc_is_the_formula_of_timm(dtype: torch.dtype, ratio: float) -> None:
    coefficients: list[Tensor] = []
    for seed in range(30):
        # Gradients from far below the weights to far above them.
        scale = 10.0 ** (seed % 7 - 3)
        coefficients += check_agc(draw(seed, dtype, scale), draw(1000 + seed, dtype), ratio)
    units = torch.cat([coefficient.flatten() for coefficient in coefficients])
    assert units.max() == 1.0
    assert (ratio == INF) == bool(units.min() == 1.0), "both branches are met, unless nothing is to be clipped"


@cases("dtype", DTYPES)
@cases("gradient_scale", [0.0, 1e-30, 1e-9, 1e-7, 1.0, 1e18, 1e30])
@cases("weight_scale", [0.0, 1e-30, 1e-5, 1.0, 1e30])
def test_agc_is_the_formula_of_timm_for_zeros_and_extremes(
    dtype: torch.dtype, gradient_scale: float, weight_scale: float
) -> None:
    for ratio, eps in ((0.01, 1e-3), (1e-4, 1e-3), (1e-4, 1e-8)):
        check_agc(draw(1, dtype, gradient_scale), draw(2, dtype, weight_scale), ratio, eps)


def test_agc_keeps_a_gradient_under_a_bound_smaller_than_what_it_divides_by() -> None:
    # Norm 5e-8 under a bound of 1e-7, both under the 1e-6 to which timm clamps the divisor.
    gradient, weight = torch.tensor([[3e-8, 4e-8], [0.0, 5e-7]]), torch.zeros(2, 2)
    (coefficients,) = check_agc([gradient], [weight], ratio=1e-4)
    assert coefficients[0].item() == 1.0
    assert coefficients[1].item() == pytest.approx(0.1)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_agc_of_what_is_not_finite_is_the_formula_of_timm(value: float) -> None:
    gradients, weights = draw(3), draw(4)
    for gradient in gradients:
        gradient.view(-1)[0] = value
    check_agc(gradients, weights)
    assert torch.isfinite(gradients[3][1:]).all(), "the other rows are clipped as ever"


@pytest.mark.parametrize("layout", ["channels_last", "transposed"])
def test_agc_of_any_memory_layout(layout: str) -> None:
    if layout == "channels_last":
        gradient, weight = (torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last) for _ in range(2))
    else:
        gradient, weight = torch.randn(5, 4).T, torch.randn(4, 5)
    expected = timm_agc(gradient, weight, 0.01, 1e-3)
    clip_adaptively_([gradient], [weight])
    torch.testing.assert_close(gradient, expected)


def test_agc_of_mixed_dtypes_keeps_each() -> None:
    gradients = [g.to(d) for g, d in zip(draw(8), [*DTYPES, *DTYPES, *DTYPES], strict=True)]
    weights = [w.to(g.dtype) for w, g in zip(draw(9, scale=0.1), gradients, strict=True)]
    expected = [timm_agc(g.double(), w.double(), 0.01, 1e-3) for g, w in zip(gradients, weights, strict=True)]
    clip_adaptively_(gradients, weights)
    assert [g.dtype for g in gradients] == [*DTYPES, *DTYPES, *DTYPES]
    torch.testing.assert_close([g.double() for g in gradients], expected, rtol=2e-2, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_weights_that_are_zero_can_leave_zero(shape: tuple[int, ...]) -> None:
    """Without a least weight norm (as in Composer) their gradient is zero for ever."""
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(1)) + 3.0
    clip_adaptively_([gradient], [torch.zeros(shape)], ratio=0.01, eps=1e-3)
    torch.testing.assert_close(unit_norms(gradient), torch.full_like(unit_norms(gradient), 1e-5), rtol=1e-5, atol=0)


def test_coefficients_are_one_for_each_unit() -> None:
    gradients, weights = draw(10), draw(11)
    coefficients = clip_adaptively_(gradients, weights, 0.1)
    assert [c.shape for c in coefficients] == [unit_norms(g).shape for g in gradients]
    found = [before * c for before, c in zip(draw(10), coefficients, strict=True)]
    assert_same_bits(gradients, found)


@pytest.mark.parametrize(
    ("shape", "units"),
    [((), ()), ((4,), ()), ((4, 3), (4, 1)), ((4, 3, 2), (4, 1, 1)), ((4, 3, 2, 5), (4, 1, 1, 1))],
)
def test_units_are_rows_and_filters(shape: tuple[int, ...], units: tuple[int, ...]) -> None:
    tensor = torch.randn(shape)
    norms = unit_norms(tensor)
    assert norms.shape == units
    rows = tensor.reshape(max(norms.numel(), 1), -1)
    torch.testing.assert_close(norms.flatten(), rows.square().sum(1).sqrt())


def test_gradients_without_a_clipped_unit_are_not_written() -> None:
    gradients = [torch.ones(2, 3), torch.ones(4, 2), torch.zeros(0, 3), torch.ones(2)]
    weights = [torch.ones(2, 3), torch.ones(4, 2), torch.zeros(0, 3), torch.ones(2)]
    gradients[1][-1] *= 100.0
    versions = [gradient._version for gradient in gradients]
    check_agc(gradients, weights, ratio=2.0)
    assert [g._version > v for g, v in zip(gradients, versions, strict=True)] == [False, True, False, False]


@pytest.mark.parametrize("value", [NAN, INF])
def test_an_infinite_ratio_leaves_gradients_alone_even_if_they_are_not_finite(value: float) -> None:
    gradient = torch.tensor([[value, 1.0], [2.0, 3.0]])
    (coefficients,) = clip_adaptively_([gradient], [torch.ones(2, 2)], INF)
    assert_same_bits([gradient], [torch.tensor([[value, 1.0], [2.0, 3.0]])])
    assert coefficients.tolist() == [[1.0], [1.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_joined_norms_change_no_bit(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    shapes = [(), (1,), (33,), (32, 32), (5, 3), (1, 40), (40, 1), (8, 4, 3, 3), (3, 2, 2, 2, 2), (64, 80)]
    torch.manual_seed(0)
    drawn = [torch.randn(shape).mul(10 ** (3 * torch.rand(()) - 1)).to(dtype) for shape in shapes * 5]
    drawn += [torch.randn(9, 7, dtype=dtype).t() for _ in range(3)]  # stacked, they would be summed in another order
    weights = [torch.randn(tensor.shape).to(dtype) for tensor in drawn]
    dims = [i // 20 % 2 if tensor.ndim > 1 else 0 for i, tensor in enumerate(drawn)]

    def clipped() -> list[Tensor]:
        gradients = [tensor.clone(memory_format=torch.preserve_format) for tensor in drawn]
        return [*clip_adaptively_(gradients, weights, 0.5, 1e-3, dims), *gradients]

    with Computed() as computed:
        joined = clipped()
    monkeypatch.setattr(adaptive_gradient_clipping, "_SMALL", -1)
    separate = clipped()
    assert all(map(torch.equal, joined, separate))
    assert not all(map(torch.equal, joined[len(drawn) :], drawn))
    norms = sum(n for name, n in computed.calls.items() if "linalg_vector_norm" in str(name))
    assert norms < 1.1 * len(drawn)  # of gradients and weights; separate ones are twice as many
