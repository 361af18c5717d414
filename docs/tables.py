"""Write the parts of the documentation that are generated from the code: ``python docs/tables.py``.

A generated part is between ``<!-- begin: name -->`` and ``<!-- end: name -->`` in a page; do not edit it by hand. Generated
files are the API pages of the families, the catalog for programs, and the notebook, which has the text and code of
``docs/quickstart.md``. ``make docs`` runs this script before it builds, and a test fails if anything is stale.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, get_args

import evidence
import measured
from catalog import write_catalog, write_llms
from exported import (
    ROOT,
    all_techniques,
    as_markdown,
    card_of,
    description_of,
    title_of,
    write_table,
)
from quickstart_notebook import write_notebook
from refusals import declared, raised

from lightning_grad import functional
from lightning_grad.cli.catalog import SAID, VALUES, family_of, package_of, techniques, works_with
from lightning_grad.core import Role
from lightning_grad.core.compatibility import TITLES, Answer
from lightning_grad.testing.checks import CHECKS

PART = re.compile(r"<!-- begin: (\w+) -->\n(.*?)<!-- end: \1 -->", re.DOTALL)


# Generated parts.


def write_descriptions(members: Sequence[type[Any]], folder: str = "") -> str:
    """Return the table of descriptions; ``folder`` is the path from the page to ``docs``."""
    rows = [(f"[`{cls.__name__}`]({folder}{card_of(cls)})", description_of(cls)) for cls in members]
    return write_table(("Technique", "What it does"), rows)


def readme_techniques() -> Iterator[str]:
    """Yield the table of all techniques in README, with a row before each family."""
    rows = []
    for family, members in techniques().items():
        files = f"Example: [script](examples/{family}.py), [YAML](examples/{family}.yaml)"
        rows.append((f"**[{title_of(family)}](docs/{family}.md)**", files))
        rows += [(f"[`{cls.__name__}`](docs/{card_of(cls)})", description_of(cls)) for cls in members]
    yield write_table(("Technique", "What it does"), rows)


def readme_works() -> Iterator[str]:
    """Yield the table of compatibility in README; equal rows are joined."""
    rows: dict[str, list[str]] = {}
    for name in _IN_A_RUN:
        rows.setdefault(_who_works(name), []).append(TITLES[name])
    yield write_table(("Your run has", "Techniques that work"), [(", ".join(has), who) for who, has in rows.items()])


def _who_works(name: str) -> str:
    """Return the techniques that work with a feature of a run: all, all but some, or only some."""
    asked = [cls for cls in all_techniques() if cls.compatibility.answers[name].works != "-"]
    raising = [f"`{cls.__name__}`" for cls in asked if cls.compatibility.answers[name].is_no]
    others = [f"`{cls.__name__}`" for cls in asked if not cls.compatibility.answers[name].is_no]
    if not raising:
        return "all"
    return f"all but {', '.join(raising)}" if len(raising) <= len(others) else f"only {', '.join(others)}"


def index_techniques() -> Iterator[str]:
    """Yield a heading and a table for each family, for the home page of the documentation."""
    for family, members in techniques().items():
        yield f"### [{title_of(family)}]({family}.md)\n\n{write_descriptions(members)}"


def index_contents() -> Iterator[str]:
    """Yield the table of contents of each family: its page, its cards, and the other pages of its folder."""
    for family, members in techniques().items():
        cards = [card_of(cls).removesuffix(".md") for cls in members]
        others = [f"{family}/{path.stem}" for path in sorted((ROOT / "docs" / family).glob("*.md"))]
        pages = "\n".join(dict.fromkeys([family, *cards, *others]))
        yield _toctree(pages, f":caption: {title_of(family)}\n")


def _toctree(pages: str, options: str = "") -> str:
    return f"```{{toctree}}\n{options}:maxdepth: 1\n:hidden:\n\n{pages}\n```\n"


def family_techniques(family: str) -> Iterator[str]:
    """Yield the table of one family for its page."""
    yield write_descriptions(techniques()[family])


def clipping_roles() -> Iterator[str]:
    """Yield the table of roles and their techniques."""
    classes = [cls for members in techniques().values() for cls in members]
    of_role = {role: [cls for cls in classes if getattr(cls, "role", None) == role] for role in get_args(Role)}
    rows = [(role, ", ".join(f"`{cls.__name__}`" for cls in members)) for role, members in of_role.items()]
    yield write_table(("Role", "Rules"), rows)


def clipping_thresholds() -> Iterator[str]:
    """Yield the table of rules with a threshold."""
    named = [(cls.__name__, getattr(cls, "threshold_name", None)) for cls in techniques()["clipping"]]
    yield write_table(("Rule", "Threshold"), [(f"`{rule}`", f"`{name}`") for rule, name in named if name])


# Columns of the first table; the second has the others.
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


def compatibility() -> Iterator[str]:
    """Yield the two tables of compatibility and their notes; equal notes share a number."""
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
    note = answer.explained(SAID.get(name, TITLES[name]), VALUES.get(name, "..."))
    return f"{_CELLS[answer.works]} ({numbers.setdefault(note, len(numbers) + 1)})" if note else _CELLS[answer.works]


def write_note(number: int, note: str) -> str:
    """Return a numbered note in lines of at most 120 characters."""
    first = f"{number}. "
    return textwrap.fill(note, 120, initial_indent=first, subsequent_indent=" " * len(first)) + "\n"


def checks() -> Iterator[str]:
    """Yield the table of the checks of ``check_callback``."""
    rows = [
        (check.guarantee.upper(), f"`{check.name}`", check.level, as_markdown(check.about)) for check in CHECKS.values()
    ]
    yield write_table(("Guarantee", "Check", "Level", "What it checks"), rows)


def card_works_with(technique: type[Any]) -> Iterator[str]:
    """Yield the section "Works with" of a card."""
    for line in works_with(technique):
        yield textwrap.fill(line, 120, initial_indent="- ", subsequent_indent="  ")
    arguments = f"[API](../api/{family_of(technique)}.md)"
    yield f"\nReasons and workarounds: [compatibility](../compatibility.md). All arguments: {arguments}.\n"


def api_contents() -> Iterator[str]:
    """Yield the table of contents of the API: families first."""
    families = [*techniques()]
    others = [path.stem for path in sorted((ROOT / "docs/api").glob("*.md")) if path.stem not in families]
    yield _toctree("\n".join(f"api/{page}" for page in (*families, *others)))


def api_families() -> Iterator[str]:
    """Yield the list of API pages of the families."""
    rows = [
        (f"[{title_of(family)}](api/{family}.md)", ", ".join(f"`{cls.__name__}`" for cls in members))
        for family, members in techniques().items()
    ]
    yield write_table(("Family", "Classes"), rows)


def api_page(family: str) -> str:
    """Return the API page of a family: its classes and its functions."""
    members = techniques()[family]
    classes = [f".. autoclass:: {cls.__name__}" for cls in members]
    functions = [_entry(name) for name in getattr(getattr(functional, family, None), "__all__", [])]
    listed = f"\n## Functions\n\n{_reference('lightning_grad.functional', functions)}" if functions else ""
    return (
        f"# API: {title_of(family)}\n\n"
        f"All arguments{' and functions' if functions else ''}. To choose a technique, read the "
        f"[page of the family](../{family}.md) or a card:\n\n"
        f"{write_descriptions(members, '../')}"
        f"\n## Classes\n\n{_reference(package_of(members[0]), classes)}{listed}"
    )


def _entry(name: str) -> str:
    """Return the directive that documents one name of ``functional``."""
    found = getattr(functional, name)
    if isinstance(found, type):
        return f".. autoclass:: {name}\n   :members:"
    return f".. {'autofunction' if callable(found) else 'autodata'}:: {name}"


def _reference(package: str, entries: Sequence[str]) -> str:
    """Return the block of directives for names of a package."""
    return "```{eval-rst}\n" + "\n\n".join([f".. currentmodule:: {package}", *entries]) + "\n```\n"


def parts() -> dict[tuple[str, str], Callable[[], Iterable[str]]]:
    """Return the functions that write each part, by file and name."""
    written: dict[tuple[str, str], Callable[[], Iterable[str]]] = {
        ("README.md", "techniques"): readme_techniques,
        ("docs/index.md", "techniques"): index_techniques,
        ("docs/index.md", "contents"): index_contents,
        ("README.md", "works"): readme_works,
        ("docs/api.md", "families"): api_families,
        ("docs/api.md", "contents"): api_contents,
        ("docs/troubleshooting.md", "declared"): declared,
        ("docs/troubleshooting.md", "raised"): raised,
        ("docs/compatibility.md", "compatibility"): compatibility,
        ("docs/testing_callbacks.md", "checks"): checks,
        ("docs/several_machines.md", "which_strategy"): measured.which_strategy,
        ("docs/clipping.md", "roles"): clipping_roles,
        ("docs/clipping.md", "thresholds"): clipping_thresholds,
    }
    for family, members in techniques().items():
        written[f"docs/{family}.md", "techniques"] = partial(family_techniques, family)
        written |= {(f"docs/{card_of(cls)}", "works_with"): partial(card_works_with, cls) for cls in members}
        written |= {(f"docs/{card_of(cls)}", "memory"): partial(measured.memory_of, cls) for cls in members}
    markers = [name for name, _ in PART.findall(_read(measured.PAGE))]
    written |= evidence.parts()
    return written | {(measured.PAGE, name): write for name, write in measured.parts(markers).items()}


def files() -> dict[str, Callable[[], str]]:
    """Return the functions that write each whole file."""
    pages = {f"docs/api/{family}.md": partial(api_page, family) for family in techniques()}
    return (
        pages
        | evidence.files()
        | {
            "docs/techniques.json": write_catalog,
            "docs/llms.txt": write_llms,
            "examples/quickstart.ipynb": write_notebook,
        }
    )


# Reading and writing.


def rewrite(file: str, text: str) -> str:
    """Return the text of a file with all parts rewritten. Raise ``KeyError`` for an unknown part."""
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
    """Return the new text of each stale file."""
    texts = {file: _read(file) for file in dict.fromkeys(file for file, _ in parts())}
    written = {file: rewrite(file, text) for file, text in texts.items()}
    written |= {file: write() for file, write in files().items()}
    return {file: new for file, new in written.items() if new != _read(file)}


def _read(file: str) -> str:
    path = ROOT / file
    return path.read_text(encoding="utf-8") if path.exists() else ""


def main() -> None:
    """Write the stale files, and print their names."""
    for file, text in stale().items():
        (ROOT / file).write_text(text, encoding="utf-8")
        print(f"{file}: rewritten")


if __name__ == "__main__":
    main()
