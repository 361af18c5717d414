"""Remove the mean of each gradient."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_grad.functional.gradients.tensor_lists import is_sharded
from lightning_grad.functional.torch_version import TORCH


@torch.no_grad()
def centralize_(gradients: Sequence[Tensor], conv_only: bool = False, output_dims: Sequence[int] | None = None) -> None:
    r"""Subtract from each gradient its mean over all dimensions except the output dimension.

    .. math::
        G_i \leftarrow G_i - \frac{1}{M} \sum_{j=1}^{M} G_{ij}

    i runs over the outputs of a layer (dimension 0; for a ConvTranspose this is the inputs), j over all other entries.
    Vectors and scalars are not changed.

    Args:
        gradients: G, tensors of any shape; changed in place.
        conv_only: Do not change matrices (Linear, Embedding) either.
        output_dims: Dimension i, one per gradient; ``None`` is dimension 0 for all.

    Example:
        >>> g = torch.tensor([[1.0, 3.0], [0.0, 0.0]])
        >>> centralize_([g])
        >>> g
        tensor([[-1.,  1.],
                [ 0.,  0.]])

    References:
        Yong et al., "Gradient Centralization: A New Optimization Technique for Deep Neural Networks", 2020,
        arXiv 2004.01461, equation 1.
    """
    for gradient, output_dim in zip(gradients, output_dims or [0] * len(gradients), strict=True):
        if gradient.ndim > (2 if conv_only else 1):
            others = tuple(d for d in range(gradient.ndim) if d != output_dim)
            gradient.sub_(_mean(gradient, others))


def _mean(gradient: Tensor, dims: tuple[int, ...]) -> Tensor:
    # gloo cannot average over shards in torch 2.6; in 2.13 it can.
    if TORCH < (2, 13) and is_sharded(gradient):
        return gradient.sum(dim=dims, keepdim=True) / math.prod(gradient.shape[d] for d in dims)
    return gradient.mean(dim=dims, keepdim=True)
