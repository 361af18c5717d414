"""Losses as people write them, each with what its samples contribute, written by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.distributions as D
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

B, T, V, H = 6, 5, 7, 8
QUANTILES = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
CLASS_WEIGHTS = torch.linspace(0.5, 2, H, dtype=torch.float64)


class Net(nn.Module):
    """Some layers in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(H, H)
        self.decode = nn.Linear(4, H)
        self.tokens = nn.Embedding(9, V)
        self.six = nn.Linear(H, B)
        self.scales = nn.Parameter(torch.tensor([0.3, -0.2]))
        self.cls = nn.Parameter(torch.randn(1, 1, V))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x)


@dataclass(frozen=True)
class Batch:
    """A batch of B samples."""

    x: Tensor
    y: Tensor
    e: Tensor
    c: Tensor
    s: Tensor
    t: Tensor
    m: Tensor

    def __getitem__(self, index: Any) -> Batch:
        return replace(self, **{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def __len__(self) -> int:
        return len(self.x)


def make_batch(seed: int = 1, samples: int = B, time: int = T) -> Batch:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    lengths = torch.randint(1, time + 1, (samples,), generator=g)
    lengths[0] = time
    return Batch(
        x=normal(samples, H),
        y=normal(samples, H),
        e=normal(samples, 4),
        c=torch.randint(0, H, (samples,), generator=g),
        s=torch.randint(0, 9, (samples, time), generator=g),
        t=torch.randint(0, V, (samples, time), generator=g),
        m=torch.arange(time)[None] < lengths[:, None],
    )


Step = Callable[[Any, Batch], Tensor]


def zero(n: Any, b: Batch) -> Tensor:
    return torch.zeros((), dtype=torch.float64)


@dataclass(frozen=True)
class Case:
    """A loss that is a mean of shares and a constant."""

    loss: Step
    shares: Step
    constant: Step = zero
    learned: str = ""  # the factor for which weights are refused
    solo: str = "both"  # which of "own", "share" is the loss of the sample alone
    tolerance: float = 1e-12


CASES: dict[str, Case] = {}
REFUSED: dict[str, tuple[Step, str]] = {}


def of(shares: Step, **options: Any) -> Callable[[Step], Step]:
    """Register a loss with the shares of its samples."""

    def register(loss: Step) -> Step:
        CASES[loss.__name__] = Case(loss, shares, **options)
        return loss

    return register


def refused(words: str) -> Callable[[Step], Step]:
    """Register a loss that is no sum over samples, or not known to be one."""

    def register(loss: Step) -> Step:
        REFUSED[loss.__name__] = (loss, words)
        return loss

    return register


def errors(n: Any, b: Batch) -> Tensor:
    return ((n(b.x) - b.y) ** 2).mean(1)


def absolute(n: Any, b: Batch) -> Tensor:
    return (n(b.x) - b.y).abs().mean(1)


def entropies(n: Any, b: Batch) -> Tensor:
    return F.cross_entropy(n(b.x), b.c, reduction="none")


def token_losses(n: Any, b: Batch) -> Tensor:
    return F.cross_entropy(n.tokens(b.s).transpose(1, 2), b.t, reduction="none")


def masked_shares(n: Any, b: Batch) -> Tensor:
    return (token_losses(n, b) * b.m).sum(1) * len(b) / b.m.sum()


# Functions of torch.nn.functional.


@of(errors)
def mse(n: Any, b: Batch) -> Tensor:
    return F.mse_loss(n(b.x), b.y)


@of(lambda n, b: errors(n, b) * H)
def mse_sum_over_b(n: Any, b: Batch) -> Tensor:
    return F.mse_loss(n(b.x), b.y, reduction="sum") / len(b)


@of(lambda n, b: F.smooth_l1_loss(n(b.x), b.y, reduction="none").mean(1))
def smooth_l1(n: Any, b: Batch) -> Tensor:
    return nn.SmoothL1Loss()(n(b.x), b.y)


@of(entropies)
def cross_entropy(n: Any, b: Batch) -> Tensor:
    return F.cross_entropy(n(b.x), b.c)


@of(
    lambda n, b: (
        F.cross_entropy(n(b.x), b.c, CLASS_WEIGHTS, label_smoothing=0.1, reduction="none")
        * len(b)
        / CLASS_WEIGHTS[b.c].sum()
    ),
    solo="own",
)
def class_weights_smoothed(n: Any, b: Batch) -> Tensor:
    return F.cross_entropy(n(b.x), b.c, CLASS_WEIGHTS, label_smoothing=0.1)


@of(lambda n, b: F.cross_entropy(n(b.x), b.y.softmax(1), reduction="none"))
def soft_labels(n: Any, b: Batch) -> Tensor:
    return F.cross_entropy(n(b.x), b.y.softmax(1))


@of(lambda n, b: F.binary_cross_entropy_with_logits(n(b.x), b.y.sigmoid(), reduction="none").mean(1))
def multilabel(n: Any, b: Batch) -> Tensor:
    return F.binary_cross_entropy_with_logits(n(b.x), b.y.sigmoid())


@of(lambda n, b: F.kl_div(n(b.x).log_softmax(1), b.y.softmax(1), reduction="none").sum(1))
def distillation(n: Any, b: Batch) -> Tensor:
    return F.kl_div(n(b.x).log_softmax(1), b.y.softmax(1), reduction="batchmean")


@of(lambda n, b: F.triplet_margin_loss(n(b.x), b.x, b.y, reduction="none"))
def triplet(n: Any, b: Batch) -> Tensor:
    return F.triplet_margin_loss(n(b.x), b.x, b.y)


@of(lambda n, b: F.gaussian_nll_loss(n(b.x), b.y, n(b.y).exp(), reduction="none").mean(1))
def gaussian_nll(n: Any, b: Batch) -> Tensor:
    return F.gaussian_nll_loss(n(b.x), b.y, n(b.y).exp())


def ctc_arguments(n: Any, b: Batch) -> tuple[Tensor, ...]:
    lengths = (torch.full((len(b),), b.s.shape[1]), b.c % 2 + 1)
    return n.tokens(b.s).log_softmax(2).transpose(0, 1), b.t[:, :2].clamp(1), *lengths


@of(lambda n, b: F.ctc_loss(*ctc_arguments(n, b), reduction="none") / ctc_arguments(n, b)[3])
def ctc(n: Any, b: Batch) -> Tensor:
    return F.ctc_loss(*ctc_arguments(n, b))


@of(masked_shares, solo="own")
def tokens_ignored(n: Any, b: Batch) -> Tensor:
    return F.cross_entropy(n.tokens(b.s).reshape(-1, V), b.t.masked_fill(~b.m, -100).reshape(-1))


@of(lambda n, b: token_losses(n, b).mean(1))
def segmentation(n: Any, b: Batch) -> Tensor:
    return F.cross_entropy(n.tokens(b.s).transpose(1, 2), b.t)


@of(lambda n, b: token_losses(n, b).mean(1))
def own_reduction(n: Any, b: Batch) -> Tensor:
    return F.cross_entropy(n.tokens(b.s).transpose(1, 2), b.t, reduction="none").mean()


# By hand.


@of(absolute)
def mae(n: Any, b: Batch) -> Tensor:
    return (n(b.x) - b.y).abs().mean()


def quantile_errors(n: Any, b: Batch) -> Tensor:
    error = b.y[:, :1, None] - n(b.x)[:, None, :3]
    return torch.max((QUANTILES - 1) * error, QUANTILES * error)


@of(lambda n, b: quantile_errors(n, b).sum(2).mean(1))
def quantile(n: Any, b: Batch) -> Tensor:
    return quantile_errors(n, b).sum(dim=-1).mean()


@of(lambda n, b: quantile_errors(n, b).sum(2).mean(1))
def quantile_loop(n: Any, b: Batch) -> Tensor:
    losses = []
    for i, q in enumerate((0.1, 0.5, 0.9)):
        error = b.y[:, :1] - n(b.x)[..., i : i + 1]
        losses.append(torch.max((q - 1) * error, q * error).unsqueeze(-1))
    return torch.cat(losses, dim=2).sum(2).mean()


@of(lambda n, b: (1 - (-entropies(n, b)).exp()) ** 2 * entropies(n, b))
def focal(n: Any, b: Batch) -> Tensor:
    entropy = F.cross_entropy(n(b.x), b.c, reduction="none")
    return ((1 - torch.exp(-entropy)) ** 2 * entropy).mean()


@of(lambda n, b: (n(b.x) - b.y).cosh().log().mean(1))
def log_cosh(n: Any, b: Batch) -> Tensor:
    return torch.log(torch.cosh(n(b.x) - b.y)).mean()


@of(lambda n, b: 2 * (n(b.x) - b.y).abs().mean(1) / (n(b.x).abs() + b.y.abs()).mean(1))
def smape(n: Any, b: Batch) -> Tensor:
    z = n(b.x)
    return (2 * (z - b.y).abs().mean(dim=1) / (z.abs() + b.y.abs()).mean(dim=1)).mean()


@of(masked_shares, solo="own")
def masked_mean(n: Any, b: Batch) -> Tensor:
    mask = b.m.double()
    return (token_losses(n, b) * mask).sum() / mask.sum()


@of(lambda n, b: (token_losses(n, b) * b.m).sum(1) / b.m.sum(1))
def masked_each(n: Any, b: Batch) -> Tensor:
    return ((token_losses(n, b) * b.m).sum(1) / b.m.sum(1)).mean()


@of(masked_shares, solo="own")
def masked_fill(n: Any, b: Batch) -> Tensor:
    return token_losses(n, b).masked_fill(~b.m, 0.0).sum() / b.m.sum()


@of(masked_shares, solo="own")
def where_mask(n: Any, b: Batch) -> Tensor:
    return torch.where(b.m, token_losses(n, b), torch.zeros(())).sum() / b.m.sum()


@of(masked_shares, solo="own")
def mask_index(n: Any, b: Batch) -> Tensor:
    return token_losses(n, b)[b.m].mean()


@of(masked_shares, solo="own")
def index_first(n: Any, b: Batch) -> Tensor:
    return F.cross_entropy(n.tokens(b.s)[b.m], b.t[b.m])


@of(masked_shares, solo="own")
def index_first_by_hand(n: Any, b: Batch) -> Tensor:
    logp = n.tokens(b.s).log_softmax(-1)[b.m]
    return -logp[torch.arange(len(logp)), b.t[b.m]].mean()


@of(lambda n, b: torch.where(b.y > 1, 0.0, (n(b.x) - b.y) ** 2).sum(1) * len(b) / (b.y <= 1).sum(), solo="own")
def nan_mean(n: Any, b: Batch) -> Tensor:
    return torch.nanmean(torch.where(b.y > 1, float("nan"), (n(b.x) - b.y) ** 2))


@of(lambda n, b: token_losses(n, b).mean(1))
def chunks(n: Any, b: Batch) -> Tensor:
    z, t = n.tokens(b.s).reshape(-1, V), b.t.reshape(-1)
    return torch.cat(
        [F.cross_entropy(i, j, reduction="none") for i, j in zip(z.split(8), t.split(8), strict=True)]
    ).mean()


@of(lambda n, b: token_losses(n, b).mean(1))
def chunk_sums(n: Any, b: Batch) -> Tensor:
    z, t = n.tokens(b.s).reshape(-1, V), b.t.reshape(-1)
    total = sum(F.cross_entropy(i, j, reduction="sum") for i, j in zip(z.split(8), t.split(8), strict=True))
    return total / t.numel()


@of(lambda n, b: -n(b.x).log_softmax(1).gather(1, b.c[:, None])[:, 0])
def gathered(n: Any, b: Batch) -> Tensor:
    return -n(b.x).log_softmax(1).gather(1, b.c[:, None]).mean()


@of(lambda n, b: -n(b.x).log_softmax(1).gather(1, b.c[:, None])[:, 0])
def picked(n: Any, b: Batch) -> Tensor:
    return -n(b.x).log_softmax(1)[range(len(b)), b.c].sum() / len(b)


@of(lambda n, b: errors(n, b) * H)
def einsum_squares(n: Any, b: Batch) -> Tensor:
    error = n(b.x) - b.y
    return torch.einsum("bi,bi->", error, error) / len(b)


@of(lambda n, b: errors(n, b) * H)
def dot_squares(n: Any, b: Batch) -> Tensor:
    error = (n(b.x) - b.y).flatten()
    return error.dot(error) / len(b)


@of(lambda n, b: ((n(b.x) - b.y) ** 2) @ CLASS_WEIGHTS)
def einsum_linear(n: Any, b: Batch) -> Tensor:
    return torch.einsum("bi,i->", (n(b.x) - b.y) ** 2, CLASS_WEIGHTS) / len(b)


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


# What a batch has in common without a graph, or by a product with each sample.


@of(
    lambda n, b: b.m.double().sum(1) / b.m.sum() * len(b) * (n(b.x) ** 2).mean(1),
    solo="own",
)
def weights_of_the_batch(n: Any, b: Batch) -> Tensor:
    weight = b.m.double().sum(1) / b.m.sum()
    return (weight * (n(b.x) ** 2).mean(1)).sum()


@of(
    lambda n, b: F.cross_entropy(
        (z := F.normalize(n(b.x))) @ z.T.detach() / 0.5, torch.arange(len(b)), reduction="none"
    ),
    solo="",
)
def info_nce(n: Any, b: Batch) -> Tensor:
    z = F.normalize(n(b.x))
    return F.cross_entropy(z @ z.T.detach() / 0.5, torch.arange(len(b)))


def similarities(n: Any, b: Batch) -> Tensor:
    return F.normalize(n(b.x)) @ F.normalize(n(b.y)).T / 0.5


def clip_of(n: Any, b: Batch) -> Tensor:
    logits, same = similarities(n, b), torch.arange(len(b))
    by_row, by_column = (F.cross_entropy(z, same, reduction="none") for z in (logits, logits.T))
    return (by_row + by_column) / 2


@of(clip_of, solo="")
def clip(n: Any, b: Batch) -> Tensor:
    logits, same = similarities(n, b), torch.arange(len(b))
    return (F.cross_entropy(logits, same) + F.cross_entropy(logits.t(), same)) / 2


def simclr_with_graph_of(n: Any, b: Batch) -> Tensor:
    z = F.normalize(n(torch.cat([b.x, b.y])))
    similar = (z @ z.T / 0.5).masked_fill(torch.eye(len(z), dtype=torch.bool), -1e9)
    return F.cross_entropy(similar, torch.arange(len(z)).roll(len(b)), reduction="none").view(2, -1).mean(0)


@of(simclr_with_graph_of, solo="")
def simclr_with_graph(n: Any, b: Batch) -> Tensor:
    z = F.normalize(n(torch.cat([b.x, b.y], dim=0)), dim=1)
    similar = torch.mm(z, z.t()) / 0.5
    similar = similar.masked_fill(torch.eye(len(z), dtype=torch.bool), -1e9)
    return F.cross_entropy(similar, torch.arange(len(z)).roll(len(b)))


def balance(n: Any, b: Batch) -> Tensor:
    gates = n(b.x).softmax(1)
    return 0.8 * gates @ F.one_hot(gates.argmax(1), H).double().mean(0)


@of(lambda n, b: errors(n, b) + balance(n, b), solo="")
def experts(n: Any, b: Batch) -> Tensor:
    gates = n(b.x).softmax(1)
    used = F.one_hot(gates.argmax(1), H).double().mean(0)
    return F.mse_loss(n(b.x), b.y) + 0.8 * (used * gates.mean(0)).sum()


@of(lambda n, b: ((F.batch_norm(n(b.x), None, None, training=True) - b.y) ** 2).mean(1), solo="")
def batch_norm(n: Any, b: Batch) -> Tensor:
    return ((F.batch_norm(n(b.x), None, None, training=True) - b.y) ** 2).mean()


@of(lambda n, b: gradient_penalty_of(n, b))
def gradient_penalty(n: Any, b: Batch) -> Tensor:
    x = b.x.clone().requires_grad_()
    out = n.decode(n(x)[:, :4].tanh())
    (gradient,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    return out.mean() + 10 * ((gradient.norm(2, dim=1) - 1) ** 2).mean()


def gradient_penalty_of(n: Any, b: Batch) -> Tensor:
    x = b.x.clone().requires_grad_()
    out = n.decode(n(x)[:, :4].tanh())
    (gradient,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    return out.mean(1) + 10 * ((gradient.norm(2, dim=1) - 1) ** 2)


@of(lambda n, b: b.x.clone().requires_grad_().sum(1) + errors(n, b))
def leaf_with_rows(n: Any, b: Batch) -> Tensor:
    return b.x.clone().requires_grad_().sum(1).mean() + errors(n, b).mean()


# Rows that move.


@of(errors)
def stack_of_a_loop(n: Any, b: Batch) -> Tensor:
    z = n(b.x)
    return torch.stack([((z[i] - b.y[i]) ** 2).mean() for i in range(len(z))]).mean()


@of(errors)
def sum_of_a_loop(n: Any, b: Batch) -> Tensor:
    return sum(F.mse_loss(i, j) for i, j in zip(n(b.x), b.y, strict=True)) / len(b)


@of(errors)
def running_sum(n: Any, b: Batch) -> Tensor:
    return sum(row.sum() for row in (n(b.x) - b.y) ** 2) / b.y.numel()


@of(lambda n, b: (n(b.x) * b.y).sum(1))
def diagonal_of_products(n: Any, b: Batch) -> Tensor:
    return (n(b.x) @ b.y.T).diagonal().mean()


@of(lambda n, b: errors(n, b) * torch.eye(len(b))[2 % len(b)] * len(b), solo="")
def one_row(n: Any, b: Batch) -> Tensor:
    return ((n(b.x) - b.y) ** 2)[2 % len(b)].mean()


@of(lambda n, b: 1.5 * errors(n, b))
def stacked_heads(n: Any, b: Batch) -> Tensor:
    error = (n(b.x) - b.y) ** 2
    return torch.stack(tensors=[error, 2 * error]).mean()


@of(errors)
def loop_backwards(n: Any, b: Batch) -> Tensor:
    z = n(b.x)
    return torch.stack([((z[i] - b.y[i]) ** 2).mean() for i in reversed(range(len(z)))]).mean()


@of(lambda n, b: token_losses(n, b).mean(1))
def time_first(n: Any, b: Batch) -> Tensor:
    return F.cross_entropy(n.tokens(b.s).transpose(1, 2), b.t, reduction="none").T.mean()


@of(lambda n, b: (token_losses(n, b) ** 2).mean(1))
def time_first_inside(n: Any, b: Batch) -> Tensor:
    z = n.tokens(b.s).transpose(0, 1)  # (T, B, V), as recurrent networks want it
    losses = F.cross_entropy(z.permute(1, 2, 0), b.t, reduction="none") ** 2
    return losses.transpose(0, 1).mean()


@of(lambda n, b: (n(b.x) ** 2).mean(1) + (n(b.y) ** 2).mean(1))
def two_views(n: Any, b: Batch) -> Tensor:
    return 2 * (n(torch.cat([b.x, b.y])) ** 2).mean(1).mean()


@of(lambda n, b: (n(b.x) ** 2).mean(1) + (n(b.y) ** 2).mean(1))
def two_views_of_the_output(n: Any, b: Batch) -> Tensor:
    return 2 * torch.cat([n(b.x), n(b.y)]).pow(2).mean()


@of(lambda n, b: token_losses(n, b).mean(1) + token_losses(n, replace(b, s=b.s.flip(1))).mean(1))
def two_views_of_tokens(n: Any, b: Batch) -> Tensor:
    z = n.tokens(torch.cat([b.s, b.s.flip(1)])).view(-1, V)
    return 2 * F.cross_entropy(z, torch.cat([b.t, b.t]).view(-1))


@of(lambda n, b: simclr_of(n, b), solo="")
def simclr(n: Any, b: Batch) -> Tensor:
    z = F.normalize(n(torch.cat([b.x, b.y])))
    similar = (z @ z.detach().T / 0.5).masked_fill(torch.eye(len(z), dtype=torch.bool), -1e9)
    return F.cross_entropy(similar, torch.arange(len(z)).roll(len(b)))


def simclr_of(n: Any, b: Batch) -> Tensor:
    z = F.normalize(n(torch.cat([b.x, b.y])))
    similar = (z @ z.detach().T / 0.5).masked_fill(torch.eye(len(z), dtype=torch.bool), -1e9)
    return F.cross_entropy(similar, torch.arange(len(z)).roll(len(b)), reduction="none").view(2, -1).mean(0)


@of(lambda n, b: (n(b.x) ** 2).mean(1))
def repeated(n: Any, b: Batch) -> Tensor:
    return (n(b.x.repeat(3, 1)) ** 2).mean()


@of(lambda n, b: (n(b.x) ** 2).mean(1))
def repeat_interleaved(n: Any, b: Batch) -> Tensor:
    return (n(b.x.repeat_interleave(2, 0)) ** 2).mean()


@of(errors)
def sorted_in_the_step(n: Any, b: Batch) -> Tensor:
    order = b.y[:, 0].argsort()
    return ((n(b.x[order]) - b.y[order]) ** 2).mean(1).mean()


@of(lambda n, b: errors(n, b) * (b.c > 2) * len(b) / (b.c > 2).sum(), solo="own")
def some_rows(n: Any, b: Batch) -> Tensor:
    keep = b.c > 2
    return F.mse_loss(n(b.x[keep]), b.y[keep])


@of(lambda n, b: torch.cat([(n(b.x[:2]) ** 2).mean(1), (n(b.x[2:]) ** 2).mean(1) * 0.5]) * 3, solo="")
def parts_of_the_batch(n: Any, b: Batch) -> Tensor:
    labelled, rest = n(b.x).split([2, len(b) - 2])
    return labelled.pow(2).mean() + rest.pow(2).mean()


@of(errors)
def put_in_place(n: Any, b: Batch) -> Tensor:
    order = b.y[:, 0].argsort()
    out = torch.zeros(len(b), dtype=torch.float64)
    out[order] = ((n(b.x[order]) - b.y[order]) ** 2).mean(1)
    return out.mean()


@of(lambda n, b: (torch.cat([n.cls.expand(len(b), -1, -1), n.tokens(b.s)], 1) ** 2).mean((1, 2)))
def class_token(n: Any, b: Batch) -> Tensor:
    return (torch.cat([n.cls.expand(len(b), -1, -1), n.tokens(b.s)], dim=1) ** 2).mean()


@of(lambda n, b: (n(b.x) ** 2).mean(1) + 0 * b.e[:, 0])
def pooled_graphs(n: Any, b: Batch) -> Tensor:
    nodes = torch.arange(len(b)).repeat_interleave(torch.arange(len(b)) + 1)
    pooled = torch.zeros(len(b), H, dtype=torch.float64).index_add(0, nodes, n(b.x[nodes]))
    return ((pooled / torch.bincount(nodes)[:, None]) ** 2).mean()


# A row with a partner from the batch belongs to its own sample. Other batches have other partners.


def mixed_up(n: Any, b: Batch) -> Tensor:
    return n(0.7 * b.x + 0.3 * b.x[torch.arange(len(b)).roll(1)])


def mixup_of(n: Any, b: Batch) -> Tensor:
    first, second = (F.cross_entropy(mixed_up(n, b), c, reduction="none") for c in (b.c, b.c.roll(1)))
    return 0.7 * first + 0.3 * second


@of(mixup_of, solo="partners")
def mixup(n: Any, b: Batch) -> Tensor:
    z = mixed_up(n, b)
    return 0.7 * F.cross_entropy(z, b.c) + 0.3 * F.cross_entropy(z, b.c.roll(1))


def negatives_of(n: Any, b: Batch) -> Tensor:
    z = n(b.x)
    near, far = ((z - n(b.y)) ** 2).sum(1), ((z - z[torch.arange(len(b)).roll(2)]) ** 2).sum(1)
    return (near - far + 1.0).relu()


@of(negatives_of, solo="partners")
def negatives_of_the_batch(n: Any, b: Batch) -> Tensor:
    z = n(b.x)
    far = (z - z.roll(2, 0)).pow(2).sum(1)
    return F.relu((z - n(b.y)).pow(2).sum(1) - far + 1.0).mean()


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


# Not a sum over samples.


@refused("div .* mixes the samples")
def dice_over_the_batch(n: Any, b: Batch) -> Tensor:
    p, y = n(b.x).sigmoid(), (b.y > 0).double()
    return F.binary_cross_entropy_with_logits(n(b.x), y) + 1 - (2 * (p * y).sum() + 1) / (p.sum() + y.sum() + 1)


@refused("div .* mixes the samples")
def learned_denominator(n: Any, b: Batch) -> Tensor:
    confidence = n(b.x)[:, 0].sigmoid()
    return (errors(n, b) * confidence).sum() / confidence.sum()


@refused("sqrt .* mixes the samples")
def rmse(n: Any, b: Batch) -> Tensor:
    return F.mse_loss(n(b.x), b.y).sqrt()


@refused("pow .* mixes the samples|pow .* are not the rows")
def variance_of_features(n: Any, b: Batch) -> Tensor:
    return (n(b.x).mean(0) ** 2).sum()


@refused("pow .* are not the rows|matmul .* mixes the samples")
def covariance(n: Any, b: Batch) -> Tensor:
    h = n(b.x)
    return ((h.T @ h / len(b) - torch.eye(H)) ** 2).sum()


@refused("std .* mixes the samples")
def spread(n: Any, b: Batch) -> Tensor:
    return n(b.x).std()


@refused("max .* mixes the samples")
def max_of_means(n: Any, b: Batch) -> Tensor:
    return ((n(b.x) - b.y) ** 2).mean(0).max()


@refused("topk .* mixes the samples")
def hard_examples(n: Any, b: Batch) -> Tensor:
    return errors(n, b).topk(4).values.mean()


@refused("sort .* mixes the samples")
def hard_examples_sorted(n: Any, b: Batch) -> Tensor:
    return errors(n, b).sort(descending=True).values[:4].mean()


@refused("clamp .* mixes the samples")
def clamped(n: Any, b: Batch) -> Tensor:
    return mse(n, b).clamp(max=10.0)


@refused("max .* mixes the samples")
def worst_head(n: Any, b: Batch) -> Tensor:
    return torch.max(mse(n, b), mae(n, b))


class Squares(torch.autograd.Function):
    """A loss with a backward of its own."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(z, y)
        return ((z - y) ** 2).mean()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        z, y = ctx.saved_tensors
        return 2 * g * (z - y) / z.numel(), None


class Mean(Squares):
    """One whose node is called MeanBackward."""


@refused("SquaresBackward")
def own_function(n: Any, b: Batch) -> Tensor:
    return Squares.apply(n(b.x), b.y)


@refused("MeanBackward")
def own_function_called_mean(n: Any, b: Batch) -> Tensor:
    return Mean.apply(n(b.x), b.y)


@refused("CheckpointFunctionBackward")
def reentrant_checkpoint(n: Any, b: Batch) -> Tensor:
    return checkpoint(lambda z: (z**2).mean(), n(b.x), use_reentrant=True)


@refused("cross_entropy .* got .* rows for 6 samples|cross_entropy .* was not seen")
def packed(n: Any, b: Batch) -> Tensor:
    lengths = b.m.sum(1)
    z = pack_padded_sequence(n.tokens(b.s), lengths, batch_first=True, enforce_sorted=False)
    t = pack_padded_sequence(b.t, lengths, batch_first=True, enforce_sorted=False)
    return F.cross_entropy(z.data, t.data)


@refused("are not the rows|mixes the samples")
def windows(n: Any, b: Batch) -> Tensor:
    return (n(b.x.reshape(-1).unfold(0, H, 1)).relu() ** 2).mean()


@refused("depends on parameters only")
def no_sample(n: Any, b: Batch) -> Tensor:
    return (n.lin.weight**2).sum()


@refused("combines parameters with a tensor that has no rows")
def data_without_rows(n: Any, b: Batch) -> Tensor:
    return mse(n, b) + n(b.x.mean(0)).sum()


@refused("changed in place")
def changed_in_place(n: Any, b: Batch) -> Tensor:
    losses = torch.zeros_like(b.y) + n(b.x)
    total = losses.mean()
    losses.mul_(2.0)
    return total
