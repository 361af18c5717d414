"""Masks of salient weights against ranking by hand, and random labels that are never the own ones."""

import pytest
import torch
from torch import Tensor

from lightning_grad.functional import random_labels, saliency_masks
from lightning_grad.functional.fine_tuning.saliency import label_shifts, shifted_labels


def make_gradients() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) * size for shape, size in (((7, 5), 1.0), ((9,), 10.0), ((), 0.1))]


def ranked(gradients: list[Tensor], keep: float) -> list[Tensor]:
    """The released code: sort the sizes of all entries, and keep the first ones."""
    together = torch.cat([-gradient.abs().flatten() for gradient in gradients])
    ranks = torch.argsort(torch.argsort(together))
    chosen = (ranks < round(len(together) * keep)).split([gradient.numel() for gradient in gradients])
    return [each.reshape(gradient.shape) for each, gradient in zip(chosen, gradients, strict=True)]


@pytest.mark.parametrize("keep", [0.05, 0.1, 0.5, 0.9, 1.0])
def test_one_threshold_ranks_the_entries_of_the_whole_network(keep: float) -> None:
    gradients = make_gradients()
    masks = saliency_masks(gradients, keep)
    assert all(map(torch.equal, masks, ranked(gradients, keep)))
    shares = [mask.float().mean().item() for mask in masks]
    assert keep == 1.0 or max(shares) > min(shares) + 0.05, "a threshold for each weight would give equal shares"


def test_half_are_the_entries_above_the_median() -> None:
    gradients = [*make_gradients()[:1], torch.tensor([5.0])]
    median = torch.cat([gradient.abs().flatten() for gradient in gradients]).median()
    for mask, gradient in zip(saliency_masks(gradients), gradients, strict=True):
        assert torch.equal(mask, gradient.abs() > median)


def test_weights_without_a_gradient_are_not_salient() -> None:
    gradient = torch.tensor([0.0, 0.0, 0.0, 2.0])
    assert saliency_masks([gradient], 0.75)[0].tolist() == [False, False, False, True]
    assert saliency_masks([gradient], 1.0)[0].all()


def test_at_least_one_weight_is_kept_and_half_precision_is_compared_as_it_is() -> None:
    assert saliency_masks([torch.tensor([1.0, 3.0, 2.0], dtype=torch.bfloat16)], 0.01)[0].tolist() == [
        False,
        True,
        False,
    ]


@pytest.mark.parametrize(("keep", "words"), [(0.0, "keep must be above 0"), (1.1, "keep must be above 0")])
def test_shares_out_of_range(keep: float, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        saliency_masks(make_gradients(), keep)
    with pytest.raises(ValueError, match="at least one gradient"):
        saliency_masks([])


@pytest.mark.parametrize("num_classes", [2, 3, 10])
def test_a_random_label_is_one_of_the_others_with_equal_chances(num_classes: int) -> None:
    labels, draws = torch.arange(num_classes).repeat(4000), torch.rand(4000 * num_classes)
    others = random_labels(labels, draws, num_classes)
    assert not (others == labels).any()
    for label in range(num_classes):
        counts = others[labels == label].bincount(minlength=num_classes).float()
        expected = 4000 / (num_classes - 1)
        assert counts[label] == 0
        assert ((counts[counts > 0] - expected).abs() < 5 * expected**0.5).all()


def test_the_largest_draw_is_a_class_too() -> None:
    draws = torch.tensor([0.0, torch.nextafter(torch.tensor(1.0), torch.tensor(0.0)).item()])
    assert label_shifts(draws, 10).tolist() == [1, 9]


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.float32])
def test_binary_labels_flip_in_their_own_type(dtype: torch.dtype) -> None:
    others = random_labels(torch.tensor([0, 1, 1]).to(dtype), torch.rand(3), 2)
    assert others.dtype == dtype
    assert others.tolist() == [1, 0, 0]


def test_what_is_no_class_stays_and_own_labels_come_back() -> None:
    labels, draws = torch.tensor([[3, -100], [0, 7]]), torch.rand(2, 2)
    others = random_labels(labels, draws, 4)
    assert others[0, 1] == -100
    assert others[1, 1] == 7
    assert torch.equal(shifted_labels(others, -label_shifts(draws, 4), 4), labels)


def test_one_class_has_no_other() -> None:
    with pytest.raises(ValueError, match="num_classes must be at least 2"):
        random_labels(torch.zeros(1), torch.zeros(1), 1)
