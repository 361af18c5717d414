"""USEFUL: repeat samples with late-learned features; ``functional/data_pruning/uniform_learning.py`` finds them."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from typing_extensions import override

from lightning_grad.callbacks.data_pruning._works_with import COMPILED, CURRENT_WEIGHTS
from lightning_grad.core.compatibility import YES, Compatibility, manual, no
from lightning_grad.core.fit import until_next_fit
from lightning_grad.core.losses.given_functions import OUTPUTS_FN, LossRequest
from lightning_grad.core.losses.look import Look
from lightning_grad.core.losses.rehearsal import Rehearsal
from lightning_grad.core.losses.scoring import look_at_all, say_what_is_skipped
from lightning_grad.core.subset import SubsetCallback
from lightning_grad.functional import uniform_learning_repeats
from lightning_grad.functional.data_pruning.selection import round_up_count
from lightning_grad.utilities.checks import check_count, check_only_one

_WAY_OUT = f"use DataPruning with score_fn=, or RepeatedRandomSubset, which needs no loss, or {OUTPUTS_FN}"


class UniformLearning(SubsetCallback):
    r"""Repeat samples whose features are learned late (USEFUL).

    After ``epoch`` whole epochs, k-means splits the outputs of each class into two clusters. The samples in the
    cluster with the higher mean loss are learned late. From then on they occur ``1 + repeats`` times per epoch:

    .. math::
        R = \bigcup_y \operatorname*{arg\,max}_{C \in \{C_{y1}, C_{y2}\}} \frac 1 {|C|} \sum_{i \in C} \ell_i

    R is the set of repeated samples, :math:`C_{y1}` and :math:`C_{y2}` are the clusters of class y, and
    :math:`\ell_i` is the loss of sample i.

    Args:
        epoch: Number of whole epochs before clustering (8 of 200 in the paper's CIFAR-10 runs).
        repeats: Number of times each found sample is repeated (1 in the paper); 0 repeats nothing.
        loss_index: Index, from 0, of the loss call that counts. Default: the only one that classifies.
        outputs_fn: Callable (module, batch) -> logits (B, C) and labels (B,), used instead of the step.
        seed: Seed of the clusters.
        loader_key: Which of several training loaders to use: its key, or its position in a list.
        name: Name of this instance.

    Raises:
        ValueError: In the constructor for numbers below their minimum. In setup for manual optimization, an
            epoch that is never reached, or another technique that chooses samples. After the first batch, which
            is scored as a check, if the targets of the loss are not one class per sample.
        RuntimeError: After the first batch, if rows do not follow their samples when these are reordered, or if two
            calls classify and ``loss_index`` does not say which one counts.
        TypeError: If the training data has no indices (iterable data, ``in_order=False``, other keys of a sampler).

    **Hooks.** The same as :class:`DataPruning`. Epochs become longer; schedules that step with every batch advance
    more slowly so that they end where they should.

    **Logs** under ``data/``, at each epoch: ``kept_share`` (above 1), ``samples_seen``; in the summary
    ``samples_share``.

    **State.** The samples of the epoch; resuming is bit-exact.

    **Cost.** One evaluation pass through the training set, plus k-means.

    Example:
        .. code-block:: yaml

            trainer:
              callbacks:
                - class_path: lightning_grad.callbacks.UniformLearning
                  init_args:
                    epoch: 8

    References:
        Nguyen et al., "Changing the Training Data Distribution to Reduce Simplicity Bias Improves In-distribution
        Generalization", 2024, arXiv 2404.17768. In the paper, training restarts with the repeated samples; here it
        continues.
    """

    compatibility: ClassVar[Compatibility] = SubsetCallback.compatibility.but(
        compiled=COMPILED,
        weight_averaging=CURRENT_WEIGHTS,
        **manual(
            no(
                "does not work with {}: its training_step also steps the optimizer, so it cannot be run "
                "just to read the outputs",
                "Use DataPruning(score='aum') or 'forgetting', which read the outputs during training, or "
                "RepeatedRandomSubset, or set outputs_fn",
            )
        ),
    )
    trial: ClassVar[Mapping[str, Any]] = {"epoch": 1}
    neutral: ClassVar[Mapping[str, Any] | str] = {"repeats": 0}

    _repeated = until_next_fit[Tensor | None](lambda _: None).saved()  # as found
    _found_in = until_next_fit[int | None](lambda _: None).saved()  # epoch

    def __init__(
        self,
        epoch: int = 8,
        repeats: int = 1,
        loss_index: int | None = None,
        outputs_fn: Callable[[pl.LightningModule, Any], Any] | None = None,
        seed: int = 0,
        loader_key: str | int | None = None,
        name: str | None = None,
    ) -> None:
        check_only_one({"loss_index": loss_index, "outputs_fn": outputs_fn}, "select the outputs that are clustered")
        super().__init__(loader_key, name)
        self.epoch = check_count(epoch, 1, "epoch")
        self.repeats = check_count(repeats, 0, "repeats")
        self.loss_index = check_count(loss_index, 0, "loss_index")
        self.outputs_fn = outputs_fn
        self.seed = check_count(seed, 0, "seed")

    @property
    @override
    def plan(self) -> str:
        if self.repeats == 0:
            return "repeats no samples (repeats=0)"
        time = "the first epoch" if self.epoch == 1 else f"{self.epoch} epochs"
        return f"trains on all samples for {time}, then repeats those whose features are not learned yet"

    @property
    @override
    def remembers_samples(self) -> bool:
        return self.repeats > 0

    @property
    @override
    def holds_samples(self) -> bool:
        return super().holds_samples or self._repeated is not None

    @override
    def works_with(self) -> Compatibility:
        return self.compatibility if self.outputs_fn is None else self.compatibility.but(**manual(YES))

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self.fitting:
            self.refuse_unreached(trainer, self.epoch, "cluster")

    @override
    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        found_otherwise = bool(self.changed_settings(state, "loss_index", "outputs_fn", "seed"))
        if self._found_in is None or self._found_in < self.epoch or found_otherwise:
            self._repeated, self._found_in = None, None

    @override
    def rehearse(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.refuse_unreached_steps(trainer, self.epoch, "cluster")
        if self._repeated is None and self.repeats:
            self._look(trainer, pl_module, rehearsal=True)
            Rehearsal(trainer, pl_module, self._asked, self.training_set).check_loader()

    @property
    def _asked(self) -> LossRequest:
        return LossRequest(self.display_name, self.loss_index, _WAY_OUT, outputs_fn=self.outputs_fn, by_classes=True)

    def _look(self, trainer: pl.Trainer, pl_module: pl.LightningModule, rehearsal: bool = False) -> dict[str, Tensor]:
        own = (trainer, pl_module, self.training_set, _outputs, "Clustering outputs", self._asked)
        return look_at_all(*own, seed=self.seed, rehearsal=rehearsal)

    @override
    def choose_samples(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Tensor | None:
        if self.repeats == 0 or trainer.current_epoch < self.epoch:
            return None
        if self._repeated is None:
            self._repeated, self._found_in = self._find(trainer, pl_module), trainer.current_epoch
        sampler = self.training_set.sampler
        chosen = torch.cat([sampler.population, *[self._repeated] * self.repeats])
        size, more = len(chosen), len(chosen) + 1
        leaves_one = round_up_count(size, more, sampler.batch_size, sampler.ranks, sampler.drop_last) != size
        # Drop one repeat rather than end with a batch of one sample, on which BatchNorm fails. Without repeats,
        # the data set itself ends that way.
        return chosen[:-1] if leaves_one and len(self._repeated) else chosen

    def _find(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Tensor:
        found = self._look(trainer, pl_module)
        population = self.training_set.sampler.population
        outputs, losses, labels = (found[key][population] for key in ("outputs", "losses", "labels"))
        known = outputs.isfinite().all(1) & losses.isfinite() & labels.isfinite()
        say_what_is_skipped(self.display_name, population, known)
        own = (outputs[known], losses[known], labels[known].long())
        repeated = population[known][uniform_learning_repeats(*own, self.seed)]
        rank_zero_info(f"{self.display_name} repeats {len(repeated)} of {len(population)} samples.")
        return repeated


def _outputs(look: Look) -> Mapping[str, Tensor]:
    call = look.loss()
    if call.labels is None or call.input.dim() != 2:
        raise ValueError(
            f"{look.asked.display_name} needs logits (B, C) and one class per sample; {call.name} got an input of "
            f"shape {tuple(call.input.shape)} and targets of shape {tuple(call.target.shape)}. For such targets use "
            "DataPruning(score='loss'), or RepeatedRandomSubset, which needs no loss."
        )
    return {"outputs": call.input, "losses": call.losses, "labels": call.labels}
