"""Statistics of gradients: noise scale, cosine to the previous step, signal-to-noise ratio, share of zeros.

The callback that logs them is :class:`lightning_grad.callbacks.GradientMonitor`.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lightning_grad.functional.gradients.tensor_lists import share_of, stack, stack_norms, whole


def noise_scale_terms(small_squared: Tensor, big_squared: Tensor, small: float, big: float) -> tuple[Tensor, Tensor]:
    r"""Estimate noise and signal of the gradient without bias, from its norms at two batch sizes.

    .. math::
        S = \frac{\lVert g_b \rVert^2 - \lVert g_B \rVert^2}{1/b - 1/B}, \qquad
        \mathcal G = \frac{B \lVert g_B \rVert^2 - b \lVert g_b \rVert^2}{B - b}

    S estimates the trace of the covariance of per-sample gradients, and :math:`\mathcal G` the squared norm of the true
    gradient. The ratio of their averages over steps is the simple noise scale, in samples: below this batch size noise
    dominates, and above it larger batches bring little.

    Args:
        small_squared: Squared norm of a gradient over b samples, a scalar.
            Average it over all such parts of the batch for less variance.
        big_squared: Squared norm of the gradient over all B samples, a scalar.
        small: b, in samples.
        big: B, in samples, above b.

    Returns:
        tuple: S and :math:`\mathcal G`, scalars; either estimate can be negative.

    Raises:
        ValueError: Unless 0 < b < B.

    Example:
        >>> noise, signal = noise_scale_terms(torch.tensor(3.0), torch.tensor(2.0), small=1, big=2)
        >>> noise.item(), signal.item()
        (2.0, 1.0)

    References:
        McCandlish et al., "An Empirical Model of Large-Batch Training", 2018, arXiv 1812.06162, appendix A.1.
    """
    if not 0 < small < big:
        raise ValueError(f"small must be above 0 and below big; got small={small} and big={big}.")
    noise = (small_squared - big_squared) / (1 / small - 1 / big)
    signal = (big * big_squared - small * small_squared) / (big - small)
    return noise, signal


def average_noise_terms(before: Tensor | None, terms: Tensor, decay: float) -> Tensor:
    """Return exponential moving averages of the terms of the noise scale; non-finite terms are ignored.

    Args:
        before: Previous averages of noise and signal, (2,); ``None`` before the first terms.
        terms: The terms of :func:`noise_scale_terms`, (2,).
        decay: Weight of the previous averages.

    Example:
        >>> averages = average_noise_terms(None, torch.tensor([float("nan"), 1.0]), decay=0.5)
        >>> averages = average_noise_terms(averages, torch.tensor([2.0, 1.0]), decay=0.5)
        >>> average_noise_terms(averages, torch.tensor([4.0, 3.0]), decay=0.5)
        tensor([3., 2.])
    """
    before = torch.full_like(terms, math.nan) if before is None else before.to(terms.device)
    mixed = torch.where(before.isfinite().all(), decay * before + (1 - decay) * terms, terms)
    return torch.where(terms.isfinite().all(), mixed, before)


def _components(tensor: Tensor) -> Tensor:
    """Return a tensor in float32, a complex one as its real and imaginary parts."""
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).float()


@torch.no_grad()
def gradient_cosine(gradients: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    r"""Return the cosine of the angle between two gradients, each concatenated into one vector.

    .. math::
        \cos(g, g') = \frac{\langle g, g' \rangle}{\lVert g \rVert \lVert g' \rVert}

    Args:
        gradients: g, at least one tensor.
        others: g', of the same shapes.

    Returns:
        Tensor: The cosine, a scalar, -1 to 1; nan if either gradient is zero.

    Example:
        >>> gradient_cosine([torch.tensor([1.0, 0.0])], [torch.tensor([2.0, 0.0])])
        tensor(1.)
    """
    products = [(_components(g) * _components(o)).sum() for g, o in zip(gradients, others, strict=True)]
    product = stack([whole(value) for value in products]).sum()
    lengths = [torch.linalg.vector_norm(stack_norms(tensors)) for tensors in (gradients, others)]
    cosine: Tensor = product / lengths[0] / lengths[1]
    return cosine


@torch.no_grad()
def moment_signal_to_noise(states: Sequence[Mapping[str, Any]], betas: tuple[float, float]) -> Tensor | None:
    r"""Estimate the signal-to-noise ratio of gradients from Adam's moments.

    .. math::
        \mathrm{SNR} = \frac{\sum_i \hat m_i^2}{\sum_i \max(\hat v_i - \hat m_i^2, 0)}

    where :math:`\hat m` and :math:`\hat v` are the bias-corrected running means of the gradient and of its square. They
    average over different numbers of steps, so the ratio is a rough measure, useful to compare layers and times.

    Args:
        states: ``optimizer.state[parameter]`` of each parameter.
        betas: Decay rates of the two moments.

    Returns:
        Tensor: The ratio, a scalar; ``None`` if the optimizer has no such moments.

    Example:
        >>> state = {"step": torch.tensor(1.0), "exp_avg": torch.tensor([0.1]), "exp_avg_sq": torch.tensor([0.002])}
        >>> round(moment_signal_to_noise([state], (0.9, 0.999)).item(), 4)
        1.0
    """
    signal, noise = [], []
    for state in states:
        if "exp_avg" not in state or "exp_avg_sq" not in state:
            continue
        step = state["step"] if isinstance(state["step"], Tensor) else torch.tensor(float(state["step"]))
        first, second = (1 - beta ** step.to(state["exp_avg"].device) for beta in betas)
        mean = (_components(state["exp_avg"]) / first).square()
        signal.append(whole(mean.sum()))
        noise.append(whole((_components(state["exp_avg_sq"]) / second - mean).clamp(min=0.0).sum()))
    return torch.stack(signal).sum() / torch.stack(noise).sum() if signal else None


@torch.no_grad()
def zero_share(gradients: Sequence[Tensor]) -> Tensor:
    """Return the fraction of entries of all gradients that are exactly zero, as a scalar.

    Example:
        >>> zero_share([torch.tensor([0.0, 1.0]), torch.tensor([2.0, 3.0])])
        tensor(0.2500)
    """
    return share_of(gradient == 0 for gradient in gradients)


def learning_rate_sensitivity(final_losses: Mapping[float, float], initial_loss: float) -> float:
    r"""Return how much the final loss depends on the learning rate.

    .. math::
        \mathbb E_{\eta}\bigl[\min(\ell(\eta), \ell_0)\bigr] - \min_\eta \ell(\eta)

    where :math:`\ell(\eta)` is the final loss of a run with learning rate :math:`\eta`, and :math:`\ell_0` the loss at
    initialization. The mean is over :math:`\log \eta`, by the trapezoidal rule. A diverged run counts as
    :math:`\ell_0`. Compare it between models over the same range of rates.

    Args:
        final_losses: Final loss of each run by its learning rate; nan and infinity if it diverged.
        initial_loss: :math:`\ell_0`.

    Raises:
        ValueError: For fewer than two learning rates, one that is not above 0, or if all runs diverged.

    Example:
        >>> round(learning_rate_sensitivity({1e-3: 1.0, 1e-2: 0.5, 1e-1: float("nan")}, initial_loss=2.0), 6)
        0.5

    References:
        Wortsman et al., "Small-scale proxies for large-scale Transformer training instabilities", 2023, arXiv 2309.14322,
        section 2.2.
    """
    rates = sorted(final_losses)
    if len(rates) < 2 or rates[0] <= 0:
        raise ValueError(f"final_losses must have at least two learning rates above 0; got {rates}.")
    losses = [
        min(final_losses[rate], initial_loss) if math.isfinite(final_losses[rate]) else initial_loss for rate in rates
    ]
    if not any(math.isfinite(final_losses[rate]) for rate in rates):
        raise ValueError("All runs diverged. Add runs with smaller learning rates.")
    logs = [math.log(rate) for rate in rates]
    areas = [(b - a) * (x + y) / 2 for (a, b), (x, y) in zip(pairwise(logs), pairwise(losses), strict=True)]
    return sum(areas) / (logs[-1] - logs[0]) - min(losses)
