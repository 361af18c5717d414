"""Factors of layers."""

import itertools

import pytest

from lightning_grad.functional import layer_factors


def test_each_layer_has_decay_times_the_factor_of_the_next() -> None:
    layers = list("abcdef")
    factors = layer_factors(layers, layers, 0.8)
    assert list(factors) == layers
    assert factors["f"] == 1.0
    for layer, after in itertools.pairwise(layers):
        assert factors[layer] == pytest.approx(0.8 * factors[after], rel=1e-15)


def test_a_layer_that_is_not_called_does_not_count_and_follows_its_neighbor() -> None:
    registered = ["early", "a", "b", "after_b", "c"]
    assert layer_factors(["a", "b", "c"], registered, 0.5) == {
        "a": 0.25,
        "b": 0.5,
        "c": 1.0,
        "early": 0.25,
        "after_b": 0.5,
    }
    assert layer_factors([], ["a"], 0.5) == {"a": 1.0}


def test_without_decay_all_factors_are_exactly_one() -> None:
    assert set(layer_factors(["a", "b"], ["a", "b", "c"], 1.0).values()) == {1.0}
