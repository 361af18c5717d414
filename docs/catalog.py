"""Write ``docs/techniques.json`` and ``docs/llms.txt``, which describe techniques and pages for programs."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from exported import (
    ROOT,
    as_markdown,
    card_of,
    description_of,
    title_of,
    title_of_page,
)

from lightning_grad.cli.catalog import arguments_of, family_of, package_of, techniques
from lightning_grad.core.compatibility import TITLES

_WITHOUT_LINE = ("index.md", "changelog.md", "contributing.md")


def write_catalog() -> str:
    """Return all techniques as JSON: description, arguments, neutral setting and compatibility."""
    entries = [_entry(technique) for members in techniques().values() for technique in members]
    return json.dumps({"techniques": entries}, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _entry(technique: type[Any]) -> dict[str, Any]:
    answers = technique.compatibility.answers
    return {
        "name": technique.__name__,
        "family": family_of(technique),
        "import": f"{package_of(technique)}.{technique.__name__}",
        "description": description_of(technique),
        "card": page_url(card_of(technique)),
        "arguments": list(_arguments(technique)),
        "neutral": _plain(technique.neutral),
        "works_with": {
            name: {"works": answer.works} | ({"note": note} if (note := answer.explained(TITLES[name])) else {})
            for name, answer in answers.items()
        },
    }


def _arguments(technique: type[Any]) -> Iterator[dict[str, Any]]:
    for argument in arguments_of(technique):
        found: dict[str, Any] = {"name": argument.name, "type": argument.kind}
        if not argument.is_required:
            found["default"] = _plain(argument.default)
        yield found | {"help": as_markdown(argument.help)}


def _plain(value: Any) -> Any:
    """Return a setting as a JSON value, with infinities as in YAML."""
    if isinstance(value, float) and not math.isfinite(value):
        return ".inf" if value > 0 else "-.inf"
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(each) for each in value]
    return value if isinstance(value, (int, float, str, bool, type(None))) else str(value)


def write_llms() -> str:
    """Return the list of pages and techniques, one per line."""
    return "\n".join(_llms_lines()) + "\n"


def _llms_lines() -> Iterator[str]:
    yield f"# {title_of_page('index.md')}\n\n> {_first_paragraph('index.md')}\n"
    yield "The Markdown source of a page `name.html` is `_sources/name.md.txt`. Arguments, defaults and compatibility of all"
    yield "techniques are in [techniques.json](techniques.json).\n\n## Pages\n"
    for path in sorted((ROOT / "docs").glob("*.md")):
        if path.name not in (*_WITHOUT_LINE, *(f"{family}.md" for family in techniques())):
            yield f"- [{title_of_page(path.name)}]({page_url(path.name)}){_after(_first_paragraph(path.name))}"
    for family, members in techniques().items():
        yield f"\n## {title_of(family)}\n\n- [{title_of(family)}]({page_url(f'{family}.md')}): How to choose."
        yield from (f"- [{each.__name__}]({page_url(card_of(each))}): {description_of(each)}." for each in members)
        yield f"- [API]({page_url(f'api/{family}.md')}): Classes and functions of the family."


def _after(text: str) -> str:
    return f": {text}" if text else ""


def page_url(page: str) -> str:
    """Return the address of a page of ``docs`` in the built documentation."""
    return page.removesuffix(".md") + ".html"


def _first_paragraph(page: str) -> str:
    """Return the first paragraph of a page without links, or "" if the page does not begin with one."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    found = re.search(r"^# .+\n\n((?:[A-Za-z`](?!``).*\n)(?:.+\n)*)", text, re.MULTILINE)
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", " ".join(found[1].split())) if found else ""
    return re.sub(":$", ".", plain)
