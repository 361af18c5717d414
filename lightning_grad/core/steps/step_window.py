"""Repeat the evaluation of an optimizer step: all batches that its gradients come from, at other weights."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_grad.core.dispatch import wrap_method
from lightning_grad.core.quiet import unseen
from lightning_grad.data.random_streams import random_states, set_random_states
from lightning_grad.utilities.batch_copies import copy_of

_REPEATED: WeakSet[nn.Module] = WeakSet()
_Kept = list[tuple[Any, dict[str, Any]]]  # callbacks, each with its attributes that belong to a batch
_NO_CLOSURE = "do_nothing_closure"  # its name, because both of Lightning's namespaces have their own function


def is_repeated(pl_module: nn.Module) -> bool:
    """Return True while a step is repeated. Hooks that count or record batches check it."""
    return pl_module in _REPEATED


def skips_backward(trainer: pl.Trainer) -> bool:
    """Return True in the epoch in which StochasticWeightAveraging only collects statistics of BatchNorm."""
    return bool(getattr(trainer.fit_loop, "_skip_backward", False))


@dataclass
class _Evaluation:
    """One call of ``training_step``: its batch, its arguments, its loss, and what else it depends on."""

    batch_idx: int
    arguments: tuple[Any, ...]
    states: tuple[Any, ...]  # states of the random streams
    loss: Tensor | None = None
    kept: _Kept = field(default_factory=list)


class StepWindow:
    """The batches of the current optimizer step, under automatic optimization.

    With gradient accumulation there are several. They are kept until the step is done.

    Args:
        trainer: The trainer.
        pl_module: Its module.
        is_needed: Returns False if the current step is not run again. Then nothing is kept.
    """

    def __init__(self, trainer: pl.Trainer, pl_module: pl.LightningModule, is_needed: Callable[[], bool]) -> None:
        self._trainer, self._pl_module, self._is_needed = trainer, pl_module, is_needed
        self._evaluations: list[_Evaluation] = []
        self._is_again = self._lacks_batches = False

    def watch(self) -> Callable[[], None]:
        """Start recording the batches.

        Returns:
            Callable: Stops recording.
        """

        def step(inner: Callable[..., Any], *args: Any) -> Any:
            if self._is_again:
                return inner(*args)
            # Batches are distinguished by their number: an optimizer may call its closure several
            # times for one batch, and a loader may return the same tensor for several batches.
            number = self._trainer.fit_loop.batch_idx
            is_new = not self._evaluations or self._evaluations[-1].batch_idx != number
            if is_new and number % self._trainer.accumulate_grad_batches == 0:
                self.end_step()  # a batch that ended its epoch early left a step unfinished
            if skips_backward(self._trainer) or not self._is_needed():
                self._lacks_batches = True
                return inner(*args)
            if is_new:
                inputs = copy_of(args)  # because a step may write into them
                self._evaluations.append(_Evaluation(number, inputs, random_states()))
            output = inner(*args)
            if is_new:
                loss = _loss_of(output)
                self._evaluations[-1].loss = None if loss is None else loss.detach()
                self._evaluations[-1].kept = self._kept()
            return output

        return wrap_method(self._trainer.strategy, "training_step", step)

    @property
    def loss(self) -> Tensor | None:
        """Mean of the losses of the first run over all accumulated batches; ``None`` if no batch has a loss."""
        losses = [evaluation.loss for evaluation in self._evaluations if evaluation.loss is not None]
        return torch.stack(losses).sum() / self._trainer.accumulate_grad_batches if losses else None

    def _kept(self) -> _Kept:
        """Return what callbacks know of the current batch."""
        callbacks = self._trainer.callbacks  # type: ignore[attr-defined]
        kept = [
            (callback, {name: getattr(callback, name) for name in _names_of_batch(type(callback))})
            for callback in callbacks
        ]
        return [(callback, values) for callback, values in kept if values]

    def end_step(self) -> None:
        """Drop the batches after their step."""
        self._evaluations = []
        self._lacks_batches = False

    def run_again(self, optimizer: Optimizer) -> Tensor | None:
        """Replace the gradients with the gradients of all batches at the current weights.

        Each loss is divided by the number of accumulated batches, as in the first run. Ranks
        synchronize with the last batch.

        Returns:
            Tensor: Sum of these losses; ``None`` if no batch has a loss.

        Raises:
            RuntimeError: If a batch was not kept.
        """
        if self._lacks_batches:
            raise RuntimeError("closure.again() was called in a step for which evaluates_again() returned False.")
        trainer = self._trainer
        self._pl_module.optimizer_zero_grad(trainer.current_epoch, trainer.fit_loop.batch_idx, optimizer)
        self._is_again = True
        losses: list[Tensor] = []
        kept = self._kept()
        try:
            for number, evaluation in enumerate(self._evaluations, 1):
                with _synchronized(trainer.strategy, number == len(self._evaluations)), torch.enable_grad():
                    losses += self._run(evaluation, optimizer)
        finally:
            self._is_again = False
            _give_back(kept)
        return torch.stack(losses).sum() if losses else None

    def _run(self, evaluation: _Evaluation, optimizer: Optimizer) -> list[Tensor]:
        strategy = self._trainer.strategy
        set_random_states(evaluation.states)
        _give_back(evaluation.kept)
        loss = _loss_of(strategy.training_step(*copy_of(evaluation.arguments)))
        if loss is None:
            return []
        part = loss / self._trainer.accumulate_grad_batches
        strategy.backward(part, optimizer)
        return [part.detach()]


def _loss_of(output: Any) -> Tensor | None:
    loss: Tensor | None = output["loss"] if isinstance(output, Mapping) else output
    return loss


def _synchronized(strategy: Any, wanted: bool) -> AbstractContextManager[Any]:
    """Return a context in which backward reduces gradients over the ranks only if wanted."""
    block = getattr(strategy, "block_backward_sync", None)
    return nullcontext() if wanted or block is None else block()


def _names_of_batch(kind: type) -> tuple[str, ...]:
    """Return the attributes of a callback that belong to a batch, those of its bases included."""
    return tuple(name for cls in kind.__mro__ for name in vars(cls).get("of_batch", ()))


def _give_back(kept: _Kept) -> None:
    for callback, values in kept:
        for name, value in values.items():
            setattr(callback, name, value)


@dataclass(eq=False)
class StepClosure:
    """Argument of ``evaluate``: computes the gradients of the current optimizer step.

    Calling it runs the forward and backward pass of the batch, as Lightning would. After that,
    :meth:`again` may be called any number of times.
    """

    _closure: Callable[[], Any]
    _optimizer: Optimizer
    _trainer: pl.Trainer
    _pl_module: pl.LightningModule
    _window: StepWindow | None
    _display_name: str

    def __post_init__(self) -> None:
        self._states = random_states() if self._window is None else ()

    def __call__(self, synchronized: bool = True) -> Any:
        """Compute the gradients and return what the closure returns. Return it from ``evaluate``.

        Args:
            synchronized: Reduce the gradients over all ranks. ``False`` leaves each rank its own, as
                far as the strategy can; :meth:`again` always reduces.
        """
        if getattr(self._closure, "__name__", "") == _NO_CLOSURE:
            self._refuse()
        with _synchronized(self._trainer.strategy, synchronized):
            return self._closure()

    @property
    def loss(self) -> Tensor | None:
        """Loss of the first run over all accumulated batches; ``None`` without one, and under manual optimization."""
        return None if self._window is None else self._window.loss

    def again(self) -> Any:
        """Replace the gradients with the gradients at the current weights.

        Random numbers of the global streams (dropout, augmentation) repeat those of the first run.
        Only the gradients change: buffers, metrics, attributes and random streams are restored, and
        nothing is logged. Hooks around backward are called, because they may change gradients;
        hooks that count or record check :func:`is_repeated`.

        Returns:
            The loss over all accumulated batches; under manual optimization, what the closure
            returns.
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
                f"{self._display_name} must evaluate each step itself, but "
                f"{type(self._pl_module).__name__}.optimizer_step has already run the closure. Call "
                "optimizer.step(closure=optimizer_closure) there."
            )
        raise RuntimeError(
            f"{self._display_name} must evaluate each step itself, but optimizer.step() was called without a closure. "
            "Call optimizer.step(closure) with a function that sets gradients to zero, computes the loss, and calls "
            "manual_backward; or use automatic optimization."
        )
