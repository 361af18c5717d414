"""The check of arguments that take one of several words."""

import difflib
from collections.abc import Iterable
from typing import Any


def check_choice(value: Any, choices: Iterable[str], parameter: str) -> None:
    """Raise unless a value is one of the choices; a near miss is suggested.

    Raises:
        ValueError: If it is none.

    Example:
        >>> check_choice("sr-st", ["ste", "sr-ste"], "recipe")
        Traceback (most recent call last):
        ValueError: recipe='sr-st' is none of 'ste', 'sr-ste'. Did you mean 'sr-ste'?
    """
    known = list(choices)
    if value in known:
        return
    near = difflib.get_close_matches(str(value), known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{parameter}={value!r} is none of {', '.join(map(repr, known))}.{hint}")
