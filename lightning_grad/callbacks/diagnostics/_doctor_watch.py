"""What ``TrainingDoctor`` adds to a run while it watches, all of it removed by :meth:`Watch.stop`."""

from collections.abc import Callable, Iterator, MutableMapping
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_grad.callbacks.diagnostics._host_events import EventRecorder
from lightning_grad.callbacks.diagnostics._owner_stack import OwnerStack, StepClock
from lightning_grad.core.dispatch import WrapOrder, acting, meter_wrappers, overrides, wrap_method
from lightning_grad.core.undo import UndoList

STEP, BACKWARD, UPDATE = "training_step", "backward", "optimizer step"
LOADING, MOVING, HOOKS = "data loading", "moving the batch", "hooks of the module"
PARTS = (STEP, BACKWARD, UPDATE, LOADING, MOVING, HOOKS)

SKIPPED, RECORDED = 1, 2  # batches before the first that is timed

_STRATEGY = {"training_step": STEP, "backward": BACKWARD, "optimizer_step": UPDATE, "batch_to_device": MOVING}
_BEGINNINGS = ("setup", "on_fit_start", "on_sanity_check_start", "on_train_start", "on_train_epoch_start")
_CALLBACK = [name for name in vars(pl.Callback) if name.startswith("on_") and name != "on_exception"]
_MODULE = [
    *(name for name in _CALLBACK if name.startswith("on_train_batch")),
    *("on_before_zero_grad", "on_before_backward", "on_after_backward", "on_before_optimizer_step"),
    *("optimizer_step", "optimizer_zero_grad", "configure_gradient_clipping", "lr_scheduler_step"),
]
_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks", "_forward_pre_hooks", "_forward_hooks")
_FETCH = "train_dataloader_next"

_Hooks = MutableMapping[int, Callable[..., Any]]


class Watch:
    """Times all callbacks of a Trainer, in every hook and wrapper of theirs, in the first batches of a fit.

    Args:
        trainer: The trainer.
        pl_module: Its module.
        own: The callback that watches; it is not timed.
        batches: Number of batches to time.
        host_syncs: Whether to record the events of the batches before them.
        finish: Called after the last of them.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        own: pl.Callback,
        batches: int,
        host_syncs: bool,
        finish: Callable[[], None],
    ) -> None:
        self._trainer, self._pl_module, self._own, self._finish = trainer, pl_module, own, finish
        callbacks: list[Any] = [other for other in trainer.callbacks if other is not own]  # type: ignore[attr-defined]
        self._labels = dict(zip(map(id, callbacks), _labels(callbacks), strict=True))
        self._callbacks = callbacks  # an id means nothing once its object is gone
        self._batches, self.seen = batches, 0
        self._records = host_syncs and not _uses_torch_profiler(trainer)
        self.clock = StepClock(self.labels)
        self.recorder = EventRecorder(self.labels, trainer.strategy.root_device.type)
        self._meter: OwnerStack | None = None
        self._added: list[tuple[_Hooks, int, str]] = []
        self._undo = UndoList()

    @property
    def labels(self) -> list[str]:
        """The names of the callbacks, each of them different."""
        return list(self._labels.values())

    @property
    def timed(self) -> int:
        """Number of batches that were timed."""
        return max(self.seen - SKIPPED - RECORDED, 0)

    def start(self) -> None:
        """Wrap the hooks of all callbacks, and the batch of the loop."""
        for callback in self._callbacks:
            for name in ("setup", *_CALLBACK):
                if name in vars(callback) or (hasattr(callback, name) and overrides(callback, name)):
                    around = self._around_beginning if name in _BEGINNINGS else self._around_hook
                    self._wrap(callback, name, partial(around, callback))
        self._undo.push(meter_wrappers(self._metered))
        self._wrap(self._trainer.fit_loop.epoch_loop, "advance", self._around_batch)

    def stop(self) -> None:
        """Remove everything."""
        self.clock.end()
        self._meter = None
        self._undo.run()

    def _wrap(self, owner: object, name: str, wrapper: Callable[..., Any]) -> None:
        self._undo.push(wrap_method(owner, name, wrapper, order=WrapOrder.LOOK))

    # Callbacks.

    def _around_hook(self, callback: pl.Callback, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.run(self._labels[id(callback)], inner, *args, **kwargs)

    def _around_beginning(self, callback: pl.Callback, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Note which wrappers and hooks a callback adds to the run."""
        before = {(id(hooks), key) for hooks in self._hooks() for key in hooks}
        with acting(callback):
            result = self._around_hook(callback, inner, *args, **kwargs)
        new = [(hooks, key) for hooks in self._hooks() for key in hooks if (id(hooks), key) not in before]
        self._added += [(hooks, key, self._labels[id(callback)]) for hooks, key in new]
        return result

    def _hooks(self) -> Iterator[_Hooks]:
        for owner in (*self._trainer.optimizers, *self._pl_module.modules()):
            # An engine's optimizer may have no hooks.
            yield from (getattr(owner, name) for name in _HOOKS if hasattr(owner, name))

    def run(self, label: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function, counted for a callback."""
        meter = self._meter
        if meter is None or not meter.counts:
            return function(*args, **kwargs)
        return meter.call(label, function, *args, **kwargs)

    def _metered(self, owner: object, wrapper: Callable[..., Any]) -> Callable[..., Any]:
        label, meter = self._labels.get(id(owner)), self._meter
        if label is None or meter is None or not meter.counts:
            return wrapper
        return partial(meter.call_wrapper, label, wrapper)

    # Batches.

    def _around_batch(self, inner: Callable[..., Any], *args: Any) -> Any:
        if all(callback is not self._own for callback in self._trainer.callbacks):  # type: ignore[attr-defined]
            return inner(*args)  # a tuner, such as that of learning rates, runs the loop with callbacks of its own
        if self.seen < SKIPPED:
            result = inner(*args)
        elif self.seen < SKIPPED + RECORDED:
            if self.seen == SKIPPED:
                self._divide_step()
            self._meter = self.recorder
            result = self.recorder.record(inner, *args) if self._records else inner(*args)
        else:
            result = self._time(inner, *args)
        self.seen += 1
        if self.timed == self._batches:
            self._finish()
        return result

    def _time(self, inner: Callable[..., Any], *args: Any) -> Any:
        if self._meter is not self.clock:
            self._meter = self.clock
            self.clock.begin()
        self.clock.begin_batch()
        try:
            return inner(*args)
        finally:
            self.clock.end_batch()

    def _divide_step(self) -> None:
        """Wrap the parts of the step, and the hooks that callbacks added to optimizers and modules."""
        for name, part in _STRATEGY.items():
            self._wrap(self._trainer.strategy, name, partial(self._around_part, part))
        for name in _MODULE:
            if overrides(self._pl_module, name):
                self._wrap(self._pl_module, name, partial(self._around_part, HOOKS))
        profiler = self._trainer.profiler  # type: ignore[attr-defined]
        self._wrap(profiler, "start", self._before_fetch)
        self._wrap(profiler, "stop", self._after_fetch)
        for hooks, key, label in self._added:
            if key in hooks:
                self._undo.push(_CountedHook(self, label, hooks, key).remove)

    def _around_part(self, part: str, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        meter = self._meter
        if meter is None or not meter.counts:
            return inner(*args, **kwargs)
        return meter.call_part(part, inner, *args, **kwargs)

    def _before_fetch(self, inner: Callable[..., Any], action: str) -> None:
        inner(action)
        if self._meter is not None and action.endswith(_FETCH) and self._meter.counts:
            self._meter.enter_part(LOADING)

    def _after_fetch(self, inner: Callable[..., Any], action: str) -> None:
        if self._meter is not None and action.endswith(_FETCH) and self._meter.counts:
            self._meter.leave()
        inner(action)


class _CountedHook:
    """Takes the place of a hook on an optimizer or module. A copy of the module gets the plain hook.

    Args:
        watch: Counts the calls.
        label: Name of the callback that added the hook.
        hooks: The hooks of the optimizer or module.
        key: Which of them.
    """

    def __init__(self, watch: Watch, label: str, hooks: _Hooks, key: int) -> None:
        self._watch, self._label, self._hooks, self._key = watch, label, hooks, key
        self._hook = hooks[key]
        hooks[key] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # the compiler sees the plain hook, and makes the same graph of it
            return self._hook(*args, **kwargs)
        return self._watch.run(self._label, self._hook, *args, **kwargs)

    def remove(self) -> None:
        """Put the plain hook back, unless it was removed."""
        if self._hooks.get(self._key) is self:
            self._hooks[self._key] = self._hook

    def __reduce__(self) -> tuple[Any, ...]:
        return _plain, (self._hook,)


def _plain(hook: Callable[..., Any]) -> Callable[..., Any]:
    return hook


def _uses_torch_profiler(trainer: pl.Trainer) -> bool:
    """Return True if the Trainer's profiler starts torch's own, of which only one may run."""
    return any(cls.__name__ == "PyTorchProfiler" for cls in type(trainer.profiler).__mro__)  # type: ignore[attr-defined]


def _labels(callbacks: list[Any]) -> list[str]:
    """Name callbacks by their class; number those with equal names."""
    names = [str(getattr(callback, "display_name", type(callback).__name__)) for callback in callbacks]
    return [
        name if names.count(name) == 1 else f"{name} ({names[: place + 1].count(name)})"
        for place, name in enumerate(names)
    ]
