"""ZClip against its published algorithm, and norms that are not finite against their absence."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_grad.functional import (
    zclip_state,
    zclip_threshold_,
)
from tests.functional.clipping.norm_series import INF, NAN, draw


class PublishedZClip:
    """The released algorithm in plain Python: what a norm becomes, and what is remembered."""

    def __init__(self, max_norm: float | None, warmup_steps: int = 25, z_threshold: float = 2.5) -> None:
        self.max_norm, self.warmup_steps, self.z_threshold = max_norm, warmup_steps, z_threshold
        self.buffer: list[float] = []
        self.mean: float | None = None
        self.variance: float | None = None

    def step(self, norm: float) -> float:
        """Return the norm that the gradient is scaled to, if that is smaller than its own."""
        if self.mean is None:
            self.buffer.append(norm)
            if len(self.buffer) >= self.warmup_steps:
                self.mean = sum(self.buffer) / len(self.buffer)
                self.variance = sum((x - self.mean) ** 2 for x in self.buffer) / len(self.buffer)
            return norm if self.max_norm is None else min(norm, self.max_norm)
        deviation = self.variance**0.5
        z = (norm - self.mean) / (deviation + 1e-6)
        clip_val = self.mean + self.z_threshold * deviation / (z / self.z_threshold) if z > self.z_threshold else None
        kept = clip_val or norm
        self.mean = 0.97 * self.mean + (1 - 0.97) * kept
        self.variance = 0.97 * self.variance + (1 - 0.97) * (kept - self.mean) ** 2
        return kept if self.max_norm is None else min(kept, self.max_norm)


def zclip(norms: list[float], max_norm: float | None = 1.0, state: Any = None, **arguments: Any) -> list[float]:
    state = zclip_state() if state is None else state
    return [
        zclip_threshold_(torch.tensor(norm, dtype=torch.float64), state, max_norm=max_norm, **arguments).item()
        for norm in norms
    ]


@pytest.mark.parametrize("max_norm", [1.0, None])
@pytest.mark.parametrize("warmup_steps", [1, 25])
def test_zclip_is_the_published_algorithm(max_norm: float | None, warmup_steps: int) -> None:
    norms, published, state = draw(500), PublishedZClip(max_norm, warmup_steps), zclip_state()
    expected = [published.step(norm) for norm in norms]
    np.testing.assert_allclose(zclip(norms, max_norm, state, warmup_steps=warmup_steps), expected, rtol=1e-12)
    assert state["mean"].item() == pytest.approx(published.mean, rel=1e-12)
    assert state["variance"].item() == pytest.approx(published.variance, rel=1e-12)
    assert state["count"].item() == 500
    clipped = sum(kept < norm for kept, norm in zip(expected, norms, strict=True))
    assert 15 <= clipped < 500, "spikes were met"


@pytest.mark.parametrize("z_threshold", [1.0, 4.0])
def test_zclip_of_another_threshold_is_the_published_algorithm(z_threshold: float) -> None:
    norms, published = draw(200, seed=1), PublishedZClip(None, z_threshold=z_threshold)
    found = zclip(norms, None, z_threshold=z_threshold)
    np.testing.assert_allclose(found, [published.step(norm) for norm in norms], rtol=1e-12)


def test_zclip_warms_up_with_mean_and_population_variance() -> None:
    norms, state = draw(25), zclip_state()
    for count, norm in enumerate(norms, 1):
        assert zclip([norm], None, state) == [norm], "nothing is clipped before the statistics stand"
        assert state["mean"].item() == pytest.approx(np.mean(norms[:count]), rel=1e-12)
        assert state["variance"].item() == pytest.approx(np.var(norms[:count]), rel=1e-12, abs=1e-15)


def test_a_larger_spike_is_clipped_closer_to_the_mean() -> None:
    found = []
    for spike in (5.0, 50.0, 500.0):
        state = zclip_state()
        zclip([1.0, 1.2, 0.8, 1.0] * 7, None, state)
        found += zclip([spike], None, state)
    assert found[0] > found[1] > found[2] > 1.0


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("position", [0, 10, 24, 25, 26, 60])
@pytest.mark.parametrize("max_norm", [1.0, None])
def test_zclip_goes_on_as_if_a_norm_that_is_not_finite_had_never_come(
    max_norm: float | None, position: int, bad: float
) -> None:
    norms, states = draw(100), (zclip_state(), zclip_state())
    with_bad = [*norms[:position], bad, *norms[position:]]
    expected, found = zclip(norms, max_norm, states[0]), zclip(with_bad, max_norm, states[1])
    assert found[:position] + found[position + 1 :] == expected
    assert math.isfinite(found[position])
    assert {key: value.item() for key, value in states[0].items()} == {
        key: value.item() for key, value in states[1].items()
    }


@pytest.mark.parametrize(("bad", "position"), [(NAN, 10), (INF, 10), (NAN, 60)])
def test_the_published_zclip_never_clips_again_after_a_norm_that_is_not_finite(bad: float, position: int) -> None:
    """So that the test above is about a fault that there is."""
    norms, published = draw(300), PublishedZClip(None)
    for norm in [*norms[:position], bad, *norms[position:100]]:
        published.step(norm)
    assert not math.isfinite(published.variance)
    assert [published.step(norm) for norm in norms[100:]] == norms[100:]
    assert zclip(norms, None)[100:] != norms[100:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zclip_takes_norms_of_less_precision(dtype: torch.dtype) -> None:
    norms = [torch.tensor(norm).to(dtype) for norm in draw(100)]
    state, published = zclip_state(), PublishedZClip(None)
    found = [zclip_threshold_(norm, state, max_norm=None) for norm in norms]
    expected = [published.step(norm.item()) for norm in norms]
    np.testing.assert_allclose([threshold.item() for threshold in found], expected, rtol=1e-12)
    # A norm that is not to be clipped comes back as it is, so that a comparison with it does not clip by rounding.
    same = [threshold.item() == norm.item() for threshold, norm in zip(found, norms, strict=True)]
    assert 80 < sum(same) < 100


def test_no_z_threshold_and_no_bound_keep_every_norm() -> None:
    norms = [*draw(60), 1e30, 1e-30, 0.0]
    assert zclip(norms, None, z_threshold=INF) == norms


def test_norms_that_are_all_equal_are_not_clipped() -> None:
    assert zclip([0.5] * 60, None) == [0.5] * 60
    assert zclip([0.0] * 60, None) == [0.0] * 60


@pytest.mark.parametrize("max_norm", [1.0, None])
def test_zclip_changes_its_state_in_place(max_norm: float | None) -> None:
    state = zclip_state()
    kept: dict[str, Tensor] = dict(state)
    zclip(draw(30), max_norm, state)
    assert all(state[key] is kept[key] for key in kept)
    assert {key: value.dtype for key, value in state.items()} == dict.fromkeys(state, torch.float64)


@pytest.mark.parametrize("step", [10, 25, 40])
def test_a_state_goes_through_a_checkpoint(step: int, tmp_path: Any) -> None:
    norms, state = draw(60), zclip_state()
    zclip(norms[:step], 1.0, state)
    torch.save(state, tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    assert zclip(norms[step:], 1.0, loaded) == zclip(norms, 1.0)[step:]
