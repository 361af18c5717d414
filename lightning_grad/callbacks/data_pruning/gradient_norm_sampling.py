"""Importance sampling by gradient norms: the rules are in ``functional/data_pruning/gradient_norm_sampling.py``."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import WeightedRandomSampler
from typing_extensions import override

from lightning_grad.callbacks.data_pruning._recorded_subset import RecordedSubset
from lightning_grad.callbacks.data_pruning._works_with import COMPILED, no_weighting
from lightning_grad.core.compatibility import Compatibility, manual
from lightning_grad.core.fit import until_next_fit
from lightning_grad.core.losses.given_functions import LOSS_FN
from lightning_grad.core.losses.sample_losses import SampleLosses
from lightning_grad.core.progress import check_total_steps, total_steps
from lightning_grad.core.subset import SubsetCallback
from lightning_grad.functional.data_pruning import gradient_norm_sampling as rules
from lightning_grad.functional.shuffling import hashed_seed
from lightning_grad.utilities.checks import check_between, check_count


class GradientNormSampling(RecordedSubset):
    r"""Draw samples with large gradients more often, with weights that keep the expected gradient unchanged.

    .. math::
        p_i = \delta \frac{\nu_i}{\sum_j \nu_j} + \frac{1 - \delta}{n}, \qquad
        \text{loss} = \frac 1 B \sum_{b=1}^B \frac{\ell_{i_b}}{n\,p_{i_b}}, \qquad i_b \sim p

    :math:`\nu_i` bounds the gradient norm of sample i, up to a common factor. It comes from the batch that had the
    sample last, so no extra pass is needed:

    - If the loss is one call of ``torch.nn.functional``: the norm of its gradient by the output of the network, which is
      the norm of p - y for a classifier (:func:`~lightning_grad.functional.output_gradient_norms`).
    - For any other loss: the square root of the sample's loss, which bounds the gradient of a smooth loss.

    :math:`\delta` grows linearly with the epochs, from 0 to ``smooth``. The first epoch measures the norms and is bitwise
    that of a run without the callback. Each later epoch draws n samples with replacement, as many as the data set has, so
    about a third or more of the samples are missing in an epoch, and others come several times.

    Args:
        smooth: :math:`\delta` at the end of the run, from 0 (off) to 1.
            Weights are at most 1 / (1 - smooth). The released code goes up to 1, but applies no weights; 0.9 limits
            them to 10.
        loss_index: Index, from 0, of the only loss call that counts. Default: the whole loss.
        loss_fn: Callable (module, batch) -> losses of shape (B,), used instead of the step's loss.
            Its mean must equal the loss of the step, up to a constant. The step still runs, so this costs a
            second forward and backward pass.
        seed: Seed of the draws.
        loader_key: Key or list position of the training loader to sample from, if there are several.
        total_steps: Length of the run in optimizer steps. Default: the Trainer's.
        name: Name of this instance.

    Raises:
        ValueError: In the constructor for a number outside its range. In setup for manual optimization, or another
            technique that chooses or weights samples. When training starts, if the run has no known end. In the first
            step if it returns no loss.
        InseparableLossError: In the first step, if its loss is not a sum of one term per sample, or a learned factor
            multiplies it.
        RuntimeError: After the first batch, if rows do not follow their samples when these are reordered.
        TypeError: If the training data has no indices (iterable data, ``in_order=False``, other keys of a sampler), or
            its sampler draws samples in a way of its own (``WeightedRandomSampler``, an unknown one).

    **Hooks.** The same as :class:`InfoBatch`: losses are read inside ``training_step`` and weighted in its backward pass.
    The step still returns and logs the unweighted loss, which is the loss of the drawn samples.

    **Logs** under ``data/``, at each epoch: ``kept_share`` (1), ``samples_seen``; from the second epoch on ``smooth``
    (:math:`\delta`), ``distinct_share`` (share of the samples that the epoch contains) and ``variance_ratio`` (expected
    squared gradient norm of a weighted draw relative to a uniform one, by the norms). At log steps ``mean_weight`` (of the
    batch; 1 on average), ``loss`` and ``weighted_loss`` (the mean loss of the batch without and with weights). In the
    summary ``samples_share``.

    **State.** The norms, the drawn samples of the epoch and their weights; resuming is bit-exact. With several ranks,
    only the first saves the norms of an unfinished epoch.

    **Cost.** A loss that is one call of ``torch.nn.functional`` is computed a second time, without reduction, and its
    gradient by the output of the network. For any other loss the step is traced: one to two milliseconds per step.

    Example:
        .. code-block:: yaml

            trainer:
              callbacks:
                - class_path: lightning_grad.callbacks.GradientNormSampling
                  init_args:
                    smooth: 0.9

    References:
        Lu et al., "PA&DA: Jointly Sampling PAth and DAta for Consistent NAS", CVPR 2023, arXiv 2302.14772; this is its
        sampling of data. Its code draws for the next epoch with the norms of the last one, where samples that were not
        drawn have norm 0; here they keep their last norm.
    """

    compatibility: ClassVar[Compatibility] = SubsetCallback.compatibility.but(
        compiled=COMPILED, **manual(no_weighting("Use RepeatedRandomSubset, which needs no loss"))
    )
    trial: ClassVar[Mapping[str, Any]] = {"smooth": 0.9}
    neutral: ClassVar[Mapping[str, Any] | str] = {"smooth": 0.0}
    changes_shares: ClassVar[bool] = True
    way_out: ClassVar[str] = f"use RepeatedRandomSubset, which needs no loss, or {LOSS_FN}"

    recorded: ClassVar[str] = "norms"

    _are_losses = until_next_fit.of(bool).saved()  # whether losses are recorded, because the loss is not one call

    def __init__(
        self,
        smooth: float = 0.9,
        loss_index: int | None = None,
        loss_fn: Callable[[pl.LightningModule, Any], Any] | None = None,
        seed: int = 0,
        loader_key: str | int | None = None,
        total_steps: int | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(loader_key, name)
        self.smooth = check_between(smooth, 0.0, 1.0, "smooth")
        self.acts = smooth > 0.0
        self.choose_loss(loss_index, loss_fn)
        self.seed = check_count(seed, 0, "seed")
        self.total_steps = check_total_steps(total_steps)

    @property
    @override
    def plan(self) -> str:
        if not self.acts:
            return "trains on all samples (smooth=0)"
        return "draws the samples of each epoch but the first by their gradient norms, with replacement"

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.acts:
            self._refuse_other_draws()
            total_steps(trainer, self.display_name, self.total_steps)  # raises if the run has no known end
            if trainer.max_epochs == 1:
                self.say("has no effect in a run of one epoch, which only measures the norms. Train for more epochs")
        super().on_train_start(trainer, pl_module)

    def _refuse_other_draws(self) -> None:
        sampler = self.training_set.sampler
        if not sampler.shares_are_known or type(sampler.sampler) is WeightedRandomSampler:
            raise TypeError(
                f"{self.display_name} draws the samples of an epoch itself, but the training loader draws them with "
                f"{type(sampler.sampler or sampler.original).__name__}, and their gradient would no longer be unbiased. "
                "Use shuffle=True or False, a SubsetRandomSampler or a DistributedSampler."
            )

    @override
    def is_known(self, values: Tensor) -> Tensor:
        return values.isfinite()

    @override
    def choose(self, trainer: pl.Trainer, values: Tensor) -> tuple[Tensor, Tensor]:
        norms = rules.loss_gradient_bounds(values) if self._are_losses else values
        smooth = self.smooth * min(1.0, max(done / end for done, end in self.ends(trainer)))
        probabilities = rules.sampling_probabilities(norms, smooth)
        generator = torch.Generator().manual_seed(hashed_seed(self.seed, f"draws of epoch {trainer.current_epoch}"))
        drawn = rules.draw_samples(probabilities, len(values), generator)
        found = {
            "smooth": smooth,
            "distinct_share": len({*drawn.tolist()}) / len(values),
            "variance_ratio": rules.variance_ratio(norms, probabilities),
        }
        self.log_scalars(self._module, found, sync_dist=True)
        return drawn, rules.sampling_weights(probabilities)

    @override
    def values_of(self, losses: SampleLosses) -> Tensor:
        are_losses = losses.call is None
        if are_losses != self._are_losses:  # norms and losses cannot be compared
            self._are_losses, self._values, self._record.values = are_losses, None, None
        if losses.call is not None:
            return rules.output_gradient_norms(losses.call)
        return (losses.losses if losses.terms is None else losses.terms.shares).detach()
