"""Input gradients against finite differences and captum; DiffROAR has the right sign, and refuses what says nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_grad.functional import diff_roar, input_saliency, mask_inputs
from tests.cases import cases


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 4)).double().eval()


INPUTS = torch.randn(3, 1, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_saliency_is_that_of_finite_differences(net: nn.Module) -> None:
    classes = net(INPUTS).argmax(1, keepdim=True)
    found = input_saliency(lambda x: net(x).gather(1, classes)[:, 0], INPUTS)
    assert found.shape == INPUTS.shape
    for place in ((0, 0, 0), (0, 2, 3), (0, 5, 5)):
        step = torch.zeros_like(INPUTS)
        step[(slice(None), *place)] = 1e-5
        slope = ((net(INPUTS + step) - net(INPUTS - step)).gather(1, classes)[:, 0] / 2e-5).abs()
        torch.testing.assert_close(found[(slice(None), *place)], slope.detach(), atol=1e-8, rtol=1e-6)
    assert INPUTS.grad is None


def test_saliency_is_that_of_captum(net: nn.Module) -> None:
    attr = pytest.importorskip("captum.attr")
    classes = net(INPUTS).argmax(1)
    theirs = attr.Saliency(net).attribute(INPUTS.clone().requires_grad_(), target=classes)
    found = input_saliency(lambda x: net(x).gather(1, classes[:, None])[:, 0], INPUTS)
    torch.testing.assert_close(found, theirs, atol=1e-12, rtol=1e-12)


def test_masks_keep_the_share_of_each_sample() -> None:
    inputs = torch.arange(1.0, 9).view(2, 2, 2)
    saliency = torch.tensor([[[4.0, 3], [2, 1]], [[1, 2], [3, 4]]])
    assert mask_inputs(inputs, saliency, 0.5, "top").tolist() == [[[1, 2], [0, 0]], [[0, 0], [7, 8]]]
    fill = torch.tensor([[-1.0, -2], [-3, -4]])
    assert mask_inputs(inputs, saliency, 0.01, "bottom", fill).tolist() == [[[-1, -2], [-3, 4]], [[5, -2], [-3, -4]]]
    assert torch.equal(mask_inputs(inputs, saliency, 1.0, "top"), inputs)


@cases(
    ("arguments", "words"),
    [
        ((torch.ones(2, 3), torch.ones(2, 2), 0.5, "top"), "must have the shape of the inputs"),
        ((torch.ones(2, 3), torch.ones(2, 3), 0.0, "top"), "share must be above 0"),
        ((torch.ones(2, 3), torch.ones(2, 3), 1.5, "top"), "share must be above 0"),
        ((torch.ones(2, 3), torch.ones(2, 3), 0.5, "upper"), "keep must be"),
    ],
)
def test_wrong_masks_are_refused(arguments: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        mask_inputs(*arguments)


# DiffROAR on inputs whose first half tells the class, while the second is the same noise in all classes.

WIDTH = 10


def draw(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (count,), generator=generator)
    inputs = 3 + torch.randn(count, 2 * WIDTH, generator=generator)
    inputs[:, :WIDTH] += 1.6 * (labels[:, None] - 0.5)
    return inputs, labels


def train(inputs: Tensor, labels: Tensor, seed: int) -> Any:
    """Fit a ridge regression on a bootstrap sample."""
    chosen = torch.randint(len(inputs), (len(inputs),), generator=torch.Generator().manual_seed(seed))
    mean, x, y = inputs.mean(0), inputs[chosen], 2.0 * labels[chosen] - 1
    x = x - mean
    weight = torch.linalg.solve(x.T @ x + torch.eye(x.shape[1]), x.T @ y)
    return lambda others: torch.stack([-(others - mean) @ weight, (others - mean) @ weight], 1)


def test_evidence_noise_and_chance_have_differences_above_below_and_around_zero() -> None:
    data, test = draw(400, 0), draw(400, 1)
    evidence = torch.cat([torch.ones(WIDTH), torch.zeros(WIDTH)])

    def attribute(sign: float) -> Any:
        return lambda inputs: (
            sign * evidence.expand_as(inputs)
            + 1e-3 * torch.rand(inputs.shape, generator=torch.Generator().manual_seed(len(inputs)))
        )

    found = diff_roar(train, attribute(1.0), data, test, share=0.3)
    assert found.mean > 20
    assert found.unmasked > 0.9
    assert len(found.differences) == len(found.top) == 3
    assert "points (" in str(found)
    assert str(found).startswith(f"DiffROAR {found.mean:.1f} points")
    assert diff_roar(train, attribute(-1.0), data, test, share=0.3).mean < -20
    assert abs(diff_roar(train, attribute(0.0), data, test, share=0.3).mean) < 5


def test_the_gradient_of_a_network_that_reads_the_evidence_has_a_positive_difference() -> None:
    data, test = draw(400, 0), draw(400, 1)
    network = train(*data, 5)
    found = diff_roar(train, lambda inputs: input_saliency(lambda x: network(x).amax(1), inputs), data, test, share=0.3)
    assert found.mean > 10


def test_a_poor_network_is_refused() -> None:
    inputs, labels = draw(400, 0)
    noise = torch.randn(inputs.shape, generator=torch.Generator().manual_seed(3))
    with pytest.raises(ValueError, match=r"reaches an accuracy of 0\.8 on whole inputs.*Train it longer, or set"):
        diff_roar(train, torch.abs, (noise, labels), (noise, labels))
    assert diff_roar(train, torch.abs, (noise, labels), (noise, labels), least_accuracy=0.4).unmasked < 0.8


@cases(
    ("arguments", "words"),
    [
        ({"seeds": ()}, "at least one seed"),
        ({"share": 0.0}, "share must be above 0"),
        ({"attribute": lambda inputs: inputs[:, 0]}, "saliency must have the shape of the inputs"),
        ({"test": (torch.zeros(4, 2 * WIDTH, dtype=torch.uint8), torch.zeros(4))}, r"float32 and torch\.uint8"),
    ],
)
def test_bad_arguments_of_diff_roar_are_refused_before_a_network_is_trained(arguments: Any, words: str) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("trained")

    given = {"attribute": torch.abs, "data": draw(40, 0), "test": draw(40, 1), **arguments}
    with pytest.raises(ValueError, match=words):
        diff_roar(never, **given)
