"""Normalized gradient descent: gradients of norm one."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_grad.functional.clipping.layerwise import layer_norms, multiply_layers_
from lightning_grad.functional.gradients.tensor_lists import multiply_
from lightning_grad.functional.gradients.total_norm import total_norm


@torch.no_grad()
def normalize_gradients_(
    gradients: Sequence[Tensor], layers: Tensor | None = None, count: int = 0
) -> tuple[Tensor, Tensor]:
    r"""Scale gradients to norm one, all together or each layer, in place.

    .. math::
        g \leftarrow \frac{g}{\lVert g \rVert} \quad\text{or}\quad g_h \leftarrow \frac{g_h}{\lVert g_h \rVert}

    A gradient whose norm is zero (or below 1e-38) or not finite is not changed.

    Args:
        gradients: Tensors of any shape; changed in place.
        layers: (gradients,) int64: layer index h of each gradient, on the device of the first gradient. ``None`` scales
            all of them together.
        count: Number of layers.

    Returns:
        tuple: Norms before scaling, and the factors: scalars, or (layers,).

    Example:
        >>> g = [torch.tensor([3.0]), torch.tensor([4.0])]
        >>> normalize_gradients_(g)
        (tensor(5.), tensor(0.2000))
        >>> g
        [tensor([0.6000]), tensor([0.8000])]

    References:
        Hazan, Levy and Shalev-Shwartz, "Beyond Convexity: Stochastic Quasi-Convex Optimization", NeurIPS 2015, arXiv
        1507.02030, algorithm 1.
    """
    norms = total_norm(gradients, accurate=True) if layers is None else layer_norms(gradients, layers, count)
    factors = 1.0 / norms  # infinite for a norm of zero, and for one that is too small to be inverted
    factors = torch.where((factors > 0) & factors.isfinite(), factors, 1.0)
    if layers is None:
        multiply_(gradients, factors)
    else:
        multiply_layers_(gradients, factors, layers)
    return norms, factors
