"""The user's project, from a function or from a config of LightningCLI, with short loaders."""

import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import lightning.pytorch as pl

from lightning_grad.cli.check.short_data import shortened
from lightning_grad.testing import Project

_ENDINGS = (".yaml", ".yml", ".json")


class TargetError(Exception):
    """The project cannot be tried, for a reason that the message says."""


class Run(NamedTuple):
    """A new module, the arguments of ``Trainer.fit`` that hold its data, and the user's arguments of the Trainer.

    ``batches`` is the length of an epoch, which is 0 if the loaders are not shortened yet.
    """

    module: pl.LightningModule
    data: dict[str, Any]
    arguments: dict[str, Any]
    batches: int = 0


class Source(Protocol):
    """Builds the user's project, each time from the same seed."""

    def make(self) -> Run:
        """Return a new module with its data."""


def source_of(target: str) -> Source:
    """Return the project that a command names.

    Args:
        target: Path of a config of LightningCLI, or ``package.module:function``.

    Raises:
        TargetError: If it is neither.
    """
    sys.path.insert(0, str(Path.cwd()))  # as `python -m` does
    if target.endswith(_ENDINGS):
        from lightning_grad.cli.check.config import ConfigSource

        return ConfigSource(target)
    path, _, name = target.partition(":")
    if not path or not name:
        raise TargetError(
            f"{target!r} names no project. Give the YAML file of a LightningCLI, or package.module:function, where the "
            "function returns (module, train_loader), (module, train_loader, validation_loader) or (module, datamodule)."
        )
    return FunctionSource(target)


class FunctionSource:
    """A project that a function builds.

    Args:
        target: ``package.module:function``.

    Raises:
        TargetError: If there is no such function.
    """

    def __init__(self, target: str) -> None:
        path, _, name = target.partition(":")
        try:
            module = importlib.import_module(path)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{path}.".startswith(f"{error.name}."):
                raise  # the module exists, and an import in it fails
            dotted = path.removesuffix(".py").strip("./").replace("/", ".")
            hint = "" if dotted == path else f" Write a module as in an import: {dotted}:{name}."
            raise TargetError(f"there is no module {path!r} (searched from {os.getcwd()}).{hint}") from None
        found: Any = module
        for part in name.split("."):
            found = getattr(found, part, None)
        if not callable(found):
            raise TargetError(f"module {path!r} has no function {name!r}.")
        required = [each.name for each in _parameters_of(found) if each.default is each.empty]
        if required:
            raise TargetError(f"{target} needs {', '.join(required)}. Name a function that needs no arguments.")
        self._project = Project(found, name=target)

    def make(self) -> Run:
        """Call the function after seeding."""
        try:
            built = self._project.make()
        except TypeError as error:
            if str(error).startswith(f"{self._project.name} returned"):
                raise TargetError(str(error)) from None
            raise
        return Run(built.module, built.data, {})


def _parameters_of(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """Return the parameters of a function, without ``*args`` and ``**kwargs``."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # a class of another language may have no signature
        return []
    return [each for each in parameters if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]


class ShortProject:
    """A project whose loaders are short, and whose datamodule is set up once.

    Args:
        source: Builds the project.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._length = 0
        self._datamodule: pl.LightningDataModule | None = None

    def make(self, batches: int, ranks: int = 1) -> Run:
        """Return a new module, and loaders with so many batches for each rank, in training and in validation.

        With accumulation, an epoch has at least two optimizer steps.
        """
        module, data, arguments, _ = self._source.make()
        accumulated = arguments.get("accumulate_grad_batches") or 1
        batches = max(batches, 2 * accumulated if accumulated > 1 else 1)
        self._length = ranks * batches
        self._shorten_hooks(module)
        short = {key: self._cut(loaders) for key, loaders in data.items() if key != "datamodule"}
        if data.get("datamodule") is not None:
            short["datamodule"] = self._shared(data["datamodule"])
        return Run(module, short, arguments, batches)

    def _cut(self, loaders: Any) -> Any:
        return shortened(loaders, self._length)

    def _shorten_hooks(self, holder: pl.LightningModule | pl.LightningDataModule) -> None:
        for name in ("train_dataloader", "val_dataloader"):
            _wrap(holder, name, lambda hook: self._cut(hook()))

    def _shared(self, datamodule: pl.LightningDataModule) -> pl.LightningDataModule:
        """Return the first datamodule. It is set up once, because that may load or tokenize a data set."""
        if self._datamodule is None:
            self._datamodule = datamodule
            self._shorten_hooks(datamodule)
            for name in ("prepare_data", "setup"):
                _wrap(datamodule, name, _Once())
            _wrap(datamodule, "teardown", lambda hook, *_, **__: None)
        return self._datamodule


class _Once:
    """Calls a hook the first time only."""

    def __init__(self) -> None:
        self._is_done = False

    def __call__(self, hook: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        if not self._is_done:
            hook(*args, **kwargs)
            self._is_done = True


def _wrap(holder: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Replace a hook on the instance; Lightning still sees whether the user overrides it."""
    hook = getattr(holder, name)

    @functools.wraps(hook)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(hook, *args, **kwargs)

    holder.__dict__[name] = wrapped
