"""The total norm against that of one vector, and thresholds that are tensors."""

import math

import pytest
import torch

from lightning_grad.functional import (
    clip_norm_,
    clip_to_threshold_,
    total_norm,
)
from tests.functional.clipping.gradients import DTYPES, INF, NAN, assert_same_bits, draw


@pytest.mark.parametrize("norm_type", [0.5, 1.0, 2.0, 3.0, INF])
def test_total_norm_is_that_of_one_vector(norm_type: float) -> None:
    gradients = draw(1, torch.float64)
    vector = torch.cat([gradient.flatten() for gradient in gradients])
    torch.testing.assert_close(total_norm(gradients, norm_type), torch.linalg.vector_norm(vector, norm_type))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_total_norm_has_the_dtype_of_the_gradients(dtype: torch.dtype) -> None:
    assert total_norm(draw(0, dtype)).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_total_norm_adds_up_in_at_least_float32_on_request(dtype: torch.dtype) -> None:
    gradients = [torch.full((1000,), 200.0, dtype=dtype), torch.full((1000,), 200.0, dtype=dtype)]
    norm = total_norm(gradients, accurate=True)
    assert norm.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # Of half-precision numbers the squares overflow, and a sum of them stops growing.
    assert norm.item() == pytest.approx(200.0 * math.sqrt(2000), rel=1e-6)


def test_total_norm_of_mixed_dtypes_is_that_of_the_widest() -> None:
    gradients = [gradient.to(dtype) for gradient, dtype in zip(draw(3), [*DTYPES, *DTYPES, *DTYPES], strict=True)]
    expected = torch.cat([gradient.double().flatten() for gradient in gradients]).norm()
    norm = total_norm(gradients)
    assert norm.dtype == torch.float64
    assert norm.item() == pytest.approx(expected.item(), rel=2e-3)  # bf16 norms have eight bits
    clip_norm_(gradients, norm.item() / 10)
    assert [gradient.dtype for gradient in gradients] == [*DTYPES, *DTYPES, *DTYPES]
    assert total_norm(gradients).item() == pytest.approx(norm.item() / 10, rel=1e-2)


def test_total_norm_makes_no_graph() -> None:
    gradient = torch.ones(3, requires_grad=True)
    assert not total_norm([gradient]).requires_grad
    clip_norm_([gradient], 0.1)  # a leaf that is changed in place under grad mode would raise
    assert gradient.norm().item() == pytest.approx(0.1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_above_the_threshold_becomes_the_threshold(dtype: torch.dtype) -> None:
    gradients = draw(5, dtype)
    norm = total_norm(gradients, accurate=True)
    coefficient = clip_to_threshold_(gradients, norm, norm.double() / 3)
    assert coefficient.item() == pytest.approx(1 / 3, rel=1e-6)
    assert [gradient.dtype for gradient in gradients] == [dtype] * len(gradients)
    expected = [(gradient.double() / 3) for gradient in draw(5, dtype)]
    torch.testing.assert_close(
        [g.double() for g in gradients], expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=0
    )


@pytest.mark.parametrize("norm", [1.0, 0.5, 0.0, NAN, INF])
def test_norm_at_the_threshold_below_it_or_not_finite_changes_nothing(norm: float) -> None:
    gradients = draw(6)
    coefficient = clip_to_threshold_(gradients, torch.tensor(norm), torch.tensor(1.0))
    assert coefficient.item() == 1.0
    assert_same_bits(gradients, draw(6))


def test_threshold_that_is_nan_changes_nothing() -> None:
    gradients = draw(7)
    assert clip_to_threshold_(gradients, torch.tensor(5.0), torch.tensor(NAN)).item() == 1.0
    assert_same_bits(gradients, draw(7))
