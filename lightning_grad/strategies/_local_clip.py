"""Clips the gradient of each rank before a scheme accumulates it. Used by ``dgc.py`` and ``onebit_adam.py``."""

from collections.abc import Sequence

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_grad.core.compatibility import YES, Answer, Compatibility, no
from lightning_grad.core.dispatch import overrides
from lightning_grad.functional import clip_norm_
from lightning_grad.strategies._buckets import Gradient
from lightning_grad.strategies.compressed_ddp import CompressedDDPStrategy


def clip_before(strategy: str, accumulates: str) -> Answer:
    """Return the refusal of ``Trainer(gradient_clip_val=...)``, which would clip after the exchange.

    Args:
        strategy: Name of the strategy.
        accumulates: What clipping would change, as a clause after the name, in which ``{}`` stands for the setting.
    """
    return no(
        accumulates,
        f"Set gradient_clip_val=None and {strategy}(local_clip={{value}}) (local_clip clips by norm), which clips the "
        "gradient of each rank before it is accumulated. If a library builds the Trainer, set trainer.gradient_clip_val "
        "= None before fit(), or in the setup() of a callback",
    )


class LocallyClippedDDP(CompressedDDPStrategy):
    """A scheme whose ``.grad`` is no mean gradient, so clipping must come before the exchange.

    Attributes:
        local_clip: Norm to which the mean gradient would be clipped, or ``None``.
    """

    local_clip: float | None

    @property
    @override
    def gradient_is_compressed(self) -> bool:
        return self.wants_to_compress

    @override
    def works_with(self) -> Compatibility:
        return self.compatibility if self.wants_to_compress else self.compatibility.but(gradient_clip_val=YES)

    @override
    def refuse(self, trainer: pl.Trainer) -> None:
        super().refuse(trainer)
        module = trainer.lightning_module
        if self.wants_to_compress and overrides(module, "configure_gradient_clipping"):
            rank_zero_warn(
                f"{type(module).__name__} overrides configure_gradient_clipping, which gets gradients that "
                f"{self.display_name} has accumulated over many steps. If it clips, use local_clip instead."
            )

    @override
    def prepare_(self, gradients: Sequence[Gradient]) -> Tensor:
        finite = super().prepare_(gradients)
        if self.local_clip is not None and gradients:
            clip_norm_([gradient.values for gradient in gradients], self.local_clip * self.world_size**0.5)
        return finite
