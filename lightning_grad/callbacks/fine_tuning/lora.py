"""Low-rank adapters: the callback. The mathematics is in ``functional/fine_tuning/lora.py``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from lightning_grad.callbacks.fine_tuning._low_rank import LowRankAdapter
from lightning_grad.core import (
    AdapterCallback,
    Compatibility,
    FoundWeight,
    LossRequest,
    ProbeLook,
    Reading,
    check_above,
    check_count,
    during_fit,
    is_log_step,
    manual,
    no,
    sum_over_ranks,
    until_next_fit,
)
from lightning_grad.core.losses.sample_losses import trained_loss
from lightning_grad.core.probe_reading import take_look
from lightning_grad.core.probe_samples import ProbeSamples
from lightning_grad.core.samples.loader_batch_size import loader_batch_size
from lightning_grad.core.samples.training_loaders import keys_of
from lightning_grad.functional import lora_rank, lora_scale
from lightning_grad.utilities.checks import check_finite
from lightning_grad.utilities.parameters import clean_name

Init = Literal["default", "ga"]
_UNKNOWN_BATCH = 8  # samples, of a loader that does not say its batch size


class LoRA(AdapterCallback[LowRankAdapter]):
    r"""Train a low-rank change of each weight of a pretrained model, and freeze the weights (LoRA, LoRA-GA).

    .. math::
        W' = W + s B A, \qquad s = \frac{\alpha}{r}

    W (out, in) is frozen; A (r, in) and B (out, r) train. Kernels of convolutions are matrices
    (out, in * ...). Checkpoints hold W' under the plain keys, and validation computes with it. All
    parameters other than A and B are frozen, except those that ``also_train`` names.

    With ``init="default"``, A is random and B is 0, so the function of the module does not change. With
    ``init="ga"``, the gradients of some training batches are averaged before the first step, and A and B
    start from their singular vectors, so the first step is as close to that of full fine-tuning as an
    adapter can be; W is shifted by ``-s B A``, so the function stays the same up to rounding.

    Args:
        rank: Rank r of each adapter; 0 adds none and freezes nothing.
            A weight with a smaller side gets a smaller rank, and the fit says which. "ga" needs twice the rank.
        alpha: Strength of the adapters; s = alpha / rank (twice the rank is usual).
        init: "default" starts at the pretrained weights with a random A; "ga" from the gradient (LoRA-GA).
        init_batches: Training batches of each rank whose gradients "ga" averages (the paper uses 8 samples or more).
        rank_stabilized: Use s = alpha / sqrt(rank), which suits large ranks (rsLoRA).
        also_train: Names or wildcards of parameters or modules that train as they are, such as a new head.
        include: Names or wildcards of layers or weights to adapt.
            Default: every Linear, Conv1d/2d/3d and attention weight, and those of other layers that multiply by a
            matrix named weight, such as Conv1D of GPT-2, except those that the module has frozen. Parameters of other
            modules need their full name.
        exclude: Names or wildcards of parameters or modules that get no adapter and stay frozen.
        seed: Seed of the random start of A, and of the choice of samples for "ga"; identical on all ranks.
        name: Name of this instance, needed if two are used.

    Raises:
        ValueError: In the constructor for impossible numbers. Before the first batch if no weight can
            be adapted, a name matches nothing, all that a name in ``also_train`` matches is frozen, an adapter is in
            no optimizer, another technique changes the same weight, under FSDP or DeepSpeed, or if weights are
            averaged. With "ga" under manual optimization, or with several training loaders.
        TypeError: Before the first batch if init="ga" and the training data has no indices.

    **Hooks.** The strategy's ``setup`` inserts the adapters, before DDP and ``configure_optimizers``.
    ``on_train_start`` computes the gradients of "ga"; the module is quiet meanwhile. Validation batches
    run with merged weights. The end of the fit merges the adapters into the weights.

    **Logs** under ``lora/``, at log steps: ``relative_change`` (norm of the change of a weight since the start, relative to
    that of the weight; mean over weights). The weights with their ranks are printed when the fit begins.

    **State.** A and B of each weight, and the frozen weights bit for bit. For "ga" also the A and B of the start.
    :func:`~lightning_grad.utilities.save_adapters` writes the adapters of a checkpoint to a small file.

    **Cost.** Steps are shorter than those of full fine-tuning, because no gradient of W is computed, and the
    optimizer has the state of A and B only; see docs/benchmarks.md. "ga" needs the gradients of all adapted
    weights once, and a singular value decomposition of each.

    Example:
        .. code-block:: yaml

            trainer:
              callbacks:
                - class_path: lightning_grad.callbacks.LoRA
                  init_args:
                    rank: 8
                    alpha: 16
                    init: ga
                    also_train: [head]

    References:
        Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, arXiv 2106.09685. Wang et al.,
        "LoRA-GA", NeurIPS 2024, arXiv 2407.05000, with the start of its released code.
    """

    namespace: ClassVar[str] = "lora"
    fixed_settings: ClassVar[Mapping[str, str]] = {
        **AdapterCallback.fixed_settings,
        "rank": "the adapters of the checkpoint have this rank",
        "alpha": "it scales the adapters of the checkpoint",
        "rank_stabilized": "it scales the adapters of the checkpoint",
    }
    trial: ClassVar[Mapping[str, Any]] = {"rank": 2, "alpha": 4.0}
    neutral: ClassVar[Mapping[str, Any] | str] = {"rank": 0}

    _has_begun = until_next_fit.of(bool).saved()
    _generator = during_fit[torch.Generator](lambda self: torch.Generator().manual_seed(self.seed))
    _lowered = during_fit.of(list[str])

    def __init__(
        self,
        rank: int = 8,
        alpha: float = 16.0,
        init: Init = "default",
        init_batches: int = 8,
        rank_stabilized: bool = False,
        also_train: Sequence[str] | None = None,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        seed: int = 0,
        name: str | None = None,
    ) -> None:
        super().__init__(include, exclude, also_train, name)
        self.rank = check_count(rank, 0, "rank")
        self.alpha = check_finite(check_above(alpha, 0.0, "alpha"), "alpha")
        self.init = init
        self.init_batches = check_count(init_batches, 1, "init_batches")
        self.rank_stabilized = rank_stabilized
        self.seed = check_count(seed, 0, "seed")

    @override
    def works_with(self) -> Compatibility:
        if self.init == "default" or not self.is_on:
            return self.compatibility
        reason = no("with init='ga' runs training_step without training, which {} forbids", "Use init='default'")
        return self.compatibility.but(**manual(reason))

    @property
    @override
    def is_on(self) -> bool:
        return self.rank > 0

    @override
    def adapter(self, found: FoundWeight) -> LowRankAdapter | str:
        if getattr(found.module, "groups", 1) != 1:
            return "a convolution with groups has no low-rank kernel"
        shape = found.parameter.shape
        rank = lora_rank(shape, self.rank, self.init == "ga")
        if rank == 0:
            return "too small for init='ga', which needs a side of at least 2"
        if rank < self.rank:
            self._lowered.append(f"{clean_name(found.name)} ({rank})")
        return LowRankAdapter(found, rank, lora_scale(self.rank, self.alpha, self.rank_stabilized), self._generator)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        if self._lowered:
            why = "twice the rank exceeds a side" if self.init == "ga" else "the rank exceeds a side"
            self.say(f"uses a smaller rank where {why} of the weight: {', '.join(self._lowered)}")

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if self.adapters and is_log_step(trainer):
            change = torch.stack([adapter.relative_change() for adapter in self.adapters]).mean()
            self.log_scalars(pl_module, {"relative_change": change})

    # The start from a gradient.

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if not self._has_begun and self.init == "ga" and self.is_on:
            gradients = self._gradients(trainer, pl_module)
            unused = [
                clean_name(a.name) for a, g in zip(self.adapters, gradients, strict=True) if not self._begin(a, g)
            ]
            if unused:
                rank_zero_warn(
                    f"{self.display_name}: the gradients of {', '.join(unused)} are 0 or not finite on {self.init_batches} "
                    "batches, so their adapters start as with init='default'. Exclude these layers if nothing uses them."
                )
        self._has_begun = True

    def _begin(self, adapter: LowRankAdapter, gradient: Tensor) -> bool:
        is_usable = bool(torch.isfinite(gradient).all() and gradient.any())
        if is_usable:
            adapter.start_from(gradient)
        return is_usable

    def _gradients(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[Tensor]:
        """Return the sum over batches and ranks of the gradients of all adapted weights."""
        if len(list(keys_of(trainer.train_dataloader))) > 1:
            raise ValueError(
                f"{self.display_name} with init='ga' needs a single training loader; got several. Use init='default'."
            )
        ranks, size = trainer.world_size, loader_batch_size(trainer) or _UNKNOWN_BATCH
        asked = LossRequest(self.display_name, way_out="use init='default'")
        samples = ProbeSamples(trainer, 1, "train", None, None, asked, at_most=True)
        weights = [adapter.frozen for adapter in self.adapters]
        totals = [torch.zeros_like(weight) for weight in weights]
        modes = {module: module.training for module in pl_module.modules()}

        def probe(look: ProbeLook) -> Reading:
            # Random, because the order of a data set may have a period.
            order = torch.randperm(look.total, generator=torch.Generator().manual_seed(self.seed)).tolist()
            own = order[: self.init_batches * size * ranks][trainer.global_rank :: ranks]
            look.indices[:] = own[: len(own) // size * size] or own  # full batches, if there are any
            for module, is_training in modes.items():
                module.training = is_training  # gradients as those of the training; the look restores buffers
            for part in look.parts(size):
                _add_gradients(totals, part.run, weights, f"{self.display_name} needs it for init='ga'. {asked.advice}")
            return Reading()

        outcome = take_look(trainer, pl_module, samples, probe, {"epoch": trainer.current_epoch, "step": 0})
        own, outcome = outcome.error, outcome.shared(trainer, on_all=True) if ranks > 1 else outcome
        if own is not None or outcome.fault:
            error = own or RuntimeError(f"{self.display_name} failed on another rank: {outcome.fault}")
            error.add_note(f"{self.display_name} raised this when it computed the gradients for init='ga'.")
            raise error
        return [sum_over_ranks(trainer, total) for total in totals]


def _add_gradients(totals: Sequence[Tensor], run: Any, weights: Sequence[nn.Parameter], advice: str) -> None:
    try:
        for weight in weights:
            weight.requires_grad_(True)
        with torch.enable_grad():
            found = torch.autograd.grad(trained_loss(run(), advice), weights, allow_unused=True)
    finally:
        for weight in weights:
            weight.requires_grad_(False)
    for total, gradient in zip(totals, found, strict=True):
        if gradient is not None:
            total += gradient
