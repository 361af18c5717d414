"""AutoClip against NumPy, and norms that are not finite against their absence."""

from typing import Any

import numpy as np
import pytest
import torch

from lightning_grad.functional import autoclip_state, autoclip_threshold_
from tests.functional.clipping.norm_series import INF, NAN, draw


def autoclip(norms: list[float], percentile: float, window: int, state: Any = None) -> list[float]:
    state = autoclip_state(window) if state is None else state
    return [autoclip_threshold_(torch.tensor(norm, dtype=torch.float64), state, percentile).item() for norm in norms]


@pytest.mark.parametrize("percentile", [0.0, 1.0, 10.0, 37.5, 50.0, 90.0, 99.9, 100.0])
@pytest.mark.parametrize("window", [1, 7, 64])
def test_autoclip_is_the_percentile_of_the_last_norms(window: int, percentile: float) -> None:
    norms = draw(50)
    expected = [np.percentile(norms[max(0, t + 1 - window) : t + 1], percentile) for t in range(len(norms))]
    np.testing.assert_allclose(autoclip(norms, percentile, window), expected, rtol=1e-6)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
# First, in mid-window, where the ring is just full, when a slot is written again, and last.
@pytest.mark.parametrize("position", [0, 3, 7, 8, 14, 19])
def test_autoclip_passes_over_a_norm_that_is_not_finite(position: int, bad: float) -> None:
    norms = draw(19)
    with_bad = [*norms[:position], bad, bad, *norms[position:]]
    states = [autoclip_state(7), autoclip_state(7)]
    expected, found = autoclip(norms, 25.0, 7, states[0]), autoclip(with_bad, 25.0, 7, states[1])
    assert found[:position] + found[position + 2 :] == expected
    # In its own step the threshold is the one of the step before.
    before = expected[position - 1] if position else INF
    assert found[position : position + 2] == [before, before]
    assert states[1]["count"].item() == len(norms)
    assert torch.equal(states[0]["norms"], states[1]["norms"])


def test_autoclip_takes_float32_norms_and_keeps_its_state_in_place() -> None:
    state = autoclip_state(4)
    kept = dict(state)
    threshold = autoclip_threshold_(torch.tensor(0.1), state, 50.0)
    assert threshold.item() == torch.tensor(0.1).double().item()
    assert state["norms"] is kept["norms"]
    assert state["count"] is kept["count"]
    assert state["count"].item() == 1
    assert state["norms"].dtype == torch.float64


@pytest.mark.parametrize("step", [10, 25, 40])
def test_a_state_goes_through_a_checkpoint(step: int, tmp_path: Any) -> None:
    norms, state = draw(60), autoclip_state(16)
    autoclip(norms[:step], 10.0, 16, state)
    torch.save(state, tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    assert autoclip(norms[step:], 10.0, 16, loaded) == autoclip(norms, 10.0, 16)[step:]
