"""The exported techniques, and what their classes say about them.

The description of a technique is the first line of its docstring, its family is the folder of its module, and its
arguments are those of its constructor. The documentation is written from the same functions.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lightning_grad import callbacks, strategies
from lightning_grad.core.compatibility import TITLES
from lightning_grad.functional.choices import hint_for

SAID = dict.fromkeys(("fsdp2", "fsdp1", "deepspeed"), "the strategy") | {
    "several_optimizers": "manual optimization",
    "complex_parameters": "a complex parameter",
}
"""What notes say in place of a feature. The same words for several features make equal notes, which are shown once."""

VALUES = {"late_gradients": "DGCStrategy", "local_steps": "DiLoCoStrategy"}
"""What notes say in place of a part of the finding in a run."""


def techniques() -> dict[str, list[type[Any]]]:
    """Return the exported techniques of each family, sorted by family, members in the order of ``__all__``."""
    exported = [getattr(package, name) for package in (callbacks, strategies) for name in package.__all__]
    families: dict[str, list[type[Any]]] = {}
    for technique in exported:
        if not inspect.isabstract(technique):
            families.setdefault(family_of(technique), []).append(technique)
    return dict(sorted(families.items()))


def technique_named(name: str) -> type[Any]:
    """Return a technique.

    Raises:
        ValueError: If no technique has this name; the message suggests a similar one.
    """
    known = {technique.__name__: technique for members in techniques().values() for technique in members}
    if name not in known:
        raise ValueError(
            f"there is no technique {name!r}.{hint_for(name, known)} `lightning-grad list` prints all names."
        )
    return known[name]


def family_of(technique: type[Any]) -> str:
    """Return the name of the family, as in the folders of docs, examples and functions."""
    parts = technique.__module__.split(".")
    return parts[2] if parts[1] == "callbacks" else "communication"


def package_of(technique: type[Any]) -> str:
    """Return the package from which users import a technique."""
    return ".".join(technique.__module__.split(".")[:2])


def is_strategy(technique: type[Any]) -> bool:
    """Return True for a strategy, False for a callback."""
    return package_of(technique) == strategies.__name__


def summary_of(technique: type[Any]) -> str:
    """Return the first sentence of the docstring, without its full stop."""
    first = (inspect.getdoc(technique) or "").partition("\n\n")[0]
    return " ".join(first.split()).removesuffix(".")


@dataclass(frozen=True)
class Argument:
    """An argument of a technique's constructor.

    Args:
        name: Its name.
        kind: Its type, in words.
        help: The first sentence of its description.
        default: Its default, or ``inspect.Parameter.empty``.
    """

    name: str
    kind: str
    help: str
    default: Any

    @property
    def is_required(self) -> bool:
        """Whether it has no default."""
        return self.default is inspect.Parameter.empty


def arguments_of(technique: type[Any]) -> Iterator[Argument]:
    """Yield the arguments of a technique."""
    help_of = dict(_helps(inspect.getdoc(technique) or ""))
    for name, parameter in inspect.signature(technique).parameters.items():
        kind = re.sub(r"\b(typing|collections\.abc)\.", "", inspect.formatannotation(parameter.annotation))
        yield Argument(name, kind, help_of[name], parameter.default)


def _helps(docstring: str) -> Iterator[tuple[str, str]]:
    r"""Yield (name, first sentence) of each argument in the section Args of a docstring.

    Example:
        >>> dict(_helps("Do it.\n\nArgs:\n    a, b: One. More.\n    c: Another\n        line.\n\nRaises:\n    None."))
        {'a': 'One.', 'b': 'One.', 'c': 'Another line.'}
    """
    section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", docstring, re.MULTILINE | re.DOTALL)
    for names, text in re.findall(r"^ {4}(\w[\w, ]*): (.*?)(?=^ {4}\w|\Z)", section[1] if section else "", re.M | re.S):
        first = re.match(r".*?\.(?= |$)|.*", " ".join(text.split()))
        for name in names.split(", "):
            yield name, first[0] if first else ""


def yaml_example(technique: type[Any]) -> str:
    """Return the YAML of the docstring's example, without indentation."""
    found = re.search(r"^( *)\.\. code-block:: yaml\n\n((?:\1 +.*\n|\n)+)", f"{inspect.getdoc(technique)}\n", re.M)
    return inspect.cleandoc(f"\n{found[2]}") if found else ""


def works_with(technique: type[Any]) -> Iterator[str]:
    """Yield a line for each kind of compatibility answer of a technique."""
    answers = technique.compatibility.answers
    for works, words in {"yes": "Yes", "stand-in": "Tested with a stand-in only", "no": "Raises"}.items():
        names = [TITLES[name] for name, answer in answers.items() if answer.works == works]
        if names:
            yield f"{words}: {', '.join(names)}."


def as_text(text: str) -> str:
    """Return a line of a docstring for a terminal, without markup.

    Example:
        >>> as_text("Set ``a`` of :class:`~torch.nn.Linear`, not `b`.")
        'Set a of Linear, not b.'
    """
    return re.sub(r":\w+:`[~.\w]*?(\w+)`", r"\1", text).replace("`", "")
