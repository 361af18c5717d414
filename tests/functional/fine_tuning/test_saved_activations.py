"""Counts of what autograd saves, against counts by hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_grad.functional import SavedActivations


def saved(run: nn.Module, x: Tensor) -> int:
    with SavedActivations([*run.parameters(), *run.buffers()]) as count:
        run(x).sum().backward()
    return count.bytes


def test_a_memory_that_is_saved_twice_counts_once() -> None:
    x = torch.ones(10, requires_grad=True)
    y = x.exp()
    with SavedActivations() as count:
        (y * y).sum()  # both factors are one tensor
    assert count.bytes == 40


def test_linear_layers_save_their_inputs_and_frozen_ones_before_the_first_trained_one_nothing() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    x = torch.ones(5, 4)
    assert saved(net, x) == 4 * 5 * (4 + 8 + 8)  # tanh saves its output, which is the input of the next layer
    net[0].requires_grad_(False)
    net[2].requires_grad_(False)
    assert saved(net, x) == 4 * 5 * 8
    net.requires_grad_(False)
    with SavedActivations(net.parameters()) as count:
        net(x)
    assert count.bytes == 0


def test_a_frozen_layer_behind_the_first_trained_one_saves_no_input_of_its_own() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(2 * self.first(x))  # type: ignore[no-any-return]

    net, x = Net(), torch.ones(5, 4)
    assert saved(net, x) == 4 * 5 * (4 + 8)
    net.second.requires_grad_(False)
    assert saved(net, x) == 4 * 5 * 4


def test_it_reports_each_saved_tensor_and_leaves_gradients_as_they_are() -> None:
    net, x = nn.Linear(4, 8), torch.randn(5, 4)
    seen: list[Tensor] = []
    with SavedActivations(net.parameters(), seen.append) as count:
        F.relu(net(x)).square().sum().backward()
    assert [tuple(tensor.shape) for tensor in seen] == [(5, 4), (5, 8), (5, 8)]
    assert seen[1].data_ptr() == seen[2].data_ptr()  # what relu saves is what square saves
    assert count.bytes == 4 * (5 * 4 + 5 * 8)
    gradient = net.weight.grad
    assert gradient is not None
    other = nn.Linear(4, 8)
    other.load_state_dict(net.state_dict())
    F.relu(other(x)).square().sum().backward()
    assert other.weight.grad is not None
    assert torch.equal(gradient, other.weight.grad)
