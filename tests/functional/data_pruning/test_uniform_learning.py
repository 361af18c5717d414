"""The repeats of USEFUL."""

import pytest
import torch
from torch import Tensor

from lightning_grad.functional import uniform_learning_repeats


def two_halves(easy: int, late: int) -> tuple[Tensor, Tensor]:
    """Return outputs and losses of a class of which some samples are learned and others not yet."""
    generator = torch.Generator().manual_seed(easy)
    outputs = torch.cat([torch.full((easy, 3), 5.0), torch.zeros(late, 3)])
    outputs += 0.1 * torch.randn(easy + late, 3, generator=generator)
    losses = torch.cat([torch.full((easy,), 0.01), torch.ones(late)])
    return outputs, losses


def test_of_each_class_the_samples_of_high_loss_are_repeated() -> None:
    (first, first_losses), (second, second_losses) = two_halves(6, 3), two_halves(2, 7)
    outputs, losses = torch.cat([first, second]), torch.cat([first_losses, second_losses])
    labels = torch.tensor([4] * 9 + [1] * 9)
    order = torch.randperm(18, generator=torch.Generator().manual_seed(0))
    found = uniform_learning_repeats(outputs[order], losses[order], labels[order])
    assert sorted(order[found].tolist()) == [6, 7, 8, *range(11, 18)]
    assert torch.equal(found, found.sort().values)


def test_mean_loss_decides_and_not_the_size_of_a_cluster() -> None:
    outputs = torch.tensor([[0.0], [0.1], [0.2], [9.0]])
    labels = torch.zeros(4, dtype=torch.int64)
    assert uniform_learning_repeats(outputs, torch.tensor([0.3, 0.3, 0.3, 0.4]), labels).tolist() == [3]
    assert uniform_learning_repeats(outputs, torch.tensor([0.3, 0.3, 0.3, 0.2]), labels).tolist() == [0, 1, 2]
    assert uniform_learning_repeats(outputs, torch.tensor([torch.nan, 0.3, 0.3, 0.2]), labels).tolist() == [0, 1, 2]


def test_classes_that_cannot_be_split_repeat_nothing() -> None:
    outputs = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    losses, labels = torch.ones(4), torch.tensor([0, 1, 1, 1])
    assert uniform_learning_repeats(outputs, losses, labels).tolist() == []
    nothing = uniform_learning_repeats(torch.zeros(0, 2), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    assert nothing.tolist() == []


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="got 3, 2 and 3"):
        uniform_learning_repeats(torch.zeros(3, 2), torch.zeros(2), torch.zeros(3, dtype=torch.int64))
