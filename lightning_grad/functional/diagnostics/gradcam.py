r"""Activation maps: which parts of an image speak for a class, from the output of one layer and its gradient.

:class:`OutputCapture` reads the layer's output, :func:`feature_map` finds the grid in it, and :func:`activation_maps`
weights its channels.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from lightning_grad.functional.choices import check_choice
from lightning_grad.functional.plain_tensors import dressed, plain_tensor

CAMMethod = Literal["gradcam", "gradcam++", "smooth_gradcam++"]
CAM_METHODS = ("gradcam", "gradcam++", "smooth_gradcam++")
# Tokens before the patches: none, a class token, a distillation token too, or four registers too.
_PREFIXES = (0, 1, 2, 5)


def activation_maps(activations: Tensor, gradients: Tensor, method: CAMMethod = "gradcam") -> Tensor:
    r"""Return the class activation map of each image.

    .. math::
        M = \max\Bigl(0, \sum_k w_k A_k\Bigr), \qquad
        w_k = \frac 1 {HW} \sum_{ij} g_{kij} \quad\text{(Grad-CAM)}, \qquad
        w_k = \sum_{ij} \alpha_{kij} \max(0, g_{kij}), \quad
        \alpha_{kij} = \frac{g_{kij}^2}{2 g_{kij}^2 + \sum_{ab} A_{kab}\, g_{kij}^3} \quad\text{(Grad-CAM++)}

    where A are the channels of a layer's output, and g is the gradient of the class score with respect to them. Smooth
    Grad-CAM++ uses the formula of Grad-CAM++ with the means of :math:`g`, :math:`g^2` and :math:`g^3` over noisy copies
    of the image. :math:`\alpha` is 0 where g is 0.

    Args:
        activations: A, (B, C, H, W).
        gradients: g, (B, C, H, W); for "smooth_gradcam++" one for each noisy copy, (N, B, C, H, W).
        method: "gradcam", "gradcam++" or "smooth_gradcam++".

    Returns:
        Tensor: M, (B, H, W), at least 0. Half precision is computed in float32.

    Raises:
        ValueError: For an unknown method, or if the shapes do not match.

    Example:
        >>> activations = torch.tensor([[[[1.0, 0.0], [0.0, 2.0]], [[0.0, 3.0], [0.0, 0.0]]]])
        >>> gradients = torch.tensor([[[[4.0, 0.0], [0.0, 0.0]], [[-2.0, 0.0], [0.0, 0.0]]]])
        >>> activation_maps(activations, gradients)
        tensor([[[1., 0.],
                 [0., 2.]]])

    References:
        Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization", 2017, arXiv
        1610.02391, eq. 1 and 2.
        Chattopadhay et al., "Grad-CAM++: Improved Visual Explanations for Deep Convolutional Networks", 2018, arXiv
        1710.11063, eq. 5 and 19.
        Omeiza et al., "Smooth Grad-CAM++: An Enhanced Inference Level Visualization Technique for Deep Convolutional
        Neural Network Models", 2019, arXiv 1908.01224, eq. 13 and 14.
    """
    check_choice(method, CAM_METHODS, "method")
    is_smooth = method == "smooth_gradcam++"
    if activations.dim() != 4 or gradients.shape[is_smooth:] != activations.shape:
        raise ValueError(
            f"activation_maps needs activations (B, C, H, W) and gradients of the same shape"
            f"{', one for each noisy copy, (N, B, C, H, W)' if is_smooth else ''}; got {tuple(activations.shape)} and "
            f"{tuple(gradients.shape)}."
        )
    # In half precision, the powers of small gradients would be 0, and their sums inexact.
    activations, gradients = (each.float() if each.itemsize < 4 else each for each in (activations, gradients))
    if method == "gradcam":
        weights = gradients.mean((2, 3))
    else:
        copies = gradients if is_smooth else gradients.unsqueeze(0)
        first, second, third = (copies.pow(power).mean(0) for power in (1, 2, 3))
        divisor = 2 * second + third * activations.sum((2, 3), keepdim=True)
        alpha = torch.where((second == 0) | (divisor == 0), 0.0, second / divisor)
        weights = (alpha * first.relu()).sum((2, 3))
    return torch.einsum("bk,bkhw->bhw", weights, activations).relu()


def feature_map(output: Tensor, samples: int, size: tuple[int, int]) -> Tensor | None:
    """Return the output of a layer as a map of the image, (B, C, H, W), or ``None`` if it is none.

    A map has more than one position. It is (B, C, H, W); or (B, H, W, C) if only these H and W have the proportions of
    the image; or the tokens (B, T, C) of a vision transformer, after none, one, two or five tokens that belong to no
    patch, such as a class token and registers. The tokens form a grid with the proportions of the image, or the grid of
    its whole patches, or there is one token for each row of the image.

    Args:
        output: Any tensor.
        samples: B.
        size: Height and width of the image.

    Example:
        >>> feature_map(torch.zeros(2, 17, 32), 2, (8, 8)).shape, feature_map(torch.zeros(2, 10), 2, (8, 8))
        (torch.Size([2, 32, 4, 4]), None)
    """
    if output.shape[:1] != (samples,):
        return None
    if output.dim() == 4 and output[0, 0].numel() > 1:
        _, first, second, third = output.shape
        height, width = size
        channels_last = first * width == second * height and second * width != third * height and first * second > 1
        return output.movedim(3, 1) if channels_last else output
    if output.dim() == 3:
        grids = [(prefix, _grid(output.shape[1] - prefix, size, _proportional)) for prefix in _PREFIXES]
        grids.append((0, (output.shape[1], 1) if output.shape[1] == size[0] > 1 else None))
        grids += [(prefix, _grid(output.shape[1] - prefix, size, _cut)) for prefix in _PREFIXES]
        for prefix, grid in grids:
            if grid is not None:
                return output[:, prefix:].transpose(1, 2).reshape(samples, -1, *grid)
    return None


def _grid(
    tokens: int, size: tuple[int, int], fits: Callable[[tuple[int, int], tuple[int, int]], bool]
) -> tuple[int, int] | None:
    """Return the height and width of a grid of at least two tokens that fits the image."""
    guess = math.isqrt(max(tokens, 0) * size[0] // size[1])
    for rows in (guess, guess + 1):
        if tokens > 1 and rows > 0 and tokens % rows == 0 and fits((rows, tokens // rows), size):
            return rows, tokens // rows
    return None


def _proportional(grid: tuple[int, int], size: tuple[int, int]) -> bool:
    return grid[0] * size[1] == grid[1] * size[0]


def _cut(grid: tuple[int, int], size: tuple[int, int]) -> bool:
    """Return True if there is a patch size for which the image has this grid of whole patches."""
    smallest = max(side // (count + 1) for side, count in zip(size, grid, strict=True)) + 1
    return smallest <= min(side // count for side, count in zip(size, grid, strict=True))


class OutputCapture:
    r"""Keep the output of a layer during a forward pass, with its graph, to differentiate a score with respect to it.

    The network continues with a copy, so an in-place operation that follows, such as ``ReLU(inplace=True)``, does not
    overwrite what was kept.

    Args:
        layer: A module. Of a tuple that it returns, the first tensor counts.
        only: Function that returns whether an output is to be kept. Default: every floating-point tensor.

    Attributes:
        outputs: The kept outputs, one for each call.
        copies: The copies that the network continued with.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(8, 3))
        >>> with OutputCapture(net[0]) as capture:
        ...     logits = net(torch.ones(1, 1, 4, 4))
        >>> (gradient,) = torch.autograd.grad(logits[0, 2], capture.output)
        >>> activation_maps(capture.output.detach(), gradient).shape
        torch.Size([1, 2, 2])
    """

    def __init__(self, layer: nn.Module, only: Callable[[Tensor], bool] = lambda output: True) -> None:
        self._layer = layer
        self.only = only
        self.outputs: list[Tensor] = []
        self.copies: list[Tensor] = []

    @property
    def output(self) -> Tensor | None:
        """The output of the last call; ``None`` if nothing was kept."""
        return self.outputs[-1] if self.outputs else None

    def __enter__(self) -> Self:
        self._handle = self._layer.register_forward_hook(self._keep)
        return self

    def __exit__(self, *error: object) -> None:
        self._handle.remove()

    def _keep(self, layer: nn.Module, args: Any, output: Any) -> Any:
        first = output[0] if type(output) is tuple and output else output
        if not isinstance(first, Tensor) or not first.is_floating_point() or not self.only(plain_tensor(first)):
            return None
        with torch.enable_grad():
            plain = plain_tensor(first)
            kept = plain if plain.requires_grad else plain.detach().requires_grad_()
            copy = dressed(kept.clone(), first)
        self.outputs.append(kept)
        self.copies.append(copy)
        return (copy, *output[1:]) if first is not output else copy
