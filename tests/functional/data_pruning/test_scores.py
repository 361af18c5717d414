"""Scores of samples against numbers worked out one by one with ``math.exp`` and sums, and against autograd."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import cross_entropy as imported_by_name
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_grad.functional import (
    aum,
    aum_state,
    el2n,
    forgetting,
    forgetting_state,
    last_layer_gradient_norm,
    margin,
    predictions,
    update_aum_,
    update_forgetting_,
    update_vog_,
    vog,
    vog_state,
)
from lightning_grad.functional.data_pruning.scores import is_correct
from lightning_grad.functional.gradients.loss_capture import LossCapture
from lightning_grad.functional.gradients.loss_functions import LossCall

B, C, T = 5, 4, 3
NAN, INF = math.nan, math.inf
SEED = torch.Generator().manual_seed(3)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=SEED)


LOGITS, IMAGES = normal(B, C), normal(B, C, 2, 2)
TOKENS = normal(B, C, T)
TOKENS[0, 0, 0] += 5.0  # a token that is predicted right
TOKENS[3, 1, :] += 5.0  # a sentence of them
CHOICES = torch.tensor([0, 3, 1, 1, 2])
SOFT = normal(B, C).softmax(1)
TOKEN_CHOICES = torch.tensor([[0, 1, 2], [-100, -100, -100], [3, -100, 0], [1, 1, 1], [-100, 2, -100]])
PIXEL_CHOICES = torch.randint(C, (B, 2, 2), generator=SEED)
PIXEL_CHOICES[2, 0, 1] = 255
WEIGHTS = torch.tensor([0.2, 1.0, 3.0, 0.5])


def read(loss: Callable[[Tensor, Tensor], Any], x: Tensor, t: Tensor, samples: int | None = None) -> LossCall:
    with LossCapture(samples) as capture:
        loss(x, t)
    return capture.only()


# EL2N by hand.


def softmax_by_hand(logits: Sequence[float]) -> list[float]:
    powers = [math.exp(z) for z in logits]
    return [power / sum(powers) for power in powers]


def error_by_hand(logits: Sequence[float], wanted: int | Sequence[float]) -> float:
    onehot = [float(c == wanted) for c in range(len(logits))] if isinstance(wanted, int) else wanted
    return math.sqrt(sum((p - y) ** 2 for p, y in zip(softmax_by_hand(logits), onehot, strict=True)))


def mean_or_nan(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else NAN


PLAIN = [error_by_hand(LOGITS[i].tolist(), int(CHOICES[i])) for i in range(B)]
WITH_SOFT_TARGETS = [error_by_hand(LOGITS[i].tolist(), SOFT[i].tolist()) for i in range(B)]
OF_TOKENS = [
    mean_or_nan(
        [
            error_by_hand(TOKENS[i, :, p].tolist(), int(TOKEN_CHOICES[i, p]))
            for p in range(T)
            if TOKEN_CHOICES[i, p] != -100
        ]
    )
    for i in range(B)
]
OF_PIXELS = [
    mean_or_nan(
        [
            error_by_hand(IMAGES[i, :, h, w].tolist(), int(PIXEL_CHOICES[i, h, w]))
            for h in range(2)
            for w in range(2)
            if PIXEL_CHOICES[i, h, w] != 255
        ]
    )
    for i in range(B)
]
ONE_IGNORED = CHOICES.masked_fill(torch.arange(B) == 3, -100)
ONE_HOT = F.one_hot(CHOICES, C).float()
OF_LABELS = [
    math.sqrt(sum((1 / (1 + math.exp(-LOGITS[i, c].item())) - ONE_HOT[i, c].item()) ** 2 for c in range(C)))
    for i in range(B)
]


class WithLossInside(nn.Module):
    """A model that returns its own loss, as those of Hugging Face do."""

    def forward(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"logits": logits, "loss": nn.CrossEntropyLoss()(logits.view(-1, C), labels.view(-1))}


def autocast(x: Tensor, t: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return F.cross_entropy(x @ torch.eye(C), t)


FLAT_TOKENS = TOKENS.movedim(1, -1).reshape(-1, C)
BY_HAND: dict[str, tuple[Callable[[Tensor, Tensor], Any], Tensor, Tensor, int | None, list[float]]] = {
    "function": (F.cross_entropy, LOGITS, CHOICES, None, PLAIN),
    "module": (nn.CrossEntropyLoss(), LOGITS, CHOICES, None, PLAIN),
    "imported by name": (imported_by_name, LOGITS, CHOICES, None, PLAIN),
    "smoothed": (nn.CrossEntropyLoss(label_smoothing=0.3), LOGITS, CHOICES, None, PLAIN),
    "nll_loss": (lambda x, t: F.nll_loss(F.log_softmax(x, dim=1), t), LOGITS, CHOICES, None, PLAIN),
    "class weights": (nn.CrossEntropyLoss(WEIGHTS), LOGITS, CHOICES, None, PLAIN),
    "ignored": (nn.CrossEntropyLoss(), LOGITS, ONE_IGNORED, None, [*PLAIN[:3], NAN, PLAIN[4]]),
    "probabilities": (nn.CrossEntropyLoss(), LOGITS, SOFT, None, WITH_SOFT_TARGETS),
    "binary with logits": (F.binary_cross_entropy_with_logits, LOGITS, ONE_HOT, None, OF_LABELS),
    "binary": (lambda x, t: F.binary_cross_entropy(x.sigmoid(), t), LOGITS, ONE_HOT, None, OF_LABELS),
    "sum": (nn.CrossEntropyLoss(reduction="sum"), LOGITS, CHOICES, None, PLAIN),
    "none": (lambda x, t: F.cross_entropy(x, t, reduction="none").mean(), LOGITS, CHOICES, None, PLAIN),
    "tokens": (F.cross_entropy, FLAT_TOKENS, TOKEN_CHOICES.flatten(), B, OF_TOKENS),
    "positions": (F.cross_entropy, TOKENS, TOKEN_CHOICES, None, OF_TOKENS),
    "segmentation": (nn.CrossEntropyLoss(ignore_index=255), IMAGES, PIXEL_CHOICES, None, OF_PIXELS),
    "loss inside forward": (WithLossInside(), LOGITS, CHOICES, None, PLAIN),
    "one sample": (F.cross_entropy, LOGITS[:1], CHOICES[:1], None, PLAIN[:1]),
    "one sample, not a batch": (F.cross_entropy, LOGITS[0], CHOICES[0], None, PLAIN[:1]),
    "one sample of probabilities, not a batch": (F.cross_entropy, LOGITS[0], SOFT[0], None, WITH_SOFT_TARGETS[:1]),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_el2n_by_hand(name: str) -> None:
    loss, x, t, samples, expected = BY_HAND[name]
    score = el2n(read(loss, x.clone().requires_grad_(), t, samples))
    assert not score.requires_grad
    torch.testing.assert_close(score, torch.tensor(expected), rtol=1e-5, atol=1e-6, equal_nan=True)


def test_el2n_under_autocast_is_in_float32_of_rounded_logits() -> None:
    score = el2n(read(autocast, LOGITS, CHOICES))
    rounded = LOGITS.bfloat16()
    expected = [error_by_hand(rounded[i].tolist(), int(CHOICES[i])) for i in range(B)]
    assert score.dtype == torch.float32
    torch.testing.assert_close(score, torch.tensor(expected), rtol=1e-5, atol=1e-6)
    half = el2n(read(F.cross_entropy, rounded, CHOICES))
    torch.testing.assert_close(half, torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_el2n_stays_in_float64() -> None:
    score = el2n(read(F.cross_entropy, LOGITS.double(), CHOICES))
    torch.testing.assert_close(score, torch.tensor(PLAIN, dtype=torch.float64), rtol=1e-6, atol=0.0)


def test_el2n_of_easy_samples_keeps_its_digits() -> None:
    """1 - p is rounded to a multiple of 6e-8 in float32, and to zero from a lead of 17 on."""
    leads = torch.tensor([5.0, 12.0, 15.0, 20.0, 30.0])
    logits = torch.stack([leads, torch.zeros(5)], dim=1)
    score = el2n(read(F.cross_entropy, logits, torch.zeros(5, dtype=torch.int64)))
    expected = math.sqrt(2) / (1 + leads.double().exp())
    torch.testing.assert_close(score, expected.float(), rtol=1e-5, atol=0.0)


def test_el2n_is_the_gradient_norm_by_the_logits() -> None:
    x = LOGITS.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(x, CHOICES, reduction="sum"), x)
    torch.testing.assert_close(el2n(read(F.cross_entropy, LOGITS, CHOICES)), gradient.norm(dim=1))


@pytest.mark.parametrize("loss", [nn.MSELoss(), nn.L1Loss(), nn.SmoothL1Loss(), nn.HuberLoss()])
@pytest.mark.parametrize("shape", [(B,), (B, 1), (B, 3), (B, 2, 2, 3)])
def test_residuals(loss: nn.Module, shape: tuple[int, ...]) -> None:
    x, t = normal(*shape), normal(*shape)
    expected = [
        math.sqrt(sum((a - b) ** 2 for a, b in zip(p, q, strict=True)))
        for p, q in zip(x.reshape(B, -1).tolist(), t.reshape(B, -1).tolist(), strict=True)
    ]
    torch.testing.assert_close(el2n(read(loss, x, t)), torch.tensor(expected))


def test_residuals_of_several_rows_a_sample_are_averaged() -> None:
    x, t = normal(2 * B, 3), normal(2 * B, 3)
    score = el2n(read(nn.MSELoss(), x, t, samples=B))
    torch.testing.assert_close(score, (x - t).norm(dim=1).reshape(B, 2).mean(1))
    assert el2n(read(nn.MSELoss(), torch.tensor(1.0), torch.tensor(3.0))).tolist() == [2.0]


@pytest.mark.parametrize("log_target", [False, True])
def test_kl_div(log_target: bool) -> None:
    loss = nn.KLDivLoss(reduction="batchmean", log_target=log_target)
    score = el2n(read(loss, LOGITS.log_softmax(1), SOFT.log() if log_target else SOFT))
    torch.testing.assert_close(score, torch.tensor(WITH_SOFT_TARGETS))


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="from torch 2.13")
@pytest.mark.parametrize("bias", [False, True])
def test_linear_cross_entropy_is_scored_by_its_logits(bias: bool) -> None:
    features, head, offset = normal(B, 6), normal(C, 6), normal(C) if bias else None
    fused = read(lambda x, t: F.linear_cross_entropy(x, head, t, linear_bias=offset), features, ONE_IGNORED)
    plain = read(F.cross_entropy, F.linear(features, head, offset), ONE_IGNORED)
    for score in (el2n, margin, is_correct, predictions):
        torch.testing.assert_close(score(fused), score(plain), equal_nan=True)
    torch.testing.assert_close(
        last_layer_gradient_norm(fused, features, bias), last_layer_gradient_norm(plain, features, bias), equal_nan=True
    )


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="from torch 2.13")
def test_linear_cross_entropy_of_positions() -> None:
    features, head, offset = normal(B, 6), normal(C, T, 6), normal(C, T)
    fused = read(lambda x, t: F.linear_cross_entropy(x, head, t, linear_bias=offset), features, TOKEN_CHOICES)
    logits = torch.einsum("bh,cth->bct", features, head) + offset
    plain = read(F.cross_entropy, logits, TOKEN_CHOICES)
    for score in (el2n, margin, is_correct):
        torch.testing.assert_close(score(fused), score(plain), equal_nan=True)


def test_a_smaller_last_batch_is_not_inflated() -> None:
    scores = (el2n, margin, is_correct, predictions)
    for score in scores:
        whole = score(read(F.cross_entropy, LOGITS, CHOICES))
        parts = [score(read(F.cross_entropy, LOGITS[i : i + 4], CHOICES[i : i + 4])) for i in (0, 4)]
        torch.testing.assert_close(torch.cat(parts), whole)


@pytest.mark.parametrize(
    "loss",
    [
        lambda x: F.poisson_nll_loss(x, ONE_HOT),
        lambda x: F.gaussian_nll_loss(x, ONE_HOT, 1.0),
        lambda x: F.multi_margin_loss(x, CHOICES),
        lambda x: F.hinge_embedding_loss(x, 2 * ONE_HOT - 1),
        lambda x: F.multilabel_soft_margin_loss(x, ONE_HOT),
    ],
)
def test_el2n_of_other_losses_raises(loss: Callable[[Tensor], Tensor]) -> None:
    call = read(lambda x, t: loss(x), LOGITS, CHOICES)
    with pytest.raises(ValueError, match=rf"EL2N needs .*; got {call.name} with input .* score, or pass `score_fn=`"):
        el2n(call)


# Margin, correctness, predictions.


def margin_by_hand(scores: Sequence[float], true: int) -> float:
    return scores[true] - max(score for c, score in enumerate(scores) if c != true)


def test_margin_by_hand() -> None:
    expected = torch.tensor([margin_by_hand(LOGITS[i].tolist(), int(CHOICES[i])) for i in range(B)])
    torch.testing.assert_close(margin(read(F.cross_entropy, LOGITS, CHOICES)), expected)
    torch.testing.assert_close(margin(read(nn.CrossEntropyLoss(WEIGHTS), LOGITS, CHOICES)), expected)
    torch.testing.assert_close(margin(read(F.nll_loss, LOGITS.log_softmax(1), CHOICES)), expected)
    torch.testing.assert_close(margin(read(F.multi_margin_loss, LOGITS, CHOICES)), expected)
    torch.testing.assert_close(margin(read(F.cross_entropy, LOGITS[0], CHOICES[0])), expected[:1])


def test_margin_and_correctness_of_positions_are_means() -> None:
    margins, right = [], []
    for i in range(B):
        kept = [p for p in range(T) if TOKEN_CHOICES[i, p] != -100]
        own = [margin_by_hand(TOKENS[i, :, p].tolist(), int(TOKEN_CHOICES[i, p])) for p in kept]
        margins.append(mean_or_nan(own))
        right.append(mean_or_nan([float(value > 0) for value in own]))
    for call in (
        read(F.cross_entropy, TOKENS, TOKEN_CHOICES),
        read(F.cross_entropy, FLAT_TOKENS, TOKEN_CHOICES.flatten(), samples=B),
    ):
        torch.testing.assert_close(margin(call), torch.tensor(margins), equal_nan=True)
        torch.testing.assert_close(is_correct(call), torch.tensor(right), equal_nan=True)
    assert {0.0, 1 / 3, 1.0} <= set(right)


@pytest.mark.parametrize("shape", [(B,), (B, 1)])
def test_margin_of_one_logit(shape: tuple[int, ...]) -> None:
    z, t = torch.tensor([2.0, 2.0, -3.0, -3.0, 0.5]).reshape(shape), torch.tensor([1.0, 0, 1, 0, 1]).reshape(shape)
    call = read(F.binary_cross_entropy_with_logits, z, t)
    assert margin(call).tolist() == [2.0, -2.0, -3.0, 3.0, 0.5]
    assert is_correct(call).tolist() == [1.0, 0.0, 0.0, 1.0, 1.0]


def test_correct_and_predicted_by_hand() -> None:
    logits = torch.tensor([[3.0, 1.0], [3.0, 1.0], [-1.0, 0.0], [5.0, 6.0]])
    target = torch.tensor([0, 1, 1, -100])
    call = read(F.cross_entropy, logits, target)
    assert is_correct(call)[:3].tolist() == [1.0, 0.0, 1.0]
    assert is_correct(call)[3].isnan()
    assert predictions(call).tolist() == [0, 0, 1, 1]
    soft = torch.tensor([[0.6, 0.4], [0.6, 0.4], [0.1, 0.9], [0.9, 0.1]])
    assert is_correct(read(F.cross_entropy, logits, soft)).tolist() == [1.0, 1.0, 1.0, 0.0]


def test_correct_labels_are_a_share() -> None:
    z, t = torch.tensor([[1.0, -1.0, 2.0, -2.0], [1.0, 1.0, 1.0, 1.0]]), torch.tensor([[1.0, 0, 0, 1], [1.0, 1, 1, 1]])
    assert is_correct(read(F.binary_cross_entropy_with_logits, z, t)).tolist() == [0.5, 1.0]
    assert is_correct(read(F.binary_cross_entropy, z.sigmoid(), t)).tolist() == [0.5, 1.0]


def test_what_a_loss_does_not_know_raises() -> None:
    regression, soft = read(F.mse_loss, LOGITS, ONE_HOT), read(F.cross_entropy, LOGITS, SOFT)
    labels = read(F.binary_cross_entropy_with_logits, LOGITS, ONE_HOT)
    with pytest.raises(ValueError, match=r"The margin needs .* got mse_loss .*score_fn="):
        margin(regression)
    for call in (soft, labels):
        with pytest.raises(ValueError, match=rf"The margin needs .* got {call.name}"):
            margin(call)
    with pytest.raises(ValueError, match=r"Correctness needs the loss of a classifier; got mse_loss"):
        is_correct(regression)
    for call in (regression, soft, labels, read(F.cross_entropy, TOKENS, TOKEN_CHOICES)):
        with pytest.raises(ValueError, match=r"exactly one class per sample.*score_fn="):
            predictions(call)


# The gradient of the last layer.


@pytest.mark.parametrize("bias", [False, True])
def test_last_layer_gradient_against_autograd(bias: bool) -> None:
    features, head = normal(B, 7), nn.Linear(7, C, bias=bias)
    found = last_layer_gradient_norm(read(F.cross_entropy, head(features), CHOICES), features, bias)
    for i in range(B):
        loss = F.cross_entropy(head(features[i : i + 1]), CHOICES[i : i + 1])
        gradients = torch.autograd.grad(loss, list(head.parameters()))
        expected = math.sqrt(sum(g.double().square().sum().item() for g in gradients))
        assert found[i].item() == pytest.approx(expected, rel=1e-5)


def test_last_layer_gradient_refuses_what_it_would_get_wrong() -> None:
    features = normal(B, 7)
    for call in (
        read(nn.CrossEntropyLoss(WEIGHTS), LOGITS, CHOICES),
        read(nn.CrossEntropyLoss(label_smoothing=0.1), LOGITS, CHOICES),
        read(F.cross_entropy, LOGITS, SOFT),
        read(F.cross_entropy, TOKENS, TOKEN_CHOICES),
        read(F.mse_loss, LOGITS, ONE_HOT),
    ):
        with pytest.raises(ValueError, match=r"The gradient of the last layer needs cross_entropy of one class"):
            last_layer_gradient_norm(call, features)
    call = read(F.cross_entropy, LOGITS, CHOICES)
    for wrong in (normal(B, T, 7), normal(B + 1, 7), normal(B)):
        with pytest.raises(ValueError, match=r"needs its input as \(5, H\); got "):
            last_layer_gradient_norm(call, wrong)


class NoSync(TorchDispatchMode):
    """Raises where the host would wait for a device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split("::")[1].split(".")[0]
        assert name not in ("_local_scalar_dense", "nonzero", "_unique2", "masked_select"), f"the host waits in {name}"
        return func(*args, **(kwargs or {}))


def test_the_host_does_not_wait() -> None:
    states = vog_state(B, (T,)), forgetting_state(B), aum_state(B)
    indices, gradients, features = torch.arange(B), normal(B, T), normal(B, 7)
    for loss, x, t, samples, _ in BY_HAND.values():
        with NoSync():
            el2n(read(loss, x, t, samples))
    call = read(F.cross_entropy, LOGITS, ONE_IGNORED)
    with NoSync():
        predictions(call)
        last_layer_gradient_norm(call, features)
        update_vog_(states[0], indices, gradients)
        update_forgetting_(states[1], indices, is_correct(call))
        update_aum_(states[2], indices, margin(call))
        vog(states[0]), forgetting(states[1]), aum(states[2])
    assert aum(states[2]).isnan().tolist() == [False, False, False, True, False]
