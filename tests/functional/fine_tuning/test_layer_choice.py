"""The choice of layers under a budget: against all choices, and by hand."""

from __future__ import annotations

import itertools
import random

import pytest

from lightning_grad.functional import LayerMemory, choose_layers, needed_bytes


def network(seed: int, count: int = 8) -> list[LayerMemory]:
    """Return layers whose paths become shorter towards the end."""
    draw = random.Random(seed)
    paths = sorted((draw.randint(0, 400) for _ in range(count)), reverse=True)
    return [LayerMemory(str(i), draw.randint(1, 200), path, draw.random()) for i, path in enumerate(paths)]


def gain(layers: list[LayerMemory]) -> float:
    return sum(layer.gain for layer in layers)


def best(layers: list[LayerMemory], budget: float) -> float:
    """Return the largest gain of all choices that fit."""
    choices = itertools.chain.from_iterable(itertools.combinations(layers, n) for n in range(len(layers) + 1))
    return max(gain(list(choice)) for choice in choices if needed_bytes(choice) <= budget)


@pytest.mark.parametrize("rule", ["gain", "first", "last", "random"])
def test_no_rule_exceeds_the_budget(rule: str) -> None:
    for seed in range(30):
        layers = network(seed)
        for budget in (0, 50, 200, 500, 5000):
            chosen = choose_layers(layers, budget, rule, seed)  # type: ignore[arg-type]
            assert needed_bytes(chosen) <= budget
            assert [each.name for each in chosen] == sorted((each.name for each in chosen), key=int)
        assert choose_layers(layers, needed_bytes(layers), rule) == layers  # type: ignore[arg-type]


def test_the_rule_is_close_to_the_best_choice_and_ignoring_the_path_is_not() -> None:
    found, perfect, naive = 0.0, 0.0, 0.0
    for seed in range(60):
        layers = network(seed)
        budget = 0.4 * needed_bytes(layers)
        found += gain(choose_layers(layers, budget))
        perfect += best(layers, budget)
        fitting: list[LayerMemory] = []
        for layer in sorted(layers, key=lambda each: -each.gain / each.own):  # greedy, without the frontier
            if needed_bytes([*fitting, layer]) <= budget:
                fitting.append(layer)
        naive += gain(fitting)
    assert found > 0.95 * perfect
    assert naive < found


def test_first_and_last_are_contiguous_and_random_depends_on_the_seed() -> None:
    layers = [LayerMemory(str(i), 10, 0, 1.0) for i in range(6)]
    assert [each.name for each in choose_layers(layers, 25, "first")] == ["0", "1"]
    assert [each.name for each in choose_layers(layers, 25, "last")] == ["4", "5"]
    drawn = {tuple(each.name for each in choose_layers(layers, 25, "random", seed)) for seed in range(20)}
    assert len(drawn) > 5
    large = [LayerMemory("a", 10, 0, 1.0), LayerMemory("b", 100, 0, 1.0), LayerMemory("c", 10, 0, 1.0)]
    assert [each.name for each in choose_layers(large, 50, "last")] == ["c"]  # it stops at the first that does not fit


def test_layers_without_gain_are_not_chosen_and_unknown_rules_raise() -> None:
    layers = [LayerMemory("unused", 1, 0, 0.0), LayerMemory("nan", 1, 0, float("nan")), LayerMemory("used", 1, 0, 1.0)]
    assert [each.name for each in choose_layers(layers, 100)] == ["used"]
    with pytest.raises(ValueError, match="Did you mean 'gain'"):
        choose_layers(layers, 100, "gains")  # type: ignore[arg-type]
