"""Adversarial attacks: find perturbations in a small ball that raise the loss, by its gradient."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_grad.functional.choices import check_choice

Norm = Literal["linf", "l2"]
_FGSM_STEP = 1.25  # of epsilon, after a random start (Wong et al. 2020: 10/255 for 8/255)
_PGD_STEP = 2.5  # of epsilon / steps (Madry et al. 2018, released code of the MNIST and CIFAR-10 challenges)


class IndependentLossError(RuntimeError):
    """Raised if the loss does not depend on the inputs, so no attack can raise it."""


def attack_direction(gradient: Tensor, norm: Norm = "linf") -> Tensor:
    r"""Return the unit step that increases a linear function most.

    .. math::
        \operatorname{sign}(g) \;(\ell_\infty), \qquad g_i / \lVert g_i \rVert_2 \;(\ell_2, \text{each sample } i)

    Args:
        gradient: Gradient g, (B, ...).
        norm: Norm in which the step has length 1.

    Returns:
        Tensor: (B, ...), zero for nan entries, and for samples with zero gradient.

    Example:
        >>> attack_direction(torch.tensor([[3.0, -4.0]])), attack_direction(torch.tensor([[3.0, -4.0]]), "l2")
        (tensor([[ 1., -1.]]), tensor([[ 0.6000, -0.8000]]))

    References:
        Goodfellow et al., "Explaining and Harnessing Adversarial Examples", 2015, arXiv 1412.6572, section 4; Madry et
        al., "Towards Deep Learning Models Resistant to Adversarial Attacks", 2018, arXiv 1706.06083.
    """
    gradient = gradient.nan_to_num(nan=0.0)  # an infinity becomes the largest number
    if norm == "linf":
        return gradient.sign()
    # Divide by the largest entry first: the squares of small gradients underflow, and the squares of large ones overflow.
    scaled = gradient / _each(_rows(gradient.abs()).amax(1), gradient).clamp(min=torch.finfo(gradient.dtype).tiny)
    return scaled / _norms(scaled).clamp(min=torch.finfo(gradient.dtype).tiny)


def project_perturbation(perturbation: Tensor, epsilon: float, norm: Norm = "linf") -> Tensor:
    """Return the nearest perturbation whose norm is at most ``epsilon``.

    Args:
        perturbation: Perturbation of each sample, (B, ...).
        epsilon: Radius of the ball.
        norm: Norm of the ball.

    Returns:
        Tensor: (B, ...).

    Example:
        >>> perturbation = torch.tensor([[3.0, -4.0]])
        >>> project_perturbation(perturbation, 1.0), project_perturbation(perturbation, 1.0, "l2")
        (tensor([[ 1., -1.]]), tensor([[ 0.6000, -0.8000]]))
    """
    if norm == "linf":
        return perturbation.clamp(-epsilon, epsilon)
    least = torch.finfo(perturbation.dtype).tiny
    return perturbation * (epsilon / _norms(perturbation).clamp(min=max(epsilon, least)))


def random_perturbation(
    like: Tensor, epsilon: float, norm: Norm = "linf", generator: torch.Generator | None = None
) -> Tensor:
    """Draw perturbations uniformly from a ball.

    Args:
        like: Tensor with the shape (B, ...), dtype and device of the result.
        epsilon: Radius of the ball.
        norm: Norm of the ball.
        generator: Random generator on the same device.

    Returns:
        Tensor: (B, ...).

    Example:
        >>> drawn = random_perturbation(torch.zeros(1000, 3), 0.5, "l2")
        >>> bool((drawn.norm(dim=1) <= 0.5001).all())
        True
    """
    if norm == "linf":
        return torch.empty_like(like).uniform_(-epsilon, epsilon, generator=generator)
    direction = torch.empty_like(like).normal_(generator=generator)
    share = torch.rand(len(like), dtype=like.dtype, device=like.device, generator=generator)
    radius = epsilon * share ** (1.0 / max(1, like[0].numel()))  # volume grows as radius ** dimension
    return attack_direction(direction, "l2") * _each(radius, like)


def pgd(
    loss_of: Callable[[Tensor], Tensor],
    inputs: Tensor,
    epsilon: float,
    steps: int = 10,
    step_size: float | None = None,
    norm: Norm = "linf",
    random_start: bool = True,
    bounds: tuple[float, float] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    generator: torch.Generator | None = None,
    support: Tensor | None = None,
) -> Tensor:
    r"""Attack inputs by projected gradient ascent.

    .. math::
        \delta_{t+1} = \Pi_{\lVert \delta \rVert \le \epsilon,\; x + \delta \in [l, u]}
            \bigl(\delta_t + \alpha\, d(\nabla_x L(x + \delta_t))\bigr)

    where d is :func:`attack_direction`, and :math:`\Pi` is :func:`project_perturbation` followed by clamping to the
    bounds. With ``mean`` and ``std``, inputs are assumed to be (pixel - mean) / std, and :math:`\epsilon`,
    :math:`\alpha`, l and u are in pixel units. Gradients of parameters are not changed.

    Args:
        loss_of: Function that returns the loss of inputs (B, ...), summed or averaged over samples.
        inputs: Inputs x, (B, ...), floating-point.
        epsilon: Radius of the ball.
        steps: Number of ascent steps.
        step_size: Step size alpha. Default: 2.5 epsilon / steps.
        norm: Norm of the ball.
        random_start: Start at a random point of the ball instead of at x.
        bounds: Smallest and largest value (l, u) of an input.
        mean: Mean used to normalize the inputs, one per channel (dimension 1), or a single value.
        std: Standard deviation used to normalize the inputs, like ``mean``.
        generator: Random generator of the start, on the inputs' device.
        support: Mask of the input entries that may change, 1 or 0, broadcastable. Default: all.

    Returns:
        Tensor: Attacked inputs, (B, ...), detached; the given tensor itself if epsilon is 0 or the batch is empty.

    Raises:
        ValueError: For an unknown norm, steps below 1, mean without std, or numbers that are not finite or out of
            range.
        RuntimeError: In inference mode, and for inputs created in it: they have no gradient.
        IndependentLossError: If the loss does not depend on the inputs; it is a RuntimeError.

    Example:
        >>> weight = torch.tensor([2.0, -1.0])
        >>> pgd(lambda x: (x @ weight).sum(), torch.zeros(1, 2), epsilon=0.1, random_start=False)
        tensor([[ 0.1000, -0.1000]])

    References:
        Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", 2018, arXiv 1706.06083, equation
        2.
    """
    _check_settings(epsilon, steps, norm, mean, std)
    _check_numbers(step_size, bounds, mean, std)
    if epsilon == 0.0 or inputs.numel() == 0:
        return inputs
    _refuse_inference(inputs)
    step_size = _PGD_STEP * epsilon / steps if step_size is None else step_size
    space = _Pixels(inputs.detach(), bounds, mean, std)
    start = torch.zeros_like(space.inputs)
    begin = random_perturbation(start, epsilon, norm, generator) if random_start else start
    perturbation = space.clamp(begin if support is None else begin * support)
    for _ in range(steps):
        gradient = space.gradient(loss_of, perturbation)
        gradient = gradient if support is None else gradient * support
        raised = perturbation + step_size * attack_direction(gradient, norm)
        perturbation = space.clamp(project_perturbation(raised, epsilon, norm))
    return space.at(perturbation)


def fgsm(
    loss_of: Callable[[Tensor], Tensor],
    inputs: Tensor,
    epsilon: float,
    step_size: float | None = None,
    norm: Norm = "linf",
    random_start: bool = True,
    bounds: tuple[float, float] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    generator: torch.Generator | None = None,
    support: Tensor | None = None,
) -> Tensor:
    """Attack inputs in one step (fast gradient sign method): :func:`pgd` with ``steps=1``.

    Args:
        loss_of: Function that returns the loss of inputs (B, ...), summed or averaged over samples.
        inputs: Inputs, (B, ...), floating-point.
        epsilon: Radius of the ball.
        step_size: Size of the step. Default: 1.25 epsilon with a random start, else epsilon.
        norm: Norm of the ball.
        random_start: Start at a random point of the ball.
            Without it, a network trained on this attack soon overfits to it.
        bounds: Smallest and largest value of an input.
        mean: Mean used to normalize the inputs.
        std: Standard deviation used to normalize the inputs.
        generator: Random generator of the start, on the inputs' device.
        support: Mask of the input entries that may change. Default: all.

    Returns:
        Tensor: Attacked inputs, (B, ...).

    Raises:
        ValueError: As in :func:`pgd`.
        RuntimeError: As in :func:`pgd`.
        IndependentLossError: If the loss does not depend on the inputs; it is a RuntimeError.

    Example:
        >>> weight = torch.tensor([2.0, -1.0])
        >>> fgsm(lambda x: (x @ weight).sum(), torch.zeros(1, 2), epsilon=0.1, random_start=False)
        tensor([[ 0.1000, -0.1000]])

    References:
        Goodfellow et al., 2015, arXiv 1412.6572, section 4. Random start and step size: Wong et al., "Fast is better
        than free: Revisiting adversarial training", 2020, arXiv 2001.03994, algorithm 3.
    """
    default = _FGSM_STEP * epsilon if random_start else epsilon
    step_size = default if step_size is None else step_size
    return pgd(loss_of, inputs, epsilon, 1, step_size, norm, random_start, bounds, mean, std, generator, support)


def _check_settings(
    epsilon: float, steps: int, norm: str, mean: Sequence[float] | None, std: Sequence[float] | None
) -> None:
    check_choice(norm, get_args(Norm), "norm")
    if steps < 1:
        raise ValueError(f"steps must be at least 1; got {steps}.")
    if not (math.isfinite(epsilon) and epsilon >= 0.0):
        raise ValueError(f"epsilon must be finite and at least 0; got {epsilon}.")
    if (mean is None) != (std is None):
        raise ValueError(f"mean and std must be set together; got mean={mean} and std={std}.")


def _check_numbers(
    step_size: float | None,
    bounds: tuple[float, float] | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> None:
    if step_size is not None and not (math.isfinite(step_size) and step_size >= 0.0):
        raise ValueError(f"step_size must be finite and at least 0; got {step_size}.")
    if bounds is not None and not bounds[0] < bounds[1]:
        raise ValueError(f"bounds must be the smallest and the largest value of an input; got {bounds}.")
    if mean is not None and not all(map(math.isfinite, mean)):
        raise ValueError(f"mean must be finite; got {list(mean)}.")
    if std is not None and not all(math.isfinite(value) and value > 0.0 for value in std):
        raise ValueError(f"std must be finite and above 0; got {list(std)}.")


def _refuse_inference(inputs: Tensor) -> None:
    if torch.is_inference_mode_enabled() or inputs.is_inference():
        raise RuntimeError(
            "An attack needs gradients, which inference mode and tensors created in it do not have. Wrap the attack in "
            "`with torch.inference_mode(False):`, and clone there the inputs and all other tensors created in it."
        )


class _Pixels:
    """Inputs with epsilon and bounds in pixel units. Perturbations are in pixel units too, float32 or float64."""

    def __init__(
        self,
        inputs: Tensor,
        bounds: tuple[float, float] | None,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
    ) -> None:
        self._type = inputs.dtype
        self.inputs = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
        self._std = None if std is None else _by_channel(std, self.inputs)
        self._bounds: tuple[Any, Any] | None = bounds  # of the inputs as they are
        if bounds is not None and (mean is not None or self._std is not None):
            shift = 0.0 if mean is None else _by_channel(mean, self.inputs)
            low, high = ((bound - shift) / (1.0 if self._std is None else self._std) for bound in bounds)
            self._bounds = (low, high)

    def at(self, perturbation: Tensor) -> Tensor:
        moved = self.inputs + (perturbation if self._std is None else perturbation / self._std)
        return (moved if self._bounds is None else moved.clamp(*self._bounds)).to(self._type)

    def clamp(self, perturbation: Tensor) -> Tensor:
        if self._bounds is None:
            return perturbation
        scale = 1.0 if self._std is None else self._std
        low, high = ((bound - self.inputs) * scale for bound in self._bounds)
        return perturbation.clamp(low, high)

    def gradient(self, loss_of: Callable[[Tensor], Tensor], perturbation: Tensor) -> Tensor:
        with torch.enable_grad():
            point = self.at(perturbation).requires_grad_(True)
            loss = loss_of(point).sum()
            found = torch.autograd.grad(loss, point, allow_unused=True)[0] if loss.requires_grad else None
        if found is None:
            raise IndependentLossError("The loss does not depend on the inputs, so no attack on them can raise it.")
        return found.to(self.inputs.dtype) / (1.0 if self._std is None else self._std)


def _by_channel(values: Sequence[float], inputs: Tensor) -> Tensor:
    own = torch.tensor(list(values), dtype=inputs.dtype, device=inputs.device)
    return own if len(own) == 1 else own.view(1, -1, *[1] * (inputs.dim() - 2))


def _each(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.dim() - 1))


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(len(tensor), -1)


def _norms(tensor: Tensor) -> Tensor:
    return _each(torch.linalg.vector_norm(_rows(tensor), dim=1), tensor)
