from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from lightning_grad.functional import (
    LearnedRoundings,
    QuantizedTensor,
    SoftRounding,
    flip_roundings,
    learn_rounding,
    mse_scales,
    outlier_mask,
    quantize_weight,
    with_outliers,
)

ROWS = 8
CHOICES = torch.tensor(list(itertools.product((0.0, 1.0), repeat=10)), dtype=torch.float64)


class Row:
    """One output channel of ten weights, correlated inputs, and the error of any rounding of it."""

    def __init__(self, seed: int, scale: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.weight, self.inputs = draw(1, 10), scale * draw(400, 10) @ draw(10, 10)

    def residual(self, values: Tensor) -> Tensor:
        return self.inputs @ (values - self.weight).T

    def error(self, values: Tensor) -> Tensor:
        return self.residual(values).square().mean()

    def best_error(self) -> float:
        """Return the error of the best of all 1024 roundings up or down."""
        start = SoftRounding(self.weight, bits=3)
        integers = torch.where(start.has_choice, start.below + CHOICES, start.nearest.integers)
        return float(self.residual(integers * start.nearest.scales).square().mean(0).min())

    def learn(self, **settings: float) -> tuple[SoftRounding, LearnedRoundings]:
        start = SoftRounding(self.weight, bits=3)
        return start, learn_rounding([start], lambda values, _: self.error(values[0]), steps=500, **settings)

    def flip(self, start: SoftRounding, rounded: QuantizedTensor) -> QuantizedTensor:
        gram, cross = self.inputs.T @ self.inputs, self.residual(rounded.dequantize()).T @ self.inputs
        return flip_roundings(start, rounded, gram[None] / 400, cross / 400)

    def round(self) -> tuple[float, Tensor, float]:
        """Return the error of the rounding, the weight, and the error before flips."""
        start, learned = self.learn()
        flipped = [self.flip(start, each).dequantize() for each in (learned.rounded[0], start.nearest)]
        best = min(flipped, key=lambda values: float(self.error(values)))
        return float(self.error(best)), best, learned.error


def test_close_to_brute_force_and_the_same_at_two_input_scales() -> None:
    results = [Row(seed).round() for seed in range(ROWS)]
    best = torch.tensor([Row(seed).best_error() for seed in range(ROWS)])
    ratios = torch.tensor([error for error, *_ in results]) / best
    assert ratios.min() >= 1 - 1e-6
    assert ratios.mean() < 1.05
    assert (torch.tensor([error for *_, error in results]) / best).mean() > 1.05, "flips are needed for this"
    for seed, (_, values, _) in enumerate(results[:3]):
        assert torch.equal(values, Row(seed, scale=1e-2).round()[1])


def test_an_absolute_penalty_depends_on_the_scale_of_the_inputs() -> None:
    """The released codes add lambda = 0.01 times a sum over weights to an absolute error."""
    undecided = {}
    for scale in (1.0, 1e-2):
        row = Row(0, scale)
        nearest = float(row.error(SoftRounding(row.weight, bits=3).nearest.dequantize()))
        undecided[scale] = row.learn(strength=0.01 * 10 / nearest)[1].undecided
    assert undecided[1.0] > 0.4
    assert undecided[1e-2] == 0.0
    assert row.learn()[1].undecided < 0.2


def test_scales_minimize_the_squared_error_of_each_channel() -> None:
    weight = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(0))
    for dim in (0, 1):
        scales = mse_scales(weight, bits=2, dim=dim)
        assert scales.shape == ((3, 1, 1) if dim == 0 else (1, 2, 1))
        for channel, scale in zip(weight.unbind(dim), scales.flatten(), strict=True):
            widest = channel.abs().max()
            tried = [widest * (1 - step / 100) for step in range(80)]
            errors = torch.stack([((channel / s).round().clamp(-1, 1) * s - channel).square().sum() for s in tried])
            torch.testing.assert_close(scale, tried[int(errors.argmin())], rtol=2**-15, atol=0)


def test_weights_without_a_choice_keep_the_nearest_level() -> None:
    weight = torch.tensor([[0.0, 1.0, 0.3, 5.0, -5.0]])
    start = SoftRounding(weight, bits=2, scales=torch.tensor([[1.0]]))
    assert start.has_choice.tolist() == [[False, False, True, False, False]]
    learned = learn_rounding([start], lambda values, _: (values[0].sum() - 9.0).square(), steps=300)
    assert learned.rounded[0].integers.tolist() == [[0, 1, 1, 1, -1]]
    assert torch.equal(learned.rounded[0].dequantize(), start.values(learned.rounded[0]))


def test_never_worse_than_the_nearest_rounding() -> None:
    weight = torch.tensor([[0.4, 0.4]])
    start = SoftRounding(weight, bits=2, scales=torch.ones(1, 1))
    misled = [0.0]

    def error(values: list[Tensor], batch: int) -> Tensor:
        """Reward rounding up while it learns, and punish it afterwards."""
        misled[0] += 1
        away = (values[0] - 1).square().sum() if values[0].requires_grad else values[0].square().sum() + 1
        return away

    learned = learn_rounding([start], error, steps=100)  # type: ignore[arg-type]
    assert start.decided().integers.tolist() == [[1, 1]]
    assert learned.rounded[0].integers.tolist() == [[0, 0]]
    assert learned.error == learned.nearest_error == 1.0


def test_nothing_to_learn() -> None:
    weight = torch.tensor([[1.0, -1.0]])
    start = SoftRounding(weight, bits=2)
    learned = learn_rounding([start], lambda values, _: (values[0] - weight).square().sum())
    assert (learned.error, learned.nearest_error, learned.undecided) == (0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="not finite"):
        learn_rounding([start], lambda values, _: values[0].sum() / 0.0)


def test_the_order_of_batches_follows_the_seed_and_touches_each() -> None:
    weight = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))

    def seen(seed: int) -> list[int]:
        batches: list[int] = []

        def error(values: list[Tensor], batch: int) -> Tensor:
            batches.append(batch)
            return (values[0] - weight).square().mean() * (batch + 1)

        learn_rounding([SoftRounding(weight, 2)], error, num_batches=3, steps=6, seed=seed)  # type: ignore[arg-type]
        return batches[3:9]  # without those that only measure

    assert seen(0) == seen(0)
    assert sorted(seen(0)[:3]) == sorted(seen(1)[3:]) == [0, 1, 2]
    assert any(seen(0) != seen(seed) for seed in (1, 2, 3))


@pytest.mark.parametrize("groups", [1, 2])
def test_flips_end_where_no_single_flip_helps(groups: int) -> None:
    generator = torch.Generator().manual_seed(groups)
    weight = torch.randn(4, 8, generator=generator, dtype=torch.float64)
    inputs = torch.randn(groups, 50, 8, generator=generator, dtype=torch.float64).cumsum(-1)
    of_row = [inputs[row * groups // 4] for row in range(4)]

    def errors(values: Tensor) -> Tensor:
        return torch.stack([(of_row[row] @ (values - weight)[row]).square().mean() for row in range(4)])

    start = SoftRounding(weight, bits=2)
    gram = inputs.transpose(1, 2) @ inputs / 50
    offset = start.nearest.dequantize() - weight
    cross = torch.stack([of_row[row].T @ (of_row[row] @ offset[row]) / 50 for row in range(4)])
    flipped = flip_roundings(start, start.nearest, gram, cross)
    before, after = errors(start.nearest.dequantize()), errors(flipped.dequantize())
    assert (after <= before).all()
    assert (after < before).any()
    for row, column in start.has_choice.nonzero().tolist():
        integers = flipped.integers.clone()
        integers[row, column] = 2 * start.below[row, column] + 1 - integers[row, column]
        assert errors(integers * flipped.scales)[row] >= after[row] * (1 - 1e-6)
    changed = flipped.integers != start.nearest.integers
    assert not (changed & ~start.has_choice).any()


def test_flips_of_a_weight_with_its_outputs_in_dimension_one() -> None:
    row = Row(3)
    start = SoftRounding(row.weight.T.contiguous(), bits=3, dim=1)
    plain = SoftRounding(row.weight, bits=3)
    gram, cross = row.inputs.T @ row.inputs, row.residual(plain.nearest.dequantize()).T @ row.inputs
    flipped = flip_roundings(start, start.nearest, gram[None], cross)
    assert torch.equal(flipped.integers.T, flip_roundings(plain, plain.nearest, gram[None], cross).integers)


def test_outliers_are_the_highest_scores_and_keep_their_values() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, gradient = (torch.randn(20, 30, generator=generator) for _ in range(2))
    rounded = quantize_weight(weight, 3, scales=mse_scales(weight, 3)).dequantize()
    by_score = {
        "gradient-error": gradient.abs() * (weight - rounded).abs(),
        "gradient": gradient.abs(),
        "magnitude": weight.abs(),
    }
    for score, values in by_score.items():
        mask = outlier_mask(weight, 3, 0.01, gradient, score)  # type: ignore[arg-type]
        assert mask.sum() == 6
        assert values[mask].min() > values[~mask].max()
    start = SoftRounding(weight, 3, kept=mask)
    mixed = with_outliers(start.nearest, weight, mask)
    assert torch.equal(mixed.dequantize()[mask], weight[mask])
    assert torch.equal(mixed.dequantize(), start.values(start.nearest))
    assert not start.has_choice[mask].any()
    assert torch.equal(start.nearest.scales, mse_scales(weight * ~mask, 3)), "the grid is that of the others"


def test_wrong_scores() -> None:
    weight = torch.ones(2, 2)
    with pytest.raises(ValueError, match="Did you mean 'gradient'"):
        outlier_mask(weight, 3, score="gradiant")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="score='magnitude'"):
        outlier_mask(weight, 3)
    with pytest.raises(ValueError, match="between 0 and 1"):
        outlier_mask(weight, 3, share=1.5, score="magnitude")
    assert not outlier_mask(weight, 3, share=0.0, score="magnitude").any()
