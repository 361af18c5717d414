"""Curriculum weighting: weights that begin with the easy samples, by ``functional/data_pruning/curriculum_weighting.py``."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor
from typing_extensions import override

from lightning_grad.callbacks.data_pruning._batch_weighting import ONE_SIZE, BatchWeighting
from lightning_grad.callbacks.data_pruning._scored_samples import ScoredSamples
from lightning_grad.callbacks.data_pruning._works_with import COMPILED, no_weighting
from lightning_grad.core.callback import GradCallback
from lightning_grad.core.compatibility import Compatibility, manual
from lightning_grad.core.fit import during_fit
from lightning_grad.core.losses.given_functions import LOSS_FN
from lightning_grad.core.losses.rehearsal import Rehearsal
from lightning_grad.core.losses.sample_losses import SampleLosses
from lightning_grad.core.quiet import aside
from lightning_grad.functional import curriculum_weights, easiness
from lightning_grad.utilities.batch_copies import copy_of
from lightning_grad.utilities.checks import check_finite_at_least, check_only_one
from lightning_grad.utilities.parameters import as_names
from lightning_grad.utilities.reporting import is_log_step

_TINY = 1e-12
_BY_HAND = "weight the losses in training_step with lightning_grad.functional.curriculum_weights"


class CurriculumWeighting(BatchWeighting):
    r"""Give hard samples less weight in the first epochs, and all samples the same weight afterwards.

    .. math::
        w_i = \begin{cases} D_i + \frac e m (1 - D_i) & e < m \\ 1 & \text{else} \end{cases}

    e is the number of epochs that are done, m is ``epochs``, and D is 1 for the easiest samples and 0 for the hardest. By
    default D is the share of the other samples in the global batch whose current loss is higher. With ``score_files``
    it is the share of the data set whose score is higher; with ``easiness_fn`` a function returns it. From epoch m on,
    steps are bitwise those of a run without the callback.

    Args:
        epochs: m, the epoch from which all weights are 1, at least 0 (1 to 20 in the paper).
            0 turns it off.
        score_files: Score files that say how hard each sample is; several are averaged.
            DataPruning writes them; higher = harder. Samples without a score have D = 1.
        strict: Whether score files of another data set raise an error.
        easiness_fn: Callable (module, batch) -> D of shape (B,), from 0 (hard) to 1 (easy).
            Called before each step, without gradients.
        normalize: Whether to divide the weights by their mean over the global batch.
            The learning rate then stays the same; without it (as in the paper) the gradient is smaller in the
            first epochs, which matters with SGD, not with Adam.
        loss_index: Index, from 0, of the only loss call that is weighted. Default: the whole loss.
        loss_fn: Callable (module, batch) -> losses of shape (B,), used instead of the step's loss.
            Its mean must equal the loss of the step, up to a constant. The step still runs, so this costs a
            second forward and backward pass.
        loader_key: Key or list position of the training loader that score files belong to, if there are several.
        name: Name of this instance.

    Raises:
        FileNotFoundError: In the constructor if a score file is missing.
        ValueError: In the constructor for a number outside its range, for both score files and a function, or score
            files that do not match each other. In setup for manual optimization, or another technique that weights
            samples or adds to the loss. When the data is loaded, for score files of another data set. In the first step
            if it returns no loss, or ``easiness_fn`` does not return (B,) numbers from 0 to 1.
        InseparableLossError: In the first step, if its loss is not a sum of one term per sample, or a learned factor
            multiplies it.
        RuntimeError: After the first batch, if rows of a loss cannot be assigned to samples.
        TypeError: With score files, if the training data has no indices (iterable data, ``in_order=False``).

    **Hooks.** Losses are read inside ``training_step`` and weighted in its backward pass. The step still returns and
    logs the unweighted loss. With accumulation each batch is weighted separately.

    **Logs** under ``data/``, at log steps of a weighted epoch: ``curriculum`` (e / m), ``mean_weight`` (of the batch,
    before ``normalize``), ``loss`` and ``weighted_loss`` (the mean loss of the batch without and with weights).

    **State.** How the loss of a sample is read if the loss has several terms. Weights are computed from the epoch.

    **Cost.** In weighted epochs, a loss that is one call of ``torch.nn.functional`` is computed a second time, without
    reduction; for any other loss the step is traced: one to two milliseconds per step. With several ranks, the losses
    are gathered in each step, or with ``normalize`` the weights. Later epochs cost nothing.

    Example:
        .. code-block:: yaml

            trainer:
              callbacks:
                - class_path: lightning_grad.callbacks.CurriculumWeighting
                  init_args:
                    epochs: 3

    References:
        MacAvaney, Nardini, Perego, Tonellotto, Goharian and Frieder, "Training Curricula for Open Domain Answer
        Re-Ranking", SIGIR 2020, arXiv 2004.14269. Their difficulty comes from the ranks of a retrieval model; the loss of
        the network itself, as in self-paced learning, is our default, because every project has it.
    """

    namespace: ClassVar[str] = "data"
    compatibility: ClassVar[Compatibility] = GradCallback.compatibility.but(
        accumulation=ONE_SIZE,
        ddp=ONE_SIZE,
        compiled=COMPILED,
        **manual(no_weighting(f"Use automatic optimization, or {_BY_HAND}")),
    )
    trial: ClassVar[Mapping[str, Any]] = {"epochs": 2.0}
    neutral: ClassVar[Mapping[str, Any] | str] = {"epochs": 0.0}
    of_batch: ClassVar[tuple[str, ...]] = ("_given", "_drawn")
    way_out: ClassVar[str] = f"{_BY_HAND}, or {LOSS_FN}"

    _scored = during_fit[ScoredSamples | None](lambda _: None)
    _given = during_fit[Tensor | None](lambda _: None)  # D of the batch, if it does not come from the losses
    _drawn = during_fit.of(list[int])
    _mean = during_fit[Tensor | None](lambda _: None)
    _has_checked = during_fit[bool](lambda _: False)

    def __init__(
        self,
        epochs: float = 5.0,
        score_files: Sequence[str] | None = None,
        strict: bool = True,
        easiness_fn: Callable[[pl.LightningModule, Any], Any] | None = None,
        normalize: bool = False,
        loss_index: int | None = None,
        loss_fn: Callable[[pl.LightningModule, Any], Any] | None = None,
        loader_key: str | int | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        self.epochs = check_finite_at_least(epochs, 0.0, "epochs")
        self.acts = epochs > 0.0
        self.score_files, self.easiness_fn = as_names(score_files), easiness_fn
        check_only_one({"score_files": self.score_files, "easiness_fn": easiness_fn}, "say how hard a sample is")
        if self.score_files is not None:
            ScoredSamples.check(self.score_files, self.display_name)
        self.strict = strict
        self.normalize = normalize
        self.choose_loss(loss_index, loss_fn)
        self.loader_key = loader_key

    @property
    def _epoch(self) -> int:
        return int(self._trainer.current_epoch)

    @override
    def needs_losses(self) -> bool:
        return self._epoch < self.epochs

    @override
    def samples_of(self, batch: Any) -> int | None:
        if self._scored is None:
            return super().samples_of(batch)
        return len(self._scored.of_batch(self._drawn))

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self.fitting and self.acts and self.score_files is not None:
            self._scored = ScoredSamples(trainer, self)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.acts:
            words = f"gives hard samples less weight until epoch {self.epochs:g}"
            self.announce(words, "losses", ["training_step"])
        else:
            self.announce("weights no samples (epochs=0)", "losses")
        if self._scored is not None:
            self._scored.begin()

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._scored is not None:
            self._scored.resume()

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._scored is not None:
            self._scored.begin_epoch()

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._given = None
        if self._scored is not None:
            self._drawn = self._scored.draw(batch_idx)
        if self.easiness_fn is not None and self.needs_losses():
            with aside(pl_module), torch.no_grad():
                self._given = self._checked(self.easiness_fn(pl_module, copy_of(batch)), super().samples_of(batch))

    @override
    def weigh(self, losses: SampleLosses) -> Tensor | None:
        known = losses.losses.detach()
        if self._scored is not None:
            self._given = self._scored.easiness(self._scored.of_batch(self._drawn), known.device)
        if self._given is None:
            everyone = self.of_all_ranks(known)
            easy = easiness(everyone.flatten()).reshape(everyone.shape)[self._trainer.global_rank, : len(known)]
        else:
            easy = self._given.to(known)
        weights = curriculum_weights(easy, self._epoch, self.epochs).masked_fill(known.isnan(), torch.nan)
        self._mean = weights.nanmean()
        if not self.normalize:
            return weights
        return weights / self.of_all_ranks(weights).nanmean().clamp(min=_TINY)  # all weights may be 0

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if self._weighted is not None and self._mean is not None and is_log_step(trainer):
            share = min(self._epoch / self.epochs, 1.0)
            self.log_scalars(pl_module, {"curriculum": share, "mean_weight": self._mean})
        super().on_train_batch_end(trainer, pl_module, *args)

    @override
    def _rehearse(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> bool:
        if self._scored is None:
            return super()._rehearse(trainer, pl_module, batch)
        rehearsal = Rehearsal(trainer, pl_module, self.asked, self._scored.training_set, by_terms=True)
        rehearsal.check_loader(in_training=self.loss_fn is None)
        self.learn_sample_loss(rehearsal)
        return True

    def _checked(self, found: Any, samples: int | None) -> Tensor:
        """Return D from the function. Its range is checked once, because that syncs with the device."""
        got = type(found).__name__
        if isinstance(found, Tensor):
            got = f"{found.dtype} of shape {tuple(found.shape)}"
            if found.is_floating_point() and found.shape == (samples or found.numel(),):
                is_known, self._has_checked = self._has_checked, True
                if is_known or bool(((found >= 0.0) & (found <= 1.0)).all()):
                    return found.clamp(0.0, 1.0)
                got = f"numbers from {float(found.min()):.3g} to {float(found.max()):.3g}"
        raise ValueError(
            f"easiness_fn of {self.display_name} must return a floating-point tensor ({samples or 'B'},) with a number "
            f"from 0 (hard) to 1 (easy) for each sample; got {got}."
        )
