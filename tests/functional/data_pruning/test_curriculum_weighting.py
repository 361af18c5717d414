"""Easiness against a count by hand, and weights against the table of the paper."""

import math

import pytest
import torch

from lightning_grad.functional import curriculum_weights, easiness


def by_hand(difficulty: list[float]) -> list[float]:
    known = [d for d in difficulty if not math.isnan(d)]

    def of(d: float) -> float:
        if math.isnan(d) or len(known) == 1:
            return 1.0
        return (sum(e > d for e in known) + (sum(e == d for e in known) - 1) / 2) / (len(known) - 1)

    return [of(d) for d in difficulty]


@pytest.mark.parametrize(
    "difficulty",
    [
        [3.0, 1.0, 2.0],
        [1.0, 1.0, 1.0, 1.0],
        [2.0, math.nan, 2.0, -1.0, math.nan, 7.0],
        [math.inf, 1.0, math.nan, math.inf],
        [5.0],
        [math.nan, 5.0],
        [math.nan, math.nan],
        [],
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_easiness_is_the_share_of_harder_samples(difficulty: list[float], dtype: torch.dtype) -> None:
    found = easiness(torch.tensor(difficulty, dtype=dtype))
    assert found.tolist() == pytest.approx(by_hand(difficulty))
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_many_samples() -> None:
    difficulty = torch.randint(40, (300,), generator=torch.Generator().manual_seed(0)).float()
    found = easiness(difficulty)
    assert found.tolist() == pytest.approx(by_hand(difficulty.tolist()))
    assert float(found.mean()) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("epoch", "expected"),
    [(0, [0.0, 0.4, 1.0]), (1, [0.25, 0.55, 1.0]), (3, [0.75, 0.85, 1.0]), (4, [1.0] * 3), (9, [1.0] * 3)],
)
def test_weights_follow_the_table(epoch: int, expected: list[float]) -> None:
    assert curriculum_weights(torch.tensor([0.0, 0.4, 1.0]), epoch, 4).tolist() == pytest.approx(expected)


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match=r"one entry for each sample, \(n,\); got shape \(2, 2\)"):
        easiness(torch.zeros(2, 2))
    for arguments, name in (((-1, 2), "epoch"), ((1, -2), "epochs"), ((math.nan, 2), "epoch")):
        with pytest.raises(ValueError, match=f"{name} must be at least 0"):
            curriculum_weights(torch.ones(2), *arguments)
