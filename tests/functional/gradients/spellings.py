"""Losses of ``torch.nn.functional`` in every spelling, and what each is by itself."""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import cross_entropy as imported_by_name
from torch.utils.checkpoint import checkpoint

from lightning_grad.functional import LossCapture
from tests.cases import cases

B, C, T = 6, 5, 3
SEED = torch.Generator().manual_seed(0)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=SEED)


def uniform(*shape: int) -> Tensor:
    return 0.05 + 0.9 * torch.rand(shape, generator=SEED)


def classes(*shape: int, ignored: float = 0.0, index: int = -100) -> Tensor:
    drawn = torch.randint(C, shape, generator=SEED)
    return drawn.masked_fill(torch.rand(shape, generator=SEED) < ignored, index)


def some(*shape: int) -> Tensor:
    """Return class targets of which the second row is ignored, and single positions of the others."""
    target = classes(*shape, ignored=0.3)
    target[0].fill_(1)
    target[1].fill_(-100)
    return target


Loss = Callable[[Tensor, Tensor], Tensor]
CLASS_WEIGHTS = torch.tensor([0.2, 1.0, 3.0, 0.5, 2.0])
WEIGHTS = torch.tensor([0.0, 2.0, 1.0, 0.5, 3.0, 1.5])
LABEL_WEIGHTS = torch.tensor([1.0, 2.0, 0.5, 0.1, 4.0])
CHOICES, BITS, PROBABILITIES = classes(B), (uniform(B, C) > 0.5).float(), normal(B, C).softmax(1)
SIGNS = BITS * 2 - 1
LABEL_LISTS = torch.tensor(  # up to the first -1
    [[1, 3, -1, 0, 0], [0, -1, 2, 2, 2], [4, 3, 2, -1, 0], [2, -1, 0, 0, 0], [1, -1, 1, 1, 1], [0, 2, -1, 3, 4]]
)


class WithLossInside(nn.Module):
    """A model that returns its own loss, as those of Hugging Face do."""

    def forward(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"logits": logits, "loss": nn.CrossEntropyLoss()(logits.view(-1, C), labels.view(-1))}


class Spelling(NamedTuple):
    """A loss, its arguments, and how it is computed for a sample alone, where that is not the same function."""

    loss: Loss
    input: Tensor
    target: Tensor
    samples: int | None = None
    alone: Loss | None = None


def autocast(loss: Loss) -> Loss:
    def within(x: Tensor, t: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return loss(x @ torch.eye(x.shape[1]), t)

    return within


def legacy(**options: Any) -> Loss:
    def loss(x: Tensor, t: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return F.cross_entropy(x, t, **options)

    return loss


def of_logits(name: str, target: Tensor, **options: Any) -> Spelling:
    return Spelling(lambda x, t: getattr(F, name)(x, t, **options), normal(*target.shape), target)


def of_classes(loss: Loss, target: Tensor | None = None, shape: tuple[int, ...] = (B, C), **kwargs: Any) -> Spelling:
    return Spelling(loss, normal(*shape), CHOICES if target is None else target, **kwargs)


def divided(count: int) -> Loss:
    """Return cross-entropy as a mean where the batch has a sum."""
    return lambda x, t: F.cross_entropy(x, t, reduction="sum") / count


mean_cross_entropy: Loss = lambda x, t: F.cross_entropy(x, t)  # noqa: E731
SPELLINGS = {
    "function": of_classes(mean_cross_entropy),
    "imported by name": of_classes(imported_by_name),
    "keywords": of_classes(lambda x, t: F.cross_entropy(target=t, input=x)),
    "module": of_classes(nn.CrossEntropyLoss()),
    "torch.nn.functional": of_classes(lambda x, t: torch.nn.functional.cross_entropy(x, t, None)),
    "through a variable": of_classes(getattr(F, "cross_entropy")),  # noqa: B009
    "smoothed": of_classes(nn.CrossEntropyLoss(label_smoothing=0.2)),
    "class weights": of_classes(nn.CrossEntropyLoss(weight=CLASS_WEIGHTS)),
    "weights by position": of_classes(lambda x, t: F.cross_entropy(x, t, CLASS_WEIGHTS)),
    "smoothed, class weights": of_classes(nn.CrossEntropyLoss(weight=CLASS_WEIGHTS, label_smoothing=0.2)),
    "ignored": of_classes(mean_cross_entropy, some(B)),
    "ignored, another index": of_classes(
        lambda x, t: F.cross_entropy(x, t, ignore_index=255), classes(B, ignored=0.5, index=255)
    ),
    "ignored, a class": of_classes(lambda x, t: F.cross_entropy(x, t, ignore_index=0)),
    "ignored, class weights, smoothed": of_classes(
        nn.CrossEntropyLoss(weight=CLASS_WEIGHTS, label_smoothing=0.2), some(B, T), (B, C, T)
    ),
    "probabilities": of_classes(nn.CrossEntropyLoss(), PROBABILITIES),
    "probabilities, class weights, smoothed": of_classes(
        nn.CrossEntropyLoss(CLASS_WEIGHTS, label_smoothing=0.1), PROBABILITIES
    ),
    "probabilities of positions": of_classes(nn.CrossEntropyLoss(), normal(B, C, T).softmax(1), (B, C, T)),
    "sum": of_classes(lambda x, t: F.cross_entropy(x, t, reduction="sum")),
    "sum over positions": of_classes(nn.CrossEntropyLoss(reduction="sum"), classes(B, T), (B, C, T), alone=divided(T)),
    "none": of_classes(lambda x, t: F.cross_entropy(x, t, reduction="none").mean()),
    "none over positions": of_classes(
        lambda x, t: F.cross_entropy(x, t, reduction="none").mean(), classes(B, T), (B, C, T)
    ),
    "legacy sum": of_classes(legacy(size_average=False)),
    "legacy none": of_classes(lambda x, t: legacy(reduce=False)(x, t).mean()),
    "legacy mean": of_classes(legacy(size_average=True, reduce=True)),
    "positions": of_classes(mean_cross_entropy, some(B, T), (B, C, T)),
    "segmentation": of_classes(
        nn.CrossEntropyLoss(ignore_index=255), classes(B, 4, 4, ignored=0.3, index=255), (B, C, 4, 4)
    ),
    "tokens": of_classes(mean_cross_entropy, some(B, T).flatten(), (B * T, C), samples=B),
    "tokens, class weights": of_classes(
        nn.CrossEntropyLoss(CLASS_WEIGHTS), some(B, T).flatten(), (B * T, C), samples=B
    ),
    "loss inside forward": of_classes(lambda x, t: WithLossInside()(x, t)["loss"]),
    "loss inside forward, tokens": of_classes(
        lambda x, t: WithLossInside()(x, t)["loss"], some(B, T), (B, T, C), samples=B
    ),
    "one sample": of_classes(mean_cross_entropy, classes(1), (1, C)),
    "one sample, not a batch": of_classes(mean_cross_entropy, classes(), (C,)),
    "autocast": of_classes(autocast(mean_cross_entropy)),
    "bfloat16": Spelling(mean_cross_entropy, normal(B, C).bfloat16(), CHOICES),
    "float64": Spelling(mean_cross_entropy, normal(B, C).double(), CHOICES),
    "checkpointed": of_classes(lambda x, t: checkpoint(mean_cross_entropy, x, t, use_reentrant=False)),
    "nll_loss": of_classes(lambda x, t: F.nll_loss(x.log_softmax(1), t)),
    "nll_loss, class weights, ignored": of_classes(
        lambda x, t: nn.NLLLoss(CLASS_WEIGHTS)(x.log_softmax(1), t), some(B, T), (B, C, T)
    ),
    "binary with logits": of_logits("binary_cross_entropy_with_logits", BITS),
    "binary with logits, one label": of_logits("binary_cross_entropy_with_logits", BITS[:, 0]),
    "binary with logits, weights": of_logits(
        "binary_cross_entropy_with_logits", BITS, weight=LABEL_WEIGHTS, pos_weight=CLASS_WEIGHTS
    ),
    "binary with logits, sum": of_logits("binary_cross_entropy_with_logits", BITS[:, :1], reduction="sum"),
    "binary": Spelling(lambda x, t: F.binary_cross_entropy(x.sigmoid(), t), normal(B, C), BITS),
    "binary, weights": Spelling(lambda x, t: nn.BCELoss(LABEL_WEIGHTS)(x.sigmoid(), t), normal(B, C), BITS),
    "mse_loss": of_logits("mse_loss", normal(B, 2)),
    "mse_loss, images": Spelling(nn.MSELoss(), normal(B, 2, 3, 3), normal(B, 2, 3, 3)),
    "mse_loss, weights": Spelling(
        lambda x, t: F.mse_loss(x, t[:, :C], weight=t[:, C:]), normal(B, C), uniform(B, 2 * C)
    ),
    "l1_loss": of_logits("l1_loss", normal(B)),
    "l1_loss, weights": Spelling(lambda x, t: F.l1_loss(x, t[:, :C], weight=t[:, C:]), normal(B, C), uniform(B, 2 * C)),
    "smooth_l1_loss": of_logits("smooth_l1_loss", normal(B, 2), beta=0.5),
    "huber_loss": of_logits("huber_loss", normal(B, 2), delta=0.5),
    "huber_loss, weights": Spelling(
        lambda x, t: F.huber_loss(x, t[:, :C], weight=t[:, C:]), normal(B, C), uniform(B, 2 * C)
    ),
    "kl_div": Spelling(lambda x, t: F.kl_div(x.log_softmax(1), t, reduction="batchmean"), normal(B, C), PROBABILITIES),
    "kl_div, logarithms": Spelling(
        lambda x, t: nn.KLDivLoss(reduction="batchmean", log_target=True)(x.log_softmax(1), t),
        normal(B, C),
        PROBABILITIES.log(),
    ),
    "kl_div, tokens": Spelling(
        lambda x, t: F.kl_div(x.log_softmax(1), t, reduction="batchmean"),
        normal(B * T, C),
        normal(B * T, C).softmax(1),
        samples=B,
    ),
    "kl_div, sum": Spelling(
        lambda x, t: F.kl_div(x.log_softmax(1), t, reduction="sum"),
        normal(B, C),
        PROBABILITIES,
        alone=lambda x, t: F.kl_div(x.log_softmax(1), t, reduction="sum") / C,
    ),
    "poisson_nll_loss": of_logits("poisson_nll_loss", uniform(B, 2), full=True),
    "gaussian_nll_loss": Spelling(lambda x, t: F.gaussian_nll_loss(x, t, var=0.5), normal(B, 2), normal(B, 2)),
    "gaussian_nll_loss, a variance each": Spelling(
        lambda x, t: nn.GaussianNLLLoss()(x[:, :2], t, x[:, 2:].exp()), normal(B, 4), normal(B, 2)
    ),
    "soft_margin_loss": of_logits("soft_margin_loss", SIGNS),
    "multi_margin_loss": of_classes(lambda x, t: F.multi_margin_loss(x, t, margin=0.7, weight=CLASS_WEIGHTS)),
    "multilabel_margin_loss": of_classes(nn.MultiLabelMarginLoss(), LABEL_LISTS),
    "multilabel_soft_margin_loss": of_classes(nn.MultiLabelSoftMarginLoss(LABEL_WEIGHTS), BITS),
    "hinge_embedding_loss": of_logits("hinge_embedding_loss", SIGNS, margin=0.5),
}
if hasattr(F, "linear_cross_entropy"):
    HEAD = normal(C, 4)
    SPELLINGS["linear_cross_entropy"] = of_classes(
        lambda x, t: F.linear_cross_entropy(x, HEAD, t, label_smoothing=0.1, weight=CLASS_WEIGHTS), some(B), (B, 4)
    )
    SPELLINGS["linear_cross_entropy, tokens"] = of_classes(
        nn.LinearCrossEntropyLoss(4, C), some(B, T).flatten(), (B * T, 4), samples=B
    )

every_spelling = cases("spelling", (pytest.param(spelling, id=name) for name, spelling in SPELLINGS.items()))
REWEIGHTABLE = {name: spelling for name, spelling in SPELLINGS.items() if name != "checkpointed"}
every_reweightable = cases("spelling", (pytest.param(spelling, id=name) for name, spelling in REWEIGHTABLE.items()))


def with_gradient(spelling: Spelling, capture: LossCapture | None = None) -> tuple[Tensor, Tensor | None]:
    x = spelling.input.clone().requires_grad_()
    if capture is None:
        value = spelling.loss(x, spelling.target)
    else:
        with capture:
            value = spelling.loss(x, spelling.target)
    value.backward()
    return value.detach(), x.grad


def each_alone(spelling: Spelling) -> Tensor:
    """Return the losses of batches of one."""
    loss, x, t = spelling.alone or spelling.loss, spelling.input, spelling.target
    if t.dim() == 0:
        return loss(x, t).reshape(1)
    samples = spelling.samples or len(x)
    pairs = zip(x.chunk(samples), t.chunk(samples), strict=True)
    return torch.stack([loss(a, b) for a, b in pairs])


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def reweighted(loss: Loss, x: Tensor, t: Tensor, weights: Tensor = WEIGHTS, **options: Any) -> Tensor:
    with LossCapture(reweight=lambda call: weights, **options):
        return loss(x, t)
