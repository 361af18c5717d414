"""All losses as people write them: sums, constants, checkpoints and learned factors here, the others in files of their own."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributions as D
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.functional.gradients import (
    losses_by_hand,
    losses_of_a_batch,
    losses_of_moved_rows,
    losses_of_torch,
    losses_refused,
)
from tests.functional.gradients.catalogue import CASES, REFUSED, Batch, H, absolute, entropies, errors, of
from tests.functional.gradients.losses_by_hand import mae

__all__ = ["CASES", "REFUSED", "REGISTERED"]

# Importing these files registers their losses.
REGISTERED = (losses_by_hand, losses_of_a_batch, losses_of_moved_rows, losses_of_torch, losses_refused)

# Sums of several.


def kl(n: Any, b: Batch) -> Tensor:
    mu, logvar = n(b.x).chunk(2, 1)
    return -0.5 * (1 + logvar - mu**2 - logvar.exp()).sum(1)


def decoded(n: Any, b: Batch) -> Tensor:
    mu, logvar = n(b.x).chunk(2, 1)
    return n.decode(mu + (logvar / 2).exp() * b.e)


@of(lambda n, b: ((decoded(n, b) - b.x) ** 2).mean(1) + kl(n, b))
def vae(n: Any, b: Batch) -> Tensor:
    return F.mse_loss(decoded(n, b), b.x) + kl(n, b).mean()


def posterior(n: Any, b: Batch) -> D.Normal:
    return D.Normal(n(b.x)[:, :4], n(b.x)[:, 4:].exp())


@of(
    lambda n, b: (
        -D.Normal(n.decode(posterior(n, b).mean + posterior(n, b).stddev * b.e), 1.0).log_prob(b.x).sum(1)
        + 0.5 * D.kl_divergence(posterior(n, b), D.Normal(0.0, 1.0)).sum(1)
    )
)
def elbo(n: Any, b: Batch) -> Tensor:
    q = posterior(n, b)
    likelihood = D.Normal(n.decode(q.mean + q.stddev * b.e), 1.0).log_prob(b.x)
    return (-likelihood.sum(1) + 0.5 * D.kl_divergence(q, D.Normal(0.0, 1.0)).sum(1)).mean()


@of(lambda n, b: entropies(n, b) + 0.5 * (n.decode(n(b.x)[:, :4]) - b.y).abs().mean(1))
def two_heads(n: Any, b: Batch) -> Tensor:
    h = n(b.x)
    return F.cross_entropy(h, b.c) + 0.5 * F.l1_loss(n.decode(h[:, :4]), b.y)


@of(lambda n, b: 0.3 * entropies(n, b) + 0.7 * errors(n, b))
def heads_in_a_dict(n: Any, b: Batch) -> Tensor:
    losses = {"class": F.cross_entropy(n(b.x), b.c), "value": F.mse_loss(n(b.x), b.y)}
    return torch.stack([0.3 * losses["class"], 0.7 * losses["value"]]).sum()


@of(lambda n, b: errors(n, b) + (n(b.x) ** 2).mean(1) / 3)
def in_place_sum(n: Any, b: Batch) -> Tensor:
    loss = torch.zeros((), dtype=torch.float64)
    for scale, value in ((1.0, (n(b.x) - b.y) ** 2), (1 / 3, n(b.x) ** 2)):
        loss += scale * value.mean()
    return loss


@of(lambda n, b: absolute(n, b) - 2 * errors(n, b))
def subtracted(n: Any, b: Batch) -> Tensor:
    return 1.0 - (2 * errors(n, b).mean() - absolute(n, b).mean()) - 1.0


@of(lambda n, b: (lambda r: r + r**2 + 2 * r)(errors(n, b)))
def one_tensor_thrice(n: Any, b: Batch) -> Tensor:
    r = errors(n, b)
    return r.mean() + (r**2).mean() + (2 * r).sum() / len(b)


# Constants.


def l2(n: Any, b: Batch) -> Tensor:
    return 1e-2 * sum((p**2).sum() for p in n.six.parameters())


@of(absolute, constant=lambda n, b: l2(n, b) + 1e-2 * sum(p.abs().sum() for p in n.parameters()))
def weight_decay(n: Any, b: Batch) -> Tensor:
    return mae(n, b) + l2(n, b) + 1e-2 * sum(p.abs().sum() for p in n.parameters())


@of(absolute, constant=lambda n, b: 0.1 * torch.cat([p.view(-1) for p in n.parameters()]).norm())
def norm_of_the_weights(n: Any, b: Batch) -> Tensor:
    return mae(n, b) + 0.1 * nn.utils.parameters_to_vector(n.parameters()).norm(2)


def orthogonality(n: Any, b: Batch) -> Tensor:
    return ((n.lin.weight.T @ n.lin.weight - torch.eye(H)) ** 2).sum()


@of(errors, constant=orthogonality)
def orthogonal_weights(n: Any, b: Batch) -> Tensor:
    return F.mse_loss(n(b.x), b.y) + orthogonality(n, b)


@of(absolute, constant=lambda n, b: 3.0 + n(b.x).detach().abs().mean(), solo="")
def numbers_added(n: Any, b: Batch) -> Tensor:
    return mae(n, b) + 3.0 + n(b.x).detach().abs().mean()


# Parts of the step that run elsewhere.


@of(lambda n, b: entropies(n, b) + 0.1 * n(b.x).abs().mean(1))
def checkpointed_network(n: Any, b: Batch) -> Tensor:
    z = checkpoint(n.lin, b.x, use_reentrant=False)
    return F.cross_entropy(z, b.c) + 0.1 * z.abs().mean()


@of(lambda n, b: entropies(n, b) + 0.1 * n(b.x).abs().mean(1))
def checkpointed_loss(n: Any, b: Batch) -> Tensor:
    def head(z: Tensor, c: Tensor) -> Tensor:
        return F.cross_entropy(z, c) + 0.1 * (z.abs() * 1.0).mean()

    return checkpoint(head, n(b.x), b.c, use_reentrant=False)


class Labelled(torch.Tensor):
    """A subclass, as libraries of images have."""


@of(absolute)
def tensor_subclass(n: Any, b: Batch) -> Tensor:
    return (n(b.x.as_subclass(Labelled)) - b.y).abs().mean()


# A learned factor: shares, but no weights.


@of(lambda n, b: n.scales[0].exp() * absolute(n, b), learned="mul")
def learned_scale(n: Any, b: Batch) -> Tensor:
    return n.scales[0].exp() * mae(n, b)


@of(
    lambda n, b: (-n.scales[0]).exp() * errors(n, b) + (-n.scales[1]).exp() * absolute(n, b),
    constant=lambda n, b: n.scales.sum(),
    learned="mul",
)
def uncertainty(n: Any, b: Batch) -> Tensor:
    s = n.scales
    return (-s[0]).exp() * F.mse_loss(n(b.x), b.y) + s[0] + (-s[1]).exp() * mae(n, b) + s[1]


@of(lambda n, b: F.gaussian_nll_loss(n(b.x), b.y, n.scales[0].exp().expand(len(b), 1), reduction="none").mean(1))
def learned_variance(n: Any, b: Batch) -> Tensor:
    return F.gaussian_nll_loss(n(b.x), b.y, n.scales[0].exp().expand(len(b), 1))
