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


@pytest.mark.parametrize("clip_value", [0.0, 0.5, INF])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
def test_large_gradients_are_clipped_as_in_torch(dtype: torch.dtype, clip_value: float) -> None:
    torch.manual_seed(0)
    gradients = [torch.randn(5000).to(dtype), torch.randn(3).to(dtype), torch.randn(80, 90).to(dtype).T]
    gradients[0][:6] = torch.tensor([NAN, INF, -INF, -0.0, 0.0, clip_value], dtype=dtype)
    parameters = as_parameters(gradients)
    nn.utils.clip_grad_value_(parameters, clip_value)
    clip_value_(gradients, clip_value)
    assert_same_bits(gradients, [p.grad for p in parameters])
