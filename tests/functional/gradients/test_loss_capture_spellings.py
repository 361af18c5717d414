"""Loss capture: every spelling against the step without it, and against each sample alone."""

import torch

from lightning_grad.functional import LossCapture
from tests.functional.gradients.spellings import (
    SPELLINGS,
    Spelling,
    each_alone,
    every_reweightable,
    every_spelling,
    same_bits,
    with_gradient,
)


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
