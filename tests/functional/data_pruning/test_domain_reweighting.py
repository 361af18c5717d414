"""Alignments against one flat vector for each gradient, and weights against the published rule by hand."""

import math
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_grad.functional import gradient_alignments, update_domain_weights

CLOSE = {"rtol": 1e-6, "atol": 1e-6}  # products are rounded to float32
SHAPES = [(4, 3), (3,), (2, 2, 2)]


def gradient(seed: int, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(shape, generator=generator) for shape in SHAPES]


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([each.flatten() for each in tensors]).double()


def by_hand(gradients: list[list[Tensor]], target: list[Tensor]) -> Tensor:
    """The inner products in the unit that the docstring names."""
    size = torch.stack([flat(each).square().sum() for each in gradients]).mean().sqrt()
    return torch.stack([flat(each) @ flat(target) for each in gradients]) / (size * flat(target).norm())


GRADIENTS, TARGET = [gradient(0), gradient(1, 5.0), gradient(2, 0.1)], gradient(3)


def test_alignments_are_those_of_flat_vectors() -> None:
    torch.testing.assert_close(gradient_alignments(GRADIENTS, TARGET), by_hand(GRADIENTS, TARGET), **CLOSE)
    plain = torch.stack([flat(each) @ flat(TARGET) for each in GRADIENTS])
    torch.testing.assert_close(gradient_alignments(iter(GRADIENTS), TARGET, normalize=False), plain, **CLOSE)
    # A cosine of each would lose that the second domain has the largest gradients, so the largest effect.
    cosines = torch.stack([torch.cosine_similarity(flat(each), flat(TARGET), 0) for each in GRADIENTS])
    assert not torch.allclose(gradient_alignments(GRADIENTS, TARGET), cosines, atol=0.1)


def test_one_gradient_exists_at_a_time() -> None:
    alive: list[weakref.ref[Any]] = []

    def one_by_one() -> Iterator[list[Tensor]]:
        for seed in range(3):
            assert not any(each() is not None for each in alive)
            made = gradient(seed)
            alive[:] = [weakref.ref(each) for each in made]
            yield made
            del made

    gradient_alignments(one_by_one(), TARGET)


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_the_unit_does_not_depend_on_the_scale_of_the_loss(scale: float) -> None:
    scaled = [[scale * each for each in one] for one in GRADIENTS]
    found = gradient_alignments(scaled, [scale * each for each in TARGET])
    torch.testing.assert_close(found, gradient_alignments(GRADIENTS, TARGET), rtol=1e-5, atol=1e-7)
    plain = gradient_alignments(scaled, [scale * each for each in TARGET], normalize=False)
    torch.testing.assert_close(
        plain, scale**2 * gradient_alignments(GRADIENTS, TARGET, normalize=False), rtol=1e-5, atol=0.0
    )


@pytest.mark.parametrize("normalize", [False, True])
def test_a_domain_without_a_finite_gradient_has_no_say(normalize: bool) -> None:
    broken = [GRADIENTS[0], [torch.full(shape, math.nan) for shape in SHAPES], GRADIENTS[2]]
    found = gradient_alignments(broken, TARGET, normalize)
    assert found[1] == 0.0
    torch.testing.assert_close(found[[0, 2]], gradient_alignments([broken[0], broken[2]], TARGET, normalize))


def test_no_gradient_at_all() -> None:
    zero = [torch.zeros(shape) for shape in SHAPES]
    assert gradient_alignments([zero, zero], TARGET).tolist() == [0.0, 0.0]
    assert gradient_alignments(GRADIENTS, zero).tolist() == [0.0] * 3


def test_weights_follow_the_rule() -> None:
    weights, alignments = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64), torch.tensor([1.0, 0.0, -2.0])
    by_rule = torch.tensor([0.2 * math.e**0.3, 0.3, 0.5 * math.e**-0.6], dtype=torch.float64)
    by_rule /= by_rule.sum()
    torch.testing.assert_close(update_domain_weights(weights, alignments, 0.3), by_rule)
    shares = torch.tensor([0.6, 0.3, 0.1])
    found = update_domain_weights(weights, alignments, 0.3, shares, floor=0.25)
    torch.testing.assert_close(found, 0.75 * by_rule + 0.25 * shares.double())
    torch.testing.assert_close(update_domain_weights(weights, alignments, 0.0), weights)


def test_the_floor_lets_a_domain_return() -> None:
    weights = {floor: torch.tensor([0.5, 0.5]) for floor in (0.0, 0.1)}
    against, back = torch.tensor([-1.0, 1.0]), torch.tensor([1.0, -1.0])
    for floor in weights:
        for alignments in [against] * 20 + [back] * 5:
            weights[floor] = update_domain_weights(weights[floor], alignments, 1.0, floor=floor)
    assert weights[0.1][0] > 0.9
    assert weights[0.0][0] < 1e-6
    huge = update_domain_weights(torch.tensor([0.5, 0.5]), torch.tensor([1.0, -1.0]), 1e6, floor=0.1)
    torch.testing.assert_close(huge, torch.tensor([0.95, 0.05]))


def test_wrong_arguments() -> None:
    one, two = torch.ones(1), torch.full((2,), 0.5)
    for arguments, words in (
        ((two, one, 1.0), r"alignments must have one entry for each domain, \(k,\); got shape \(1,\)"),
        ((two, two, 1.0, one), "shares must have one entry"),
        ((two.reshape(2, 1), two, 1.0), "weights must have one entry"),
        ((two, two, -1.0), "step_size must be at least 0; got -1.0"),
        ((two, two, math.nan), "step_size must be at least 0"),
        ((two, two, 1.0, None, 1.5), "floor must be from 0 to 1; got 1.5"),
    ):
        with pytest.raises(ValueError, match=words):
            update_domain_weights(*arguments)
    with pytest.raises(ValueError, match="domain 1 has 2"):
        gradient_alignments([TARGET, TARGET[:2]], TARGET)
    with pytest.raises(ValueError, match="at least one domain"):
        gradient_alignments([], TARGET)
