"""Check constructor arguments against their annotations, and settings against a checkpoint's.

The annotation gives the type of an argument: ``seed: int`` rejects ``1.5``, ``True`` and ``"0"``. Constructors check
ranges with the functions of ``utilities.checks``.
"""

import functools
import inspect
import math
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin

from lightning.pytorch.utilities import rank_zero_info

from lightning_grad.utilities.checks import check_choice

_SWITCHES = ("true", "false", "yes", "no", "on", "off")
_PLURALS = {"an integer": "integers", "a number": "numbers", "a string": "strings", "True or False": "booleans"}


class CheckedArguments:
    """Base class that checks constructor arguments against their annotations before the constructor runs.

    It supports ``bool``, ``int``, ``float``, ``str``, ``None``, ``Literal``, ``Sequence``, ``Mapping``, ``tuple``,
    ``Callable``, unions of these, and classes. Annotations that cannot be evaluated are not checked.

    Example:
        >>> class Halving(CheckedArguments):
        ...     def __init__(self, every: int = 2) -> None:
        ...         self.every = every
        >>> Halving(every="2")
        Traceback (most recent call last):
        TypeError: every must be an integer; got '2'. In YAML, write 2 without quotes.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in cls.__dict__:
            cls.__init__ = _with_checks(cls.__dict__["__init__"])  # type: ignore[method-assign]


def _with_checks(constructor: Callable[..., None]) -> Callable[..., None]:
    """Wrap a constructor to check its arguments first."""
    signature = inspect.signature(constructor)

    @functools.wraps(constructor)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            given = signature.bind(self, *args, **kwargs).arguments
        except TypeError:
            given = {}  # the call below raises Python's own error
        kinds = _kinds_of(constructor)
        for name, value in given.items():
            if name in kinds:
                check_kind(value, kinds[name], name)
        constructor(self, *args, **kwargs)

    return checked


@functools.cache
def _kinds_of(constructor: Callable[..., None]) -> Mapping[str, Any]:
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    named = {p.name for p in inspect.signature(constructor).parameters.values() if p.kind not in variadic}
    try:
        hints = typing.get_type_hints(constructor)
    except NameError:  # an annotation that is imported under TYPE_CHECKING only
        return {}
    return {name: kind for name, kind in hints.items() if name in named}


def check_kind(value: Any, kind: Any, parameter: str) -> None:
    """Raise unless a value matches an annotation.

    Args:
        value: The value of the argument.
        kind: The evaluated annotation.
        parameter: Name of the argument for the error message.

    Raises:
        TypeError: If the value has another type.
        ValueError: If it is NaN, or a string that is not among the choices of a ``Literal``.

    Example:
        >>> from collections.abc import Sequence
        >>> check_kind("encoder", Sequence[str] | None, "include")
        Traceback (most recent call last):
        TypeError: include must be a list of strings or None; got 'encoder'. Write ['encoder'].
        >>> check_kind(float("nan"), float, "eps")
        Traceback (most recent call last):
        ValueError: eps must be a number; got nan.
    """
    if _fits(value, kind):
        return
    members = _members(kind)
    choices = [choice for member in members if get_origin(member) is Literal for choice in get_args(member)]
    if isinstance(value, str) and choices:
        check_choice(value, choices, parameter)
    described = _joined([_describe(member) for member in members])
    error = ValueError if isinstance(value, float) and math.isnan(value) else TypeError
    raise error(f"{parameter} must be {described}; got {value!r}.{_hint(value, kind)}")


def _members(kind: Any) -> list[Any]:
    return list(get_args(kind)) if get_origin(kind) in (Union, types.UnionType) else [kind]


def _fits(value: Any, kind: Any) -> bool:
    """Return True if a value matches an annotation."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in parts)
    if origin is Callable:
        return callable(value)
    if origin is tuple:
        is_row = _is_list(value) and len(value) == len(parts)
        return is_row and all(_fits(item, part) for item, part in zip(value, parts, strict=True))
    if origin is Sequence:
        return _is_list(value) and all(_fits(item, parts[0]) for item in value)
    if origin is Mapping:
        is_mapping = isinstance(value, Mapping)
        return is_mapping and all(_fits(key, parts[0]) and _fits(item, parts[1]) for key, item in value.items())
    return _is_a(value, kind)


def _is_a(value: Any, kind: Any) -> bool:
    if kind is float:  # accepts integers, as type checkers do, but not booleans
        return _is_real(value)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return kind is Any or not isinstance(kind, type) or isinstance(value, kind)


def _is_real(value: Any) -> bool:
    if isinstance(value, float):
        return not math.isnan(value)
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _describe(kind: Any) -> str:
    """Describe an annotation in words for an error message."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, parts))
    if origin is Callable:
        return "a function"
    if origin is tuple:
        return "[" + ", ".join(map(_describe, parts)) + "]"
    if origin is Sequence:
        return f"a list of {_plural(parts[0])}"
    if origin is Mapping:
        return f"a mapping from {_plural(parts[0])} to {_plural(parts[1])}"
    named = {float: "a number", int: "an integer", str: "a string", bool: "True or False", type(None): "None"}
    return named.get(kind, f"a {getattr(kind, '__name__', kind)}")


def _plural(kind: Any) -> str:
    singular = _describe(kind)
    return _PLURALS.get(singular, singular)


def _joined(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _hint(value: Any, kind: Any) -> str:
    """Return advice for a value of the wrong type, or an empty string."""
    members = _members(kind)
    lists = [member for member in members if get_origin(member) is Sequence]
    if isinstance(value, Mapping) or _is_list(value):
        kind_of = Mapping if isinstance(value, Mapping) else Sequence
        wanted = [get_args(member)[-1] for member in members if get_origin(member) is kind_of]
        items = list(value.values()) if isinstance(value, Mapping) else value
        return next((_hint(item, part) for part in wanted for item in items if not _fits(item, part)), "")
    if isinstance(value, str) and any(member in (int, float, bool) for member in members):
        return _hint_for_text(value)
    if isinstance(value, str) and lists:
        return f" Write [{value!r}]."
    if isinstance(value, (bool, int, float)) and str in members:
        return " In YAML, write it in quotes."
    return ""


def _hint_for_text(value: str) -> str:
    """Return how to write a number or boolean in YAML; some parsers read 1e-3, without a point, as a string."""
    if value.strip().lower() in _SWITCHES:
        return " In YAML, write it without quotes."
    try:
        number = float(value)
    except ValueError:
        return ""
    if not math.isfinite(number):
        return " In YAML, write .inf without quotes." if number > 0 else ""
    mantissa, mark, exponent = repr(int(value) if value.strip().isdecimal() else number).partition("e")
    point = ".0" if mark and "." not in mantissa else ""
    return f" In YAML, write {mantissa}{point}{mark}{exponent} without quotes."


def plain(value: Any) -> Any:
    """Convert a setting to types that checkpoints can store: numbers, strings, booleans, lists and dicts.

    Functions become their dotted path. Other objects become their ``repr`` without the memory address, which differs
    between processes.

    Example:
        >>> plain({"sizes": (1, 2), "score_fn": len})
        {'sizes': [1, 2], 'score_fn': 'builtins.len'}
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (int, float)):
        return (
            int(value) if isinstance(value, int) else float(value)
        )  # numpy's subclasses fail to load with weights_only
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if _is_list(value):
        return [plain(item) for item in value]
    if hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def changed_settings(saved: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """Return the names of settings that differ from a checkpoint; settings missing from it are not compared.

    Args:
        saved: Settings in the checkpoint, converted by :func:`plain`.
        settings: Current settings.

    Example:
        >>> changed_settings({"ratio": 0.1, "sizes": [1, 2]}, {"ratio": 0.01, "sizes": (1, 2), "seed": 0})
        ['ratio']
    """
    return [name for name, value in settings.items() if name in saved and saved[name] != plain(value)]


def follow_settings(
    display_name: str, saved: Mapping[str, Any], settings: Mapping[str, Any], fixed: Mapping[str, str]
) -> None:
    """Compare settings with the checkpoint that a run resumes from, and print the changes.

    Args:
        display_name: Name of the technique for messages.
        saved: Settings in the checkpoint, converted by :func:`plain`; missing ones are not compared.
        settings: Current settings.
        fixed: Settings that cannot change in a run, with the reason: a clause after "because".

    Raises:
        ValueError: If a fixed setting changed.

    Example:
        >>> follow_settings("AutoClip", {"window": 9}, {"window": 5}, {"window": "its history has that length"})
        Traceback (most recent call last):
        ValueError: AutoClip cannot resume with window=5: the checkpoint was written with window=9, and it cannot change \
because its history has that length. Set window=9, or start a new fit without ckpt_path.
    """
    changed = changed_settings(saved, settings)
    now = {name: plain(settings[name]) for name in changed}
    for name in changed:
        if name in fixed:
            raise ValueError(
                f"{display_name} cannot resume with {name}={now[name]!r}: the checkpoint was written with "
                f"{name}={saved[name]!r}, and it cannot change because {fixed[name]}. Set {name}={saved[name]!r}, or "
                "start a new fit without ckpt_path."
            )
    if changed:
        said = ", ".join(f"{name}={now[name]!r} (was {saved[name]!r})" for name in changed)
        rank_zero_info(f"{display_name} resumes with changed settings: {said}.")
