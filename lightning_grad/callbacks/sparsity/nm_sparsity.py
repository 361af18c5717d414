"""Progressive N:M sparsity as a callback.

Masks and schedules are functions in ``functional/sparsity/``. The base class ``WeightCallback`` selects the weights
and substitutes the sparse weights in the module. In this folder:

- ``_nm_arguments.py`` reads and checks the arguments;
- ``_nm_weight.py`` is one sparse weight;
- ``_nm_meter.py`` measures;
- ``_nm_record.py`` records and draws, and handles the end of the run.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_grad.callbacks.sparsity import _nm_arguments as arguments
from lightning_grad.callbacks.sparsity import _nm_record
from lightning_grad.callbacks.sparsity._nm_meter import SparsityMeter, current_patterns, phase_name, sparsity_totals
from lightning_grad.callbacks.sparsity._nm_weight import (
    SparseWeight,
    add_sr_ste,
    dimension_of_groups,
    lacking,
    take_masks,
)
from lightning_grad.core import FoundWeight, FrozenMoments, Stage, WeightCallback, WeightChoice, is_log_step
from lightning_grad.core.callback import GradCallback
from lightning_grad.core.compatibility import SCALED, Compatibility, no, yes
from lightning_grad.core.fit import during_fit, until_next_fit
from lightning_grad.core.monitor_restart import MonitorRestart
from lightning_grad.core.progress import IN_FIRST_EPOCH, check_total_steps, run_progress, total_steps
from lightning_grad.functional import NMPattern, NMPhase
from lightning_grad.functional.gradients.tensor_lists import whole
from lightning_grad.functional.sparsity.nm_schedule import Recipe
from lightning_grad.functional.sparsity.nm_sparsity import Axis, Gradient
from lightning_grad.utilities.arguments import plain
from lightning_grad.utilities.checks import (
    check_at_least,
    check_finite_at_least,
    owned_ids,
    refuse_projected_moments,
    warn_of_missing_momentum,
)
from lightning_grad.utilities.parameters import check_patterns, clean_name, matches
from lightning_grad.utilities.precision import gradients_are_scaled
from lightning_grad.utilities.reporting import counted, limit_layers, log_histograms, stepped_batches

_ANOTHER_RECIPE = "Set recipe='sr-ste', or train with Adam or AdamW"
_NO_VARIANCE = no(
    "freezes the variance (exp_avg_sq) of an Adam-like optimizer, and {} keeps none",
    _ANOTHER_RECIPE,
).given("recipe='step'")


class NMSparsity(WeightCallback[SparseWeight]):
    r"""Train weights with at most N nonzero values in every group of M.

    .. math::
        \tilde W = W \odot \bigl(m(W) + (1 - m(W))\, D\bigr)

    W is the dense weight, which the optimizer updates. :math:`m(W) \in \{0, 1\}` marks the N largest :math:`|W|` in each
    group of M (:func:`~lightning_grad.functional.nm_mask`), and :math:`D \in [0, 1]` is the decay value. The forward pass
    uses :math:`\tilde W`. The mask is recomputed after every optimizer step, so pruned weights may return. The recipe
    determines N:M and D over the run:

    ================== ============================================== =========================================
    recipe             forward                                        gradient of W (G: gradient of W~)
    ================== ============================================== =========================================
    ste                N:M from the start, D = 0                      G
    sr-ste             the same                                       G + lambda (1 - m) W
    step               dense, then sr-ste                             the same, with Adam's variance frozen
    mdgf-linear        D = max(0, 1 - beta t), then D = 0             G, or G (m + (1 - m) D)
    mdgf-exponential   D = exp(-beta t), then D = 0                   the same
    sdgf-stepwise      (M-1):M, M/2:M, M/4:M ... N:M                  G, or G m
    sdgf-geometric     8N:8M, 4N:4M, 2N:2M, N:M                       the same
    ================== ============================================== =========================================

    Args:
        pattern: N:M pattern such as "2:4", or a mapping from names or wildcards to patterns.
            The first match applies.
        recipe: A recipe from the table, or a list of pairs (share of the run, pattern from there on).
            The default was best, by a narrow margin, in our comparison on digits (docs/benchmarks.md).
        gradient: Gradient of pruned weights: "ste" (unchanged) or "masked" (chain rule).
            "ste" matches the released code, and was ahead, within noise, in our comparison; "masked" matches the
            paper's description for mdgf and sdgf. It also applies to a list of stages.
        dense_fraction: Share of the run before pruning starts. Default: 0.2 for step, else 0.
            In our sweep, a dense phase brought no gain. For step, the paper uses a test (AutoSwitch) instead.
        finetune_fraction: Share at the end of the run with the final pattern and D = 0.
            Default: 0.2 for mdgf and sdgf (from our sweep), else 0.
        decay: Coefficient beta per step. Default: 7 or 2 divided by the length of the decay phase.
            7 is for mdgf-exponential, which ends near 1e-3; 2 is for mdgf-linear, which reaches 0 half-way.
        sr_ste_lambda: Strength lambda of the SR-STE term in sr-ste and step (2e-4 in the paper).
        axis: Where the groups lie: "input" (as 2:4 hardware needs), "output", or a dimension.
            Inputs (in_features, input channels) are in dimension 1, or in dimension 0 if a layer of another package
            computes x W.
        include: Names or wildcards of parameters or modules to make sparse.
            Default: every Linear, Conv1d/2d/3d, attention projection, and other layer that multiplies by a matrix
            named weight, except the first and the last that the first batch reaches. Parameters of other modules need
            their full name ("blocks.*.w1"); these and tied parameters are masked in place, in every use.
        exclude: Names or wildcards of parameters or modules to keep dense.
        mask_every_n_steps: Recompute masks every this many optimizer steps; above 1 is faster but approximate.
        geometric_start: Factor of the first, widest groups of sdgf-geometric, a power of two.
            The default matches the released code.
        zero_pruned_state: Zero the optimizer state of pruned weights once the pattern is final.
            It is zeroed after every step, so momentum does not move pruned weights.
        restart_monitors: Reset monitored checkpoints and early stopping when the final pattern begins.
            Until then, early stopping cannot end the run.
        bake_on_early_stop: Prune to the final pattern even if the run stops before its schedule ends.
        layer_depth: Merge layers in logs whose names share this many leading parts. Default: no merging.
        max_layers: Maximum number of layers to log separately.
        figure: Draw a figure of the run at its end (needs matplotlib and a logger with a local folder).
        figure_metric: Validation metric in the figure. Default: the first whose name contains "acc".
        save_masks: Write the final masks to a file next to the logs (W&B: an artifact).
        total_steps: Length of the schedule in optimizer steps. Default: the length of the run.
            Needed for runs without a known end.
        name: Name of this instance, needed when two are used.

    Raises:
        ValueError: In the constructor for an impossible pattern, an unknown recipe or one that contradicts the other
            arguments, or fractions that leave the recipe no phase. At the start of the fit if no weight is selected,
            a name pattern matches nothing, the run has no known end, shards cut the groups of a weight
            (ModelParallelStrategy), weights are sharded in other ways (FSDPStrategy, DeepSpeed), or another instance or
            ``ModelPruning`` has selected the same weight.
        RuntimeError: If a selected weight is reparametrized during the fit.

    **Hooks.** ``on_fit_start`` selects the weights, when all layers exist and DDP is set up. Each optimizer's
    post-hook refreshes the masks of its weights. The first ``on_train_batch_end`` selects again if the batch reached
    the layers in a different order than they were registered. ``on_validation_start`` resets monitors when the final
    pattern has begun. ``on_before_optimizer_step`` adds the SR-STE term, unscaled and before clipping, so lambda is
    exact. The first ``on_validation_batch_start`` switches to the weights that a checkpoint would contain, after
    weight averaging has swapped its weights in. ``teardown`` replaces the module's parameters with the sparse weights.

    **Logs** under ``sparsity/``, at log steps: ``n`` and ``m`` of the current pattern (of each final pattern if there
    are several), ``decay`` (D), ``density`` (share of nonzero values in the selected weights; per layer under
    ``sparsity_layers/``), ``flips`` (share of mask entries that changed since the last log step),
    ``gradient_variance_pruned`` and ``gradient_variance_kept``
    (:func:`~lightning_grad.functional.masked_gradient_variance`), ``exact`` (1 when the final pattern applies with D
    = 0; also in every validation, to tell checkpoints apart). At the end: a figure, a table with the divergence of
    the masks from the last masks of their phase, and histograms of the weights.

    **State.** Progress, the record, the selected weights, masks that are older than their weights, the dense values
    that a checkpoint's sparse weights lack, and, if the next step is a log step, gradients for their variance; resuming
    is bit-exact. Every setting may change on resume.

    **Cost.** One mask per optimizer step and one product for each use of a weight; see docs/benchmarks.md.

    During the fit, ``layer.weight.grad`` of a selected layer is None; read the gradient from ``named_parameters()``.

    Example:
        .. code-block:: yaml

            trainer:
              callbacks:
                - class_path: lightning_grad.callbacks.NMSparsity
                  init_args:
                    pattern: "1:8"
                    recipe: mdgf-exponential

    References:
        Bambhaniya et al., "Progressive Gradient Flow for Robust N:M Sparsity Training in Transformers", 2024,
        arXiv 2402.04744 (mdgf, sdgf). Zhou et al., 2021, arXiv 2102.04010 (sr-ste). Lu et al., 2023, arXiv 2302.01172
        (step).
    """

    namespace: ClassVar[str] = "sparsity"
    compatibility: ClassVar[Compatibility] = WeightCallback.compatibility.but(
        fsdp2=yes(
            "`ModelParallelStrategy` with `fully_shard`, which cuts weights along dimension 0: the groups of 2:4 hardware "
            "stay whole. Shards that cut groups raise, and so does `gradient='masked'` on weights that are written in "
            "place. The sparse weights of a step stay whole from the forward to the backward pass. Tests compare fits "
            "on two CPU ranks with fits under DDP. None ran on GPUs."
        ),
        fused_fp16=yes("All recipes except `sr-ste` and `step`, which raise."),
        no_second_moment=yes("All recipes except `step`, which raises."),
        compiled=yes("Modules recompile when pruning begins, but not when D or the pattern changes."),
        manual_optimization=yes(
            "Call `step()` on an optimizer from `self.optimizers()`. If you call it on the raw torch optimizer, masks are "
            "kept, but the SR-STE term is missing, and a warning says so."
        ),
        weight_averaging=yes(
            "`WeightAveraging` and `EMAWeightAveraging`, before or after it in the list. With `save_weights_only=True` "
            "Lightning itself writes the current weights and not the average."
        ),
    )
    trial: ClassVar[Mapping[str, Any]] = {"pattern": "1:4", "recipe": "mdgf-exponential", "dense_fraction": 0.1}
    neutral: ClassVar[Mapping[str, Any] | str] = {"pattern": "4:4"}
    stage: ClassVar[Stage] = Stage.SPARSITY
    effect: ClassVar[str] = "sparse"
    verb: ClassVar[str] = "prune"
    column: ClassVar[str] = "pattern"

    _progress = until_next_fit.of(float)
    _record = until_next_fit.of(_nm_record.SparsityRecord)
    _meter = until_next_fit.of(SparsityMeter)
    _monitors = until_next_fit.of(MonitorRestart)
    _total_steps = during_fit[int | None](lambda _: None)
    _variances = during_fit.of(dict[int, FrozenMoments])
    _trains = during_fit.of(bool)  # until then, the length of the run is unknown and masks are taken when they are used
    _stepped = during_fit.of(bool)  # in the current batch
    _hook_fired = during_fit.of(bool)

    def __init__(
        self,
        pattern: str | Mapping[str, str] = "2:4",
        recipe: Recipe | Sequence[tuple[float, str]] = "mdgf-exponential",
        gradient: Gradient = "ste",
        dense_fraction: float | None = None,
        finetune_fraction: float | None = None,
        decay: float | None = None,
        sr_ste_lambda: float = 2e-4,
        axis: Axis = "input",
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        mask_every_n_steps: int = 1,
        geometric_start: int = 8,
        zero_pruned_state: bool = False,
        restart_monitors: bool = True,
        bake_on_early_stop: bool = False,
        layer_depth: int | None = None,
        max_layers: int = 16,
        figure: bool = True,
        figure_metric: str | None = None,
        save_masks: bool = False,
        total_steps: int | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(include, exclude, name)
        self.pattern = plain(pattern)
        self.recipe = arguments.as_recipe(recipe)
        phases = arguments.default_phases(self.recipe)
        self.dense_fraction = phases[0] if dense_fraction is None else dense_fraction
        self.finetune_fraction = phases[1] if finetune_fraction is None else finetune_fraction
        self.gradient = gradient
        self.decay = decay
        self.sr_ste_lambda = check_finite_at_least(sr_ste_lambda, 0.0, "sr_ste_lambda")
        self.axis = axis
        self.mask_every_n_steps = check_at_least(mask_every_n_steps, 1, "mask_every_n_steps")
        self.geometric_start = geometric_start
        self.zero_pruned_state = zero_pruned_state
        self.restart_monitors = restart_monitors
        self.bake_on_early_stop = bake_on_early_stop
        self.layer_depth = check_at_least(layer_depth, 1, "layer_depth")
        self.max_layers = check_at_least(max_layers, 0, "max_layers")
        self.figure = figure
        self.figure_metric = figure_metric
        self.save_masks = save_masks
        self.total_steps = total_steps
        check_total_steps(total_steps)
        arguments.check_recipe(self.recipe, gradient, self.finetune_fraction, decay)
        self._patterns = arguments.read_patterns(self.pattern)
        self._schedule = arguments.read_schedule(
            self.recipe, self._patterns, self.dense_fraction, self.finetune_fraction, decay, geometric_start
        )

    @property
    def _recipe_name(self) -> str:
        return self.recipe if isinstance(self.recipe, str) else "custom"

    # Selection of weights.

    @override
    def view(self, found: FoundWeight) -> SparseWeight | str:
        pattern, dim = (
            arguments.pattern_of(found, self._patterns, self.display_name),
            dimension_of_groups(found, self.axis),
        )
        if dim is None:
            return (
                "its layer computes neither x W nor x W^T; list its full name in include= to use dimension 1 for inputs"
            )
        size = found.parameter.shape[dim]
        if not pattern.fits(size):
            return f"dimension {dim} has size {size}, which is not a multiple of {pattern.m}"
        return SparseWeight(found, pattern, dim, straight_through=self.gradient == "ste")

    @override
    def why_excluded(self, names: Sequence[str]) -> str:
        return super().why_excluded(names) or (
            "" if matches(names, self._patterns) else "no entry of pattern matches it"
        )

    @override
    def check_names(self, pl_module: pl.LightningModule) -> None:
        super().check_names(pl_module)
        check_patterns(pl_module, self.display_name, pattern=[name for name in self._patterns if name != "*"])

    @override
    def works_with(self) -> Compatibility:
        answers = self.compatibility
        if self._adds_sr_ste:
            answers = answers.but(fused_fp16=SCALED.given(f"recipe={self.recipe!r}"))
        return answers.but(no_second_moment=_NO_VARIANCE) if self.recipe == "step" else answers

    @override
    def refuse(self, trainer: pl.Trainer, choice: WeightChoice[SparseWeight]) -> None:
        super().refuse(trainer, choice)
        for weight in choice.chosen:
            why = f"its groups of {weight.pattern.m} lie along dimension {weight.dim}"
            way_out = "Shard it along another dimension, set axis"
            self.refuse_shards(weight, {weight.dim}, why, way_out)
        chosen = {id(weight.parameter) for weight in choice.chosen}
        for optimizer in trainer.optimizers:
            if self.recipe == "step" and not owned_ids(optimizer).isdisjoint(chosen):
                refuse_projected_moments(f"{self.display_name} with recipe='step'", optimizer, _ANOTHER_RECIPE)
        if self._adds_sr_ste:
            warn_of_missing_momentum(trainer, self.display_name, "its SR-STE term")

    @property
    @override
    def plan(self) -> str:
        pruned = sum(weight.pattern.n < weight.pattern.m for weight in self.weights)
        weights = counted(pruned or len(self.weights), "weight")
        does = f"makes {weights} sparse" if pruned else f"keeps {weights} dense, because N = M prunes nothing"
        return f"{does} (recipe: {self._recipe_name})"

    @override
    def refresh(self, weights: Sequence[SparseWeight]) -> None:
        self._follow(weights)

    @override
    def step(self, weights: Sequence[SparseWeight]) -> None:
        self._follow(weights, self.mask_every_n_steps)

    def _follow(self, weights: Sequence[SparseWeight], mask_every_n_steps: int = 1) -> None:
        for weight, phase in zip(weights, self._phases(weights), strict=True):
            weight.follow(phase, mask_every_n_steps)
        if self._trains:
            take_masks(weights)

    def _phases(self, weights: Sequence[SparseWeight], progress: float | None = None) -> list[NMPhase]:
        """Return the phase of each weight, computed once for each pattern and size."""
        at, steps = self._progress if progress is None else progress, self._total_steps or 1
        kinds = [(weight.pattern.n, weight.pattern.m, weight.size) for weight in weights]
        phases = {(n, m, size): self._schedule.phase(at, NMPattern(n, m), steps, size) for n, m, size in set(kinds)}
        return [phases[kind] for kind in kinds]

    @property
    def _adds_sr_ste(self) -> bool:
        return self.recipe in ("sr-ste", "step") and self.sr_ste_lambda > 0.0

    # The fit begins.

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if not self.fitting:
            self.signatures = self.signatures or dict(state_dict.get("chosen", {}))

    @override
    def resume(self) -> None:
        state = self.restored
        self._progress = float(state.get("progress", 0.0))
        if "record" in state:
            self._record.load_state_dict(state["record"])
        super().resume()
        self._meter.load_state_dict(state, list(filter(self.is_as_before, self.weights)))

    # One training step.

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._total_steps = total_steps(trainer, self.display_name, self.total_steps)
        if self._total_steps is None:
            self.say(IN_FIRST_EPOCH)
        restored, self._trains = self.restored, True
        super().on_train_start(trainer, pl_module)
        for optimizer in trainer.optimizers:
            if optimizer.state and self.owned_by(optimizer):
                self._freeze_variance(optimizer, resumed=bool(restored.get("frozen")))
        done = bool(restored.get("restarted")) and restored.get("chosen") == self.signatures
        wanted = self.restart_monitors and self._pattern_changes
        self._monitors = MonitorRestart(wanted, done, trainer.enable_validation)
        self._monitors.announce(trainer, self.say)

    @property
    def _pattern_changes(self) -> bool:
        """Whether a weight that is pruned at the end is not pruned to its final pattern from the start."""
        pruned = [weight for weight in self.weights if weight.pattern.n < weight.pattern.m]
        return not all(phase.final for phase in self._phases(pruned, progress=0.0))

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._monitors.hold(trainer)

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        self._hook_fired = True
        measure, keep = is_log_step(trainer), is_log_step(trainer, ahead=1)
        if not (measure or keep or self._adds_sr_ste):
            return
        owned = self.owned_by(optimizer)
        if (measure or keep) and not gradients_are_scaled(trainer, optimizer):
            for weight in owned:
                if weight.parameter.grad is not None:
                    self._meter.add_gradient(weight, weight.parameter.grad, measure, keep)
        if self._adds_sr_ste:
            add_sr_ste(owned, self.sr_ste_lambda)

    @override
    @torch.no_grad()
    def after_step(self, trainer: pl.Trainer, optimizer: Optimizer) -> None:
        self._progress = run_progress(trainer, steps_ahead=1, stated=self.total_steps)
        if self._total_steps is None:  # the length of an epoch is known after the first
            self._total_steps = total_steps(trainer, self.display_name)
        self._stepped = True
        super().after_step(trainer, optimizer)
        self._follow_schedule()
        self._restart_monitors(trainer, at_validation=False)
        if self.recipe == "step" and self.owned_by(optimizer):
            self._freeze_variance(optimizer)
        if self.zero_pruned_state:
            for weight in self.owned_by(optimizer):
                weight.clear_pruned(optimizer.state[weight.parameter])
        if not self._hook_fired:
            lost = (
                "the SR-STE term and the logged gradient variance are missing"
                if self._adds_sr_ste
                else "the gradient variance is not logged"
            )
            advice = "Call step() on an optimizer from self.optimizers()."
            without = f"an optimizer stepped without Lightning's hooks, so {lost}. {advice}"
            self.tell_once("bypass", rank_zero_warn, without)
        self._hook_fired = False

    def _follow_schedule(self) -> None:
        """Update weights whose own optimizer did not step: the schedule follows the run, not an optimizer."""
        due = zip(self.weights, self._phases(self.weights), strict=True)
        self.renew([weight for weight, phase in due if weight.phase != phase])

    def _restart_monitors(self, trainer: pl.Trainer, at_validation: bool) -> None:
        due = self._monitors.is_due and self._monitors.at_validation == at_validation
        if due and all(weight.phase.final for weight in self.weights):
            self._monitors.restart(trainer, self.say)

    def _freeze_variance(self, optimizer: Optimizer, resumed: bool = False) -> None:
        if self.recipe != "step" or self._progress < self.dense_fraction:
            return
        if id(optimizer) in self._variances:
            self._variances[id(optimizer)].put_back()
            return
        # Masked gradients must not accumulate in the variance: Lu et al., 2023, algorithm 1.
        self._variances[id(optimizer)] = FrozenMoments(optimizer, resumed)
        if not len(self._variances[id(optimizer)]):
            raise _NO_VARIANCE.error(self.display_name, type(optimizer).__name__)

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        super().on_train_batch_end(trainer, pl_module, *args)
        if self._stepped and is_log_step(trainer):
            self._log_step(trainer, pl_module)
        self._stepped = False
        self._meter.forget_step()
        if self._progress < 1.0 == run_progress(trainer, stated=self.total_steps):  # the last batch may not step
            self._progress = 1.0
            self._follow_schedule()
            self._restart_monitors(trainer, at_validation=False)

    def _log_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the quantities of a step and add them to the record."""
        known, measured = sparsity_totals(self.weights), self._meter.read(self.weights)
        layers = limit_layers({clean_name(w.name): w.density for w in self.weights}, self.layer_depth, self.max_layers)
        shown = {f"density/{name}": value for name, value in layers.items()}
        self.log_scalars(pl_module, {**known, **current_patterns(self.weights), **measured})
        self.log_scalars(pl_module, shown, layers=True)
        numbers = torch.stack(list(measured.values())).tolist() if measured else []
        row: dict[str, Any] = {"step": stepped_batches(trainer), "progress": self._progress, **known}
        row |= dict.fromkeys(("flips", "gradient_variance_pruned", "gradient_variance_kept"))
        row |= dict(zip(measured, numbers, strict=True))
        self._warn_of_nan()
        self._record.add_step(row, phase_name(self.weights), {weight.name: weight.mask for weight in self.weights})
        self._record.save(trainer, self)

    def _warn_of_nan(self) -> None:
        """Warn once about weights that contain NaN; masks treat NaN as the smallest value."""
        found = torch.stack([whole(weight.parameter.isnan().any()) for weight in self.weights]).tolist()
        names = [clean_name(weight.name) for weight, has_nan in zip(self.weights, found, strict=True) if has_nan]
        if names:
            self.tell_once("nan", rank_zero_warn, f"NaN in {', '.join(names[:5])}. NaN is pruned before any number.")

    # Validation and checkpoints.

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.fitting:
            self._warn_if_not_sparse(trainer, pl_module)
        elif self.weights and not trainer.sanity_checking:
            self._restart_monitors(trainer, at_validation=True)
            self._monitors.hold(trainer)

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._warn_if_not_sparse(trainer, pl_module)

    def _warn_if_not_sparse(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        names, began = lacking(pl_module, self.signatures), "the final pattern"
        self.warn_of_others(trainer, names, len(self.signatures), began, f", so this is not the result of {began}")

    @override
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.fitting and self.weights:
            now = sparsity_totals(self.weights)
            self.log_scalars(pl_module, {"density": now["density"], "exact": now["exact"]}, sync_dist=True)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if self.fitting and self.weights and not trainer.sanity_checking:
            known, techniques = trainer.callback_metrics, _namespaces(trainer)
            shown = [key for key in known if "acc" in key and not key.startswith(techniques)]
            shown += [self.figure_metric] if self.figure_metric in known else []
            self._record.validations.add({"step": stepped_batches(trainer), **{k: float(known[k]) for k in shown}})

    @override
    def state_dict(self) -> dict[str, Any]:
        seen = {"record": self._record.state_dict(), **self._meter.state_dict()}
        frozen = self.recipe == "step" and self._progress >= self.dense_fraction
        restarted = self._monitors.is_done or bool(self.restored.get("restarted"))
        own = {"progress": self._progress, **seen, "frozen": frozen, "restarted": restarted}
        return {**super().state_dict(), **own}

    # The fit ends.

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._record.save(trainer, self, now=True)
        self._monitors.release(trainer)

    @override
    def settle(self, trainer: pl.Trainer) -> Sequence[SparseWeight]:
        if self._progress == 0.0:
            return []
        # If a checkpoint at the last step was due before a validation, Lightning skips the validation, and the reset with it.
        self._monitors.is_done |= all(weight.phase.final for weight in self.weights)
        _nm_record.settle_unfinished(self.weights, self._progress, self.bake_on_early_stop, self.display_name)
        return self.weights

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        fitting, weights = self.fitting, self.weights
        super().teardown(trainer, pl_module, stage)
        if fitting and weights and self._progress > 0.0:
            self._report(trainer, weights)
        if fitting:
            self._monitors.release(trainer)
        self._meter = SparsityMeter()

    def _report(self, trainer: pl.Trainer, weights: Sequence[SparseWeight]) -> None:
        """Write the figure, the histograms and the masks, and warn about a best checkpoint that is not sparse."""
        self._record.close_phase()
        last, title = sparsity_totals(weights), f"{self.display_name}: {self.pattern}, {self._recipe_name}"
        summary = {"density": last["density"], "exact": last["exact"]}
        draw = partial(self._record.draw_run, title, self.figure_metric)
        self._record.report(trainer, self, draw, summary=summary)
        shown = {
            self.log_key(f"weights/{clean_name(w.name)}", layers=True): whole(w.parameter.detach())
            for w in weights[: self.max_layers]
        }
        log_histograms(trainer, shown)
        if self.save_masks:
            _nm_record.write_masks(trainer, weights, self.display_name)
        _nm_record.warn_of_inexact_best(trainer, weights, self.display_name)


def _namespaces(trainer: pl.Trainer) -> tuple[str, ...]:
    """Return the prefixes of all techniques' log keys; lr/accuracy_gradient, for example, is no accuracy of the module."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    owners = [c for c in callbacks if isinstance(c, GradCallback) and hasattr(c, "namespace")]
    return tuple(f"{owner.namespace.split('/')[0]}{end}" for owner in owners for end in ("/", "_layers/"))
