"""Repeated random subsets (RS2). ``functional/data_pruning/repeated_random_subset.py`` draws the subset."""

from collections.abc import Mapping
from typing import Any, ClassVar

import lightning.pytorch as pl
from torch import Tensor
from typing_extensions import override

from lightning_grad.core.subset import SubsetCallback
from lightning_grad.functional import count_kept, repeated_random_subset
from lightning_grad.utilities.checks import check_count, check_share


class RepeatedRandomSubset(SubsetCallback):
    r"""Train each epoch on a different random subset of the samples (RS2).

    .. math::
        K_t = \{\pi(t k), \ldots, \pi(t k + k - 1)\}, \qquad k = (1 - r) n

    :math:`\pi` is a sequence of random permutations of the n samples, so all samples are seen once before any is seen
    twice; t is the epoch. This is the baseline that every other choice of samples has to beat.

    Args:
        prune: Share r of the samples dropped in each epoch, at least 0 and below 1.
        replacement: Draw every epoch independently of the others.
        seed: Seed of the random subsets.
        loader_key: Key or list position of the training loader to prune, if there are several.
        name: Name of this instance.

    Raises:
        ValueError: In the constructor for a share outside its range. In setup if another technique chooses samples.
        TypeError: If the training data has no indices (iterable data, ``in_order=False``, other keys of a sampler).

    **Hooks.** The same as :class:`DataPruning`, but without scores.

    **Logs** under ``data/``, at each epoch: ``kept_share``, ``samples_seen``; in the summary ``samples_share``.

    **State.** The samples of the epoch; resuming is bit-exact.

    **Cost.** One permutation of the indices per epoch.

    Example:
        .. code-block:: yaml

            trainer:
              callbacks:
                - class_path: lightning_grad.callbacks.RepeatedRandomSubset
                  init_args:
                    prune: 0.5

    References:
        Okanovic et al., "Repeated Random Sampling for Minimizing the Time-to-Accuracy of Learning", 2023, arXiv 2305.18424.
    """

    trial: ClassVar[Mapping[str, Any]] = {"prune": 0.3}
    neutral: ClassVar[Mapping[str, Any] | str] = {"prune": 0.0}

    def __init__(
        self,
        prune: float = 0.5,
        replacement: bool = False,
        seed: int = 0,
        loader_key: str | int | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(loader_key, name)
        self.prune = check_share(prune, "prune")
        self.replacement = replacement
        self.seed = check_count(seed, 0, "seed")

    @property
    @override
    def plan(self) -> str:
        return f"trains each epoch on a random {100 * (1 - self.prune):g} % of the samples"

    @property
    @override
    def remembers_samples(self) -> bool:
        return False  # a random subset needs no knowledge of the samples, so the data may change

    @override
    def choose_samples(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Tensor | None:
        if self.prune == 0.0:
            return None
        sampler = self.training_set.sampler
        population = sampler.population
        count = count_kept(len(population), self.prune, sampler.batch_size, sampler.ranks, sampler.drop_last)
        self.warn_of_too_few(count, len(population))
        epoch = trainer.current_epoch
        return population[repeated_random_subset(len(population), count, epoch, self.seed, self.replacement)]
