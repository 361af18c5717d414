"""L-GreCo's program against all choices, its errors against the definitions, and what it refuses."""

import itertools
import random

import pytest
import torch

from lightning_grad.functional import choose_levels, feedback_errors, low_rank_errors, sparse_errors

Numbers = list[list[float]]


def problem(layers: int, levels: int, seed: int) -> tuple[Numbers, Numbers, list[int]]:
    """Return errors, sizes and a uniform setting of unequal layers: each level sends more and errs less."""
    numbers = random.Random(seed)
    errors, sizes = [], []
    for _ in range(layers):
        scale, width = 10 ** numbers.uniform(-2, 1), numbers.randint(1, 100)
        errors.append(sorted((scale * numbers.random() for _ in range(levels)), reverse=True))
        sizes.append([float(width * (level + 1)) for level in range(levels)])
    return errors, sizes, [levels // 2] * layers


def total(values: Numbers, levels: list[int]) -> float:
    return sum(layer[level] for layer, level in zip(values, levels, strict=True))


def best_of_all(errors: Numbers, sizes: Numbers, uniform: list[int]) -> float:
    budget = total(errors, uniform)
    choices = (list(choice) for choice in itertools.product(*(range(len(layer)) for layer in errors)))
    return min(total(sizes, choice) for choice in choices if total(errors, choice) <= budget)


@pytest.mark.parametrize("seed", range(20))
def test_it_is_the_best_of_all_choices(seed: int) -> None:
    errors, sizes, uniform = problem(5, 4, seed)
    found = choose_levels(errors, sizes, uniform)
    assert total(errors, found) <= total(errors, uniform)
    assert total(sizes, found) == best_of_all(errors, sizes, uniform)


def test_most_of_these_problems_gain_and_taking_the_cheapest_layer_first_does_not_suffice() -> None:
    gains, missed = 0, 0
    for seed in range(20):
        errors, sizes, uniform = problem(5, 4, seed)
        best = best_of_all(errors, sizes, uniform)
        gains += best < total(sizes, uniform)
        missed += total(sizes, greedy(errors, sizes, uniform)) > best
    assert gains >= 15
    assert missed >= 3


def greedy(errors: Numbers, sizes: Numbers, uniform: list[int]) -> list[int]:
    """Return levels that go down one at a time, where that saves most per error, while the bound holds."""
    levels, budget = [len(layer) - 1 for layer in errors], total(errors, uniform)
    while True:
        steps = []
        for place, level in enumerate(levels):
            if level:
                error = errors[place][level - 1] - errors[place][level]
                if total(errors, levels) + error <= budget:
                    steps.append(((sizes[place][level] - sizes[place][level - 1]) / (error + 1e-12), place))
        if not steps:
            return levels
        levels[max(steps)[1]] -= 1


@pytest.mark.parametrize("bins", [1, 3, 50, 10_000])
def test_the_bound_holds_however_coarse_the_units_are(bins: int) -> None:
    for seed in range(10):
        errors, sizes, uniform = problem(30, 6, seed)
        found = choose_levels(errors, sizes, uniform, bins)
        assert total(errors, found) <= total(errors, uniform) * (1 + 1e-12)
        assert total(sizes, found) <= total(sizes, uniform)


def test_rounding_down_would_break_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    errors, sizes, uniform = problem(30, 6, 0)
    monkeypatch.setattr("lightning_grad.functional.communication.lgreco.math.ceil", int)
    assert total(errors, choose_levels(errors, sizes, uniform, 50)) > total(errors, uniform)


def test_hundreds_of_layers_come_close_to_the_finest_units() -> None:
    errors, sizes, uniform = problem(200, 25, 0)
    found = choose_levels(errors, sizes, uniform)
    budget = total(errors, uniform)
    assert 0.95 * budget < total(errors, found) <= budget
    assert total(sizes, found) < 0.9 * total(sizes, uniform)


def test_layers_may_have_levels_of_their_own_in_any_order() -> None:
    errors = [[0.0, 8.0], [5.0], [1.0, 3.0, 0.0, 3.0]]
    sizes = [[9.0, 3.0], [7.0], [6.0, 4.0, 9.0, 2.0]]
    assert choose_levels(errors, sizes, [0, 0, 1]) == [0, 0, 3]
    assert choose_levels(errors, sizes, [1, 0, 3]) == [1, 0, 3]  # nothing is smaller
    assert choose_levels([], [], []) == []


def test_without_any_error_all_layers_send_least() -> None:
    assert choose_levels([[0.0, 0.0], [0.0, 0.0]], [[1, 2], [3, 4]], [1, 1]) == [0, 0]


def test_a_bound_that_is_met_exactly_is_met() -> None:
    assert choose_levels([[4.0, 1.0, 0.0], [3.0, 0.0, 0.0]], [[1, 2, 3], [1, 5, 6]], [0, 1]) == [1, 0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([[1.0, 0.0]], [[1.0]], [0]), r"the same levels; got 1, 1 and 1 layers with \[2\] and \[1\] levels"),
        (([[1.0]], [[1.0]], [0, 0]), "the same layers, .* got 1, 1 and 2 layers"),
        (([[1.0]], [[1.0]], [1]), r"uniform\[0\] must be an index of the 1 levels of layer 0; got 1"),
        (([[float("nan")]], [[1.0]], [0]), "errors must be at least 0 and finite; got nan"),
        (([[1.0]], [[-1.0]], [0]), "sizes must be at least 0 and finite; got -1.0"),
        (([[1.0]], [[1.0]], [0], 0), "bins must be at least 1; got 0"),
    ],
)
def test_wrong_arguments(arguments: tuple[Numbers, Numbers, list[int]], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        choose_levels(*arguments)


def test_errors_of_the_largest_entries() -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    for count, error in zip((1, 10, 999, 1000), sparse_errors(values, [1, 10, 999, 1000]), strict=True):
        kept = values.clone()
        kept[values.abs().argsort()[: 1000 - count]] = 0.0
        assert error.item() == pytest.approx((values - kept).double().square().sum().item(), rel=1e-5, abs=1e-4)
    assert sparse_errors(values, [1000]).item() == pytest.approx(0.0, abs=1e-4)


def test_errors_of_low_ranks_are_those_of_the_singular_values_if_all_columns_are_used() -> None:
    matrix = torch.randn(30, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for view in (matrix, matrix.t()):
        start = torch.randn(view.shape[1], 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        found = low_rank_errors(view, [1, 7, 20], start)
        squares = torch.linalg.svdvals(view).square()
        torch.testing.assert_close(found, torch.stack([squares[k:].sum() for k in (1, 7, 20)]))


@pytest.mark.parametrize("value", [torch.inf, torch.nan, 1e38])
def test_errors_of_what_overflows_are_infinite(value: float) -> None:
    matrix = torch.full((8, 6), value)
    assert low_rank_errors(matrix, [1, 2], torch.ones(6, 3)).isinf().all()


def test_few_columns_are_near_the_best_error_and_never_below(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    scales = torch.linspace(1, 0.01, 200).pow(2)  # a slow decay is the hard case
    matrix = (
        torch.randn(300, 200, generator=generator) @ torch.diag(scales) @ torch.randn(200, 200, generator=generator)
    )
    squares = torch.linalg.svdvals(matrix.double()).square()
    best = torch.stack([squares[k:].sum() for k in (1, 4, 16)])
    start = torch.randn(200, 24, generator=generator)
    ratios = low_rank_errors(matrix, [1, 4, 16], start) / best
    assert ratios.min() > 1 - 1e-5
    assert ratios.max() < 1.03
    monkeypatch.setattr("lightning_grad.functional.communication.lgreco._REFINEMENTS", 0)
    assert (low_rank_errors(matrix, [1, 4, 16], start) / best).max() > 1.1, "a single pass is not enough"


@pytest.mark.parametrize("share", [0.5, 0.1, 0.02])
def test_unsent_values_grow_to_the_norm_that_is_foretold(share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    residual, norms = torch.zeros(5000), []
    for step in range(int(8 / share)):
        residual += torch.randn(5000, generator=generator)
        residual[torch.rand(5000, generator=generator) < share] = (
            0.0  # a message carries this share of the squared norm
        )
        if step * share > 4:
            norms.append(residual.square().sum().item())
    total = torch.tensor(5000.0)
    foretold = feedback_errors(total * (1 - share), total).item()
    assert sum(norms) / len(norms) == pytest.approx(foretold, rel=0.1)
    assert foretold > 5000 * (1 - share) * 1.9, "the error of one message is another number"


def test_without_a_gradient_or_without_a_message_the_norm_is_a_number() -> None:
    zero, one = torch.tensor(0.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)
    assert feedback_errors(zero.view(1), zero).item() == 0.0
    assert 1e15 < feedback_errors(one.view(1), one).item() < torch.inf
