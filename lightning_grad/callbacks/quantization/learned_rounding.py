"""Learned rounding at the end of a fit, as a callback.

The rounding is a function in ``functional/quantization/``, and ``utilities/reconstruction.py`` goes through the layers of
a network. In this folder, ``_rounded_weight.py`` is one rounded weight.
"""

import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_grad.callbacks.quantization._grid_weight import dimension_of_outputs
from lightning_grad.callbacks.quantization._rounded_weight import RoundedWeight
from lightning_grad.core import (
    FoundWeight,
    LossRequest,
    ProbeLook,
    Reading,
    Stage,
    WeightCallback,
    WeightChoice,
    manual,
    no,
)
from lightning_grad.core.averaging import techniques_that_average
from lightning_grad.core.compatibility import Compatibility
from lightning_grad.core.fit import during_fit, until_next_fit
from lightning_grad.core.losses.sample_losses import trained_loss
from lightning_grad.core.missed_validation import is_validation_due
from lightning_grad.core.monitor_restart import MonitorRestart
from lightning_grad.core.probe_reading import take_look
from lightning_grad.core.probe_samples import ProbeSamples
from lightning_grad.core.progress import run_progress
from lightning_grad.data.random_streams import seed_streams
from lightning_grad.functional import QuantizedTensor, integer_range, outlier_mask
from lightning_grad.functional.choices import check_choice
from lightning_grad.functional.quantization.outliers import SCORES, OutlierScore
from lightning_grad.utilities.checks import check_above, check_at_least, check_between, check_count
from lightning_grad.utilities.parameters import as_names, check_patterns, clean_name, matches
from lightning_grad.utilities.reconstruction import Reconstruction, RoundedUnit
from lightning_grad.utilities.reporting import counted, listed, log_many
from lightning_grad.utilities.rounding import absolute_gradients, rounding_table
from lightning_grad.utilities.rounding_units import Run, called_modules, find_units

_AFTERWARDS = "Round after the fit: lightning_grad.utilities.round_weights(module, batches)"


class LearnedRounding(WeightCallback[RoundedWeight]):
    r"""Round the weights to a few bits when the fit ends, each layer by its output.

    .. math::
        \tilde W = s \left( \lfloor W / s \rfloor + h \right), \qquad h \in \{0, 1\}

    One scale s for each output channel minimizes the rounding error of its weights. Then each layer in turn learns h
    (:func:`~lightning_grad.functional.learn_rounding`), to keep its outputs on the inputs that it gets after the layers
    before it were rounded. Layers that are linear in their weight end with single flips
    (:func:`~lightning_grad.functional.flip_roundings`). On these samples no layer is worse than with nearest rounding.

    The weights train as they are. They are rounded after the last training batch, before the validation that follows it,
    so validation and every file after it have the rounded weights. If the end of the run is not known in advance
    (early stopping, ``max_time``), they are rounded when training ends. If the best or the last checkpoint is from before,
    a warning names it.

    Args:
        bits: Bits of a weight, 2 to 8; None rounds no weight.
        samples: Training samples that the roundings are learned from, spread over the set (1,024 in the paper).
            A smaller set is used as a whole. Its inputs and outputs of one layer at a time are kept in memory.
        steps: Optimizer steps for each layer; 0 rounds to the nearest levels.
            The paper makes 20,000 at a tenth of our learning rate; flips make up for fewer.
        strength: Strength of the penalty on undecided weights, relative to the layer's error of nearest rounding.
            The paper's is absolute, so it depends on the scale of the inputs.
        blocks: Names or wildcards of modules whose weights are rounded together, by the output of the module.
            Default: each layer alone. The paper (BRECQ) uses residual blocks.
        outliers: Share of the weights of each layer that keep their values, such as 0.01 (GWQ).
        outlier_score: "gradient-error" (gradient times rounding error), "gradient" (as published) or "magnitude".
        include: Names or wildcards of parameters or modules to round.
            Default: every Linear, Conv1d/2d/3d, attention projection, and other layer that multiplies by a matrix
            named weight, except the first and the last that the first batch reaches. Parameters of other modules need
            their full name ("blocks.*.w1").
        exclude: Names or wildcards of parameters or modules not to round.
        restart_monitors: Reset monitored checkpoints before the last validation, so the best one has rounded weights.
        loader_key: Key or list position of the training loader to use, if there are several.
        seed: Seed of the order of the batches.
        name: Name of this instance, needed when two are used.

    Raises:
        ValueError: In the constructor for impossible numbers or an unknown score. Before training if no weight is
            selected, a name matches nothing, under manual optimization or sharded parameters, if weights are averaged (by a
            callback or by an optimizer), or if another technique quantizes the same weight.
        TypeError: Before training if the training data has no indices.

    **Hooks.** The last ``on_train_batch_end`` rounds, or ``on_train_end``. Meanwhile the module is quiet and in eval mode,
    and ``training_step`` runs on the samples. ``teardown`` replaces the module's parameters with the rounded weights.

    **Logs** under ``quant/``, at the end: ``rounding_error`` (mean over layers of the error of the output, relative to
    nearest rounding), ``undecided`` (mean share of the weights that the penalty had not decided). A table of the layers
    is printed.

    **State.** The roundings, once they are known, with one bit for each weight, and the weights before rounding: a run
    that continues from the last checkpoint continues from them, bit for bit, and is rounded at its own end.

    **Cost.** Nothing while training. At the end two passes over the samples for each layer, and ``steps`` forward and
    backward passes of the layer; see docs/benchmarks.md.

    Example:
        .. code-block:: yaml

            trainer:
              callbacks:
                - class_path: lightning_grad.callbacks.LearnedRounding
                  init_args:
                    bits: 3

    References:
        Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", ICML 2020, arXiv 2004.10568. Li et
        al., "BRECQ", ICLR 2021, arXiv 2102.05426. Yvinec et al., 2023, arXiv 2308.07662. Shao et al., "GWQ", 2024, arXiv
        2411.00850 (outliers).
    """

    namespace: ClassVar[str] = "quant"
    compatibility: ClassVar[Compatibility] = WeightCallback.compatibility.but(
        **manual(no("runs training_step without training, which under {} steps the optimizers", _AFTERWARDS)),
        weight_averaging=no("rounds the trained weights, and {} replaces them afterwards", _AFTERWARDS),
    )
    trial: ClassVar[Mapping[str, Any]] = {"bits": 3, "samples": 16, "steps": 5}
    neutral: ClassVar[Mapping[str, Any] | str] = {"bits": None}
    stage: ClassVar[Stage] = Stage.QUANTIZATION
    effect: ClassVar[str] = "rounded"
    verb: ClassVar[str] = "round"
    column: ClassVar[str] = "grid"

    _samples = during_fit[ProbeSamples]()
    _earlier = during_fit.of(dict[str, int])  # files that were saved before the weights were rounded
    _report = until_next_fit.of(dict[str, QuantizedTensor])

    def __init__(
        self,
        bits: int | None = 4,
        samples: int = 1024,
        steps: int = 1000,
        strength: float = 10.0,
        blocks: Sequence[str] | None = None,
        outliers: float = 0.0,
        outlier_score: OutlierScore = "gradient-error",
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        restart_monitors: bool = True,
        loader_key: str | int | None = None,
        seed: int = 0,
        name: str | None = None,
    ) -> None:
        super().__init__(include, exclude, name)
        self.bits = bits
        self.samples = check_count(samples, 1, "samples")
        self.steps = check_count(steps, 0, "steps")
        self.strength = check_above(strength, 0.0, "strength")
        self.blocks = as_names(blocks)
        self.outliers = check_between(outliers, 0.0, 1.0, "outliers")
        self.outlier_score = outlier_score
        self.restart_monitors = restart_monitors
        self.loader_key = loader_key
        self.seed = check_at_least(seed, 0, "seed")
        if bits is not None:
            integer_range(bits)
        check_choice(outlier_score, SCORES, "outlier_score")

    @property
    def report(self) -> dict[str, QuantizedTensor]:
        """Integers and scales of each rounded weight by its name; empty before the weights are rounded.

        :func:`~lightning_grad.utilities.export_onnx_int8` and :func:`~lightning_grad.utilities.to_torchao` take it.
        """
        if self.is_rounded:
            return {clean_name(weight.name): weight.quantized for weight in self.weights}
        return self._report

    @property
    def is_rounded(self) -> bool:
        """Whether the weights are rounded."""
        return bool(self.weights) and all(weight.is_rounded for weight in self.weights)

    # Selection of weights.

    @override
    def view(self, found: FoundWeight) -> RoundedWeight | str:
        dim = dimension_of_outputs(found)
        if dim is None:
            return "its layer computes neither x W nor x W^T; list its full name in include= to use dimension 0 for outputs"
        return RoundedWeight(found, self.bits, dim)

    @override
    def check_names(self, pl_module: pl.LightningModule) -> None:
        super().check_names(pl_module)
        check_patterns(pl_module, self.display_name, blocks=self.blocks)

    @override
    def refuse(self, trainer: pl.Trainer, choice: WeightChoice[RoundedWeight]) -> None:
        super().refuse(trainer, choice)
        names = [name for weight in choice.chosen for name in weight.found.names]
        empty = [block for block in self.blocks or [] if not matches(names, [block])]
        if empty:
            raise ValueError(
                f"{self.display_name}(blocks=...): {empty[0]!r} contains no weight to round. Remove it, or include more."
            )

    @property
    @override
    def plan(self) -> str:
        weights = counted(len(self.weights), "weight")
        if self.bits is None:
            return f"rounds none of {weights}, because bits is None"
        return f"rounds {weights} to {self.bits} bits at the end of the fit"

    # The fit begins.

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        asked = LossRequest(
            self.display_name, way_out="round after the fit with lightning_grad.utilities.round_weights"
        )
        self._samples = ProbeSamples(trainer, self.samples, "train", self.loader_key, None, asked, at_most=True)
        if self.bits is not None:
            self._refuse_averages(trainer)
            self._samples.check()

    def _refuse_averages(self, trainer: pl.Trainer) -> None:
        names = techniques_that_average(trainer)
        if names:
            raise ValueError(
                f"{self.display_name} rounds the trained weights, and {names[0]} replaces them by averages afterwards. "
                f"{_AFTERWARDS}, without {self.display_name}."
            )

    @override
    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        super().on_train_batch_start(trainer, pl_module, *args)
        for weight in self.weights if self.is_rounded else []:
            weight.forget()  # the run continues from the checkpoint of a shorter one

    # The fit ends.

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        super().on_train_batch_end(trainer, pl_module, *args)
        if self.bits is not None and run_progress(trainer) == 1.0:
            self._round(trainer, pl_module)
            if self.restart_monitors and trainer.enable_validation and is_validation_due(trainer):
                MonitorRestart(event="the weights are rounded").restart(trainer, self.say)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.bits is not None and not self.is_rounded and trainer.global_step > 0:
            self._round(trainer, pl_module)
        earlier = [path for path, time in _files(trainer).items() if self._earlier.get(path) == time]
        if earlier:
            were = "was" if len(earlier) == 1 else "were"
            rank_zero_warn(
                f"{self.display_name}: {listed(earlier)} {were} saved before it rounded, with the weights from before. Save "
                "the rounded ones with trainer.save_checkpoint(path) after the fit."
            )

    @torch.no_grad()
    def _round(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.say(f"rounds {counted(len(self.weights), 'weight')} to {self.bits} bits")
        self._earlier = _files(trainer)
        found: list[RoundedUnit] = []
        kept: dict[str, Tensor] = {}
        place = {"epoch": trainer.current_epoch, "step": trainer.global_step}

        def probe(look: ProbeLook) -> Reading:
            kept.update(self._outliers(look))
            found.extend(self._learn(trainer, pl_module, look, kept))
            return Reading()

        outcome = take_look(trainer, pl_module, self._samples, probe, place)
        if outcome.error is not None:
            outcome.error.add_note(
                f"{self.display_name} raised this when it rounded the weights at the end of the fit."
            )
            raise outcome.error
        self._adopt(trainer, found, kept)

    def _learn(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, look: ProbeLook, kept: Mapping[str, Tensor]
    ) -> list[RoundedUnit]:
        """Return the roundings of all layers and blocks."""
        from tqdm.auto import tqdm  # type: ignore[import-untyped]

        runs = [self._repeatable(part.run) for part in look.parts()]
        weights = [weight.roundable(kept.get(weight.name)) for weight in self.weights]
        units, unused = find_units(pl_module, weights, called_modules(pl_module, runs[0]), self.blocks or ())
        rounding = Reconstruction(units, runs, self.steps, self.strength, seed=self.seed)
        shown = trainer.is_global_zero and trainer.progress_bar_callback is not None
        results = list(tqdm(rounding, self.display_name, len(units), leave=False, disable=not shown))
        rank_zero_info(rounding_table(results, unused))
        return [*results, *map(RoundedUnit.nearest, unused)]

    def _repeatable(self, run: Run) -> Run:
        def again() -> object:
            seed_streams(self.seed)  # noise in the step must not make the outputs differ
            return run()

        return again

    def _outliers(self, look: ProbeLook) -> dict[str, Tensor]:
        """Return where weights keep their values."""
        if not self.outliers or self.bits is None:
            return {}
        advice = f"{self.display_name} needs it for outlier_score={self.outlier_score!r}. Use 'magnitude'."
        losses = (partial(_loss_of, part.run, advice) for part in look.parts())
        needed = losses if self.outlier_score != "magnitude" else ()
        sums = absolute_gradients([weight.parameter for weight in self.weights], needed)
        return {
            weight.name: outlier_mask(weight.before, self.bits, self.outliers, each, self.outlier_score, weight.dim)
            for weight, each in zip(self.weights, sums, strict=True)
        }

    def _adopt(self, trainer: pl.Trainer, found: Sequence[RoundedUnit], kept: Mapping[str, Tensor]) -> None:
        """Store the roundings of rank zero on all ranks, and log what they cost."""
        rounded = {w.name: q for each in found for w, q in zip(each.weights, each.found.rounded, strict=True)}
        for weight in self.weights:
            weight.round(rounded[weight.name], kept.get(weight.name))
            if trainer.world_size > 1:
                weight.load_state_dict(trainer.strategy.broadcast(weight.state_dict()))
        learned = [each for each in found if each.found.nearest_error]
        if learned:
            errors = sum(each.relative_error for each in learned) / len(learned)
            undecided = sum(each.found.undecided for each in learned) / len(learned)
            log_many(trainer, {self.log_key("rounding_error"): errors, self.log_key("undecided"): undecided})

    @override
    def settle(self, trainer: pl.Trainer) -> Sequence[RoundedWeight]:
        self._report = self.report
        if self.bits is not None and not self.is_rounded and trainer.global_step > 0:
            rank_zero_warn(
                f"{self.display_name} rounded nothing, because the run had no batch left to train. {_AFTERWARDS}."
            )
        return self.weights if self.is_rounded else []


def _loss_of(run: Run, advice: str) -> Tensor:
    return trained_loss(run(), advice)


def _files(trainer: pl.Trainer) -> dict[str, int]:
    """Return the checkpoints that callbacks still point to, with the times at which they were written."""
    callbacks: Sequence[Any] = trainer.callbacks  # type: ignore[attr-defined]
    paths = [getattr(each, name, "") for each in callbacks for name in ("best_model_path", "last_model_path")]
    return {path: os.stat(path).st_mtime_ns for path in paths if isinstance(path, str) and os.path.exists(path)}
