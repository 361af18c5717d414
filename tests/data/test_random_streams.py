"""Random streams, the global ones and those that objects hold, are put back, seeded and found."""

import functools
import random
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lightning_grad.data.random_streams import (
    generators_kept,
    holds_generators,
    named_generators,
    numbers_kept,
    random_streams_kept,
    seed_generators,
)
from tests.cases import cases

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


@cases("kind", MAKERS)
@cases("holder", HOLDERS)
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


AT_THE_TOP: Any = None


def names_it() -> float:
    return sum(drawn(AT_THE_TOP) for _ in range(1))


class NamesIt:
    def draw(self) -> float:
        return drawn(AT_THE_TOP)


class InheritsIt(NamesIt):
    pass


class StaticallyNamesIt:
    @staticmethod
    def draw() -> float:
        return drawn(AT_THE_TOP)


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("holder", [names_it, InheritsIt(), StaticallyNamesIt(), [NamesIt().draw]])
def test_generators_at_the_top_of_a_file_are_found(kind: str, holder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):  # bound anew, as by a notebook
        monkeypatch.setattr(sys.modules[__name__], "AT_THE_TOP", MAKERS[kind]())
        with generators_kept(holder):
            first = drawn(AT_THE_TOP)
        assert holds_generators(holder)
        assert drawn(AT_THE_TOP) == first


def test_generators_of_classes_are_each_given_once(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = random.Random(1)
    monkeypatch.setattr(sys.modules[__name__], "AT_THE_TOP", generator)

    class Owner:
        rng = np.random.default_rng(1)

    assert named_generators([NamesIt, InheritsIt, Owner, Noise]) == [generator, Owner.rng]


def test_what_a_function_object_counts_is_kept() -> None:
    counts = SimpleNamespace(calls=1, size=0.5, cache=[], none=None)
    with numbers_kept(counts):
        counts.calls, counts.size, counts.none = 9, 9.5, "loaded"
        counts.cache.append(1)
    assert vars(counts) == {"calls": 1, "size": 0.5, "cache": [1], "none": "loaded"}
    with numbers_kept(len):
        pass
