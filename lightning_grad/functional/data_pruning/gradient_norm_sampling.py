"""Importance sampling: draw samples with large gradients more often, with weights that keep the gradient unbiased.

Probabilities and draws are computed on the CPU in float64, with a generator that the caller owns. With equal norms and
generators, every rank draws the same samples.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_grad.functional.data_pruning.scores import el2n
from lightning_grad.functional.gradients.loss_functions import LossCall, denominator_shares, split

_OF_POSITIONS = ("cross_entropy", "linear_cross_entropy", "nll_loss")
_OF_ROWS = ("binary_cross_entropy", "binary_cross_entropy_with_logits", "kl_div")


@torch.no_grad()
def output_gradient_norms(call: LossCall) -> Tensor:
    r"""Return the norm of the gradient of each sample's part of a loss by the output of the network.

    .. math::
        \nu_i = \sum_{p \in P_i} w_{ip} \lVert p_{ip} - y_{ip} \rVert_2

    for a loss that classifies, with probabilities p and one-hot targets y at the positions :math:`P_i` of the sample
    (:func:`el2n`); :math:`w_{ip}` is the weight of the class, 1 without class weights, and 0 if the position is
    ignored. For any other loss, :math:`\nu_i` is the norm of the gradient by the argument ``input`` of the loss.

    By the chain rule, the gradient by the weights is at most this norm times a factor of the network. Positions are added
    up, because a sample with more positions has a larger part of the mean over a batch.

    Args:
        call: The loss call of a batch.

    Returns:
        Tensor: (B,), detached; 0 if all positions of a sample are ignored.

    Example:
        >>> from lightning_grad.functional import LossCapture
        >>> with LossCapture() as capture:
        ...     _ = F.cross_entropy(torch.tensor([[0.0, 0.0], [8.0, 0.0]]), torch.tensor([0, 1]))
        >>> output_gradient_norms(capture.only())
        tensor([0.7071, 1.4137])

    References:
        Lu et al., "PA&DA: Jointly Sampling PAth and DAta for Consistent NAS", 2023, arXiv 2302.14772 (p - y);
        Katharopoulos and Fleuret, "Not All Samples Are Created Equal: Deep Learning with Importance Sampling", 2018,
        arXiv 1803.00942 (the gradient by the output as a bound).
    """
    if call.name in _OF_POSITIONS:
        arguments = {**call.options, "input": call.input, "target": call.target}
        shares = torch.as_tensor(denominator_shares(call.name, arguments, call.valid, call.valid))
        parts = call.rows(shares.to(call.input.device).expand(call.valid.shape)).sum(1)
        return (el2n(call) * parts).masked_fill(parts == 0, 0.0)
    if call.name in _OF_ROWS:
        return el2n(call)
    if call.input.numel() % max(call.samples, 1):  # broadcast to the target, so it has no row for each sample
        return loss_gradient_bounds(call.losses)
    with torch.enable_grad():
        output = call.input.detach().requires_grad_()
        loss = getattr(F, call.name)(output, call.target, **{**call.options, "reduction": "sum"})
        (gradient,) = torch.autograd.grad(loss, output)
    rows = split(gradient, call.samples)
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=torch.promote_types(rows.dtype, torch.float32))
    return norms


def loss_gradient_bounds(losses: Tensor) -> Tensor:
    r"""Return a bound of the gradient norm of each sample, up to a common factor, from its loss alone.

    .. math::
        \lVert \nabla \ell_i \rVert \le \sqrt{2 H (\ell_i - \ell_*)}

    holds for a loss with the lower bound :math:`\ell_*` whose gradient is H-Lipschitz. For a squared error it is an
    equality. :math:`\ell_*` is 0, or the smallest loss if one is negative.

    Args:
        losses: (n,); nan or inf where unknown.

    Returns:
        Tensor: :math:`\sqrt{\ell_i - \ell_*}`, (n,), detached; unknown losses stay nan or inf.

    Example:
        >>> loss_gradient_bounds(torch.tensor([0.0, 4.0, 9.0])), loss_gradient_bounds(torch.tensor([-1.0, 3.0]))
        (tensor([0., 2., 3.]), tensor([0., 2.]))

    References:
        Srebro, Sridharan and Tewari, "Smoothness, Low Noise and Fast Rates", 2010, arXiv 1009.3896, lemma 2.1.
    """
    losses = losses.detach()
    known = torch.where(losses.isfinite(), losses, 0.0)
    return (losses - known.clamp(max=0.0).amin()).sqrt() if len(losses) else losses


def sampling_probabilities(norms: Tensor, smooth: float) -> Tensor:
    r"""Return the probability with which each sample is drawn.

    .. math::
        p_i = \delta \frac{\nu_i}{\sum_j \nu_j} + \frac{1 - \delta}{n}

    With :math:`\delta = 1`, p minimizes the variance of the weighted gradient if the :math:`\nu_i` are the gradient
    norms. A smaller :math:`\delta` gives samples with a small or outdated norm a chance, and limits weights to
    :math:`1 / (1 - \delta)`.

    Args:
        norms: :math:`\nu`, (n,): a number at least 0 for each sample, proportional to its gradient norm.
            nan or inf if it is unknown; the mean of the others takes its place.
        smooth: :math:`\delta`, from 0 (uniform) to 1.

    Returns:
        Tensor: p, (n,), float64 on the CPU, with sum 1; uniform if all norms are 0 or unknown.

    Raises:
        ValueError: If norms is not a vector or one is negative, or smooth is outside [0, 1].

    Example:
        >>> sampling_probabilities(torch.tensor([1.0, 3.0, 0.0, 4.0]), 0.5).tolist()
        [0.1875, 0.3125, 0.125, 0.375]

    References:
        Lu et al., "PA&DA", 2023, arXiv 2302.14772.
    """
    if norms.ndim != 1 or not len(norms):
        raise ValueError(f"norms must have one entry for each sample, (n,); got shape {tuple(norms.shape)}.")
    if not 0.0 <= smooth <= 1.0:
        raise ValueError(f"smooth must be from 0 to 1; got {smooth}.")
    values = norms.detach().to("cpu", torch.float64)
    known = values.isfinite()
    if bool((values[known] < 0.0).any()):
        raise ValueError(f"norms must be at least 0; got {float(values[known].min()):g}.")
    values = torch.where(known, values, values[known].mean()) if bool(known.any()) else torch.ones_like(values)
    total = values.sum()
    if float(total) == 0.0:
        return torch.full_like(values, 1.0 / len(values))
    return smooth * values / total + (1.0 - smooth) / len(values)


def sampling_weights(probabilities: Tensor) -> Tensor:
    r"""Return the weights that make the mean over drawn samples an unbiased estimate of the mean over all samples.

    .. math::
        w_i = \frac{1}{n p_i}, \qquad \mathbb{E}_{i \sim p}[w_i g_i] = \frac 1 n \sum_i g_i

    Args:
        probabilities: p, (n,), over the whole data set.

    Returns:
        Tensor: w, (n,), float32; 0 for samples that are never drawn. The expected weight of a draw is 1.

    Example:
        >>> sampling_weights(torch.tensor([0.5, 0.25, 0.25, 0.0]))
        tensor([0.5000, 1.0000, 1.0000, 0.0000])
    """
    weights = 1.0 / (len(probabilities) * probabilities.double())
    return weights.masked_fill(probabilities == 0.0, 0.0).float()


def draw_samples(probabilities: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw samples with replacement, independently of each other.

    Args:
        probabilities: p, (n,), on the CPU; ``torch.multinomial`` is limited to 2^24 entries, this is not.
        count: Number of draws.
        generator: Generator on the CPU.

    Returns:
        Tensor: (count,) int64: indices, in the order in which they were drawn.

    Example:
        >>> draw_samples(torch.tensor([0.0, 1.0, 0.0]), 4, torch.Generator())
        tensor([1, 1, 1, 1])
    """
    cumulative = probabilities.double().cumsum(0)
    places = torch.rand(count, generator=generator, dtype=torch.float64) * cumulative[-1]
    last = int(probabilities.nonzero()[-1])  # a product may be rounded up to the total
    return torch.searchsorted(cumulative, places, right=True).clamp(max=last)


def variance_ratio(norms: Tensor, probabilities: Tensor) -> float:
    r"""Return the expected squared norm of a weighted draw, relative to a uniform draw.

    .. math::
        \frac{\frac{1}{n^2} \sum_i \nu_i^2 / p_i}{\frac 1 n \sum_i \nu_i^2}

    Its difference from 1 is the change of the gradient's variance, as a share of the mean squared norm, if the norms are
    right.

    Args:
        norms: :math:`\nu`, (n,); unknown ones do not count.
        probabilities: p, (n,).

    Returns:
        float: The ratio, at least 1 / n; 1 if all norms are 0 or unknown.

    Example:
        >>> norms = torch.tensor([1.0, 1.0, 1.0, 5.0])
        >>> [round(variance_ratio(norms, sampling_probabilities(norms, smooth)), 3) for smooth in (0.0, 0.5, 1.0)]
        [1.0, 0.653, 0.571]
    """
    values = norms.detach().to("cpu", torch.float64)
    squares = torch.where(values.isfinite(), values, 0.0).square()
    uniform = float(squares.mean())
    drawn = float((squares / probabilities).nan_to_num(0.0).sum()) / len(values) ** 2
    return drawn / uniform if uniform else 1.0
