"""Input gradients: which entries of an input a class score depends on, and whether that is where the evidence is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_grad.functional.choices import check_choice

Predict = Callable[[Tensor], Tensor]
Side = Literal["top", "bottom"]
_SIDES: tuple[Side, Side] = ("top", "bottom")


def input_saliency(compute_scores: Predict, inputs: Tensor) -> Tensor:
    r"""Return the magnitude of the gradient of each sample's score with respect to its input.

    .. math::
        S_i = \Bigl| \frac{\partial s(x_i)}{\partial x_i} \Bigr|

    Args:
        compute_scores: Function of the inputs that returns one score for each sample, (B,), such as its largest logit.
        inputs: x, (B, ...).

    Returns:
        Tensor: S, in the shape of the inputs, detached.

    Example:
        >>> input_saliency(lambda x: -2 * x[:, 0] + x[:, 1], torch.ones(1, 2))
        tensor([[2., 1.]])

    References:
        Simonyan, Vedaldi and Zisserman, "Deep Inside Convolutional Networks: Visualising Image Classification Models and
        Saliency Maps", 2013, arXiv 1312.6034, section 3.
    """
    with torch.enable_grad():
        inputs = inputs.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(compute_scores(inputs).sum(), inputs)
    return gradient.abs()


def mask_inputs(inputs: Tensor, saliency: Tensor, share: float, keep: Side, fill: Tensor | float = 0.0) -> Tensor:
    """Keep a share of the entries of each input, those with the largest or the smallest saliency.

    Args:
        inputs: (B, ...).
        saliency: A number for each entry, in the shape of the inputs.
        share: Share of the entries to keep, above 0 and at most 1; at least one entry.
        keep: "top" keeps the largest, "bottom" the smallest.
        fill: Value of the other entries; broadcast to the inputs.

    Raises:
        ValueError: If the shapes differ, or ``share`` or ``keep`` is out of range.

    Example:
        >>> mask_inputs(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[0.1, 0.9, 0.5]]), 0.34, "top", fill=-1.0)
        tensor([[-1.,  2., -1.]])
    """
    check_choice(keep, _SIDES, "keep")
    if inputs.shape != saliency.shape:
        raise ValueError(
            f"saliency must have the shape of the inputs {tuple(inputs.shape)}; got {tuple(saliency.shape)}."
        )
    if not 0 < share <= 1:
        raise ValueError(f"share must be above 0 and at most 1; got {share}.")
    flat = saliency.flatten(1)
    chosen = flat.topk(max(1, round(share * flat.shape[1])), 1, largest=keep == "top").indices
    kept = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, chosen, True).view_as(inputs)
    return torch.where(kept, inputs, torch.as_tensor(fill, dtype=inputs.dtype, device=inputs.device))


@dataclass(frozen=True)
class DiffRoar:
    """The result of :func:`diff_roar`; accuracies from 0 to 1, one for each seed.

    Args:
        top: Accuracies of networks retrained on the entries with the largest saliency.
        bottom: The same with the smallest saliency.
        unmasked: Accuracy of a network trained on the whole inputs.
    """

    top: tuple[float, ...]
    bottom: tuple[float, ...]
    unmasked: float

    @property
    def differences(self) -> tuple[float, ...]:
        """Accuracy on the top entries minus that on the bottom entries, in points, for each seed."""
        return tuple(100 * (one - other) for one, other in zip(self.top, self.bottom, strict=True))

    @property
    def mean(self) -> float:
        """The mean difference in points: above 0 if the saliency is where the evidence is."""
        return sum(self.differences) / len(self.differences)

    def __str__(self) -> str:
        spread = ", ".join(f"{each:.1f}" for each in self.differences)
        top, bottom = (100 * sum(each) / len(each) for each in (self.top, self.bottom))
        return (
            f"DiffROAR {self.mean:.1f} points ({spread}): {top:.1f} % on the top entries, {bottom:.1f} % on the bottom "
            f"entries, {100 * self.unmasked:.1f} % unmasked"
        )


def diff_roar(
    train: Callable[[Tensor, Tensor, int], Predict],
    attribute: Callable[[Tensor], Tensor],
    data: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    share: float = 0.1,
    seeds: Sequence[int] = (0, 1, 2),
    least_accuracy: float = 0.8,
    fill: Tensor | float | None = None,
) -> DiffRoar:
    r"""Test whether a saliency highlights what classes differ in, by retraining on masked inputs (DiffROAR).

    .. math::
        D = \operatorname{acc}(\text{retrained on the top entries})
            - \operatorname{acc}(\text{retrained on the bottom entries})

    Training and test inputs are both masked by the saliency. A saliency that highlights evidence gives :math:`D > 0`, a random
    one 0, and one that points at what does not matter :math:`D < 0`. It trains one network, and two for each seed.

    Args:
        train: Function (inputs, labels, seed) that trains a new network and returns it, as a function from inputs to logits.
        attribute: Function from inputs to saliency of the same shape, such as :func:`input_saliency` of the audited network.
        data: Inputs (n, ...) and labels (n,) for training.
        test: Inputs and labels for the accuracies.
        share: Share of the entries to keep.
        seeds: Seeds of the retrained networks.
        least_accuracy: Accuracy that a network trained on whole inputs must reach.
            Below it, differences between masked inputs say nothing.
        fill: Value of masked entries. Default: the mean of each entry over the training inputs.
            Another value would itself be a pattern that the network can learn.

    Raises:
        ValueError: If the unmasked network is too poor, or for wrong arguments.

    References:
        Shah, Jain and Netrapalli, "Do Input Gradients Highlight Discriminative Features?", 2021, arXiv 2102.12781, section 3.
    """
    if len(seeds) == 0:
        raise ValueError("seeds must have at least one seed; got none.")
    (inputs, labels), (others, expected) = data, test
    if not inputs.is_floating_point() or not others.is_floating_point():
        raise ValueError(f"inputs must be floating-point tensors; got {inputs.dtype} and {others.dtype}.")
    fill = inputs.mean(0) if fill is None else fill
    sets = ((inputs, attribute(inputs)), (others, attribute(others)))
    masked = {side: [mask_inputs(*each, share, side, fill) for each in sets] for side in _SIDES}
    unmasked = _accuracy(train(inputs, labels, seeds[0]), others, expected)
    if unmasked < least_accuracy:
        raise ValueError(
            f"diff_roar needs a network that reaches an accuracy of {least_accuracy:g} on whole inputs, but the one that "
            f"train() returned reaches {unmasked:.2f}. Train it longer, or set least_accuracy if that is the best possible."
        )
    top, bottom = (
        tuple(_accuracy(train(kept, labels, seed), kept_others, expected) for seed in seeds)
        for kept, kept_others in masked.values()
    )
    return DiffRoar(top, bottom, unmasked)


@torch.no_grad()
def _accuracy(predict: Predict, inputs: Tensor, labels: Tensor) -> float:
    return float((predict(inputs).argmax(1) == labels).double().mean())
