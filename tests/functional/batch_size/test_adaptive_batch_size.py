"""The norm test on gradients with known noise, and where another number of accumulated batches may start."""

import math

import pytest
import torch

from lightning_grad.functional import next_accumulation, noise_scale_terms, norm_test_batch_size

ENTRIES, SIGMA, MEAN, ETA = 50, 2.0, 0.3, 0.5
NOISE, SIGNAL = ENTRIES * SIGMA**2, ENTRIES * MEAN**2
TRUTH = NOISE / (ETA**2 * SIGNAL)
SMALL, PARTS = 4, 8


def measured(steps: int = 400) -> list[float]:
    """Return noise, signal, the paper's size and the one without bias, from means over steps of eight micro-batches."""
    generator = torch.Generator().manual_seed(1)
    parts = MEAN + SIGMA / SMALL**0.5 * torch.randn(steps, PARTS, ENTRIES, generator=generator, dtype=torch.float64)
    small, big = parts.square().sum(2).mean(1), parts.mean(1).square().sum(1)
    pairs = [noise_scale_terms(s, b, SMALL, SMALL * PARTS) for s, b in zip(small, big, strict=True)]
    noise, signal = (torch.stack(terms).mean() for terms in zip(*pairs, strict=True))
    paper = norm_test_batch_size(noise, signal, ETA, SMALL * PARTS)
    return [each.item() for each in (noise, signal, paper, norm_test_batch_size(noise, signal, ETA))]


def test_noise_that_is_known() -> None:
    noise, signal, paper, unbiased = measured()
    assert noise == pytest.approx(NOISE, rel=0.03)
    assert signal == pytest.approx(SIGNAL, rel=0.1)
    assert unbiased == pytest.approx(TRUTH, rel=0.1)
    assert paper == pytest.approx(NOISE / (ETA**2 * (SIGNAL + NOISE / (SMALL * PARTS))), rel=0.05)
    assert paper < 0.5 * TRUTH, "the norm of the paper includes noise"


def test_the_variance_is_that_of_the_parts() -> None:
    parts = torch.randn(PARTS, ENTRIES, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean = parts.mean(0)
    noise, signal = noise_scale_terms(parts.square().sum(1).mean(), mean.square().sum(), SMALL, SMALL * PARTS)
    by_hand = SMALL * (parts - mean).square().sum() / (PARTS - 1)
    assert noise.item() == pytest.approx(by_hand.item())
    size = norm_test_batch_size(noise, signal, ETA, SMALL * PARTS)
    assert size.item() == pytest.approx((by_hand / (ETA**2 * mean.square().sum())).item())


@pytest.mark.parametrize(
    ("noise", "signal", "expected"),
    [(200.0, -1.0, math.inf), (200.0, 0.0, math.inf), (-3.0, 1.0, 0.0), (0.0, 0.0, 0.0), (math.nan, 1.0, math.nan)],
)
def test_estimates_that_are_no_size(noise: float, signal: float, expected: float) -> None:
    found = norm_test_batch_size(torch.tensor(noise), torch.tensor(signal), ETA).item()
    assert found == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("now", [1, 2, 3, 4])
@pytest.mark.parametrize("wanted", [4, 6, 7])
def test_windows_end_together(now: int, wanted: int) -> None:
    for batches in range(now, 200, now):
        number = next_accumulation(batches, now, wanted)
        assert now <= number <= wanted
        assert batches % number == 0
    assert next_accumulation(math.lcm(now, wanted), now, wanted) == wanted
