"""One entry a technique and setting: all that the contract suite needs beside the class itself.

What a technique works with, how it is tried and what makes it do nothing stand on its class: ``compatibility``, ``trial`` and
``neutral``. Entries stand beside the tests of a family, in ``tests/callbacks/<family>/contract.py`` and
``tests/strategies/contract.py``; ``settings.py`` and ``strategy_settings.py`` collect them.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

from lightning_grad import callbacks, strategies
from lightning_grad.core import Compatibility, MonitoredCallback, ProbeCallback
from lightning_grad.testing import make_classifier


@dataclass(frozen=True, eq=False)
class Entry:
    """How the suite builds one setting of a class. Each is one of a kind, so that runs are kept by it.

    Args:
        name: The exported class.
        variant: What is special about this setting.
        arguments: Constructor arguments, as YAML could hold them. Default: ``trial`` of the class.
        neutral: Which of them to change so that it does nothing, or the reason why nothing does that. Default: ``neutral`` of
            the class; of a variant, ``None``: no test.
        wrong: Pairs of wrong constructor arguments and a piece of the error.
    """

    package: ClassVar[ModuleType]

    name: str
    variant: str = ""
    arguments: Mapping[str, Any] = None  # type: ignore[assignment]
    neutral: Mapping[str, Any] | str | None = None
    wrong: tuple[tuple[Mapping[str, Any], str], ...] = ()

    def __post_init__(self) -> None:
        if self.arguments is None:
            object.__setattr__(self, "arguments", self.kind.trial)
        if self.neutral is None and not self.variant:
            object.__setattr__(self, "neutral", self.kind.neutral)

    @property
    def kind(self) -> Any:
        """The class."""
        return getattr(self.package, self.name)

    @property
    def family(self) -> str:
        """The folder of the class."""
        return str(self.kind.__module__).split(".")[2]

    @property
    def class_path(self) -> str:
        """Where YAML finds it."""
        return f"{self.package.__name__}.{self.name}"

    @property
    def has_neutral(self) -> bool:
        """Whether there is a setting that does nothing."""
        return isinstance(self.neutral, Mapping)

    def build(self, **changes: Any) -> Any:
        """Make the callback or strategy."""
        return self.kind(**copy.deepcopy({**self.arguments, **changes}))

    def build_neutral(self) -> Any:
        """Make one that does nothing."""
        assert isinstance(self.neutral, Mapping)
        # An entry may leave the head to a second instance; whole is what a user makes neutral.
        return self.kind(**copy.deepcopy({**(self.arguments if self.variant else self.kind.trial), **self.neutral}))

    @property
    def works_with(self) -> Compatibility:
        """What this setting works with."""
        return self.build().works_with()  # type: ignore[no-any-return]

    def __str__(self) -> str:
        return "-".join(part for part in (self.name, self.variant) if part)


@dataclass(frozen=True, eq=False)
class Technique(Entry):
    """How the suite builds one setting of a callback.

    Args:
        second: Arguments of a second instance that works beside the first; ``None`` if two make no sense.
        needs_end: Arguments with which it must know the end of the run; ``None`` if it never must.
        compile: Whether this setting gives a compiler something else to trace than its neighbours.
        broad: Whether it goes through everything. Another setting of a mechanism that a neighbour covers is held to
            neutrality, resuming, checkpoints and the rest of what its setting could break.
        together: Whether it is one of the many that are run together.
    """

    package: ClassVar[ModuleType] = callbacks

    second: Mapping[str, Any] | None = None
    needs_end: Mapping[str, Any] | None = None
    compile: bool = False
    broad: bool = True
    together: bool = False

    @property
    def chooses(self) -> bool:
        """Whether this setting chooses parameters by their names."""
        return bool(getattr(self.build(), "moves_matrices", True))

    @property
    def observes(self) -> bool:
        """Whether it changes nothing in a run in which nothing goes wrong."""
        return self.neutral == {}

    @property
    def decides(self) -> bool:
        """Whether it acts at validations.

        Of a run that resumes behind its last step, Lightning runs nothing, and so not the validation that was due there.
        """
        return isinstance(self.build(), MonitoredCallback | ProbeCallback)


def conditioner(name: str, variant: str = "", arguments: Mapping[str, Any] | None = None, **rest: Any) -> Technique:
    """Return the entry of a technique that acts on chosen parameters; it leaves the head to a second instance."""
    given = getattr(callbacks, name).trial if arguments is None else arguments
    second = {**given, "include": ["head"], "name": "head"}
    return Technique(name, variant, arguments={**given, "exclude": ["head"]}, second=second, **rest)


@dataclass(frozen=True, eq=False)
class Scheme(Entry):
    """How the suite builds one setting of a strategy.

    Args:
        optimizer: Which of the projects' optimizers it trains with.
        broad: Whether it goes through everything; see :class:`Technique`.
    """

    package: ClassVar[ModuleType] = strategies

    optimizer: str = "sgd"
    broad: bool = True

    @property
    def is_local(self) -> bool:
        """Whether ranks train apart and exchange weights."""
        return bool(getattr(self.build(), "has_local_steps", False))

    @property
    def syncs(self) -> str:
        """Why it waits for the device in a step; empty if it does not."""
        return str(getattr(self.build(), "syncs_per_step", ""))

    def module(self) -> Any:
        """Make the module that it trains; seeds before it is constructed."""
        return make_classifier(optimizer=self.optimizer)


def collect(modules: list[ModuleType], package: ModuleType) -> tuple[list[Any], list[Any]]:
    """Return all entries, and the first of each exported class that can be made.

    Raises:
        LookupError: If an exported class has none.
    """
    entries = [entry for module in modules for entry in module.ENTRIES]
    kinds = {name: getattr(package, name) for name in package.__all__}
    first = {entry.name: entry for entry in reversed(entries)}
    names = [name for name, kind in kinds.items() if not inspect.isabstract(kind)]
    missing = [name for name in names if name not in first]
    if missing:
        raise LookupError(f"{missing[0]} has no contract entry. Add one to contract.py beside the tests of its family.")
    return entries, [first[name] for name in names]
