"""Select parameters by name patterns, with wildcards and without the prefix of torch.compile."""

import difflib
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase

from torch import nn

from lightning_grad.utilities.reporting import listed


def clean_name(name: str) -> str:
    """Return a parameter's name without the prefix that ``torch.compile`` adds for a wrapped module.

    Example:
        >>> clean_name("net._orig_mod.0.weight")
        'net.0.weight'
    """
    return name.replace("_orig_mod.", "").removesuffix("_orig_mod").removesuffix(".")


def as_names(names: Sequence[str] | None) -> list[str] | None:
    """Copy name patterns into a list."""
    return None if names is None else list(names)


def matches(name: str | Iterable[str], patterns: Iterable[str]) -> bool:
    """Return True if one of the patterns selects a parameter.

    A pattern is the name of a parameter or of a module, which selects all parameters below it. ``*`` matches any
    characters, including dots.

    Args:
        name: Name of the parameter, or all its names if it is tied.
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
    """Return True if ``include`` (``None``: everything) selects a parameter and ``exclude`` does not.

    Example:
        >>> selects("head.weight", None), selects("head.weight", ["head"], ["*.weight"]), selects("head.bias", ["body"])
        (True, False, False)
    """
    names = [name] if isinstance(name, str) else list(name)
    return (include is None or matches(names, include)) and not matches(names, exclude or ())


def is_spelled(name: str | Iterable[str], patterns: Iterable[str]) -> bool:
    """Return True if a pattern matches the full name of a parameter, and not only a module above it.

    Example:
        >>> is_spelled("mix.w", ["mix.w"]), is_spelled("mix.w", ["*.w"]), is_spelled("mix.w", ["mix", "mix.*"])
        (True, True, False)
    """
    names = [clean_name(one) for one in ([name] if isinstance(name, str) else name)]
    spelled = [pattern for pattern in patterns if pattern.rpartition(".")[2] != "*"]
    return any(fnmatchcase(one, clean_name(pattern)) for one in names for pattern in spelled)


def _levels(name: str) -> list[str]:
    """Return a parameter's name and the names of all modules above it, except the root."""
    parts = name.split(".")
    return [".".join(parts[:depth]) for depth in range(len(parts), 0, -1)]


def first_match(names: Iterable[str], patterns: Iterable[str]) -> str | None:
    """Return the first pattern that selects a parameter by any of its names, or ``None``.

    Only the order of the patterns counts, not how specific they are or which of several names they match.

    Example:
        >>> first_match(["embed.weight", "head.weight"], ["encoder", "head", "*"])
        'head'
    """
    known = list(names)
    return next((pattern for pattern in patterns if matches(known, [pattern])), None)


def check_patterns(module: nn.Module, display_name: str, **patterns: Iterable[str] | None) -> None:
    """Raise if a name pattern matches no parameter of a module, and suggest similar names.

    Args:
        module: The module.
        display_name: Name of the technique for the error message.
        patterns: Name patterns by argument.

    Raises:
        ValueError: If a pattern matches no name.

    Example:
        >>> check_patterns(nn.ModuleDict({"body": nn.Linear(1, 1)}), "ZClip", include=["bodi"])
        Traceback (most recent call last):
        ValueError: ZClip(include=...): no parameter or module is named 'bodi'. Did you mean 'body' or 'body.bias'?
    """
    known = [name for names in all_names(module).values() for name in names]
    for argument, given in patterns.items():
        for pattern in given or ():
            if not any(matches(name, [pattern]) for name in known):
                modules = {clean_name(name) for name, _ in module.named_modules()}
                found = f"module {pattern!r} has no parameters"
                found = found if pattern in modules else f"no parameter or module is named {pattern!r}"
                raise ValueError(f"{display_name}({argument}=...): {found}. {_suggest(pattern, known)}")


def _suggest(pattern: str, known: Sequence[str]) -> str:
    """Return a sentence with the most similar names of modules and parameters."""
    plain = clean_name(pattern).rstrip("*").rstrip(".")  # a trailing wildcard would count as a difference
    choices = dict.fromkeys(level for name in known for level in reversed(_levels(name)))
    near = difflib.get_close_matches(plain, list(choices), n=3)
    if near:
        return f"Did you mean {' or '.join(map(repr, near))}?"
    layers = dict.fromkeys(name.rpartition(".")[0] or name for name in known)
    return f"Names that exist: {listed(layers, most=8)}." if known else "The module has no parameters."


def why_none_left(module: nn.Module, include: Sequence[str] | None, exclude: Sequence[str]) -> str:
    """Explain in sentences why name patterns select no parameter of a module, and suggest others.

    Example:
        >>> why_none_left(nn.ModuleDict({"body": nn.Linear(1, 1), "head": nn.Linear(1, 1)}), ["head"], ["head"])
        "include=['head'] selects head.weight, head.bias, but exclude=['head'] excludes all of them. Include others, such \
as 'body', or exclude less."
    """
    known = list(all_names(module).values())
    if not known:
        return f"{type(module).__name__} has no parameters. Create its layers in __init__ or in configure_model."
    if include is None:
        return f"exclude={list(exclude)} excludes all of {listed([names[0] for names in known])}. Exclude less."
    chosen = [names[0] for names in known if matches(names, include)]
    others = [names[0] for names in known if not matches(names, [*include, *exclude])]
    modules = dict.fromkeys(name.rpartition(".")[0].partition(".")[0] or name for name in others)
    such = f"Include others, such as {' or '.join(map(repr, list(modules)[:3]))}, or exclude" if modules else "Exclude"
    return (
        f"include={list(include)} selects {listed(chosen)}, but exclude={list(exclude)} excludes all of them. "
        f"{such} less."
    )


def all_names(module: nn.Module) -> dict[int, list[str]]:
    """Return all names of each parameter of a module, by the id of the parameter.

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
    """Yield (full name, owning module, attribute) of every parameter; a tied parameter once per owner."""
    for prefix, owner in module.named_modules():
        for attribute, parameter in owner._parameters.items():  # named_parameters would drop second names
            if parameter is not None:
                yield f"{prefix}.{attribute}" if prefix else attribute, owner, attribute
