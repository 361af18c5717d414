"""The results as text, Markdown or JSON."""

import json
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from lightning_grad.cli.catalog import family_of
from lightning_grad.cli.check.rows import Row
from lightning_grad.core import Chosen
from lightning_grad.utilities.reporting import format_table

_WIDEST = 120


def as_text(rows: Sequence[Row], memory: bool) -> str:
    """Return the table and, under it, the words of the techniques."""
    header, *lines = _cells(rows, memory)
    width = min(shutil.get_terminal_size((_WIDEST, 0)).columns, _WIDEST)
    words = [f"{title}\n{_indented(text, width)}" for title, text in _words(rows)]
    return "\n\n".join([format_table(lines, header), *words])


def _indented(text: str, width: int) -> str:
    """Indent a text, and wrap it unless it is a traceback."""
    lines = text.splitlines()
    wrapped = lines if len(lines) > 1 else textwrap.wrap(text, width - 2)
    return textwrap.indent("\n".join(wrapped), "  ")


def as_markdown(rows: Sequence[Row], memory: bool) -> str:
    """Return the table in Markdown, and the words as a list."""
    header, *lines = _cells(rows, memory)
    table = [header, ["---"] * len(header), *([f"`{line[0]}`", *line[1:]] for line in lines)]
    words = [f"- {title}:\n\n{textwrap.indent(_quoted(text), '  ')}\n" for title, text in _words(rows)]
    return "\n".join(["\n".join(f"| {' | '.join(line)} |" for line in table), "", *words]).rstrip()


def _quoted(text: str) -> str:
    return f"```text\n{text}\n```" if "\n" in text else f"> {text}"


def as_json(rows: Sequence[Row], about: dict[str, Any]) -> str:
    """Return everything that is known."""
    return json.dumps({**about, "techniques": [_entry(row) for row in rows]}, indent=1, ensure_ascii=False)


def _entry(row: Row) -> dict[str, Any]:
    chosen = row.outcome.chosen
    return {
        "name": row.technique.__name__,
        "family": family_of(row.technique),
        "status": row.outcome.status,
        "words": row.outcome.words,
        "step_time": {"shown": row.step_time, "ratio": row.ratio, "rounds": [list(seconds) for seconds in row.rounds]},
        "between_epochs": row.passes,
        "memory_bytes": None if row.memory is None else row.memory[0],
        "acts_on": chosen and {"words": chosen.words, "kind": chosen.kind, "names": list(chosen.names)},
    }


def _cells(rows: Sequence[Row], memory: bool) -> Iterator[list[str]]:
    yield ["technique", "result", "step time", "between epochs", *(["memory"] if memory else []), "acts on"]
    for row in rows:
        runs = row.outcome.status == "runs"
        costs = [row.step_time, row.passes, *([row.memory_in_words] if memory else [])]
        yield [
            row.technique.__name__,
            row.outcome.status,
            *(costs if runs else ["-"] * len(costs)),
            _acts_on(row.outcome.chosen) if runs else "-",
        ]


def _acts_on(chosen: Chosen | None) -> str:
    if chosen is None or not chosen.names:
        return "-"
    return str(chosen.names[0]) if len(chosen.names) == 1 else f"{len(chosen.names)} {chosen.kind}"


def _words(rows: Sequence[Row]) -> Iterator[tuple[str, str]]:
    """Yield a title and a text for everything that a technique said."""
    for row in rows:
        for text in dict.fromkeys(row.outcome.words):
            said = "warns" if row.outcome.status == "runs" else row.outcome.status
            yield f"{row.technique.__name__} {said}", text
