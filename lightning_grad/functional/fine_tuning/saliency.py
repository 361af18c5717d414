"""Saliency unlearning (SalUn): the weights that matter to samples that a model must forget, and other labels for these."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_grad.functional.plain_tensors import plain_tensor


@torch.no_grad()
def saliency_masks(gradients: Sequence[Tensor], keep: float = 0.5) -> list[Tensor]:
    r"""Return which weights of a network are salient: the share with the largest gradients.

    .. math::
        m = \mathbb 1 \bigl[\, |g| \ge \gamma \,\bigr]

    :math:`\gamma` is one threshold for the whole network, which the share ``keep`` of all entries reaches: the median for
    0.5. Weights with a gradient of 0 are never salient, unless ``keep`` is 1; the paper's code ranks them too.

    Args:
        gradients: g of each weight, any shapes and floating-point types.
        keep: Share of salient weights, above 0 and at most 1.

    Returns:
        list: For each gradient a bool tensor of its shape.

    Raises:
        ValueError: If ``keep`` is out of range, or there is no gradient.

    Example:
        >>> saliency_masks([torch.tensor([3.0, -0.1]), torch.tensor([[-1.0], [0.2]])], keep=0.5)
        [tensor([ True, False]), tensor([[ True],
                [False]])]

    References:
        Fan et al., "SalUn: Empowering Machine Unlearning via Gradient-based Weight Saliency in Both Image
        Classification and Generation", ICLR 2024, arXiv 2310.12508, equation 3.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be above 0 and at most 1; got {keep}.")
    if not sum(gradient.numel() for gradient in gradients):
        raise ValueError("saliency_masks needs at least one gradient; got none.")
    plain = [plain_tensor(gradient) for gradient in gradients]
    if keep == 1:
        return [torch.ones_like(gradient, dtype=torch.bool) for gradient in plain]
    together = torch.cat([gradient.abs().flatten().float() for gradient in plain])
    count = max(1, round(keep * together.numel()))
    threshold = together.kthvalue(together.numel() - count + 1).values
    del together
    return [(size >= threshold) & (size > 0) for size in (gradient.abs().float() for gradient in plain)]


def random_labels(labels: Tensor, draws: Tensor, num_classes: int) -> Tensor:
    r"""Return another class for each label, uniformly among all others.

    .. math::
        y' = (y + 1 + \lfloor u \, (C - 1) \rfloor) \bmod C

    Args:
        labels: y, of any shape: classes from 0 to C - 1, also as bool or floating-point numbers. Others, such as the -100
            that a loss ignores, stay as they are.
        draws: u, uniform in [0, 1); must have the shape of the labels.
        num_classes: C, at least 2.

    Returns:
        Tensor: Shape and type of the labels.

    Raises:
        ValueError: If there are fewer than two classes.

    Example:
        >>> random_labels(torch.tensor([0, 2, -100]), torch.tensor([0.0, 0.9, 0.5]), num_classes=3)
        tensor([   1,    1, -100])
    """
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, so there is another class; got {num_classes}.")
    return shifted_labels(labels, label_shifts(draws, num_classes), num_classes)


def label_shifts(draws: Tensor, num_classes: int) -> Tensor:
    """Return from uniform draws in [0, 1) by how many classes each label moves, 1 to C - 1."""
    return 1 + (draws * (num_classes - 1)).long().clamp(max=num_classes - 2)  # a product may round up to C - 1


def shifted_labels(labels: Tensor, shifts: Tensor, num_classes: int) -> Tensor:
    """Return labels that are moved around the circle of classes; those that are no class stay."""
    classes = labels.long()
    is_class = (classes >= 0) & (classes < num_classes)
    return torch.where(is_class, (classes + shifts) % num_classes, classes).to(labels.dtype)
