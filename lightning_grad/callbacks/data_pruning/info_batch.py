"""InfoBatch: unbiased dynamic data pruning. Subset and weights come from ``functional/data_pruning/info_batch.py``."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor
from typing_extensions import override

from lightning_grad.callbacks.data_pruning._recorded_subset import RecordedSubset
from lightning_grad.callbacks.data_pruning._works_with import COMPILED, no_weighting
from lightning_grad.core.compatibility import Compatibility, manual
from lightning_grad.core.fit import during_fit
from lightning_grad.core.losses.given_functions import LOSS_FN
from lightning_grad.core.losses.sample_losses import SampleLosses
from lightning_grad.core.progress import check_total_steps
from lightning_grad.core.subset import SubsetCallback
from lightning_grad.functional import Terms, infobatch_subset
from lightning_grad.functional.data_pruning.info_batch import infobatch_count
from lightning_grad.functional.data_pruning.selection import round_up_count
from lightning_grad.utilities.checks import check_between, check_count, check_share

_NEXT_SEED = 1_000_003  # larger than the number of epochs of any run, so that seeds of two runs never coincide


class InfoBatch(RecordedSubset):
    r"""Drop a random part of the low-loss samples in each epoch, and give the rest of them more weight.

    .. math::
        L = \{i : \ell_i < \bar\ell\}, \qquad
        w_i = \begin{cases} n_L / m_L \approx 1 / (1 - r) & i \in L \\ 1 & \text{else} \end{cases}, \qquad
        \text{loss} = \frac 1 B \sum_{i=1}^B w_i \ell_i

    :math:`\ell_i` is the loss of sample i when it was last trained on. r n_L of the n_L samples in L are
    dropped and m_L are kept (:func:`~lightning_grad.functional.infobatch_subset`). The expected sum of the
    weighted gradients of an epoch equals the sum over the whole set, in fewer steps: on average, the gradient of
    each step is larger by the ratio of all samples to those kept. The last epochs train on all samples.

    Args:
        prune: Share r of the low-loss samples to drop, at least 0 and below 1 (0.5 in the paper).
        prune_until: Share of the run after which it trains on all samples (0.875 in the paper).
        loss_index: Index, from 0, of the only loss call that counts. Default: the whole loss.
        loss_fn: Callable (module, batch) -> losses of shape (B,), used instead of the step's loss.
            Its mean must equal the loss of the step, up to a constant. The step still runs, so this costs a
            second forward and backward pass.
        seed: Seed of the random subsets.
        loader_key: Key or list position of the training loader to prune, if there are several.
        total_steps: Length of the run in optimizer steps. Default: the Trainer's.
        name: Name of this instance.

    Raises:
        ValueError: In the constructor for a share outside its range. In setup for manual optimization, or
            another technique that chooses or weights samples. In the first step if it returns no loss.
        InseparableLossError: In the first step, if its loss is not a sum of one term per sample, or a learned factor
            multiplies it.
        RuntimeError: After the first batch, if rows do not follow their samples when these are reordered.
        TypeError: If the training data has no indices (iterable data, ``in_order=False``, other keys of a sampler).

    **Hooks.** The same as :class:`DataPruning`. Losses are read inside ``training_step`` and weighted in its
    backward pass. The step still returns and logs the unweighted loss.

    **Logs** under ``data/``, at each epoch: ``kept_share``, ``samples_seen``; in the summary ``samples_share``.
    At log steps of a weighted epoch ``loss`` and ``weighted_loss``, the mean loss of the batch without and with
    weights.

    **State.** The last losses, the samples of the epoch and their weights; resuming is bit-exact. With several
    ranks, only the first saves the losses of an unfinished epoch.

    **Cost.** A loss that is one call of ``torch.nn.functional`` is computed a second time, without reduction.
    For any other loss the step is traced: one to two milliseconds per step.

    Example:
        .. code-block:: yaml

            trainer:
              callbacks:
                - class_path: lightning_grad.callbacks.InfoBatch
                  init_args:
                    prune: 0.5

    References:
        Qin et al., "InfoBatch: Lossless Training Speed Up by Unbiased Dynamic Data Pruning", 2024, arXiv 2303.04947. Its
        code drops a fixed number of samples but weights by the probability r; here the weight fits that number.
    """

    compatibility: ClassVar[Compatibility] = SubsetCallback.compatibility.but(
        compiled=COMPILED, **manual(no_weighting("Use RepeatedRandomSubset, which needs no loss"))
    )
    trial: ClassVar[Mapping[str, Any]] = {"prune": 0.5}
    neutral: ClassVar[Mapping[str, Any] | str] = {"prune": 0.0}
    way_out: ClassVar[str] = f"use RepeatedRandomSubset, which needs no loss, or {LOSS_FN}"

    _first = during_fit[tuple[list[int], Terms] | None](lambda _: None)

    def __init__(
        self,
        prune: float = 0.5,
        prune_until: float = 0.875,
        loss_index: int | None = None,
        loss_fn: Callable[[pl.LightningModule, Any], Any] | None = None,
        seed: int = 0,
        loader_key: str | int | None = None,
        total_steps: int | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(loader_key, name)
        self.prune = check_share(prune, "prune")
        self.acts = prune > 0.0
        self.prune_until = check_between(prune_until, 0.0, 1.0, "prune_until")
        self.choose_loss(loss_index, loss_fn)
        self.seed = check_count(seed, 0, "seed")
        self.total_steps = check_total_steps(total_steps)

    @property
    @override
    def plan(self) -> str:
        if self.prune == 0.0:
            return "trains on all samples (prune=0)"
        return (
            f"drops {100 * self.prune:g} % of the low-loss samples in each epoch but the first, until "
            f"{100 * self.prune_until:g} % of the run"
        )

    @override
    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore({"values": state.get("losses"), **state})  # their name in checkpoints of version 0.2

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        ends = (trainer.max_epochs or -1, trainer.max_steps, self.total_steps or -1)
        if self.prune > 0.0 and self.prune_until < 1.0 and max(ends) == -1:
            self.say("prunes until the end of the run, whose length is unknown. Set total_steps=... to stop earlier")

    @override
    def rehearse(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().rehearse(trainer, pl_module)
        if self._first is not None:
            (indices, terms), self._first = self._first, None
            losses = SampleLosses.of_terms(terms, self._sample_loss).losses
            self._record.put(indices, losses, self.training_set.sampler.total)

    @override
    def choose(self, trainer: pl.Trainer, values: Tensor) -> tuple[Tensor, Tensor] | None:
        if any(done >= self.prune_until * end for done, end in self.ends(trainer)):
            return None
        sampler = self.training_set.sampler
        if len(values) == 1:
            self.warn_of_too_few(1, 1)
        wanted = infobatch_count(values, self.prune)
        count = round_up_count(wanted, len(values), sampler.batch_size, sampler.ranks, sampler.drop_last)
        generator = torch.Generator().manual_seed(self.seed * _NEXT_SEED + trainer.current_epoch)
        kept, weights = infobatch_subset(values, self.prune, generator, extra=count - wanted)
        return kept, torch.ones(len(values)).index_put((kept,), weights)

    @override
    def values_of(self, losses: SampleLosses) -> Tensor:
        if losses.terms is not None and self._sample_loss is None:
            self._first = self.indices, losses.terms
        return losses.losses
