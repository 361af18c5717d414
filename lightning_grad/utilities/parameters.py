"""Choosing parameters by name, as users write names: with wildcards, and without torch.compile's prefix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase

from torch import nn


def clean_name(name: str) -> str:
    """Return a parameter's name without the prefix that ``torch.compile`` puts before a wrapped module's.

    Example:
        >>> clean_name("net._orig_mod.0.weight")
        'net.0.weight'
    """
    return name.replace("_orig_mod.", "").removesuffix("_orig_mod").removesuffix(".")


def as_names(names: Sequence[str] | None, parameter: str) -> list[str] | None:
    """Return a list of name patterns in plain types.

    Raises:
        TypeError: If it is one text and no list.
    """
    if isinstance(names, str):
        raise TypeError(f"{parameter} is a list of names; got {names!r}. Write [{names!r}].")
    return None if names is None else list(names)


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Say whether a parameter is meant by one of the patterns.

    A pattern names the parameter or its module; ``*`` stands for any characters, dots too.

    Example:
        >>> matches("encoder.0.linear.weight", ["encoder.*.linear"])
        True
        >>> matches("head.weight", ["encoder.*"])
        False
    """
    name = clean_name(name)
    module = name.rpartition(".")[0]
    return any(fnmatchcase(name, pattern) or fnmatchcase(module, pattern) for pattern in patterns)


def check_patterns(patterns: Sequence[str], names: Sequence[str], parameter: str) -> None:
    """Raise for a pattern that names nothing, with the nearest names that exist.

    Args:
        patterns: What the user wrote.
        names: Names of all parameters of the module.
        parameter: Name of the argument, for the error.

    Raises:
        ValueError: If a pattern matches no name.
    """
    known = [clean_name(name) for name in names]
    for pattern in patterns:
        if not any(matches(name, [pattern]) for name in known):
            modules = {name.rpartition(".")[0] for name in known} - {""}
            near = difflib.get_close_matches(pattern, [*known, *sorted(modules)], n=3, cutoff=0.4) or known[:3]
            raise ValueError(f"{parameter}: no parameter is named {pattern!r}. Near to it: {', '.join(near)}.")


def named_owners(module: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield (full name, owning module, attribute) of every parameter; one that is tied comes once for each owner."""
    for prefix, owner in module.named_modules():
        for attribute, parameter in owner.named_parameters(recurse=False):
            if parameter is not None:
                yield f"{prefix}.{attribute}" if prefix else attribute, owner, attribute


def shared_names(module: nn.Module) -> dict[int, list[str]]:
    """Return, by identity of the parameter, the names under which each parameter that is tied is registered."""
    names: dict[int, list[str]] = {}
    for name, owner, attribute in named_owners(module):
        names.setdefault(id(owner._parameters[attribute]), []).append(name)
    return {key: value for key, value in names.items() if len(value) > 1}
