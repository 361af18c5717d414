"""Chunks of a batch, against a loop by hand, with running statistics as in the paper's algorithm 1."""

import copy

import pytest
import torch
from torch import Tensor, nn

from lightning_grad.functional import ghost_batch_norm

LAYERS = {
    "1d": (nn.BatchNorm1d(3), (3,)),
    "1d, with length": (nn.BatchNorm1d(3), (3, 5)),
    "2d": (nn.BatchNorm2d(3), (3, 4, 4)),
    "3d": (nn.BatchNorm3d(3), (3, 2, 3, 2)),
    "mean over all": (nn.BatchNorm1d(3, momentum=None), (3,)),
    "without running statistics": (nn.BatchNorm1d(3, track_running_stats=False), (3,)),
    "without weights": (nn.BatchNorm1d(3, affine=False), (3,)),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(("samples", "size", "chunks"), [(8, 4, [4, 4]), (10, 3, [3, 3, 2, 2]), (9, 4, [3, 3, 3])])
def test_it_is_a_loop_over_chunks(kind: str, samples: int, size: int, chunks: list[int]) -> None:
    layer, shape = LAYERS[kind]
    one, other = copy.deepcopy(layer), copy.deepcopy(layer)
    inputs = torch.randn(samples, *shape, generator=torch.Generator().manual_seed(0))
    by_hand = torch.cat([one(chunk) for chunk in inputs.split(chunks)])
    assert torch.equal(ghost_batch_norm(other, inputs, size), by_hand)
    for left, right in zip(one.buffers(), other.buffers(), strict=True):
        assert torch.equal(left, right)
    assert not torch.equal(layer(inputs), by_hand), "one chunk gives something else"


def test_running_statistics_are_those_of_algorithm_1() -> None:
    layer, eta = nn.BatchNorm1d(1, momentum=0.25), 0.25
    inputs = torch.tensor([[0.0], [2.0], [10.0], [20.0]])
    ghost_batch_norm(layer, inputs, 2)
    means = [1.0, 15.0]
    expected = sum(eta * (1 - eta) ** (1 - i) * mean for i, mean in enumerate(means))  # from a mean of 0
    assert layer.running_mean is not None
    assert layer.running_mean.item() == pytest.approx(expected)


@pytest.mark.parametrize("samples", range(1, 40))
@pytest.mark.parametrize("size", [2, 3, 7])
def test_chunks_are_equal_and_none_has_one_sample(samples: int, size: int) -> None:
    seen: list[int] = []

    def look(chunk: Tensor) -> Tensor:
        seen.append(len(chunk))
        return chunk

    inputs = torch.randn(samples, 1)
    assert torch.equal(ghost_batch_norm(look, inputs, size), inputs)
    assert max(seen) - min(seen) <= 1
    assert max(seen) <= size or (size == 2 and max(seen) == 3)
    assert min(seen) > 1 or samples == 1
    naive = [len(chunk) for chunk in inputs.chunk(-(-samples // size))]
    if (samples, size) in ((10, 3), (3, 2)):
        assert min(naive) == 1, "torch's chunk leaves a last chunk of one sample"
