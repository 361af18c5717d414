"""Who may import whom; read from the sources, and once from a fresh interpreter."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_grad

PACKAGE = Path(lightning_grad.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path for path in sorted(PACKAGE.rglob("*.py"))
}
OPTIONAL = {"wandb", "matplotlib", "rich", "sklearn", "jsonargparse"}

# Beside the standard library; longest prefix of a module's name first.
ALLOWED = {
    "lightning_grad.functional": ("torch", "lightning_grad.functional"),
    "lightning_grad.data": ("torch", "numpy", "lightning_grad.functional", "lightning_grad.data"),  # numpy: score files
    "lightning_grad.utilities": (
        "torch",
        "numpy",
        "lightning",
        "typing_extensions",
        "lightning_grad.functional",
        "lightning_grad.data",
        "lightning_grad.utilities",
    ),
    "lightning_grad.core": (
        "torch",
        "numpy",
        "lightning",
        "typing_extensions",
        "lightning_grad.functional",
        "lightning_grad.data",
        "lightning_grad.utilities",
        "lightning_grad.core",
    ),
}


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
    names = imported(ast.parse(source), module, in_functions)
    known = (*allowed, *sys.stdlib_module_names)
    return [name for name in names if not is_within(name, known) and name != "lightning_grad"]


def test_the_walk_sees_every_module() -> None:
    assert {
        "lightning_grad.__init__",
        "lightning_grad.functional._group_top",
        "lightning_grad.callbacks.sparsity.nm_sparsity",
    } <= set(MODULES)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import torch.nn\nfrom torch import Tensor\nimport math, os.path", []),
        ("from lightning_grad.functional import nm_mask", []),
        ("from lightning_grad.functional.nm_sparsity import nm_mask", []),
        ("from ._group_top import top_of_groups", []),
        ("import numpy", ["numpy"]),
        ("import lightning.pytorch as pl", ["lightning.pytorch"]),
        ("def f():\n    import numpy", ["numpy"]),
        ("from lightning_grad import utilities", ["lightning_grad.utilities"]),
        ("from lightning_grad.utilities import undo", ["lightning_grad.utilities", "lightning_grad.utilities.undo"]),
        ("from ..utilities import undo", ["lightning_grad.utilities", "lightning_grad.utilities.undo"]),
        ("import torchvision", ["torchvision"]),
        ("if TYPE_CHECKING:\n    import numpy", []),
        ("if typing.TYPE_CHECKING:\n    import numpy\nelse:\n    import wandb", ["wandb"]),
        ("try:\n    import numpy\nexcept ImportError:\n    pass", ["numpy"]),
    ],
)
def test_the_walk_finds_what_is_not_allowed(source: str, found: list[str]) -> None:
    module = "lightning_grad.functional.nm_sparsity"
    assert outsiders(source, module, ALLOWED["lightning_grad.functional"], in_functions=True) == found


def test_the_walk_tells_functions_from_the_top_level() -> None:
    source = "class A:\n    import rich\n    def f(self):\n        import wandb"
    assert list(imported(ast.parse(source), "m", in_functions=False)) == ["rich"]
    assert list(imported(ast.parse(source), "m")) == ["rich", "wandb"]


@pytest.mark.parametrize("module", [name for name in MODULES if is_within(name, tuple(ALLOWED))])
def test_lower_layers_import_only_what_lies_below(module: str) -> None:
    layer = next(layer for layer in ALLOWED if is_within(module, (layer,)))
    anywhere = layer not in {
        "lightning_grad.utilities",
        "lightning_grad.core",
    }  # import optional packages in functions
    assert outsiders(MODULES[module].read_text(), module, ALLOWED[layer], in_functions=anywhere) == []


@pytest.mark.parametrize("module", MODULES)
def test_callbacks_and_strategies_do_not_import_each_other_nor_do_lower_layers_import_them(module: str) -> None:
    names = list(imported(ast.parse(MODULES[module].read_text()), module))
    upper = {"lightning_grad.callbacks", "lightning_grad.strategies"}
    forbidden = upper - {layer for layer in upper if is_within(module, (layer,)) or module == "lightning_grad.__init__"}
    assert [name for name in names if is_within(name, tuple(forbidden))] == []


@pytest.mark.parametrize("module", MODULES)
def test_optional_packages_are_imported_where_they_are_used(module: str) -> None:
    names = imported(ast.parse(MODULES[module].read_text()), module, in_functions=False)
    assert [name for name in names if name.split(".")[0] in OPTIONAL] == []


def foreign_parts(source: str, module: str) -> list[str]:
    """Return the private parts of other packages that a module imports: a part belongs to the package that holds it."""
    found = []
    for name in imported(ast.parse(source), module):
        parts = name.split(".")
        private = next((i for i, part in enumerate(parts) if part.startswith("_") and not part.startswith("__")), 0)
        if parts[0] == "lightning_grad" and private and not is_within(module, (".".join(parts[:private]),)):
            found.append(name)
    return found


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from lightning_grad.functional._group_top import top_of_groups", []),
        ("from lightning_grad.utilities._undo import Undo", ["lightning_grad.utilities._undo"] * 2),
        ("from lightning_grad.utilities import _undo", ["lightning_grad.utilities._undo"]),
        ("from lightning_grad.utilities.undo import _Entry", ["lightning_grad.utilities.undo._Entry"]),
        ("from lightning_grad.functional.gradients import __doc__", []),
        ("from torch._C import Node", []),
    ],
)
def test_the_walk_finds_private_parts_of_other_packages(source: str, found: list[str]) -> None:
    names = foreign_parts(source, "lightning_grad.functional.nm_sparsity")
    assert [name.removesuffix(".Undo") for name in names] == found


@pytest.mark.parametrize("module", [name for name in MODULES if name != "lightning_grad.__init__"])
def test_private_parts_stay_in_their_package(module: str) -> None:
    assert foreign_parts(MODULES[module].read_text(), module) == []


def test_importing_brings_no_optional_package_and_registers_the_strategies() -> None:
    script = f"""
import sys, lightning.pytorch
from lightning.pytorch.strategies import StrategyRegistry
before, known = set(sys.modules), set(StrategyRegistry)
import lightning_grad
print(*sorted(set(StrategyRegistry) - known))
import lightning_grad.callbacks, lightning_grad.strategies
print(sorted({OPTIONAL!r} & (set(sys.modules) - before)))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True)
    names, packages = done.stdout.splitlines()
    short = ("ddp_dgc", "ddp_powersgd")
    assert names.split() == sorted(name + start for name in short for start in ("", "_fork", "_spawn"))
    assert packages == "[]"
