"""Restore random states after reading data or running a module: global generators, and those that user code owns.

A user's generator may be an attribute, a variable of a closure, an argument of a partial, or a global of its module.
"""

import copy
import functools
import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch

GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_FEW = 100  # longest list that is searched: it may contain data sets or transforms, longer ones contain samples


def random_states() -> tuple[Any, ...]:
    """Return the states of the global generators of Python, numpy and torch (CPU, and CUDA if it is initialized)."""
    started = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    cuda = torch.cuda.get_rng_state_all() if started else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def set_random_states(states: tuple[Any, ...]) -> None:
    """Set the states of the global generators to those returned by :func:`random_states`."""
    python, numpy, cpu, cuda = states
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state_all(cuda)


@contextmanager
def random_streams_kept() -> Iterator[None]:
    """Restore the random states of Python, numpy and torch (CPU and CUDA) when the context exits."""
    states = random_states()
    try:
        yield
    finally:
        set_random_states(states)


def seed_streams(seed: int) -> None:
    """Seed the global generators whose states :func:`random_streams_kept` restores."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        # torch.manual_seed would also store a seed for a CUDA that is initialized later.
        torch.cuda.manual_seed_all(seed)


@contextmanager
def generators_kept(holder: Any) -> Iterator[None]:
    """Restore the states of all random generators found inside a data set or a function."""
    states = [(generator, state_of_generator(generator)) for generator in _generators_of(holder)]
    try:
        yield
    finally:
        for generator, state in states:
            set_generator(generator, state)


@contextmanager
def numbers_kept(function: Any) -> Iterator[None]:
    """Restore numeric attributes of a function object, such as a ``collate_fn`` that counts its calls."""
    attributes = getattr(function, "__dict__", {})
    before = {name: value for name, value in attributes.items() if type(value) in (bool, int, float)}
    try:
        yield
    finally:
        attributes.update(before)


def named_generators(kinds: Iterable[type]) -> list[Any]:
    """Return the module-level random generators that methods of some classes refer to."""
    found = [generator for kind in dict.fromkeys(kinds) for generator in _named_by_class(kind)]
    return list({id(generator): generator for generator in found}.values())


def holds_generators(holder: Any) -> bool:
    """Return True if an object or a function contains random generators."""
    return next(_generators_of(holder), None) is not None


def seed_generators(holder: Any, seed: int, depth: int = 4) -> None:
    """Seed the random generators inside an object or a function.

    Args:
        holder: The object or function.
        seed: The seed.
        depth: Depth of the search; 1 searches only its own attributes.
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
    """Set the state of one of :data:`GENERATORS`."""
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
    """Return the objects inside a holder in which user code may keep a generator."""
    if isinstance(holder, (list, tuple)):
        return list(holder) if len(holder) <= _FEW else []
    if isinstance(holder, functools.partial):
        return [holder.func, *holder.args, *holder.keywords.values()]
    if isinstance(holder, MethodType):
        return [holder.__self__]
    if isinstance(holder, FunctionType):
        cells = [cell.cell_contents for cell in holder.__closure__ or () if cell != CellType()]
        return [*cells, *(holder.__defaults__ or ()), *_named_by_function(holder)]
    if hasattr(holder, "__dict__") and not isinstance(holder, (type, ModuleType)):
        return [*vars(holder).values(), *_named_by_class(type(holder))]
    return []


def _named_by_class(kind: type) -> list[Any]:
    # Look names up again each time: a notebook cell that runs again rebinds them.
    found = [namespace.get(name) for namespace, name in _places_of(kind)]
    return [value for value in found if isinstance(value, GENERATORS)]


@functools.cache
def _places_of(kind: type) -> tuple[tuple[Mapping[str, Any], str], ...]:
    """Return (namespace, name) of all generators that a class and its methods refer to."""
    members = [(vars(cls), name) for cls in kind.__mro__ for name in vars(cls)]
    values = [namespace[name] for namespace, name in members]
    functions = [value.__func__ if isinstance(value, (staticmethod, classmethod)) else value for value in values]
    named = [(f.__globals__, name) for f in functions if isinstance(f, FunctionType) for name in _names_in(f.__code__)]
    return tuple(place for place in (*members, *named) if isinstance(place[0].get(place[1]), GENERATORS))


def _named_by_function(function: FunctionType) -> list[Any]:
    found = [function.__globals__.get(name) for name in _names_in(function.__code__)]
    return [value for value in found if isinstance(value, GENERATORS)]


def _names_in(code: CodeType) -> set[str]:
    inner = [_names_in(part) for part in code.co_consts if isinstance(part, CodeType)]
    return set(code.co_names).union(*inner)
