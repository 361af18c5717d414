"""The digest of a claim follows the code that its trainings run, and nothing else."""

import doctest
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from studies import claim, common, sources
from studies.claim import Claim
from studies.claims import CLAIMS
from studies.sources import Code, digest_of, files_of, place_of, repository
from tests.studies.toy import Toy

FILES = {
    "__init__": "from package.one import *\nfrom package.two import *\n",
    "one": '"""One."""\nfrom package.base import Base\nclass One(Base):\n    """Do."""\n    rate = 1\n',
    "two": "from package.base import Base\nclass Two(Base):\n    rate = 2\n",
    "base": """
from package import maths as m
LIMIT = 3
class Base:
    def go(self):
        return m.square(LIMIT)
""",
    "maths": "HALF = 0.5\ndef square(x):\n    return x * x\ndef cube(x):\n    return x * HALF\n",
    "late": "def late():\n    from package import Two\n    return Two\n",
    "dotted": "def dotted():\n    import package.maths\n    return package.maths.cube\n",
    "types": """
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from package.two import Two
def f(x: Two): ...
""",
    "kept": """
from package.maths import cube
RULES = []
@cube
def rule():
    return 1
def all_rules():
    return RULES
""",
    "all": "import package\nfrom package import one, two\ndef find(name):\n    return getattr(package, name)\n",
}


@pytest.fixture
def digest(tmp_path: Path) -> Callable[..., str]:
    """Return a function that writes the files, one of them with a change, and returns the digest of a place."""

    def write(module: str, name: str, file: str = "one", old: str = "", new: str = "") -> str:
        (tmp_path / "package").mkdir(exist_ok=True)
        for stem, text in FILES.items():
            assert old in text or stem != file
            changed = text.replace(old, new, 1) if stem == file else text
            (tmp_path / f"package/{stem}.py").write_text(changed)
        return Code({"package": tmp_path}).digest([(module, name)])

    return write


ONE = ("package", "One")


@pytest.mark.parametrize(
    ("place", "file", "old", "new"),
    [
        (ONE, "one", "rate = 1", "rate = 9"),
        (ONE, "base", "LIMIT = 3", "LIMIT = 4"),
        (ONE, "maths", "x * x", "x * x * x"),  # through two imports, by an attribute of a module
        (ONE, "base", "LIMIT = 3", "LIMIT = 3\nprint(LIMIT)"),  # runs when the module is imported
        (("package.late", "late"), "two", "rate = 2", "rate = 9"),  # an import in a function, through the package
        (("package.dotted", "dotted"), "maths", "x * HALF", "x"),  # the same, by a dotted name
        (("package.kept", "all_rules"), "kept", "return 1", "return 2"),  # no name leads from one to the other
        (("package.all", "find"), "one", "rate = 1", "rate = 9"),  # the whole package, by getattr
        (("package.maths", ""), "maths", "x * HALF", "x"),
    ],
)
def test_code_that_is_used_changes_the_digest(digest: Any, place: Any, file: str, old: str, new: str) -> None:
    assert digest(*place) != digest(*place, file, old, new)


@pytest.mark.parametrize(
    ("place", "file", "old", "new"),
    [
        (ONE, "two", "rate = 2", "rate = 9"),  # another technique of the package
        (ONE, "__init__", "", "from package.late import *\n"),
        (ONE, "maths", "x * HALF", "x"),  # another function of a module that it uses
        (ONE, "base", "LIMIT = 3", "\n# Of a step.\nLIMIT   =  3  # steps"),
        (ONE, "one", '"""One."""', '"""Another."""'),
        (ONE, "one", '    """Do."""\n', ""),
        (("package.types", "f"), "two", "rate = 2", "rate = 9"),  # an import for types alone
    ],
)
def test_other_code_comments_and_docstrings_do_not(digest: Any, place: Any, file: str, old: str, new: str) -> None:
    assert digest(*place) == digest(*place, file, old, new)


def modules_of(asked: Claim[Any]) -> set[str]:
    """Return the modules that define what a claim uses."""
    return {module for module, _ in repository().reached([place_of(type(asked))])}


def test_claims_depend_on_their_techniques_and_on_no_others() -> None:
    clipping, sparse = modules_of(CLAIMS["clipping"]), modules_of(CLAIMS["sparsity"])
    assert {"lightning_grad.callbacks.clipping.zclip", "plain_project.data", "studies.claim"} <= clipping
    assert {"lightning_grad.callbacks.sparsity.nm_sparsity", "lightning_grad.core.weights"} <= sparse
    assert not [module for module in clipping if "sparsity" in module or "data_pruning" in module]
    assert not [module for module in sparse if "clipping.zclip" in module]
    for name in ("studies.results", "studies.runner", "studies.report", "lightning_grad.cli"):
        assert not [module for each in CLAIMS.values() for module in modules_of(each) if module.startswith(name)]


def test_a_claim_of_a_derived_class_depends_on_its_base() -> None:
    assert ("studies.claims.data_pruning", "Labelled") in repository().reached([place_of(type(CLAIMS["label-errors"]))])


def test_files_are_those_of_the_code() -> None:
    files = [Path(file) for file in files_of(CLAIMS["label-errors"])]
    assert all(file.is_file() for file in files)
    names = {file.name for file in files}
    assert {"label_errors.py", "data_pruning.py", "claim.py", "common.py", "cifar10.py"} <= names
    assert not names & {"page.py", "runner.py", "zclip.py", "results.py"}


def test_what_a_claim_names_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    digests = []
    for added in ((), ("text",), ("other text",), (common.hush,), (common,), (claim.Run,)):
        monkeypatch.setattr(Toy, "code_roots", lambda self, added=added: added)
        digests.append(digest_of(Toy()))
    assert len(set(digests[:-1])) == 5
    assert digests[-1] == digests[0], "every claim uses it anyway"


@pytest.mark.parametrize("field", ["text: str = 'Is better.'", "paper: Any = None", "margins: Any = None"])
def test_how_a_claim_is_told_and_judged_changes_no_result(tmp_path: Path, field: str) -> None:
    (tmp_path / "studies").mkdir()
    digests = []
    for fields in ("epochs: int = 3", f"epochs: int = 3\n    {field}", "epochs: int = 4"):
        (tmp_path / "studies/claim.py").write_text("class Claim:\n    name: str\n")
        (tmp_path / "studies/made.py").write_text(
            f"from studies.claim import Claim\nclass Base(Claim[None]): ...\nclass Made(Base):\n    {fields}\n"
        )
        code = Code({"studies": tmp_path})
        digests.append(code.digest([("studies.made", "Made")]))
    assert digests[0] == digests[1] != digests[2]


def test_examples_of_the_module_hold() -> None:
    assert doctest.testmod(sources).failed == 0
