"""Spike-aware clipping against the formula of SPAM's released code, but where there is no past."""

import math

import pytest
import torch
from torch import Tensor

from lightning_grad.functional import clip_spikes_
from lightning_grad.functional.clipping import spike_clipping
from tests.functional.clipping.gradients import DTYPES, INF, NAN, assert_same_bits, copies, draw


def spam_clip(gradient: Tensor, moment: Tensor, threshold: float) -> Tensor:
    gradient = gradient.clone()
    mask = gradient**2 > threshold * moment
    gradient[mask] = gradient[mask].sign() * torch.sqrt(moment[mask] * threshold)
    return gradient


@pytest.mark.parametrize("threshold", [1.0, 5.0, 5000.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_spikes_are_clipped_as_in_spam(dtype: torch.dtype, threshold: float) -> None:
    rounding = {"rtol": 2**-7, "atol": 0.0} if dtype == torch.bfloat16 else {"rtol": 1e-6, "atol": 0.0}
    for seed in range(10):
        gradients, generator = draw(seed, dtype), torch.Generator().manual_seed(seed)
        # Squares from a thousandth of the bound to a thousand times it.
        ratios = [10.0 ** (6 * torch.rand(g.shape, generator=generator) - 3) for g in gradients]
        moments = [(g.double().square() / (threshold * r)).to(dtype) for g, r in zip(gradients, ratios, strict=True)]
        expected = [spam_clip(g, v, threshold) for g, v in zip(gradients, moments, strict=True)]
        before, moments_before = copies(gradients), copies(moments)
        clip_spikes_(gradients, moments, threshold)
        torch.testing.assert_close(gradients, expected, **rounding)
        assert_same_bits(moments, moments_before)
        changed = torch.cat([(g != b).flatten() for g, b in zip(gradients, before, strict=True)])
        assert 0.2 < changed.float().mean() < 0.8


def test_an_entry_without_a_past_is_left_alone() -> None:
    """SPAM sets it to zero, and as a gradient of zero leaves v at zero, it never trains."""
    gradient, moment = torch.tensor([2.0, -3.0, 0.0, 1e-30]), torch.zeros(4)
    assert spam_clip(gradient, moment, 5000.0)[:3].tolist() == [0.0, 0.0, 0.0]
    before = gradient.clone()
    clip_spikes_([gradient], [moment])
    assert_same_bits([gradient], [before])


def test_spikes_in_bf16_are_measured_against_moments_in_float32() -> None:
    gradient = torch.tensor([100.0, -100.0, 0.5, NAN], dtype=torch.bfloat16)
    clip_spikes_([gradient], [torch.full((4,), 0.25)], threshold=4.0)
    assert gradient.dtype == torch.bfloat16
    assert gradient[:3].tolist() == [1.0, -1.0, 0.5]
    assert gradient[3].isnan()


def test_spikes_that_are_infinite_are_clipped_and_nan_stays_nan() -> None:
    gradient = torch.tensor([INF, -INF, NAN, INF, NAN, 2.0])
    moment = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, NAN])
    clip_spikes_([gradient], [moment], threshold=4.0)
    assert_same_bits([gradient], [torch.tensor([2.0, -2.0, NAN, INF, NAN, 2.0])])


def test_no_threshold_clips_no_spike() -> None:
    gradients = draw(1)
    clip_spikes_(gradients, [torch.rand_like(g) * 1e-9 for g in gradients], INF)
    assert_same_bits(gradients, draw(1))


def test_spikes_of_another_number_of_moments_raise() -> None:
    with pytest.raises(ValueError, match="shorter"):
        clip_spikes_([torch.ones(1), torch.ones(1)], [torch.ones(1)])


# On a CPU the function first asks whether a piece can have a spike. What it does must not depend on that.


def in_five_passes(gradient: Tensor, moment: Tensor, threshold: float) -> Tensor:
    limit = (moment * threshold).sqrt().masked_fill(~(moment > 0), INF).to(gradient.dtype)
    return torch.maximum(torch.minimum(gradient, limit), -limit)


PIECE = spike_clipping._PIECE


def drawn(size: int, seed: int, threshold: float, closeness: float) -> tuple[Tensor, Tensor]:
    """Return a gradient over many decades, and moments of which the roots are within ``closeness`` of the limit."""
    generator = torch.Generator().manual_seed(seed)
    gradient = 10.0 ** (40 * torch.rand(size, generator=generator) - 24) * torch.randn(size, generator=generator).sign()
    ratio = 1 + closeness * (2 * torch.rand(size, generator=generator, dtype=torch.float64) - 1)
    return gradient, (gradient.double().square() / threshold * ratio.square()).float()


def check_pieces(gradients: list[Tensor], moments: list[Tensor], threshold: float) -> bool:
    """Compare with five passes; return whether something was clipped."""
    expected = [in_five_passes(g, v, threshold) for g, v in zip(gradients, moments, strict=True)]
    before = copies(gradients)
    clip_spikes_(gradients, moments, threshold)
    assert_same_bits(gradients, expected)
    return not all(torch.equal(g.nan_to_num(), b.nan_to_num()) for g, b in zip(gradients, before, strict=True))


@pytest.mark.parametrize("closeness", [1e-8, 3e-7, 3e-6, 3e-5])
@pytest.mark.parametrize("threshold", [1.0, 2.0, 5000.0, 1e30, 1e31])
def test_entries_around_the_limit_are_clipped_as_in_five_passes(threshold: float, closeness: float) -> None:
    # One entry a piece decides, so each is asked alone; all of them together are a piece that is asked once.
    gradient, moment = drawn(1000, 0, threshold, closeness)
    assert check_pieces([gradient.clone()], [moment], threshold)
    alone = gradient.clone()
    for entry, past in zip(alone.split(1), moment.split(1), strict=True):
        clip_spikes_([entry], [past], threshold)
    assert_same_bits([alone], [in_five_passes(gradient, moment, threshold)])


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-38, INF, NAN, -1.0])
@pytest.mark.parametrize("where", ["gradient", "moment", "both"])
def test_special_values_are_clipped_as_in_five_passes(where: str, value: float) -> None:
    gradients = [torch.randn(size, generator=torch.Generator().manual_seed(size)) for size in (3, 2 * PIECE + 5, 40)]
    moments = [gradient.square() for gradient in gradients]
    for tensors in {"gradient": [gradients], "moment": [moments], "both": [gradients, moments]}[where]:
        for tensor in tensors:
            tensor[-1] = value
    for threshold in (0.5, 4.0):
        check_pieces(copies(gradients), moments, threshold)


@pytest.mark.parametrize("spiky", [[], [0], [1], [0, 1, 2, 3, 4, 5, 6]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_gradients_of_all_sizes_and_layouts_are_clipped_as_in_five_passes(dtype: torch.dtype, spiky: list[int]) -> None:
    torch.manual_seed(0)
    sizes = [(0,), (PIECE - 1,), (2,), (PIECE + 1,), (3 * PIECE,), (8, 16, 20, 20), (300, 200)]
    gradients = [torch.randn(size).to(dtype) for size in sizes]
    gradients[5] = gradients[5].to(memory_format=torch.channels_last)
    gradients[6] = gradients[6].T
    moments = [gradient.square() + 1e-3 for gradient in gradients]
    for i in spiky:
        gradients[i].mul_(100.0)
    pointers = [gradient.data_ptr() for gradient in gradients]
    assert check_pieces(gradients, moments, 4.0) == any(len(gradients[i]) for i in spiky)
    assert [gradient.data_ptr() for gradient in gradients] == pointers


def test_a_calm_gradient_is_not_written() -> None:
    gradients = [torch.randn(3), torch.randn(PIECE + 1)]
    moments = [gradient.square() for gradient in gradients]
    versions = [gradient._version for gradient in gradients]
    clip_spikes_(gradients, moments, 4.0)
    assert [gradient._version for gradient in gradients] == versions


def test_the_question_without_a_margin_would_miss_spikes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spike_clipping, "_ALMOST_ONE", 1.0)
    monkeypatch.setattr(spike_clipping, "_LEAST", -math.inf)
    gradient, moment = drawn(1000, 0, 2.0, 3e-7)
    alone = gradient.clone()
    for entry, past in zip(alone.split(1), moment.split(1), strict=True):
        clip_spikes_([entry], [past], 2.0)
    assert not torch.equal(alone, in_five_passes(gradient, moment, 2.0))
