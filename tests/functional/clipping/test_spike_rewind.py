"""A spike is far above the median of the last norms, or not finite."""

import math

from lightning_grad.functional import is_spike


def test_spikes_are_above_the_median_or_not_finite() -> None:
    usual = [1.0] * 5 + [100.0, 2.0, 3.0]  # the median is 1, whatever one large norm
    assert is_spike(10.1, usual)
    assert not is_spike(9.9, usual)
    assert is_spike(2.5, usual, factor=2.0)
    assert is_spike(math.nan, [])
    assert is_spike(math.inf, usual)


def test_with_few_norms_only_what_is_not_finite_is_a_spike() -> None:
    assert not is_spike(1e9, [1.0] * 7)
    assert is_spike(1e9, [1.0] * 8)
    assert not is_spike(1e9, [1.0] * 8, least=9)
