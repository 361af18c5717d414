"""Random streams, the global ones and those that objects hold, are put back, seeded and found."""

import functools
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lightning_grad.data.random_streams import (
    generators_kept,
    holds_generators,
    random_streams_kept,
    seed_generators,
)

MAKERS: dict[str, Any] = {
    "torch": lambda: torch.Generator().manual_seed(1),
    "numpy": lambda: np.random.default_rng(2),
    "another of numpy": lambda: np.random.Generator(np.random.MT19937(2)),
    "old numpy": lambda: np.random.RandomState(3),
    "python": lambda: random.Random(4),
}


def drawn(generator: Any) -> float:
    if isinstance(generator, torch.Generator):
        return float(torch.rand((), generator=generator))
    return float(generator.random_sample() if isinstance(generator, np.random.RandomState) else generator.random())


def closure(generator: Any) -> Any:
    def noise() -> float:
        return drawn(generator)

    return noise


def default(generator: Any) -> Any:
    def noise(given: Any = generator) -> float:
        return drawn(given)

    return noise


class Noise:
    def __init__(self, generator: Any) -> None:
        self.generator = generator

    def draw(self) -> float:
        return drawn(self.generator)


HOLDERS: dict[str, Any] = {
    "itself": lambda g: g,
    "an attribute": lambda g: SimpleNamespace(generator=g),
    "a list of transforms": lambda g: SimpleNamespace(transforms=[SimpleNamespace(rng=g)]),
    "a closure": closure,
    "a default": default,
    "a partial": lambda g: functools.partial(drawn, g),
    "a partial by name": lambda g: functools.partial(drawn, generator=g),
    "a method": lambda g: Noise(g).draw,
}


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("holder", HOLDERS)
def test_generators_are_found_kept_and_seeded(kind: str, holder: str) -> None:
    generator = MAKERS[kind]()
    held = HOLDERS[holder](generator)
    assert holds_generators(held)
    with generators_kept(held):
        first = drawn(generator)
        seed_generators(held, 9)
        nine = drawn(generator)
        seed_generators(held, 9)
        assert drawn(generator) == nine
        seed_generators(held, 8)
        assert drawn(generator) != nine
    assert drawn(generator) == first == drawn(MAKERS[kind]())


@pytest.mark.parametrize("holder", [None, 3, "text", [1, 2], drawn, torch.zeros(3), random, SimpleNamespace(a=1)])
def test_what_has_none_has_none(holder: Any) -> None:
    assert not holds_generators(holder)


def test_the_global_streams_are_put_back() -> None:
    def numbers() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(()))]

    with random_streams_kept():
        first = numbers()
    with pytest.raises(ZeroDivisionError), random_streams_kept():
        sum(numbers()) / 0
    assert numbers() == first
