"""The rule of the accuracy gradient: against the published algorithm with plain means, and by hand."""

import random
from itertools import pairwise

import pytest
import torch

from lightning_grad.functional.schedules.accuracy_gradient_lr import (
    accuracy_gradient,
    accuracy_gradient_cuts,
    accuracy_gradient_scales,
)


def published(accuracies, w, q, threshold, factor, floor, rate=1.0):
    """Transcribe the algorithm as it is published, means and all."""
    seen, means, cooldown, rates = [], [], q, []
    for accuracy in accuracies:
        seen.append(accuracy)
        recent = seen[-w:]
        mean = sum(recent) / len(recent)
        cooldown += 1
        if len(means) > w and cooldown > q and mean - means[-1] < threshold:
            rate *= factor
            cooldown = 1
        rate = max(rate, floor)
        means.append(mean)
        rates.append(rate)
    return rates


def cuts_of(values, **settings):
    """Return at which observations, from 1, the scale falls."""
    scales = [1.0, *accuracy_gradient_scales(values, **settings)]
    return [t for t, (before, after) in enumerate(pairwise(scales), 1) if after < before]


def test_it_is_the_published_algorithm():
    draw = random.Random(0)
    has_cut = has_floor = 0
    for _ in range(2000):
        window, cooldown = draw.randint(1, 8), draw.randint(0, 12)
        threshold, factor = draw.uniform(-0.05, 0.05), draw.uniform(0.1, 1.0)
        floor = draw.choice([0.0, draw.uniform(0.0, 1.0)])
        values = [draw.random() * draw.choice([0.1, 1.0]) for _ in range(draw.randint(0, 60))]
        scales = accuracy_gradient_scales(values, window, cooldown, threshold, factor, floor)
        assert scales == published(values, window, cooldown, threshold, factor, floor)
        has_cut += bool(scales) and scales[-1] < 1.0
        has_floor += floor > 0.0 and bool(scales) and scales[-1] == floor
    assert has_cut > 500
    assert has_floor > 100


def test_a_constant_accuracy_is_cut_at_7_12_17_and_a_steep_rise_never():
    assert cuts_of([0.5] * 20) == [7, 12, 17]
    assert cuts_of([0.01 * t for t in range(100)]) == []
    assert cuts_of([0.004 * t for t in range(20)]) == [7, 12, 17]
    assert cuts_of([-0.01 * t for t in range(20)]) == [7, 12, 17]


@pytest.mark.parametrize(
    ("settings", "cuts"),
    [
        ({"cooldown": 8}, [7, 15]),
        ({"cooldown": 1}, [7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18]),
        ({"window": 1, "cooldown": 5}, [3, 8, 13, 18]),
        ({"window": 8}, [10, 15]),
        ({"start_after": 6}, [7, 12, 17]),
        ({"start_after": 7}, [8, 13, 18]),
        ({"start_after": 11}, [12, 17]),
        ({"threshold": 0.0}, []),
        ({"factor": 1.0}, []),
        ({"factor": 0.5, "floor": 0.2}, [7, 12, 17]),
        ({"factor": 0.5, "floor": 0.25}, [7, 12]),
        ({"floor": 1.0}, []),
    ],
)
def test_each_setting_moves_the_cuts_of_a_constant_accuracy(settings, cuts):
    assert cuts_of([0.5] * 18, **settings) == cuts


def test_it_compares_with_the_mean_before_and_not_with_the_best():
    falls = [0.9] * 7 + [0.1] * 5
    climbs = [0.1 + 0.03 * t for t in range(30)]
    assert cuts_of([*falls, *climbs]) == [7, 12], "0.03 an observation is no reason to cut, though the best is not met"


def test_the_gradient_is_the_difference_of_two_means():
    values = torch.rand(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()
    for window in (1, 3, 7):
        for end in range(1, len(values) + 1):
            gradient = accuracy_gradient(values[:end], window)
            if end <= window:
                assert gradient is None
                continue
            later, earlier = values[end - window : end], values[end - window - 1 : end - 1]
            assert gradient == pytest.approx((sum(later) - sum(earlier)) / window, abs=1e-15)


def test_tensors_are_taken_too():
    values = torch.rand(30, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert accuracy_gradient(values) == accuracy_gradient(values.tolist())
    assert accuracy_gradient_scales(values) == accuracy_gradient_scales(values.tolist())


def test_the_count_since_the_last_cut_must_be_past_the_quiet():
    values = [0.5] * 20
    assert [accuracy_gradient_cuts(values, since_cut, cooldown=3) for since_cut in range(6)] == [False] * 4 + [True] * 2


def test_nothing_is_observed_and_nothing_cut():
    assert accuracy_gradient_scales([]) == []
    assert not accuracy_gradient_cuts([], 9)
