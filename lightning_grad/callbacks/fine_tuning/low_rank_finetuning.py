"""Fine-tuning of low-rank weights (WeLore), as a callback. The mathematics is in ``functional/fine_tuning/low_rank.py``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
from typing_extensions import override

from lightning_grad.callbacks.fine_tuning._factored_weight import FactoredWeight
from lightning_grad.core import AdapterCallback, FoundWeight, until_next_fit
from lightning_grad.functional import global_ranks, uniform_ranks
from lightning_grad.utilities.checks import check_between, check_share
from lightning_grad.utilities.parameters import clean_name
from lightning_grad.utilities.reporting import counted, log_many

Ranks = Literal["threshold", "uniform"]
_FIXED = "the factors of the checkpoint have the ranks that follow from it"


class LowRankFinetuning(AdapterCallback[FactoredWeight]):
    r"""Replace the weights that compress well by products of thin matrices, train these and freeze all others (WeLore).

    .. math::
        W_l \to U_l V_l, \qquad \operatorname{rank} r_l = \left| \left\{ i : \hat s_{l,i} \ge k \right\} \right|, \qquad
        \hat s = \frac{s - \min s}{\max s - \min s}

    One threshold k on the normalized singular values of all weights cuts the sum of all ranks by ``rank_reduction``; see
    :func:`lightning_grad.functional.global_ranks`. A weight that this cuts by more than ``min_cut`` of its rank is a low-rank
    component: it becomes U (out, r) times V (r, in), which train. As in the released code, all other weights stay whole
    and frozen, so the weights that are really cut are fewer than ``rank_reduction`` says; ``cut_frozen`` cuts them too.

    Cutting changes the function of the module at once, before the first step. The memory of the replaced weights is free
    until the fit ends. Checkpoints hold the products under the plain keys, and validation computes with them. When the fit
    ends, the module has its layers back, with the products as weights.

    Args:
        rank_reduction: Share of the sum of all ranks to drop (the paper uses 0.1 to 0.7); 0 changes nothing.
        min_cut: A weight trains as U V if it loses more than this share of its rank (0.4999 in the released code).
            At half of the rank, U and V of a square weight are as large as the weight.
        cut_frozen: Also cut the frozen weights to their ranks. They stay matrices, so it saves no memory here.
        ranks: "threshold", or "uniform" to cut each weight by the same share, for comparison.
        also_train: Names or wildcards of parameters or modules that train as they are, such as a new head.
        include: Names or wildcards of layers or weights whose ranks are chosen.
            Default: every Linear, Conv1d/2d/3d and attention weight, and those of other layers that multiply by a matrix
            named weight. The paper takes the linear layers of all blocks, without the embedding and the head.
        exclude: Names or wildcards of parameters or modules that stay whole and frozen.
        name: Name of this instance, needed if two are used.

    Raises:
        ValueError: In the constructor for impossible numbers. Before the first batch if no weight is cut by more than
            ``min_cut``, a name matches nothing, all that a name in ``also_train`` matches is frozen, a factor is in no
            optimizer, another technique changes the same weight, under FSDP or DeepSpeed, or if weights are averaged.

    **Hooks.** The strategy's ``setup`` replaces the weights, before DDP and ``configure_optimizers``. Validation batches run
    with the products. The end of the fit writes them into the module.

    **Logs** under ``fine_tuning/``, once: ``rank_reduction`` (reached, of the sum of all ranks), ``effective_reduction`` (only
    of the weights that are cut), ``trained_share`` (factors that train, relative to all parameters of the module before).

    **State.** U and V of each weight, and the ranks.

    **Cost.** A singular value decomposition of each weight before the first step. A step multiplies by two thin matrices in
    place of one, and computes no gradient of the others; see docs/benchmarks.md.

    Example:
        .. code-block:: yaml

            trainer:
              callbacks:
                - class_path: lightning_grad.callbacks.LowRankFinetuning
                  init_args:
                    rank_reduction: 0.5
                    also_train: [head]

    References:
        Jaiswal et al., "From GaLore to WeLore: How Low-Rank Weights Non-uniformly Emerge from Low-Rank Gradients", 2024,
        arXiv 2407.11239. Normalization, ``min_cut`` and what is frozen are those of the released code, where the thresholds
        of two models are listed; here the threshold follows from ``rank_reduction``.
    """

    namespace: ClassVar[str] = "fine_tuning"
    effect: ClassVar[str] = "factored"
    fixed_settings: ClassVar[Mapping[str, str]] = {
        **AdapterCallback.fixed_settings,
        **dict.fromkeys(("rank_reduction", "min_cut", "cut_frozen", "ranks"), _FIXED),
    }
    trial: ClassVar[Mapping[str, Any]] = {"rank_reduction": 0.6}
    neutral: ClassVar[Mapping[str, Any] | str] = {"rank_reduction": 0.0}

    reductions = until_next_fit.of(dict[str, float]).saved()
    """Shares: ``rank_reduction``, ``effective_reduction``, ``trained_share``; see **Logs**."""
    _ranks = until_next_fit.of(dict[str, int]).saved()  # by the name of the weight

    def __init__(
        self,
        rank_reduction: float = 0.5,
        min_cut: float = 0.4999,
        cut_frozen: bool = False,
        ranks: Ranks = "threshold",
        also_train: Sequence[str] | None = None,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(include, exclude, also_train, name)
        self.rank_reduction = check_share(rank_reduction, "rank_reduction")
        self.min_cut = check_between(min_cut, 0.0, 1.0, "min_cut")
        self.cut_frozen = cut_frozen
        self.ranks = ranks

    @property
    @override
    def is_on(self) -> bool:
        return self.rank_reduction > 0.0

    @property
    @override
    def plan(self) -> str:
        trained = 100 * self.reductions["trained_share"]
        return (
            f"trains {counted(len(self.adapters), 'weight')} as products, {trained:.1f} % of the parameters; ranks are cut by "
            f"{100 * self.reductions['rank_reduction']:.1f} %"
        )

    @override
    def adapter(self, found: FoundWeight) -> FactoredWeight | str:
        if getattr(found.module, "groups", 1) != 1:
            return "a convolution with groups has no low-rank kernel"
        if not bool(found.parameter.isfinite().all()):
            return "not finite"
        return FactoredWeight(found)

    @override
    def select(
        self, trainer: pl.Trainer, adapters: list[FactoredWeight]
    ) -> tuple[list[FactoredWeight], list[tuple[str, str]]]:
        is_new = not self._ranks
        names = [clean_name(weight.name) for weight in adapters]
        if is_new:
            self._ranks = trainer.strategy.broadcast(dict(zip(names, self._ranks_of(adapters), strict=True)))
        for name, weight in zip(names, adapters, strict=True):
            weight.rank = self._ranks[name]
        trained = [weight for weight in adapters if weight.cut > self.min_cut]
        others = [weight for weight in adapters if weight.cut <= self.min_cut]
        for weight in others if self.cut_frozen and is_new else []:
            weight.cut_in_place()
        if is_new:
            size = sum(parameter.numel() for parameter in trainer.lightning_module.parameters())
            self._store_reductions(adapters, adapters if self.cut_frozen else trained, trained, size)
        kept = "cut and frozen" if self.cut_frozen else "whole and frozen"
        return trained, [
            (clean_name(weight.name), f"{weight} is not cut by more than min_cut: {kept}") for weight in others
        ]

    def _ranks_of(self, found: Sequence[FactoredWeight]) -> list[int]:
        if self.ranks == "uniform":
            return uniform_ranks([weight.full_rank for weight in found], self.rank_reduction)
        return global_ranks([weight.singular_values for weight in found], self.rank_reduction)

    def _store_reductions(
        self,
        found: Sequence[FactoredWeight],
        cut: Sequence[FactoredWeight],
        trained: Sequence[FactoredWeight],
        size: int,
    ) -> None:
        total = max(1, sum(weight.full_rank for weight in found))
        self.reductions = {
            "rank_reduction": sum(weight.full_rank - weight.rank for weight in found) / total,
            "effective_reduction": sum(weight.full_rank - weight.rank for weight in cut) / total,
            "trained_share": sum(weight.num_factors for weight in trained) / max(1, size),
        }

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        log_many(trainer, {self.log_key(key): value for key, value in self.reductions.items()})
