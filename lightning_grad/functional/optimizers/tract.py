"""TrAct: the gradient of a first layer's weight that trains its activations in the steepest direction."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@torch.no_grad()
def precondition(gradient: Tensor, rows: Tensor, damping: float = 0.1) -> Tensor:
    r"""Multiply a weight's gradient by the inverse second moment of its inputs.

    .. math::
        G \leftarrow G \, \Bigl(\frac{X^\top X}{b} + \lambda I\Bigr)^{-1}

    The smaller of two equivalent systems is solved, of f or b equations, in float32 or float64.

    Args:
        gradient: G, (..., outputs, f).
        rows: X, (..., b, f): the inputs that the weight multiplied, one a row.
        damping: :math:`\lambda`, above 0.

    Returns:
        Tensor: The new gradient, of the same shape and type.

    Example:
        >>> precondition(torch.tensor([[2.0, 2.0]]), torch.tensor([[3.0, 0.0], [0.0, 1.0]]), damping=0.5)
        tensor([[0.4000, 2.0000]])

    References:
        Petersen et al., "TrAct: Making First-layer Pre-Activations Trainable", NeurIPS 2024, arXiv 2410.23970,
        figure 2.
    """
    exact = torch.promote_types(gradient.dtype, torch.float32)
    g, x = gradient.to(exact), rows.to(exact)
    count, width = x.shape[-2:]
    if width <= count:
        return _solve(x.mT @ x / count, damping, g.mT).mT.to(gradient.dtype)
    # Woodbury: (X'X / b + l)^-1 = (1 - X' (XX' + l b)^-1 X) / l
    inner = _solve(x @ x.mT, damping * count, x @ g.mT)
    return ((g - (x.mT @ inner).mT) / damping).to(gradient.dtype)


def _solve(matrix: Tensor, damping: float, right: Tensor) -> Tensor:
    """Solve (A + damping) Y = B for a symmetric A without negative eigenvalues, without a host sync."""
    matrix.diagonal(dim1=-2, dim2=-1).add_(damping)
    factor, _ = torch.linalg.cholesky_ex(matrix)
    return torch.cholesky_solve(right, factor)


def rows_of(layer: nn.Module, inputs: Tensor) -> Tensor:
    """Return the rows that a layer's weight multiplies, (groups, b, f); f is the size of one output's weight.

    Args:
        layer: A Linear, Conv1d, Conv2d or Conv3d.
        inputs: What it is called with: (..., f), or a batch of images with or without its first dimension.
    """
    if not isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return inputs.reshape(1, -1, inputs.shape[-1])
    dims = len(layer.kernel_size)
    images = inputs if inputs.ndim == dims + 2 else inputs.unsqueeze(0)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    images = F.pad(images, layer._reversed_padding_repeated_twice, mode=mode)
    for dim, (size, stride, dilation) in enumerate(zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)):
        images = images.unfold(2 + dim, dilation * (size - 1) + 1, stride)[..., ::dilation]
    batch, channels, *rest = images.shape  # and then positions, and places in the kernel
    parts = images.reshape(batch, layer.groups, channels // layer.groups, *rest)
    positions, kernel = range(3, 3 + dims), range(3 + dims, 3 + 2 * dims)
    return parts.permute(1, 0, *positions, 2, *kernel).flatten(1 + dims + 1).flatten(1, 1 + dims)


class _ByInputs(torch.autograd.Function):
    """Returns a weight unchanged; its gradient is preconditioned by the inputs of the call that uses it."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, inputs: Tensor, layer: nn.Module, damping: float) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.layer, ctx.damping = layer, damping
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (inputs,) = ctx.saved_tensors
        (gradient,) = gradients
        rows = rows_of(ctx.layer, inputs)
        parts = gradient.reshape(len(rows), -1, rows.shape[-1])
        return precondition(parts, rows, ctx.damping).reshape(gradient.shape), None, None, None


def train_activations(weight: Tensor, inputs: Tensor, layer: nn.Module, damping: float = 0.1) -> Tensor:
    r"""Return a weight for one call of its layer, whose gradient takes the steepest step of the outputs (TrAct).

    The value does not change. In the backward pass, the gradient of this call becomes

    .. math::
        G = \frac{\partial L}{\partial Z}^{\!\top} X \, \Bigl(\frac{X^\top X}{b} + \lambda I\Bigr)^{-1},

    where X are the rows that the weight multiplies, one for each sample and position.

    Args:
        weight: The weight of ``layer``, in the layer's shape.
        inputs: What the layer is called with.
        layer: A Linear, Conv1d, Conv2d or Conv3d, with any groups, stride, dilation and padding.
        damping: :math:`\lambda`, above 0.

    Returns:
        Tensor: The weight to call the layer with.

    Example:
        >>> layer, x = nn.Linear(2, 1, bias=False), torch.tensor([[3.0, 0.0], [0.0, 1.0]])
        >>> weight = train_activations(layer.weight, x, layer, damping=0.5)
        >>> F.linear(x, weight).sum().backward()
        >>> layer.weight.grad
        tensor([[0.6000, 1.0000]])

    References:
        Petersen et al., "TrAct: Making First-layer Pre-Activations Trainable", NeurIPS 2024, arXiv 2410.23970.
    """
    shown: Tensor = _ByInputs.apply(weight, inputs.detach(), layer, damping)  # type: ignore[no-untyped-call]
    return shown
