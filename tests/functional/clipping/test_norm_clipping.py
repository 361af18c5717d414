"""Norm clipping against torch, bit for bit."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from lightning_grad.functional import clip_norm_, clip_to_threshold_, clip_value_, total_norm
from tests.functional.clipping.gradients import DTYPES, INF, NAN, SHAPES, as_parameters, assert_same_bits, copies, draw


@pytest.mark.parametrize("norm_type", [0.5, 1.0, 2.0, 3.0, INF])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_clipping_is_that_of_torch(dtype: torch.dtype, norm_type: float) -> None:
    clipped = 0
    for seed in range(30):
        gradients = draw(seed, dtype)
        # From far below the norm to above it, so that both branches are met.
        max_norm = float(total_norm(gradients, norm_type)) * (0.01, 0.5, 0.999, 1.0, 1.001, 3.0)[seed % 6]
        parameters = as_parameters(gradients)
        expected = nn.utils.clip_grad_norm_(parameters, max_norm, norm_type)
        before = copies(gradients)
        norm = clip_norm_(gradients, max_norm, norm_type)
        assert_same_bits([norm, *gradients], [expected, *(p.grad for p in parameters)])
        clipped += not all(map(torch.equal, gradients, before))
    assert 10 <= clipped < 30


@pytest.mark.parametrize("value", [NAN, INF, -INF, 3e38])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_clipping_of_what_is_not_finite_is_that_of_torch(dtype: torch.dtype, value: float) -> None:
    for position in range(len(SHAPES)):
        gradients = draw(position, dtype)
        gradients[position].view(-1)[-1] = value
        parameters = as_parameters(gradients)
        expected = nn.utils.clip_grad_norm_(parameters, 1.0)
        assert_same_bits([clip_norm_(gradients, 1.0)], [expected])
        assert_same_bits(gradients, [p.grad for p in parameters])


@pytest.mark.parametrize("clip", [partial(clip_norm_, max_norm=0.1), partial(clip_value_, clip_value=0.1)])
def test_clipping_is_in_place_for_any_memory_layout(clip: Callable[..., Any]) -> None:
    image = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    strided = torch.randn(6, 4)[::2].T
    expected = [image.clone(), strided.clone().contiguous()]
    clip([image, strided])
    clip(expected)
    torch.testing.assert_close([image, strided.contiguous()], expected)
    assert image.is_contiguous(memory_format=torch.channels_last)
    assert not strided.is_contiguous()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
def test_gradients_below_the_norm_are_not_written(dtype: torch.dtype) -> None:
    gradients = draw(1, dtype)
    norm, versions = float(total_norm(gradients)), [gradient._version for gradient in gradients]
    clip_norm_(gradients, 1.01 * norm)
    clip_to_threshold_(gradients, total_norm(gradients), torch.tensor(1.01 * norm))
    assert [gradient._version for gradient in gradients] == versions
    clip_norm_(gradients, 0.9 * norm)
    assert all(gradient._version > version for gradient, version in zip(gradients, versions, strict=True))


def test_complex_gradients_are_clipped_as_in_torch() -> None:
    """A complex product with 1 changes the sign of a zero."""
    for max_norm in (0.1, 100.0):
        gradients = [torch.complex(torch.tensor([-0.0, 1.0]), torch.tensor([-2.0, -0.0])), torch.tensor([-0.0, 0.5])]
        parameters = as_parameters(gradients)
        expected = nn.utils.clip_grad_norm_(parameters, max_norm)
        norm = clip_norm_(gradients, max_norm)
        found = [torch.view_as_real(gradients[0]), gradients[1]]
        kept = [torch.view_as_real(parameters[0].grad), parameters[1].grad]
        assert_same_bits([norm, *found], [expected, *kept])
