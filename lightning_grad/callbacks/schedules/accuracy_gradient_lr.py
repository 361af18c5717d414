"""Cutting the learning rate by the accuracy gradient: the callback. The rule is in ``functional/schedules``."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_grad.callbacks.schedules._rate_figure import draw_rates
from lightning_grad.core import ChosenRates, Interval, Mode, MonitoredCallback, as_indices, until_next_fit, wrap_method
from lightning_grad.core.compatibility import Compatibility, yes
from lightning_grad.core.record import Row, RunRecord
from lightning_grad.core.steps.chosen_rates import unknown_schedulers
from lightning_grad.functional.schedules.accuracy_gradient_lr import accuracy_gradient, accuracy_gradient_cuts
from lightning_grad.utilities import checks
from lightning_grad.utilities.reporting import log_many, stepped_batches

_MOST_OBSERVATIONS = 1_000_000


class AccuracyGradientLR(MonitoredCallback):
    r"""Cut the learning rate when the moving mean of the validation accuracy stops rising (AccelAT).

    .. math::
        g_t = m_t - m_{t-1} = \frac{a_t - a_{t-w}}{w}, \qquad
        \eta \leftarrow \max(f \eta, \eta_\text{min}) \quad \text{if } g_t < \theta

    :math:`a_t` is the accuracy of the t-th observation and :math:`m_t` the mean of the last w. The
    first cut is at observation w + 2 at the earliest, and the next one at least q observations
    later (:func:`~lightning_grad.functional.accuracy_gradient_cuts`). The mean is compared with the
    previous mean, not with the best one, so a slow rise leads to a cut too: with the defaults, a
    rise of less than 2.5 points over five observations. An observation is a validation or an epoch.
    Stale and non-finite values are ignored.

    The module's schedulers continue from the cut learning rate, because their base rates are cut
    too. A schedule's own floor (``eta_min``) does not change.

    Args:
        monitor: Name of the observed metric, as the module logs it.
        mode: "max" if larger is better, "min" if smaller is better.
        window: Number of observations w in a mean (5 in the released code).
        cooldown: Minimum number of observations q between cuts (5 in the released code).
        threshold: Cut if the mean rises by less than this per observation.
            0.005 in the released code, for an accuracy from 0 to 1.
        factor: Factor of a cut, above 0 (0.8 in the released code). 1 cuts nothing.
        min_lr: Floor of the learning rate of the first group (1e-6 in the released code).
            Other groups keep their ratio to it.
        start_after: Number of observations at the start without a cut; they enter the means.
        policy: "multiply" scales the rates of the module's schedulers; "replace" disables them.
        interval: Observe at each "validation", or once at the end of each training "epoch".
        stop_at: Stop the training when the metric reaches this value; None never stops.
        optimizers: Indices of the optimizers whose learning rates are cut, from 0. Default: all.
        param_groups: Indices of their parameter groups, from 0. Default: all.
        figure: Draw the values, gradients and learning rates at the end.
            Needs matplotlib and a logger with a folder.
        name: Name of this instance. Required if the Trainer has two of this class.

    Raises:
        ValueError: In the constructor for arguments outside their range. Before the first batch if
            there is no validation, if the sanity check logged only other metrics, under
            ``Trainer(barebones=True)``, for an optimizer or group that does not exist or has no
            learning rate, and for ``policy="replace"`` if a module steps its schedulers itself
            under manual optimization. On resume if policy, optimizers or param_groups differ from
            the checkpoint.
        RuntimeError: At the first observation, if the metric is not logged. The error lists the
            logged metrics.

    **Hooks.** ``on_validation_end`` observes and cuts, so checkpoints of that validation hold the
    cut learning rates. With ``interval="epoch"`` the module's ``on_train_epoch_end`` is wrapped, so
    the callback sees what that method logs and acts before callbacks that monitor a metric. With
    ``policy="replace"`` the module's ``lr_scheduler_step`` is wrapped.

    **Logs** under ``lr/``, at each observation: ``accuracy_gradient`` (gain of the mean per
    observation, from observation w + 1 on), ``scale`` (factor on the learning rates) and ``cuts``
    (number so far). The summary also has ``scale`` and ``cuts``. At the end: a table with a row per
    observation and a figure, ``accuracy_gradient_lr.csv`` and ``.png``.

    **State.** Observations, scale, first learning rate, cuts. Resuming is bit-exact. From a
    checkpoint written just before a validation that was due (``every_n_train_steps``), Lightning
    would continue without that validation; this callback runs it first. With ``interval="epoch"``,
    if an epoch was interrupted after its first batch, its *training* metric is observed over the
    rest of the epoch only, or not at all, because Lightning does not restore it.

    **Cost.** A few numbers per observation; nothing per step.

    **Schedulers.** All schedulers of torch keep a cut. Others may undo cuts, and a warning says so.

    Example:
        .. code-block:: yaml

            trainer:
              callbacks:
                - class_path: lightning_grad.callbacks.AccuracyGradientLR
                  init_args:
                    monitor: val_acc
                    threshold: 0.005
                    factor: 0.8

    References:
        Nikfam et al., "AccelAT: A Framework for Accelerating the Adversarial Training of Deep
        Neural Networks through Accuracy Gradient", 2022, arXiv 2210.06888, and its released code,
        which observes epochs and cuts one optimizer without a scheduler. mode, start_after,
        interval, policy and the choice of groups are additions of this library. stop_at is from the
        released code, which applies it to the training accuracy.
    """

    namespace: ClassVar[str] = "lr"
    compatibility: ClassVar[Compatibility] = MonitoredCallback.compatibility.but(
        manual_optimization=yes('`policy="replace"` raises where the module steps schedulers itself.')
    )
    trial: ClassVar[Mapping[str, Any]] = {"window": 1, "cooldown": 1, "threshold": 10.0, "factor": 0.5}
    neutral: ClassVar[Mapping[str, Any] | str] = {"factor": 1.0}
    fixed_settings: ClassVar[Mapping[str, str]] = {
        "policy": "the schedulers' steps so far depend on it",
        "optimizers": "the learning rates selected before are already cut",
        "param_groups": "the learning rates selected before are already cut",
    }
    nothing_done: ClassVar[str] = "no learning rate was cut"

    record = until_next_fit[RunRecord](lambda _: RunRecord(weight=_is_cut)).saved()
    _since_cut = until_next_fit[int](lambda self: self.cooldown).saved()
    _cuts = until_next_fit.of(int).saved()
    _values = until_next_fit.of(list[float]).saved()  # all of them, because the window may grow on resume
    _rates = until_next_fit[ChosenRates](
        lambda self: ChosenRates(self.optimizers, self.param_groups, self.policy, self.min_lr, self.display_name)
    )

    def __init__(
        self,
        monitor: str = "val_acc",
        mode: Mode = "max",
        window: int = 5,
        cooldown: int = 5,
        threshold: float = 0.005,
        factor: float = 0.8,
        min_lr: float = 1e-6,
        start_after: int = 0,
        policy: Literal["multiply", "replace"] = "multiply",
        interval: Interval = "validation",
        stop_at: float | None = None,
        optimizers: Sequence[int] | None = None,
        param_groups: Sequence[int] | None = None,
        figure: bool = True,
        name: str | None = None,
    ) -> None:
        super().__init__(monitor, mode, interval, name)
        self.window = checks.check_count_between(window, 1, _MOST_OBSERVATIONS, "window")
        self.cooldown = checks.check_count(cooldown, 0, "cooldown")
        self.threshold = checks.check_finite(threshold, "threshold")
        self.factor = checks.check_between(checks.check_above(factor, 0.0, "factor"), 0.0, 1.0, "factor")
        self.min_lr = checks.check_finite_at_least(min_lr, 0.0, "min_lr")
        self.start_after = checks.check_count(start_after, 0, "start_after")
        self.policy = policy
        self.stop_at = checks.check_finite(stop_at, "stop_at")
        self.optimizers = as_indices(optimizers, "optimizers")
        self.param_groups = as_indices(param_groups, "param_groups")
        self.figure = figure

    # The fit begins.

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "scale": self._rates.scale, "base": self._rates.base}

    @override
    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        self._rates.scale, self._rates.base = state["scale"], state["base"]

    @override
    def restart(self) -> str:
        self.record.clear()
        self._values = []
        return "the cuts so far stay"

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        optimizers = [optimizer for optimizer, _ in self._rates.groups(trainer)]
        if self.policy == "multiply":
            _warn_of_schedulers(trainer, optimizers, self.monitor, self.display_name)
        elif trainer.lr_scheduler_configs:
            self.undo.push(_mute_schedulers(pl_module, optimizers, self.display_name))
        self._announce(trainer)

    def _announce(self, trainer: pl.Trainer) -> None:
        at = "validation" if self.interval == "validation" else "epoch"
        least = max(self.window + 2, self.start_after + 1)
        mean = f"the mean of {self.monitor!r} over {self.window} observations"
        self.announce(
            f"multiplies the learning rate by {self.factor:g} when {mean if self.window > 1 else repr(self.monitor)} improves "
            f"by less than {self.threshold:g}: at each {at}, from observation {least} on",
            "learning rates",
            self._rates.names(trainer),
        )

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._rates.begin(trainer)

    # One observation.

    @property
    def _gains(self) -> list[float]:
        """The values so far, negated if smaller is better."""
        return self._values if self.mode == "max" else [-value for value in self._values]

    @override
    def observe(self, trainer: pl.Trainer, value: float) -> None:
        self._values.append(value)
        self._since_cut += 1
        epoch, settings = self.epochs_done(trainer), (self.window, self.cooldown, self.threshold, self.start_after)
        gradient = accuracy_gradient(self._gains, self.window)
        is_cut = accuracy_gradient_cuts(self._gains, self._since_cut, *settings)
        if is_cut:
            self._since_cut = 1
            is_cut = self._cut(trainer, gradient, epoch)
            self._cuts += is_cut
        recent = self._values[-self.window :]
        row: dict[str, Any] = {"observation": len(self._values), "epoch": epoch, "step": stepped_batches(trainer)}
        row |= {self.monitor: value, "mean": sum(recent) / len(recent), "accuracy_gradient": gradient}
        row |= {"scale": self._rates.scale, "learning_rate": self._rates.first(trainer), "cut": is_cut}
        self.record.add(row)
        self.record.save(trainer, self)
        shown = {"scale": self._rates.scale, "cuts": float(self._cuts)}
        shown |= {} if gradient is None else {"accuracy_gradient": gradient}
        log_many(trainer, {self.log_key(key): number for key, number in shown.items()})
        if self.stop_at is not None and self.is_reached(value, self.stop_at):
            trainer.should_stop = True
            self.tell_once("stop_at", rank_zero_info, f"{self.monitor} has reached {value:g}: training stops.")

    def _cut(self, trainer: pl.Trainer, gradient: float | None, epoch: float) -> bool:
        """Cut the learning rates. Return False if the factor is 1 or all are at the floor."""
        before = self._rates.first(trainer)
        if not self._rates.multiply(trainer, self.factor):
            if self.factor < 1.0:
                self.tell_once("floor", rank_zero_info, f"the learning rate is at its floor, min_lr={self.min_lr:g}.")
            return False
        rank_zero_info(
            f"{self.display_name} cuts the learning rate from {before:g} to {self._rates.first(trainer):g} after observation "
            f"{len(self._values)} (epoch {round(epoch, 2):g}): the mean of {self.monitor} gained {gradient:.4g}, less than "
            f"{self.threshold:g}."
        )
        return True

    # The end.

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self.record.save(trainer, self, now=True)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        own = (self.record, self.display_name, self.monitor, self.window, self.threshold)
        summary = {"scale": self._rates.scale, "cuts": float(self._cuts)}
        self.record.report(trainer, self, partial(draw_rates, *own), summary=summary, table="observations")


def _is_cut(row: Row) -> float:
    return float(row["cut"])


def _mute_schedulers(
    pl_module: pl.LightningModule, optimizers: Sequence[Optimizer], display_name: str
) -> Callable[[], None]:
    """Disable all schedulers of some optimizers. Return a function that enables them again."""
    if not pl_module.automatic_optimization:
        raise ValueError(
            f"{display_name} cannot disable schedulers (policy='replace'), because under manual optimization the module "
            "steps them itself. Use policy='multiply', or remove the schedulers from configure_optimizers."
        )

    def step(inner: Callable[..., Any], scheduler: Any, *args: Any) -> None:
        if not _concerns(scheduler, optimizers):
            inner(scheduler, *args)

    return wrap_method(pl_module, "lr_scheduler_step", step)


def _warn_of_schedulers(trainer: pl.Trainer, optimizers: Sequence[Optimizer], monitor: str, display_name: str) -> None:
    """Warn about schedulers that may undo a cut, and about one that cuts by the same metric."""
    configs = [config for config in trainer.lr_scheduler_configs if _concerns(config.scheduler, optimizers)]
    unknown = unknown_schedulers(config.scheduler for config in configs)
    if unknown:
        rank_zero_warn(
            f"{display_name}: {', '.join(unknown)} is not a scheduler of torch, and may undo the cuts if it computes "
            "learning rates from its own base rates. To disable the module's schedulers, set policy='replace'."
        )
    if any(config.reduce_on_plateau and config.monitor == monitor for config in configs):
        rank_zero_warn(
            f"{display_name} and ReduceLROnPlateau both cut the learning rate by {monitor!r}. Keep one: drop the "
            "scheduler, or set policy='replace', which disables it."
        )


def _concerns(scheduler: Any, optimizers: Sequence[Optimizer]) -> bool:
    """Return True if a scheduler acts on one of these optimizers, or does not name its optimizer."""
    of = getattr(scheduler, "optimizer", None)
    return of is None or any(of is optimizer for optimizer in optimizers)
