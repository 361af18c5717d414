"""The code on which the results of a claim depend, and its digest, which no other code changes.

From the class of a claim, names lead to the functions, classes and constants of this repository that it uses, and from these
to others. An import through the ``__init__.py`` of a package leads to where a name is defined, so a new technique changes
only the digests of the claims that use it. Comments and docstrings do not count.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.util import resolve_name
from pathlib import Path
from types import ModuleType
from typing import Any

from studies import ROOT
from studies.claim import Claim

HOMES = dict.fromkeys(("lightning_grad", "studies", "benchmarks", "tests"), ROOT)
HOMES["plain_project"] = ROOT / "examples"
WHOLE, REST = "", "*"  # in place of a name: all of a module, or its statements that define no name
CLAIM = ("studies.claim", "Claim")
# The fields by which a claim is told or judged.
WORDS = ("text", "paper", "about", "default_data", "margin", "margins", "scale", "unit", "seeds", "budget")
Place = tuple[str, str]  # a module, and a name that it defines


def digest_of(claim: Claim[Any]) -> str:
    """Return a short digest of the code on which the results of a claim depend."""
    return _code_of((type(claim), *claim.code_roots()))[0]


def files_of(claim: Claim[Any]) -> tuple[str, ...]:
    """Return the files of the code on which the results of a claim depend."""
    return _code_of((type(claim), *claim.code_roots()))[1]


@cache
def _code_of(roots: tuple[Any, ...]) -> tuple[str, tuple[str, ...]]:
    text = "\n".join(root for root in roots if isinstance(root, str))
    places = [place_of(root) for root in roots if not isinstance(root, str)]
    return repository().digest(places, text), tuple(map(str, repository().files(places)))


@cache
def repository() -> Code:
    """Return the code of this repository."""
    return Code(HOMES)


def place_of(root: Any) -> Place:
    """Return where a class, a function or a module is defined.

    Example:
        >>> place_of(Claim), place_of(ast)
        (('studies.claim', 'Claim'), ('ast', ''))
    """
    if isinstance(root, ModuleType):
        return root.__name__, WHOLE
    return root.__module__, root.__qualname__.partition(".")[0]


@dataclass
class Module:
    """The statements at the top of a module.

    Args:
        name: Its dotted name.
        path: Its file.
        package: The package in which its imports are relative.
        defined: The statements that define each name.
        imported: Where each imported name comes from.
        stars: The modules of which it imports all names.
        rest: The other statements, and functions that a decorator of this repository may register.
    """

    name: str
    path: Path
    package: str
    defined: dict[str, list[ast.stmt]] = field(default_factory=dict)
    imported: dict[str, Place] = field(default_factory=dict)
    stars: list[str] = field(default_factory=list)
    rest: list[ast.stmt] = field(default_factory=list)

    def add(self, statement: ast.stmt) -> None:
        """Add a statement."""
        if isinstance(statement, (ast.Import, ast.ImportFrom)):
            found = dict(imports(statement, self.package))
            self.stars += [module for name, (module, _) in found.items() if name == "*"]
            self.imported |= {name: place for name, place in found.items() if name != "*"}
        elif isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            self.defined.setdefault(statement.name, []).append(statement)
        elif isinstance(statement, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
            for name in assigned(statement):
                self.defined.setdefault(name, []).append(statement)
        elif not is_for_types(statement) and not is_text(statement):
            self.rest.append(statement)
            for inner in ast.walk(statement):
                if isinstance(inner, ast.stmt) and inner is not statement:
                    self.add(inner)


class Code:
    """The modules of some packages, read when they are needed.

    Args:
        homes: The folder of each package.
    """

    def __init__(self, homes: Mapping[str, Path]) -> None:
        self.homes = homes
        self._read: dict[str, Module | None] = {}
        self._known: dict[Place, tuple[str, list[Place]]] = {}  # the text of each place, and the places that it uses

    def digest(self, roots: Iterable[Place], text: str = "") -> str:
        """Return a short digest of a text and of all code that some places use."""
        written = [f"{'.'.join(place)}\n{self.known(place)[0]}" for place in sorted(self.reached(roots))]
        return hashlib.sha256("\n".join([text, *written]).encode()).hexdigest()[:12]

    def files(self, roots: Iterable[Place]) -> list[Path]:
        """Return the files of all code that some places use."""
        names = sorted({module for module, _ in self.reached(roots)})
        return [known.path for known in map(self.module, names) if known]

    def reached(self, roots: Iterable[Place]) -> set[Place]:
        """Return all places that some places use, and these."""
        found: set[Place] = set()
        todo = [place for root in roots if (place := self.find(*root))]
        while todo:
            place = todo.pop()
            if place not in found:
                found.add(place)
                todo += self.known(place)[1]
        return found

    def known(self, place: Place) -> tuple[str, list[Place]]:
        """Return the text of a place, and the places that it uses."""
        if place not in self._known:
            self._known[place] = "".join(map(written_out, self.statements(*place))), list(self.uses(*place))
        return self._known[place]

    def statements(self, module: str, name: str) -> list[ast.stmt]:
        """Return the statements of a place."""
        known = self.module(module)
        if known is None:
            return []
        if name == WHOLE:
            return [*(each for own in known.defined.values() for each in own), *known.rest]
        found = known.rest if name == REST else known.defined[name]
        return [without_words(each) for each in found] if self.is_claim(module, name) else found

    def is_claim(self, module: str, name: str) -> bool:
        """Return True for the class of all claims, and for those that derive from it."""
        if (module, name) == CLAIM or (known := self.module(module)) is None:
            return (module, name) == CLAIM
        classes = [each for each in known.defined.get(name, ()) if isinstance(each, ast.ClassDef)]
        bases = {place for each in classes for base in each.bases for place in self._named(known, base)}
        return any(self.is_claim(*base) for base in bases - {(module, name)})

    def uses(self, module: str, name: str) -> Iterator[Place]:
        """Yield the places that a place uses."""
        known = self.module(module)
        if known is None:
            return
        for statement in self.statements(module, name):
            yield from self._named(known, statement)
        if name == WHOLE:
            yield from filter(None, (self.find(*place) for place in known.imported.values()))
            yield from ((star, WHOLE) for star in known.stars)
        elif name != REST:
            yield module, REST
            yield from ((module, other) for other in known.defined if self._is_registered(known, other))

    def _named(self, module: Module, node: ast.AST) -> Iterator[Place]:
        """Yield the places that a part of a module names."""
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found = [place for _, place in imports(node, module.package)]
            if isinstance(node, ast.Import):
                found += [(alias.name, WHOLE) for alias in node.names]  # import a.b in a function: all of both
            yield from filter(None, (self.find(*place) for place in found))
        elif place := self._target(module, node):
            yield place
        else:
            for child in ast.iter_child_nodes(node):
                yield from self._named(module, child)

    def _target(self, module: Module, node: ast.AST) -> Place | None:
        """Return the place that ``name`` or ``module.name`` means."""
        if isinstance(node, ast.Name):
            return self.find(module.name, node.id)
        if isinstance(node, ast.Attribute) and (outer := self._target(module, node.value)) and outer[1] == WHOLE:
            return self.find(outer[0], node.attr)
        return None

    def _is_registered(self, module: Module, name: str) -> bool:
        """Return True if a decorator of these packages may keep a function that nothing names."""
        decorators = [each for own in module.defined[name] for each in getattr(own, "decorator_list", ())]
        return any(place for each in decorators for place in self._named(module, each))

    def find(self, module: str, name: str) -> Place | None:
        """Return where a name of a module is defined, or None if it is not in these packages."""
        known = self.module(module)
        if known is None:
            return None
        if name in (WHOLE, REST):
            return module, WHOLE
        if known.imported.get(name, (module, name)) != (module, name):
            return self.find(*known.imported[name])
        if name in known.defined:
            return module, name
        inner = f"{module}.{name}"
        return next(filter(None, (self.find(star, name) for star in known.stars)), None) or self.find(inner, WHOLE)

    def module(self, name: str) -> Module | None:
        """Return a module, or None if it is not in these packages."""
        if name not in self._read:
            self._read[name] = self._parse(name)
        return self._read[name]

    def _parse(self, name: str) -> Module | None:
        home, stem = self.homes.get(name.partition(".")[0]), name.replace(".", "/")
        for path in (home / f"{stem}.py", home / stem / "__init__.py") if home else ():
            if path.is_file():
                module = Module(name, path, name if path.stem == "__init__" else name.rpartition(".")[0])
                for statement in ast.parse(path.read_bytes()).body:
                    module.add(statement)
                return module
        return None


def imports(node: ast.Import | ast.ImportFrom, package: str) -> Iterator[tuple[str, Place]]:
    """Yield the names that an import binds, and what they are.

    Example:
        >>> list(imports(ast.parse("from .claim import Run as Training").body[0], "studies"))
        [('Training', ('studies.claim', 'Run'))]
    """
    for alias in node.names:
        if isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), package)
            yield alias.asname or alias.name, (module, alias.name)
        elif alias.asname:
            yield alias.asname, (alias.name, WHOLE)
        else:
            yield alias.name.partition(".")[0], (alias.name.partition(".")[0], WHOLE)


def assigned(statement: ast.Assign | ast.AnnAssign | ast.AugAssign) -> list[str]:
    """Return the names that a statement assigns."""
    targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
    return [node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)]


def is_for_types(statement: ast.stmt) -> bool:
    """Return True for ``if TYPE_CHECKING:``."""
    return (
        isinstance(statement, ast.If) and isinstance(statement.test, ast.Name) and statement.test.id == "TYPE_CHECKING"
    )


def is_text(statement: Any) -> bool:
    """Return True for a text that stands alone, as docstrings do."""
    alone = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    return alone and isinstance(statement.value.value, str)


def without_words(statement: ast.stmt) -> ast.stmt:
    """Return the class of a claim without the fields by which it is told or judged: no training reads them."""
    if not isinstance(statement, ast.ClassDef):
        return statement
    fields = {key: value for key, value in ast.iter_fields(statement) if key != "body"}
    return ast.ClassDef(**fields, body=[each for each in statement.body if not is_word(each)])


def is_word(statement: Any) -> bool:
    """Return True for a field of :data:`WORDS`."""
    return isinstance(statement, ast.AnnAssign) and assigned(statement)[:1] in [[word] for word in WORDS]


def written_out(node: Any) -> str:
    """Return a syntax tree as text, the same in all versions of Python (``ast.dump`` is not), without docstrings.

    Example:
        >>> written_out(ast.parse("x = 1  # one").body[0])
        "Assign(targets=[Name(id='x')],value=Constant(value=1))"
    """
    if isinstance(node, list):
        return f"[{','.join(written_out(each) for each in node if not is_text(each))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = [(key, value) for key, value in ast.iter_fields(node) if key not in ("ctx", "kind", "type_comment")]
    told = [f"{key}={written_out(value)}" for key, value in fields if value is not None and value != []]
    return f"{type(node).__name__}({','.join(told)})"
