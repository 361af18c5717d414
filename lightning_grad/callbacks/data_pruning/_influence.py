"""Influence of the samples on a target (LESS): the source of its scores, and what it reads of the optimizers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_grad.callbacks.data_pruning import _measures as measures
from lightning_grad.callbacks.data_pruning._score_source import SeveralPasses
from lightning_grad.callbacks.data_pruning._target import trained_parameters
from lightning_grad.core.losses.look import Look
from lightning_grad.core.ranks import sum_over_ranks
from lightning_grad.core.views.adapted_layer import adapters_of
from lightning_grad.functional import AdamMoments, GradientCosines
from lightning_grad.utilities.checks import owned_ids
from lightning_grad.utilities.reporting import counted

if TYPE_CHECKING:
    from lightning_grad.callbacks.data_pruning._passes import Passes
    from lightning_grad.callbacks.data_pruning._scored import ScoredSet
    from lightning_grad.callbacks.data_pruning.data_pruning import DataPruning

_MOMENTS = {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}  # others rotate, scale or share the moments
_LEAST_RATE = 1e-30  # weight of a pass at rate 0, so passes that are all at rate 0 have a mean too


class InfluenceScores(SeveralPasses):
    """The cosines between the target's gradient and each sample's step, averaged over passes by learning rate."""

    by_terms = True

    def __init__(self, name: str) -> None:
        super().__init__(name)
        # Sums over the passes: learning rate times cosine, and learning rates where there is one, (n, targets) each.
        self._record: dict[str, Tensor] = {}
        self._found: Mapping[str, Tensor] = {}
        self._has_said = False

    @override
    def prepare(self, passes: Passes) -> None:
        callback = passes.callback
        _compared(passes.trainer, passes.pl_module, callback.include, callback.display_name)
        for target in passes.targets:
            target.check()

    @override
    def rehearse(self, passes: Passes) -> Mapping[str, Tensor] | None:
        return passes.rehearse(self._measure(passes, rehearses=True))

    @override
    def epoch_begins(self, passes: Passes) -> None:
        if self._is_due(passes):
            self._add_pass(passes)

    def _add_pass(self, passes: Passes) -> None:
        measure = self._measure(passes)
        self._found = passes.run(measure, "Collecting gradients for less")
        cosines = self._found["score"]
        rates = max(measure.rate, _LEAST_RATE) * (~cosines.isnan()).double()
        for name, value in (("cosines", rates * cosines.nan_to_num(nan=0.0)), ("rates", rates)):
            self._record[name] = self._record.get(name, 0.0) + value

    def _measure(self, passes: Passes, rehearses: bool = False) -> Influence:
        """Return the measure of a pass with the current weights, moments and rates."""
        callback, trainer = passes.callback, passes.trainer
        parameters = _compared(trainer, passes.pl_module, callback.include, callback.display_name)
        aims = []
        for target in passes.targets:
            few = range(min(target.batch_size, len(target))) if rehearses else None
            aims.append(target.mean_gradient(parameters, few))
            if few is not None and _size(aims[-1]) == 0.0:  # the others may have a gradient
                aims[-1] = target.mean_gradient(parameters)
            size = _size(aims[-1])
            if size == 0.0 or not math.isfinite(size):
                raise ValueError(
                    f"{callback.display_name} compares directions with the gradient of the target, but it is "
                    f"{'zero' if size == 0.0 else 'not finite'}. Check the loss of training_step on the target in eval "
                    "mode, or set include to other parameters."
                )
        moments = _moments(trainer, parameters)
        if not rehearses:
            self._say(callback, trainer, parameters, moments)
        cosines = GradientCosines(1, aims, moments, callback.projection, callback.seed)
        return Influence(parameters, cosines, _rate(trainer, parameters), callback.scores_by == "sample")

    def _say(
        self,
        callback: DataPruning,
        trainer: pl.Trainer,
        parameters: Mapping[str, Tensor],
        moments: Mapping[str, AdamMoments],
    ) -> None:
        """Print once whether the directions are those of Adam."""
        if self._has_said:
            return
        self._has_said = True
        rest, total = len(parameters) - len(moments), counted(len(parameters), "parameter")
        kinds = ", ".join(dict.fromkeys(type(optimizer).__name__ for optimizer in trainer.optimizers))
        how = f"the directions of Adam's steps in {total}"
        if rest == len(parameters):
            how = f"the gradients of {total}, because {kinds} has no moments like Adam's so far"
        elif rest:
            how = f"{how}; of {rest} of them the gradients, because {kinds} has no moments like Adam's for these so far"
        what = "the target"
        if callback.target is None:
            what = "the validation set. Test on other samples: metrics of this set are now too good"
        rank_zero_info(f"{callback.display_name} compares {how}, with the gradient of {what}.")

    @override
    def take(self, passes: Passes) -> ScoredSet:
        if not self._found:  # the round was due before this fit began, or is now, by a changed epoch
            self._add_pass(passes)
        values = (self._record["cosines"] / self._record["rates"]).amax(1)  # nan where no pass had a cosine
        found, self._record, self._found = self._found, {}, {}
        return self._scored(passes, values, found)

    @property
    def is_recording(self) -> bool:  # type: ignore[override]
        return bool(self._record)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"record": self._record, "begun_in": self._begun_in}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._record, self._begun_in = state["record"], state["begun_in"]


class Influence:
    """Measure of a batch: the cosines between the gradients of the targets and the direction of each sample.

    Args:
        parameters: The parameters that are compared, by name.
        cosines: The gradients of the targets, and Adam's moments.
        rate: Learning rate of the pass.
        alone: Whether batches have one sample, whose loss is that of the step.
    """

    def __init__(self, parameters: Mapping[str, Tensor], cosines: GradientCosines, rate: float, alone: bool) -> None:
        self.rate = rate
        self._parameters, self._cosines, self._alone = parameters, cosines, alone

    def __call__(self, look: Look) -> Mapping[str, Tensor]:
        cosines = self._cosines
        cosines.begin(len(look.indices))
        with _only(self._parameters, look.pl_module):
            if self._alone:
                return self._of_one(look, cosines)
            found = look.gradient_rows(cosines.add)
        # A sample whose positions are all ignored has no gradient of its own, but Adam would step all the same.
        ignored = found.losses.detach().isnan()[:, None]
        scores = cosines.values.to(ignored.device).masked_fill(ignored, float("nan"))
        return {"score": scores, **measures.classes_of_losses(found)}

    def _of_one(self, look: Look, cosines: GradientCosines) -> Mapping[str, Tensor]:
        with torch.enable_grad():
            loss = measures.alone(look)
            gradients = torch.autograd.grad(loss, list(self._parameters.values()), allow_unused=True)
        for name, gradient in zip(self._parameters, gradients, strict=True):
            if gradient is not None:
                cosines.add(name, 0, gradient.detach().float().reshape(1, -1))
        return {"score": cosines.values, "loss": loss.detach().reshape(1)}


@contextmanager
def _only(parameters: Mapping[str, Tensor], pl_module: pl.LightningModule) -> Iterator[None]:
    """Freeze all other parameters, so no backward pass reaches them."""
    chosen = set(map(id, parameters.values()))
    others = [p for p in pl_module.parameters() if p.requires_grad and id(p) not in chosen]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)


def _compared(
    trainer: pl.Trainer, pl_module: pl.LightningModule, include: Sequence[str] | None, display_name: str
) -> dict[str, Tensor]:
    """Return the parameters whose gradients are compared: those of adapters if there are any, else all trained ones.

    Raises:
        ValueError: If no parameter is left, or one is complex.
    """
    found = trained_parameters(pl_module, include, display_name)
    owned = {key for optimizer in trainer.optimizers for key in owned_ids(optimizer)}
    adapted = {id(parameter) for adapter in adapters_of(pl_module) for parameter in adapter.own.values()}
    known = owned & adapted if include is None and owned & adapted else owned
    moving = {name: parameter for name, parameter in found.items() if id(parameter) in known}
    if not moving:
        raise ValueError(
            f"{display_name} compares steps, but no optimizer holds the parameters that include={include} selects. "
            "Include others, or pass these to an optimizer."
        )
    for name in (name for name, parameter in moving.items() if parameter.is_complex()):
        raise ValueError(
            f"{display_name} compares real gradients, but {name} is complex. Store it as real and imaginary part, or set "
            "include to other parameters."
        )
    return moving


def _size(gradients: Mapping[str, Tensor]) -> float:
    return float(torch.nn.utils.get_total_norm(list(gradients.values())))


def _groups(optimizers: Sequence[Optimizer]) -> Iterator[tuple[Optimizer, Mapping[str, Any]]]:
    """Yield all parameter groups, each with the optimizer that moves it: one with parts has several."""
    for optimizer in optimizers:
        for part in getattr(optimizer, "parts", [optimizer]):
            for group in part.param_groups:
                yield part, group


def _moments(trainer: pl.Trainer, parameters: Mapping[str, Tensor]) -> dict[str, AdamMoments]:
    """Return the moments of the parameters that an optimizer like Adam moves, by name."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    found: dict[str, AdamMoments] = {}
    for optimizer, group in _groups(trainer.optimizers):
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if id(parameter) in names and _is_adam(optimizer, group, state, parameter):
                (first, second), step = group["betas"], float(state["step"])
                own = state["exp_avg"], state["exp_avg_sq"], step, (float(first), float(second)), float(group["eps"])
                largest = state["max_exp_avg_sq"] if group.get("amsgrad") else None
                found[names[id(parameter)]] = AdamMoments(*own, largest)
    # An optimizer that splits its state between ranks has moments on one rank only, and all ranks must agree.
    flags = torch.tensor([float(name in found) for name in parameters], device=trainer.strategy.root_device)
    shared = sum_over_ranks(trainer, flags) == trainer.world_size
    return {name: found[name] for name, on_all in zip(parameters, shared.tolist(), strict=True) if on_all}


def _is_adam(optimizer: Optimizer, group: Mapping[str, Any], state: Mapping[str, Any], parameter: Tensor) -> bool:
    if not {"step", "exp_avg", "exp_avg_sq"} <= state.keys() <= _MOMENTS or not {"betas", "eps"} <= group.keys():
        return False
    if not getattr(optimizer, "moments_of_entries", True):
        return False
    return bool(state["exp_avg"].shape == state["exp_avg_sq"].shape == parameter.shape)


def _rate(trainer: pl.Trainer, parameters: Mapping[str, Tensor]) -> float:
    """Return the learning rate of the parameters: the mean over their entries."""
    sizes = {id(parameter): parameter.numel() for parameter in parameters.values()}
    pairs = [
        (float(group["lr"]), sizes[id(parameter)])
        for _, group in _groups(trainer.optimizers)
        for parameter in group["params"]
        if id(parameter) in sizes
    ]
    return sum(rate * size for rate, size in pairs) / sum(size for _, size in pairs)
