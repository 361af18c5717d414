"""Callbacks that break a guarantee each, with the checks that must fail for them, and careful ones that break none.

They are plain Lightning callbacks, which know nothing of this package. ``python -m tests.testing.broken`` puts each of them
through every check, which takes a few minutes; the tests run the checks that share fits, and those that must fail.
"""

from __future__ import annotations

import copy
import importlib
import math
import sys
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_grad.testing import Project, ResumableLoader
from lightning_grad.testing.checks import CHECKS
from lightning_grad.testing.environment import settled
from lightning_grad.testing.rows import Rows
from lightning_grad.testing.subject import Subject


def scale_gradients(optimizer: Any, factor: Any) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.grad.mul_(factor)


def first_child(module: Any) -> Any:
    return next(iter(module.children()))


# Careful callbacks.


class Careful(pl.Callback):
    """Scales gradients by a factor that falls from step to step, and keeps the count."""

    def __init__(self, decay: float = 0.1) -> None:
        self.decay, self.steps = decay, 0

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage == "fit":
            self.steps = 0

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        scale_gradients(optimizer, 1.0 / (1.0 + self.decay * self.steps))
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.steps = state_dict["steps"]


class Hooked(pl.Callback):
    """Averages the output of a layer through a hook, and removes the hook at each end of a fit."""

    def __init__(self, momentum: float = 0.9) -> None:
        self.momentum = momentum
        self.mean: Tensor | None = None
        self._handle: Any = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self._remove()
        self._handle = first_child(pl_module).register_forward_hook(self._look)

    def _look(self, module: Any, inputs: Any, output: Any) -> None:
        if module.training:
            mean = output.detach().float().mean()
            self.mean = mean if self.mean is None else self.mean.lerp(mean, 1 - self.momentum)

    def _remove(self) -> None:
        if self._handle is not None:
            self._handle.remove()
        self._handle = None

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._remove()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._remove()


class Refuses(pl.Callback):
    """Refuses all that it may refuse, before the first batch."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.accumulate_grad_batches > 1:
            raise ValueError("Refuses cannot accumulate. Set accumulate_grad_batches=1.")
        if trainer.precision != "32-true" or trainer.world_size > 1 or trainer.gradient_clip_val is not None:
            raise RuntimeError("Refuses needs a plain Trainer.")
        if not pl_module.automatic_optimization:
            raise TypeError("Refuses needs automatic optimization.")


# G1


class NeedsRate(pl.Callback):
    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self.rate = pl_module.lr


class MakesNotFinite(pl.Callback):
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        with torch.no_grad():
            next(pl_module.parameters()).view(-1)[0] = torch.nan


class TrainsNothing(pl.Callback):
    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        trainer.should_stop = True
        trainer.fit_loop.max_epochs = 0


class NeedsPairs(pl.Callback):
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.inputs, _ = batch
        self.inputs = None


# G2


class HalvesSometimes(pl.Callback):
    """Draws a number even if the answer is known."""

    def __init__(self, probability: float = 1.0) -> None:
        self.probability = probability

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        scale_gradients(optimizer, 1.0 - 0.5 * (torch.rand(()) < self.probability))


class DividesByAccumulation(pl.Callback):
    """Averages what Lightning has averaged already."""

    def __init__(self, power: float = 1.0) -> None:
        self.power = power

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        scale_gradients(optimizer, 0.5**self.power / trainer.accumulate_grad_batches)


def neutral_division() -> DividesByAccumulation:
    return DividesByAccumulation(0.0)


# G3


def see(module: Any, *_: Any) -> None:
    """A hook that pickles."""


class HookStays(pl.Callback):
    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self.handle = first_child(pl_module).register_forward_hook(see)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.handle.remove()


class CleansUpInTeardown(pl.Callback):
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.handle = first_child(pl_module).register_forward_hook(see)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage == "fit":
            self.handle.remove()


class ForgetsCtrlC(pl.Callback):
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.handle = first_child(pl_module).register_forward_hook(see)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self.handle.remove()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        if isinstance(exception, Exception) and hasattr(self, "handle"):
            self.handle.remove()


class ForgetsAFailedStart(pl.Callback):
    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self.started = False
        pl_module.scratch = 1

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.started = True

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        del pl_module.scratch

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        if self.started:
            del pl_module.scratch


class Slim(nn.Linear):
    """A subclass that computes the same."""


class ClassStays(pl.Callback):
    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        next(child for child in pl_module.modules() if type(child) is nn.Linear).__class__ = Slim


class BufferStays(pl.Callback):
    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        pl_module.register_buffer("seen", torch.zeros(1), persistent=False)


class StepStays(pl.Callback):
    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        step = pl_module.training_step

        def patched_step(*arguments: Any) -> Any:
            return step(*arguments)

        pl_module.training_step = patched_step


class HookOfOptimizerStays(pl.Callback):
    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        for optimizer in trainer.optimizers:
            optimizer.register_step_post_hook(see)


class LambdaOnChild(pl.Callback):
    """Puts what does not pickle in the place of an attribute."""

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        first_child(pl_module).in_features = lambda: 6


class CounterStays(Careful):
    """Goes on counting in a second fit."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        pass


class CounterStaysAfterSuccess(CounterStays):
    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.left_over = True

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if getattr(self, "left_over", False):
            self.left_over, self.steps = False, 0


class CounterStaysAfterAnException(Careful):
    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        pass

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self.ended = True

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if getattr(self, "ended", False):
            self.ended, self.steps = False, 0


class CountsAllFits(pl.Callback):
    def __init__(self) -> None:
        self.batches = 0

    def on_train_batch_end(self, *_: Any) -> None:
        self.batches += 1

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.batches = state_dict["batches"]


class HoldsALambda(pl.Callback):
    def __init__(self, power: int = 2) -> None:
        self.of = lambda value: value**power


class KeyChangesInCopies(pl.Callback):
    @property
    def state_key(self) -> str:
        return f"{type(self).__name__} {id(self)}"


class HoldsTheModule(pl.Callback):
    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self.module = pl_module

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self.module = None

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.module = None


class ChangesClassInAFit(pl.Callback):
    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self._set(pl_module, nn.Linear, Slim)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self._set(pl_module, Slim, nn.Linear)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._set(pl_module, Slim, nn.Linear)

    def _set(self, module: Any, old: type, new: type) -> None:
        for child in module.modules():
            if type(child) is old:
                child.__class__ = new


# G4


class ReordersParameters(pl.Callback):
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        child = next(child for child in pl_module.modules() if type(child) is nn.Linear)
        child._parameters["weight"] = child._parameters.pop("weight")


class NumpyInState(pl.Callback):
    def state_dict(self) -> dict[str, Any]:
        return {"seen": np.zeros(3)}


class ObjectInState(pl.Callback):
    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        checkpoint["slim"] = Slim


class ValidatesOtherWeights(pl.Callback):
    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self._scale(pl_module, 0.5)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self._scale(pl_module, 2.0)

    def _scale(self, module: Any, factor: float) -> None:
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(factor)


class SavesOtherWeightsAlone(ValidatesOtherWeights):
    """Puts what was validated into checkpoints that it is asked about, and ``save_weights_only`` does not ask."""

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        checkpoint["raw"] = checkpoint["state_dict"]
        parameters = dict(pl_module.named_parameters())
        half = {name: value * 0.5 for name, value in checkpoint["raw"].items() if name in parameters}
        checkpoint["state_dict"] = {**checkpoint["raw"], **half}

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        if "raw" in checkpoint:
            pl_module.load_state_dict(checkpoint["raw"])


class BakesOnAnException(pl.Callback):
    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        with torch.no_grad():
            for parameter in pl_module.parameters():
                parameter.clamp_(min=0)


class CannotSaveAfterAnException(pl.Callback):
    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.mask: Any = torch.ones(2)

    def state_dict(self) -> dict[str, Any]:
        return {"mask": self.mask.clone()}

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.mask = None


class RestoresWeightsOfTheStart(pl.Callback):
    """Puts back the weights at the start of a validation. They may take the place of those that EMA keeps."""

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self.weights = copy.deepcopy(pl_module.state_dict())

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        pl_module.load_state_dict(self.weights)


class KeepsOptimizerStates(pl.Callback):
    """Moves the state of optimizers to a place where only it finds them."""

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        checkpoint["mine"] = checkpoint.pop("optimizer_states")

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        if "mine" in checkpoint:
            checkpoint["optimizer_states"] = checkpoint.pop("mine")


class NeedsItsKey(pl.Callback):
    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        checkpoint["its_key"] = 1

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        checkpoint["its_key"] += 1


# G5


class DrawsWhenSaved(pl.Callback):
    def state_dict(self) -> dict[str, Any]:
        return {"seed": 0 * int(torch.randint(9, ()))}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


class LosesCounter(Careful):
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


class SavesAtEpochsOnly(Careful):
    """Saves the count of the latest validation."""

    at_validation = 0

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.at_validation = self.steps

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.at_validation}


class LosesEpoch(Careful):
    """Counts epochs, and saves nothing."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        scale_gradients(optimizer, 1.0 / (1.0 + self.decay * self.steps))

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.steps += 1


class CountsStepsForBatches(Careful):
    """Resumes with the number of steps, though it counts batches."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.steps += 1

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        scale_gradients(optimizer, 1.0 / (1.0 + self.decay * self.steps))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        self.steps = checkpoint["global_step"]


class ResetsOnAnException(Careful):
    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.steps = 0


# G6: each fails after the first batch has begun.


class DividesBySteps(pl.Callback):
    """Needs an optimizer step after every batch."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.steps = 0

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.steps += 1

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.share = 1 / self.steps


class NeedsFloatOutputs(pl.Callback):
    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self._handle = first_child(pl_module).register_forward_hook(self._look)

    def _look(self, module: Any, inputs: Any, output: Tensor) -> None:
        if module.training and output.dtype is torch.bfloat16 != next(module.parameters()).dtype:
            raise TypeError("bfloat16 is not supported")

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage == "fit":
            self._handle.remove()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._handle.remove()


class NeedsFloatWeights(pl.Callback):
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        for parameter in pl_module.parameters():
            parameter.detach() @ torch.ones(parameter.shape[-1])


class NeedsFiniteGradients(pl.Callback):
    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        torch.nn.utils.get_total_norm(
            [parameter.grad for parameter in pl_module.parameters() if parameter.grad is not None],
            error_if_nonfinite=True,
        )


class ClipsToo(pl.Callback):
    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if trainer.gradient_clip_val:
            raise RuntimeError("Both clip.")


class NeedsEpochs(pl.Callback):
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.angle = math.sqrt(trainer.max_epochs)


class NeedsValidation(pl.Callback):
    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.best = trainer.callback_metrics["val_loss"]


class NeedsManySteps(pl.Callback):
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.share = batch_idx / (trainer.num_training_batches - 1)


class NeedsAScheduler(pl.Callback):
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.scheduler_interval = trainer.lr_scheduler_configs[0].interval


class NeedsAdam(pl.Callback):
    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        for state in optimizer.state.values():
            if state:
                state["exp_avg_sq"].abs_()


class NeedsAllGradients(pl.Callback):
    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        for parameter in pl_module.parameters():
            parameter.grad.mul_(0.5)


class MovesFrozenWeights(pl.Callback):
    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        with torch.no_grad():
            for parameter in pl_module.parameters():
                parameter.mul_(0.99)


class Thaws(pl.Callback):
    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        pl_module.requires_grad_(True)


class NeedsNoCompiler(pl.Callback):
    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if any(child._compiled_call_impl is not None for child in pl_module.modules()):
            raise RuntimeError("A module is compiled.")


class StepsOtherwiseIfCompiled(pl.Callback):
    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if any(child._compiled_call_impl is not None for child in pl_module.modules()):
            scale_gradients(optimizer, 0.0)


class NeedsOneNamespace(pl.Callback):
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if not isinstance(trainer, pl.Trainer):
            raise TypeError("not a Trainer")


class FailsOnRankOne(pl.Callback):
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_rank == 1:
            raise RuntimeError("only here")


class TrainsOtherwiseOnRankOne(pl.Callback):
    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        scale_gradients(optimizer, 1.0 + trainer.global_rank)


# G7


class ReadsLoss(pl.Callback):
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.loss = outputs["loss"].item()


class CopiesGradients(pl.Callback):
    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        for parameter in pl_module.parameters():
            if parameter.grad is not None:
                parameter.grad.cpu()


class SyncsInForward(Hooked):
    def _look(self, module: Any, inputs: Any, output: Any) -> None:
        if module.training and bool(output.isnan().any()):
            warnings.warn("A value is not finite.", stacklevel=2)


class SyncsInBackward(pl.Callback):
    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self._handle = list(pl_module.children())[-1].register_full_backward_hook(self._look)

    def _look(self, module: Any, inputs: Any, outputs: Any) -> None:
        self.norm = float(outputs[0].norm())

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage == "fit":
            self._handle.remove()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._handle.remove()


class SyncsInOptimizer(pl.Callback):
    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self._handles = [optimizer.register_step_post_hook(self._look) for optimizer in trainer.optimizers]

    def _look(self, optimizer: Any, arguments: Any, keywords: Any) -> None:
        self.largest = max(float(parameter.detach().abs().max()) for parameter in optimizer.param_groups[0]["params"])

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage == "fit":
            self._remove()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._remove()


# G8


class WarnsAtEveryStep(pl.Callback):
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        warnings.warn("The loss is large.", stacklevel=2)


class WarnsWithNumbers(pl.Callback):
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        warnings.warn(f"The loss of step {trainer.global_step} is large.", stacklevel=2)


class TakesText(pl.Callback):
    def __init__(self, every: bool = 3) -> None:  # type: ignore[assignment]
        self.every = every


class TakesAnyNumber(pl.Callback):
    def __init__(self, *layers: str) -> None:
        self.layers = layers


def takes_any_number() -> TakesAnyNumber:
    return TakesAnyNumber("head")


def takes_text() -> TakesText:
    return TakesText(3)  # type: ignore[arg-type]


# A project on which a fit takes little time. The tests in tests/contract/ use the tool's own.

OPTIMIZERS: dict[str, Any] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
}


def small_class(base: Any) -> Any:
    class Small(base):  # type: ignore[misc]
        """Batch normalization between two layers, and a scheduler."""

        def __init__(self, optimizer: str = "adamw", manual: bool = False) -> None:
            super().__init__()
            self.body, self.norm, self.head = nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)
            self.automatic_optimization, self.optimizer = not manual, optimizer

        def forward(self, x: Tensor) -> Any:
            return self.head(torch.relu(self.norm(self.body(x))))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if isinstance(batch, dict):
                return {"loss": self._loss(batch), "size": 4}
            if self.automatic_optimization:
                return self._loss(batch)
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                loss = self._loss(batch)
                self.manual_backward(loss)
                optimizer.step()
            return loss

        def _loss(self, batch: Any) -> Tensor:
            inputs, labels = (batch["inputs"], batch["labels"]) if isinstance(batch, dict) else batch
            return nn.functional.cross_entropy(self(inputs), labels)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", self._loss(batch), sync_dist=True)

        def configure_optimizers(self) -> Any:
            make = OPTIMIZERS[self.optimizer]
            if not self.automatic_optimization:
                return [make(self.body.parameters()), make([*self.norm.parameters(), *self.head.parameters()])]
            optimizer = make(self.parameters())
            scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=9)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    return Small


Small = small_class(pl.LightningModule)
Small.__qualname__ = "Small"  # where pickle looks for it


def _samples(batches: int, named: bool = False) -> Any:
    inputs = torch.randn(4 * batches, 6, generator=torch.Generator().manual_seed(batches))
    pairs = zip(inputs, inputs[:, :3].argmax(1), strict=True)
    return [{"inputs": x, "labels": y, "name": "a"} if named else (x, y) for x, y in pairs]


def small(**arguments: Any) -> Any:
    return Small(**arguments), ResumableLoader(_samples(5), 4), DataLoader(_samples(2), 4)


def _of_pytorch_lightning() -> Any:
    module = small_class(importlib.import_module("pytorch_lightning").LightningModule)()
    return module, *small()[1:]


def _project(build: Any, **rest: Any) -> Project:
    return Project(build, "small", {"max_epochs": 2}, "val_loss", **rest)


SMALL = _project(
    small,
    variants={
        "dictionaries": _project(lambda: (Small(), *(DataLoader(_samples(size, named=True), 4) for size in (5, 2)))),
        "manual_optimization": _project(lambda: small(manual=True)),
        "no_second_moment": _project(lambda: small(optimizer="sgd")),
        "pytorch_lightning": _project(_of_pytorch_lightning),
    },
)


# What must fail.

LEFT = ("g3_no_trace_after_an_exception", "g3_no_trace_after_ctrl_c")
AGAIN = ("g3_second_fit_equals_the_first", "g3_fit_after_an_exception_equals_the_first")
AFTER_EXCEPTIONS = ("g5_resumes_after_exceptions",)
RESUMES = (
    "g5_resumes_within_an_epoch",
    "g5_resumes_at_an_epochs_end",
    "g5_resumes_with_accumulation",
    *AFTER_EXCEPTIONS,
)


class Broken(NamedTuple):
    """A callback, the checks that must fail, words that one of them must say, and where its fault is."""

    make: Callable[[], Any]
    fails: tuple[str, ...]
    words: str = ""
    neutral: Callable[[], Any] | None = None
    at: Any = None
    """The function that holds the line at fault."""


FIT_FAILS = [
    Broken(NeedsRate, ("g1_trains_an_unmodified_module",), "no attribute 'lr'"),
    Broken(MakesNotFinite, ("g1_trains_an_unmodified_module",), "is not finite"),
    Broken(TrainsNothing, ("g1_trains_an_unmodified_module",), "No weight changed in the fit."),
]
"""Those that do not train at all, so nothing else is tried."""

BROKEN = [
    Broken(
        NeedsPairs, ("g1_trains_with_dictionaries",), "too many values to unpack", at=NeedsPairs.on_train_batch_start
    ),
    Broken(
        HalvesSometimes,
        ("g2_neutral_is_identity", "g2_neutral_with_accumulation"),
        "random generator",
        lambda: HalvesSometimes(0.0),
    ),
    Broken(DividesByAccumulation, ("g2_neutral_with_accumulation",), "differs", neutral_division),
    Broken(HookStays, ("g3_no_trace_after_success",), "body._forward_hooks holds see", at=see),
    Broken(CleansUpInTeardown, LEFT, "body._forward_hooks holds see"),
    Broken(ForgetsCtrlC, ("g3_no_trace_after_ctrl_c",), "_forward_hooks"),
    Broken(ForgetsAFailedStart, ("g3_no_trace_after_a_failed_start",), "scratch"),
    Broken(ClassStays, ("g3_no_trace_after_success",), "Slim"),
    Broken(BufferStays, ("g3_no_trace_after_success",), "seen"),
    Broken(StepStays, ("g3_no_trace_after_success",), "patched_step", at=StepStays.on_train_end),
    Broken(HookOfOptimizerStays, ("g3_no_trace_after_success",), "_optimizer_step_post_hooks"),
    Broken(LambdaOnChild, ("g3_no_trace_after_success",), "body of the module does not pickle"),
    Broken(CounterStays, AGAIN, "weights of the"),
    Broken(CounterStaysAfterSuccess, AGAIN[:1], "weights of the second fit"),
    Broken(CounterStaysAfterAnException, AGAIN[1:], "weights of the fit after an exception"),
    Broken(CountsAllFits, AGAIN, "state after the second fit: callbacks/0/batches"),
    Broken(HoldsALambda, ("g3_pickles_and_copies",), "attribute of"),
    Broken(KeyChangesInCopies, ("g3_pickles_and_copies",), "changes state_key"),
    Broken(HoldsTheModule, ("g3_copy_in_a_fit_holds_no_run",), "holds an object of type Small"),
    Broken(ChangesClassInAFit, ("g3_module_copied_in_a_fit_is_plain",), "Slim"),
    Broken(ReordersParameters, ("g4_state_dict_keys_in_a_fit", "g4_with_weight_averaging"), "their order"),
    Broken(NumpyInState, ("g4_checkpoint_loads_by_default",), "numpy", at=NumpyInState.state_dict),
    Broken(ObjectInState, ("g4_checkpoint_loads_by_default",), "Slim", at=ObjectInState.on_save_checkpoint),
    Broken(ValidatesOtherWeights, ("g4_checkpoint_computes_what_was_validated",), "computes"),
    Broken(
        SavesOtherWeightsAlone,
        (
            "g4_other_checkpoints_hold_the_same_weights",
            "g4_checkpoint_on_exception",
            "g4_with_weight_averaging",
        ),
        "weights",
    ),
    Broken(BakesOnAnException, ("g4_checkpoint_on_exception", *AFTER_EXCEPTIONS), "differs"),
    Broken(CannotSaveAfterAnException, ("g4_checkpoint_on_exception", *AFTER_EXCEPTIONS), "saving it fails"),
    Broken(RestoresWeightsOfTheStart, ("g4_with_weight_averaging",), "plain module computes"),
    Broken(KeepsOptimizerStates, ("g4_a_run_without_it_continues",), "optimizer state"),
    Broken(NeedsItsKey, ("g4_continues_a_run_without_it",), "its_key", at=NeedsItsKey.on_load_checkpoint),
    Broken(DrawsWhenSaved, ("g5_saving_changes_nothing",), "random"),
    Broken(LosesCounter, RESUMES, "steps", at=Careful.state_dict),
    Broken(SavesAtEpochsOnly, (RESUMES[0], *RESUMES[2:]), "steps"),
    Broken(LosesEpoch, RESUMES[1:], "steps"),
    Broken(CountsStepsForBatches, ("g5_resumes_with_accumulation",), "resumed at epoch=1"),
    Broken(ResetsOnAnException, AFTER_EXCEPTIONS, "after exceptions"),
    Broken(DividesBySteps, ("g6_accumulation", "g5_resumes_with_accumulation"), "division by zero"),
    Broken(NeedsFloatOutputs, ("g6_bf16_mixed",), "bfloat16 is not supported"),
    Broken(NeedsFloatWeights, ("g6_bf16_true",), "RuntimeError: "),
    Broken(NeedsFiniteGradients, ("g6_fp16_with_overflow", "g7_no_host_sync"), "non-finite"),
    Broken(ClipsToo, ("g6_gradient_clip_val",), "Both clip."),
    Broken(NeedsEpochs, ("g6_max_steps_and_val_check_interval",), "math domain error"),
    Broken(NeedsValidation, ("g6_no_validation",), "KeyError: 'val_loss'"),
    Broken(NeedsManySteps, ("g6_fast_dev_run",), "division by zero"),
    Broken(NeedsAScheduler, ("g6_manual_optimization_with_two_optimizers",), "IndexError"),
    Broken(NeedsAdam, ("g6_optimizer_without_second_moment",), "exp_avg_sq"),
    Broken(NeedsAllGradients, ("g6_frozen_parameters",), "NoneType", at=NeedsAllGradients.on_before_optimizer_step),
    Broken(MovesFrozenWeights, ("g6_frozen_parameters",), "frozen body.weight"),
    Broken(Thaws, ("g6_frozen_parameters",), "frozen body.weight"),
    Broken(NeedsNoCompiler, ("g6_compiled_submodules",), "A module is compiled."),
    Broken(StepsOtherwiseIfCompiled, ("g6_compiled_submodules",), "differs from the run without a compiler"),
    Broken(NeedsOneNamespace, ("g6_pytorch_lightning",), "not a Trainer"),
    Broken(FailsOnRankOne, ("g6_two_ranks",), "only here", at=FailsOnRankOne.on_train_batch_end),
    Broken(TrainsOtherwiseOnRankOne, ("g6_two_ranks",), "on the other rank"),
    Broken(ReadsLoss, ("g7_no_host_sync",), "on_train_batch_end", at=ReadsLoss.on_train_batch_end),
    Broken(CopiesGradients, ("g7_no_host_sync",), "on_before_optimizer_step"),
    Broken(SyncsInForward, ("g7_no_host_sync",), "training_step", at=SyncsInForward._look),
    Broken(SyncsInBackward, ("g7_no_host_sync",), "backward", at=SyncsInBackward._look),
    Broken(SyncsInOptimizer, ("g7_no_host_sync",), "register_step_post_hook", at=SyncsInOptimizer._look),
    Broken(WarnsAtEveryStep, ("g8_warns_once",), "warns 10 times"),
    Broken(WarnsWithNumbers, ("g8_warns_once",), "warns 10 times"),
    Broken(takes_text, ("g8_yaml_round_trip",), "every", at=TakesText.__init__),
    Broken(takes_any_number, ("g8_yaml_round_trip",), "*layers"),
]
CAREFUL = [Broken(Careful, (), "", lambda: Careful(0.0)), Broken(Hooked, ()), Broken(Refuses, ())]


def rows_of(broken: Broken, names: Iterable[str] = CHECKS) -> Rows:
    """Run checks on the small project, in their order."""
    with settled():
        subject = Subject(broken.make, broken.neutral, SMALL)
        return Rows([CHECKS[name].of(subject) for name in CHECKS if name in set(names)], broken.make.__name__)


def main() -> None:
    """Put each through every check, or those that are named, and print where others fail than must."""
    wrong = 0
    for broken in [*BROKEN, *CAREFUL]:
        if sys.argv[1:] and broken.make.__name__ not in sys.argv[1:]:
            continue
        rows = rows_of(broken)
        other = {row.check for row in rows.failed} ^ set(broken.fails)
        wrong += bool(other)
        if other or sys.argv[1:]:
            print(rows if sys.argv[1:] else rows.failed, "Unexpected:", sorted(other), sep="\n", flush=True)
    sys.exit(wrong)


if __name__ == "__main__":
    main()
