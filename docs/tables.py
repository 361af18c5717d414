"""Write the parts of the documentation that follow from the exported classes: ``python docs/tables.py``.

Such a part stands between ``<!-- begin: name -->`` and ``<!-- end: name -->``; do not edit it by hand. The description of a
technique is the first line of its docstring, its family is the folder of its module, and the title of a family is the
heading of its page. ``make docs`` runs this script before it builds, and a test fails if a part is stale.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

from lightning_grad import callbacks, strategies
from lightning_grad.core import Role
from lightning_grad.core.compatibility import TITLES, Answer

ROOT = Path(__file__).resolve().parents[1]
PART = re.compile(r"<!-- begin: (\w+) -->\n(.*?)<!-- end: \1 -->", re.DOTALL)


# What there is.


def techniques() -> dict[str, list[type[Any]]]:
    """Return the exported techniques of each family, families by name, members in the order of their ``__all__``."""
    exported = [getattr(package, name) for package in (callbacks, strategies) for name in package.__all__]
    families: dict[str, list[type[Any]]] = {}
    for technique in exported:
        if not inspect.isabstract(technique):
            families.setdefault(family_of(technique), []).append(technique)
    return dict(sorted(families.items()))


def family_of(technique: type[Any]) -> str:
    """Return the family's word, which names the folder of docs, examples and functions."""
    parts = technique.__module__.split(".")
    return parts[2] if parts[1] == "callbacks" else "communication"


def card_of(technique: type[Any]) -> str:
    """Return the path of a technique's card in ``docs``."""
    return f"{family_of(technique)}/{technique.__module__.rpartition('.')[2]}.md"


def description_of(technique: type[Any]) -> str:
    """Return the first line of the docstring as Markdown, without its full stop."""
    first = (inspect.getdoc(technique) or "").partition("\n\n")[0]
    text = " ".join(first.split()).removesuffix(".").replace("``", "`")
    return re.sub(r":\w+:`[~.\w]*?(\w+)`", r"`\1`", text)


def title_of(family: str) -> str:
    """Return the heading of a family's page."""
    return (ROOT / f"docs/{family}.md").read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")


# The parts.


def write_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [f"| {' | '.join(line)} |\n" for line in (header, *rows)]
    return "".join([lines[0], "|---" * len(header) + "|\n", *lines[1:]])


def write_descriptions(members: Sequence[type[Any]], folder: str = "") -> str:
    """Return the table of what techniques do, with links to their cards from a page beside ``folder``."""
    rows = [(f"[`{cls.__name__}`]({folder}{card_of(cls)})", description_of(cls)) for cls in members]
    return write_table(("Technique", "What it does"), rows)


def readme_techniques() -> Iterator[str]:
    """Yield a heading and a table for each family, as README has them."""
    for family, members in techniques().items():
        files = f"[script](examples/{family}.py), [YAML](examples/{family}.yaml)"
        yield f"### [{title_of(family)}](docs/{family}.md)\n\n{write_descriptions(members, 'docs/')}\nExample: {files}\n"


def index_techniques() -> Iterator[str]:
    """Yield a heading and a table for each family, as the first page of the documentation has them."""
    for family, members in techniques().items():
        yield f"### [{title_of(family)}]({family}.md)\n\n{write_descriptions(members)}"


def index_contents() -> Iterator[str]:
    """Yield the table of contents of each family: its page, its cards, and the other pages of its folder."""
    for family, members in techniques().items():
        cards = [card_of(cls).removesuffix(".md") for cls in members]
        others = [f"{family}/{path.stem}" for path in sorted((ROOT / "docs" / family).glob("*.md"))]
        pages = "\n".join(dict.fromkeys([family, *cards, *others]))
        yield f"```{{toctree}}\n:caption: {title_of(family)}\n:maxdepth: 1\n\n{pages}\n```\n"


def family_techniques(family: str) -> Iterator[str]:
    """Yield the table of one family, as its page has it."""
    yield write_descriptions(techniques()[family])


def clipping_roles() -> Iterator[str]:
    """Yield the table of roles and of the techniques that stand in them."""
    classes = [cls for members in techniques().values() for cls in members]
    of_role = {role: [cls for cls in classes if getattr(cls, "role", None) == role] for role in get_args(Role)}
    rows = [(role, ", ".join(f"`{cls.__name__}`" for cls in members)) for role, members in of_role.items()]
    yield write_table(("Role", "Rules"), rows)


def clipping_thresholds() -> Iterator[str]:
    """Yield the table of the rules that have a threshold."""
    named = [(cls.__name__, getattr(cls, "threshold_name", None)) for cls in techniques()["clipping"]]
    yield write_table(("Rule", "Its threshold"), [(f"`{rule}`", f"`{name}`") for rule, name in named if name])


# What is in the first table; the second has the rest.
_IN_A_RUN = (
    "accumulation",
    "bf16",
    "fp16",
    "ddp",
    "fsdp2",
    "fsdp1",
    "deepspeed",
    "compiled",
    "several_optimizers",
    "manual_optimization",
    "weight_averaging",
    "pytorch_lightning",
)
_CELLS = {"yes": "yes", "stand-in": "stand-in", "no": "raises", "-": "-"}
# What a note calls the thing: the same words, so the same reason is one note for several columns.
_SAID = dict.fromkeys(("fsdp2", "fsdp1", "deepspeed"), "the strategy") | {
    "several_optimizers": "manual optimization",
    "complex_parameters": "a complex parameter",
}
_VALUES = {"late_gradients": "DGCStrategy"}


def compatibility() -> Iterator[str]:
    """Yield the two tables of what techniques work with, and their notes; equal notes share a number."""
    numbers: dict[str, int] = {}
    others = [name for name in TITLES if name not in _IN_A_RUN]
    for columns in (_IN_A_RUN, others):
        rows = [
            (
                f"[`{cls.__name__}`]({card_of(cls)})",
                *(write_answer(name, cls.compatibility.answers[name], numbers) for name in columns),
            )
            for members in techniques().values()
            for cls in members
        ]
        yield write_table(("Technique", *(TITLES[name] for name in columns)), rows)
    yield "".join(write_note(number, note) for note, number in numbers.items())


def write_answer(name: str, answer: Answer, numbers: dict[str, int]) -> str:
    """Return the cell of one answer, with the number of its note."""
    note = answer.explained(_SAID.get(name, TITLES[name]), _VALUES.get(name, "..."))
    return f"{_CELLS[answer.works]} ({numbers.setdefault(note, len(numbers) + 1)})" if note else _CELLS[answer.works]


def write_note(number: int, note: str) -> str:
    """Return a numbered note in lines of at most 120 characters."""
    first = f"{number}. "
    return textwrap.fill(note, 120, initial_indent=first, subsequent_indent=" " * len(first)) + "\n"


def card_works_with(technique: type[Any]) -> Iterator[str]:
    """Yield what a technique works with, for its card."""
    for line in works_with(technique):
        yield textwrap.fill(line, 120, initial_indent="- ", subsequent_indent="  ")
    yield "\nReasons, and ways out: [compatibility](../compatibility.md).\n"


def works_with(technique: type[Any]) -> Iterator[str]:
    """Yield a line for each kind of answer that a technique gives."""
    answers = technique.compatibility.answers
    for works, words in {"yes": "Yes", "stand-in": "Tested with a stand-in only", "no": "Raises"}.items():
        names = [TITLES[name] for name, answer in answers.items() if answer.works == works]
        if names:
            yield f"{words}: {', '.join(names)}."


def api_techniques() -> Iterator[str]:
    """Yield the reference of each family."""
    for family, members in techniques().items():
        package = ".".join(members[0].__module__.split(".")[:2])
        classes = "\n\n".join(f".. autoclass:: {cls.__name__}" for cls in members)
        module = f".. currentmodule:: {package}"
        yield f"### {title_of(family)}\n\n```{{eval-rst}}\n{module}\n\n{classes}\n```\n"


def parts() -> dict[tuple[str, str], Callable[[], Iterable[str]]]:
    """Return what writes each part, by file and name."""
    written: dict[tuple[str, str], Callable[[], Iterable[str]]] = {
        ("README.md", "techniques"): readme_techniques,
        ("docs/index.md", "techniques"): index_techniques,
        ("docs/index.md", "contents"): index_contents,
        ("docs/api.md", "techniques"): api_techniques,
        ("docs/compatibility.md", "compatibility"): compatibility,
        ("docs/clipping.md", "roles"): clipping_roles,
        ("docs/clipping.md", "thresholds"): clipping_thresholds,
    }
    for family, members in techniques().items():
        written[f"docs/{family}.md", "techniques"] = partial(family_techniques, family)
        written |= {(f"docs/{card_of(cls)}", "works_with"): partial(card_works_with, cls) for cls in members}
    return written


# Reading and writing.


def rewrite(file: str, text: str) -> str:
    """Return the text of a file with all its parts rewritten; raise ``KeyError`` for a part that nothing writes."""
    written = parts()
    found = {(file, name) for name, _ in PART.findall(text)}
    missing = {name for place, name in written if place == file and (place, name) not in found}
    if missing:
        raise ValueError(f"{file} has no lines <!-- begin: {missing.pop()} --> and <!-- end: ... -->. Add them.")

    def fill(part: re.Match[str]) -> str:
        content = "\n".join(written[file, part[1]]())
        return f"<!-- begin: {part[1]} -->\n\n{content}\n<!-- end: {part[1]} -->"

    return PART.sub(fill, text)


def stale() -> dict[str, str]:
    """Return the new text of each file that is not up to date."""
    texts = {file: (ROOT / file).read_text(encoding="utf-8") for file in dict.fromkeys(file for file, _ in parts())}
    return {file: new for file, text in texts.items() if (new := rewrite(file, text)) != text}


def main() -> None:
    """Write the files that are stale, and name them."""
    for file, text in stale().items():
        (ROOT / file).write_text(text, encoding="utf-8")
        print(f"{file}: rewritten")


if __name__ == "__main__":
    main()
