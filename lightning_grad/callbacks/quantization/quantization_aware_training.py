"""Quantization-aware training as a callback.

Grids and gradients are functions in ``functional/quantization/``. The base class ``WeightCallback`` selects the weights
and substitutes the quantized weights in the module. In this folder:

- ``_grid_weight.py`` is one quantized weight;
- ``_activations.py`` rounds the inputs of layers, and compares the module with and without this;
- ``_meter.py`` measures at log steps, and freezes batch norms.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_grad.callbacks.quantization._activations import RoundedInputs, gaps_of, points
from lightning_grad.callbacks.quantization._grid_weight import (
    Grid,
    GridWeight,
    HeldWeights,
    dimension_of_outputs,
    follow,
    off_the_grid,
)
from lightning_grad.callbacks.quantization._meter import FrozenNorms, LevelFlips, free_share, relative_error
from lightning_grad.core import FoundWeight, Stage, WeightCallback, WeightChoice, is_log_step
from lightning_grad.core.compatibility import Compatibility, yes
from lightning_grad.core.fit import during_fit, until_next_fit
from lightning_grad.core.monitor_restart import MonitorRestart
from lightning_grad.core.optimizers import techniques_that_evaluate
from lightning_grad.core.progress import IN_FIRST_EPOCH, check_total_steps, run_progress, total_steps
from lightning_grad.functional.gradients.shards import is_tensor_parallel
from lightning_grad.functional.quantization.fake_quantization import ActivationQuantizer
from lightning_grad.functional.quantization.grids import Quantizer, check_grid
from lightning_grad.utilities.activation_quantization import apply_activation_quantization
from lightning_grad.utilities.checks import check_finite_above, check_share
from lightning_grad.utilities.parameters import clean_name
from lightning_grad.utilities.reporting import counted

_REPEATING = ("LBFGS", "SAM", "ASAM", "GSAM", "WSAM", "LookSAM", "BSAM")


class QuantizationAwareTraining(WeightCallback[GridWeight]):
    r"""Train weights that are rounded to 1 to 8 bits.

    .. math::
        \tilde W = s \, (k + o), \qquad
        k = \operatorname{clamp}\bigl(\operatorname{round}(W / s - o),\, k_{min},\, k_{max}\bigr)

    W is the dense weight, which the optimizer updates. The forward pass uses :math:`\tilde W`, with one scale s for each
    output channel, which is computed from W after every optimizer step. The quantizer determines s, the offset o and the
    gradient of W (G: gradient of :math:`\tilde W`):

    ========= ============================ ======== ==================== ============================================
    quantizer scale s                      offset o levels               gradient of W
    ========= ============================ ======== ==================== ============================================
    ste       max|W| / (2^(b-1) - 1)       0        2^b - 1, one is 0    G
    statsq    2 mean|W| / 2^(b-1)          1/2      2^b, none is 0       G
    quest     2 C_b rms(W) / (2^b - 1)     1/2      2^b, none is 0       G where W is at most s/2 beyond a level
    ========= ============================ ======== ==================== ============================================

    C_b is the best clip for normally distributed weights. With ``hadamard=True``, "quest" rounds and masks in the basis of
    a Hadamard transform of each row, in blocks of at most 128, and transforms back.

    Args:
        weight_bits: Bits b of a weight, 1 to 8; None quantizes no weight.
            "ste" needs at least 2, which is ternary.
        activation_bits: Bits of the inputs of the same layers, 1 to 8; None rounds no inputs.
            A checkpoint does not hold this rounding; see :func:`~lightning_grad.utilities.apply_activation_quantization`.
        quantizer: "ste", "quest" or "statsq". Only "ste" has the level 0, which sparse weights need.
            At 4 and 2 bits, none was better than "ste" beyond noise in a small comparison on digits.
        hadamard: With "quest": round in the basis of a Hadamard transform, as the paper does.
            The weights are then on no integer grid of the layer itself, so they cannot be exported as integers.
        activation_quantizer: "affine" (between the minimum and the maximum) or "quest" (Gaussian, with a trust mask).
            Each token, or each sample of a convolution, has its own scale.
        start: Share of the run before weights are quantized.
        annealing_start: Share of the run after which confident weights are held fixed. Default: never.
            These are all weights that are not near a boundary between two levels (confidence-guided annealing). The
            released code does this in a fine-tuning run of its own.
        annealing_width: Distance from a boundary, in steps of the grid, up to which weights still train.
            0.005 in the released code.
        freeze_batchnorm_at: Share of the run after which batch norms use their running statistics. Default: never.
            They then normalize as in validation, and their statistics stay as they are.
        include: Names or wildcards of parameters or modules to quantize.
            Default: every Linear, Conv1d/2d/3d, attention projection, and other layer that multiplies by a matrix
            named weight, except the first and the last that the first batch reaches. Parameters of other modules need
            their full name ("blocks.*.w1"); these and tied parameters are quantized in place, in every use.
        exclude: Names or wildcards of parameters or modules not to quantize.
        restart_monitors: Reset monitored checkpoints and early stopping when quantization begins.
            Until then, early stopping cannot end the run.
        total_steps: Length of the run in optimizer steps. Default: the length of the run.
            Needed for runs without a known end if a share is set.
        name: Name of this instance, needed when two are used.

    Raises:
        ValueError: In the constructor for an impossible number of bits, an unknown quantizer, shares outside of 0 to 1,
            or annealing in a Hadamard basis. At the start of the fit if no weight is selected, a name pattern matches
            nothing, shards cut output channels (ModelParallelStrategy), weights are sharded in other ways (FSDPStrategy,
            DeepSpeed), weights move within a step (LBFGS, SAM), another instance
            or ``ModelPruning`` has selected the same weight, or a selected weight is sparse and the grid has no 0.
        RuntimeError: If a selected weight is reparametrized during the fit.

    **Hooks.** ``on_fit_start`` selects the weights, when all layers exist and DDP is set up. Each optimizer's
    post-hook rounds its weights. The first ``on_train_batch_end`` selects again if the batch reached the layers in a
    different order than they were registered. ``on_before_optimizer_step`` zeroes the gradients of confident weights,
    before clipping; what a later callback of the list adds to them moves no weight, but its momentum. The first
    ``on_validation_batch_start`` switches to the weights that a checkpoint would contain, after weight averaging has
    swapped its weights in. ``teardown`` replaces the module's parameters with the quantized weights.

    **Logs** under ``quant/``, at log steps: ``active`` (1 when weights are quantized; also in every validation, to tell
    checkpoints apart), ``error`` (root mean square of the rounding error, relative to that of the weights), ``flips``
    (share of weights whose level this step changed), ``trained`` (share of weights that annealing leaves free).
    At each validation with ``activation_bits``: ``plain_gap`` (largest change of a logged metric on the first batch, if
    activations are not rounded, in points; more than 1 is a warning).

    **State.** Progress, the selected weights with their grids (also as ``formats``), and the dense weights, which a
    checkpoint's quantized weights lack; resuming is bit-exact. Every setting may change on resume.

    **Cost.** A few passes over each weight per optimizer step, and with ``hadamard=True`` four transforms. Annealing
    copies the weights in each step. A checkpoint holds the dense weights too; see docs/benchmarks.md.

    During the fit, ``layer.weight.grad`` of a selected layer is None; read the gradient from ``named_parameters()``.

    Example:
        .. code-block:: yaml

            trainer:
              callbacks:
                - class_path: lightning_grad.callbacks.QuantizationAwareTraining
                  init_args:
                    weight_bits: 4

    References:
        Panferov et al., "QuEST: Stable Training of LLMs with 1-Bit Weights and Activations", 2025, arXiv 2502.05003.
        Liu et al., "Oscillation-free Quantization for Low-bit Vision Transformers", 2023, arXiv 2302.02210 (statsq and
        annealing).
    """

    namespace: ClassVar[str] = "quant"
    compatibility: ClassVar[Compatibility] = WeightCallback.compatibility.but(
        fsdp2=yes(
            "`ModelParallelStrategy` with `fully_shard`, which cuts weights along dimension 0: each output channel stays "
            "whole. Shards that cut output channels raise, and so does 'quest' on weights that are written in place. "
            "The rounded weights of a step are gathered like the weights, and stay whole from the forward to the backward "
            "pass. Tests compare fits on two CPU ranks with fits under DDP. None ran on GPUs."
        ),
        compiled=yes("Modules recompile when quantization begins."),
        manual_optimization=yes(
            "Call `step()` on an optimizer from `self.optimizers()`. If you call it on the raw torch optimizer, weights "
            "are quantized, but annealing is missing, and a warning says so."
        ),
        weight_averaging=yes(
            "`WeightAveraging` and `EMAWeightAveraging`, before or after it in the list: the average is rounded. With "
            "`save_weights_only=True` Lightning itself writes the current weights and not the average."
        ),
    )
    trial: ClassVar[Mapping[str, Any]] = {"weight_bits": 4}
    neutral: ClassVar[Mapping[str, Any] | str] = {"weight_bits": None}
    stage: ClassVar[Stage] = Stage.QUANTIZATION
    effect: ClassVar[str] = "quantized"
    verb: ClassVar[str] = "quantize"
    column: ClassVar[str] = "grid"

    _progress = until_next_fit.of(float)
    _formats = until_next_fit.of(dict[str, dict[str, Any]])
    _activation_formats = until_next_fit.of(dict[str, dict[str, Any]])
    _inputs = during_fit.of(RoundedInputs)
    _gap = during_fit[float | None](lambda _: None)  # points between the module with and without rounded activations
    _monitors = until_next_fit.of(MonitorRestart)
    _held = during_fit[HeldWeights](lambda self: HeldWeights(self.annealing_width))
    _flips = during_fit.of(LevelFlips)
    _hook_fired = during_fit.of(bool)
    _stepped = during_fit.of(bool)  # in the current batch
    _norms = during_fit.of(FrozenNorms)

    def __init__(
        self,
        weight_bits: int | None = 8,
        activation_bits: int | None = None,
        quantizer: Quantizer = "ste",
        hadamard: bool = True,
        activation_quantizer: ActivationQuantizer = "affine",
        start: float = 0.0,
        annealing_start: float | None = None,
        annealing_width: float = 0.005,
        freeze_batchnorm_at: float | None = None,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        restart_monitors: bool = True,
        total_steps: int | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(include, exclude, name)
        self.weight_bits = weight_bits
        self.activation_bits = activation_bits
        self.quantizer = quantizer
        self.hadamard = hadamard
        self.activation_quantizer = activation_quantizer
        self.start = check_share(start, "start")
        self.annealing_start = None if annealing_start is None else check_share(annealing_start, "annealing_start")
        self.annealing_width = check_finite_above(annealing_width, 0.0, "annealing_width")
        self.freeze_batchnorm_at = (
            None if freeze_batchnorm_at is None else check_share(freeze_batchnorm_at, "freeze_batchnorm_at")
        )
        self.restart_monitors = restart_monitors
        self.total_steps = check_total_steps(total_steps)
        if weight_bits is not None:
            check_grid(weight_bits, quantizer)
        if activation_bits is not None:
            check_grid(activation_bits, "quest", "activation_bits")
        if annealing_start is not None and self._in_hadamard_basis:
            raise ValueError(
                "annealing_start holds single weights fixed, but in a Hadamard basis each level depends on many of them. "
                "Set hadamard=False, or remove annealing_start."
            )

    @property
    def _in_hadamard_basis(self) -> bool:
        return self.hadamard and self.quantizer == "quest" and self.weight_bits is not None

    @property
    def formats(self) -> dict[str, dict[str, Any]]:
        """The grid of each weight by its name, as arguments of :func:`~lightning_grad.functional.quantize_weight`.

        It is known from the start of the fit until the next one, and in checkpoints.
        """
        if self.weights and self.weight_bits is not None:
            return {clean_name(weight.name): weight.grid.format for weight in self.weights}
        return self._formats

    @property
    def activation_formats(self) -> dict[str, dict[str, Any]]:
        """The rounding of each layer's input by the name of the layer, known once it has begun, and in checkpoints.

        :func:`~lightning_grad.utilities.apply_activation_quantization` takes it. ``trainer.validate``, ``test`` and
        ``predict`` with this callback apply it themselves.
        """
        if self._inputs.formats:
            return self._inputs.formats if self._has_begun else {}
        return self._activation_formats

    @property
    @override
    def why_not_portable(self) -> str:
        if self.activation_bits is None:
            return ""
        return f"A checkpoint does not hold the rounding of activations to {self.activation_bits} bits."

    # Selection of weights.

    @override
    def view(self, found: FoundWeight) -> GridWeight | str:
        dim = dimension_of_outputs(found)
        if dim is None:
            return "its layer computes neither x W nor x W^T; list its full name in include= to use dimension 0 for outputs"
        return GridWeight(found, Grid(self.weight_bits, self.quantizer, self._in_hadamard_basis, dim))

    @override
    def refuse(self, trainer: pl.Trainer, choice: WeightChoice[GridWeight]) -> None:
        super().refuse(trainer, choice)
        if self.weight_bits is None:
            return
        for weight in choice.chosen:
            others = set(range(weight.parameter.ndim)) - {weight.grid.dim}
            why = f"each output channel (dimension {weight.grid.dim}) has one scale"
            self.refuse_shards(weight, others, why, f"Shard it along dimension {weight.grid.dim}")
            if weight.grid.hadamard and is_tensor_parallel(weight.parameter):
                name = clean_name(weight.name)
                raise ValueError(
                    f"{self.display_name} cannot work on {name}: a Hadamard transform needs plain weights in the forward "
                    "pass, and tensor parallelism splits it over ranks. Set hadamard=False or another quantizer, or exclude "
                    f"it: exclude=[{name!r}]."
                )
        repeating = techniques_that_evaluate(trainer)
        repeating += [type(o).__name__ for o in trainer.optimizers if _moves_within_a_step(o)]
        if repeating:
            raise ValueError(
                f"{self.display_name} rounds weights after each optimizer step, and {repeating[0]} moves them within a "
                "step, which the rounded weights would not show. Train with an optimizer such as SGD or AdamW, without "
                f"{repeating[0]}."
            )

    @property
    @override
    def plan(self) -> str:
        weights = counted(len(self.weights), "weight")
        grid = self.weights[0].grid if self.weights else ""
        does = f"quantizes none of {weights}, because weight_bits is None"
        if self.weight_bits is not None:
            does = f"rounds {weights} to {grid} grids"
        if self.activation_bits is None:
            return does
        return f"{does}, and rounds the inputs of their layers to {self.activation_bits} bits"

    @override
    def refresh(self, weights: Sequence[GridWeight]) -> None:
        follow(weights, self._is_due)

    @override
    def step(self, weights: Sequence[GridWeight]) -> None:
        self.refresh(weights)

    @property
    def _has_begun(self) -> bool:
        return self._progress >= self.start

    @property
    def _is_due(self) -> bool:
        return self.weight_bits is not None and self._has_begun

    @property
    def _rounds(self) -> bool:
        """Whether anything is rounded in this run."""
        return self.weight_bits is not None or self.activation_bits is not None

    # The fit begins.

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.undo.push(self._inputs.remove)
        self.undo.push(self._norms.thaw)
        super().on_fit_start(trainer, pl_module)
        if self.activation_bits is not None:
            self._round_inputs(pl_module)
        for layer, reason in self._inputs.skipped.items():
            self.say(f"does not round the input of {layer}, because {reason}")

    def _round_inputs(self, pl_module: pl.LightningModule) -> None:
        """Round the inputs of the layers of all chosen weights."""
        in_basis = self.hadamard and self.activation_quantizer == "quest"
        form = {"bits": self.activation_bits, "quantizer": self.activation_quantizer, "hadamard": in_basis}
        self._inputs.follow(pl_module, self.weights, form)
        self._inputs.turn(self._has_begun)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if not self.fitting:
            self._formats = dict(state_dict.get("formats", {})) or self._formats
            self._activation_formats = dict(state_dict.get("activation_formats", {})) or self._activation_formats

    @override
    def resume(self) -> None:
        self._progress = float(self.restored.get("progress", 0.0))
        super().resume()
        self._inputs.turn(self._has_begun)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        shares = (self.start, self.annealing_start, self.freeze_batchnorm_at)
        if any(shares) and total_steps(trainer, self.display_name, self.total_steps) is None:
            self.say(IN_FIRST_EPOCH)
        done = bool(self.restored.get("restarted")) and self.restored.get("chosen") == self.signatures
        super().on_train_start(trainer, pl_module)
        wanted = self.restart_monitors and self.start > 0.0 and self._rounds
        self._monitors = MonitorRestart(wanted, done, trainer.enable_validation, "rounding has begun")
        self._monitors.announce(trainer, self.say)

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._monitors.hold(trainer)

    # One training step.

    @override
    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        super().on_train_batch_start(trainer, pl_module, *args)
        if self.freeze_batchnorm_at is not None and self._progress >= self.freeze_batchnorm_at:
            self._norms.freeze(pl_module)

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        self._hook_fired = True
        weights = [weight for weight in self.owned_by(optimizer) if weight.is_on]
        self._held.drop(weights)
        if self._anneals:
            self._held.hold(weights)
        if is_log_step(trainer):
            self._flips.remember(weights)

    @property
    def _anneals(self) -> bool:
        return self.annealing_start is not None and self._progress >= self.annealing_start

    @override
    def after_update(self, optimizer: Optimizer) -> None:
        self._held.restore(self.owned_by(optimizer))

    @override
    @torch.no_grad()
    def after_step(self, trainer: pl.Trainer, optimizer: Optimizer) -> None:
        self._progress = run_progress(trainer, steps_ahead=1, stated=self.total_steps)
        self._stepped = True
        super().after_step(trainer, optimizer)
        self._follow_run(trainer)
        self._flips.count(self.owned_by(optimizer))
        if self._anneals and not self._hook_fired:
            advice = "Call step() on an optimizer from self.optimizers()."
            without = f"an optimizer stepped without Lightning's hooks, so annealing held no weight fixed. {advice}"
            self.tell_once("bypass", rank_zero_warn, without)
        self._hook_fired = False

    def _follow_run(self, trainer: pl.Trainer) -> None:
        """Quantize weights whose own optimizer did not step: ``start`` follows the run, not an optimizer."""
        self.renew([weight for weight in self.weights if weight.is_on != self._is_due])
        self._inputs.turn(self._has_begun)
        if not self._monitors.at_validation:
            self._restart_monitors(trainer)

    def _restart_monitors(self, trainer: pl.Trainer) -> None:
        if self._monitors.is_due and self._has_begun:
            self._monitors.restart(trainer, self.say)

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        super().on_train_batch_end(trainer, pl_module, *args)
        if self.activation_bits is not None and self._inputs.weights != self.weights:
            self._round_inputs(pl_module)  # the first batch has changed the choice
        if self._progress < 1.0 == run_progress(trainer, stated=self.total_steps):  # the last batch may not step
            self._progress = 1.0
            self._follow_run(trainer)
        if self._stepped and is_log_step(trainer):
            self.log_scalars(pl_module, self._measure())
        self._stepped = False
        self._flips.clear()

    @property
    def _active(self) -> float:
        return float(self._rounds and self._has_begun)

    def _measure(self) -> dict[str, float | Tensor]:
        """Return the quantities of a log step."""
        found: dict[str, float | Tensor] = {"active": self._active}
        if not self._is_due:
            return found
        found["error"] = relative_error(self.weights)
        flips = self._flips.share()
        if flips is not None:
            found["flips"] = flips
        if self._anneals:
            found["trained"] = free_share(self.weights, self.annealing_width)
        return found

    # Validation and checkpoints.

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.fitting:
            self._look_after_training(trainer, pl_module)
        elif self.weights and not trainer.sanity_checking:
            self._restart_monitors(trainer)
            self._monitors.hold(trainer)

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._look_after_training(trainer, pl_module)

    @override
    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._look_after_training(trainer, pl_module)

    def _look_after_training(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Round activations as in training, and warn about weights that are not on their grids."""
        if self.activation_bits is not None and self.activation_formats:
            self.undo.push(apply_activation_quantization(pl_module, self.activation_formats))
        names = off_the_grid(pl_module, self.formats)
        self.warn_of_others(trainer, names, len(self.formats), began="quantization")

    @override
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.fitting and self.weights:
            self.log_scalars(pl_module, {"active": self._active}, sync_dist=True)
        if self.fitting and self._gap is not None:
            self.log_scalars(pl_module, {"plain_gap": self._gap}, sync_dist=True)

    @override
    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        loader: int = 0,
    ) -> None:
        is_first = batch_idx == 0 and loader == 0 and not trainer.sanity_checking
        if self.fitting and is_first and self.activation_bits is not None and self._has_begun:
            self._compare_with_plain(trainer, pl_module, batch, batch_idx, loader)

    def _compare_with_plain(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *arguments: Any) -> None:
        """Measure on one batch how far the module is from itself without rounded activations, as a checkpoint has it."""
        try:
            gaps = gaps_of(trainer, pl_module, self._inputs, *arguments)
        except Exception as error:  # a step may not be made for running a batch twice
            said = f"plain_gap could not be measured: {type(error).__name__}: {error}"
            self.tell_once("no plain gap", rank_zero_warn, said)
            return
        if not gaps:
            return
        largest = max(gaps, key=points)
        self._gap, (name, rounded, plain) = points(largest), largest
        if self._gap > 1.0:
            key = type(self).__name__ if self.name is None else self.display_name
            self.tell_once(
                "plain gap",
                rank_zero_warn,
                f"a checkpoint computes with activations that are not rounded, which makes a difference: on one "
                f"validation batch, {name} is {plain:.4g} instead of {rounded:.4g}. To compute what was validated, load "
                f"it and call lightning_grad.utilities.apply_activation_quantization(module, "
                f"checkpoint['callbacks'][{key!r}]['activation_formats']).",
            )

    @override
    def state_dict(self) -> dict[str, Any]:
        restarted = self._monitors.is_done or bool(self.restored.get("restarted"))
        formats = {"formats": self.formats, "activation_formats": self.activation_formats}
        return {**super().state_dict(), "progress": self._progress, **formats, "restarted": restarted}

    # The fit ends.

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._monitors.release(trainer)

    @override
    def settle(self, trainer: pl.Trainer) -> Sequence[GridWeight]:
        self._monitors.is_done |= self._has_begun  # Lightning skips a validation after a checkpoint of the last step
        if self._progress > 0.0 and self._rounds and not self._has_begun:
            rank_zero_warn(
                f"{self.display_name}: the run stopped at {100 * self._progress:.0f} % of its length, before "
                f"start={self.start}, so nothing is quantized. Train for longer, or set a smaller start."
            )
        return super().settle(trainer)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        fitting, self._formats, self._activation_formats = self.fitting, self.formats, self.activation_formats
        super().teardown(trainer, pl_module, stage)
        if fitting:
            self._monitors.release(trainer)


def _moves_within_a_step(optimizer: Optimizer) -> bool:
    return any(kind.__name__ in _REPEATING for kind in type(optimizer).__mro__)
