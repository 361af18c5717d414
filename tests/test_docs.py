"""The documentation holds: Python blocks run and print what is shown, YAML blocks build, links lead on."""

import ast
import contextlib
import doctest
import importlib
import importlib.util
import inspect
import io
import json
import re
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import plain_project
import pytest
import yaml
from lightning.pytorch.strategies import StrategyRegistry
from matplotlib.figure import Figure

from lightning_grad import callbacks, functional, strategies, utilities
from lightning_grad.core.compatibility import TITLES, YES, no
from studies.claims import CLAIMS
from studies.plan import CHOICE_SEED
from studies.results import Store, line_of, origin_of

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
NEEDS = {"docs/smaller_models.md": "onnxscript"}  # the oldest environment has none that fits to it
OUR_FOLDERS = ("lightning_grad/", "tests/", "examples/", "studies/", "benchmarks/", "docs/", ".ci/")

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
NOTEBOOK, NOTEBOOK_PAGE = ROOT / "examples/quickstart.ipynb", "docs/quickstart.md"
# What the page of the notebook shows runs there.
PYTHON = [block for block in BLOCKS if block.language == "python" and block.page != NOTEBOOK_PAGE]
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


@pytest.fixture
def _short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mute Trainers, which pages leave to the reader, and leave figures blank, which have tests of their own."""
    monkeypatch.setenv("PL_TRAINER_ENABLE_PROGRESS_BAR", "False")
    monkeypatch.setenv("PL_TRAINER_ENABLE_MODEL_SUMMARY", "False")
    monkeypatch.setattr("matplotlib.figure.Figure.draw", lambda *_: None)
    monkeypatch.setattr("lightning_grad.callbacks.data_pruning._report.draw_samples", lambda *_: Figure())


@contextlib.contextmanager
def data_for(block: Block) -> Iterator[None]:
    """Serve a fifth of the digits, but all of them to a block that shows what comes of them."""
    with pytest.MonkeyPatch.context() as patch:
        if not block.prints:
            split = plain_project.Digits.split
            patch.setattr(plain_project.Digits, "split", lambda *args: [part[::5] for part in split(*args)])
        yield


@pytest.mark.usefixtures("_short_runs")
@pytest.mark.parametrize("page", dict.fromkeys(block.page for block in PYTHON))
def test_python_blocks_of_a_page_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if page in NEEDS:
        pytest.importorskip(NEEDS[page])
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    namespace = namespace_of(page)
    for block in PYTHON:
        if block.page == page:
            with data_for(block):
                assert block.prints in run_block(block, namespace), str(block)


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """What runs the cells of a notebook, without the process that Jupyter would start for it."""
    interactive = pytest.importorskip("IPython.core.interactiveshell", reason="the oldest environment has no Jupyter")
    from traitlets.config import Config

    config = Config(HistoryManager={"enabled": False})
    namespace = namespace_of("notebook")
    module = sys.modules[namespace["__name__"]]
    made = interactive.InteractiveShell.instance(config=config, user_module=module, user_ns=namespace)
    yield made
    made.restore_sys_module_state()
    interactive.InteractiveShell.clear_instance()


@pytest.mark.usefixtures("_short_runs")
def test_notebook_runs_from_top_to_bottom(shell: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbformat
    from IPython.utils.capture import capture_output

    monkeypatch.chdir(tmp_path)
    cells = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    blocks = [block for block in BLOCKS if block.page == NOTEBOOK_PAGE and block.language == "python"]
    shown: list[Any] = []
    for cell, block in zip(cells, blocks, strict=True):
        with capture_output() as captured:
            result = shell.run_cell(cell.source)
        result.raise_error()
        assert block.prints in captured.stdout, str(block)
        shown += [output.data for output in captured.outputs]
    assert any("image/png" in data for data in shown)


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


def test_modules_and_names_of_the_package_that_are_told_exist() -> None:
    pages = [*TEXTS, *(ROOT / "examples").rglob("*.yaml")]
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    told = set(re.findall(r"\blightning_grad(?:\.\w+)+", text))
    assert told
    assert not [path for path in told if not exists(path) and "GradientScale" not in path]


def exists(path: str) -> bool:
    """Whether a dotted path leads to a module, or to something in one."""
    module, _, name = path.rpartition(".")
    try:
        importlib.import_module(path)
    except ImportError:
        return bool(module) and exists(module) and hasattr(importlib.import_module(module), name)
    return True


def test_files_that_docstrings_name_exist() -> None:
    package = ROOT / "lightning_grad"
    named = [
        (file, path)
        for file in package.rglob("*.py")
        for path in re.findall(r"``([\w/]+\.(?:py|md))``", file.read_text(encoding="utf-8"))
    ]
    assert named
    assert not [
        f"{where(file)}: {path}"
        for file, path in named
        if not any((home / path).exists() for home in (file.parent, package, ROOT))
        and not any(file.parent.glob(f"**/{path}"))
    ]


@pytest.mark.parametrize("page", TEXTS, ids=where)
def test_files_that_are_named_exist(page: Path) -> None:
    named = re.findall(r"`([\w./-]+/[\w./-]*)`", page.read_text(encoding="utf-8"))
    ours = [path for path in named if path.startswith(OUR_FOLDERS)]
    # docs/adding_a_technique.md makes up a technique.
    real = [path for path in ours if "gradient_scale" not in path]
    assert not [path for path in real if not (ROOT / path).exists()]


def load_script(name: str) -> types.ModuleType:
    """Return a script of the documentation as a module."""
    spec = importlib.util.spec_from_file_location(f"documentation_{name}", ROOT / f"docs/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where dataclasses look for their module
    spec.loader.exec_module(module)
    return module


tables, drawings, refusals, mathml, catalog = map(load_script, ("tables", "drawings", "refusals", "mathml", "catalog"))
findings = load_script("lightning_callbacks")
FAMILIES: dict[str, list[type[Any]]] = tables.techniques()
SCHEMES = [cls.__name__ for cls in FAMILIES["communication"]]
BASES = sorted({*strategies.__all__} - {*SCHEMES})
TECHNIQUES = [*callbacks.__all__, *SCHEMES]


def class_of(name: str) -> Any:
    """Return a technique, callback or strategy."""
    return getattr(strategies if name in SCHEMES else callbacks, name)


def read(file: str) -> str:
    return (ROOT / file).read_text(encoding="utf-8")


def read_card(name: str) -> str:
    return read(f"docs/{tables.card_of(class_of(name))}")


def without_parts(file: str) -> str:
    """Return what is written by hand in a page."""
    text: str = tables.PART.sub("", read(file))
    return text


def test_generated_parts_are_up_to_date() -> None:
    stale = ", ".join(tables.stale())
    assert not stale, f"{stale}: stale. Run `python docs/tables.py`, and commit what it writes."


def test_another_docstring_makes_the_tables_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    rest = (callbacks.ZClip.__doc__ or "").partition("\n\n")[2]
    monkeypatch.setattr(callbacks.ZClip, "__doc__", f"Clip norms in another way.\n\n{rest}")
    new = tables.stale()
    catalogs = {"docs/techniques.json", "docs/llms.txt"}
    assert {*new} == {"README.md", "docs/index.md", "docs/clipping.md", "docs/api/clipping.md"} | catalogs
    for file, text in new.items():
        assert "Clip norms in another way" in text, file


def test_another_answer_makes_table_and_card_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    other = callbacks.ZClip.compatibility.but(bf16=no("rounds, and {} does too", "Use float32"))
    monkeypatch.setattr(callbacks.ZClip, "compatibility", other)
    new = tables.stale()
    tables_of_answers = {"README.md", "docs/compatibility.md", "docs/troubleshooting.md", "docs/techniques.json"}
    assert {*new} == tables_of_answers | {"docs/clipping/zclip.md"}
    assert "| bf16 | all but `ZClip` |" in new["README.md"]
    assert "| bf16 | `ZClip` | ... rounds, and ... does too. Use float32. |" in new["docs/troubleshooting.md"]
    number = re.search(r"(\d+)\. It rounds, and bf16 does too\. Use float32\.", new["docs/compatibility.md"])
    assert number is not None
    assert f"| [`ZClip`](clipping/zclip.md) | yes | raises ({number[1]}) |" in new["docs/compatibility.md"]
    assert re.search(r"^- Raises: bf16,", new["docs/clipping/zclip.md"], re.MULTILINE)


def test_other_results_make_page_figure_card_and_readme_stale(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The page follows the files alone: one more training changes whatever quotes it."""
    claim = CLAIMS["tract"]
    for seed in range(claim.seeds):
        for arm, steps in (("plain", 200.0), ("tract", 100.0 + 10 * seed)):
            result = claim.result(arm, seed, None, steps, 0.1, 0.9, [])
            for rate in claim.rates:
                lines = [replace(result, rate=rate), replace(result, rate=rate, seed=CHOICE_SEED)]
                for each in lines:
                    Store(tmp_path).append(claim, line_of(claim, each, 1.0, origin_of(claim)))
    monkeypatch.setattr(tables.evidence, "RESULTS", tmp_path)
    tables.evidence.page.cache_clear()
    new = tables.stale()
    tables.evidence.page.cache_clear()
    figure = "docs/images/evidence_optimizers.svg"
    quoted = {"README.md", "docs/evidence.md", "docs/optimizers.md", "docs/optimizers/tract.md"}
    assert quoted | {figure} <= {*new}
    for file in quoted:
        assert claim.text in " ".join(new[file].split()), file
        numbers = "+80 (+60 to +100), n = 5" if file == "docs/evidence.md" else "+80 [+60 to +100] steps to target"
        assert numbers in " ".join(new[file].replace("**", "").split()), file
    assert ">plain<" not in new[figure]
    assert "tract against plain" in new[figure]


def test_every_figure_of_evidence_is_written() -> None:
    """A figure whose results are gone must not stay."""
    images = {path.name for path in (ROOT / "docs/images").glob("evidence_*.svg")}
    assert images == {*tables.evidence.page().figures()}


def test_equal_notes_share_a_number() -> None:
    numbers: dict[str, int] = {}
    sharded = no("needs whole weights, and {} shards them", "Use DDP")
    cells = [tables.write_answer(name, sharded, numbers) for name in ("fsdp1", "fsdp2")]
    cells.append(tables.write_answer("ddp", no("waits", "Use one device"), numbers))
    cells.append(tables.write_answer("ddp", YES, numbers))
    assert cells == ["raises (1)", "raises (1)", "raises (2)", "yes"]
    assert tables.write_note(7, "x " * 70).splitlines()[1].startswith("   x")


def test_a_page_without_its_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="begin: contents"):
        tables.rewrite("docs/index.md", read("docs/index.md").replace("begin: contents", "begin: nothing"))
    with pytest.raises(KeyError, match="unknown"):
        tables.rewrite("docs/clipping.md", read("docs/clipping.md") + "<!-- begin: unknown -->\n<!-- end: unknown -->")


def test_catalog_has_every_technique_with_its_arguments() -> None:
    entries = {entry["name"]: entry for entry in json.loads(read("docs/techniques.json"))["techniques"]}
    assert {*entries} == {*TECHNIQUES}
    for name, entry in entries.items():
        assert exists(entry["import"])
        assert [argument["name"] for argument in entry["arguments"]] == list(
            inspect.signature(class_of(name)).parameters
        )
        assert all(argument["help"].endswith(".") for argument in entry["arguments"]), name
        assert {*entry["works_with"]} == {*TITLES}
        assert (ROOT / "docs" / entry["card"]).with_suffix(".md").exists()


def test_list_for_language_models_leads_to_every_page() -> None:
    targets = {Path(target) for target in re.findall(r"\]\(([\w/]+)\.html\)", read("docs/llms.txt"))}
    pages = {page.relative_to(ROOT / "docs").with_suffix("") for page in DOCS}
    assert targets <= pages
    assert {str(page) for page in pages - targets if page.parent.name != "api"} <= {
        "index",
        "changelog",
        "contributing",
        "data_pruning/per_sample_gradients",
    }


def test_findings_about_callbacks_of_lightning_are_of_these_callbacks_and_checks() -> None:
    page = read("docs/testing_callbacks.md")
    advice = "Run `python docs/lightning_callbacks.py`, and check what the text of the page says about its tables."
    assert not findings.outdated(page), advice
    for old, new, what in (
        ("`g5_resumes_within_an_epoch`", "`g5_resumes_within_a_batch`", "names of checks"),
        ("| G5 (5) |", "| G5 (4) |", "head of the summary"),
        ("| `EarlyStopping` |", "| `Timer` |", "callbacks"),
        ("EMAWeightAveraging(decay=0.8)", "EMAWeightAveraging(decay=0.9)", "arguments"),
        ("measured: ModelPruning", "measured: Pruning", "parts"),
    ):
        assert findings.outdated(page.replace(old, new)) == [what]
    for case in findings.CASES:
        assert isinstance(case.build(case.arguments), L.Callback)


def test_refusals_are_read_from_the_code() -> None:
    call = ast.parse('ValueError(f"{self.display_name} has {n} rows. Drop {how}, or {more}.")', mode="eval").body
    assert isinstance(call, ast.Call)
    text = refusals.template_of(call.args[0])
    assert text == "... has ... rows. Drop ..., or ...."
    assert refusals.split_message(text) == ("... has ... rows", "Drop ..., or ....")
    assert refusals.template_of(ast.parse("f'n must be {n}'", mode="eval").body) == ""
    rows = re.findall(r"^\| \.\.\..* \| .*\. \|$", read("docs/troubleshooting.md"), re.MULTILINE)
    assert len(rows) > 40


def test_examples_of_the_scripts_hold() -> None:
    for script in (refusals, catalog, mathml):
        assert doctest.testmod(script).failed == 0


def formulas() -> Iterator[str]:
    """Yield every formula of the documentation and of the docstrings."""
    for page in DOCS:
        text = re.sub(r"^```.*?^```$|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        yield from re.findall(r"\$\$(.+?)\$\$", text, re.DOTALL)
        yield from re.findall(
            r"(?<![\\$])\$([^$\n]+(?:\n[^$\n]+)?)\$", re.sub(r"\$\$.+?\$\$", "", text, flags=re.DOTALL)
        )
    for file in (ROOT / "lightning_grad").rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        yield from re.findall(r":math:`([^`]+)`", text)
        yield from re.findall(r"^ *\.\. math::\n((?:\n| {4,}.*\n)+?)(?=\n {0,7}\S)", text, re.MULTILINE)


def test_formulas_can_be_written_as_mathml() -> None:
    found = [*formulas()]
    assert len(found) > 200
    for formula in found:
        assert mathml.as_mathml(formula.strip(), "block").startswith('<math display="block">')
    for unknown in (r"\unknown x", r"\mathcal{+}"):
        with pytest.raises(mathml.UnknownFormulaError):
            mathml.as_mathml(unknown)


@pytest.mark.parametrize("name", TECHNIQUES)
def test_technique_is_described_in_one_line(name: str) -> None:
    description = tables.description_of(class_of(name))
    assert 20 <= len(description) <= 115
    assert not re.search(r":\w+:|\||\n", description)


def test_functions_that_the_changelog_lists_can_be_imported() -> None:
    entries = [entry for entry in read("CHANGELOG.md").split("\n- ") if entry.startswith("`functional`: ")]
    sentences = [entry.partition(". ")[0] for entry in entries]  # the first of each is the list
    listed = {name for sentence in sentences for name in re.findall(r"`(\w+)`", sentence)} - {"functional"}
    assert len(listed) > 50
    assert not [name for name in sorted(listed) if not hasattr(functional, name)]


@pytest.mark.parametrize("name", TECHNIQUES)
def test_technique_has_a_line_in_the_changelog(name: str) -> None:
    assert re.search(rf"\b{name}\b", read("CHANGELOG.md"))


@pytest.mark.parametrize("family", FAMILIES)
def test_family_has_its_files(family: str) -> None:
    members = [cls.__name__ for cls in FAMILIES[family]]
    for file in (f"examples/{family}.py", f"examples/{family}.yaml", f"docs/{family}.md"):
        text = without_parts(file)
        assert any(re.search(rf"\b{name}\b", text) for name in members), f"{file} shows none of {', '.join(members)}"
    assert (ROOT / f"lightning_grad/functional/{family}").is_dir()


def test_every_page_of_a_family_is_in_its_folder() -> None:
    folders = {page.parent.name for page in DOCS if page.parent != ROOT / "docs"}
    assert folders == {*FAMILIES, "api"}


def test_every_technique_is_named_where_problems_are() -> None:
    page = read("docs/which_technique.md")
    assert not [name for name in TECHNIQUES if f"[`{name}`]({tables.card_of(class_of(name))})" not in page]


@pytest.mark.parametrize("name", TECHNIQUES)
def test_card_is_complete(name: str) -> None:
    card = read_card(name)
    for section in SECTIONS:
        assert re.search(rf"^## {section}", card, re.MULTILINE), f"no section {section!r}"


def told_arguments(docstring: str) -> set[str]:
    """Return the names in the section Args of a docstring."""
    section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", docstring, re.MULTILINE | re.DOTALL)
    names = re.findall(r"^ {4}(\w[\w, ]*):", section[1], re.MULTILINE) if section else []
    return {name.strip() for line in names for name in line.split(",")}


@pytest.mark.parametrize("name", TECHNIQUES)
def test_docstring_tells_every_argument(name: str) -> None:
    told = told_arguments(inspect.getdoc(class_of(name)) or "")
    assert told == {*inspect.signature(class_of(name)).parameters}


def test_an_argument_that_is_not_told_is_found() -> None:
    args = "Args:\n    first: One.\n        More: of it.\n    second, third: Two."
    assert told_arguments(f"Do it.\n\n{args}\n\nRaises:\n    ValueError: Never.") == {"first", "second", "third"}
    assert told_arguments("Do it.\n\nfirst: One.") == set()


@pytest.mark.parametrize("name", TECHNIQUES)
def test_card_has_no_table_of_arguments(name: str) -> None:
    assert "| Argument |" not in read_card(name)


def test_drawing_and_page_name_what_the_code_has() -> None:
    page = read("docs/data_pruning/per_sample_gradients.md")
    folder = ROOT / "lightning_grad/functional/gradients/_ghost"
    code = "".join(file.read_text(encoding="utf-8") for file in folder.glob("*.py"))
    assert re.findall(r"^\d\. \*\*(\w+)\.", page, re.MULTILINE) == list(drawings.CONCEPTS)
    for name in drawings.CONCEPTS:
        assert re.search(rf"^class {name}\b", code, re.MULTILINE)
    shown = {text.get_text() for axis in drawings.draw_per_sample_gradients().axes for text in axis.texts}
    assert {f"{number}  {name}" for number, name in enumerate(drawings.CONCEPTS, 1)} <= shown


@pytest.mark.parametrize("name", BASES)
def test_base_of_strategies_is_told_to_authors(name: str) -> None:
    for file in ("CHANGELOG.md", "docs/communication.md", "docs/api/core.md", "docs/adding_a_technique.md"):
        assert re.search(rf"\b{name}\b", read(file)), f"{file} does not name {name}"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_names_of_a_strategy_are_told(scheme: str) -> None:
    names = [name for name in StrategyRegistry.available_strategies() if _registered(name) is class_of(scheme)]
    assert len(names) == 3
    for text in (read("CHANGELOG.md"), read_card(scheme)):
        assert not [name for name in names if not re.search(rf"\b{name}\b", text)]


def _registered(name: str) -> Any:
    return StrategyRegistry[name]["strategy"]


@pytest.mark.parametrize("package", [functional, utilities], ids=lambda package: package.__name__)
def test_changelog_names_what_is_exported(package: types.ModuleType) -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    functions = [name for name in package.__all__ if isinstance(getattr(package, name), types.FunctionType)]
    assert not [name for name in functions if f"{name}`" not in changelog]


def test_the_first_block_of_the_readme_needs_only_the_package() -> None:
    tree = ast.parse(next(block for block in PYTHON if block.page == "README.md").text)
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    found = {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
    found |= {str(node.module) for node in imports if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in found} == {"lightning", "torch", "lightning_grad"}
