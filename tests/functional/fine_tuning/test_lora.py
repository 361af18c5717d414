"""Low-rank adapters against formulas in float64: merging, norms, and the start from a gradient."""

import math

import pytest
import torch
from torch import Tensor

from lightning_grad.functional import lora_ga_factors, lora_norm, lora_rank, lora_scale, merge_lora

GENERATOR = torch.Generator().manual_seed(0)


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=GENERATOR, dtype=torch.float64)


def cosine(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum() / (a.norm() * b.norm()))


def first_step(a: Tensor, b: Tensor, scale: float, gradient: Tensor, lr: float = 1e-6) -> Tensor:
    """Change of s B A after a step of gradient descent on A and B."""
    moved_a, moved_b = a - lr * scale * b.t() @ gradient, b - lr * scale * gradient @ a.t()
    return scale * (moved_b @ moved_a - b @ a)


def bound(gradient: Tensor, rank: int) -> float:
    values = torch.linalg.svdvals(gradient).square()
    return float((values[: 2 * rank].sum() / values.sum()).sqrt())


def test_merged_weight_multiplies_as_the_two_products() -> None:
    weight, a, b, x = drawn(5, 7), drawn(2, 7), drawn(5, 2), drawn(3, 7)
    merged = x @ merge_lora(weight, a, b, 0.3).t()
    assert torch.allclose(merged, x @ weight.t() + 0.3 * (x @ a.t()) @ b.t(), rtol=0, atol=1e-12)


def test_a_transposed_weight_and_a_kernel() -> None:
    weight, a, b, x = drawn(7, 5), drawn(2, 7), drawn(5, 2), drawn(3, 7)
    merged = x @ merge_lora(weight, a, b, 0.3, is_transposed=True)
    assert torch.allclose(merged, x @ weight + 0.3 * (x @ a.t()) @ b.t(), rtol=0, atol=1e-12)
    kernel, a = drawn(5, 3, 2, 2), drawn(2, 12)
    expected = kernel + 0.3 * torch.einsum("or,rihw->oihw", b, a.view(2, 3, 2, 2))
    assert torch.allclose(merge_lora(kernel, a, b, 0.3), expected, rtol=0, atol=1e-12)


def test_merging_keeps_the_type_of_the_weight() -> None:
    assert merge_lora(drawn(5, 7).bfloat16(), drawn(2, 7).float(), drawn(5, 2).float(), 1.0).dtype == torch.bfloat16


def test_a_zero_factor_changes_no_bit() -> None:
    weight = drawn(5, 7)
    assert torch.equal(merge_lora(weight, drawn(2, 7), torch.zeros(5, 2, dtype=torch.float64), 2.0), weight)


def test_norm_of_the_product() -> None:
    a, b = drawn(3, 11), drawn(6, 3)
    assert float(lora_norm(a, b)) == pytest.approx(float((b @ a).norm()), rel=1e-12)
    assert float(lora_norm(a, torch.zeros_like(b))) == 0.0


def test_scales() -> None:
    assert lora_scale(8, 16.0) == 2.0
    assert lora_scale(16, 8.0, rank_stabilized=True) == 2.0


@pytest.mark.parametrize(
    ("shape", "rank", "from_gradient", "expected"),
    [
        ((10, 64), 8, False, 8),
        ((10, 64), 8, True, 5),
        ((64, 10), 16, False, 10),
        ((4, 1, 3, 3), 8, False, 4),
        ((16, 2, 1, 1), 8, True, 1),
        ((1, 64), 4, True, 0),
    ],
)
def test_largest_rank(shape: tuple[int, ...], rank: int, from_gradient: bool, expected: int) -> None:
    assert lora_rank(shape, rank, from_gradient) == expected


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (30, 30)])
@pytest.mark.parametrize("rank", [1, 4, 12])
def test_the_first_step_is_the_best_of_rank_two_r(shape: tuple[int, int], rank: int) -> None:
    gradient = drawn(*shape)
    a, b = lora_ga_factors(gradient, rank)
    best = bound(gradient, rank)
    assert cosine(first_step(a, b, 2.0, gradient), -gradient) == pytest.approx(best, abs=1e-4)
    usual = drawn(rank, shape[1]) / math.sqrt(shape[1]), torch.zeros(shape[0], rank, dtype=torch.float64)
    assert cosine(first_step(*usual, 2.0, gradient), -gradient) < best - 0.05, "the start of plain LoRA"


@pytest.mark.parametrize("swapped", ["roles", "same directions"])
def test_other_starts_miss_the_bound(swapped: str) -> None:
    """The naive ways: B and A from the same singular vectors."""
    gradient, rank = drawn(40, 24), 4
    u, _, vh = torch.linalg.svd(gradient)
    a, b = (vh[:rank], u[:, :rank]) if swapped == "same directions" else (vh[rank : 2 * rank], u[:, rank : 2 * rank])
    assert cosine(first_step(a, b, 2.0, gradient), -gradient) < bound(gradient, rank) - 0.05


@pytest.mark.parametrize("factor", [1e-6, 1e-3, 1e6])
def test_the_scale_of_the_loss_does_not_matter(factor: float) -> None:
    gradient = drawn(20, 12).float()
    for own, other in zip(lora_ga_factors(gradient, 3), lora_ga_factors(gradient * factor, 3), strict=True):
        assert torch.allclose(own, other, atol=1e-4)


def test_tiny_gradients_of_half_precision() -> None:
    gradient = (drawn(20, 12) * 1e-7).half()
    assert all(factor.isfinite().all() and factor.dtype == torch.half for factor in lora_ga_factors(gradient, 3))


def test_the_size_of_the_factors() -> None:
    a, b = lora_ga_factors(drawn(16, 24), 3, gamma=4.0)
    assert a.norm(dim=1).tolist() == pytest.approx([1.0] * 3)  # 16^(1/4) / sqrt(4)
    assert b.norm(dim=0).tolist() == pytest.approx([1.0] * 3)
    assert float((a @ a.t() - torch.eye(3)).abs().max()) < 1e-12


@pytest.mark.parametrize(
    ("gradient", "rank", "words"),
    [
        (torch.ones(10, 64), 6, "at most the smaller side of the gradient, 10; got rank=6"),
        (torch.full((4, 4), float("nan")), 1, "must be finite"),
        (torch.tensor([[float("inf"), 0.0], [0.0, 1.0]]), 1, "must be finite"),
    ],
)
def test_impossible_gradients(gradient: Tensor, rank: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        lora_ga_factors(gradient, rank)
