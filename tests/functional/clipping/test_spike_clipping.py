"""Spike-aware clipping against the formula of SPAM's released code, but where there is no past."""

import pytest
import torch
from torch import Tensor

from lightning_grad.functional import clip_spikes_
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
