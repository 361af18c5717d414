"""Sharpness-aware minimization: the callback. The rule is :func:`lightning_grad.functional.ascend_`."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_grad.core import OptimizerCallback, StepClosure, check_count, during_fit, is_log_step, until_next_fit
from lightning_grad.core.compatibility import Compatibility, manual, no, yes
from lightning_grad.functional import ascend_
from lightning_grad.functional.gradients.tensor_lists import shards
from lightning_grad.functional.plain_tensors import on_plain_tensors
from lightning_grad.utilities.checks import check_finite_above, check_finite_at_least
from lightning_grad.utilities.optimizers import OptimizerCounts, optimizer_shape
from lightning_grad.utilities.parameters import as_names, check_patterns, why_none_left
from lightning_grad.utilities.reporting import counted
from lightning_grad.utilities.thresholds import Threshold, as_threshold, choose_buckets

_RHO, _ADAPTIVE_RHO = 0.05, 0.5  # of the papers
_DIFFERENTIATES = "differentiates its gradients, and these belong to weights that have moved back"
_ON_THEIR_OWN = {  # classes of libraries
    "LBFGS": "evaluates its closure many times a step itself",
    "AdaHessian": _DIFFERENTIATES,
    "SophiaH": _DIFFERENTIATES,
    "SAM": "is SAM already",
    "ASAM": "is SAM already",
    "GSAM": "is SAM already",
    "WSAM": "is SAM already",
    "LookSAM": "is SAM already",
    "BSAM": "is SAM already",
}

_NO_MEAN = no(
    "with sync_ascent=True moves along the mean gradient, which ranks of {} do not exchange",
    "Set sync_ascent=False, or train with strategy='ddp'",
)


class SAM(OptimizerCallback):
    r"""Step by the gradient at the worst nearby weights, which leads to flat minima (SAM, ASAM).

    .. math::
        g = \nabla L(w), \qquad
        \epsilon = \rho \, \frac{T^2 g}{\lVert T g \rVert_2}, \qquad
        w \leftarrow \operatorname{step}\bigl(w, \nabla L(w + \epsilon)\bigr)

    T is the identity, or ``diag(|w| + eta)`` for ASAM. Each sharp step runs forward and backward
    twice on the same batches with the same random numbers. Everything but the gradient is as after
    one pass: running statistics, metrics, logs, random streams and the reported loss.

    Args:
        rho: Length of the move. One number, or a mapping from name patterns to numbers (the first
            match applies; parameters without a match do not move). A param group of the optimizer
            may set its own "rho", which is read in every step. 0 turns the callback off. Default:
            0.05, with ``adaptive`` 0.5, as in the papers.
        adaptive: Measure the length relative to the size of each weight (ASAM).
        eta: Added to the sizes of ASAM, so a weight of zero can move.
        every_n_steps: Take one sharp step in this many; the others are plain steps.
        sync_ascent: With several ranks, move along the mean gradient of all ranks instead of each
            rank along its own, as the paper does. Costs one more reduction.
        include: Names or wildcards of the parameters or modules to move. Default: all.
        exclude: Names or wildcards of the parameters or modules not to move.
        name: Name of this instance, part of its log keys and its state.

    Raises:
        ValueError: In the constructor if rho is negative or not finite, eta is not above 0, or
            every_n_steps is below 1. Before the first batch with LBFGS, an optimizer that is SAM or
            differentiates gradients, manual optimization, FSDP1, DeepSpeed, a fused optimizer in fp16,
            sparse gradients, a compressing strategy, a static graph of DDP without sync_ascent, a
            ``training_step`` that fetches its own batches, another technique that evaluates steps, or a
            name pattern that matches nothing.
        RuntimeError: In the first step if the module's ``optimizer_step`` runs the closure itself, or
            calls ``step()`` on the raw torch optimizer.

    **Hooks.** The closure that Lightning passes to the strategy's ``optimizer_step``. With gradient
    accumulation, all batches of the step are run again. Clipping and other techniques act on the
    second gradient. ``on_before_backward`` and ``on_after_backward`` are called in both passes.

    **Logs** under ``sam/``, at log steps: ``sharpness`` (loss at the moved weights minus the loss, of
    the last sharp step).

    **State.** The number of steps of each optimizer, and the sharpness until it is logged.

    **Cost.** A second forward and backward pass in each sharp step, and memory for a copy of the moved
    weights and of the step's inputs.

    Example:
        .. code-block:: yaml

            trainer:
              callbacks:
                - class_path: lightning_grad.callbacks.SAM
                  init_args:
                    rho: 0.05

    References:
        Foret et al., "Sharpness-Aware Minimization for Efficiently Improving Generalization", ICLR
        2021, arXiv 2010.01412. Kwon et al., "ASAM: Adaptive Sharpness-Aware Minimization for
        Scale-Invariant Learning of Deep Neural Networks", ICML 2021, arXiv 2102.11600.
    """

    namespace: ClassVar[str] = "sam"
    compatibility: ClassVar[Compatibility] = OptimizerCallback.compatibility.but(
        accumulation=yes("All batches of a step are evaluated again, at the moved weights."),
        fp16=yes("A step that overflows moves no weight, and the GradScaler skips it."),
        ddp=yes("Each rank moves along its own gradient; with `sync_ascent=True`, along the mean."),
        fsdp2=yes(
            "The norm is that of whole gradients, and ranks always move along the mean gradient. Tests compare fits under "
            "`fully_shard` on two CPU ranks with fits under DDP. None ran on GPUs."
        ),
        fsdp1=no(
            "needs gradients in their original shapes, and under {} each rank sees flat shards",
            "Use ModelParallelStrategy with fully_shard (FSDP2), or DDP",
        ),
        late_gradients=no(
            "evaluates each step twice, and {} would compress both gradients and add the error of the first to the second",
            "Train with strategy='ddp'",
        ),
        local_steps=yes("Each rank moves along its own gradient; `sync_ascent=True` raises."),
        sparse_gradients=no(
            "needs dense gradients, and {} creates sparse ones",
            "Build it with sparse=False, or exclude it: exclude=[{value}]",
        ),
        **manual(no("evaluates each step twice, and {} runs it itself", "Use automatic optimization")),
    )
    trial: ClassVar[Mapping[str, Any]] = {"rho": 0.05}
    neutral: ClassVar[Mapping[str, Any] | str] = {"rho": 0.0}

    _steps = until_next_fit.of(OptimizerCounts).saved()
    _module = during_fit[pl.LightningModule]()
    _moved = during_fit.of(dict[int, tuple[Any, dict[Tensor, float]]])  # parameters of each optimizer, with their rho

    def __init__(
        self,
        rho: float | Mapping[str, float] | None = None,
        adaptive: bool = False,
        eta: float = 0.01,
        every_n_steps: int = 1,
        sync_ascent: bool = False,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        default = _ADAPTIVE_RHO if adaptive else _RHO
        self.rho: Threshold = as_threshold(default if rho is None else rho, "rho", _check_rho)
        self.adaptive = adaptive
        self.eta = check_finite_above(eta, 0.0, "eta")
        self.every_n_steps = check_count(every_n_steps, 1, "every_n_steps")
        self.sync_ascent = sync_ascent
        self.include = as_names(include)
        self.exclude = as_names(exclude)

    @override
    def works_with(self) -> Compatibility:
        return self.compatibility.but(local_steps=_NO_MEAN) if self.sync_ascent else self.compatibility

    # The fit begins.

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        named = {"rho": self.rho} if isinstance(self.rho, Mapping) else {}
        check_patterns(pl_module, self.display_name, include=self.include, exclude=self.exclude, **named)
        self._module = pl_module
        self._refuse_static_graph(trainer)
        super().on_fit_start(trainer, pl_module)
        moved = {id(p) for index, optimizer in self.watched.items() for p in self._choose(index, optimizer)}
        self.works_with().refuse_parameters(self.display_name, pl_module, moved)
        names = [name for name, parameter in pl_module.named_parameters() if id(parameter) in moved]
        if not names and self.rho != 0.0:
            raise ValueError(
                f"{self.display_name} has no parameter to move. "
                f"{why_none_left(pl_module, self.include, self.exclude or [])}"
            )
        often = "each step" if self.every_n_steps == 1 else f"one step in {self.every_n_steps}"
        words = f"evaluates {often} a second time, after moving {counted(len(names), 'parameter')} up the gradient"
        self.announce(words if names else "moves nothing, because rho is 0", "parameters", names)

    def _refuse_static_graph(self, trainer: pl.Trainer) -> None:
        if not self.sync_ascent and getattr(trainer.strategy, "_ddp_kwargs", {}).get("static_graph"):
            raise ValueError(
                f"{self.display_name} needs a first pass without synchronization, which DDPStrategy(static_graph=True) "
                "cannot run. Set sync_ascent=True, or static_graph=False."
            )

    @override
    def acts_on(self, index: int, optimizer: Optimizer) -> bool:
        reason = _DIFFERENTIATES if hasattr(optimizer, "needs_graph") else _ON_THEIR_OWN.get(type(optimizer).__name__)
        if reason is not None:
            raise ValueError(
                f"{self.display_name} does not work with {type(optimizer).__name__}, which {reason}. Train with a plain "
                "optimizer, such as SGD or AdamW."
            )
        return True

    def _choose(self, index: int, optimizer: Optimizer) -> dict[Tensor, float]:
        """Return the parameters of an optimizer that move, each with its rho."""
        now = (optimizer_shape(optimizer), [group.get("rho") for group in optimizer.param_groups])
        if self._moved.get(index, ((), {}))[0] != now:
            buckets, _ = choose_buckets(optimizer, self._module, self.rho, "rho", self.include, self.exclude)
            chosen = {
                parameter: as_threshold(bucket.threshold, f"rho of the optimizer's {bucket.name}", _check_rho)
                for bucket in buckets
                for parameter in bucket.parameters
            }
            self._moved[index] = (now, {parameter: rho for parameter, rho in chosen.items() if rho})
        return self._moved[index][1]

    # One optimizer step.

    @override
    def evaluates_again(self) -> bool:
        # A "rho" of a param group may change between the batches of a step, so its value does not count.
        return any(
            self._steps[index] % self.every_n_steps == 0
            and (self.rho != 0.0 or any("rho" in group for group in optimizer.param_groups))
            for index, optimizer in self.watched.items()
        )

    @override
    def evaluate(self, index: int, optimizer: Optimizer, closure: StepClosure) -> Any:
        chosen = self._choose(index, optimizer)
        if not chosen or self._steps[index] % self.every_n_steps:
            return closure()
        result = closure(synchronized=self.sync_ascent)
        kept = self._ascend([(p, rho) for p, rho in chosen.items() if p.grad is not None])
        try:
            loss = closure.again()
        finally:
            _give_back(kept)
        if closure.loss is not None and isinstance(loss, Tensor):
            self.memory(index)["sharpness"] = loss.detach() - closure.loss
        return result

    @torch.no_grad()
    @on_plain_tensors
    def _ascend(self, moved: Sequence[tuple[Tensor, float]]) -> list[tuple[Tensor, Tensor]]:
        """Move the weights, and return each with a copy: subtracting the move would not restore every bit."""
        weights = [parameter for parameter, _ in moved]
        kept = [(parameter, parameter.detach().clone()) for parameter in weights]
        gradients = [parameter.grad for parameter in weights if parameter.grad is not None]
        if gradients:
            ascend_(weights, gradients, [rho for _, rho in moved], self.adaptive, self.eta)
        return kept

    @override
    def after_step(self, index: int, optimizer: Optimizer) -> None:
        if self.every_n_steps > 1:
            self._steps[index] += 1

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if is_log_step(trainer):
            seen = {self.quantity_of(i, "sharpness"): self.memory(i).pop("sharpness", None) for i in self.watched}
            self.log_scalars(pl_module, {name: value for name, value in seen.items() if value is not None})


@torch.no_grad()
@on_plain_tensors
def _give_back(kept: Sequence[tuple[Tensor, Tensor]]) -> None:
    if kept:
        torch._foreach_copy_(shards(parameter for parameter, _ in kept), shards(value for _, value in kept))


def _check_rho(number: float) -> None:
    check_finite_at_least(number, 0.0, "rho")
