"""Zeroth-order steps (MeZO): the callback. Directions are drawn by :func:`lightning_grad.functional.move_along_`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import SGD, Optimizer
from typing_extensions import override

from lightning_grad.callbacks.optimizers._trained_scales import ScalesByName, TrainedScales, refuse_with_bits
from lightning_grad.core import (
    WHOLE_WEIGHTS,
    Compatibility,
    OptimizerCallback,
    StepClosure,
    check_above,
    check_count,
    during_fit,
    is_log_step,
    manual,
    mean_over_ranks,
    no,
    until_next_fit,
    wrap_method,
    yes,
)
from lightning_grad.core.dispatch import overrides
from lightning_grad.core.roles import conditioners
from lightning_grad.functional import move_along_
from lightning_grad.functional.plain_tensors import on_plain_tensors
from lightning_grad.utilities.checks import check_count_between, check_finite
from lightning_grad.utilities.optimizers import OptimizerCounts
from lightning_grad.utilities.parameters import all_names, as_names, check_patterns, selects, why_none_left
from lightning_grad.utilities.reporting import counted, listed

_NEED_GRADIENTS = ("LBFGS", "AdaHessian", "SophiaH")  # classes of libraries
_STEPS_OF_A_SEED = 2**20  # so runs with neighboring values of seed do not share directions
_NO_SCALER = no("has no backward pass whose gradients {} could scale", "Use precision='bf16-mixed' or 32")


class ZerothOrder(OptimizerCallback):
    r"""Estimate gradients from two forward passes, without backward, in the memory of inference (MeZO).

    .. math::
        g = d \, z, \qquad d = \frac{L(w + \epsilon z) - L(w - \epsilon z)}{2 \epsilon}, \qquad
        z \sim \mathcal N(0, I)

    Both passes see the same batch and the same random numbers (dropout). Ranks draw the same
    direction, and d is the mean over the ranks. The direction z is drawn again from a seed whenever it
    is needed. With SGD without momentum, the step ``w - lr (d z + weight_decay w)`` is made in place,
    so nothing of the size of the weights is stored. For other optimizers, clipping and techniques
    that read gradients or act on optimizer steps, the gradient d z is stored.

    With ``bits`` the weights of Linear, Conv and attention layers become integers times scales, and
    only the scales s move (QZO):

    .. math::
        w = k \, s, \qquad s \leftarrow \max(s - \eta \, d \, z, 0)

    The integers k keep their values in the whole run, and other parameters do not train. The module
    and its checkpoints hold the products k s. A weight that lies on such a grid at the start, such as
    one that ``LearnedRounding`` rounded, keeps its integers.

    Args:
        epsilon: Length of the move (1e-3 in the paper).
        max_derivative: Clamp d to this magnitude; None does not.
            QZO clamps it, because the loss is steeper along scales than along weights.
        bits: Round weights to integers of this many bits, 2 to 8, and train only their scales (QZO).
            None trains the weights.
        group_size: Entries of an output channel that share a scale, with bits.
            Default: all. A channel that does not divide into groups has one scale.
        seed: Start of the directions.
        include: Names or wildcards of the parameters or modules to train. Default: all that the
            optimizer holds.
        exclude: Names or wildcards of the parameters or modules not to train.
        name: Name of this instance, part of its log keys and its state.

    Raises:
        ValueError: In the constructor if epsilon or max_derivative is not above 0, or there is no such
            grid. Before the first batch with gradient accumulation, fp16, manual optimization, FSDP, DeepSpeed, a
            compressing strategy, LBFGS, a ``training_step`` that fetches its own batches, another
            technique that evaluates steps, or a name pattern that matches nothing. With ``bits`` also
            with another optimizer than SGD without momentum, whatever reads gradients or acts on
            steps, views of weights, and float16 weights.
        RuntimeError: In the first step if the module's ``optimizer_step`` runs the closure itself, or
            calls ``step()`` on the raw torch optimizer.

    **Hooks.** The closure that Lightning passes to the strategy's ``optimizer_step``. ``backward`` and
    the hooks around it are not called. The reported loss is that at ``w + epsilon z``.

    **Logs** under ``zeroth_order/``, at log steps: ``derivative`` (d).

    **State.** The number of steps of each optimizer, and the scales.

    **Cost.** Two forward passes without a graph, and four draws of the direction. With other
    optimizers than SGD without momentum, the memory of gradients and of the optimizer's state. With
    ``bits``, three times a step each weight is divided by its old scales and multiplied by the new
    ones; the integers are not stored.

    Example:
        .. code-block:: yaml

            trainer:
              callbacks:
                - class_path: lightning_grad.callbacks.ZerothOrder
                  init_args:
                    epsilon: 0.001

    References:
        Malladi et al., "Fine-Tuning Language Models with Just Forward Passes", NeurIPS 2023, arXiv
        2305.17333, algorithm 1. Shang et al., "Fine-tuning Quantized Neural Networks with Zeroth-order
        Optimization", 2025, arXiv 2505.13430 (``bits`` and ``max_derivative``).
    """

    namespace: ClassVar[str] = "zeroth_order"
    compatibility: ClassVar[Compatibility] = OptimizerCallback.compatibility.but(
        accumulation=no(
            "takes a step for each batch, and {} would take one for several",
            "Set accumulate_grad_batches=1 and use a larger batch: without a graph it needs little memory",
        ),
        fp16=_NO_SCALER,
        fused_fp16=_NO_SCALER,
        ddp=yes("Ranks draw the same directions and average the derivative."),
        late_gradients=no("has no backward pass whose gradients {} could exchange", "Train with strategy='ddp'"),
        local_steps=no(
            "exchanges one number in every step, and {} exists to exchange nothing for many",
            "Train with strategy='ddp'",
        ),
        **manual(no("replaces the backward pass, which {} calls itself", "Use automatic optimization")),
        **WHOLE_WEIGHTS,
    )
    trial: ClassVar[Mapping[str, Any]] = {"epsilon": 1e-2}
    neutral: ClassVar[Mapping[str, Any] | str] = "it computes no gradient at any setting"
    fixed_settings: ClassVar[Mapping[str, str]] = {
        "bits": "the weights are rounded to integers of this many bits",
        "group_size": "each group of weights has its own scale",
    }

    _steps = until_next_fit.of(OptimizerCounts).saved()
    _scales = until_next_fit.of(ScalesByName).saved()
    _scaled = during_fit[TrainedScales | None](lambda _: None)  # with bits
    _trainer = during_fit[pl.Trainer]()
    _trained = during_fit.of(set[int])  # ids of parameters
    _derivatives = during_fit.of(dict[int, Tensor])  # to be logged

    def __init__(
        self,
        epsilon: float = 1e-3,
        max_derivative: float | None = None,
        bits: int | None = None,
        group_size: int | None = None,
        seed: int = 0,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        self.epsilon = check_finite(check_above(epsilon, 0.0, "epsilon"), "epsilon")
        self.max_derivative = check_above(max_derivative, 0.0, "max_derivative")
        self.bits = None if bits is None else check_count_between(bits, 2, 8, "bits")
        self.group_size = check_count(group_size, 1, "group_size")
        if bits is None and group_size is not None:
            raise ValueError(f"group_size={group_size} groups weights that bits rounds. Set bits, such as bits=4.")
        self.seed = check_count(seed, 0, "seed")
        self.include = as_names(include)
        self.exclude = as_names(exclude)

    # The fit begins.

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        check_patterns(pl_module, self.display_name, include=self.include, exclude=self.exclude)
        self._trainer = trainer
        super().on_fit_start(trainer, pl_module)
        self.undo.push(wrap_method(trainer.strategy, "training_step", _without_graph))
        chosen = {key: names for key, names in all_names(pl_module).items() if self._selects(names)}
        self._trained = set(chosen)
        moved = {id(p) for optimizer in self.watched.values() for p in self._weights(optimizer)[0]}
        names = [names[0] for key, names in chosen.items() if key in moved]
        if not names:
            why = why_none_left(pl_module, self.include, self.exclude or [])
            raise ValueError(f"{self.display_name} has no parameter to train. {why}")
        words = f"trains {counted(len(names), 'parameter')} without backward"
        readers = list(dict.fromkeys(who for optimizer in self.watched.values() for who in self._readers(optimizer)))
        if self.bits is not None:
            refuse_with_bits(trainer, readers, self.display_name)
            grid = (self.bits, self.group_size, self._scales)
            self._scaled = TrainedScales(pl_module, self._trained & moved, *grid, self.display_name)
            self._trained, names, words = self._scaled.ids, self._scaled.names, self._scaled.words
        if readers:
            words += f", but stores gradients for {listed(readers)}. SGD without momentum needs none"
        self.announce(words, "parameters", names)

    @override
    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        if self._scaled is not None:  # a search for a learning rate restores during the fit
            self._scaled.is_restored()

    def _selects(self, names: Sequence[str]) -> bool:
        return selects(names, self.include, self.exclude)

    @override
    def acts_on(self, index: int, optimizer: Optimizer) -> bool:
        if type(optimizer).__name__ in _NEED_GRADIENTS or hasattr(optimizer, "needs_graph"):
            raise ValueError(
                f"{self.display_name} does not work with {type(optimizer).__name__}, which needs exact gradients. Train "
                "with another optimizer, such as torch.optim.SGD."
            )
        return True

    def _readers(self, optimizer: Optimizer) -> list[str]:
        """Return what needs the gradients of an optimizer; if nothing does, steps are made in place."""
        kind, module = type(optimizer), self._trainer.lightning_module
        keys = [key for key in ("momentum", "maximize") if any(group.get(key) for group in optimizer.param_groups)]
        readers = [] if kind is SGD and not keys else [" with ".join([kind.__name__, *keys[:1]])]
        readers += [technique.display_name for technique in self._others]
        if self._trainer.gradient_clip_val:
            readers.append("gradient_clip_val")
        if overrides(module, "configure_gradient_clipping"):
            readers.append(f"{type(module).__name__}.configure_gradient_clipping")
        return readers

    @property
    def _others(self) -> list[Any]:
        """Other techniques that change gradients, or that act on steps, of which they see only those with gradients."""
        callbacks = self._trainer.callbacks  # type: ignore[attr-defined]
        return [*conditioners(self._trainer), *(c for c in callbacks if c is not self and _acts_on_steps(c))]

    def _weights(self, optimizer: Optimizer) -> tuple[list[Tensor], list[Mapping[str, Any]]]:
        """Return the parameters that move, or their scales, each with its param group."""
        pairs = [(p, group) for group in optimizer.param_groups for p in group["params"] if id(p) in self._trained]
        trained = [(p, group) for p, group in pairs if p.requires_grad]
        scaled = self._scaled
        return [p if scaled is None else scaled.of(p) for p, _ in trained], [group for _, group in trained]

    # One optimizer step.

    @override
    def run_backward(self, backward: Callable[..., Any], loss: Tensor, *args: Any, **kwargs: Any) -> Any:
        return None

    @override
    def evaluate(self, index: int, optimizer: Optimizer, closure: StepClosure) -> Any:
        weights, groups = self._weights(optimizer)
        seed = self.seed * _STEPS_OF_A_SEED + self._steps[index]
        self._steps[index] += 1
        moved = self.epsilon
        self._move(weights, [moved] * len(weights), seed)
        try:
            result = closure()
            self._move(weights, [-2 * self.epsilon] * len(weights), seed)
            moved = -self.epsilon
            minus = closure.again()
        finally:
            self._move(weights, [-moved] * len(weights), seed)
        if closure.loss is None or minus is None:  # the module skips this batch
            return result
        derivative = self._derivative(index, closure.loss, minus)
        readers = self._readers(optimizer)
        if self._scaled is not None:
            refuse_with_bits(self._trainer, readers, self.display_name)  # a callback may have replaced the optimizer
        if not readers:
            self._step_in_place(weights, groups, derivative, seed)
        else:
            self._write_gradients(weights, derivative, seed)
        return result

    def _derivative(self, index: int, plus: Tensor, minus: Tensor) -> Tensor:
        derivative = mean_over_ranks(self._trainer, (plus - minus) / (2 * self.epsilon))
        bound = self.max_derivative
        self._derivatives[index] = derivative if bound is None else derivative.clamp(-bound, bound)
        return self._derivatives[index]

    @torch.no_grad()
    def _step_in_place(
        self, weights: Sequence[Tensor], groups: Sequence[Mapping[str, Any]], derivative: Tensor, seed: int
    ) -> None:
        for weight, group in zip(weights, groups, strict=True):
            weight.mul_(1 - group["lr"] * group["weight_decay"])
        self._move(weights, [-group["lr"] * derivative for group in groups], seed, step=True)

    @torch.no_grad()
    def _write_gradients(self, weights: Sequence[Tensor], derivative: Tensor, seed: int) -> None:
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        self._move(gradients, [derivative] * len(gradients), seed)

    @on_plain_tensors
    def _move(
        self, weights: Sequence[Tensor], lengths: Sequence[float | Tensor], seed: int, step: bool = False
    ) -> None:
        move_along_(weights, lengths, seed)
        if self._scaled is not None:
            self._scaled.show(step)

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if self._derivatives and is_log_step(trainer):
            self.log_scalars(pl_module, {self.quantity_of(i, "derivative"): d for i, d in self._derivatives.items()})
        self._derivatives.clear()


def _acts_on_steps(callback: object) -> bool:
    base = OptimizerCallback
    return isinstance(callback, base) and any(
        getattr(type(callback), name) is not getattr(base, name) for name in ("before_update", "after_step")
    )


def _without_graph(inner: Callable[..., Any], *args: Any) -> Any:
    with torch.no_grad():
        return inner(*args)
