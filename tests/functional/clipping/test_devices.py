"""On a device no rule asks the host what to do: tensors on ``meta`` have no values that could be read."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lightning_grad.functional import (
    clip_adaptively_,
    clip_layers_,
    clip_norm_,
    clip_spikes_,
    clip_to_threshold_,
    clip_value_,
    nonfinite,
    normalize_layers_,
)
from lightning_grad.functional.gradients.tensor_lists import read_flags
from lightning_grad.testing import NoSync

RULES: dict[str, Callable[..., Any]] = {
    "clip_norm_": lambda g, w, one: clip_norm_(g, 1.0),
    "clip_to_threshold_": lambda g, w, one: clip_to_threshold_(g, one, one),
    "clip_value_": lambda g, w, one: clip_value_(g, 1.0),
    "clip_spikes_": lambda g, w, one: clip_spikes_(g, w),
    "clip_adaptively_": lambda g, w, one: clip_adaptively_(g, w),
    "clip_layers_": lambda g, w, one: clip_layers_(g, one.new_zeros(2, dtype=torch.int64), one.expand(1)),
    "normalize_layers_": lambda g, w, one: normalize_layers_(g, w, one.new_zeros(2, dtype=torch.int64), 1),
    "nonfinite": lambda g, w, one: nonfinite(g),
}


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize("name", RULES)
def test_no_rule_waits(name: str, device: str) -> None:
    gradients, weights = ([torch.ones(300, 200, device=device), torch.ones(3, device=device)] for _ in range(2))
    with NoSync():
        RULES[name](gradients, weights, torch.ones((), device=device))


def test_reading_a_device_raises() -> None:
    assert read_flags(torch.ones(1, dtype=torch.bool, device="meta")) is None
    with pytest.raises((TypeError, RuntimeError, NotImplementedError)):
        torch.ones(1, dtype=torch.bool, device="meta").numpy()
