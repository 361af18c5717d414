"""Cases that take less time than pytest needs for a test: they run within one, and each that fails is named."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import pytest


def cases(names: str | tuple[str, ...], values: Iterable[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that calls a test for each value, like ``pytest.mark.parametrize``, but within one test.

    All cases run. They share the fixtures of the test, so a case must not leave anything in them.

    Args:
        names: Names of the arguments, separated by commas if a string.
        values: Values of the argument, or tuples of values if there are several names; ``pytest.param`` gives them a name.
    """
    arguments = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
    rows = [_row(value, arguments) for value in values]
    if not rows:
        raise ValueError(f"{', '.join(arguments)}: no case.")

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def run(*args: Any, **kwargs: Any) -> None:
            failed = []
            for called, given in rows:
                try:
                    test(*args, **kwargs, **given)
                except (Exception, pytest.fail.Exception) as error:
                    error.add_note(f"Case: {called}")
                    failed.append(error)
            if failed:
                raise BaseExceptionGroup(f"{len(failed)} of {len(rows)} cases failed", failed)

        signature = inspect.signature(test)
        left = [parameter for name, parameter in signature.parameters.items() if name not in arguments]
        run.__signature__ = signature.replace(parameters=left)  # type: ignore[attr-defined]
        return run

    return decorate


def _row(value: Any, arguments: list[str]) -> tuple[str, dict[str, Any]]:
    """Return the name of a case, and its arguments."""
    called = None
    if isinstance(value, type(pytest.param())):
        called, value = value.id, value.values
    elif len(arguments) == 1:
        value = (value,)
    given = dict(zip(arguments, value, strict=True))
    described = (f"{name}={getattr(part, '__name__', None) or repr(part)[:200]}" for name, part in given.items())
    return called or ", ".join(described), given
