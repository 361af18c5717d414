"""Weighing the samples of a batch by their losses. The weights are a function, in ``functional/data_pruning``."""

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_grad.callbacks.data_pruning._weighting import LossWeighting
from lightning_grad.callbacks.data_pruning._works_with import COMPILED, no_weighting
from lightning_grad.core.callback import GradCallback
from lightning_grad.core.compatibility import Compatibility, manual, yes
from lightning_grad.core.fit import during_fit, until_next_fit
from lightning_grad.core.losses.batch_sizes import batch_size_of, size_by_sampler
from lightning_grad.core.losses.given_functions import LOSS_FN
from lightning_grad.core.losses.rehearsal import Rehearsal
from lightning_grad.core.losses.sample_losses import SampleLosses
from lightning_grad.core.progress import IN_FIRST_EPOCH, check_total_steps, run_progress, total_steps
from lightning_grad.core.ranks import sum_over_ranks
from lightning_grad.functional import annealed_temperature, loss_weights
from lightning_grad.utilities.batch_copies import copy_of
from lightning_grad.utilities.checks import check_above, check_between, is_sharded
from lightning_grad.utilities.reporting import is_log_step

_BY_HAND = "weight the losses in training_step, by lightning_grad.functional.loss_weights"
_ONE_SIZE = yes("Each batch is weighted by itself. Ranks need batches of one size, as Lightning's sampler makes them.")
_REHEARSALS = 4  # batches, until one has a loss

Rule = Literal["linupper", "quadratic", "extremes"]


class LossReweighting(LossWeighting):
    r"""Weight the samples of each batch by their losses, more sharply as training goes on.

    .. math::
        h_i = 2 \frac{\ell_i - \ell_\min}{\ell_\max - \ell_\min} - 1, \qquad
        w = \operatorname{softmax}(f(h) / r), \qquad
        \text{loss} = \sum_i w_i \ell_i

    Minimum, maximum and softmax go over the global batch, the samples of all ranks. f is min(h + 1, 1) for "linupper", which
    takes weight from samples of low loss; 1 - h^2 for "quadratic", from both ends; abs(h) for "extremes", from the middle
    (:func:`~lightning_grad.functional.loss_weights`). The temperature r falls from ``start_temperature`` to ``temperature``
    over the run; in the first ``warmup_fraction`` of it all samples weigh the same. A sample with several positions
    (tokens, pixels) also counts by their number, as in the mean of the batch.

    Args:
        rule: f, "linupper" (best in the paper), "quadratic" or "extremes".
        temperature: r at the end of the run (1 in the released code); .inf in YAML turns the weighting off.
        start_temperature: r after the warm-up. The released code asks for a schedule from high to low and does not
            say which; 10 is ours.
        warmup_fraction: Share of the run in which all samples weigh the same (0.05 in the released code).
        loss_index: Index, from 0, of the only loss call that is weighted; by default all that the step returns.
        loss_fn: Function of the module and a batch that returns the losses (B,), in place of the step's own loss. The step
            runs as it is; its mean must be the step's loss, up to a constant. It costs a second forward and backward pass.
        total_steps: Length of the run in optimizer steps, where it has no known end. Default: the Trainer's.
        name: Name of this instance.

    Raises:
        ValueError: In the constructor for an unknown rule or a number outside its range. In setup for manual optimization, or
            another technique that weighs samples. When training starts, if the run has no known end. In the first step if
            it returns no loss.
        InseparableLossError: In the first step, if its loss is no sum of one term for each sample, or a learned factor
            multiplies it.
        RuntimeError: After the first batch, if rows of a loss that stand together belong to several samples.

    **Hooks.** Losses are read inside ``training_step``, and weighted in its backward pass. What the step returns and logs as
    its loss is the plain loss. With accumulation each batch is weighted by itself.

    **Logs** under ``data/``, at log steps: ``temperature``, ``effective_samples`` (1 / sum of squared weights, as a share of
    the global batch), ``loss`` and ``weighted_loss`` (the mean loss of the batch without and with weights).

    **State.** What the loss of a sample is, where it comes from several terms. The temperature follows the run.

    **Cost.** One call of a loss of ``torch.nn.functional`` is computed a second time, without reduction. Of another loss the
    step is traced: one to two milliseconds a step. With several ranks losses are gathered. In the warm-up nothing is read.

    Batches may be as large as the loader's batch size; iterable data work too.

    Example:
        .. code-block:: yaml

            trainer:
              callbacks:
                - class_path: lightning_grad.callbacks.LossReweighting
                  init_args:
                    rule: linupper

    References:
        Sow et al., "Dynamic Loss-Based Sample Reweighting for Improved Large Language Model Pretraining", 2025,
        arXiv 2502.06733.
    """

    namespace: ClassVar[str] = "data"
    compatibility: ClassVar[Compatibility] = GradCallback.compatibility.but(
        accumulation=_ONE_SIZE,
        ddp=_ONE_SIZE,
        compiled=COMPILED,
        **manual(no_weighting(f"Use automatic optimization, or {_BY_HAND}")),
    )
    trial: ClassVar[Mapping[str, Any]] = {"warmup_fraction": 0.0}
    neutral: ClassVar[Mapping[str, Any] | str] = {"temperature": math.inf}
    way_out: ClassVar[str] = f"{_BY_HAND}, or {LOSS_FN}"

    _trainer = during_fit[pl.Trainer]()
    _effective = until_next_fit[Tensor | None](lambda _: None)
    _first = during_fit[Any](lambda _: None)
    _rehearsals_left = during_fit[int](lambda _: _REHEARSALS)
    _now = during_fit[float](lambda _: math.inf)
    _batch_idx = during_fit.of(int)
    _samples = during_fit[int | None](lambda _: None)  # of the batch

    def __init__(
        self,
        rule: Rule = "linupper",
        temperature: float = 1.0,
        start_temperature: float = 10.0,
        warmup_fraction: float = 0.05,
        loss_index: int | None = None,
        loss_fn: Callable[[pl.LightningModule, Any], Any] | None = None,
        total_steps: int | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        if math.isinf(start_temperature):
            raise ValueError("start_temperature must be finite; temperature=inf turns the weighting off.")
        self.rule = rule
        self.temperature = check_above(temperature, 0.0, "temperature")
        self.acts = math.isfinite(temperature)
        self.start_temperature = check_above(start_temperature, 0.0, "start_temperature")
        self.warmup_fraction = check_between(warmup_fraction, 0.0, 1.0, "warmup_fraction")
        self.choose_loss(loss_index, loss_fn)
        self.total_steps = check_total_steps(total_steps)

    @override
    def needs_losses(self) -> bool:
        return math.isfinite(self._now)

    @override
    def samples_of(self, batch: Any) -> int | None:
        self._samples = batch_size_of(batch, lambda: size_by_sampler(self._trainer, self._batch_idx))
        return self._samples

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self.fitting:
            self._trainer = trainer

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.acts:
            words = f"weights the samples of each batch by their losses (rule={self.rule!r})"
            self.announce(words, "losses", ["training_step"])
        else:
            self.announce("weights no samples (temperature=inf)", "losses")

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Without a known end, which raises, the temperature would never fall.
        if self.acts and total_steps(trainer, self.display_name, self.total_steps) is None:
            self.say(IN_FIRST_EPOCH)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._batch_idx, self._samples = batch_idx, None
        if self.acts:
            progress = run_progress(trainer, stated=self.total_steps)
            self._now = annealed_temperature(progress, self.start_temperature, self.temperature, self.warmup_fraction)
            if self._rehearsals_left:
                self._first = copy_of(batch)  # the step may change it

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if self._first is not None:
            first, self._first = self._first, None
            is_done = self._rehearse(trainer, pl_module, first)
            self._rehearsals_left = 0 if is_done else self._rehearsals_left - 1
        if self._effective is not None and is_log_step(trainer):
            self.log_scalars(pl_module, {"temperature": self._now, "effective_samples": self._effective})
        super().on_train_batch_end(trainer, pl_module, *args)

    def _rehearse(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> bool:
        rehearsal = Rehearsal(trainer, pl_module, self.asked, by_terms=True)
        # Who chooses the samples may have forgotten those of this batch since the step.
        samples = self._samples or self.samples_of(batch)
        if is_sharded(trainer) and self.loss_fn is None:  # else the first step was looked at
            rehearsal.check_whole_loss(batch, samples)
        if samples is None:
            return True  # each row of the loss is a sample
        if samples * trainer.world_size == 1:
            rank_zero_warn(
                f"{self.display_name} weights the samples of a batch against each other, and a batch has one: every "
                "weight is 1. Use larger batches."
            )
        is_done = rehearsal.check_batch(batch, samples)
        if is_done:
            self.learn_sample_loss(rehearsal)
        return is_done

    @override
    def weigh(self, losses: SampleLosses) -> Tensor | None:
        everyone = self._of_all_ranks(losses.losses)
        weights = loss_weights(everyone.flatten(), self.rule, self._now).reshape(everyone.shape)
        counted = everyone.isfinite().sum()
        self._effective = 1.0 / (weights.square().sum() * counted)
        # The step takes a mean, and so do the ranks: equal weights of 1 / n must leave both as they are.
        return weights[self._trainer.global_rank, : len(losses.losses)] * counted

    def _of_all_ranks(self, losses: Tensor) -> Tensor:
        """Return the losses of the global batch, (ranks, B), nan where a rank has fewer."""
        if self._trainer.world_size == 1:
            return losses.unsqueeze(0)
        # The last batch may be smaller on one rank, and a reduction wants equal shapes, without asking the others for theirs.
        size = max(len(losses), _batch_size(self._trainer))
        everyone = losses.new_zeros(self._trainer.world_size, size)
        own = everyone[self._trainer.global_rank]
        own[: len(losses)] = losses
        own[len(losses) :] = math.nan
        return sum_over_ranks(self._trainer, everyone)


def _batch_size(trainer: pl.Trainer) -> int:
    """Return the batch size of the training loader, 0 if there are several or it has none."""
    loader = trainer.train_dataloader
    owners = (loader, getattr(loader, "batch_sampler", None), getattr(loader, "sampler", None))
    return next((size for owner in owners if isinstance(size := getattr(owner, "batch_size", None), int)), 0)
