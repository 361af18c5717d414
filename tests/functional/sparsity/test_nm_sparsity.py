"""Masks and masked weights against an independent reference and numbers worked by hand."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_grad.functional import (
    NMPattern,
    add_sr_ste_,
    is_nm,
    mask_distance,
    masked_gradient_variance,
    nm_mask,
    prune_weight,
    scale_weight,
)
from lightning_grad.functional.sparsity._group_top import (
    top_by_rank,
    top_by_threshold,
    top_of_groups,
)
from lightning_grad.functional.sparsity.nm_sparsity import group_dim
from lightning_grad.functional.torch_version import TORCH
from tests.cases import cases
from tests.functional.ranks import on_two_ranks

NAN, INF = float("nan"), float("inf")
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
PATTERNS = [
    *((1, 2), (2, 4), (3, 4), (1, 4), (4, 8), (3, 8), (7, 8), (1, 8), (1, 16), (2, 16), (15, 16), (31, 32)),
    *((8, 16), (32, 64), (1, 64), (3, 5), (2, 6), (4, 4), (1, 1)),
]
SHAPES = {
    "vector": lambda m: (2 * m,),
    "linear": lambda m: (3, 2 * m),
    "conv1d": lambda m: (2, 2 * m, 3),
    "conv2d": lambda m: (3, m, 3, 2),
    "conv3d": lambda m: (2, m, 2, 1, 3),
}


def reference_mask(weight: Tensor, n: int, m: int, dim: int) -> Tensor:
    """Loop over the groups in float64 and sort each one stably."""
    values = np.moveaxis(np.abs(weight.detach().double().numpy()), dim, -1)
    groups = np.where(np.isnan(values), -1.0, values).reshape(-1, m)
    mask = np.zeros_like(groups)
    for group, row in zip(groups, mask, strict=True):
        order = sorted(range(m), key=lambda i: -group[i])
        row[order[:n]] = 1.0
    return torch.from_numpy(np.moveaxis(mask.reshape(values.shape), -1, dim).copy())


def draw(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, kind: str = "normal") -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    values = torch.randn(shape, generator=generator)
    if kind == "ties":
        values = values.round()
    elif kind == "special":
        which = torch.randint(0, 12, shape, generator=generator)
        for index, special in enumerate((NAN, INF, -INF, 0.0, -0.0, NAN)):
            values[which == index] = special
    return values.to(dtype)


def check_against_reference(weight: Tensor, n: int, m: int, axis: int | str, dim: int) -> None:
    mask = nm_mask(weight, n, m, axis)
    assert mask.shape == weight.shape
    assert mask.dtype == weight.dtype
    assert torch.equal(mask.double(), reference_mask(weight, n, m, dim))


@cases("kind", ["normal", "ties", "special"])
@cases("dtype", DTYPES)
@cases(("n", "m"), PATTERNS)
def test_mask_equals_reference(n: int, m: int, dtype: torch.dtype, kind: str) -> None:
    check_against_reference(draw((5, 3 * m), dtype, kind), n, m, "input", 1)


@cases("kind", ["normal", "ties"])
@cases("shape", SHAPES)
@cases(("n", "m"), [(1, 2), (2, 4), (1, 8), (3, 5), (7, 8), (15, 16), (32, 64)])
def test_groups_are_input_channels_at_one_position(n: int, m: int, shape: str, kind: str) -> None:
    weight = draw(SHAPES[shape](m), kind=kind)
    check_against_reference(weight, n, m, "input", min(1, weight.ndim - 1))


@cases("axis", ["output", 0, 1, 2, 3, -1, -2, -4])
@cases(("n", "m"), [(2, 4), (1, 8), (3, 8)])
def test_groups_lie_along_the_axis_asked_for(n: int, m: int, axis: int | str) -> None:
    weight = draw((8, 16, 8, 24), kind="ties")
    check_against_reference(weight, n, m, axis, 0 if axis == "output" else int(axis) % 4)


def test_hand_worked_convolution_group() -> None:
    weight = torch.zeros(1, 4, 1, 2)
    weight[0, :, 0, 0] = torch.tensor([1.0, -4.0, 3.0, 2.0])
    weight[0, :, 0, 1] = torch.tensor([-9.0, 0.5, 8.0, 0.1])
    mask = nm_mask(weight, 2, 4)
    assert mask[0, :, 0, 0].tolist() == [0, 1, 1, 0]
    assert mask[0, :, 0, 1].tolist() == [1, 0, 1, 0]


@cases(("n", "m"), PATTERNS)
@cases("value", [0.0, 3.0, -INF, NAN])
def test_ties_keep_exactly_n_lowest_index_first(n: int, m: int, value: float) -> None:
    expected = torch.tensor([1.0] * n + [0.0] * (m - n))
    assert torch.equal(nm_mask(torch.full((2, 2 * m), value), n, m), expected.repeat(2, 2))


@cases(
    ("row", "kept"),
    [
        ([-2.0, 2.0, 2.0, -2.0], [1, 1, 0, 0]),
        ([0.0, -0.0, 0.0, -0.0], [1, 1, 0, 0]),
        ([-0.0, 0.0, 1e-30, -1e-30], [0, 0, 1, 1]),
        ([NAN, 0.0, NAN, -0.0], [0, 1, 0, 1]),
        ([NAN, NAN, 0.0, NAN], [1, 0, 1, 0]),
        ([INF, 3e38, -INF, 1.0], [1, 0, 1, 0]),
        ([INF, NAN, -INF, INF], [1, 0, 1, 0]),
    ],
)
def test_special_values_rank_as_documented(row: list[float], kept: list[int]) -> None:
    assert nm_mask(torch.tensor([row]), 2, 4).tolist() == [kept]


@cases(("n", "m"), [(n, m) for n, m in PATTERNS if n < m])
@cases("kind", ["normal", "ties"])
def test_selection_algorithms_agree(n: int, m: int, kind: str) -> None:
    magnitude = draw((m, 7, 3), kind=kind).abs_()
    order = torch.argsort(magnitude, dim=0, descending=True, stable=True)
    sorted_ = torch.zeros_like(magnitude, dtype=torch.bool).scatter_(0, order[:n], True)
    for algorithm in (top_by_rank, top_by_threshold, top_of_groups):
        kept = algorithm(magnitude, n)
        assert kept.dtype == torch.bool, algorithm.__name__
        assert torch.equal(kept, sorted_), algorithm.__name__


def test_selection_leaves_its_input_alone() -> None:
    for n, m in PATTERNS:
        magnitude = draw((m, 5, 1)).abs_()
        before = magnitude.clone()
        top_of_groups(magnitude, n)
        assert torch.equal(magnitude, before), (n, m)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 8), (15, 16), (32, 64)])
def test_memory_layout_does_not_change_the_mask(n: int, m: int) -> None:
    weight = draw((4, m, 3, 3), kind="ties")
    expected = nm_mask(weight, n, m)
    assert torch.equal(nm_mask(weight.to(memory_format=torch.channels_last), n, m), expected)
    strided = torch.stack([weight, -1 - weight], dim=-1)[..., 0]
    assert not strided.is_contiguous()
    assert torch.equal(nm_mask(strided, n, m), expected)
    linear = draw((2 * m, 6), kind="ties").T
    assert torch.equal(nm_mask(linear, n, m), nm_mask(linear.contiguous(), n, m))


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 8), (32, 64)])
def test_mask_has_no_gradient_and_leaves_the_weight_alone(n: int, m: int) -> None:
    weight = draw((3, m)).requires_grad_()
    before, version = weight.detach().clone(), weight._version
    mask = nm_mask(weight, n, m)
    assert not mask.requires_grad
    assert torch.equal(weight, before)
    assert weight._version == version


def test_mask_of_no_rows_is_empty() -> None:
    assert nm_mask(torch.empty(0, 8), 2, 4).shape == (0, 8)


@pytest.mark.parametrize(
    ("n", "m", "said"),
    [(5, 4, "got 5:4"), (0, 4, "got 0:4"), (-1, 4, "got -1:4"), (1, 0, "got 1:0"), (2, 3, "Groups of 3 do not divide")],
)
def test_mask_refuses_impossible_groups(n: int, m: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        nm_mask(torch.zeros(2, 8), n, m)


def test_refused_group_size_names_dimension_and_shape() -> None:
    with pytest.raises(ValueError, match=r"dimension 0 of a weight of shape \(6, 8\).*divides 6"):
        nm_mask(torch.zeros(6, 8), 2, 4, "output")


@pytest.mark.parametrize("axis", ["rows", "Input", 2, -3])
def test_wrong_axis_is_refused_by_name(axis: int | str) -> None:
    with pytest.raises(ValueError, match=f"axis.*{axis}"):
        nm_mask(torch.zeros(4, 4), 2, 4, axis)


def test_group_dim_of_a_scalar_is_refused() -> None:
    with pytest.raises(ValueError, match="out of range for a weight of shape"):
        group_dim(torch.tensor(1.0))


@cases("text", ["2", "a:b", "", "2:4:8", "2-4", "2.0:4", ":4", "-1:4"])
def test_pattern_that_is_no_pair_of_numbers_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="written like '2:4'"):
        NMPattern.parse(text)


@pytest.mark.parametrize("text", ["5:4", "0:4", "0:0"])
def test_pattern_of_impossible_numbers_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=f"1 <= N <= M; got {text}"):
        NMPattern.parse(text)


def test_pattern_reads_writes_and_measures() -> None:
    pattern = NMPattern.parse(" 3 : 16 ")
    assert pattern == NMPattern(3, 16)
    assert str(pattern) == "3:16"
    assert NMPattern.parse(str(pattern)) == pattern
    assert pattern.density == 3 / 16
    assert [size for size in range(1, 40) if pattern.fits(size)] == [16, 32]


# is_nm


@pytest.mark.parametrize(
    ("row", "n", "m", "exact"),
    [
        ([0.0, -3.0, 2.0, 0.0], 2, 4, True),
        ([0.0, -3.0, 2.0, 0.0], 1, 4, False),
        ([0.0, -3.0, 2.0, 0.0], 1, 2, True),
        ([1.0, -3.0, 0.0, 0.0], 1, 2, False),
        ([-0.0, 0.0, 0.0, 0.0], 1, 4, True),
        ([NAN, 1.0, 0.0, 0.0], 1, 4, False),
        ([1.0, 0.0, 0.0, 0.0], 1, 3, False),
        ([1.0, 2.0, 3.0, 4.0], 4, 4, True),
    ],
)
def test_is_nm_counts_what_is_not_zero(row: list[float], n: int, m: int, exact: bool) -> None:
    assert is_nm(torch.tensor([row]), n, m) is exact


@pytest.mark.parametrize("axis", ["input", "output", 2])
def test_is_nm_holds_along_the_axis_that_was_masked_alone(axis: int | str) -> None:
    weight = draw((8, 8, 8))
    masked = prune_weight(weight, nm_mask(weight, 2, 4, axis))
    assert is_nm(masked, 2, 4, axis)
    assert [is_nm(masked, 2, 4, other) for other in ("input", "output", 2)].count(True) == 1
    assert not is_nm(masked, 1, 4, axis)


def test_one_entry_too_many_is_found() -> None:
    weight = draw((6, 16))
    masked = prune_weight(weight, nm_mask(weight, 2, 4))
    masked[5, int((masked[5] == 0).nonzero()[0])] = 1e-6
    assert not is_nm(masked, 2, 4)


# scale_weight, prune


@pytest.mark.parametrize("straight_through", [False, True])
def test_scale_weight_multiplies(straight_through: bool) -> None:
    weight, factor = draw((4, 8)), torch.rand(4, 8)
    assert torch.equal(scale_weight(weight, factor, straight_through), weight * factor)


def test_masked_gradient_is_the_chain_rule() -> None:
    weight, upstream = draw((4, 8)).double().requires_grad_(), draw((4, 8)).double() + 3
    factor = nm_mask(weight, 2, 4).clamp(min=0.25)
    scale_weight(weight, factor).backward(upstream)
    assert torch.equal(weight.grad, upstream * factor)
    assert torch.autograd.gradcheck(lambda w: scale_weight(w, factor), weight)


def test_straight_through_gradient_is_passed_on_as_it_is() -> None:
    weight, upstream = draw((4, 8)).double().requires_grad_(), draw((4, 8)).double() + 3
    scale_weight(weight, nm_mask(weight, 2, 4), straight_through=True).backward(upstream)
    assert torch.equal(weight.grad, upstream)


@pytest.mark.parametrize("straight_through", [False, True])
def test_gradient_through_a_layer_is_worked_by_hand(straight_through: bool) -> None:
    weight = torch.tensor([[1.0, -2.0, 3.0, 4.0]], requires_grad=True)
    factor, x = torch.tensor([[0.5, 0.5, 1.0, 1.0]]), torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    loss = torch.nn.functional.linear(x, scale_weight(weight, factor, straight_through)).square().sum() / 2
    loss.backward()
    assert loss.item() == 23.5**2 / 2
    expected = 23.5 * x * (1.0 if straight_through else factor)
    assert torch.equal(weight.grad, expected)


def test_factor_gets_no_gradient_under_straight_through() -> None:
    weight, factor = draw((2, 4)).requires_grad_(), torch.ones(2, 4, requires_grad=True)
    scale_weight(weight, factor, straight_through=True).sum().backward()
    assert factor.grad is None


def test_prune_gives_exact_zeros_for_nan_infinity_and_negative_weights() -> None:
    pruned = prune_weight(torch.tensor([NAN, INF, -INF, -5.0, 7.0]), torch.zeros(5))
    assert torch.equal(pruned, torch.zeros(5))
    assert not torch.signbit(pruned).any()


def test_prune_keeps_what_is_kept_and_scales_what_decays() -> None:
    weight = torch.tensor([NAN, INF, -2.0, 4.0], requires_grad=True)
    pruned = prune_weight(weight, torch.tensor([1.0, 1.0, 0.5, 0.25]))
    assert pruned[0].isnan()
    assert pruned[1:].tolist() == [INF, -1.0, 1.0]
    assert not pruned.requires_grad
    assert weight[2].item() == -2.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pruned_weight_satisfies_its_pattern(dtype: torch.dtype) -> None:
    weight = draw((4, 32), dtype, "special")
    pruned = prune_weight(weight, nm_mask(weight, 2, 8))
    assert pruned.dtype == dtype
    assert is_nm(pruned, 2, 8)


# add_sr_ste_


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sr_ste_adds_its_formula_in_place(dtype: torch.dtype) -> None:
    weight, gradient = draw((4, 8), dtype), draw((4, 8), dtype, "ties") + 1
    mask = nm_mask(weight, 2, 4)
    expected = gradient.double() + 0.5 * (1 - mask.double()) * weight.double()
    same = add_sr_ste_(gradient, weight, mask, 0.5)
    assert same is gradient
    torch.testing.assert_close(gradient.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)


def test_sr_ste_default_strength_is_the_papers() -> None:
    gradient = add_sr_ste_(torch.zeros(2), torch.tensor([10.0, 10.0]), torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(gradient, torch.tensor([0.0, 2e-3]))


def test_sr_ste_shrinks_pruned_weights_and_only_those() -> None:
    weight = draw((4, 8)).requires_grad_()
    mask = nm_mask(weight, 2, 4)
    weight.grad = add_sr_ste_(torch.zeros_like(weight), weight, mask, 0.1)
    before = weight.detach().clone()
    torch.optim.SGD([weight], lr=0.5).step()
    assert torch.equal(weight[mask == 1], before[mask == 1])
    torch.testing.assert_close(weight[mask == 0], before[mask == 0] * 0.95)


def test_sr_ste_does_not_enter_autograd() -> None:
    weight = draw((2, 4)).requires_grad_()
    assert not add_sr_ste_(torch.zeros(2, 4), weight, nm_mask(weight, 2, 4)).requires_grad


# mask_distance, masked_gradient_variance


@pytest.mark.parametrize(
    ("one", "other", "share"),
    [([1, 0, 1, 0], [1, 0, 1, 0], 0.0), ([1, 0, 1, 0], [0, 1, 0, 1], 1.0), ([1, 1, 0, 0], [1, 0, 0, 0], 0.25)],
)
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16], ids=str)
def test_mask_distance_is_the_share_that_differs(
    one: list[int], other: list[int], share: float, dtype: torch.dtype
) -> None:
    distance = mask_distance(torch.tensor(one, dtype=dtype), torch.tensor(other, dtype=dtype))
    assert distance.shape == ()
    assert distance.item() == share


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_variance_equals_its_formula(dtype: torch.dtype) -> None:
    new, old = draw((6, 16), dtype), draw((16, 6), dtype).reshape(6, 16)
    mask = nm_mask(new, 2, 8)
    half_square = (new.double() - old.double()).numpy() ** 2 / 2
    kept = mask.bool().numpy()
    pruned_variance, kept_variance = masked_gradient_variance(new, old, mask)
    assert pruned_variance.item() == pytest.approx(half_square[~kept].mean(), rel=1e-5)
    assert kept_variance.item() == pytest.approx(half_square[kept].mean(), rel=1e-5)


def test_gradient_variance_estimates_a_known_variance_without_bias() -> None:
    generator = torch.Generator().manual_seed(0)
    mask = nm_mask(torch.randn(400, 1000, generator=generator), 1, 4)
    scale = torch.where(mask == 1, 3.0, 0.5)
    mean = 5 * torch.randn(mask.shape, generator=generator)
    first, second = (mean + scale * torch.randn(mask.shape, generator=generator) for _ in range(2))
    pruned_variance, kept_variance = masked_gradient_variance(second, first, mask)
    # The relative standard error of a variance from k pairs is sqrt(2 / k): 0.26 % and 0.45 % here.
    assert pruned_variance.item() == pytest.approx(0.25, rel=0.012)
    assert kept_variance.item() == pytest.approx(9.0, rel=0.02)


def test_small_variance_of_pruned_weights_is_not_drowned_by_the_kept() -> None:
    generator = torch.Generator().manual_seed(0)
    mask = nm_mask(torch.randn(100, 1000, generator=generator), 1, 2)
    scale = torch.where(mask == 1, 1e4, 1e-3)
    first, second = (scale * torch.randn(mask.shape, generator=generator) for _ in range(2))
    pruned_variance, kept_variance = masked_gradient_variance(second, first, mask)
    assert pruned_variance.item() == pytest.approx(1e-6, rel=0.05)
    assert kept_variance.item() == pytest.approx(1e8, rel=0.05)


@pytest.mark.parametrize(("fill", "missing"), [(1.0, 0), (0.0, 1)])
def test_gradient_variance_of_an_empty_part_is_nan(fill: float, missing: int) -> None:
    variances = masked_gradient_variance(torch.ones(4), torch.zeros(4), torch.full((4,), fill))
    assert [math.isnan(variance.item()) for variance in variances] == [missing == 0, missing == 1]
    assert variances[1 - missing].item() == 0.5


# Nothing waits for the device.


class NoHostSync(TorchDispatchMode):
    """Raises where a value would travel to the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "equal", "masked_select", "unique", "_unique2"):
            raise RuntimeError(f"{name} waits for the device")
        if name == "_to_copy" and (kwargs or {}).get("device") is not None:
            raise RuntimeError("a copy to another device")
        if name in ("index", "index_put_") and any(i is not None and i.dtype == torch.bool for i in args[1]):
            raise RuntimeError("the size of a choice by mask waits for the device")
        return func(*args, **(kwargs or {}))


def every_step_function(device: str, n: int, m: int) -> None:
    weight = torch.randn(4, 2 * m, device=device, requires_grad=True)
    mask = nm_mask(weight, n, m)
    for straight_through in (False, True):
        scale_weight(weight, mask, straight_through).sum().backward()
    add_sr_ste_(weight.grad, weight, mask)
    mask_distance(mask, 1 - mask)
    masked_gradient_variance(weight.grad, weight.grad, mask)
    prune_weight(weight, mask)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 8), (4, 8), (15, 16), (31, 32), (32, 64), (4, 4)])
def test_step_functions_do_not_wait_for_the_device(n: int, m: int) -> None:
    with NoHostSync():
        every_step_function("cpu", n, m)
    every_step_function("meta", n, m)  # has no values, so reading one raises


def test_a_wait_for_the_device_would_be_caught() -> None:
    weight = torch.zeros(2, 4)
    with pytest.raises(RuntimeError, match="waits"), NoHostSync():
        is_nm(weight, 2, 4)
    with pytest.raises(RuntimeError, match="waits"), NoHostSync():
        weight[weight == 0].sum()
    with pytest.raises((RuntimeError, NotImplementedError)):
        is_nm(weight.to("meta"), 2, 4)


# Sharded weights.


def rows_sharded_equal_unsharded(rank: int, mesh) -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    for shape in ((4, 8), (5, 8), (1, 8), (3, 4, 3, 3)):  # even and uneven shards, and an empty one
        weight = draw(shape, kind="ties")
        sharded = distribute_tensor(weight, mesh, [Shard(0)])
        mask = nm_mask(sharded, 2, 4)
        assert mask.placements == sharded.placements
        assert mask.shape == sharded.shape
        assert torch.equal(mask.full_tensor(), nm_mask(weight, 2, 4))
        assert torch.equal(prune_weight(sharded, mask).full_tensor(), prune_weight(weight, nm_mask(weight, 2, 4)))
    columns = distribute_tensor(draw((4, 8)), mesh, [Shard(1)])
    assert torch.equal(nm_mask(columns, 2, 4, "output").full_tensor(), nm_mask(draw((4, 8)), 2, 4, "output"))
    whole = distribute_tensor(draw((4, 8)), mesh, [Replicate()])
    assert torch.equal(nm_mask(whole, 2, 4).full_tensor(), nm_mask(draw((4, 8)), 2, 4))


def sharded_groups_raise(rank: int, mesh) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.distributed.tensor.placement_types import _StridedShard

    for placement in (Shard(1), _StridedShard(1, split_factor=2)):
        sharded = distribute_tensor(draw((4, 16)), mesh, [placement])
        with pytest.raises(ValueError, match="sharded along dimension 1, which the pattern 2:4 groups"):
            nm_mask(sharded, 2, 4)


def sharded_gradients_equal_unsharded(rank: int, mesh) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    weight, upstream = draw((4, 8)).requires_grad_(), draw((8, 4)).reshape(4, 8)
    sharded = distribute_tensor(weight.detach(), mesh, [Shard(0)]).requires_grad_()
    for straight_through in (False, True):
        weight.grad = sharded.grad = None
        scale_weight(weight, nm_mask(weight, 2, 4), straight_through).backward(upstream)
        shown = scale_weight(sharded, nm_mask(sharded, 2, 4), straight_through)
        shown.backward(distribute_tensor(upstream, mesh, [Shard(0)]))
        assert torch.equal(sharded.grad.full_tensor(), weight.grad)
    add_sr_ste_(weight.grad, weight, nm_mask(weight, 2, 4), 0.5)
    add_sr_ste_(sharded.grad, sharded, nm_mask(sharded, 2, 4), 0.5)
    assert torch.equal(sharded.grad.full_tensor(), weight.grad)
    assert mask_distance(nm_mask(sharded, 2, 4), nm_mask(sharded, 1, 4)).full_tensor().item() == 0.25


# NMSparsity itself refuses shards; these functions take them where torch has the operators.
lacks_operators = pytest.mark.skipif(
    TORCH < (2, 10), reason="torch 2.6 has no masked_fill_ and no comparison of sharded tensors, 2.10 has masked_fill_"
)


@pytest.mark.parametrize(
    "check",
    [
        pytest.param(rows_sharded_equal_unsharded, marks=lacks_operators),
        sharded_groups_raise,
        pytest.param(sharded_gradients_equal_unsharded, marks=lacks_operators),
    ],
)
def test_dtensor(check, tmp_path) -> None:
    on_two_ranks(check)


def test_a_failure_on_one_rank_fails_the_test(tmp_path) -> None:
    with pytest.raises(AssertionError, match="only on rank 1"):
        on_two_ranks(fails_on_rank_one)


def fails_on_rank_one(rank: int, mesh) -> None:
    assert rank == 0, "only on rank 1"
