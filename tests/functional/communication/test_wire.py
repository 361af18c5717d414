"""Costs on the wire worked out by hand, and the densities of a warm-up."""

import math
from fractions import Fraction

import pytest

from lightning_grad.functional import all_gather_bytes, all_reduce_bytes, sparse_wire_gain
from lightning_grad.functional.communication.sparse_messages import pairs_bytes
from lightning_grad.functional.communication.wire import PAPER_WARMUP, RELEASED_WARMUP, kept_count, warmup_density


def test_a_warm_up_goes_through_its_densities_and_stays_at_the_last() -> None:
    found = [warmup_density(epoch, PAPER_WARMUP, 0.001) for epoch in range(7)]
    assert found == [0.25, 0.0625, 0.015625, 0.004, 0.001, 0.001, 0.001]
    assert [warmup_density(epoch, (), 0.3) for epoch in range(2)] == [0.3, 0.3]


def test_it_never_sends_less_than_at_the_end() -> None:
    assert [warmup_density(epoch, PAPER_WARMUP, 0.05) for epoch in range(4)] == [0.25, 0.0625, 0.05, 0.05]


def test_the_released_densities_are_powers() -> None:
    assert len(RELEASED_WARMUP) == 5
    for power, density in enumerate(RELEASED_WARMUP, start=1):
        assert math.isclose(density, 0.001 ** (power / 6), rel_tol=1e-12)


@pytest.mark.parametrize("density", ["0.001", "0.01", "0.05", "0.1", "0.25", "0.3", "0.7", "1"])
def test_counts_are_shares_rounded_up_as_in_exact_arithmetic(density: str) -> None:
    for numel in [*range(1, 300), 999, 1000, 1001, 3000, 7000, 10**6, 10**9 + 1]:
        assert kept_count(numel, float(density)) == max(1, math.ceil(numel * Fraction(density))), numel


def test_nearly_all_is_all() -> None:
    for numel in (1, 10, 10_000, 999_999):
        assert kept_count(numel, 0.9999999) == numel


def test_a_count_lies_between_one_and_all() -> None:
    for numel in (1, 2, 17, 10_000):
        for density in (1e-9, 1e-3, 0.5, 0.999, 1.0):
            assert 1 <= kept_count(numel, density) <= numel


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_rings_send_what_their_steps_send(ranks: int) -> None:
    numel, chunk = 2400, 2400 / ranks
    reduce_scatter = all_gather = (ranks - 1) * 4 * chunk
    assert math.isclose(all_reduce_bytes(numel, ranks), reduce_scatter + all_gather)
    assert all_gather_bytes(100, ranks) == (ranks - 1) * 100
    assert math.isclose(all_reduce_bytes(numel, ranks, value_bytes=2), all_reduce_bytes(numel, ranks) / 2)


@pytest.mark.parametrize("ranks", [2, 16, 64])
def test_the_gain_is_the_quotient_of_the_two(ranks: int) -> None:
    numel, density = 10**7, 0.001
    message = pairs_bytes([kept_count(numel, density)])
    quotient = all_reduce_bytes(numel, ranks) / all_gather_bytes(message, ranks)
    assert math.isclose(sparse_wire_gain(density, ranks), quotient, rel_tol=1e-9)
    assert math.isclose(sparse_wire_gain(density, ranks, pair_bytes=6), quotient * 8 / 6, rel_tol=1e-9)


def test_the_gain_ends_at_a_thousand_ranks() -> None:
    assert sparse_wire_gain(0.001, 999) > 1.0 > sparse_wire_gain(0.001, 1001)
