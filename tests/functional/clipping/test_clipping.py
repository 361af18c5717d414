"""Clipping against torch, against formulas transcribed from published code, and against the unsharded result."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_grad.functional import (
    clip_adaptively_,
    clip_layers_,
    clip_norm_,
    clip_spikes_,
    clip_to_threshold_,
    clip_value_,
    layer_limits,
    normalize_layers_,
    total_norm,
)
from lightning_grad.functional.clipping.clipping import unit_norms
from tests.functional.ranks import on_two_ranks

NAN, INF = float("nan"), float("inf")
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
SHAPES = [(), (1,), (7,), (3, 5), (1, 4), (4, 1), (2, 3, 4), (3, 2, 3, 3), (5, 1, 1, 2)]


def draw(seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> list[Tensor]:
    """Return one tensor of each shape, their sizes spread over three decades."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 10.0 ** (3 * torch.rand(len(SHAPES), generator=generator) - 1.5)
    return [
        (torch.randn(shape, generator=generator) * size * scale).to(dtype)
        for shape, size in zip(SHAPES, sizes, strict=True)
    ]


def copies(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.clone() for tensor in tensors]


def as_parameters(gradients: list[Tensor]) -> list[nn.Parameter]:
    parameters = [nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    return parameters


def assert_same_bits(found: Any, expected: Any) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert torch.equal(a.isnan(), b.isnan())
        assert torch.equal(
            a.nan_to_num(nan=0.0, posinf=INF, neginf=-INF), b.nan_to_num(nan=0.0, posinf=INF, neginf=-INF)
        )
        assert torch.equal(a.signbit() & ~a.isnan(), b.signbit() & ~b.isnan())  # also that of zeros


# Norm and value clipping: torch's own, bit for bit.


@pytest.mark.parametrize("norm_type", [0.5, 1.0, 2.0, 3.0, INF])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_clipping_is_that_of_torch(dtype: torch.dtype, norm_type: float) -> None:
    clipped = 0
    for seed in range(30):
        gradients = draw(seed, dtype)
        # From far below the norm to above it, so that both branches are met.
        max_norm = float(total_norm(gradients, norm_type)) * (0.01, 0.5, 0.999, 1.0, 1.001, 3.0)[seed % 6]
        parameters = as_parameters(gradients)
        expected = nn.utils.clip_grad_norm_(parameters, max_norm, norm_type)
        before = copies(gradients)
        norm = clip_norm_(gradients, max_norm, norm_type)
        assert_same_bits([norm, *gradients], [expected, *(p.grad for p in parameters)])
        clipped += not all(map(torch.equal, gradients, before))
    assert 10 <= clipped < 30


@pytest.mark.parametrize("value", [NAN, INF, -INF, 3e38])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_clipping_of_what_is_not_finite_is_that_of_torch(dtype: torch.dtype, value: float) -> None:
    for position in range(len(SHAPES)):
        gradients = draw(position, dtype)
        gradients[position].view(-1)[-1] = value
        parameters = as_parameters(gradients)
        expected = nn.utils.clip_grad_norm_(parameters, 1.0)
        assert_same_bits([clip_norm_(gradients, 1.0)], [expected])
        assert_same_bits(gradients, [p.grad for p in parameters])


@pytest.mark.parametrize("clip_value", [0.0, 1e-3, 0.5, 1e4, INF])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_value_clipping_is_that_of_torch(dtype: torch.dtype, clip_value: float) -> None:
    for seed in range(30):
        gradients = draw(seed, dtype)
        for position, value in enumerate((NAN, INF, -INF, -0.0)):
            gradients[position + 1].view(-1)[0] = value
        parameters = as_parameters(gradients)
        nn.utils.clip_grad_value_(parameters, clip_value)
        clip_value_(gradients, clip_value)
        assert_same_bits(gradients, [p.grad for p in parameters])


@pytest.mark.parametrize("clip", [partial(clip_norm_, max_norm=0.1), partial(clip_value_, clip_value=0.1)])
def test_clipping_is_in_place_for_any_memory_layout(clip: Callable[..., Any]) -> None:
    image = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    strided = torch.randn(6, 4)[::2].T
    expected = [image.clone(), strided.clone().contiguous()]
    clip([image, strided])
    clip(expected)
    torch.testing.assert_close([image, strided.contiguous()], expected)
    assert image.is_contiguous(memory_format=torch.channels_last)
    assert not strided.is_contiguous()


# The total norm.


@pytest.mark.parametrize("norm_type", [0.5, 1.0, 2.0, 3.0, INF])
def test_total_norm_is_that_of_one_vector(norm_type: float) -> None:
    gradients = draw(1, torch.float64)
    vector = torch.cat([gradient.flatten() for gradient in gradients])
    torch.testing.assert_close(total_norm(gradients, norm_type), torch.linalg.vector_norm(vector, norm_type))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_total_norm_has_the_dtype_of_the_gradients(dtype: torch.dtype) -> None:
    assert total_norm(draw(0, dtype)).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_total_norm_adds_up_in_at_least_float32_on_request(dtype: torch.dtype) -> None:
    gradients = [torch.full((1000,), 200.0, dtype=dtype), torch.full((1000,), 200.0, dtype=dtype)]
    norm = total_norm(gradients, accurate=True)
    assert norm.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # Of half-precision numbers the squares overflow, and a sum of them stops growing.
    assert norm.item() == pytest.approx(200.0 * math.sqrt(2000), rel=1e-6)


def test_total_norm_of_mixed_dtypes_is_that_of_the_widest() -> None:
    gradients = [gradient.to(dtype) for gradient, dtype in zip(draw(3), [*DTYPES, *DTYPES, *DTYPES], strict=True)]
    expected = torch.cat([gradient.double().flatten() for gradient in gradients]).norm()
    norm = total_norm(gradients)
    assert norm.dtype == torch.float64
    assert norm.item() == pytest.approx(expected.item(), rel=2e-3)  # bf16 norms have eight bits
    clip_norm_(gradients, norm.item() / 10)
    assert [gradient.dtype for gradient in gradients] == [*DTYPES, *DTYPES, *DTYPES]
    assert total_norm(gradients).item() == pytest.approx(norm.item() / 10, rel=1e-2)


def test_total_norm_makes_no_graph() -> None:
    gradient = torch.ones(3, requires_grad=True)
    assert not total_norm([gradient]).requires_grad
    clip_norm_([gradient], 0.1)  # a leaf that is changed in place under grad mode would raise
    assert gradient.norm().item() == pytest.approx(0.1)


# A threshold that is a tensor.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_above_the_threshold_becomes_the_threshold(dtype: torch.dtype) -> None:
    gradients = draw(5, dtype)
    norm = total_norm(gradients, accurate=True)
    coefficient = clip_to_threshold_(gradients, norm, norm.double() / 3)
    assert coefficient.item() == pytest.approx(1 / 3, rel=1e-6)
    assert [gradient.dtype for gradient in gradients] == [dtype] * len(gradients)
    expected = [(gradient.double() / 3) for gradient in draw(5, dtype)]
    torch.testing.assert_close(
        [g.double() for g in gradients], expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=0
    )


@pytest.mark.parametrize("norm", [1.0, 0.5, 0.0, NAN, INF])
def test_norm_at_the_threshold_below_it_or_not_finite_changes_nothing(norm: float) -> None:
    gradients = draw(6)
    coefficient = clip_to_threshold_(gradients, torch.tensor(norm), torch.tensor(1.0))
    assert coefficient.item() == 1.0
    assert_same_bits(gradients, draw(6))


def test_threshold_that_is_nan_changes_nothing() -> None:
    gradients = draw(7)
    assert clip_to_threshold_(gradients, torch.tensor(5.0), torch.tensor(NAN)).item() == 1.0
    assert_same_bits(gradients, draw(7))


# Adaptive gradient clipping: timm's formula, bit for bit.


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gradient_scale", [0.0, 1e-30, 1e-9, 1e-7, 1.0, 1e18, 1e30])
@pytest.mark.parametrize("weight_scale", [0.0, 1e-30, 1e-5, 1.0, 1e30])
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


# Layer-wise rules.

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
    norms, factors = normalize_layers_(gradients, weights, torch.tensor([0, 0, 1]), 2, coefficient=0.1)
    torch.testing.assert_close(norms, torch.tensor([5.0, 1.0]))
    torch.testing.assert_close(factors, torch.tensor([0.2, 0.5]))
    torch.testing.assert_close(gradients, [torch.tensor([0.6]), torch.tensor([0.0, 0.8]), torch.tensor([[0.3, 0.4]])])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_normalised_layers_have_the_norm_of_their_weights(dtype: torch.dtype) -> None:
    gradients, weights = draw(1, dtype), draw(2, dtype)
    normalize_layers_(gradients, weights, LAYERS, 4, coefficient=0.5)
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


# Spike-aware clipping: the formula of SPAM's released code, but where there is no past.


def spam_clip(gradient: Tensor, moment: Tensor, threshold: float) -> Tensor:
    gradient = gradient.clone()
    mask = gradient**2 > threshold * moment
    gradient[mask] = gradient[mask].sign() * torch.sqrt(moment[mask] * threshold)
    return gradient


@pytest.mark.parametrize("threshold", [1.0, 5.0, 5000.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_spikes_are_clipped_as_in_spam(dtype: torch.dtype, threshold: float) -> None:
    rounding = {"rtol": 2**-7, "atol": 0.0} if dtype == torch.bfloat16 else {"rtol": 1e-6, "atol": 0.0}
    for seed in range(10):
        gradients, generator = draw(seed, dtype), torch.Generator().manual_seed(seed)
        # Squares from a thousandth of the bound to a thousand times it.
        ratios = [10.0 ** (6 * torch.rand(g.shape, generator=generator) - 3) for g in gradients]
        moments = [(g.double().square() / (threshold * r)).to(dtype) for g, r in zip(gradients, ratios, strict=True)]
        expected = [spam_clip(g, v, threshold) for g, v in zip(gradients, moments, strict=True)]
        before, moments_before = copies(gradients), copies(moments)
        clip_spikes_(gradients, moments, threshold)
        torch.testing.assert_close(gradients, expected, **rounding)
        assert_same_bits(moments, moments_before)
        changed = torch.cat([(g != b).flatten() for g, b in zip(gradients, before, strict=True)])
        assert 0.2 < changed.float().mean() < 0.8


def test_an_entry_without_a_past_is_left_alone() -> None:
    """SPAM sets it to zero, and as a gradient of zero leaves v at zero, it never trains."""
    gradient, moment = torch.tensor([2.0, -3.0, 0.0, 1e-30]), torch.zeros(4)
    assert spam_clip(gradient, moment, 5000.0)[:3].tolist() == [0.0, 0.0, 0.0]
    before = gradient.clone()
    clip_spikes_([gradient], [moment])
    assert_same_bits([gradient], [before])


def test_spikes_in_bf16_are_measured_against_moments_in_float32() -> None:
    gradient = torch.tensor([100.0, -100.0, 0.5, NAN], dtype=torch.bfloat16)
    clip_spikes_([gradient], [torch.full((4,), 0.25)], threshold=4.0)
    assert gradient.dtype == torch.bfloat16
    assert gradient[:3].tolist() == [1.0, -1.0, 0.5]
    assert gradient[3].isnan()


def test_spikes_that_are_infinite_are_clipped_and_nan_stays_nan() -> None:
    gradient = torch.tensor([INF, -INF, NAN, INF, NAN, 2.0])
    moment = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, NAN])
    clip_spikes_([gradient], [moment], threshold=4.0)
    assert_same_bits([gradient], [torch.tensor([2.0, -2.0, NAN, INF, NAN, 2.0])])


def test_no_threshold_clips_no_spike() -> None:
    gradients = draw(1)
    clip_spikes_(gradients, [torch.rand_like(g) * 1e-9 for g in gradients], INF)
    assert_same_bits(gradients, draw(1))


def test_spikes_of_another_number_of_moments_raise() -> None:
    with pytest.raises(ValueError, match="shorter"):
        clip_spikes_([torch.ones(1), torch.ones(1)], [torch.ones(1)])


# DTensors: as the whole gradients would be clipped, and in place.

SHARDED = [((6, 4), 0), ((5, 4), 0), ((4, 6), 1), ((3, 5), 1), ((4, 2, 3), 0), ((7,), 0), ((8,), 0)]
PLAIN = [(3, 4), (5,)]
SOME_LAYERS = torch.tensor([0, 1, 1, 0, 2, 2, 2, 3, 3])
ACTIONS: dict[str, Callable[[list[Tensor], list[Tensor], Tensor], Any]] = {
    "total_norm": lambda g, w, h: [total_norm(g, p) for p in (1.0, 2.0, INF)],
    "total_norm-accurate": lambda g, w, h: total_norm(g, accurate=True),
    "clip_norm_": lambda g, w, h: clip_norm_(g, 0.5),
    "clip_norm_-inf": lambda g, w, h: clip_norm_(g, 0.5, INF),
    "clip_value_": lambda g, w, h: clip_value_(g, 0.5),
    "clip_to_threshold_": lambda g, w, h: clip_to_threshold_(g, total_norm(g), torch.tensor(0.5)),
    "clip_adaptively_": lambda g, w, h: clip_adaptively_(g, w, 0.5),
    "clip_layers_": lambda g, w, h: clip_layers_(g, h, layer_limits(torch.tensor([1.0, 2.0, 3.0, 4.0]), 1.0, True)),
    "normalize_layers_": lambda g, w, h: normalize_layers_(g, w, h, 4, 0.1, 0.2),
    "clip_spikes_": lambda g, w, h: clip_spikes_(g, [x.square() for x in w], 0.5),
}


def whole(value: Any) -> Any:
    """Return nested results with every DTensor gathered."""
    if isinstance(value, (list, tuple)):
        return [whole(item) for item in value]
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def acts_on_shards_as_on_the_whole(act: Callable[..., Any], mixed: bool, rank: int, mesh: Any) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    def drawn(seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        shapes = [shape for shape, _ in SHARDED] + (PLAIN if mixed else [])
        return [torch.randn(shape, generator=generator) for shape in shapes]

    def spread(tensors: list[Tensor]) -> list[Any]:
        dims = [dim for _, dim in SHARDED]
        sharded = [distribute_tensor(t.clone(), mesh, [Shard(d)]) for t, d in zip(tensors, dims, strict=False)]
        # Plain ones stand between the sharded ones, as parameters that FSDP2 was told to ignore do.
        return [*sharded, *copies(tensors[len(dims) :])]

    order = [0, 7, 1, 2, 3, 8, 4, 5, 6] if mixed else list(range(7))
    layers = SOME_LAYERS[order]
    plain, weights = ([tensors[i] for i in order] for tensors in (drawn(0), drawn(1)))
    gradients, sharded_weights = ([spread(drawn(seed))[i] for i in order] for seed in (0, 1))
    pieces = [g.to_local() if hasattr(g, "to_local") else g for g in gradients]
    expected = act(plain, weights, layers)
    found = act(gradients, sharded_weights, layers)
    torch.testing.assert_close(whole(found), whole(expected), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(whole(gradients), plain, rtol=1e-6, atol=1e-6)
    for gradient, piece in zip(gradients, pieces, strict=True):
        local = gradient.to_local() if hasattr(gradient, "to_local") else gradient
        assert torch.equal(piece, local), "what this rank held before was not what was changed"


@pytest.mark.parametrize("mixed", [False, True], ids=["sharded", "sharded and plain"])
@pytest.mark.parametrize("name", ACTIONS)
def test_dtensors(name: str, mixed: bool) -> None:
    on_two_ranks(partial(acts_on_shards_as_on_the_whole, ACTIONS[name], mixed))


def clips_where_a_rank_holds_nothing(norm_type: float, rank: int, mesh: Any) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    gradient = distribute_tensor(torch.tensor([4.0]), mesh, [Shard(0)])  # a bias of one output
    assert gradient.to_local().numel() == 1 - rank
    assert clip_norm_([gradient], 1.0, norm_type).item() == 4.0
    assert gradient.full_tensor().item() == pytest.approx(1.0)
    clip_value_([gradient], 0.5)
    assert gradient.full_tensor().item() == 0.5
    weight = distribute_tensor(torch.tensor([1.0]), mesh, [Shard(0)])
    clip_adaptively_([gradient], [weight], 0.1)
    assert gradient.full_tensor().item() == pytest.approx(0.1)
    clip_spikes_([gradient], [distribute_tensor(torch.tensor([1e-4]), mesh, [Shard(0)])], 4.0)
    assert gradient.full_tensor().item() == pytest.approx(0.02)
    clip_layers_([gradient], torch.tensor([0]), torch.tensor([0.01]))
    assert gradient.full_tensor().item() == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("norm_type", [2.0, INF])
def test_dtensors_smaller_than_the_number_of_ranks(norm_type: float) -> None:
    on_two_ranks(partial(clips_where_a_rank_holds_nothing, norm_type))
