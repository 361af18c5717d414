"""Loss capture: every spelling against the step without it and against each sample alone; reweighting against its equation."""

import gc
import math
import warnings
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import cross_entropy as imported_by_name
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointError, checkpoint

from lightning_grad.functional.gradients.loss_capture import LossCall, LossCapture

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

every_spelling = pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS.keys())
REWEIGHTABLE = {name: spelling for name, spelling in SPELLINGS.items() if name != "checkpointed"}
every_reweightable = pytest.mark.parametrize("spelling", REWEIGHTABLE.values(), ids=REWEIGHTABLE.keys())


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


@every_spelling
def test_loss_and_gradient_are_those_of_the_step_bit_for_bit(spelling: Spelling) -> None:
    value, gradient = with_gradient(spelling)
    captured, captured_gradient = with_gradient(spelling, LossCapture(spelling.samples))
    assert value.isfinite()
    assert same_bits(captured, value)
    assert gradient is not None
    assert captured_gradient is not None
    assert same_bits(captured_gradient, gradient)


@every_spelling
def test_losses_are_those_of_each_sample_alone(spelling: Spelling) -> None:
    capture = LossCapture(spelling.samples)
    with_gradient(spelling, capture)
    call = capture.only()
    assert len(capture.calls) == 1
    assert not capture.unread
    assert call.has_graph
    assert not call.losses.requires_grad
    assert call.losses.dtype == (torch.float64 if spelling.input.dtype == torch.float64 else torch.float32)
    rough = spelling.input.dtype == torch.bfloat16
    expected = each_alone(spelling).to(call.losses.dtype)
    torch.testing.assert_close(call.losses, expected, rtol=1e-2 if rough else 1e-5, atol=1e-6, equal_nan=True)


@every_reweightable
def test_weights_of_one_give_the_loss_and_gradient_of_the_step(spelling: Spelling) -> None:
    value, gradient = with_gradient(spelling)
    ones = LossCapture(spelling.samples, reweight=lambda call: torch.ones(call.samples))
    reweighted, reweighted_gradient = with_gradient(spelling, ones)
    assert reweighted.dtype == value.dtype
    tolerance = {"rtol": 1e-2, "atol": 1e-3} if spelling.input.dtype == torch.bfloat16 else {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(reweighted, value, **tolerance)
    torch.testing.assert_close(reweighted_gradient, gradient, **tolerance)


@every_reweightable
def test_leaving_out_the_others_gives_the_gradient_of_one_sample(spelling: Spelling) -> None:
    """A gradient by the input is zero outside the sample, and inside it as in the whole batch."""
    _, gradient = with_gradient(spelling)
    assert gradient is not None
    samples = spelling.samples or (len(spelling.input) if spelling.target.dim() else 1)
    last = torch.zeros(samples)
    last[-1] = 1.0
    _, found = with_gradient(spelling, LossCapture(spelling.samples, reweight=lambda call: last))
    expected = gradient.reshape(samples, -1) * last[:, None].to(gradient)
    assert found is not None
    torch.testing.assert_close(
        found.reshape(samples, -1), expected, rtol=1e-2 if gradient.dtype == torch.bfloat16 else 1e-5, atol=1e-6
    )


def test_there_are_at_least_the_spellings_that_were_asked_for() -> None:
    assert len(SPELLINGS) >= 31
    names = set()
    for spelling in SPELLINGS.values():
        capture = LossCapture(spelling.samples)
        with_gradient(spelling, capture)
        names.add(capture.only().name)
    assert len(names) >= 16


# The call.


def read(loss: Loss, x: Tensor, t: Tensor, **options: Any) -> LossCall:
    with LossCapture(**options) as capture:
        loss(x, t)
    return capture.only()


def test_a_call_holds_what_the_loss_got() -> None:
    x, t = normal(B, C).requires_grad_(), some(B)
    call = read(nn.CrossEntropyLoss(CLASS_WEIGHTS, label_smoothing=0.1), x, t)
    assert (call.name, call.samples, call.has_graph, call.output) == ("cross_entropy", B, True, None)
    assert torch.equal(call.input, x)
    assert not call.input.requires_grad
    assert torch.equal(call.target, t)
    assert call.valid.tolist() == (t != -100).tolist()
    assert call.options["weight"] is not None
    rest = {k: v for k, v in call.options.items() if k != "weight"}
    assert rest == {"ignore_index": -100, "reduction": "mean", "label_smoothing": 0.1}
    assert call.has_class_indices
    assert torch.equal(call.labels, t)  # type: ignore[arg-type]
    with pytest.raises(AttributeError):
        call.samples = 3  # type: ignore[misc]


def test_labels_only_where_every_sample_has_one_class() -> None:
    def labels(loss: Loss, x: Tensor, t: Tensor, **options: Any) -> Tensor | None:
        return read(loss, x, t, **options).labels

    assert torch.equal(labels(F.cross_entropy, normal(B, C), CHOICES), CHOICES)  # type: ignore[arg-type]
    assert torch.equal(labels(F.cross_entropy, normal(B, C, 1), CHOICES[:, None]), CHOICES)  # type: ignore[arg-type]
    assert labels(F.cross_entropy, normal(B * T, C), classes(B * T), samples=B) is None
    assert labels(F.cross_entropy, normal(B, C), PROBABILITIES) is None
    assert labels(F.mse_loss, normal(B), normal(B)) is None
    assert labels(F.binary_cross_entropy_with_logits, normal(B), BITS[:, 0]) is None


def test_valid_positions_and_rows() -> None:
    target = some(B, T)
    call = read(F.cross_entropy, normal(B * T, C), target.flatten(), samples=B)
    assert torch.equal(call.rows(call.valid), target != -100)
    assert read(F.mse_loss, normal(B, 2), normal(B, 2)).valid.tolist() == [[True, True]] * B
    assert read(F.cross_entropy, normal(B, C), PROBABILITIES).valid.tolist() == [True] * B


def test_an_ignored_sample_has_no_loss_and_the_others_theirs() -> None:
    target = torch.tensor([[1, -100], [-100, -100]])
    x = normal(2, C, 2)
    losses = read(F.cross_entropy, x, target).losses
    assert losses[0].item() == pytest.approx(-x[0, :, 0].log_softmax(0)[1].item(), rel=1e-6)
    assert losses[1].isnan()


def test_a_smaller_last_batch_is_not_inflated() -> None:
    x, t = normal(10, C), classes(10)
    whole = read(F.cross_entropy, x, t).losses
    parts = [read(F.cross_entropy, a, b).losses for a, b in zip(x.split(4), t.split(4), strict=True)]
    torch.testing.assert_close(torch.cat(parts), whole)


def test_legacy_arguments() -> None:
    for options, reduction in (
        ({"size_average": False}, "sum"),
        ({"reduce": False}, "none"),
        ({"size_average": True, "reduction": "sum"}, "mean"),
    ):
        call = read(legacy(**options), normal(B, C), CHOICES)
        assert call.options["reduction"] == reduction
        assert "size_average" not in call.options
        assert "reduce" not in call.options


def test_the_reading_warns_of_nothing() -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        read(lambda x, t: F.cross_entropy(x, t, reduce=False), normal(B, C), CHOICES)
    assert len(seen) == 1, "torch's own, about its legacy arguments"


# Graphs.


class Token:
    """Something that can be weakly referenced, which a node of a graph cannot."""


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_graph_is_kept_alive(reduction: str) -> None:
    x, head = normal(B, C), nn.Linear(C, C)
    with LossCapture() as capture:
        logits = head(x)
        assert logits.grad_fn is not None
        held_by_graph = Token()
        logits.grad_fn.metadata["token"] = held_by_graph
        token = weakref.ref(held_by_graph)
        loss = F.cross_entropy(logits, CHOICES, reduction=reduction)
    del logits, held_by_graph
    gc.collect()
    assert token() is not None, "the loss still needs it"
    del loss
    gc.collect()
    assert token() is None
    call = capture.only()
    assert not call.losses.requires_grad
    assert not any(isinstance(v, Tensor) and v.requires_grad for v in call.options.values())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_graph_is_kept_when_asked(reduction: str) -> None:
    x, head = normal(B, C), nn.Linear(C, C)
    with LossCapture(keep_graph=True) as capture:
        logits = head(x)
        F.cross_entropy(logits, CHOICES, reduction=reduction)
    call = capture.only()
    assert call.output is logits
    assert not call.input.requires_grad
    (found,) = torch.autograd.grad(call.losses[2], head.weight, retain_graph=True)
    (expected,) = torch.autograd.grad(F.cross_entropy(head(x[2:3]), CHOICES[2:3]), head.weight)
    torch.testing.assert_close(found, expected)


def test_a_figure_for_the_log_is_not_the_loss() -> None:
    x = normal(B, C).requires_grad_()
    with LossCapture() as capture:
        with torch.no_grad():
            F.mse_loss(x, BITS)
        F.l1_loss(x.detach(), BITS)
        F.cross_entropy(x, CHOICES)
    assert [call.has_graph for call in capture.calls] == [False, False, True]
    assert capture.only() is capture.calls[2]
    assert capture.only(0) is capture.calls[0]


def test_without_any_graph_all_count() -> None:
    with torch.no_grad(), LossCapture() as capture:
        F.cross_entropy(normal(B, C).requires_grad_(), CHOICES)
    assert not capture.only().has_graph
    with torch.no_grad(), capture:
        F.mse_loss(normal(B), normal(B))
    with pytest.raises(RuntimeError, match="2 losses"):
        capture.only()
    with torch.inference_mode(), LossCapture() as capture:
        F.cross_entropy(normal(B, C), CHOICES)
    assert capture.only().losses.shape == (B,)


# Reweighting against its equation, worked out from the positions.

WEIGHTS = torch.tensor([0.0, 2.0, 1.0, 0.5, 3.0, 1.5])


def reweighted(loss: Loss, x: Tensor, t: Tensor, weights: Tensor = WEIGHTS, **options: Any) -> Tensor:
    with LossCapture(reweight=lambda call: weights, **options):
        return loss(x, t)


def test_each_reduction() -> None:
    x, t = normal(B, C), CHOICES
    each = -x.log_softmax(1)[torch.arange(B), t]
    torch.testing.assert_close(reweighted(F.cross_entropy, x, t), (WEIGHTS * each).sum() / B)
    torch.testing.assert_close(reweighted(nn.CrossEntropyLoss(reduction="sum"), x, t), (WEIGHTS * each).sum())
    torch.testing.assert_close(reweighted(nn.CrossEntropyLoss(reduction="none"), x, t), WEIGHTS * each)
    torch.testing.assert_close(reweighted(legacy(size_average=False), x, t), (WEIGHTS * each).sum())


def test_without_reduction_the_shape_stays() -> None:
    x, t = normal(B * T, C), some(B, T).flatten()
    found = reweighted(nn.CrossEntropyLoss(reduction="none"), x, t, samples=B)
    expected = F.cross_entropy(x, t, reduction="none").reshape(B, T) * WEIGHTS[:, None]
    torch.testing.assert_close(found, expected.flatten())


@pytest.mark.parametrize("tokens", [False, True])
def test_ignored_positions_and_class_weights_leave_the_denominator_of_the_batch(tokens: bool) -> None:
    x, t = normal(B, C, T), some(B, T)
    logs = x.log_softmax(1)
    total, denominator = 0.0, 0.0
    for i in range(B):
        for p in range(T):
            if t[i, p] != -100:
                weight = CLASS_WEIGHTS[t[i, p]].item()
                total -= WEIGHTS[i].item() * weight * logs[i, t[i, p], p].item()
                denominator += weight
    if tokens:
        x, t = x.movedim(1, -1).reshape(-1, C), t.flatten()
    found = reweighted(nn.CrossEntropyLoss(CLASS_WEIGHTS), x, t, samples=B)
    assert found.item() == pytest.approx(total / denominator, rel=1e-5)


def test_batchmean_has_its_own_denominator() -> None:
    x, t = normal(B, C).log_softmax(1), PROBABILITIES
    found = reweighted(nn.KLDivLoss(reduction="batchmean"), x, t)
    torch.testing.assert_close(found, (WEIGHTS[:, None] * t * (t.log() - x)).sum() / B)


def test_weighted_squares_divide_by_their_weights() -> None:
    x, t, w = normal(B, C), normal(B, C), uniform(B, C)
    found = reweighted(lambda a, b: F.mse_loss(a, b, weight=w), x, t)
    torch.testing.assert_close(found, (WEIGHTS[:, None] * w * (x - t) ** 2).sum() / w.sum())


@pytest.mark.filterwarnings("ignore:Using a target size")
def test_a_loss_over_broadcast_shapes_stays_itself() -> None:
    x, t, w = normal(1, C), normal(B, C), uniform(1, C)
    found = reweighted(lambda a, b: F.mse_loss(a, b, weight=w), x, t, torch.ones(B))
    torch.testing.assert_close(found, F.mse_loss(x, t, weight=w))


def test_a_weight_of_nan_for_an_ignored_sample_changes_nothing() -> None:
    x, t = normal(B, C).requires_grad_(), some(B)
    weights = WEIGHTS.clone()
    expected = reweighted(F.cross_entropy, x, t, weights)
    weights[1] = math.nan
    found = reweighted(F.cross_entropy, x, t, weights)
    assert same_bits(found, expected)
    found.backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_none_leaves_the_loss_bit_for_bit() -> None:
    x = normal(B, C)
    with LossCapture(reweight=lambda call: None) as capture:
        assert same_bits(F.cross_entropy(x, CHOICES), F.cross_entropy(x, CHOICES))
    value = F.cross_entropy(x, CHOICES)
    with LossCapture(reweight=lambda call: None if call.name == "mse_loss" else WEIGHTS) as capture:
        assert not same_bits(F.cross_entropy(x, CHOICES), value)
        squares = F.mse_loss(x, BITS)
    assert same_bits(squares, F.mse_loss(x, BITS))
    assert [call.name for call in capture.calls] == ["cross_entropy", "mse_loss"]


def test_weights_may_come_from_the_losses_and_carry_gradients() -> None:
    x, t = normal(B, C).requires_grad_(), CHOICES
    scale = torch.tensor(2.0, requires_grad=True)
    with LossCapture(reweight=lambda call: scale * call.losses):
        F.cross_entropy(x, t).backward()
    assert scale.grad is not None
    each = F.cross_entropy(x, t, reduction="none")
    torch.testing.assert_close(scale.grad, each.square().mean().detach())
    gradient = x.grad
    x.grad = None
    (2.0 * each.detach() * each).mean().backward()  # the weights are held fixed
    torch.testing.assert_close(gradient, x.grad)


def test_weights_of_another_shape_raise() -> None:
    with pytest.raises(ValueError, match=r"weights of shape \(6,\), got \(3,\)"):
        reweighted(F.cross_entropy, normal(B, C), CHOICES, torch.ones(3))


# What cannot be read.


def test_no_loss_seen() -> None:
    with LossCapture() as capture:
        (normal(B) - normal(B)).square().mean()
    with pytest.raises(RuntimeError, match=r"No loss .* Hand-written, scripted and fused losses .* `score_fn=`"):
        capture.only()
    with pytest.raises(RuntimeError, match="score_fn="):
        capture.only(0)


def test_losses_of_several_inputs_are_named_and_left_alone() -> None:
    a, b, c = normal(B, C).requires_grad_(), normal(B, C), normal(B, C)
    logs, lengths = normal(7, 2, C).log_softmax(2), torch.tensor([7, 7])
    steps: dict[str, Callable[[], Tensor]] = {
        "ctc_loss": lambda: nn.CTCLoss()(logs, torch.tensor([[1, 2], [3, 4]]), lengths, torch.tensor([2, 2])),
        "cosine_embedding_loss": lambda: F.cosine_embedding_loss(a, b, SIGNS[:, 0]),
        "margin_ranking_loss": lambda: F.margin_ranking_loss(a[:, 0], b[:, 0], SIGNS[:, 0]),
        "triplet_margin_loss": lambda: nn.TripletMarginLoss()(a, b, c),
        # The distance is a known loss, but inside of another.
        "triplet_margin_with_distance_loss": lambda: F.triplet_margin_with_distance_loss(
            a, b, c, distance_function=lambda p, q: F.mse_loss(p, q, reduction="none").sum(1)
        ),
        "kl_div": lambda: torch.kl_div(a.log_softmax(1), PROBABILITIES),
    }
    with LossCapture(reweight=lambda call: torch.zeros(call.samples)) as capture:
        values = [step() for step in steps.values()]
    for value, step in zip(values, steps.values(), strict=True):
        assert same_bits(value, step())
    assert [loss.name for loss in capture.unread] == list(steps)
    assert [loss.has_graph for loss in capture.unread] == [False, True, True, True, True, True]
    assert not capture.calls
    with pytest.raises(RuntimeError) as error:
        capture.only()
    assert all(name in str(error.value) for name in steps)
    assert "score_fn=" in str(error.value)


def test_two_losses_are_ambiguous_until_one_is_chosen() -> None:
    x = normal(B, C).requires_grad_()
    with LossCapture() as capture:
        F.cross_entropy(x, CHOICES) + 0.1 * F.mse_loss(x, BITS)
    with pytest.raises(RuntimeError) as error:
        capture.only()
    for words in ("2 losses", "0: cross_entropy, 1: mse_loss", "loss=0", "score_fn="):
        assert words in str(error.value)
    assert capture.only(1).name == "mse_loss"
    for which in (2, -1):
        with pytest.raises(RuntimeError, match=f"loss={which} was asked for, but the step has 2: 0: cross_entropy"):
            capture.only(which)


def test_a_loss_beside_one_that_cannot_be_read_is_ambiguous() -> None:
    x = normal(B, C).requires_grad_()
    with LossCapture() as capture:
        F.cross_entropy(x, CHOICES) + nn.TripletMarginLoss()(x, x + 1, x - 1)
    with pytest.raises(RuntimeError, match=r"2 losses.*0: cross_entropy; not readable: triplet_margin_loss"):
        capture.only()
    assert capture.only(0).name == "cross_entropy"
    with LossCapture() as capture:
        F.cross_entropy(x, CHOICES)
        F.cosine_embedding_loss(x.detach(), BITS, SIGNS[:, 0])  # for the log
    assert capture.only().name == "cross_entropy"


def test_packed_tokens_raise() -> None:
    x, t = normal(13, C).requires_grad_(), classes(13)
    with LossCapture(samples=B) as capture:
        value = F.cross_entropy(x, t)
    assert same_bits(value, F.cross_entropy(x, t))
    assert [(loss.name, loss.has_graph) for loss in capture.unread] == [("cross_entropy", True)]
    with pytest.raises(ValueError, match=r"cross_entropy got 13 rows for 6 samples.*packed.*score_fn="):
        capture.only()
    with pytest.raises(ValueError, match="13 rows for 6 samples"):
        reweighted(F.cross_entropy, x, t, samples=B)
    with pytest.raises(ValueError, match="3 rows for 6 samples"):
        reweighted(F.cross_entropy, normal(3, C, 2).requires_grad_(), classes(3, 2), samples=B)
    # A figure for the log is not to be reweighted in the first place.
    assert same_bits(reweighted(F.cross_entropy, x.detach(), t, samples=B), F.cross_entropy(x.detach(), t))


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        LossCapture(samples=0)
    # A wrong call raises as it would without the capture.
    for reweight in (None, lambda call: WEIGHTS):
        with LossCapture(reweight=reweight), pytest.raises(TypeError, match="required positional argument"):
            F.cross_entropy(normal(B, C))  # type: ignore[call-arg]
        with LossCapture(reweight=reweight), pytest.raises(ValueError, match="wrong is not a valid value"):
            F.cross_entropy(normal(B, C), CHOICES, reduction="wrong")
        with LossCapture(reweight=reweight), pytest.raises((RuntimeError, ValueError), match="batch"):
            F.cross_entropy(normal(B, C), classes(B + 1))


def test_clear() -> None:
    capture = LossCapture()
    for _ in range(2):
        with capture:
            F.cross_entropy(normal(B, C), CHOICES)
            nn.TripletMarginLoss()(normal(2, 2), normal(2, 2), normal(2, 2))
        assert len(capture.calls) == len(capture.unread) == 1
        capture.clear()


# Company: transforms, other modes, checkpoints, compiled code.


def test_inside_transforms_of_torch_func() -> None:
    x = normal(B, C)
    gradient = torch.func.vmap(torch.func.grad(lambda a, b: F.cross_entropy(a[None], b[None])))
    with LossCapture() as capture:
        found = gradient(x, CHOICES)
    torch.testing.assert_close(found, gradient(x, CHOICES))
    assert not capture.calls
    with pytest.raises(RuntimeError, match=r"cross_entropy \(it was called inside a transform of torch.func\)"):
        capture.only()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # by torch's own import
def test_forward_mode() -> None:
    from torch.autograd import forward_ad

    x, direction = normal(B, C), normal(B, C)
    with forward_ad.dual_level():
        with LossCapture() as capture:
            value = F.cross_entropy(forward_ad.make_dual(x, direction), CHOICES)
        tangent = forward_ad.unpack_dual(value).tangent
    gradient = (x.softmax(1) - F.one_hot(CHOICES, C)) / B
    torch.testing.assert_close(tangent, (gradient * direction).sum())
    torch.testing.assert_close(capture.only().losses, F.cross_entropy(x, CHOICES, reduction="none"))


def test_meta_tensors() -> None:
    with LossCapture() as capture:
        value = F.cross_entropy(normal(B, C).to("meta"), CHOICES.to("meta"))
    assert value.is_meta
    assert capture.only().losses.shape == (B,)


def test_an_empty_batch() -> None:
    with LossCapture() as capture:
        assert F.cross_entropy(normal(0, C), classes(0)).isnan()
    assert capture.only().losses.shape == (0,)


@pytest.mark.parametrize("run", [lambda loss: loss.backward(), torch.autograd.backward])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpointed_loss_counts_once(use_reentrant: bool, run: Callable[[Tensor], None]) -> None:
    """Also when backward, which computes it a second time, runs within the context, as in manual optimization."""
    x = normal(B, C).requires_grad_()
    with LossCapture() as capture:
        run(checkpoint(lambda a: F.cross_entropy(2 * a, CHOICES), x, use_reentrant=use_reentrant))
    assert len(capture.calls) == 1
    found = x.grad
    x.grad = None
    F.cross_entropy(2 * x, CHOICES).backward()
    torch.testing.assert_close(found, x.grad)


def test_a_checkpointed_loss_cannot_be_reweighted() -> None:
    """The recomputation runs outside the context, and torch notices that it saves something else."""
    x = normal(B, C).requires_grad_()
    with LossCapture(reweight=lambda call: torch.ones(call.samples)):
        loss = checkpoint(lambda a: F.cross_entropy(2 * a, CHOICES), x, use_reentrant=False)
    with pytest.raises(CheckpointError):
        loss.backward()


def test_captures_may_be_nested() -> None:
    x = normal(B, C).requires_grad_()
    value = F.cross_entropy(x, CHOICES)
    with LossCapture() as outer, LossCapture(keep_graph=True) as inner:
        assert same_bits(F.cross_entropy(x, CHOICES), value)
    assert len(outer.calls) == len(inner.calls) == 1
    for first, second in ((None, lambda call: WEIGHTS), (lambda call: WEIGHTS, None)):
        with LossCapture(reweight=first) as outer, LossCapture(reweight=second) as inner:
            found = F.cross_entropy(x, CHOICES)
        torch.testing.assert_close(found, reweighted(F.cross_entropy, x, CHOICES))
        assert len(outer.calls) == len(inner.calls) == 1
        torch.testing.assert_close(outer.only().losses, inner.only().losses)


def test_a_device_context_inside() -> None:
    with LossCapture() as capture, torch.device("cpu"):
        F.cross_entropy(torch.randn(B, C), CHOICES)
    assert len(capture.calls) == 1


class NoSync(TorchDispatchMode):
    """Raises where the host would wait for a device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split("::")[1].split(".")[0]
        assert name not in ("_local_scalar_dense", "nonzero", "_unique2", "masked_select"), f"the host waits in {name}"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("reweight", [None, lambda call: torch.ones(call.samples)])
@pytest.mark.parametrize("name", [name for name in REWEIGHTABLE if name != "gaussian_nll_loss, a variance each"])
def test_the_host_does_not_wait(name: str, reweight: Any) -> None:
    """Left out is a loss that waits by itself, for a look whether a variance is negative."""
    spelling = SPELLINGS[name]
    with NoSync(), LossCapture(spelling.samples, reweight):
        spelling.loss(spelling.input, spelling.target)


def test_other_functions_pass_through() -> None:
    x = normal(B, C)
    with LossCapture() as capture:
        found = torch.stack([x.relu().sum(dim=1), torch.full((B,), 2.0, dtype=torch.float32), x[:, 0]])
        inplace = x.clone().add_(1)
    assert torch.equal(found, torch.stack([x.relu().sum(1), torch.full((B,), 2.0), x[:, 0]]))
    assert torch.equal(inplace, x + 1)
    assert not capture.calls
    assert not capture.unread


compiled = pytest.mark.filterwarnings(  # torch about its own tracing
    "ignore:The .grad attribute of a Tensor that is not a leaf",
    "ignore:.*should not be instantiated:DeprecationWarning",
)


class Counter:
    """A backend that runs what it is given, and counts how often it is asked."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: Any, inputs: list[Tensor]) -> Any:
        self.graphs += 1
        return graph


@compiled
def test_a_compiled_network_inside_the_step() -> None:
    torch._dynamo.reset()
    network, backend = nn.Sequential(nn.Linear(C, 8), nn.ReLU(), nn.Linear(8, C)), Counter()
    fast, x = torch.compile(network, backend=backend), normal(B, C)
    for _ in range(4):
        with LossCapture() as capture:
            loss = F.cross_entropy(fast(x), CHOICES)
        loss.backward()
        torch.testing.assert_close(capture.only().losses, F.cross_entropy(network(x), CHOICES, reduction="none"))
    assert backend.graphs == 1, "compiled anew by each capture"


@compiled
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_loss_inside_a_compiled_function_is_reweighted(backend: str) -> None:
    torch._dynamo.reset()
    fast = torch.compile(lambda a, t: F.cross_entropy(2 * a, t), backend=backend)
    x = normal(B, C).requires_grad_()
    expected = reweighted(F.cross_entropy, 2 * x, CHOICES)
    for _ in range(2):
        found = reweighted(fast, x, CHOICES)
        torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(found, x)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, x)[0])


@compiled
def test_weights_that_torch_drops_are_not_dropped_in_a_compiled_function() -> None:
    torch._dynamo.reset()
    x, t, w = normal(B, C), normal(B, C), uniform(B, C)
    fast = torch.compile(lambda a, b: F.l1_loss(a, b, weight=w), backend="eager")
    with LossCapture() as capture:
        found = fast(x, t)
    torch.testing.assert_close(found, (w * (x - t).abs()).sum() / w.sum())
    torch.testing.assert_close(capture.only().losses, (w * (x - t).abs()).sum(1) / w.sum(1))


@compiled
@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_loss_inside_a_compiled_function(fullgraph: bool) -> None:
    torch._dynamo.reset()
    head, backend, x = nn.Linear(C, C), Counter(), normal(B, C)
    fast = torch.compile(lambda a, t: F.cross_entropy(head(a), t), backend=backend, fullgraph=fullgraph)
    for _ in range(4):
        with LossCapture() as capture:
            loss = fast(x, CHOICES)
        loss.backward()
        call = capture.only()
        torch.testing.assert_close(call.losses, F.cross_entropy(head(x), CHOICES, reduction="none"))
        torch.testing.assert_close(call.input, head(x))
    assert backend.graphs == 1
