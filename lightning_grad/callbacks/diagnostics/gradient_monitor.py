"""Watching gradients: the callback.

Its parts: ``_optimizer_watch.py`` measures the gradients of one optimizer, ``_monitor_place.py``
finds the parameters to watch and the hooks, ``_monitor_record.py`` keeps and draws the measurements
and names the first bad step, ``core/steps/noise_scale.py`` measures the gradient noise scale, and
``_logits.py`` measures logits. The formulas are in
``functional/diagnostics/gradient_statistics.py``.
"""

import contextlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_grad.callbacks.diagnostics._logits import LogitWatch
from lightning_grad.callbacks.diagnostics._monitor_place import Vantage, named_parameters, why_none
from lightning_grad.callbacks.diagnostics._monitor_record import FirstBadStep, MonitorRecord, SpikeTable
from lightning_grad.callbacks.diagnostics._optimizer_watch import OptimizerWatch, Place
from lightning_grad.core import (
    GradCallback,
    Role,
    check_above,
    check_count,
    during_fit,
    is_log_step,
    is_repeated,
    until_next_fit,
    wrap_method,
)
from lightning_grad.core.compatibility import Compatibility, manual, yes
from lightning_grad.core.conditioner import GradientConditioner
from lightning_grad.core.roles import refuse_order
from lightning_grad.core.samples.batch_indices import BatchIndices
from lightning_grad.core.steps.noise_scale import NoiseScale, NoiseScaleMeter
from lightning_grad.functional.plain_tensors import on_plain_tensors
from lightning_grad.utilities.forward_order import ForwardOrder, is_compiled
from lightning_grad.utilities.optimizers import optimizer_index, optimizer_shape
from lightning_grad.utilities.parameters import as_names, check_patterns
from lightning_grad.utilities.precision import grad_scaler, true_loss
from lightning_grad.utilities.reporting import (
    counted,
    log_histograms,
    log_many,
    log_table,
    output_file,
    stepped_batches,
    tolerated,
)


class GradientMonitor(GradCallback):
    r"""Watch gradients: norms before and after clipping, layers, noise scale, instability, the first bad step.

    It changes nothing. At every optimizer step it computes norms, which stay on the device. At log
    steps it reads them and measures layers. Every few log steps it computes slower statistics.

    Args:
        slow_stats_every: Number of log steps between slow statistics; None disables them.
            They are the share of zero entries, the signal-to-noise ratio and histograms.
        logits: Measure attention and output logits at log steps, unless a module is compiled.
            Growing logits precede two instabilities (arXiv 2309.14322).
        histograms: Send histograms of gradients to the loggers that show them.
            They are part of the slow statistics.
        layer_depth: Merge layers in logs whose names share this many leading parts.
            Default: layers are not merged.
        max_layers: Largest number of layers with their own log keys; the heat map shows all.
        figure: Draw a figure at the end of the run. Needs matplotlib and a logger with a folder.
        alert: Send a W&B alert at the first non-finite gradient.
        spike_factor: List steps whose norm exceeds this many times the median of the last 64.
            None lists only non-finite ones. The default is a choice of this library.
        include: Names or wildcards of the parameters or modules to watch. Default: all.
        exclude: Names or wildcards of the parameters or modules not to watch.
        name: Name of this instance. Required if the Trainer has two of this class.

    Raises:
        ValueError: In the constructor for numbers out of range. Before the first batch under FSDP1
            or DeepSpeed, with a fused optimizer in fp16, with sparse gradients, if there is no
            parameter to watch, or if a name pattern matches nothing.

    **Hooks.** The first ``on_before_optimizer_step`` in the list of callbacks, for unchanged
    gradients. The module's ``configure_gradient_clipping``, the last hook before the step, for the
    gradients that the optimizer uses (under manual optimization, the module's
    ``on_before_optimizer_step``). The optimizer's post hook at log steps, for the update.

    **Logs** under ``grad/``, at log steps: ``norm`` and ``norm_after`` (before any change of the
    gradient, and as the optimizer used it), ``coefficient`` (their ratio), ``norm_max`` (largest
    since the last log step), ``clipped_share`` and ``skipped_steps`` (of all steps so far),
    ``cosine`` (similarity to the gradient of the previous step), ``rms_min`` (smallest root mean
    square of a parameter's gradient), ``below_epsilon`` (share of parameters where that is below
    the optimizer's eps, so updates vanish), ``attention_logit_max`` and ``output_logit_max``; under
    accumulation or with several ranks also ``noise_scale`` (in samples), ``noise_trace`` and
    ``signal_squared`` (:func:`~lightning_grad.functional.noise_scale_terms`). With the slow
    statistics: ``zero_share`` and ``signal_to_noise``
    (:func:`~lightning_grad.functional.moment_signal_to_noise`). Under ``grad_layers/``, for each
    layer: ``norm/...``, ``weight_norm/...`` and ``update_ratio/...`` (norm of the update divided by
    the norm of the weights), and histograms with the slow statistics. With several optimizers, keys
    begin with ``grad/optimizer<i>/`` and ``grad_layers/optimizer<i>/``. At the end: a figure and a
    table. The table ``spikes`` has one row for each spike and non-finite step: norm and usual norm,
    the parameter whose gradient grew the most since the last log step (the first in the forward
    pass) or from which non-finite values spread, and the indices of the samples in the batch. At
    the first non-finite gradient: a warning that names the parameter, the loss and the samples, a
    file with these facts, and an alert.

    **State.** The record and the averages of the noise scale. The cosine is missing at the first
    log step after a resume.

    **Cost.** One norm per step, or two if anything changes gradients. docs/benchmarks.md lists the
    total cost.

    Example:
        .. code-block:: yaml

            trainer:
              callbacks:
                - class_path: lightning_grad.callbacks.ZClip
                - class_path: lightning_grad.callbacks.GradientMonitor

    References:
        McCandlish et al., 2018, arXiv 1812.06162 (noise scale). Wortsman et al., "Small-scale
        proxies for large-scale Transformer training instabilities", 2023, arXiv 2309.14322 (logits,
        gradients below epsilon).
    """

    namespace: ClassVar[str] = "grad"
    compatibility: ClassVar[Compatibility] = GradientConditioner.compatibility.but(
        compiled=yes("It measures no logits if a module is compiled."),
        late_gradients=yes("It measures no noise scale, because the gradient after the exchange is not a mean."),
        local_steps=yes(
            "It shows the gradients of rank 0. The noise scale is that of one rank, and needs accumulation."
        ),
        **manual(yes("It measures no noise scale under manual optimization.")),
    )
    trial: ClassVar[Mapping[str, Any]] = {"slow_stats_every": 2}
    role: ClassVar[Role] = "observe"

    _records = until_next_fit.of(dict[int, MonitorRecord])
    _noise = until_next_fit.of(NoiseScale)
    _first_bad = until_next_fit.of(FirstBadStep)
    spikes = until_next_fit.of(SpikeTable).saved()
    _indices = during_fit[BatchIndices]()
    _drawn = during_fit.of(list[int])
    _watches = during_fit.of(list[OptimizerWatch])
    _vantage = during_fit[Vantage]()
    _loss = during_fit[Tensor | None](lambda _: None)
    _place = during_fit[Place](lambda _: Place(0, 0, 0))
    _order = during_fit[ForwardOrder]()
    _logits = during_fit[LogitWatch | None](lambda _: None)
    _stepped = during_fit.of(bool)
    _stepped_before = during_fit.of(bool)
    _meter = during_fit[NoiseScaleMeter](lambda self: NoiseScaleMeter(self._noise))

    def __init__(
        self,
        slow_stats_every: int | None = 10,
        logits: bool = True,
        histograms: bool = True,
        layer_depth: int | None = None,
        max_layers: int = 16,
        figure: bool = True,
        alert: bool = False,
        spike_factor: float | None = 10.0,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        self.slow_stats_every = check_count(slow_stats_every, 1, "slow_stats_every")
        self.logits = logits
        self.histograms = histograms
        self.layer_depth = check_count(layer_depth, 1, "layer_depth")
        self.max_layers = check_count(max_layers, 0, "max_layers")
        self.figure = figure
        self.alert = alert
        self.spike_factor = check_above(spike_factor, 1.0, "spike_factor")
        self.include = as_names(include)
        self.exclude = as_names(exclude)

    # The fit begins.

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self.fitting:
            refuse_order(trainer)
            self._indices = BatchIndices(trainer, self.undo)

    @override
    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        for index, saved in state["records"].items():
            self._records.setdefault(int(index), MonitorRecord()).load_state_dict(saved)
        if not self.changed_settings(state, "include", "exclude"):
            self._noise.load_state_dict(state["noise"])  # otherwise the averages belong to other parameters
        self._first_bad.load_state_dict(state)

    @override
    @on_plain_tensors
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        check_patterns(pl_module, self.display_name, include=self.include, exclude=self.exclude)
        self._order = ForwardOrder(pl_module)
        self.undo.push(self._order.stop)
        for index, optimizer in enumerate(trainer.optimizers):
            self.works_with().refuse_optimizer(self.display_name, trainer, optimizer)
            self._watch(trainer, pl_module, index, optimizer)
        watched = [parameter for watch in self._watches for parameter in watch.parameters]
        if not watched:
            why = why_none(trainer, pl_module, self.include, self.exclude)
            raise ValueError(f"{self.display_name} has no parameter to watch. {why}")
        self.works_with().refuse_parameters(self.display_name, pl_module, set(map(id, watched)))
        self.undo.push(self._meter.stop)
        self._vantage = self._take_places(trainer, pl_module)
        self._announce(trainer, pl_module)

    def _watch(self, trainer: pl.Trainer, pl_module: pl.LightningModule, index: int, optimizer: Optimizer) -> None:
        record = self._records.setdefault(index, MonitorRecord())
        named = named_parameters(pl_module, optimizer, self.include, self.exclude)
        watch = OptimizerWatch(
            optimizer, named, self.layer_depth, record, grad_scaler(trainer) is not None, self.spike_factor
        )
        self._watches.append(watch)
        self._watch_updates(watch)

    def _watch_updates(self, watch: OptimizerWatch) -> None:
        handle = watch.optimizer.register_step_post_hook(lambda *_: watch.look_at_update())
        self.undo.push(handle.remove)

    def _take_places(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Vantage:
        """Wrap the hooks in which gradients and logits are measured."""
        vantage = Vantage(
            self,
            before=partial(self._look_before, trainer, pl_module),
            before_clipping=lambda optimizer: self._watch_of(trainer, optimizer).look_before_clipping(),
            behind=partial(self._look_behind, trainer),
        )
        vantage.take(trainer, pl_module, self.undo)
        # Under the probe, compiled modules would run uncompiled, with different rounding.
        if self.logits and not any(map(is_compiled, pl_module.modules())):
            advice = f"{self.display_name} watches logits in this step. Set {type(self).__name__}(logits=False)."
            self._logits = LogitWatch(trainer, pl_module, advice)
            self.undo.push(wrap_method(pl_module, "training_step", self._logits.around))
        return vantage

    def _announce(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        names = [name for watch in self._watches for name in watch.names]
        self.announce(f"watches the gradients of {counted(len(names), 'parameter')}", "parameters", names)
        if trainer.barebones:
            self.say(
                "logs nothing, because Trainer(barebones=True) turns logging off; at the end of the fit it names the first "
                "non-finite gradient"
            )
            return
        why_not = NoiseScaleMeter.why_not(trainer, pl_module)
        if why_not is not None:
            self.say(f"logs no gradient noise scale: {why_not}")
        if self.logits and self._logits is None:
            self.say("logs no logits, because compiled modules would run uncompiled")

    # One training step.

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._drawn = [*([] if self._stepped_before else self._drawn), *self._indices.of_batch(batch_idx)]
        self._place = Place(stepped_batches(trainer), trainer.current_epoch, batch_idx, tuple(self._drawn))
        self._order.watch()
        if is_log_step(trainer) and NoiseScaleMeter.why_not(trainer, pl_module) is None:
            self._meter.begin_batch(self._watches[0].parameters, batch)

    @override
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        if is_repeated(pl_module):
            self._meter.begin_again()
            return
        self._loss = true_loss(trainer, pl_module, loss)
        self._order.stop()

    @override
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._meter.end_part()

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if self._vantage.is_first:
            self._look_before(trainer, pl_module, optimizer)

    @torch.no_grad()
    @on_plain_tensors
    def _look_before(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer) -> None:
        """Measure unchanged gradients. Follow the optimizer first, because callbacks may change or replace it."""
        measured = is_log_step(trainer)
        slow = measured and self._slow_stats_are_due(trainer)
        watch = self._watch_of(trainer, optimizer)
        if watch.shape != optimizer_shape(optimizer):
            fresh = watch.optimizer is not optimizer
            watch.follow(optimizer, named_parameters(pl_module, optimizer, self.include, self.exclude))
            if fresh:
                self._watch_updates(watch)
        norm = watch.look_before(self._loss, measured, slow, keep=is_log_step(trainer, ahead=1))
        if norm is not None and measured:
            self._meter.measure(trainer, norm)
        if slow and self.histograms:
            tensors = watch.gradients_for_histograms(self.max_layers)
            named = {self.log_key(f"histogram/{name}", layers=True): tensor for name, tensor in tensors.items()}
            log_histograms(trainer, named)

    def _look_behind(self, trainer: pl.Trainer, optimizer: Optimizer) -> None:
        self._stepped = True
        self._watch_of(trainer, optimizer).look_after(self._loss, self._place, self._vantage.may_change)

    def _watch_of(self, trainer: pl.Trainer, optimizer: Optimizer) -> OptimizerWatch:
        return self._watches[optimizer_index(trainer, optimizer, self.display_name)]

    def _slow_stats_are_due(self, trainer: pl.Trainer) -> bool:
        if self.slow_stats_every is None:
            return False
        every: int = max(trainer.log_every_n_steps, 1)  # type: ignore[attr-defined]
        return (stepped_batches(trainer) + 1) // every % self.slow_stats_every == 0

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if self._stepped and is_log_step(trainer):
            self._log_step(trainer, pl_module)
        self._stepped_before, self._stepped, self._loss = self._stepped, False, None
        if self._logits is not None:
            self._logits.forget()

    def _log_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Read all tensors of the steps since the last log step, and log them."""
        self._drain()
        for index, watch in enumerate(self._watches):
            part = self._part(index)
            prefix = f"{part}/" if part else ""
            scalars, layers = watch.take_details()
            values = {**watch.record.summary(), **scalars}
            if "norm" in layers:
                watch.record.add_layers(self._place.step, layers["norm"])
            watch.record.save(trainer, self, part)
            self.log_scalars(pl_module, {f"{prefix}{key}": value for key, value in values.items()})
            shown = {
                self.log_key(f"{prefix}{quantity}/{layer}", layers=True): value
                for quantity, by_layer in layers.items()
                for layer, value in list(by_layer.items())[: self.max_layers]
            }
            log_many(trainer, shown)
        seen = {} if self._logits is None else self._logits.read()
        self.log_scalars(pl_module, {**seen, **self._noise.read()})
        self.spikes.save(trainer, self, "spikes")
        self._warn_of_first_bad(trainer)

    def _drain(self) -> None:
        for index, watch in enumerate(self._watches):
            watch.drain()
            self._first_bad.note(watch.first_bad, self._order)
            for facts in watch.spikes:
                self.spikes.note(self._part(index) or "optimizer0", facts, self._order)
            watch.spikes.clear()

    def _warn_of_first_bad(self, trainer: pl.Trainer) -> None:
        self._first_bad.warn(trainer, self.display_name, self.log_key, self.alert)

    def _part(self, index: int) -> str:
        return f"optimizer{index}" if len(self._watches) > 1 else ""

    @override
    def state_dict(self) -> dict[str, Any]:
        self._drain()
        records = {str(index): record.state_dict() for index, record in self._records.items()}
        own = {"records": records, "noise": self._noise.state_dict(), **self._first_bad.state_dict()}
        return {**super().state_dict(), **own}

    # The fit ends.

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        # The device itself may have failed, and an error here would keep all later callbacks from running.
        with contextlib.suppress(Exception):
            self._drain()
            self._warn_of_first_bad(trainer)
            self.spikes.save(trainer, self, "spikes", now=True)
            for index, watch in enumerate(self._watches):
                watch.record.save(trainer, self, self._part(index), now=True)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self.fitting and self._watches:
            self._drain()
            self._warn_of_first_bad(trainer)
            for index, watch in enumerate(self._watches):
                record, part = watch.record, self._part(index)
                summary = record.totals() if record.count else {}
                draw = partial(record.draw, f"{self.display_name} {part}".rstrip())
                record.report(trainer, self, draw, summary=summary, part=part)
            with tolerated(self.display_name, "the table of spikes"):
                path = output_file(trainer, self.display_name, "_spikes.csv")
                log_table(trainer, self.log_key("spikes"), self.spikes.rows(), path)
            self._noise.write(trainer, self.log_key)
        super().teardown(trainer, pl_module, stage)
