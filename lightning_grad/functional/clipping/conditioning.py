"""Changing gradients, or the optimizer's memory of them, without clipping: centralization, noise, momentum reset.

Clipping is in :mod:`lightning_grad.functional.clipping.clipping`. The callbacks of both are in
:mod:`lightning_grad.callbacks.clipping`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_grad.functional.gradients.tensor_lists import any_rank, is_sharded, shards, stack_norms
from lightning_grad.functional.torch_version import TORCH

_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


@torch.no_grad()
def centralize_(gradients: Sequence[Tensor], conv_only: bool = False, output_dims: Sequence[int] | None = None) -> None:
    r"""Take from each gradient the mean over all its dimensions but the one that counts the outputs.

    .. math::
        G_i \leftarrow G_i - \frac{1}{M} \sum_{j=1}^{M} G_{ij}

    i counts the outputs of a layer (of a ConvTranspose the inputs), j all else. Vectors and scalars stay as they are.

    Args:
        gradients: G, tensors of any shape; changed in place.
        conv_only: Leave matrices (Linear, Embedding) alone too.
        output_dims: For each gradient the dimension i; ``None`` is the first of all.

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
    # In torch 2.6 gloo cannot average over shards, in 2.13 it can.
    if TORCH < (2, 13) and is_sharded(gradient):
        return gradient.sum(dim=dims, keepdim=True) / math.prod(gradient.shape[d] for d in dims)
    return gradient.mean(dim=dims, keepdim=True)


def noise_deviation(step: int, eta: float = 0.01, decay: float = 0.55) -> float:
    r"""Return the standard deviation of annealed gradient noise.

    .. math::
        \sigma_t = \sqrt{\frac{\eta}{(1 + t)^\gamma}}

    Args:
        step: t, the number of optimizer steps before this one.
        eta: :math:`\eta`, variance at the first step; the paper tries 0.01, 0.3 and 1.
        decay: :math:`\gamma`.

    Example:
        >>> noise_deviation(0, eta=0.01)
        0.1

    References:
        Neelakantan et al., "Adding Gradient Noise Improves Learning for Very Deep Networks", 2015, arXiv 1511.06807,
        equation 1.
    """
    return math.sqrt(eta / (1.0 + step) ** decay)


@torch.no_grad()
def add_gradient_noise_(gradients: Sequence[Tensor], deviation: float, seed: int) -> None:
    r"""Add Gaussian noise to gradients, the same for the same seed on every rank.

    .. math::
        g \leftarrow g + \mathcal N(0, \sigma^2)

    Torch's global random state is not touched. Every rank draws the noise of whole gradients, also where it holds a shard.

    Args:
        gradients: Tensors of any shape; changed in place.
        deviation: :math:`\sigma`.
        seed: Of this draw; another one for each step.

    Example:
        >>> a, b = torch.zeros(3), torch.zeros(3)
        >>> add_gradient_noise_([a], 0.1, seed=1), add_gradient_noise_([b], 0.1, seed=1)
        (None, None)
        >>> torch.equal(a, b), bool(a.abs().sum() > 0)
        (True, True)
    """
    generators: dict[torch.device, torch.Generator] = {}
    for gradient in gradients:
        device = gradient.device
        if device not in generators:
            generators[device] = torch.Generator(device).manual_seed(seed + len(generators))
        dtype = torch.promote_types(gradient.dtype, torch.float32)
        noise = torch.randn(gradient.shape, generator=generators[device], device=device, dtype=dtype)
        gradient.add_(_shard_like(noise, gradient), alpha=deviation)


def _shard_like(tensor: Tensor, like: Any) -> Tensor:
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

    # Every rank takes its shard of what it has drawn itself; torch before 2.7 cannot be told to do so while distributing.
    if TORCH < (2, 7):
        whole = DTensor.from_local(tensor, like.device_mesh, [Replicate()] * like.device_mesh.ndim, run_check=False)
        return whole.redistribute(placements=like.placements)
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def nonfinite(gradients: Sequence[Tensor]) -> Tensor:
    """Say of each gradient whether it holds a nan or an infinity.

    By the largest magnitude, which cannot overflow as a sum of squares does.

    Args:
        gradients: At least one tensor, each of any shape.

    Returns:
        Tensor: (gradients,) bool, the same on every rank for DTensors.

    Example:
        >>> nonfinite([torch.tensor([1.0, 3e38, 3e38]), torch.tensor([torch.nan])])
        tensor([False,  True])
    """
    # Flags are reduced, and not the magnitudes: the maximum over ranks can lose a nan.
    return any_rank(~stack_norms(shards(gradients), torch.inf).isfinite(), gradients)


@torch.no_grad()
def reset_moments_(states: Sequence[Mapping[str, Any]]) -> None:
    r"""Set the running moments of an Adam-like optimizer to zero, AMSGrad's largest ones too.

    Its step count stays, so the bias is not corrected again: the first update after it is up to
    :math:`(1 - \beta_1) / \sqrt{1 - \beta_2}` learning rates large (3.2 with Adam's defaults), which is what the
    warm-up of :func:`reset_warmup` is for.

    Args:
        states: What ``optimizer.state[parameter]`` holds, for each parameter; moments are set to zero in place.

    Example:
        >>> state = {"step": torch.tensor(3.0), "exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2)}
        >>> reset_moments_([state])
        >>> state["exp_avg"], state["exp_avg_sq"], state["step"]
        (tensor([0., 0.]), tensor([0., 0.]), tensor(3.))
    """
    moments = [state[key] for state in states for key in _MOMENTS if key in state]
    if moments:
        torch._foreach_zero_(shards(moments))


def reset_warmup(steps: int, warmup: int = 150) -> float:
    r"""Return the factor of the learning rate after a reset of the moments.

    .. math::
        s_k = 1 - 0.99 \cdot \frac{1 + \cos(\pi k / (T + 1))}{2} \text{ for } k < T, \quad 1 \text{ from } T \text{ on}

    Args:
        steps: k, optimizer steps since the reset; 0 is the step that begins with moments of zero.
        warmup: T, length of the warm-up in optimizer steps.

    Example:
        >>> round(reset_warmup(0), 4), reset_warmup(150)
        (0.01, 1.0)

    References:
        Huang et al., 2025, arXiv 2501.06842, and the ``CosineDecay`` of its released code.
    """
    if steps >= warmup:
        return 1.0
    return 1.0 - 0.99 * (1.0 + math.cos(math.pi * steps / (warmup + 1))) / 2.0
