"""Centralization, noise, finiteness and momentum reset: by hand, by statistics, and sharded against whole."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_grad.functional import (
    add_gradient_noise_,
    centralize_,
    noise_deviation,
    nonfinite,
    reset_moments_,
    reset_warmup,
)
from tests.functional.ranks import on_two_ranks

NAN, INF = float("nan"), float("inf")
SHAPES = [(), (5,), (4, 6), (3, 2, 5), (4, 3, 2, 2)]


def draw(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).add_(1.0).to(dtype)


# Centralization.


def test_centralized_as_worked_by_hand() -> None:
    matrix, image = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]]), torch.tensor([[[1.0, 3.0], [5.0, 7.0]]])
    centralize_([matrix, image])
    assert matrix.tolist() == [[-2.0, -1.0, 3.0], [-1.0, -1.0, 2.0]]
    assert image.tolist() == [[[-3.0, -1.0], [1.0, 3.0]]]


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_have_no_mean_and_vectors_stay(shape: tuple[int, ...]) -> None:
    gradient, before = draw(shape), draw(shape)
    centralize_([gradient])
    if len(shape) < 2:
        assert torch.equal(gradient, before)
        return
    rows, rows_before = gradient.flatten(1), before.flatten(1)
    torch.testing.assert_close(rows.mean(1), torch.zeros(shape[0]), atol=1e-6, rtol=0)
    # Only the mean is gone: differences within a row are what they were.
    torch.testing.assert_close(rows - rows[:, :1], rows_before - rows_before[:, :1])
    once = gradient.clone()
    centralize_([gradient])
    torch.testing.assert_close(gradient, once)


def test_only_convolutions_leaves_matrices_alone() -> None:
    gradients, before = [draw(shape) for shape in SHAPES], [draw(shape) for shape in SHAPES]
    centralize_(gradients, conv_only=True)
    changed = [not torch.equal(a, b) for a, b in zip(gradients, before, strict=True)]
    assert changed == [False, False, False, True, True]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_centralization_keeps_the_dtype(dtype: torch.dtype) -> None:
    gradient = draw((64, 1000), dtype=dtype)
    centralize_([gradient])
    assert gradient.dtype == dtype
    assert gradient.double().mean(1).abs().max() < 0.02


# Noise.

SIZE = (400, 500)


@pytest.mark.parametrize(
    ("step", "eta", "expected"),
    [(0, 0.01, 0.1), (100, 0.3, math.sqrt(0.3 / 101**0.55)), (1000, 1.0, math.sqrt(1.0 / 1001**0.55)), (7, 0.0, 0.0)],
)
def test_noise_has_the_deviation_of_the_paper(step: int, eta: float, expected: float) -> None:
    deviation = noise_deviation(step, eta)
    assert deviation == pytest.approx(expected, rel=1e-12)
    gradient = torch.zeros(SIZE)
    add_gradient_noise_([gradient], deviation, seed=step)
    assert gradient.std().item() == pytest.approx(expected, rel=0.02)
    assert abs(gradient.mean().item()) <= 0.02 * expected


def test_noise_dies_away_faster_with_more_decay() -> None:
    assert noise_deviation(50, 0.3, decay=0.0) == pytest.approx(math.sqrt(0.3))
    assert noise_deviation(50, 0.3, decay=1.0) == pytest.approx(math.sqrt(0.3 / 51))


def noise_of(seed: int, count: int = 1, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    gradients = [torch.zeros(SIZE, dtype=dtype) for _ in range(count)]
    add_gradient_noise_(gradients, 1.0, seed)
    return gradients


def test_noise_is_that_of_its_seed() -> None:
    assert torch.equal(*noise_of(5), *noise_of(5))
    assert not torch.isclose(*noise_of(5), *noise_of(6)).float().mean() > 0.01


def correlation(a: Tensor, b: Tensor) -> float:
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item()


def test_neighbours_are_uncorrelated() -> None:
    first, second = noise_of(3, count=2)
    bound = 5 / math.sqrt(first.numel())  # five deviations of the correlation of independent draws
    assert abs(correlation(first, second)) < bound, "two gradients of one step"
    assert abs(correlation(first, *noise_of(4))) < bound, "one gradient in two steps"
    assert abs(correlation(first[:, 1:], first[:, :-1])) < bound, "entries side by side"
    assert abs(correlation(first[1:], first[:-1])) < bound, "rows side by side"


def test_noise_is_added_to_what_is_there() -> None:
    gradient = torch.full(SIZE, 7.0)
    add_gradient_noise_([gradient], 0.5, seed=1)
    torch.testing.assert_close(gradient, 7.0 + 0.5 * noise_of(1)[0])


def test_the_global_random_state_is_neither_read_nor_moved() -> None:
    torch.manual_seed(1)
    state, first = torch.get_rng_state(), noise_of(8)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(*first, *noise_of(8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_noise_in_other_dtypes(dtype: torch.dtype) -> None:
    (noise,) = noise_of(1, dtype=dtype)
    assert noise.dtype == dtype
    assert noise.double().std().item() == pytest.approx(1.0, rel=0.02)
    if dtype != torch.float64:
        assert torch.equal(noise, noise_of(1)[0].to(dtype)), "drawn in float32 and rounded once"


def test_noise_takes_seeds_of_62_bits() -> None:
    gradient = torch.zeros(3)
    add_gradient_noise_([gradient], 1.0, seed=2**62 - 1)
    assert gradient.isfinite().all()


# Finiteness.


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_what_is_not_finite_is_found_where_it_is(dtype: torch.dtype, bad: float) -> None:
    gradients = [draw(shape, dtype=dtype) for shape in SHAPES]
    assert nonfinite(gradients).tolist() == [False] * 5
    for position in (0, 3):
        gradients[position].view(-1)[-1] = bad
    assert nonfinite(gradients).tolist() == [True, False, False, True, False]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_largest_numbers_are_finite(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    gradient = torch.full((1000,), largest, dtype=dtype)
    gradient[::2] = -largest
    assert nonfinite([gradient, torch.zeros(3, dtype=dtype)]).tolist() == [False, False]


def test_dtypes_may_be_mixed() -> None:
    gradients = [torch.tensor([65504.0]).half(), torch.tensor([INF]).bfloat16(), torch.tensor([3e38])]
    assert nonfinite(gradients).tolist() == [False, True, False]


def test_a_parameter_without_entries_is_finite() -> None:
    assert nonfinite([torch.zeros(0, 3), torch.tensor([NAN])]).tolist() == [False, True]


# Momentum reset.


def test_moments_are_zeroed_in_place_and_steps_stay() -> None:
    first = {"step": torch.tensor(3.0), "exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2)}
    second = {"exp_avg": torch.ones(3, dtype=torch.bfloat16), "exp_avg_sq": torch.ones(3), "other": torch.ones(1)}
    kept = dict(first)
    reset_moments_([first, {}, second])
    assert first["exp_avg"] is kept["exp_avg"]
    assert first["exp_avg"].tolist() == first["exp_avg_sq"].tolist() == [0.0, 0.0]
    assert second["exp_avg"].tolist() == second["exp_avg_sq"].tolist() == [0.0, 0.0, 0.0]
    assert first["step"].item() == 3.0
    assert second["other"].item() == 1.0


def test_the_largest_moments_of_amsgrad_are_zeroed_too() -> None:
    """Or the divisor would remember the spike for ever."""
    parameter = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.Adam([parameter], amsgrad=True)
    parameter.grad = torch.full((3,), 1e6)
    optimizer.step()
    reset_moments_(list(optimizer.state.values()))
    state = optimizer.state[parameter]
    assert {key: value.abs().max().item() for key, value in state.items()} == {
        "step": 1.0,
        "exp_avg": 0.0,
        "exp_avg_sq": 0.0,
        "max_exp_avg_sq": 0.0,
    }


@pytest.mark.parametrize("states", [[], [{}], [{"momentum_buffer": torch.ones(1)}]])
def test_states_without_moments_are_passed_over(states: list[dict[str, Tensor]]) -> None:
    reset_moments_(states)
    assert all(torch.equal(value, torch.ones(1)) for state in states for value in state.values())


@pytest.mark.parametrize("warmup", [1, 2, 10, 150])
def test_warmup_is_the_cosine_decay_of_spam(warmup: int) -> None:
    """SPAM keeps a death rate of 0.99 in an optimizer of its own, and lets torch's schedule lower it over T + 1 steps."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.99)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, warmup + 1)
    for step in range(warmup + 5):
        death_rate = optimizer.param_groups[0]["lr"] if step < warmup else 0.0
        assert reset_warmup(step, warmup) == pytest.approx(1.0 - death_rate, rel=1e-9)
        optimizer.step()
        if step < warmup:
            schedule.step()
    assert reset_warmup(0, warmup) == pytest.approx(0.01)


def test_no_warmup_lowers_nothing() -> None:
    assert [reset_warmup(step, 0) for step in range(3)] == [1.0, 1.0, 1.0]


# DTensors: as the whole tensors.


def shard(tensor: Tensor, mesh: Any, dim: int = 0) -> Any:
    from torch.distributed.tensor import Shard, distribute_tensor

    return distribute_tensor(tensor.clone(), mesh, [Shard(dim)])


PLACED = [((5, 4), 0), ((4, 6), 1), ((3, 2, 5), 2), ((7,), 0), ((1, 3), 0)]


def acts_on_shards_as_on_the_whole(act: Callable[[list[Any]], None], rank: int, mesh: Any) -> None:
    plain = [draw(shape) for shape, _ in PLACED]
    sharded = [shard(draw(shape), mesh, dim) for shape, dim in PLACED]
    pieces = [tensor.to_local() for tensor in sharded]
    act(plain), act(sharded)
    for whole, tensor, piece in zip(plain, sharded, pieces, strict=True):
        torch.testing.assert_close(tensor.full_tensor(), whole, rtol=1e-6, atol=1e-6)
        assert torch.equal(tensor.to_local(), piece), "what this rank held before was not what was changed"


def noise_of_shards_is_that_of_the_whole(rank: int, mesh: Any) -> None:
    torch.manual_seed(rank)  # the ranks' own random states do not matter
    plain = [torch.zeros(shape) for shape, _ in PLACED]
    sharded = [shard(torch.zeros(shape), mesh, dim) for shape, dim in PLACED]
    add_gradient_noise_(plain, 1.0, seed=11)
    add_gradient_noise_(sharded, 1.0, seed=11)
    for whole, tensor in zip(plain, sharded, strict=True):
        assert torch.equal(tensor.full_tensor(), whole)


def one_rank_speaks_for_all(bad: float, rank: int, mesh: Any) -> None:
    for row in (0, 5):  # held by the first rank, by the second
        whole = torch.ones(6, 2)
        whole[row] = bad
        found = nonfinite([shard(torch.ones(6, 2), mesh), shard(whole, mesh), shard(whole.T.clone(), mesh, 1)])
        assert found.tolist() == [False, True, True], f"in row {row}, seen on rank {rank}"


def finite_where_a_rank_holds_nothing(rank: int, mesh: Any) -> None:
    assert nonfinite([shard(torch.ones(1), mesh), shard(torch.tensor([NAN]), mesh)]).tolist() == [False, True]


def finite_beside_plain_tensors(rank: int, mesh: Any) -> None:
    assert nonfinite([torch.ones(3), shard(torch.ones(4), mesh), torch.full((2,), INF)]).tolist() == [
        False,
        False,
        True,
    ]


def moments_sharded_and_plain_are_reset(rank: int, mesh: Any) -> None:
    states = [{"exp_avg": shard(torch.ones(4, 2), mesh)}, {"exp_avg": torch.ones(3)}]
    reset_moments_(states)
    assert states[0]["exp_avg"].full_tensor().tolist() == [[0.0, 0.0]] * 4
    assert states[1]["exp_avg"].tolist() == [0.0] * 3


DTENSOR_CHECKS: dict[str, Callable[[int, Any], None]] = {
    "centralization": partial(acts_on_shards_as_on_the_whole, centralize_),
    "noise": noise_of_shards_is_that_of_the_whole,
    "nan": partial(one_rank_speaks_for_all, NAN),
    "infinity": partial(one_rank_speaks_for_all, -INF),
    "fewer rows than ranks": finite_where_a_rank_holds_nothing,
    "finite beside plain": finite_beside_plain_tensors,
    "moments beside plain": moments_sharded_and_plain_are_reset,
}


@pytest.mark.parametrize("name", DTENSOR_CHECKS)
def test_dtensors(name: str) -> None:
    on_two_ranks(DTENSOR_CHECKS[name])
