"""Whether rows follow samples, as functions of tensors."""

import itertools

import pytest
import torch

from lightning_grad.core.losses.row_order import follows, is_close, orders_of, rows_of_batch, same_rows
from lightning_grad.utilities.batches import reordered


@pytest.mark.parametrize("samples", [3, 4, 5])
def test_every_fixed_order_but_that_of_the_samples_shows(samples: int) -> None:
    values = torch.arange(samples, dtype=torch.float64)
    for arrangement in map(torch.tensor, itertools.permutations(range(samples))):
        seen = [follows(values[arrangement], values[order][arrangement], order) for order in orders_of(samples)]
        is_own = torch.equal(arrangement, torch.arange(samples))
        assert (False not in seen) == is_own, arrangement


@pytest.mark.parametrize("samples", [2, 3, 8])
def test_an_order_by_the_data_shows(samples: int) -> None:
    values = torch.randn(samples, generator=torch.Generator().manual_seed(samples))
    seen = [follows(values.sort().values, values[order].sort().values, order) for order in orders_of(samples)]
    assert False in seen
    first = next(orders_of(samples))
    assert (first != torch.arange(samples)).all()


def test_rows_that_are_alike_tell_nothing() -> None:
    rows = torch.tensor([5.0, 5.0, 5.0])
    assert follows(rows, rows, next(orders_of(3))) is None
    assert follows(rows, rows + 1, next(orders_of(3))) is False


@pytest.mark.parametrize(
    ("other", "tolerance", "close"),
    [
        (lambda x: x * (1 + 1e-5), 1e-3, True),
        (lambda x: x + 1e-5, 1e-3, True),
        (lambda x: x + 0.1, 1e-3, False),
        (lambda x: x.nan_to_num(7.0), 1e-3, False),
        (lambda x: x[:2], 1e-3, False),
    ],
)
def test_a_difference_of_rounding(other, tolerance, close) -> None:
    x = torch.tensor([1.0, float("nan"), 0.0, float("inf"), -3.0])
    assert is_close(other(x), x, tolerance) is close


def test_whole_numbers_are_equal_or_not() -> None:
    assert is_close(torch.tensor([1000001]), torch.tensor([1000001]), 1e-3)
    assert not is_close(torch.tensor([1000001]), torch.tensor([1000002]), 1e-3)
    assert is_close(torch.zeros(0), torch.zeros(0), 0.0)


def test_groups_of_rows() -> None:
    views = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])  # of three samples
    assert same_rows(views, views[[2, 0, 1]])
    joined = views.T.reshape(3, 2)  # all first views, then all second
    assert not same_rows(joined, views[[1, 2, 0]].T.reshape(3, 2))


def test_reordering_takes_what_has_an_entry_for_each_sample() -> None:
    order = torch.tensor([1, 0])
    x, y, scale = torch.tensor([[1.0], [2.0]]), torch.tensor([3, 4]), torch.tensor([1.0, 2.0, 3.0])
    batch = (x, {"y": y, "names": ["a", "b"], "scale": scale, "n": 2})
    found = reordered(batch, order)
    assert torch.equal(found[0], x.flip(0))
    assert torch.equal(found[1]["y"], y.flip(0))
    assert found[1]["names"] == ["b", "a"]
    assert found[1]["scale"] is scale
    assert batch[1]["names"] == ["a", "b"]


def test_rows_of_a_batch_are_copies() -> None:
    x = torch.ones(2, 1)
    (rows,) = rows_of_batch([x, torch.ones(3), torch.tensor(2.0), "text"], 2)
    x.zero_()
    assert torch.equal(rows, torch.ones(2, 1))
