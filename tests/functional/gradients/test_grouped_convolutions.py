"""The fast ways to per-sample norms on a CPU, with all samples as groups of one call, against the plain ways."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_grad.functional.gradients._ghost import contributions, convolutions
from lightning_grad.functional.gradients._ghost.convolutions import Convolution, ConvolutionSettings, has_fast_groups
from lightning_grad.functional.gradients.per_sample_gradients import PerSampleGradientNorms


class GroupsOfConvolutions(TorchDispatchMode):
    """Records the number of groups of each backward pass of a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution_backward.default:
            self.found.append(args[9])
        return func(*args, **(kwargs or {}))


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the grouped way on any machine."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")


@contextmanager
def without_onednn() -> Iterator[None]:
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = True  # type: ignore[assignment]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "plain": (nn.Conv2d(3, 4, 3, padding=1), (3, 12, 10)),
    "strided": (nn.Conv2d(3, 4, (3, 2), stride=(2, 3), padding=(1, 2)), (3, 11, 10)),
    "strided beyond the last position": (nn.Conv2d(2, 3, 3, stride=4), (2, 12, 12)),
    "dilated": (nn.Conv2d(3, 4, 3, dilation=(2, 3), padding=2), (3, 11, 12)),
    "same": (nn.Conv2d(2, 3, (4, 3), padding="same", dilation=(2, 2)), (2, 9, 8)),
    "circular": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (2, 7, 8)),
    "two groups": (nn.Conv2d(4, 6, 3, groups=2, padding=1), (4, 9, 8)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4, stride=2), (4, 9, 8)),
    "one dimension": (nn.Conv1d(3, 4, 5, stride=2, padding=2), (3, 25)),
    "three dimensions": (nn.Conv3d(2, 3, (2, 3, 3), padding=1, stride=(1, 2, 1)), (2, 5, 6, 4)),
    "transposed": (nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1, output_padding=1), (3, 6, 6)),
    "transposed groups": (nn.ConvTranspose2d(4, 6, 3, groups=2, stride=(1, 2)), (4, 6, 7)),
}


def norms_of(layer: nn.Module, images: Tensor) -> Tensor:
    return PerSampleGradientNorms(layer)(lambda: layer(images).sin().flatten(1).sum(1))


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", LAYERS)
def test_one_grouped_call_gives_what_products_give(name: str, memory_format: torch.memory_format) -> None:
    layer, shape = LAYERS[name]
    images = torch.randn(5, *shape)
    if images.dim() == 4:
        images = images.to(memory_format=memory_format)
    with GroupsOfConvolutions() as groups:
        found = norms_of(layer, images)
    assert max(groups.found) == 5 * layer.groups  # type: ignore[operator]
    with without_onednn(), GroupsOfConvolutions() as groups:
        plain = norms_of(layer, images)
    assert max(groups.found, default=0) <= layer.groups  # type: ignore[operator]
    torch.testing.assert_close(found, plain, rtol=1e-6, atol=0)
    exact = norms_of(layer.double(), images.double())
    layer.float()
    torch.testing.assert_close(found, exact.float(), rtol=1e-6, atol=0)
    assert exact.max() / exact.min() > 1.0001


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("groups", [1, 2])
def test_several_images_of_a_sample_in_parts_of_the_batch(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ConvolutionSettings((4, 6 // groups, 3, 3), (1, 1), (1, 1), (1, 1), groups)
    monkeypatch.setattr(contributions, "CHUNK", 2 * 4 * math.prod(settings.weight))  # two samples at a time
    images, gradients = torch.randn(5, 3, 6, 8, 8), torch.randn(5, 3, 4, 8, 8)
    convolution = Convolution(images, gradients, settings)
    with GroupsOfConvolutions() as seen:
        found = convolution.squared()
    assert seen.found == [2 * groups, 2 * groups, groups]
    dense = convolution.dense(1, 4)
    with without_onednn():
        torch.testing.assert_close(found, convolution.squared(), rtol=2e-6, atol=0)
        torch.testing.assert_close(dense, convolution.dense(1, 4), rtol=1e-5, atol=1e-5)
    by_sample = torch.stack([contributions.sum_squares(convolution.dense(b, b + 1))[0] for b in range(5)])
    torch.testing.assert_close(found, by_sample, rtol=2e-6, atol=0)


# Where the plain way remains.


@pytest.mark.usefixtures("fast")
def test_grouped_calls_are_for_float32_on_a_cpu_with_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.zeros(2, 1)
    assert has_fast_groups(images)
    assert not has_fast_groups(images.double())
    assert not has_fast_groups(images.bfloat16())
    assert not has_fast_groups(images.to("meta"))
    with without_onednn():
        assert not has_fast_groups(images)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert not has_fast_groups(images)
    monkeypatch.undo()
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not has_fast_groups(images)


def kept_ways() -> Iterator[tuple[str, tuple[int, ...], nn.Module]]:
    yield "few positions", (6, 4, 4), nn.Conv2d(6, 7, 3)
    yield "one pixel", (4, 9, 8), nn.Conv2d(4, 5, 1, stride=2)


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize(("shape", "layer"), [(shape, layer) for _, shape, layer in kept_ways()])
def test_gram_matrices_and_pixels_stay_as_they_are(shape: tuple[int, ...], layer: nn.Module) -> None:
    images = torch.randn(5, *shape)
    with GroupsOfConvolutions() as groups:
        found = norms_of(layer, images)
    assert not groups.found
    with without_onednn():
        torch.testing.assert_close(found, norms_of(layer, images), rtol=1e-5, atol=0)


def test_plain_ways_loop_over_the_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolutions, "has_fast_groups", lambda images: False)
    settings = ConvolutionSettings((4, 3, 3, 3), (1, 1), (1, 1), (1, 1), 1)
    with GroupsOfConvolutions() as groups:
        Convolution(torch.randn(3, 1, 3, 8, 8), torch.randn(3, 1, 4, 8, 8), settings).dense(0, 3)
    assert groups.found == [1, 1, 1]


# Batch normalization.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(6,), (6, 7), (6, 5, 4), (6, 2, 3, 4)])
@pytest.mark.parametrize("frozen", ["", "weight", "bias"])
def test_batch_norm_by_one_call(shape: tuple[int, ...], frozen: str, dtype: torch.dtype) -> None:
    kind = {1: nn.BatchNorm1d, 2: nn.BatchNorm1d, 3: nn.BatchNorm2d, 4: nn.BatchNorm3d}[len(shape)]
    norm = kind(6).to(dtype).eval()
    for values in (norm.running_mean, norm.weight, norm.bias):
        nn.init.normal_(values)
    nn.init.uniform_(norm.running_var, 0.5, 2.0)
    if frozen:
        getattr(norm, frozen).requires_grad_(False)
    images = torch.randn(5, *shape, dtype=dtype).movedim(1, -1).contiguous().movedim(-1, 1)  # channels last

    def losses() -> Tensor:
        return norm(images).sin().flatten(1).sum(1)

    trained = [p for p in norm.parameters() if p.requires_grad]
    expected = torch.stack(
        [nn.utils.get_total_norm(torch.autograd.grad(loss, trained, retain_graph=True)) for loss in losses()]
    )
    torch.testing.assert_close(PerSampleGradientNorms(norm)(losses), expected, rtol=1e-5, atol=0)
