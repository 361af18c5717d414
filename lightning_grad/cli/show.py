"""``lightning-grad show NAME``: the arguments of a technique, what it works with, and how to use it."""

import argparse
import math
import shutil
import textwrap
from collections.abc import Iterator
from typing import Any

import yaml  # type: ignore[import-untyped]

from lightning_grad.cli.catalog import (
    SAID,
    VALUES,
    Argument,
    arguments_of,
    as_text,
    family_of,
    summary_of,
    technique_named,
    works_with,
    yaml_example,
)
from lightning_grad.core.compatibility import TITLES


def add_command(commands: Any) -> None:
    """Add the command to a parser."""
    parser = commands.add_parser(
        "show",
        help="show the arguments of a technique, what it works with, and how to use it",
        description="Show the arguments of a technique, what it works with, and how to use it.",
    )
    parser.add_argument("name", metavar="NAME", help="class of the technique, such as ZClip")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    technique = technique_named(arguments.name)
    width = min(shutil.get_terminal_size().columns, 120)
    print("\n".join(_pages(technique, width)))


def _pages(technique: type[Any], width: int) -> Iterator[str]:
    title = f"{technique.__name__} ({family_of(technique)}): {as_text(summary_of(technique))}."
    yield textwrap.fill(title, width)
    yield "\nArguments"
    for argument in arguments_of(technique):
        yield f"  {_signature(argument)}"
        yield textwrap.fill(as_text(argument.help), width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    yield "\nWorks with"
    for line in works_with(technique):
        yield textwrap.fill(as_text(line), width, initial_indent="  ", subsequent_indent="    ")
    for line in _reasons(technique):
        yield textwrap.fill(as_text(line), width, initial_indent="  - ", subsequent_indent="    ")
    example = yaml_example(technique)
    yield f"\nYAML of LightningCLI\n{textwrap.indent(example, '  ')}"
    yield f"\nPython\n{textwrap.indent(as_python(example), '  ')}"


def _signature(argument: Argument) -> str:
    default = "" if argument.is_required else f" = {_literal(argument.default)}"
    return f"{argument.name}: {argument.kind}{default}"


def _reasons(technique: type[Any]) -> Iterator[str]:
    """Yield why the technique raises an error with a feature, and what to do; features with the same words together."""
    reasons: dict[str, list[str]] = {}
    for name, answer in technique.compatibility.answers.items():
        if answer.is_no:
            words = answer.explained(SAID.get(name, TITLES[name]), VALUES.get(name, "..."))
            reasons.setdefault(words, []).append(TITLES[name])
    for words, titles in reasons.items():
        yield f"{', '.join(titles)}: {words}"


def as_python(text: str) -> str:
    """Return the Python code of a Trainer that a YAML of LightningCLI describes.

    Args:
        text: YAML with the key ``trainer``.

    Example:
        >>> print(as_python("trainer: {callbacks: [{class_path: a.b.C, init_args: {d: .inf}}]}"))
        from a.b import C
        from lightning.pytorch import Trainer
        <BLANKLINE>
        trainer = Trainer(callbacks=[C(d=float('inf'))])
    """
    imports = {"lightning.pytorch": {"Trainer"}}
    arguments = yaml.safe_load(text)["trainer"]
    call = ", ".join(f"{name}={_expression(value, imports)}" for name, value in arguments.items())
    lines = [f"from {package} import {', '.join(sorted(names))}" for package, names in sorted(imports.items())]
    return "\n".join([*lines, "", f"trainer = Trainer({call})"])


def _expression(value: Any, imports: dict[str, set[str]]) -> str:
    """Return the Python expression of a YAML value, and add the imports that it needs."""
    if isinstance(value, list):
        return f"[{', '.join(_expression(each, imports) for each in value)}]"
    if not isinstance(value, dict) or "class_path" not in value:
        return _literal(value)
    package, _, name = value["class_path"].rpartition(".")
    imports.setdefault(package, set()).add(name)
    arguments = value.get("init_args", {})
    return f"{name}({', '.join(f'{key}={_expression(each, imports)}' for key, each in arguments.items())})"


def _literal(value: Any) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return f"float('{value}')"
    return repr(value)
