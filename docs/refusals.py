"""Collect the errors of the package for the tables of ``docs/troubleshooting.md``.

Refusals that a technique declares come from ``Compatibility``. All others are read from the code, where each is a sentence
about what was found, followed by what to do.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from exported import ROOT, all_techniques, title_of, write_table

from lightning_grad.core.compatibility import TITLES

# Heading by the place of an error; the first match counts. Errors elsewhere are for authors of techniques.
_PLACES = {
    "callbacks/": None,  # the family's title
    "strategies/": "communication",
    "core/samples/": "Training data",
    "core/subset.py": "Training data",
    "core/losses/": "Losses and scores of samples",
    "core/monitored.py": "Monitored metrics",
    "core/views/": "Weights",
    "core/weights.py": "Weights",
    "core/": "Optimizers, steps and the length of a run",
}
_AUTHORS = ("core/probe", "core/fit.py", "core/record.py")
_NAMES = re.compile(r"(^|\.)_?(display_name|needed_by|technique)$")
_ERRORS = ("ValueError", "TypeError", "RuntimeError", "FileNotFoundError")
_FEWEST_WORDS = 4  # shorter messages cannot be found by their words


def declared() -> Iterator[str]:
    """Yield the table of declared refusals; equal messages share a row."""
    found: dict[str, dict[str, dict[str, None]]] = {}
    for name, title in TITLES.items():
        for technique in all_techniques():
            answer = technique.compatibility.answers[name]
            if answer.is_no:
                message = answer.explained("...").removeprefix("It ")
                row = found.setdefault(message, {"has": {}, "raising": {}})
                row["has"][title] = row["raising"][f"`{technique.__name__}`"] = None
    rows = [(", ".join(row["has"]), ", ".join(row["raising"]), f"... {escaped(why)}") for why, row in found.items()]
    yield write_table(("Your run uses", "Raised by", "Message, and what to do"), rows)


def raised() -> Iterator[str]:
    """Yield a heading and a table of messages for each place."""
    found: dict[str, dict[str, str]] = {}
    for file in sorted((ROOT / "lightning_grad").rglob("*.py")):
        heading = _heading(file.relative_to(ROOT / "lightning_grad").as_posix())
        if heading is not None:
            found.setdefault(heading, {}).update(_messages(file))
    for heading in sorted(heading for heading, messages in found.items() if messages):
        rows = [(escaped(message), escaped(way_out)) for message, way_out in sorted(found[heading].items())]
        yield f"### {heading}\n\n{write_table(('Message', 'What to do'), rows)}"


def _heading(path: str) -> str | None:
    if path.startswith(_AUTHORS) or path.endswith("__init__.py"):
        return None
    for place, heading in _PLACES.items():
        if path.startswith(place):
            return _titled(heading or path.split("/")[1])
    return None


def _titled(heading: str) -> str:
    return title_of(heading) if heading.islower() else heading


@cache
def _messages(file: Path) -> tuple[tuple[str, str], ...]:
    """Return (what was found, what to do) of each error that names the technique."""
    return tuple(_read_messages(file))


def _read_messages(file: Path) -> Iterator[tuple[str, str]]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _ERRORS and node.args:
            text = template_of(node.args[0])
            message, way_out = split_message(text)
            if _words(way_out) > 1 and _words(message) >= _FEWEST_WORDS:
                yield message, way_out


def _words(text: str) -> int:
    return len(re.findall(r"[a-z]{2,}", text))


def template_of(node: ast.expr) -> str:
    """Return an f-string that begins with the name of a technique, with dots for its values; "" for others."""
    if not isinstance(node, ast.JoinedStr):
        return ""
    first = node.values[0]
    if not (isinstance(first, ast.FormattedValue) and _NAMES.search(ast.unparse(first.value))):
        return ""
    text = "".join(str(part.value) if isinstance(part, ast.Constant) else "..." for part in node.values)
    return "" if text.startswith("....") else text  # names a method of the technique: an error for authors


def split_message(text: str) -> tuple[str, str]:
    """Split a message into the first sentence (what was found) and the rest (what to do).

    Example:
        >>> split_message("... needs a length. Set total_steps=... of it.")
        ('... needs a length', 'Set total_steps=... of it.')
    """
    message, _, way_out = re.sub(r"(?:(?<=[\w)'\]])|(?<=\.{3}))\. (?=[A-Z])", "\n", text, count=1).partition("\n")
    return message, way_out


def escaped(text: str) -> str:
    """Return a message as Markdown for a table cell."""
    return re.sub(r"([|*_\[\]<>$`#{}])", r"\\\1", " ".join(text.split()))
