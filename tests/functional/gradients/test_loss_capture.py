"""Loss capture: what a call holds, which graphs it keeps, and what cannot be read."""

import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_grad.functional import LossCall, LossCapture
from tests.functional.gradients.spellings import (
    BITS,
    CHOICES,
    CLASS_WEIGHTS,
    PROBABILITIES,
    SIGNS,
    WEIGHTS,
    B,
    C,
    Loss,
    T,
    classes,
    legacy,
    normal,
    reweighted,
    same_bits,
    some,
)

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
    for words in ("2 losses", "0: cross_entropy, 1: mse_loss", "loss_index=0", "score_fn="):
        assert words in str(error.value)
    assert capture.only(1).name == "mse_loss"
    for which in (2, -1):
        with pytest.raises(
            RuntimeError, match=f"loss_index={which} is out of range: the step has 2 losses: 0: cross_entropy"
        ):
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
    with pytest.raises(ValueError, match="at least 1; got 0"):
        LossCapture(samples=0)
    # A wrong call raises as it would without the capture.
    for reweight in (None, lambda call: WEIGHTS):
        with LossCapture(reweight=reweight), pytest.raises(TypeError, match="required positional argument"):
            F.cross_entropy(normal(B, C))  # type: ignore[call-arg]
        with LossCapture(reweight=reweight), pytest.raises(ValueError, match="wrong is not a valid value"):
            F.cross_entropy(normal(B, C), CHOICES, reduction="wrong")
        with LossCapture(reweight=reweight), pytest.raises((RuntimeError, ValueError), match="batch"):
            F.cross_entropy(normal(B, C), classes(B + 1))
