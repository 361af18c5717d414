"""The base of the callbacks that work on the optimizers: around their steps, on their rates, moments and closures."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_grad.core.callback import GradCallback
from lightning_grad.core.compatibility import NO_ENGINE, Compatibility, no
from lightning_grad.core.dispatch import wrap_method
from lightning_grad.core.fit import during_fit, until_next_fit
from lightning_grad.core.steps.held_rates import Factor, HeldRates
from lightning_grad.core.steps.step_window import StepClosure, StepWindow
from lightning_grad.core.undo import UndoList
from lightning_grad.functional import reset_moments_
from lightning_grad.functional.plain_tensors import on_plain_tensors
from lightning_grad.utilities.batches import map_tensors
from lightning_grad.utilities.optimizers import optimizer_index


class OptimizerCallback(GradCallback):
    """Acts around the steps of the trainer's optimizers.

    Override what the technique needs. Each method gets the number of an optimizer and the optimizer that has this
    number now, even after another callback has replaced it in mid-run:

    - :meth:`acts_on`: choose the optimizers;
    - :meth:`before_step`: a step begins;
    - :meth:`before_update`: the gradients of the step are there;
    - :meth:`after_step`: the step was made;
    - :meth:`evaluate`: compute the gradients of the step, once or several times;
    - :meth:`run_backward`: differentiate a loss.

    Inside them, :meth:`multiply_rates` and :meth:`reset_moments` act on the step that is being made. Keep whatever
    must last in :meth:`memory`, which is saved and restored. ``before_step``, ``before_update`` and ``after_step`` run
    without recording gradients, and on plain tensors.

    A step that the GradScaler skips calls neither ``before_step`` nor ``after_step``; one without gradients
    (skipped by ``SkipNonFinite``) does not call ``after_step``. So compute in ``before_update`` what follows from
    the gradients, and keep it in ``after_step``.
    """

    compatibility: ClassVar[Compatibility] = GradCallback.compatibility.but(
        fused_fp16=no(
            "counts the steps that are made, and {} decides inside its step whether the fp16 GradScaler skips it",
            "Use fused=False, or precision='bf16-mixed'",
        ),
        deepspeed=NO_ENGINE,
    )

    _seen = during_fit.of(dict[int, Optimizer])  # all, by number
    _ends = during_fit.of(dict[int, UndoList])  # of those that it acts on
    _rates = during_fit.of(dict[int, HeldRates])
    _memory = until_next_fit.of(dict[int, dict[str, Any]])
    _inside = during_fit.of(set[int])  # those in a step that Lightning makes
    _window = during_fit[StepWindow | None](lambda _: None)

    def acts_on(self, index: int, optimizer: Optimizer) -> bool:
        """Return whether it acts on an optimizer; called when a fit begins, and for one that takes another's place."""
        return True

    def before_step(self, index: int, optimizer: Optimizer) -> None:
        """Act before a step, including one past Lightning.

        The gradients are not there yet, unless a GradScaler makes the step: then it comes after ``before_update``.
        """

    def before_update(self, index: int, optimizer: Optimizer) -> None:
        """Act on the gradients of a step, accumulated and unscaled, or use them to change weights and rates.

        Callbacks further down the list and Lightning's own clipping still follow. A step past Lightning does not call it.
        """

    def after_step(self, index: int, optimizer: Optimizer) -> None:
        """Act after a step that was made, with gradients."""

    def evaluate(self, index: int, optimizer: Optimizer, closure: StepClosure) -> Any:
        """Compute the gradients of a step, and return what ``closure()`` returns.

        Call ``closure()`` first, and, after weights have changed, ``closure.again()``; then put the weights back. Under fp16
        gradients are still multiplied by the loss scale here, and a non-finite one makes the GradScaler skip the step.

        Two callbacks that override it are refused, and so is ``optimizer.step()`` without a closure.
        """
        return closure()

    def run_backward(self, backward: Callable[..., Any], loss: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Differentiate a loss by ``backward(loss, *args, **kwargs)``, such as with ``create_graph=True``, or not at all."""
        return backward(loss, *args, **kwargs)

    @property
    def watched(self) -> Mapping[int, Optimizer]:
        """The optimizers that it acts on now, by number."""
        return {index: self._seen[index] for index in self._ends}

    def memory(self, index: int) -> dict[str, Any]:
        """Return what is kept of one optimizer: tensors, numbers, strings, lists and dicts under names of your choice.

        It is in the state of the callback. A resumed fit has it again, on the device of the optimizer's parameters. An
        optimizer that takes another's place in mid-run goes on with it.
        """
        return self._memory.setdefault(index, {})

    def multiply_rates(self, index: int, factor: Factor | Sequence[Factor]) -> None:
        """Multiply the rates of the step that is being made; schedulers, monitors and checkpoints see the user's.

        A rate that is set in the meantime, by the training step for example, is multiplied too, and stays. A second factor in
        one step replaces the first. Factors of several callbacks multiply.

        Args:
            index: Number of the optimizer.
            factor: One number for all parameter groups, or one for each.
        """
        self._rates[index].multiply(factor)

    def reset_moments(self, index: int) -> None:
        """Set the moments of an Adam-like optimizer to zero; its step count stays."""
        reset_moments_(list(self._seen[index].state.values()))

    def quantity_of(self, index: int, quantity: str) -> str:
        """Return the name under which to log something of one optimizer; it has the number if there are several."""
        return f"optimizer{index}/{quantity}" if len(self._seen) > 1 else quantity

    # The fit begins.

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self.fitting and _overrides(self, "evaluate"):
            self._refuse_a_second(trainer)

    def _refuse_a_second(self, trainer: pl.Trainer) -> None:
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        others = [c.display_name for c in callbacks if isinstance(c, OptimizerCallback) and _overrides(c, "evaluate")]
        if len(others) > 1:
            raise ValueError(f"{' and '.join(others)} would each evaluate every step again. Keep one of them.")
        if getattr(trainer.strategy, "wants_to_compress", False):
            raise ValueError(
                f"{self.display_name} evaluates each step again, and {type(trainer.strategy).__name__} would send both "
                "gradients and carry what is left of one into the other. Train with strategy='ddp'."
            )

    @override
    def state_dict(self) -> dict[str, Any]:
        kept = {str(index): dict(memory) for index, memory in self._memory.items()}
        return {**super().state_dict(), **({"memory": kept} if kept else {})}

    @override
    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        self._memory = {int(index): dict(memory) for index, memory in state.get("memory", {}).items()}

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.undo.push(lambda: self._leave(list(self._ends)))
        self._follow(trainer)
        self.undo.push(wrap_method(trainer.strategy, "optimizer_step", partial(self._step, trainer, pl_module)))
        if _overrides(self, "run_backward"):
            self.undo.push(wrap_method(trainer.strategy, "backward", self.run_backward))
        if _overrides(self, "evaluate") and pl_module.automatic_optimization:
            self._window = StepWindow(trainer, pl_module)
            self.undo.push(self._window.watch())

    # Which optimizers there are.

    def _follow(self, trainer: pl.Trainer) -> None:
        """Attach to the optimizers that the trainer has now, and leave those that it has no more."""
        now = dict(enumerate(trainer.optimizers))
        if len(now) == len(self._seen) and all(self._seen[index] is optimizer for index, optimizer in now.items()):
            return
        for index in [index for index, optimizer in self._seen.items() if now.get(index) is not optimizer]:
            del self._seen[index]
            self._leave([index])
        for index, optimizer in now.items():
            if index not in self._seen:
                self._seen[index] = optimizer
                if self.acts_on(index, optimizer):
                    self._attach(trainer, index, optimizer)

    def _number_of(self, optimizer: Optimizer) -> int | None:
        return next((index for index, seen in self._seen.items() if seen is optimizer), None)

    def _attach(self, trainer: pl.Trainer, index: int, optimizer: Optimizer) -> None:
        self.works_with().refuse_optimizer(self.display_name, trainer, optimizer)
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if index in self._memory and parameters:
            device = parameters[0].device
            self._memory[index] = map_tensors(self._memory[index], lambda kept: kept.to(device))
        ends, rates = self._ends.setdefault(index, UndoList()), HeldRates(optimizer)
        self._rates[index] = rates
        ends.push(optimizer.register_step_pre_hook(lambda o, *_: self._before_step(index, rates)).remove)
        ends.push(optimizer.register_step_post_hook(lambda o, *_: self._after_step(index, rates)).remove)
        ends.push(rates.give_back)

    def _leave(self, indices: Iterable[int]) -> None:
        for index in indices:
            if index in self._ends:
                self._ends.pop(index).run()

    @override
    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self._follow(trainer)  # for steps past Lightning

    # One optimizer step.

    def _step(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        inner: Callable[..., Any],
        optimizer: Optimizer,
        closure: Callable[[], Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        self._follow(trainer)
        index = self._number_of(optimizer)
        if index is not None and index in self._ends:
            self._inside.add(index)
            if _overrides(self, "evaluate"):
                whole = StepClosure(closure, optimizer, trainer, pl_module, self._window, self.display_name)
                closure = partial(self.evaluate, index, optimizer, whole)
        try:
            return inner(optimizer, closure, *args, **kwargs)
        finally:
            if index in self._inside:
                self._inside.discard(index)
                self._rates[index].give_back()  # a step that raises or that the GradScaler skips has no after_step
            if self._window is not None:
                self._window.end_step()

    @torch.no_grad()
    @on_plain_tensors
    def _before_step(self, index: int, rates: HeldRates) -> None:
        if index not in self._inside:
            rates.give_back()  # of a step past Lightning that raised
        self.before_step(index, self._seen[index])

    @override
    @torch.no_grad()
    @on_plain_tensors
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        index = self._number_of(optimizer)  # also of one that was replaced within its step
        if index is None:
            index = optimizer_index(trainer, optimizer, self.display_name)
        if index in self._ends:
            self._rates[index].follow()  # a rate that was set inside the closure has replaced ours
            self.before_update(index, optimizer)

    @torch.no_grad()
    @on_plain_tensors
    def _after_step(self, index: int, rates: HeldRates) -> None:
        rates.give_back()
        optimizer = self._seen[index]
        if any(parameter.grad is not None for group in optimizer.param_groups for parameter in group["params"]):
            self.after_step(index, optimizer)


def _overrides(callback: OptimizerCallback, name: str) -> bool:
    return getattr(type(callback), name) is not getattr(OptimizerCallback, name)
