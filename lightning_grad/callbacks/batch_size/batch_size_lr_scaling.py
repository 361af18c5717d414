"""Learning rates that follow the batch size. The rules are in ``functional/batch_size``."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import LearningRateFinder
from torch.optim import Optimizer
from typing_extensions import override

from lightning_grad.core import GradCallback, check_count, during_fit, is_log_step, until_next_fit
from lightning_grad.core.compatibility import Compatibility, manual, no, yes
from lightning_grad.core.ranks import averaging_ranks
from lightning_grad.core.samples.loader_batch_size import loader_batch_size
from lightning_grad.core.steps.chosen_rates import scale_rates_, scale_schedules_, unknown_schedulers
from lightning_grad.functional import lr_scaling_factor, lr_scaling_rule
from lightning_grad.functional.batch_size.batch_size_lr_scaling import ScalingRule
from lightning_grad.functional.choices import check_choice


class BatchSizeLRScaling(GradCallback):
    r"""Scale learning rates by the batch size: linearly for SGD, by its square root for Adam-like optimizers.

    .. math::
        \eta = \eta_0 \frac{B}{B_0} \quad \text{(linear)}, \qquad \eta = \eta_0 \sqrt{\frac{B}{B_0}} \quad \text{(sqrt)}

    :math:`\eta_0` is the rate of your module, chosen for :math:`B_0` samples. B is the number of samples of one
    optimizer step: the batch of the loader, times the accumulated batches, times the ranks. So the same module trains
    on one GPU and on eight, with the rates that fit.

    Schedules follow, because their base rates are multiplied too; their floors (``eta_min``, ``min_lr``) stay. If the
    accumulation or the batch size of the loader changes during the run, the rates follow from the next batch on.
    Smaller batches at the end of an epoch are not counted.

    Args:
        base_batch_size: Number of samples of one optimizer step for which the rates were chosen.
        rule: "linear", "sqrt", or "auto" for the rule of each optimizer's class.
            With "auto", SGD is linear; Adam, its relatives, Lion and Muon take the root; others raise.
        batch_size: Samples of one batch of the loader on one rank. Default: what the loader says.
            Required for loaders that do not say it, such as batch samplers without ``batch_size``.
        name: Name of this instance, part of its log keys and its state.

    Raises:
        ValueError: In the constructor for a batch size below 1. Before the first batch if the loader does not say its
            batch size, for an optimizer without a known rule, for a second instance, and next to ``LearningRateFinder``,
            whose rate is for the batch size of the run already.

    **Hooks.** ``on_train_start``, after the optimizers of a checkpoint are restored, and the start of batches after a
    change.

    **Logs** under ``batch_size/``, at log steps: ``samples`` (of one step) and ``lr_factor``; with several optimizers
    ``optimizer<i>/lr_factor``.

    **State.** The factor of each optimizer. The rates in a checkpoint are multiplied already, so a run that resumes
    with another batch size multiplies by the ratio of the factors only.

    **Cost.** None per step.

    Example:
        .. code-block:: yaml

            trainer:
              callbacks:
                - class_path: lightning_grad.callbacks.BatchSizeLRScaling
                  init_args:
                    base_batch_size: 256

    References:
        Granziol, Zohren and Roberts, "Learning Rates as a Function of Batch Size: A Random Matrix Theory Approach to
        Neural Network Training", 2020, arXiv 2006.09092. Its rate from the spectrum of the Hessian is not included.
        Rules for optimizers that it does not name are in :func:`~lightning_grad.functional.lr_scaling_rule`.
    """

    namespace: ClassVar[str] = "batch_size"
    compatibility: ClassVar[Compatibility] = GradCallback.compatibility.but(
        accumulation=yes("Accumulated batches count."),
        ddp=yes("The batches of all ranks count."),
        deepspeed=no(
            "multiplies the rates of the module's optimizers, and under {} the engine owns them",
            "Train with strategy='ddp', or set the rate in DeepSpeed's own config",
        ),
        local_steps=yes("Each rank takes its own steps, so its batch counts alone."),
        **manual(
            yes("If the module itself accumulates batches, set `batch_size` to the samples of a step on one rank.")
        ),
    )
    trial: ClassVar[Mapping[str, Any]] = {"base_batch_size": 4, "batch_size": 8}  # some loaders do not say it
    neutral: ClassVar[Mapping[str, Any] | str] = "whether a factor is 1 depends on the batches of the run"

    _factors = until_next_fit.of(dict[str, float]).saved()  # by index of the optimizer
    _samples = until_next_fit.of(int)  # of one step
    _counted = during_fit[tuple[int, int] | None](lambda _: None)  # accumulated batches, and samples of each

    def __init__(
        self,
        base_batch_size: int,
        rule: Literal["auto", "linear", "sqrt"] = "auto",
        batch_size: int | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        check_choice(rule, ["auto", "linear", "sqrt"], "rule")
        self.base_batch_size = check_count(base_batch_size, 1, "base_batch_size")
        self.rule = rule
        self.batch_size = check_count(batch_size, 1, "batch_size")

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        others = [c for c in trainer.callbacks if isinstance(c, BatchSizeLRScaling)]  # type: ignore[attr-defined]
        if self.fitting and len(others) > 1:
            raise ValueError("Use only one BatchSizeLRScaling per Trainer: the factors of two would multiply.")
        if self.fitting and any(isinstance(c, LearningRateFinder) for c in trainer.callbacks):  # type: ignore[attr-defined]
            raise ValueError(
                f"LearningRateFinder finds the rate for the batch size of this run, and {self.display_name} would multiply "
                "it again. Search in a run without it, then set base_batch_size to the samples of one step of that run."
            )

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        rules = {self._rule_of(optimizer) for optimizer in trainer.optimizers}  # raises before the first batch
        words = (
            f"scales learning rates by the batch size ({', '.join(sorted(rules))}), from {self.base_batch_size} samples"
        )
        self.announce(words, "optimizers", [f"optimizers[{index}]" for index in range(len(trainer.optimizers))])

    def _rule_of(self, optimizer: Optimizer) -> ScalingRule:
        if self.rule != "auto":
            return self.rule
        kinds = [type(part) for part in getattr(optimizer, "parts", [optimizer])]
        rules = {kind.__name__: lr_scaling_rule(kind) for kind in kinds}
        for name, rule in rules.items():
            if rule is None:
                raise ValueError(
                    f"{self.display_name} knows no rule for {name}. Set rule='linear' if its steps grow with the gradient, "
                    "or rule='sqrt' if they do not."
                )
        if len(set(rules.values())) > 1:
            found = " and ".join(f"{rule} for {name}" for name, rule in rules.items())
            raise ValueError(
                f"{self.display_name} would need two rules for the parts of one optimizer: {found}. Set rule='linear' or "
                "rule='sqrt'."
            )
        return next(rule for rule in rules.values() if rule is not None)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._follow(trainer)
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        unknown = unknown_schedulers(schedulers)
        if unknown:
            self.say(
                f"multiplies the base rates of {', '.join(unknown)}. Schedulers outside torch may compute rates from other "
                "values too, so look at the rates with LearningRateMonitor"
            )

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 0 or self._counted is None or self._counted[0] != trainer.accumulate_grad_batches:
            self._follow(trainer)

    def _follow(self, trainer: pl.Trainer) -> None:
        """Multiply the rates by what the batch size asks for now."""
        counted = (trainer.accumulate_grad_batches, self._size_of_batch(trainer))
        if counted == self._counted:
            return
        accumulated, size = self._counted = counted
        ranks = averaging_ranks(trainer)
        self._samples = accumulated * size * ranks
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        for index, optimizer in enumerate(trainer.optimizers):
            factor = lr_scaling_factor(self._samples, self.base_batch_size, self._rule_of(optimizer))
            ratio = factor / self._factors.get(str(index), 1.0)
            if ratio != 1.0:
                chosen = [(optimizer, [i for i, group in enumerate(optimizer.param_groups) if "lr" in group])]
                scale_rates_(chosen, ratio)
                scale_schedules_(chosen, schedulers, ratio)
            self._factors[str(index)] = factor
        factors = ", ".join(f"{factor:.4g}" for factor in dict.fromkeys(self._factors.values()))
        self.say(
            f"multiplies the module's learning rates by {factors}: a step has {self._samples} samples ({size} in a batch, "
            f"{accumulated} accumulated, {ranks} ranks), and the rates are for {self.base_batch_size}"
        )

    def _size_of_batch(self, trainer: pl.Trainer) -> int:
        size = loader_batch_size(trainer) if self.batch_size is None else self.batch_size
        if size is None:
            raise ValueError(
                f"{self.display_name} must know how many samples a batch has, and {type(trainer.train_dataloader).__name__} "
                "does not say it. Set batch_size=... to the samples of one batch on one rank."
            )
        return size

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if is_log_step(trainer):
            several = len(self._factors) > 1
            factors = {
                f"optimizer{i}/lr_factor" if several else "lr_factor": value for i, value in self._factors.items()
            }
            self.log_scalars(pl_module, {"samples": float(self._samples), **factors})
