"""Who may import whom; read from the sources, and once from a fresh interpreter."""

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import lightning_grad
from lightning_grad import callbacks, strategies
from lightning_grad.core.switch import VARIABLE

PACKAGE = Path(lightning_grad.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path for path in sorted(PACKAGE.rglob("*.py"))
}
OPTIONAL = {"wandb", "matplotlib", "rich", "sklearn", "jsonargparse"}

_BASE = ("torch", "numpy", "lightning", "typing_extensions")
_LOWER = tuple(f"lightning_grad.{layer}" for layer in ("functional", "data", "utilities", "core"))

_OPTIMIZERS = "lightning_grad.optimizers"
_TECHNIQUES = (*_LOWER, _OPTIMIZERS, "lightning_grad.callbacks", "lightning_grad.strategies")

# What each layer may import beside the standard library, from the lowest to the highest.
ALLOWED = {
    "lightning_grad.functional": ("torch", *_LOWER[:1]),
    "lightning_grad.data": ("torch", "numpy", *_LOWER[:2]),  # numpy: score files
    "lightning_grad.utilities": (*_BASE, *_LOWER[:3]),
    "lightning_grad.core": (*_BASE, *_LOWER),
    "lightning_grad.optimizers": ("torch", _LOWER[0], _LOWER[2], _OPTIMIZERS),
    "lightning_grad.callbacks": (*_BASE, "torchmetrics", *_LOWER, _OPTIMIZERS, "lightning_grad.callbacks"),
    "lightning_grad.strategies": (*_BASE, *_LOWER, "lightning_grad.strategies"),
    "lightning_grad.testing": (*_BASE, *_TECHNIQUES, "lightning_grad.testing"),
    "lightning_grad.cli": (*_BASE, "yaml", "tqdm", *_TECHNIQUES, "lightning_grad.testing", "lightning_grad.cli"),
}
TOP = ("lightning_grad.__init__", "lightning_grad.__main__")  # registers the strategies, and starts the command line
WITHOUT_OPTIONAL = ("lightning_grad.functional", "lightning_grad.data")  # others import optional packages in functions


@functools.cache
def parsed(source: str) -> ast.Module:
    return ast.parse(source)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imported(tree: ast.AST, module: str, in_functions: bool = True) -> Iterator[str]:
    """Yield the names of imported modules, those under TYPE_CHECKING left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*package, *filter(None, [node.module])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif is_type_checking(node):
            yield from imported(ast.Module(node.orelse, []), module, in_functions)
        elif in_functions or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from imported(node, module, in_functions)


def is_within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def outsiders(source: str, module: str, allowed: tuple[str, ...], in_functions: bool) -> list[str]:
    names = imported(parsed(source), module, in_functions)
    known = (*allowed, *sys.stdlib_module_names)
    return [name for name in names if not is_within(name, known) and name != "lightning_grad"]


def offenders(rule: Callable[[str, str], list[str]], *modules: str) -> dict[str, list[str]]:
    """Return what the rule finds in each of the modules, without those where it finds nothing."""
    assert modules
    found = {module: rule(MODULES[module].read_text(), module) for module in modules}
    return {module: names for module, names in found.items() if names}


def test_a_module_that_breaks_a_rule_is_named() -> None:
    module = "lightning_grad.functional.sparsity._group_top"
    assert offenders(lambda _, name: ["torch"] if name == module else [], *MODULES) == {module: ["torch"]}


def test_the_walk_sees_every_module() -> None:
    assert {
        "lightning_grad.__init__",
        "lightning_grad.functional.sparsity._group_top",
        "lightning_grad.callbacks.sparsity.nm_sparsity",
    } <= set(MODULES)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import torch.nn\nfrom torch import Tensor\nimport math, os.path", []),
        ("from lightning_grad.functional import nm_mask", []),
        ("from lightning_grad.functional.sparsity.nm_sparsity import nm_mask", []),
        ("from ._group_top import top_of_groups", []),
        ("import numpy", ["numpy"]),
        ("import lightning.pytorch as pl", ["lightning.pytorch"]),
        ("def f():\n    import numpy", ["numpy"]),
        ("from lightning_grad import utilities", ["lightning_grad.utilities"]),
        ("from lightning_grad.utilities import undo", ["lightning_grad.utilities", "lightning_grad.utilities.undo"]),
        ("from ...utilities import undo", ["lightning_grad.utilities", "lightning_grad.utilities.undo"]),
        ("import torchvision", ["torchvision"]),
        ("if TYPE_CHECKING:\n    import numpy", []),
        ("if typing.TYPE_CHECKING:\n    import numpy\nelse:\n    import wandb", ["wandb"]),
        ("try:\n    import numpy\nexcept ImportError:\n    pass", ["numpy"]),
    ],
)
def test_the_walk_finds_what_is_not_allowed(source: str, found: list[str]) -> None:
    module = "lightning_grad.functional.sparsity.nm_sparsity"
    assert outsiders(source, module, ALLOWED["lightning_grad.functional"], in_functions=True) == found


def test_the_walk_tells_functions_from_the_top_level() -> None:
    source = "class A:\n    import rich\n    def f(self):\n        import wandb"
    assert list(imported(parsed(source), "m", in_functions=False)) == ["rich"]
    assert list(imported(parsed(source), "m")) == ["rich", "wandb"]


def layer_of(module: str) -> str:
    return next(layer for layer in ALLOWED if is_within(module, (layer,)))


def above(source: str, module: str) -> list[str]:
    """Return what a module imports from outside its layer and those below."""
    layer = layer_of(module)
    found = outsiders(source, module, ALLOWED[layer], in_functions=layer in WITHOUT_OPTIONAL)
    ours = [name for name in imported(parsed(source), module) if name.startswith("lightning_grad.")]
    return found + [name for name in ours if not is_within(name, ALLOWED[layer])]


def test_a_layer_imports_only_what_lies_below() -> None:
    assert offenders(above, *(name for name in MODULES if name not in TOP)) == {}


@pytest.mark.parametrize(
    ("module", "source", "found"),
    [
        ("callbacks.clipping.zclip", "from lightning_grad.strategies import DGCStrategy", 2),
        ("callbacks.clipping.zclip", "def f():\n    from lightning_grad.testing import fit", 2),
        ("strategies.dgc", "import lightning_grad.callbacks", 1),
        ("core.quiet", "from lightning_grad.callbacks.clipping.zclip import ZClip", 2),
        ("core.quiet", "from lightning_grad import callbacks", 1),
        ("testing.reference", "from lightning_grad.callbacks import ZClip", 0),
        ("testing.reference", "import pytest", 1),
    ],
)
def test_the_walk_knows_the_layers(module: str, source: str, found: int) -> None:
    module = f"lightning_grad.{module}"
    assert len(outsiders(source, module, ALLOWED[layer_of(module)], in_functions=True)) == found


# Families of techniques: the folders in callbacks and in functional. What a loss and its gradients are made of serves all.

SHARED = "lightning_grad.functional.gradients"


def family_of(name: str) -> str:
    """Return the folder of a module of callbacks or functional, or "" for what lies beside the folders."""
    layer, part = (*name.split("."), "", "")[1:3]
    is_family = (PACKAGE / layer / part).is_dir() and layer in ("callbacks", "functional")
    return f"{layer}.{part}" if part and is_family and not is_within(name, (SHARED,)) else ""


def other_families(source: str, module: str) -> list[str]:
    layer = ".".join(module.split(".")[:2])
    names = [n for n in imported(parsed(source), module) if n.startswith(f"{layer}.")]
    beside = {family_of(module), ""} if layer.endswith("functional") else {family_of(module)}
    return [name for name in names if family_of(name) not in beside]


@pytest.mark.parametrize(
    ("module", "source", "found"),
    [
        ("callbacks.clipping.zclip", "from lightning_grad.callbacks.clipping._units import UnitConditioner", 0),
        ("callbacks.clipping.zclip", "from . import _units", 0),
        ("callbacks.clipping.zclip", "from lightning_grad.callbacks.adversarial import AdversarialTraining", 2),
        ("callbacks.clipping.zclip", "from ..adversarial import AdversarialTraining", 2),
        ("callbacks.clipping.zclip", "def f():\n    from lightning_grad.callbacks import AdversarialTraining", 1),
        ("callbacks.clipping.zclip", "from lightning_grad.callbacks.sparsity.nm_sparsity import NMSparsity", 2),
        ("callbacks.clipping.zclip", "from lightning_grad.functional.sparsity import nm_mask", 0),
        ("callbacks.sparsity.nm_sparsity", "from lightning_grad.callbacks.clipping import ZClip", 2),
        ("callbacks.sparsity.nm_sparsity", "from lightning_grad.callbacks.sparsity._nm_weight import SparseWeight", 0),
        ("functional.clipping.zclip", "from lightning_grad.functional.sparsity import nm_mask", 2),
        ("functional.clipping.zclip", "from lightning_grad.functional.gradients.tensor_lists import joined_norm", 0),
        ("functional.clipping.zclip", "from lightning_grad.functional.shuffling import shuffled", 0),
        ("functional.gradients.calls", "from lightning_grad.functional.sparsity import nm_mask", 2),
    ],
)
def test_the_walk_tells_families_apart(module: str, source: str, found: int) -> None:
    assert len(other_families(source, f"lightning_grad.{module}")) == found


def test_families_do_not_import_each_other() -> None:
    layers = ("lightning_grad.callbacks", "lightning_grad.functional")
    flat = {f"{layer}.__init__" for layer in layers}
    assert offenders(other_families, *(name for name in MODULES if is_within(name, layers) and name not in flat)) == {}


TECHNIQUES = {*callbacks.__all__, *strategies.__all__}


def techniques_named(source: str) -> list[str]:
    """Return the techniques that code names, in an expression or as a whole string; prose may name them."""
    found = []
    for node in ast.walk(parsed(source)):
        name = getattr(node, "id", None) or getattr(node, "attr", None) or getattr(node, "value", None)
        if isinstance(name, str) and name in TECHNIQUES:
            found.append(name)
    return found


def test_the_walk_finds_a_technique_that_code_names() -> None:
    source = (
        '"""ZClip in prose."""\nif type(other).__name__ == "ZClip" or other is callbacks.NMSparsity:\n    DGCStrategy()'
    )
    assert sorted(techniques_named(source)) == ["DGCStrategy", "NMSparsity", "ZClip"]


def test_lower_layers_know_no_technique() -> None:
    lower = (name for name in MODULES if is_within(name, _LOWER))
    assert offenders(lambda source, _: techniques_named(source), *lower) == {}


def optional_at_the_top(source: str, module: str) -> list[str]:
    names = imported(parsed(source), module, in_functions=False)
    return [name for name in names if name.split(".")[0] in OPTIONAL]


def test_optional_packages_are_imported_where_they_are_used() -> None:
    assert optional_at_the_top("import wandb.sdk\ndef f():\n    import rich", "m") == ["wandb.sdk"]
    assert offenders(optional_at_the_top, *MODULES) == {}


def foreign_parts(source: str, module: str) -> list[str]:
    """Return the private names, of modules or in them, that a module imports from another package."""
    found = []
    own = module.rpartition(".")[0]
    for name in imported(parsed(source), module):
        parts = name.split(".")
        private = next((i for i, part in enumerate(parts) if part.startswith("_") and not part.startswith("__")), 0)
        if parts[0] != "lightning_grad" or not private or is_within(module, (".".join(parts[: private + 1]),)):
            continue
        holder = ".".join(parts[:private])
        package = holder if f"{holder}.__init__" in MODULES else holder.rpartition(".")[0]
        if package != own:
            found.append(name)
    return found


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from lightning_grad.functional.sparsity._group_top import top_of_groups", []),
        ("from lightning_grad.functional.sparsity.nm_schedule import _limit", []),
        ("from lightning_grad.utilities._undo import Undo", ["lightning_grad.utilities._undo"] * 2),
        ("from lightning_grad.utilities import _undo", ["lightning_grad.utilities._undo"]),
        ("from lightning_grad.utilities.undo import _Entry", ["lightning_grad.utilities.undo._Entry"]),
        (
            "from lightning_grad.functional.gradients.calls import _Call",
            ["lightning_grad.functional.gradients.calls._Call"],
        ),
        ("from lightning_grad.functional.gradients import __doc__", []),
        ("from torch._C import Node", []),
    ],
)
def test_the_walk_finds_private_names_of_other_packages(source: str, found: list[str]) -> None:
    names = foreign_parts(source, "lightning_grad.functional.sparsity.nm_sparsity")
    assert [name.removesuffix(".Undo") for name in names] == found


def test_a_folder_imports_no_private_name_of_the_package_around_it() -> None:
    source = "from lightning_grad.functional.sparsity._group_top import top_of_groups"
    assert foreign_parts(source, "lightning_grad.functional.gradients.calls") != []
    inside = "from lightning_grad.functional.gradients._ghost.contributions import Binding"
    assert foreign_parts(inside, "lightning_grad.functional.gradients._ghost.rules") == []


def test_private_names_stay_in_their_package() -> None:
    assert offenders(foreign_parts, *MODULES) == {}


# Examples and documentation show what a user may write.

ROOT = PACKAGE.parent
SHOWN = {
    str(path.relative_to(ROOT)): path
    for pattern in ("README.md", "docs/**/*.md", "examples/**/*.py", "studies/**/*.py")
    for path in ROOT.glob(pattern)
    if "_build" not in path.parts
}


def shown_code(path: Path) -> str:
    text = path.read_text()
    if path.suffix == ".py":
        return text
    return "\n".join(re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE))


def test_examples_and_documentation_use_public_names() -> None:
    found = {name: foreign_parts(shown_code(path), "a_user.of_it") for name, path in SHOWN.items()}
    assert {name: names for name, names in found.items() if names} == {}


def test_code_of_a_page_is_read() -> None:
    source = shown_code(SHOWN["docs/adding_a_technique.md"])
    assert any(is_within(name, ("lightning_grad.core",)) for name in imported(parsed(source), "page"))
    assert foreign_parts("from lightning_grad.core.fit import _Attribute", "a_user.of_it") != []


def test_importing_brings_no_optional_package_and_registers_the_strategies() -> None:
    script = f"""
import os, sys, lightning.pytorch
from lightning.pytorch.strategies import StrategyRegistry
before, known = set(sys.modules), set(StrategyRegistry)
import lightning_grad
print(*sorted(set(StrategyRegistry) - known))
from lightning_grad.core.switch import is_named
os.environ[{VARIABLE!r}] = "ZClip"
print(is_named(object))
import lightning_grad.callbacks, lightning_grad.strategies
print(sorted({OPTIONAL!r} & (set(sys.modules) - before)))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True)
    names, is_off, packages = done.stdout.splitlines()
    short = ("ddp_dgc", "ddp_diloco", "ddp_local_sgd", "ddp_onebit_adam", "ddp_powersgd")
    assert names.split() == sorted(name + start for name in short for start in ("", "_fork", "_spawn"))
    assert is_off == "False"  # the name of a callback that the program does not import is no error
    assert packages == "[]"
