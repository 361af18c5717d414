"""The base of callbacks that act on optimizers: their steps, learning rates, moments and closures."""

from collections import Counter
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
from lightning_grad.core.steps.step_window import StepClosure, StepWindow, skips_backward
from lightning_grad.core.undo import UndoList
from lightning_grad.functional import reset_moments_
from lightning_grad.functional.plain_tensors import on_plain_tensors
from lightning_grad.utilities.batches import map_tensors
from lightning_grad.utilities.checks import refuse_dataloader_iter
from lightning_grad.utilities.optimizers import optimizer_index


class OptimizerCallback(GradCallback):
    """Acts around the steps of the trainer's optimizers.

    Override the methods that the technique needs. Each gets the index of an optimizer and the
    optimizer that has this index now, even if another callback replaced it during the run:

    - :meth:`acts_on`: selects the optimizers;
    - :meth:`before_step`: runs before a step;
    - :meth:`before_update`: runs when the gradients of the step are complete;
    - :meth:`after_step`: runs after a step;
    - :meth:`evaluate`: computes the gradients of the step, once or several times;
    - :meth:`evaluates_again`: returns False for steps that need no second evaluation;
    - :meth:`run_backward`: differentiates a loss.

    Inside them, :meth:`multiply_rates` and :meth:`reset_moments` act on the current step. Store
    what must survive a checkpoint in :meth:`memory`. ``before_step``, ``before_update`` and
    ``after_step`` run under ``no_grad`` and on plain tensors.

    A step that the GradScaler skips calls neither ``before_step`` nor ``after_step``; a step
    without gradients (skipped by ``SkipNonFinite``) does not call ``after_step``. So compute in
    ``before_update`` what depends on the gradients, and store it in ``after_step``.

    Class attributes:

    - ``moves_weights``: whether ``after_step`` changes weights. It then comes before all other hooks
      of the step, so views of weights and monitors see the result, whatever the order of callbacks.
    - ``holds_weights``: whether ``after_step`` gives some weights their old values back. With
      ``moves_weights`` too, it then comes before techniques that move weights, such as Lookahead.
    """

    moves_weights: ClassVar[bool] = False
    holds_weights: ClassVar[bool] = False
    compatibility: ClassVar[Compatibility] = GradCallback.compatibility.but(
        fused_fp16=no(
            "counts optimizer steps, and {} decides inside its step whether the fp16 GradScaler skips it",
            "Use fused=False, or precision='bf16-mixed'",
        ),
        deepspeed=NO_ENGINE,
    )

    _seen = during_fit.of(dict[int, Optimizer])  # all optimizers, by index
    _ends = during_fit.of(dict[int, UndoList])  # undo steps for each optimizer that it acts on
    _rates = during_fit.of(dict[int, HeldRates])
    _memory = until_next_fit.of(dict[int, dict[str, Any]])
    _inside = during_fit.of(set[int])  # optimizers whose step() Lightning is running now
    _depths = during_fit.of(Counter[int])  # running step() methods: one may call that of a base class, with hooks too
    _window = during_fit[StepWindow | None](lambda _: None)

    def acts_on(self, index: int, optimizer: Optimizer) -> bool:
        """Return True to act on an optimizer. Called when a fit begins, and when an optimizer is replaced."""
        return True

    def before_step(self, index: int, optimizer: Optimizer) -> None:
        """Act before a step, also if the user calls ``step()`` on the raw torch optimizer.

        There are no gradients yet, except under a GradScaler, where this runs after
        ``before_update``.
        """

    def before_update(self, index: int, optimizer: Optimizer) -> None:
        """Change the accumulated, unscaled gradients of a step, or use them to change weights and rates.

        Later callbacks in the list and Lightning's own clipping still follow. ``step()`` on the raw
        torch optimizer does not call this.
        """

    def after_step(self, index: int, optimizer: Optimizer) -> None:
        """Act after a step that had gradients and was not skipped."""

    def evaluate(self, index: int, optimizer: Optimizer, closure: StepClosure) -> Any:
        """Compute the gradients of a step, and return what ``closure()`` returns.

        Call ``closure()`` first. After changing weights, call ``closure.again()``, then restore the
        weights. Under fp16, gradients are still multiplied by the loss scale here, and a non-finite
        one makes the GradScaler skip the step.

        These raise an error: two callbacks that override this, ``optimizer.step()`` without a closure
        or on the raw torch optimizer, and a ``training_step`` that fetches its own batches.
        """
        return closure()

    def evaluates_again(self) -> bool:
        """Return False if the current step does not call ``closure.again()``, so its batches need not be kept.

        Called before each batch of the step, under automatic optimization.
        """
        return True

    def run_backward(self, backward: Callable[..., Any], loss: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Call ``backward(loss, *args, **kwargs)``, with other arguments such as ``create_graph=True``, or not at all."""
        return backward(loss, *args, **kwargs)

    @property
    def watched(self) -> Mapping[int, Optimizer]:
        """The optimizers that it acts on now, by index."""
        return {index: self._seen[index] for index in self._ends}

    def memory(self, index: int) -> dict[str, Any]:
        """Return the memory of one optimizer: a dictionary for tensors, numbers, strings, lists and dicts.

        It is part of the callback's state; a resumed fit restores it on the device of the
        optimizer's parameters. An optimizer that replaces another during the run keeps its memory.
        """
        return self._memory.setdefault(index, {})

    def multiply_rates(self, index: int, factor: Factor | Sequence[Factor]) -> None:
        """Multiply the learning rates for the current step. Schedulers, monitors and checkpoints see the user's rates.

        If a rate is set during the step, by the training step for example, the new rate is
        multiplied and is kept afterwards. A second factor in one step replaces the first. Factors
        of several callbacks multiply.

        Args:
            index: Index of the optimizer.
            factor: One number for all parameter groups, or one for each.
        """
        self._rates[index].multiply(factor)

    def reset_moments(self, index: int) -> None:
        """Set the moments of an Adam-like optimizer to zero; keep its step count."""
        reset_moments_(list(self._seen[index].state.values()))

    def quantity_of(self, index: int, quantity: str) -> str:
        """Return the log name of a quantity of one optimizer, with its index if there are several optimizers."""
        return f"optimizer{index}/{quantity}" if len(self._seen) > 1 else quantity

    # The fit begins.

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self.fitting and _overrides(self, "evaluate"):
            self._refuse_a_second(trainer)
            if pl_module.automatic_optimization:
                refuse_dataloader_iter(pl_module.training_step, self.display_name)

    def _refuse_a_second(self, trainer: pl.Trainer) -> None:
        others = techniques_that_evaluate(trainer)
        if len(others) > 1:
            raise ValueError(f"{' and '.join(others)} would each evaluate every step several times. Keep one of them.")
        if getattr(trainer.strategy, "wants_to_compress", False):
            raise ValueError(
                f"{self.display_name} evaluates each step twice, and {type(trainer.strategy).__name__} would compress "
                "both gradients and add the error of the first to the second. Train with strategy='ddp'."
            )

    @override
    def state_dict(self) -> dict[str, Any]:
        kept = {str(index): dict(memory) for index, memory in self._memory.items()}
        return {**super().state_dict(), **({"memory": kept} if kept else {})}

    @override
    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        self._memory = {int(index): dict(memory) for index, memory in state.get("memory", {}).items()}
        for index, optimizer in self.watched.items():  # a search for a learning rate restores during the fit
            self._move_memory(index, optimizer)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.undo.push(lambda: self._leave(list(self._ends)))
        self._follow(trainer)
        self.undo.push(wrap_method(trainer.strategy, "optimizer_step", partial(self._step, trainer, pl_module)))
        if _overrides(self, "run_backward"):
            self.undo.push(wrap_method(trainer.strategy, "backward", self.run_backward))
        if _overrides(self, "evaluate") and pl_module.automatic_optimization:
            self._window = StepWindow(trainer, pl_module, self.evaluates_again)
            self.undo.push(self._window.watch())

    # The optimizers of the trainer.

    def _follow(self, trainer: pl.Trainer) -> None:
        """Attach to the trainer's current optimizers, and detach from those that it no longer has."""
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
        self._move_memory(index, optimizer)
        ends, rates = self._ends.setdefault(index, UndoList()), HeldRates(optimizer)
        self._rates[index] = rates
        ends.push(optimizer.register_step_pre_hook(lambda o, *_: self._before_step(index, rates)).remove)

        def after_step(*_: Any) -> None:
            self._after_step(index, rates)

        after_step.holds_weights = self.holds_weights  # type: ignore[attr-defined]
        handle = optimizer.register_step_post_hook(after_step)
        if self.moves_weights:
            hooks: Any = optimizer._optimizer_step_post_hooks
            hooks.move_to_end(handle.id, last=False)
            for key in [key for key, hook in hooks.items() if getattr(hook, "holds_weights", False)]:
                hooks.move_to_end(key, last=False)
        ends.push(handle.remove)
        ends.push(rates.give_back)

    def _move_memory(self, index: int, optimizer: Optimizer) -> None:
        """Move the memory of an optimizer to the device of its parameters."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if index in self._memory and parameters:
            device = parameters[0].device
            self._memory[index] = map_tensors(self._memory[index], lambda kept: kept.to(device))

    def _leave(self, indices: Iterable[int]) -> None:
        for index in indices:
            if index in self._ends:
                self._ends.pop(index).run()

    @override
    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self._depths.clear()  # a step of the raw torch optimizer may have raised
        self._follow(trainer)  # for steps of the raw torch optimizer, which do not reach _step

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
        """Wrap the strategy's ``optimizer_step``, the only place where the closure of a step can be replaced."""
        self._follow(trainer)
        index = self._number_of(optimizer)
        if index is not None and index in self._ends:
            self._inside.add(index)
            self._depths.clear()
            if _overrides(self, "evaluate") and not skips_backward(trainer):
                whole = StepClosure(closure, optimizer, trainer, pl_module, self._window, self.display_name)
                closure = partial(self.evaluate, index, optimizer, whole)
        try:
            return inner(optimizer, closure, *args, **kwargs)
        finally:
            if index in self._inside:
                self._inside.discard(index)
                self._rates[index].give_back()  # after_step does not run if the step raises or the GradScaler skips it
            if self._window is not None:
                self._window.end_step()

    @torch.no_grad()
    @on_plain_tensors
    def _before_step(self, index: int, rates: HeldRates) -> None:
        depths = self._depths
        depths[index] += 1
        if depths[index] > 1:
            return
        if index not in self._inside:
            rates.give_back()  # left by an earlier step of the raw torch optimizer that raised
            if _overrides(self, "evaluate"):
                raise RuntimeError(
                    f"{self.display_name} must evaluate each step itself, but step() was called on the raw torch "
                    "optimizer. Call it on the optimizer that Lightning passes to optimizer_step, or that "
                    "self.optimizers() returns."
                )
        self.before_step(index, self._seen[index])

    @override
    @torch.no_grad()
    @on_plain_tensors
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        index = self._number_of(optimizer)  # finds an optimizer that was replaced within its step too
        if index is None:
            index = optimizer_index(trainer, optimizer, self.display_name)
        if index in self._ends:
            self._rates[index].follow()  # the closure may have set a rate, which replaced the multiplied one
            self.before_update(index, optimizer)

    @torch.no_grad()
    @on_plain_tensors
    def _after_step(self, index: int, rates: HeldRates) -> None:
        depths = self._depths
        depths[index] -= 1
        if depths[index] > 0:
            return
        rates.give_back()
        optimizer = self._seen[index]
        if any(parameter.grad is not None for group in optimizer.param_groups for parameter in group["params"]):
            self.after_step(index, optimizer)


def _overrides(callback: OptimizerCallback, name: str) -> bool:
    return getattr(type(callback), name) is not getattr(OptimizerCallback, name)


def techniques_that_evaluate(trainer: pl.Trainer) -> list[str]:
    """Return the names of the trainer's callbacks that compute the gradients of a step at other weights."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return [c.display_name for c in callbacks if isinstance(c, OptimizerCallback) and _overrides(c, "evaluate")]
