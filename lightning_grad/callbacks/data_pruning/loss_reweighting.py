"""Loss reweighting: weights for the samples of a batch, computed by ``functional/data_pruning/loss_reweighting.py``."""

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
from torch import Tensor
from typing_extensions import override

from lightning_grad.callbacks.data_pruning._batch_weighting import ONE_SIZE, BatchWeighting
from lightning_grad.callbacks.data_pruning._works_with import COMPILED, no_weighting
from lightning_grad.core.callback import GradCallback
from lightning_grad.core.compatibility import Compatibility, manual
from lightning_grad.core.fit import during_fit, until_next_fit
from lightning_grad.core.losses.given_functions import LOSS_FN
from lightning_grad.core.losses.sample_losses import SampleLosses
from lightning_grad.core.progress import IN_FIRST_EPOCH, check_total_steps, run_progress, total_steps
from lightning_grad.functional import annealed_temperature, loss_weights
from lightning_grad.utilities.checks import check_above, check_between
from lightning_grad.utilities.reporting import is_log_step

_BY_HAND = "weight the losses in training_step with lightning_grad.functional.loss_weights"
Rule = Literal["linupper", "quadratic", "extremes"]


class LossReweighting(BatchWeighting):
    r"""Weight the samples of each batch by their losses, more sharply as training progresses.

    .. math::
        h_i = 2 \frac{\ell_i - \ell_\min}{\ell_\max - \ell_\min} - 1, \qquad
        w = \operatorname{softmax}(f(h) / r), \qquad
        \text{loss} = \sum_i w_i \ell_i

    Minimum, maximum and softmax are taken over the global batch, the samples of all ranks. f is min(h + 1, 1)
    for "linupper", which reduces the weight of samples with a low loss; 1 - h^2 for "quadratic", which reduces
    it at both ends; abs(h) for "extremes", which reduces it in the middle
    (:func:`~lightning_grad.functional.loss_weights`). The temperature r falls from ``start_temperature`` to
    ``temperature`` over the run, after a ``warmup_fraction`` with equal weights. Samples with more
    positions (tokens, pixels) count for more, as in the mean of the batch.

    Args:
        rule: The function f: "linupper" (best in the paper), "quadratic" or "extremes".
        temperature: r at the end of the run (1 in the released code); .inf in YAML turns weighting off.
        start_temperature: r after the warm-up.
            The released code asks for a schedule from high to low without naming one; 10 is our choice.
        warmup_fraction: Share of the run with equal weights (0.05 in the released code).
        loss_index: Index, from 0, of the only loss call that is weighted. Default: the whole loss.
        loss_fn: Callable (module, batch) -> losses of shape (B,), used instead of the step's loss.
            Its mean must equal the loss of the step, up to a constant. The step still runs, so this costs a
            second forward and backward pass.
        total_steps: Length of the run in optimizer steps. Default: the Trainer's.
        name: Name of this instance.

    Raises:
        ValueError: In the constructor for an unknown rule or a number outside its range. In setup for manual
            optimization, or another technique that weights samples. When training starts, if the run has no
            known end. In the first step if it returns no loss.
        InseparableLossError: In the first step, if its loss is not a sum of one term per sample, or a learned factor
            multiplies it.
        RuntimeError: After the first batch, if adjacent rows of a loss belong to several samples.

    **Hooks.** Losses are read inside ``training_step`` and weighted in its backward pass. The step still
    returns and logs the unweighted loss. With accumulation each batch is weighted separately.

    **Logs** under ``data/``, at log steps: ``temperature``, ``effective_samples`` (1 / sum of squared weights,
    as a share of the global batch), ``loss`` and ``weighted_loss`` (the mean loss of the batch without and with
    weights).

    **State.** How the loss of a sample is read if the loss has several terms. The temperature is computed from
    the progress of the run.

    **Cost.** A loss that is one call of ``torch.nn.functional`` is computed a second time, without reduction.
    For any other loss the step is traced: one to two milliseconds per step. With several ranks the losses are
    gathered in each step. During the warm-up no loss is read.

    Iterable data work too. Batches must not be larger than the loader's batch size.

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
        accumulation=ONE_SIZE,
        ddp=ONE_SIZE,
        compiled=COMPILED,
        **manual(no_weighting(f"Use automatic optimization, or {_BY_HAND}")),
    )
    trial: ClassVar[Mapping[str, Any]] = {"warmup_fraction": 0.0}
    neutral: ClassVar[Mapping[str, Any] | str] = {"temperature": math.inf}
    of_batch: ClassVar[tuple[str, ...]] = ("_now",)
    way_out: ClassVar[str] = f"{_BY_HAND}, or {LOSS_FN}"

    _weights = until_next_fit[tuple[Tensor, Tensor] | None](lambda _: None)  # of the global batch, and their number
    _now = during_fit[float](lambda _: math.inf)

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
            raise ValueError(
                "start_temperature must be finite; got inf. Set temperature=inf to turn the weighting off."
            )
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
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.acts:
            words = f"weights the samples of each batch by their losses (rule={self.rule!r})"
            self.announce(words, "losses", ["training_step"])
        else:
            self.announce("weights no samples (temperature=inf)", "losses")

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Raises if the run has no known end: the temperature would never fall.
        if self.acts and total_steps(trainer, self.display_name, self.total_steps) is None:
            self.say(IN_FIRST_EPOCH)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self.acts:
            progress = run_progress(trainer, stated=self.total_steps)
            self._now = annealed_temperature(progress, self.start_temperature, self.temperature, self.warmup_fraction)

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if self._weights is not None and is_log_step(trainer):
            self.log_scalars(pl_module, {"temperature": self._now, "effective_samples": self._effective})
        super().on_train_batch_end(trainer, pl_module, *args)

    @override
    def weigh(self, losses: SampleLosses) -> Tensor | None:
        everyone = self.of_all_ranks(losses.losses)
        weights = loss_weights(everyone.flatten(), self.rule, self._now).reshape(everyone.shape)
        counted = everyone.isfinite().sum()
        self._weights = weights, counted
        # The step and DDP average, so scale the weights by n: equal weights of 1 / n must change nothing.
        return weights[self._trainer.global_rank, : len(losses.losses)] * counted

    @property
    def _effective(self) -> Tensor:
        """Effective share of the samples: 1 if their weights are equal. Computed only for the logs."""
        assert self._weights is not None
        weights, counted = self._weights
        return 1.0 / (weights.square().sum() * counted)
