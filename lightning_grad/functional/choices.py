"""Check arguments that take one of several strings."""

import difflib
from collections.abc import Iterable
from typing import Any


def check_choice(value: Any, choices: Iterable[str], parameter: str) -> None:
    """Raise unless a value is one of the choices, and suggest the closest one.

    Raises:
        ValueError: If the value is not one of the choices.

    Example:
        >>> check_choice("sr-st", ["ste", "sr-ste"], "recipe")
        Traceback (most recent call last):
        ValueError: recipe must be 'ste' or 'sr-ste'; got 'sr-st'. Did you mean 'sr-ste'?
    """
    known = list(choices)
    if value in known:
        return
    near = difflib.get_close_matches(str(value), known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    *others, last = map(repr, known)
    listed = f"{', '.join(others)} or {last}" if others else last
    raise ValueError(f"{parameter} must be {listed}; got {value!r}.{hint}")


def hint_for(name: str, known: Iterable[str]) -> str:
    """Return a question with a similar name and a leading space, or an empty string."""
    by_lower = {each.lower(): each for each in known}
    similar = difflib.get_close_matches(name.lower(), by_lower, n=1)
    return f" Did you mean {by_lower[similar[0]]!r}?" if similar else ""
