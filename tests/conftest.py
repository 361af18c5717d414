"""What every test shares: one thread (workers run beside each other), silence of Lightning's advice, and cheap fits."""

import contextlib
import functools
import gc
import importlib
import inspect
import logging
import os
import signal
import sys
import traceback
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric"):
    logging.getLogger(name).setLevel(logging.ERROR)


@pytest.fixture(autouse=True)
def _keep_interrupts():
    """Lightning leaves SIGINT ignored after Ctrl-C; the next test must not inherit that."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.fixture(scope="module")
def together(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[list[Any], Path]]:
    """Run ``work(*case, folder)`` for all cases of a test on the same forked ranks, once; the tests look at one case each.

    What is returned takes ``work``, all cases, the one that is asked for and the number of ranks. It returns what each
    rank had of that case, and the folder. A module may list groups of works with their cases in ``TOGETHER``; those of
    a group share ranks.
    """
    done: dict[Any, tuple[list[Any], Path]] = {}

    def run(work: Callable[..., Any], cases: Sequence[Any], case: Any, ranks: int = 2) -> tuple[list[Any], Path]:
        if (work, ranks, case) not in done:
            groups = getattr(request.module, "TOGETHER", ()) if ranks == 2 else ()
            works = next((group for group in groups if work in group), {work: cases})
            todo = [(each, one, tmp_path_factory.mktemp("case")) for each, of in works.items() for one in of]
            on_ranks = importlib.import_module("lightning_grad.testing").on_ranks
            # By position: what is in a case may be another object when it comes back.
            found = zip(*on_ranks(ranks, lambda: [_attempt(*each) for each in todo]), strict=True)
            for (each, one, folder), those in zip(todo, found, strict=True):
                done[each, ranks, one] = list(those), folder
        attempts, folder = done[work, ranks, case]
        errors = [f"--- rank {rank} ---\n{error}" for rank, (error, _) in enumerate(attempts) if error]
        assert not errors, "\n".join(errors)
        return [value for _, value in attempts], folder

    return run


def _attempt(work: Callable[..., Any], case: Sequence[Any], folder: Path) -> tuple[str, Any]:
    """Return the traceback of an error, so that it fails its own case only, and the value."""
    try:
        return "", work(*case, folder)
    except BaseException:  # pytest's own failures, SystemExit and KeyboardInterrupt as well
        return traceback.format_exc(), None


def pytest_make_parametrize_id(config: Any, val: Any) -> str | None:
    """Name a case by what is in it; the address of a function and random entries would differ between workers."""
    if isinstance(val, tuple):
        return "-".join(
            type(part).__name__ if hasattr(part, "shape") else getattr(part, "__name__", str(part)) for part in val
        )
    return None


def pytest_configure(config: Any) -> None:
    """Use one thread, where tests run: the process that starts the workers needs no torch."""
    if hasattr(config, "workerinput") or config.getoption("dist", "no") == "no":
        importlib.import_module("torch").set_num_threads(1)


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: Any) -> Iterator[Any]:
    """Collect no garbage while tests are collected: all that is made then is kept, and is looked at again and again."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_finish(session: Any) -> None:
    """Make fits cheap, and leave what is imported by now to no garbage collection: forked ranks would copy its pages."""
    for fabric, pytorch in (("lightning.fabric", "lightning.pytorch"), ("lightning_fabric", "pytorch_lightning")):
        if pytorch in sys.modules:
            _search_packages_once(importlib.import_module(f"{fabric}.utilities.registry"))
            _move_no_value_that_is_there(
                importlib.import_module(f"{pytorch}.trainer.connectors.logger_connector.result")
            )
            _read_a_signature_once(importlib.import_module(f"{pytorch}.utilities.signature_utils"))
            _look_for_no_default_that_is_not_set(importlib.import_module(f"{pytorch}.utilities.argparse"))
            _note_the_running_hook_fast(importlib.import_module(f"{pytorch}.core.module"))
            _compare_states_by_identity(importlib.import_module(f"{pytorch}.trainer.states"))
            _time_nothing(importlib.import_module(f"{pytorch}.profilers"))
    if "torch" in sys.modules:
        _keep_no_stack_of_a_seed(sys.modules["torch"])
    if any(hasattr(getattr(item, "module", None), "on_ranks") for item in session.items):
        _fit_before_ranks_are_forked()
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 10)  # a fit leaves little that waits for a collection


def _fit_before_ranks_are_forked() -> None:
    """The first fit of a process imports and caches much, which every pair of forked ranks would do again."""
    importlib.import_module("torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook")
    testing = importlib.import_module("lightning_grad.testing")
    testing.fit([], testing.make_classifier(optimizer="sgd"), max_epochs=1)


def _search_packages_once(registry: Any) -> None:
    """Every Trainer reads the files of all installed packages for callbacks that they bring."""
    registry.entry_points = functools.cache(registry.entry_points)


def _move_no_value_that_is_there(result: Any) -> None:
    """Every logged value looks through its metric for tensors to move, also if all are on their device."""
    move = result._ResultMetric.to

    def to(metric: Any, device: Any) -> Any:
        return metric if metric.is_tensor and metric.value.device == device else move(metric, device)

    result._ResultMetric.to = to


def _read_a_signature_once(signatures: Any) -> None:
    """Read the signature of a hook once, not at every call of the hook and of ``self.log``."""
    known: weakref.WeakKeyDictionary[types.FunctionType, inspect.FullArgSpec] = weakref.WeakKeyDictionary()

    def getfullargspec(hook: Any) -> inspect.FullArgSpec:
        function = getattr(hook, "__func__", hook)
        if type(function) is not types.FunctionType or "__wrapped__" in vars(function):
            return inspect.getfullargspec(hook)
        if function not in known:
            known[function] = inspect.getfullargspec(hook)
        return known[function]

    signatures.inspect = types.SimpleNamespace(getfullargspec=getfullargspec)


def _look_for_no_default_that_is_not_set(argparse: Any) -> None:
    """Read the arguments of a Trainer only where a variable of the environment sets one."""
    parse = argparse._parse_env_variables

    def parse_env_variables(cls: type) -> Any:
        is_set = any(name.startswith(f"PL_{cls.__name__.upper()}_") for name in os.environ)
        return parse(cls) if is_set else argparse.Namespace()

    argparse._parse_env_variables = parse_env_variables


def _note_the_running_hook_fast(module: Any) -> None:
    """Every call of a hook writes its name on the module, twice, which asks each time whether it is a parameter."""
    set_attribute = module.LightningModule.__setattr__

    def note(self: Any, name: str, value: Any) -> None:
        if name == "_current_fx_name":
            self.__dict__[name] = value
        else:
            set_attribute(self, name, value)

    module.LightningModule.__setattr__ = note


def _compare_states_by_identity(states: Any) -> None:
    """Every step asks some thirty times for the state of the trainer, which compares lower-case words."""
    for kind in (states.RunningStage, states.TrainerFn, states.TrainerStatus):
        kind.__eq__ = _equal(kind, kind.__eq__)


def _equal(kind: type, otherwise: Callable[[Any, Any], bool]) -> Callable[[Any, Any], bool]:
    return lambda self, other: self is other if type(other) is kind else otherwise(self, other)


def _time_nothing(profilers: Any) -> None:
    """The profiler that does nothing makes a generator for every call of a hook."""
    profilers.PassThroughProfiler.profile = lambda self, action_name: contextlib.nullcontext(action_name)


def _keep_no_stack_of_a_seed(torch: Any) -> None:
    """Every seed is kept for devices that are not in use, together with all lines of the stack, formatted."""
    for device in (torch.cuda, torch.xpu, torch.mtia):
        if hasattr(device, "traceback"):
            device.traceback = types.SimpleNamespace(format_stack=list)
