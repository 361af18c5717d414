"""A callback under test on one project, and its runs, each of which is made once and read by several checks.

Checks read runs. They change nothing in them, except that checks of G3 fit the callbacks of two again.
"""

from __future__ import annotations

import copy
import functools
import inspect
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_grad.testing.environment import recorded_warnings
from lightning_grad.testing.project import Built, Project
from lightning_grad.testing.projects import REFERENCE
from lightning_grad.testing.runs import Broken, Run, Watched
from lightning_grad.testing.stopping import StopAfter, StopAt, StopIn
from lightning_grad.testing.watching import Begun, Saver, Watch, saver_on_exception, savers_on_exception

Arguments = Callable[[], dict[str, Any]]
"""A function that returns arguments of the Trainer."""
Change = Callable[[Any], None]
"""A function that changes a module before the fit."""

REFUSALS = (ValueError, TypeError, RuntimeError, NotImplementedError, MisconfigurationException)
"""Errors that say that something is not possible, rather than that code is wrong."""

_KINDS = ("steps", "epochs", "weights")
_ENDS: dict[str, type[BaseException]] = {"exception": RuntimeError, "interrupt": KeyboardInterrupt}
_Method = TypeVar("_Method", bound=Callable[..., Any])


class NotApplicableError(Exception):
    """The check says nothing about this callback on this project; the message says why."""


class RefusedError(Exception):
    """The callback raised before the first batch; the message is that of the error."""


def unchanged(module: Any) -> None:
    """Leave the module as it is."""


def _once(method: _Method) -> _Method:
    """Call a method once for the same arguments; after that, return its result or raise its error again."""
    signature = inspect.signature(method)

    @functools.wraps(method)
    def call(self: Subject, *arguments: Any) -> Any:
        given = signature.bind(self, *arguments)
        given.apply_defaults()  # an argument that is not given is the same as its default
        key = (method.__name__, *given.args[1:])
        if key not in self._done:
            try:
                self._done[key] = method(self, *arguments), None
            except Exception as error:
                self._done[key] = None, error
        result, raised = self._done[key]
        if raised is not None:
            raise raised
        return result

    return call  # type: ignore[return-value]


class Subject:
    """A callback under test on one project.

    Args:
        make: Function that builds a new callback; ``None`` for the runs without one.
        neutral: Function that builds one that does nothing, or the reason why there is none.
        project: The module and its data.
    """

    def __init__(
        self,
        make: Callable[[], Any] | None,
        neutral: Callable[[], Any] | str | None = None,
        project: Project = REFERENCE,
    ) -> None:
        self.make, self.neutral, self.project = make, neutral, project
        self.warned: list[str] = []
        """The warnings of all runs so far, also on variants of the project."""
        self._done: dict[Any, tuple[Any, Exception | None]] = {}

    @functools.cached_property
    def kind(self) -> type:
        """The class of the callback."""
        return type(None if self.make is None else self.make())

    @functools.cached_property
    def root(self) -> Path:
        """A folder that is removed with the subject."""
        root = Path(tempfile.mkdtemp())
        _remove_with(self, root)
        return root

    @property
    def plain(self) -> Subject:
        """The same project without a callback; its runs are shared by all subjects."""
        kept = vars(self.project)  # a dictionary by project would never let go of either
        if "plain" not in kept:
            kept["plain"] = Subject(None, project=self.project)
        return kept["plain"]  # type: ignore[no-any-return]

    @_once
    def on(self, variant: str) -> Subject:
        """Return the same callback on another project that has a feature.

        Raises:
            NotApplicableError: If there is none.
        """
        if variant not in self.project.variants:
            raise NotApplicableError(f"There is no module with {variant.replace('_', ' ')} among the given ones.")
        other = Subject(self.make, self.neutral, self.project.variants[variant])
        other.warned = self.warned
        return other

    def built(self) -> list[Any]:
        """Return a list of a new callback, or of none."""
        return [] if self.make is None else [self.make()]

    # Fits that run at each call.

    def run(
        self,
        callbacks: Sequence[Any] | None = None,
        others: Sequence[Any] = (),
        kind: type = Run,
        change: Change = unchanged,
        **arguments: Any,
    ) -> Any:
        """Fit a new module, and return what that left behind.

        Args:
            callbacks: Default: a new callback.
            others: Callbacks that come after it in the list.
            kind: Class of the run.
            change: Function that changes the module before the fit.
            **arguments: As :meth:`Project.fit` takes them.
        """
        callbacks = self.built() if callbacks is None else list(callbacks)
        built = self.project.make()
        change(built.module)
        start = copy.deepcopy(built.module.state_dict())
        with recorded_warnings() as warned, self._run_folder() as folder:
            given = {"default_root_dir": folder, **arguments}
            trainer, module = self.project.fit_built(built, [*callbacks, *others], **given)
        return self._left(kind, trainer, module, callbacks, warned, start)

    def validate(self, built: Built, callbacks: Sequence[Any], ckpt: Path | None = None) -> None:
        """Validate a module, with the weights of a checkpoint if its path is given."""
        with recorded_warnings() as warned:
            self.project.validate(built, list(callbacks), ckpt)
        self.warned += warned

    def run_or_refuse(self, callbacks: Sequence[Any], others: Sequence[Any] = (), **rest: Any) -> Any:
        """Do what :meth:`run` does.

        Raises:
            RefusedError: If an error of a kind that refuses is raised before the first batch.
        """
        begun = Begun()
        try:
            run = self.run([begun, *callbacks], others, **rest)
        except REFUSALS as error:
            if begun.batches:
                raise
            raise RefusedError(str(error)) from error
        run.callbacks.remove(begun)
        return run

    def run_and_save(
        self, callbacks: Sequence[Any], kinds: Sequence[str] = _KINDS, copying: bool = True, **arguments: Any
    ) -> Watched:
        """Fit, look at module and callback at every step, and save.

        Args:
            callbacks: The callbacks.
            kinds: When to save; see :meth:`Watched.saved`.
            copying: Whether to copy module and callback on the way; without it, only validations are looked at.
            **arguments: As :meth:`Project.fit` takes them.

        Raises:
            RefusedError: Like :meth:`run_or_refuse`.
        """
        folder, monitor = Path(tempfile.mkdtemp()), self.project.monitor
        ways: dict[str, dict[str, Any]] = {
            "steps": {"every_n_train_steps": 2},
            "epochs": {"monitor": monitor, "save_last": True},
            "weights": {"monitor": monitor, "save_weights_only": True},
        }
        watch = Watch(callbacks[0] if callbacks else None, copying)
        savers = [Saver(folder / kind, save_top_k=-1, **ways[kind]) for kind in kinds]
        try:
            run: Watched = self.run_or_refuse(callbacks, [watch, *savers], kind=Watched, **arguments)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        run.watch, run.folder, run.savers = watch, folder, savers
        _remove_with(run, folder)
        return run

    def break_off(self, callbacks: Sequence[Any], how: str) -> Broken:
        """Fit and break off; see :meth:`broken`."""
        stop = StopIn("on_fit_start", 0) if how == "in on_fit_start" else StopAt(self.middle(), _ENDS[how])
        built = self.project.make()
        with recorded_warnings() as warned, _folder() as folder:
            savers = savers_on_exception(folder) if how == "exception" else []
            with _stopped_by(stop):
                self.project.fit_built(built, [*callbacks, stop, *savers], default_root_dir=folder)
            broken: Broken = self._left(Broken, stop.trainer, built.module, callbacks, warned)
            if how == "exception":
                with suppress(Exception):  # the check finds no checkpoint
                    broken.trainer.save_checkpoint(folder / "by_hand.ckpt")
            broken.saved = {path.stem: torch.load(path, weights_only=False) for path in folder.glob("*.ckpt")}
        return broken

    def _left(self, kind: type, trainer: Any, module: Any, callbacks: Any, warned: list[str], start: Any = None) -> Any:
        self.warned += warned
        own = [callback for callback in callbacks if not isinstance(callback, Begun)]
        states = [self._state_of(callback) for callback in own]
        return kind(trainer, module, list(callbacks), states, warned, start)

    @contextmanager
    def _run_folder(self) -> Iterator[Path]:
        """Make an empty folder with the same path for each run: states of checkpoint callbacks hold paths."""
        folder = self.root / f"{os.getpid()}"  # ranks that are forked share the rest of it
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _state_of(self, callback: Any) -> Any:
        """Return the state, or the words of its error; other checks report that saving fails."""
        try:
            return copy.deepcopy(callback.state_dict())
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    # Fits that run once for the same arguments.

    @_once
    def bare(self, accumulate: int = 1) -> Run:
        """Fit with the callback and nothing else."""
        return self.run(accumulate_grad_batches=accumulate)  # type: ignore[no-any-return]

    @_once
    def watched(self, accumulate: int = 1) -> Watched:
        """Fit, look at module and callback at every step, and save wherever Lightning saves.

        With gradients accumulated, no check reads more than the checkpoints of every second step.
        """
        rest: dict[str, Any] = {} if accumulate == 1 else {"kinds": ["steps"], "copying": False}
        return self.run_and_save(self.built(), accumulate_grad_batches=accumulate, **rest)

    @_once
    def situated(self, arguments: Arguments = dict, change: Change = unchanged) -> Run:
        """Fit with arguments of the Trainer, after a change of the module.

        Raises:
            RefusedError: Like :meth:`run_or_refuse`.
        """
        return self.run_or_refuse(self.built(), change=change, **arguments())  # type: ignore[no-any-return]

    @_once
    def broken(self, how: str) -> Broken:
        """Fit and break off.

        Args:
            how: ``"exception"`` or ``"interrupt"`` at step :meth:`middle`, or ``"in on_fit_start"``.

        Raises:
            NotApplicableError: If the callback ends the run before that.
        """
        return self.break_off(self.built(), how)

    @_once
    def resumed(self, kind: str, index: int, accumulate: int) -> Run:
        """Resume from a checkpoint of the watched run."""
        path = list(self.watched(accumulate).saved(kind).values())[index]
        return self.run(ckpt=path, accumulate_grad_batches=accumulate)  # type: ignore[no-any-return]

    @_once
    def continued(self, steps: tuple[int, ...]) -> Run:
        """Break off at the end of one step after the other, resume from what that saved each time, and come to the end.

        Raises:
            NotApplicableError: If the callback ends the run before one of the steps.
        """
        path: Any = None
        with _folder() as folder:
            for step in steps:
                stop, saver = StopAfter(step), saver_on_exception(folder, str(step))
                with _stopped_by(stop):
                    self.run(others=[stop, saver], ckpt=path)
                saver.raise_error()
                path = folder / f"{step}.ckpt"
            return self.run(ckpt=path)  # type: ignore[no-any-return]

    def middle(self) -> int:
        """Return an even step within an epoch, past the middle of the run."""
        steps = int(self.bare().left["steps"])
        return 2 * ((steps // 2 + max(steps // 12, 1) + 1) // 2)


def _remove_with(owner: object, folder: Path) -> None:
    """Remove a folder when its owner is gone, but not with a copy of the owner in a forked process."""
    process = os.getpid()

    def remove() -> None:
        if os.getpid() == process:
            shutil.rmtree(folder, ignore_errors=True)

    weakref.finalize(owner, remove)


@contextmanager
def _stopped_by(stop: StopIn) -> Iterator[None]:
    """Go on after the block if ``stop`` ended it, and raise any other error."""
    try:
        yield
    except (RuntimeError, SystemExit) as error:
        if stop.trainer is None or not (isinstance(error, SystemExit) or "on purpose" in str(error)):
            raise
    if stop.trainer is None:
        raise NotApplicableError(f"It ends the run before step {stop.step}.")


@contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)
