"""Evaluating one optimizer step a second time: all batches that its gradients come from, at other weights."""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_grad.core.dispatch import wrap_method
from lightning_grad.core.quiet import unseen
from lightning_grad.data.random_streams import random_states, set_random_states

_REPEATED: WeakSet[nn.Module] = WeakSet()
_NO_CLOSURE = "do_nothing_closure"  # by its name: each of Lightning's two namespaces has its own


def is_repeated(pl_module: nn.Module) -> bool:
    """Return True while a step is evaluated again, for hooks that count or record batches."""
    return pl_module in _REPEATED


@dataclass(frozen=True)
class _Evaluation:
    """One call of ``training_step``: of which batch, what it was called with, and what else it depends on."""

    batch_idx: int
    arguments: tuple[Any, ...]
    states: tuple[Any, ...]  # of the random streams
    samples: list[tuple[Any, Any]]  # callbacks that know the samples of a batch, with those of this one


class StepWindow:
    """The batches of the optimizer step that is being made, under automatic optimization.

    With accumulated gradients they are several. Each is kept until the step is made.

    Args:
        trainer: The trainer.
        pl_module: Its module.
    """

    def __init__(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._trainer, self._pl_module = trainer, pl_module
        self._evaluations: list[_Evaluation] = []
        self._is_again = False

    def watch(self) -> Callable[[], None]:
        """Begin to note what is evaluated.

        Returns:
            Callable: Ends it.
        """

        def step(inner: Callable[..., Any], *args: Any) -> Any:
            # An optimizer that asks several times in one step asks for the same batch; a loader may also give one tensor
            # for several batches.
            number = self._trainer.fit_loop.batch_idx
            is_new = not self._evaluations or self._evaluations[-1].batch_idx != number
            if is_new and not self._is_again:
                self._evaluations.append(_Evaluation(number, args, random_states(), self._samples()))
            return inner(*args)

        return wrap_method(self._trainer.strategy, "training_step", step)

    def _samples(self) -> list[tuple[Any, Any]]:
        callbacks = self._trainer.callbacks  # type: ignore[attr-defined]
        return [(callback, callback.indices) for callback in callbacks if hasattr(callback, "indices")]

    def end_step(self) -> None:
        """Drop the batches, because their step is made."""
        self._evaluations = []

    def run_again(self, optimizer: Optimizer) -> Tensor | None:
        """Compute the gradients of all batches at the weights as they are now, in place of those that are there.

        Each loss is divided by the accumulated batches, as in the first run, and ranks are synchronized with the last.

        Returns:
            Tensor: The sum of these losses, ``None`` if no batch has one.
        """
        trainer = self._trainer
        self._pl_module.optimizer_zero_grad(trainer.current_epoch, trainer.fit_loop.batch_idx, optimizer)
        self._is_again = True
        losses: list[Tensor] = []
        samples = self._samples()
        try:
            for number, evaluation in enumerate(self._evaluations, 1):
                with self._synchronized(number == len(self._evaluations)), torch.enable_grad():
                    losses += self._run(evaluation, optimizer)
        finally:
            self._is_again = False
            _tell(samples)
        return torch.stack(losses).sum() if losses else None

    def _run(self, evaluation: _Evaluation, optimizer: Optimizer) -> list[Tensor]:
        strategy = self._trainer.strategy
        set_random_states(evaluation.states)
        _tell(evaluation.samples)
        output: Any = strategy.training_step(*evaluation.arguments)
        loss = output["loss"] if isinstance(output, dict) else output
        if loss is None:
            return []
        part = loss / self._trainer.accumulate_grad_batches
        strategy.backward(part, optimizer)
        return [part.detach()]

    def _synchronized(self, is_last: bool) -> AbstractContextManager[Any]:
        block = getattr(self._trainer.strategy, "block_backward_sync", None)
        return nullcontext() if is_last or block is None else block()


def _tell(samples: list[tuple[Any, Any]]) -> None:
    """Give the samples of a batch to the callbacks that know them."""
    for callback, indices in samples:
        callback.indices = indices


@dataclass(eq=False)
class StepClosure:
    """What computes the gradients of the optimizer step that is being made, handed to ``evaluate``.

    Calling it does what Lightning would have done: the forward and the backward pass of the batch. :meth:`again` may follow,
    any number of times.
    """

    _closure: Callable[[], Any]
    _optimizer: Optimizer
    _trainer: pl.Trainer
    _pl_module: pl.LightningModule
    _window: StepWindow | None
    _display_name: str

    def __post_init__(self) -> None:
        self._states = random_states()

    def __call__(self) -> Any:
        """Compute the gradients, and return what the closure returns; hand this on to the optimizer."""
        if getattr(self._closure, "__name__", "") == _NO_CLOSURE:
            self._refuse()
        return self._closure()

    def again(self) -> Any:
        """Compute the gradients at the weights as they are now, in place of those that are there.

        Random numbers of the global streams (dropout, augmentation) are those of the first time. It leaves no trace but the
        gradients: buffers, metrics, attributes and random streams are put back, and nothing is logged. Hooks around backward
        are called, for they may change gradients; those that count or record ask :func:`is_repeated`.

        Returns:
            The loss at these weights, over all accumulated batches; under manual optimization what the closure returns.
        """
        with unseen(self._trainer, self._pl_module), ExitStack() as stack:
            _REPEATED.add(self._pl_module)
            stack.callback(_REPEATED.discard, self._pl_module)
            if self._window is not None:
                return self._window.run_again(self._optimizer)
            set_random_states(self._states)
            with torch.enable_grad():
                return self._closure()

    def _refuse(self) -> None:
        if self._pl_module.automatic_optimization:
            raise RuntimeError(
                f"{self._display_name} evaluates each step itself, and optimizer_step of "
                f"{type(self._pl_module).__name__} has done so before. Call optimizer.step(closure=optimizer_closure) "
                "there."
            )
        raise RuntimeError(
            f"{self._display_name} evaluates each step itself, and optimizer.step() was called without a closure. Call "
            "optimizer.step(closure) with a function that sets gradients to zero, computes the loss, and calls "
            "manual_backward; or use automatic optimization."
        )
