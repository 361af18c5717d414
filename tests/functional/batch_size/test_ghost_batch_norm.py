"""Chunks of a batch, against a loop by hand, with running statistics as in the paper's algorithm 1."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_grad.functional import ghost_batch_norm

LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "1d": (nn.BatchNorm1d(3), (3,)),
    "1d, with length": (nn.BatchNorm1d(3), (3, 5)),
    "2d": (nn.BatchNorm2d(3), (3, 4, 4)),
    "3d": (nn.BatchNorm3d(3), (3, 2, 3, 2)),
    "mean over all": (nn.BatchNorm1d(3, momentum=None), (3,)),
    "without running statistics": (nn.BatchNorm1d(3, track_running_stats=False), (3,)),
    "with statistics that are kept": (nn.BatchNorm1d(3), (3,)),
    "without weights": (nn.BatchNorm1d(3, affine=False), (3,)),
}
LAYERS["with statistics that are kept"][0].track_running_stats = False


class Own(nn.BatchNorm2d):
    """Has a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)


LAYERS["another class"] = (Own(3), (3, 4, 4))


def by_hand(layer: Any, inputs: Tensor, chunks: int) -> Tensor:
    """Normalize one chunk after the other, and put each result where its sample is."""
    outputs = torch.empty_like(inputs)
    for number in range(chunks):
        outputs[number::chunks] = layer(inputs[number::chunks])
    return outputs


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("samples", "size", "chunks"), [(8, 4, 2), (12, 3, 4), (10, 3, 4), (9, 4, 3)])
def test_it_is_a_loop_over_chunks(kind: str, channels_last: bool, samples: int, size: int, chunks: int) -> None:
    layer, shape = LAYERS[kind]
    if channels_last and len(shape) != 3:
        pytest.skip("a layout of images")
    one, other = copy.deepcopy(layer).double(), copy.deepcopy(layer).double()
    inputs = torch.randn(samples, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    inputs = inputs.to(memory_format=torch.channels_last) if channels_last else inputs
    results = []
    for normalize in (lambda x: by_hand(one, x, chunks), lambda x: ghost_batch_norm(other, x, size)):
        x = inputs.clone().requires_grad_()
        y = normalize(x)
        (y * torch.linspace(0, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
        results.append([y.detach(), x.grad])
    for found, trained in zip(results, (one, other), strict=True):
        found += [*trained.buffers(), *(parameter.grad for parameter in trained.parameters())]
    for left, right in zip(*results, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(layer.double()(inputs), results[0][0]), "one chunk gives something else"


def test_running_statistics_are_those_of_algorithm_1() -> None:
    layer, eta = nn.BatchNorm1d(1, momentum=0.25), 0.25
    inputs = torch.tensor([[0.0], [10.0], [2.0], [20.0]])
    ghost_batch_norm(layer, inputs, 2)
    means = [1.0, 15.0]
    expected = sum(eta * (1 - eta) ** (1 - i) * mean for i, mean in enumerate(means))  # from a mean of 0
    assert layer.running_mean is not None
    assert layer.running_mean.item() == pytest.approx(expected)
    assert layer.num_batches_tracked is not None
    assert layer.num_batches_tracked.item() == 2


@pytest.mark.parametrize("samples", range(1, 40))
@pytest.mark.parametrize("size", [2, 3, 7])
def test_chunks_are_equal_and_none_has_one_sample(samples: int, size: int) -> None:
    seen: list[int] = []

    def look(chunk: Tensor) -> Tensor:
        seen.append(len(chunk))
        return chunk

    inputs = torch.randn(samples, 1)
    layer = nn.BatchNorm1d(1)
    assert torch.equal(ghost_batch_norm(layer, inputs, size, look), inputs)
    assert max(seen) - min(seen) <= 1
    assert max(seen) <= size or (size == 2 and max(seen) == 3)
    assert min(seen) > 1 or samples == 1
    naive = [len(chunk) for chunk in inputs.chunk(-(-samples // size))]
    if (samples, size) in ((10, 3), (3, 2)):
        assert min(naive) == 1, "torch's chunk leaves a last chunk of one sample"
