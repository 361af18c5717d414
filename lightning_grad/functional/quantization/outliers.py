"""Outliers: the few weights whose rounding costs most, which keep their values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from lightning_grad.functional.choices import check_choice
from lightning_grad.functional.quantization.grids import QuantizedTensor, quantize_weight
from lightning_grad.functional.quantization.learned_rounding import mse_scales

OutlierScore = Literal["gradient-error", "gradient", "magnitude"]
SCORES = ("gradient-error", "gradient", "magnitude")


@torch.no_grad()
def outlier_mask(
    weight: Tensor,
    bits: int,
    share: float = 0.01,
    gradient: Tensor | None = None,
    score: OutlierScore = "gradient-error",
    dim: int = 0,
) -> Tensor:
    r"""Return the weights that keep their values in mixed precision: those with the highest scores.

    ================ ================================================================================
    score            value
    ================ ================================================================================
    gradient-error   :math:`|g| \cdot |w - q(w)|`: how much the loss changes, to first order
    gradient         :math:`|g|`, as published (GWQ)
    magnitude        :math:`|w|`
    ================ ================================================================================

    GWQ keeps 1 % of the weights. In our comparison its score was no better than keeping random weights, so the default
    multiplies it by the rounding error (see the card).

    Args:
        weight: Weight w of two or more dimensions.
        bits: Bits of the grid of the others, 2 to 8.
        share: Share of the weights to keep, 0 to 1.
        gradient: The absolute gradient of the loss, summed over batches; of the shape of the weight.
        score: Name of the score.
        dim: Dimension of the output channels.

    Returns:
        Tensor: Bool, in the shape of the weight, with ``int(share * weight.numel())`` entries True.

    Raises:
        ValueError: If the score is unknown, it needs a gradient and there is none, or ``share`` is not between 0 and 1.

    Example:
        >>> weight, gradient = torch.tensor([[1.0, 0.4, 0.3]]), torch.tensor([[9.0, 2.0, 1.0]])
        >>> outlier_mask(weight, bits=2, share=0.34, gradient=gradient)
        tensor([[False,  True, False]])
        >>> outlier_mask(weight, bits=2, share=0.34, gradient=gradient, score="gradient")
        tensor([[ True, False, False]])

    References:
        Shao et al., "GWQ: Gradient-Aware Weight Quantization for Large Language Models", 2024, arXiv 2411.00850.
    """
    check_choice(score, SCORES, "score")
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"share must be between 0 and 1; got {share}.")
    if gradient is None and score != "magnitude":
        raise ValueError(f"score={score!r} needs the gradient of the weight. Pass gradient=, or score='magnitude'.")
    value = weight.detach().abs() if gradient is None or score == "magnitude" else gradient.abs()
    if score == "gradient-error":
        rounded = quantize_weight(weight, bits, dim=dim, scales=mse_scales(weight, bits, dim)).dequantize()
        value = value * (weight.detach() - rounded).abs()
    mask = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
    mask[value.flatten().topk(int(share * weight.numel())).indices] = True
    return mask.view(weight.shape)


@dataclass(frozen=True)
class MixedTensor(QuantizedTensor):
    """A weight as integers and scales, except for a few outliers, which keep their values.

    Args:
        kept: Bool, in the shape of the weight; the integers are 0 there.
        outliers: Values of the kept weights, in their order in memory.
    """

    kept: Tensor = field(kw_only=True)
    outliers: Tensor = field(kw_only=True)

    def dequantize(self) -> Tensor:
        """Return the weight, in the type of the scales."""
        values = super().dequantize()
        return values.masked_scatter(self.kept, self.outliers.to(values.dtype))


def with_outliers(rounded: QuantizedTensor, weight: Tensor, kept: Tensor) -> MixedTensor:
    """Return a rounded weight whose outliers keep their values.

    Args:
        rounded: Roundings of the other weights.
        weight: The weight before rounding.
        kept: Where it keeps its values.

    Example:
        >>> weight = torch.tensor([[3.7, 0.9, -1.1]])
        >>> kept = outlier_mask(weight, bits=2, share=0.4, score="magnitude")
        >>> with_outliers(quantize_weight(weight * ~kept, bits=2), weight, kept).dequantize()
        tensor([[ 3.7000,  1.1000, -1.1000]])
    """
    r = rounded
    return MixedTensor(
        r.integers, r.scales, r.bits, r.quantizer, r.dim, r.block, kept=kept, outliers=weight.detach()[kept]
    )
