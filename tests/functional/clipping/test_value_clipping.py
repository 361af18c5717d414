"""Value clipping against torch, bit for bit."""

import pytest
import torch
from torch import nn

from lightning_grad.functional import clip_value_
from tests.functional.clipping.gradients import DTYPES, INF, NAN, as_parameters, assert_same_bits, draw


@pytest.mark.parametrize("clip_value", [0.0, 1e-3, 0.5, 1e4, INF])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_value_clipping_is_that_of_torch(dtype: torch.dtype, clip_value: float) -> None:
    for seed in range(30):
        gradients = draw(seed, dtype)
        for position, value in enumerate((NAN, INF, -INF, -0.0)):
            gradients[position + 1].view(-1)[0] = value
        parameters = as_parameters(gradients)
        nn.utils.clip_grad_value_(parameters, clip_value)
        clip_value_(gradients, clip_value)
        assert_same_bits(gradients, [p.grad for p in parameters])
