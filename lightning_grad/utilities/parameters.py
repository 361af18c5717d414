"""Choosing parameters by name, as users write names: with wildcards, and without torch.compile's prefix."""

import difflib
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase

from torch import nn

from lightning_grad.utilities.reporting import listed


def clean_name(name: str) -> str:
    """Return a parameter's name without the prefix that ``torch.compile`` puts before a wrapped module's.

    Example:
        >>> clean_name("net._orig_mod.0.weight")
        'net.0.weight'
    """
    return name.replace("_orig_mod.", "").removesuffix("_orig_mod").removesuffix(".")


def as_names(names: Sequence[str] | None) -> list[str] | None:
    """Return name patterns as a list of their own."""
    return None if names is None else list(names)


def matches(name: str | Iterable[str], patterns: Iterable[str]) -> bool:
    """Return whether one of the patterns selects a parameter.

    A pattern names the parameter or a module; a module stands for everything below it. ``*`` stands for any characters,
    dots too.

    Args:
        name: Name of the parameter, or all its names where it is tied.
        patterns: Names or wildcards.

    Example:
        >>> matches("encoder.0.linear.weight", ["encoder.*.linear"])
        True
        >>> matches("encoder.0.linear.weight", ["encoder"])
        True
        >>> matches("head.weight", ["encoder.*"])
        False
    """
    wanted = [clean_name(pattern) for pattern in patterns]
    names = [name] if isinstance(name, str) else name
    levels = [level for one in names for level in _levels(clean_name(one))]
    return any(fnmatchcase(level, pattern) for level in levels for pattern in wanted)


def selects(name: str | Iterable[str], include: Iterable[str] | None, exclude: Iterable[str] | None = None) -> bool:
    """Return whether include (``None``: everything) selects a parameter, and exclude does not.

    Example:
        >>> selects("head.weight", None), selects("head.weight", ["head"], ["*.weight"]), selects("head.bias", ["body"])
        (True, False, False)
    """
    names = [name] if isinstance(name, str) else list(name)
    return (include is None or matches(names, include)) and not matches(names, exclude or ())


def is_spelled(name: str | Iterable[str], patterns: Iterable[str]) -> bool:
    """Return whether a pattern selects a parameter by the last part of its name too, and not only the modules above it.

    Example:
        >>> is_spelled("mix.w", ["mix.w"]), is_spelled("mix.w", ["*.w"]), is_spelled("mix.w", ["mix", "mix.*"])
        (True, True, False)
    """
    names = [clean_name(one) for one in ([name] if isinstance(name, str) else name)]
    spelled = [pattern for pattern in patterns if pattern.rpartition(".")[2] != "*"]
    return any(fnmatchcase(one, clean_name(pattern)) for one in names for pattern in spelled)


def _levels(name: str) -> list[str]:
    """Return a parameter's name and the names of all modules above it, the root apart."""
    parts = name.split(".")
    return [".".join(parts[:depth]) for depth in range(len(parts), 0, -1)]


def first_match(names: Iterable[str], patterns: Iterable[str]) -> str | None:
    """Return the first pattern that selects a parameter by any of its names, or ``None``.

    The order of the patterns decides, and not how precise they are or which of several names they match.

    Example:
        >>> first_match(["embed.weight", "head.weight"], ["encoder", "head", "*"])
        'head'
    """
    known = list(names)
    return next((pattern for pattern in patterns if matches(known, [pattern])), None)


def check_patterns(module: nn.Module, display_name: str, **patterns: Iterable[str] | None) -> None:
    """Raise for a name pattern that matches no parameter of a module, with the nearest names that exist.

    Args:
        module: The module.
        display_name: Who has the patterns, for the error.
        patterns: What the user wrote, by argument.

    Raises:
        ValueError: If a pattern matches no name.

    Example:
        >>> check_patterns(nn.ModuleDict({"body": nn.Linear(1, 1)}), "ZClip", include=["bodi"])
        Traceback (most recent call last):
        ValueError: ZClip(include=...): no parameter is named 'bodi', and no module. Did you mean 'body' or 'body.bias'?
    """
    known = [name for names in all_names(module).values() for name in names]
    for argument, given in patterns.items():
        for pattern in given or ():
            if not any(matches(name, [pattern]) for name in known):
                raise ValueError(
                    f"{display_name}({argument}=...): no parameter is named {pattern!r}, and no module. "
                    f"{_suggest(pattern, known)}"
                )


def _suggest(pattern: str, known: Sequence[str]) -> str:
    """Return the nearest names of modules and parameters, as a sentence."""
    plain = clean_name(pattern).rstrip("*").rstrip(".")  # a wildcard at the end would count as a difference
    choices = dict.fromkeys(level for name in known for level in reversed(_levels(name)))
    near = difflib.get_close_matches(plain, list(choices), n=3)
    if near:
        return f"Did you mean {' or '.join(map(repr, near))}?"
    return f"Some that exist: {', '.join(known[:3])}." if known else "The module has no parameter."


def why_none_left(module: nn.Module, include: Sequence[str] | None, exclude: Sequence[str]) -> str:
    """Return why name patterns leave no parameter of a module, and what there is to choose from, as sentences.

    Example:
        >>> why_none_left(nn.ModuleDict({"body": nn.Linear(1, 1), "head": nn.Linear(1, 1)}), ["head"], ["head"])
        "include and exclude leave none: include=['head'] selects head.weight, head.bias, and exclude=['head'] drops them. \
Include others, such as 'body', or exclude less."
    """
    known = list(all_names(module).values())
    if not known:
        return f"{type(module).__name__} has none. Build its layers in __init__ or in configure_model."
    if include is None:
        return f"exclude={list(exclude)} leaves none of {listed([names[0] for names in known])}. Exclude less."
    chosen = [names[0] for names in known if matches(names, include)]
    others = [names[0] for names in known if not matches(names, [*include, *exclude])]
    modules = dict.fromkeys(name.rpartition(".")[0].partition(".")[0] or name for name in others)
    such = f"Include others, such as {' or '.join(map(repr, list(modules)[:3]))}, or exclude" if modules else "Exclude"
    return (
        f"include and exclude leave none: include={list(include)} selects {listed(chosen)}, and exclude={list(exclude)} drops "
        f"them. {such} less."
    )


def all_names(module: nn.Module) -> dict[int, list[str]]:
    """Return, by identity of the parameter, every name under which each parameter of a module is known.

    Example:
        >>> module = nn.ModuleDict({"embed": nn.Embedding(3, 2), "head": nn.Linear(2, 3, bias=False)})
        >>> module["head"].weight = module["embed"].weight
        >>> list(all_names(module).values())
        [['embed.weight', 'head.weight']]
    """
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        known = names.setdefault(id(parameter), [])
        if clean_name(name) not in known:
            known.append(clean_name(name))
    return names


def named_owners(module: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield (full name, owning module, attribute) of every parameter; one that is tied comes once for each owner."""
    for prefix, owner in module.named_modules():
        for attribute, parameter in owner._parameters.items():  # named_parameters drops a second name of the same one
            if parameter is not None:
                yield f"{prefix}.{attribute}" if prefix else attribute, owner, attribute
