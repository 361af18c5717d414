"""One short fit of the user's project, with a technique or without one."""

import io
import logging
import math
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import chdir, contextmanager, redirect_stdout
from typing import Any

import torch
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_grad.cli.catalog import is_strategy
from lightning_grad.cli.check.outcome import Outcome, outcome_of
from lightning_grad.cli.check.short_trainer import callbacks_of, short_trainer
from lightning_grad.cli.check.sources import Run, ShortProject, TargetError
from lightning_grad.cli.check.watch import Watch
from lightning_grad.core.compatibility import STRATEGIES, TITLES
from lightning_grad.data.random_streams import random_streams_kept
from lightning_grad.testing.environment import interruptible

_INTERRUPTS = (KeyboardInterrupt, SIGTERMException)


class InterruptedTrialError(Exception):
    """Ctrl-C was pressed, which Lightning turns into SystemExit, or SIGTERM came."""


def try_out(
    project: ShortProject, technique: type[Any] | None, batches: int, accelerator: str = "auto", **arguments: Any
) -> Outcome:
    """Fit the project once, with a technique at its trial setting, and return what came of it.

    Args:
        project: Builds the module and its data.
        technique: Class of a callback or strategy; ``None`` for a fit without one.
        batches: Batches for each epoch.
        accelerator: Accelerator, unless the config asks for the CPU.
        **arguments: Further arguments of the Trainer.

    Raises:
        InterruptedTrialError: After Ctrl-C.
        TargetError: If the function of the user returns something else than a project.
    """
    watch = Watch()
    with undisturbed() as said, chdir("."), tempfile.TemporaryDirectory() as folder:
        try:
            run = project.make(batches, arguments.get("devices", 1))
            known = None if technique is None else _known_before(run, technique)
            if known is not None:
                return known
            trainer = short_trainer(run, technique, watch, folder, {"accelerator": accelerator, **arguments})
            trainer.fit(run.module, **run.data)
        except TargetError:
            raise
        except (Exception, SystemExit, KeyboardInterrupt) as error:
            if any(isinstance(each, _INTERRUPTS) for each in (error, error.__context__)):
                raise InterruptedTrialError from None
            return outcome_of(error, technique)
    words = [] if technique is None else [text for text in said if text.startswith(technique.__name__)]
    measured = (watch.seconds, watch.batches, dict(watch.calls), watch.chosen, watch.device, watch.peak)
    return Outcome("runs", words, *measured, _is_finite(run.module))


def _known_before(run: Run, technique: type[Any]) -> Outcome | None:
    """Return the outcome of a technique that the config already uses, or that refuses the strategy of the config."""
    if any(type(callback) is technique for callback in callbacks_of(run)):
        return Outcome("in use", [f"The config already uses {technique.__name__}."])
    strategy = run.arguments.get("strategy")
    kind = StrategyRegistry[strategy]["strategy"] if strategy in StrategyRegistry else type(strategy)
    field_of = next((STRATEGIES[cls.__name__] for cls in kind.__mro__ if cls.__name__ in STRATEGIES), None)
    if field_of is None or is_strategy(technique):
        return None
    answer = technique(**technique.trial).works_with().answers[field_of]
    words = f"{TITLES[field_of]} ({kind.__name__})"
    return Outcome("refused", [str(answer.error(technique.__name__, words))]) if answer.is_no else None


@contextmanager
def undisturbed() -> Iterator[list[str]]:
    """Mute prints, logs and warnings, and use one thread; then restore all, random states and the handler of Ctrl-C too.

    Several threads make short steps on a CPU slow and their times unsteady. ``OMP_NUM_THREADS`` sets another number.

    Yields:
        list: The warnings so far.
    """
    said: list[str] = []
    level, seed, threads = logging.root.manager.disable, os.environ.get("PL_GLOBAL_SEED"), torch.get_num_threads()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    with interruptible(), random_streams_kept(), warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_, **__: said.append(str(message))
        logging.disable(logging.ERROR)
        try:
            yield said
        finally:
            logging.disable(level)
            torch.set_num_threads(threads)
            if seed is None:
                os.environ.pop("PL_GLOBAL_SEED", None)
            else:
                os.environ["PL_GLOBAL_SEED"] = seed


def _is_finite(module: torch.nn.Module) -> bool:
    return all(math.isfinite(value.detach().float().sum().item()) for value in module.parameters())
