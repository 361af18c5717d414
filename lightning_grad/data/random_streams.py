"""Putting random streams back after data was read or a module was run: the global ones, and those that objects hold."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch

GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_FEW = 100  # data sets or transforms in a list; the samples themselves are more


@contextmanager
def random_streams_kept() -> Iterator[None]:
    """Put back the states of the global generators of Python, numpy and torch, on the CPU and on CUDA."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    started = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    cuda = torch.cuda.get_rng_state_all() if started else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


def seed_streams(seed: int) -> None:
    """Seed the global generators whose states :func:`random_streams_kept` puts back."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        # torch.manual_seed would also leave a seed behind for a CUDA that is initialized later.
        torch.cuda.manual_seed_all(seed)


@contextmanager
def generators_kept(holder: Any) -> Iterator[None]:
    """Put back the state of random generators that a data set or a function, or what it is made of, has of its own."""
    states = [(generator, state_of_generator(generator)) for generator in _generators_of(holder)]
    try:
        yield
    finally:
        for generator, state in states:
            set_generator(generator, state)


def holds_generators(holder: Any) -> bool:
    """Return whether an object or a function has random generators of its own."""
    return next(_generators_of(holder), None) is not None


def seed_generators(holder: Any, seed: int, depth: int = 4) -> None:
    """Seed the random generators that an object or a function has of its own.

    Args:
        holder: The object or function.
        seed: The seed.
        depth: How far to look: 1 for its own attributes only.
    """
    for generator in _generators_of(holder, depth):
        if isinstance(generator, torch.Generator):
            generator.manual_seed(seed)
        elif isinstance(generator, np.random.Generator):
            generator.bit_generator.state = type(generator.bit_generator)(seed).state
        else:
            generator.seed(seed)


def state_of_generator(generator: Any) -> Any:
    """Return a copy of the state of one of :data:`GENERATORS`."""
    if isinstance(generator, np.random.Generator):
        return copy.deepcopy(generator.bit_generator.state)
    return generator.getstate() if isinstance(generator, random.Random) else generator.get_state()


def set_generator(generator: Any, state: Any) -> None:
    """Put a generator back into a state."""
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)


def _generators_of(holder: Any, depth: int = 4) -> Iterator[Any]:
    if isinstance(holder, GENERATORS):
        yield holder
    elif depth:
        for part in _parts_of(holder):
            yield from _generators_of(part, depth - 1)


def _parts_of(holder: Any) -> list[Any]:
    if isinstance(holder, (list, tuple)):
        return list(holder) if len(holder) <= _FEW else []
    if isinstance(holder, functools.partial):
        return [holder.func, *holder.args, *holder.keywords.values()]
    if isinstance(holder, MethodType):
        return [holder.__self__]
    if isinstance(holder, FunctionType):
        cells = [cell.cell_contents for cell in holder.__closure__ or () if cell != CellType()]
        return [*cells, *(holder.__defaults__ or ())]
    if hasattr(holder, "__dict__") and not isinstance(holder, (type, ModuleType)):
        return list(vars(holder).values())
    return []
