"""Z-loss: the callback. The penalty is :func:`lightning_grad.functional.z_loss`."""

from collections.abc import Mapping
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor
from typing_extensions import override

from lightning_grad.core import GradCallback, add_to_losses, during_fit, is_log_step, yes
from lightning_grad.core.compatibility import Compatibility
from lightning_grad.functional import AddedTerms, SoftmaxCall, squared_log_normalizers
from lightning_grad.utilities.checks import check_finite_at_least

_BY_HAND = "add lightning_grad.functional.z_loss(logits) to the loss in training_step"


class ZLoss(GradCallback):
    r"""Add a penalty that keeps the normalizer of the softmax near one, so logits do not drift (z-loss).

    .. math::
        L \leftarrow L + c \, \frac{1}{|V|} \sum_{p \in V} \log^2 Z_p, \qquad Z_p = \sum_k e^{x_{pk}}

    x are the logits of a call of ``cross_entropy`` in ``training_step``, k its classes, and V its positions (samples,
    tokens, pixels) that are not ignored. Every call with a gradient gets its penalty, reduced like the call itself:
    the mean over V, the sum with ``reduction="sum"``, and with "none" the penalty of each position, so a mask in the
    step applies to it too. Class weights and label smoothing do not.

    Args:
        coefficient: Weight c of the penalty, at least 0 (1e-4 in both papers); 0 changes nothing.
        name: Name of this instance.

    Raises:
        ValueError: In the constructor if the coefficient is negative or not finite. In setup if another technique
            weights samples or adds to the loss.
        RuntimeError: In the first backward pass if the step's loss has no call of ``cross_entropy``, nor of
            ``nll_loss`` directly after ``log_softmax``. Hand-written and fused losses are not seen.

    **Hooks.** The penalty acts in the backward pass of ``training_step``. The step still returns and logs the loss
    without it. Scores, attacks and other techniques that only look at the module see that loss, too.

    **Logs** under ``loss/``, at log steps: ``z_loss`` (c times the mean of :math:`\log^2 Z`) and ``log_z`` (root mean
    square of :math:`\log Z`; large or growing values mean that the logits drift).

    **State.** None.

    **Cost.** One logsumexp over the logits and its backward pass, in float32. With half-precision logits this holds
    one float32 copy of them until the backward pass.

    Example:
        .. code-block:: yaml

            trainer:
              callbacks:
                - class_path: lightning_grad.callbacks.ZLoss
                  init_args:
                    coefficient: 1.0e-4

    References:
        Chowdhery et al., "PaLM: Scaling Language Modeling with Pathways", 2022, arXiv 2204.02311, section 5. Wortsman
        et al., "Small-scale proxies for large-scale Transformer training instabilities", 2023, arXiv 2309.14322.
    """

    namespace: ClassVar[str] = "loss"
    compatibility: ClassVar[Compatibility] = GradCallback.compatibility.but(
        compiled=yes(
            "Losses inside compiled submodules get the penalty; it breaks the graph, so `fullgraph=True` fails."
        ),
    )
    trial: ClassVar[Mapping[str, Any]] = {"coefficient": 1e-2}
    neutral: ClassVar[Mapping[str, Any] | str] = {"coefficient": 0.0}

    _terms = during_fit[AddedTerms | None](lambda _: None)
    _has_backward = during_fit[bool](lambda _: False)

    def __init__(self, coefficient: float = 1e-4, name: str | None = None) -> None:
        super().__init__(name)
        self.coefficient = check_finite_at_least(coefficient, 0.0, "coefficient")

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self.fitting and self.coefficient:
            self._terms = AddedTerms(self._term)
            self.undo.push(add_to_losses(pl_module, self._terms, self.display_name))

    def _term(self, call: SoftmaxCall) -> Tensor:
        return self.coefficient * squared_log_normalizers(call.logits, call.dim)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.coefficient:
            words = f"adds {self.coefficient:g} * log^2 Z to the cross-entropies of each step"
            self.announce(words, "losses", ["training_step"])
        else:
            self.announce("adds nothing to the losses (coefficient=0)", "losses")

    @override
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._has_backward = True
        if pl_module.automatic_optimization:  # manual steps may have backward passes of other losses
            self._check()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._terms is None:
            return
        # Without a loss, Lightning passes empty outputs.
        if self._has_backward or (pl_module.automatic_optimization and outputs):
            self._check()
        if self._terms.added and is_log_step(trainer):
            totals, counts = zip(*self._terms.added, strict=True)
            mean = torch.stack(totals).sum() / torch.stack(counts).sum()
            self.log_scalars(pl_module, {"z_loss": mean, "log_z": (mean / self.coefficient).sqrt()})

    def _check(self) -> None:
        """Raise unless a backward pass of this fit went through the penalty."""
        if self._terms is None or self._terms.reached:
            return
        found = "none of them" if self._terms.added else "none"
        others = f" (found {', '.join(self._terms.refused)})" if self._terms.refused else ""
        raise RuntimeError(
            f"{self.display_name} adds its penalty to calls of torch.nn.functional.cross_entropy, and of nll_loss "
            f"directly after log_softmax, but the first backward pass went through {found}{others}. Compute the loss "
            f"with cross_entropy, or drop the callback and {_BY_HAND}."
        )
