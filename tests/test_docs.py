"""The documentation holds: Python blocks run and print what is shown, YAML blocks build, links lead on."""

import ast
import contextlib
import importlib
import inspect
import io
import re
import sys
import types
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.strategies import StrategyRegistry

import lightning_grad
from lightning_grad import callbacks, functional, strategies, utilities

ROOT = Path(__file__).resolve().parents[1]
DOCS = sorted(page for page in (ROOT / "docs").rglob("*.md") if "_build" not in page.parts)
PAGES = [ROOT / "README.md", *DOCS]
TEXTS = [*PAGES, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"]
SECTIONS = (
    "How to use",
    "When to use it",
    "Suggested settings",
    "Measured results",
    "Technical details",
    "Logs",
    "Limits",
    "Attribution",
)
OUR_FOLDERS = ("lightning_grad/", "tests/", "examples/", "benchmarks/", "docs/", ".ci/")

FENCE = re.compile(r"^```([^`\n]*)\n(.*?)^```$(?:\s*^```text\n(.*?)^```$)?", re.DOTALL | re.MULTILINE)

# Advice of Lightning and notices of its dependencies, none of them about the documentation.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:GPU available but not used"),
    pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available"),
]


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    text: str
    prints: str = ""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def read_blocks(path: Path) -> Iterator[Block]:
    """Yield the fenced blocks of a page; ``text`` right after a Python block is what that one prints."""
    source = path.read_text(encoding="utf-8")
    for found in FENCE.finditer(source):
        line = source[: found.start()].count("\n") + 2
        yield Block(where(path), line, found[1], found[2], found[3] or "")


def where(path: Path) -> str:
    """Return a page's path in the repository."""
    return path.relative_to(ROOT).as_posix()


BLOCKS = [block for page in PAGES for block in read_blocks(page)]
PYTHON = [block for block in BLOCKS if block.language == "python"]
YAML = [block for block in BLOCKS if block.language == "yaml"]


def namespace_of(page: str) -> dict[str, Any]:
    """Return the namespace that the blocks of a page share, that of a module, so that its classes pickle."""
    module = types.ModuleType("page_" + re.sub(r"\W", "_", page))
    sys.modules[module.__name__] = module
    return module.__dict__


def run_block(block: Block, namespace: dict[str, Any]) -> str:
    """Run a block, and return what it printed."""
    code = compile("\n" * (block.line - 1) + block.text, block.page, "exec", dont_inherit=True)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, namespace)
    return printed.getvalue()


@pytest.mark.parametrize("page", dict.fromkeys(block.page for block in PYTHON))
def test_python_blocks_of_a_page_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.setattr(
        "matplotlib.figure.Figure.draw", lambda *_: None
    )  # files of blank figures; they have tests of their own
    namespace = namespace_of(page)
    for block in PYTHON:
        if block.page == page:
            assert block.prints in run_block(block, namespace), str(block)


def find_classes(node: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (path, arguments) of every class that a config names, in Lightning's or in Hydra's way."""
    if isinstance(node, dict):
        if "class_path" in node:
            yield node["class_path"], node.get("init_args", {})
        if "_target_" in node:
            yield node["_target_"], {key: value for key, value in node.items() if key != "_target_"}
        node = list(node.values())
    if isinstance(node, list):
        for child in node:
            yield from find_classes(child)


@pytest.mark.parametrize("block", YAML, ids=str)
def test_yaml_block_builds(block: Block) -> None:
    classes = list(find_classes(yaml.safe_load(block.text)))
    assert classes
    for path, arguments in classes:
        module, _, name = path.rpartition(".")
        getattr(importlib.import_module(module), name)(**arguments)


@pytest.mark.parametrize("page", TEXTS, ids=where)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    local = [target.partition("#") for target in targets if not target.startswith(("http://", "https://"))]
    missing = [file for file, _, _ in local if file and not (page.parent / file).exists()]
    assert not missing
    for file, _, anchor in local:
        if anchor:
            assert anchor in anchors_of(page.parent / file if file else page)


def anchors_of(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", TEXTS, ids=where)
def test_make_targets_exist(page: Path) -> None:
    targets = re.findall(r"(?:^|`)make (\w+)", page.read_text(encoding="utf-8"), re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert not [target for target in targets if not re.search(rf"^{target}:", makefile, re.MULTILINE)]


@pytest.mark.parametrize("page", TEXTS, ids=where)
def test_files_that_are_named_exist(page: Path) -> None:
    named = re.findall(r"`([\w./-]+/[\w./-]*)`", page.read_text(encoding="utf-8"))
    ours = [path for path in named if path.startswith(OUR_FOLDERS)]
    # docs/adding_a_technique.md makes up a technique.
    real = [path for path in ours if "gradient_scale" not in path]
    assert not [path for path in real if not (ROOT / path).exists()]


@dataclass(frozen=True)
class Files:
    """Where a technique is told and shown.

    One of a family, ``callbacks/<family>/<word>.py``, has its card in the family's folder, and shares page, example and
    YAML with it. The only one of its folder has everything under its own word. Strategies are a family, in
    ``strategies/<word>.py``.

    Args:
        word: Name of the file its class stands in.
        family: Name of the folder of that file; empty for the only technique in it.
    """

    word: str
    family: str

    @property
    def card(self) -> str:
        return "/".join(part for part in ("docs", self.family, f"{self.word}.md") if part)

    @property
    def examples(self) -> tuple[str, str]:
        topic = self.family or self.word
        return f"examples/{topic}.py", f"examples/{topic}.yaml"


SCHEMES = [name for name in strategies.__all__ if not inspect.isabstract(getattr(strategies, name))]
BASES = sorted({*strategies.__all__} - {*SCHEMES})
TECHNIQUES = [*callbacks.__all__, *SCHEMES]


def class_of(name: str) -> Any:
    """Return a technique, callback or strategy."""
    return getattr(strategies if name in SCHEMES else callbacks, name)


def folder_of(name: str) -> str:
    return class_of(name).__module__.removeprefix("lightning_grad.").removeprefix("callbacks.").rpartition(".")[0]


FOLDERS = Counter(map(folder_of, TECHNIQUES))


def files_of(name: str) -> Files:
    """Return the files of a technique, by the module of its class."""
    folder, word = folder_of(name), class_of(name).__module__.rpartition(".")[2]
    return Files(word, folder.replace(".", "/") if FOLDERS[folder] > 1 else "")


FAMILIES = sorted({files_of(name).family for name in TECHNIQUES} - {""})


def read(file: str) -> str:
    return (ROOT / file).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", TECHNIQUES)
def test_technique_is_told_everywhere(name: str) -> None:
    files = files_of(name)
    row = next((line for line in read("README.md").splitlines() if line.startswith(f"| `{name}` |")), "")
    for file in (files.card, *files.examples):
        assert f"]({file})" in row, f"README.md: the row of {name} has no link to {file}"
    shown = [] if files.family else files.examples
    pages = ("CHANGELOG.md", "docs/index.md", "docs/compatibility.md", "docs/api.md")
    for file in (files.card, *shown, *pages):
        assert re.search(rf"\b{name}\b", read(file)), f"{file} does not name {name}"


@pytest.mark.parametrize("name", [name for name in TECHNIQUES if files_of(name).family])
def test_family_page_leads_to_the_card(name: str) -> None:
    files = files_of(name)
    link = f"[`{name}`]({files.card.removeprefix('docs/')})"
    assert link in read(f"docs/{files.family}.md"), f"docs/{files.family}.md has no {link}"


@pytest.mark.parametrize("family", FAMILIES)
def test_examples_of_a_family_show_some_of_it(family: str) -> None:
    members = [name for name in TECHNIQUES if files_of(name).family == family]
    for file in files_of(members[0]).examples:
        assert any(name in read(file) for name in members), f"{file} names none of {', '.join(members)}"


@pytest.mark.parametrize("name", TECHNIQUES)
def test_card_is_complete(name: str) -> None:
    card = read(files_of(name).card)
    for section in SECTIONS:
        assert re.search(rf"^## {section}", card, re.MULTILINE), f"no section {section!r}"
    arguments = inspect.signature(class_of(name)).parameters
    assert not [argument for argument in arguments if not re.search(rf"\b{argument}\b", card)]


@pytest.mark.parametrize("name", BASES)
def test_base_of_strategies_is_told_to_authors(name: str) -> None:
    for file in ("CHANGELOG.md", "docs/communication.md", "docs/api.md", "docs/adding_a_technique.md"):
        assert re.search(rf"\b{name}\b", read(file)), f"{file} does not name {name}"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_names_of_a_strategy_are_told(scheme: str) -> None:
    names = [name for name in StrategyRegistry.available_strategies() if _registered(name) is class_of(scheme)]
    assert len(names) == 3
    for file in ("CHANGELOG.md", files_of(scheme).card):
        assert not [name for name in names if not re.search(rf"\b{name}\b", read(file))], file


def _registered(name: str) -> Any:
    return StrategyRegistry[name]["strategy"]


@pytest.mark.parametrize("package", [functional, utilities], ids=lambda package: package.__name__)
def test_changelog_names_what_is_exported(package: types.ModuleType) -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    functions = [name for name in package.__all__ if isinstance(getattr(package, name), types.FunctionType)]
    assert not [name for name in functions if f"{name}`" not in changelog]


def test_changelog_begins_with_what_is_unreleased_or_with_this_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    first = re.search(r"^## (.*)$", changelog, re.MULTILINE)
    assert first is not None
    assert first[1] in ("Unreleased", lightning_grad.__version__)


def test_the_first_block_of_the_readme_needs_only_the_package() -> None:
    tree = ast.parse(next(block for block in PYTHON if block.page == "README.md").text)
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    found = {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
    found |= {str(node.module) for node in imports if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in found} == {"lightning", "torch", "lightning_grad"}
