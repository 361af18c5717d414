"""Statistics of gradients against float64, against the moments that they estimate, and against Adam's own state."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_grad.functional import (
    gradient_cosine,
    learning_rate_sensitivity,
    moment_signal_to_noise,
    noise_scale_terms,
    zero_share,
)
from lightning_grad.functional.diagnostics.gradient_statistics import average_noise_terms
from tests.functional.ranks import on_two_ranks

SHAPES = [(), (7,), (3, 5), (2, 3, 4)]


def draw(seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


def vector(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.double().flatten() for tensor in tensors])


# Noise scale.


def test_noise_scale_terms_have_the_trace_of_the_covariance_and_the_true_gradient_as_their_means() -> None:
    generator = torch.Generator().manual_seed(0)
    true, deviation = torch.tensor([3.0, -1.0, 0.5], dtype=torch.float64), 2.0
    samples = true + deviation * torch.randn(4000, 8, 3, generator=generator, dtype=torch.float64)
    small = samples.unflatten(1, (4, 2)).mean(2).square().sum(2).mean(1)  # parts of two samples
    big = samples.mean(1).square().sum(1)
    noise, signal = noise_scale_terms(small.mean(), big.mean(), small=2, big=8)
    assert noise.item() == pytest.approx(3 * deviation**2, rel=0.05)
    assert signal.item() == pytest.approx(true.square().sum().item(), rel=0.05)


def test_noise_scale_terms_give_back_both_norms() -> None:
    noise, signal = noise_scale_terms(torch.tensor(7.0), torch.tensor(4.0), small=4, big=16)
    assert (signal + noise / 4).item() == pytest.approx(7.0)
    assert (signal + noise / 16).item() == pytest.approx(4.0)


@pytest.mark.parametrize(("small", "big"), [(8, 8), (8, 4), (0, 4)])
def test_noise_scale_needs_two_batch_sizes(small: int, big: int) -> None:
    with pytest.raises(ValueError, match=f"below big; got small={small} and big={big}"):
        noise_scale_terms(torch.tensor(1.0), torch.tensor(1.0), small, big)


# Agreement with the step before.


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_cosine_is_that_of_one_vector(dtype: torch.dtype) -> None:
    one, other = draw(0, dtype), draw(1, dtype)
    expected = torch.nn.functional.cosine_similarity(vector(one), vector(other), dim=0)
    assert gradient_cosine(one, other).item() == pytest.approx(expected.item(), abs=1e-6)
    assert gradient_cosine(one, one).item() == pytest.approx(1.0, abs=1e-6)
    assert gradient_cosine(one, [-tensor for tensor in one]).item() == pytest.approx(-1.0, abs=1e-6)


def test_cosine_with_a_gradient_of_zero_is_nan() -> None:
    assert gradient_cosine(draw(0), [torch.zeros(shape) for shape in SHAPES]).isnan()


def cosine_of_shards(rank: int, mesh: Any) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    one, other = draw(0)[1:], draw(1)[1:]
    sharded = [[distribute_tensor(tensor, mesh, [Shard(0)]) for tensor in tensors] for tensors in (one, other)]
    torch.testing.assert_close(gradient_cosine(*sharded), gradient_cosine(one, other))
    zeros = [distribute_tensor(tensor.clamp(min=0.0), mesh, [Shard(0)]) for tensor in one]
    assert zero_share(zeros).item() == pytest.approx((vector(one) <= 0).double().mean().item())


def test_dtensors_count_as_the_whole() -> None:
    on_two_ranks(cosine_of_shards)


# Signal against noise.


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_signal_to_noise_is_that_of_the_moments_of_adam(kind: type[torch.optim.Optimizer]) -> None:
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    betas, steps = (0.8, 0.95), 5
    optimizer = kind(parameters, betas=betas)  # type: ignore[call-arg]
    history = [draw(step) for step in range(steps)]
    for gradients in history:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient + 0.5
        optimizer.step()
    g = torch.stack([vector(gradients) + 0.5 for gradients in history])
    first, second = (
        ((1 - beta) * (beta ** torch.arange(steps - 1, -1, -1.0, dtype=torch.float64)), beta) for beta in betas
    )
    mean = (first[0] @ g) / (1 - first[1] ** steps)
    square = (second[0] @ g.square()) / (1 - second[1] ** steps)
    expected = mean.square().sum() / (square - mean.square()).clamp(min=0).sum()
    found = moment_signal_to_noise([optimizer.state[p] for p in parameters], betas)
    assert found is not None
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)


def test_signal_to_noise_of_other_optimizers_is_not_known() -> None:
    assert moment_signal_to_noise([], (0.9, 0.999)) is None
    assert moment_signal_to_noise([{"momentum_buffer": torch.ones(2)}], (0.9, 0.999)) is None


def test_step_counts_that_are_numbers_are_understood() -> None:
    state = {"exp_avg": torch.tensor([0.1, 0.2]), "exp_avg_sq": torch.tensor([0.5, 0.25])}
    found = [moment_signal_to_noise([{**state, "step": step}], (0.9, 0.99)) for step in (3, torch.tensor(3.0))]
    assert found[0] is not None
    assert found[1] is not None
    assert torch.equal(found[0], found[1])
    assert math.isfinite(found[0].item())


def test_complex_gradients_are_read_as_their_real_and_imaginary_parts() -> None:
    one, turned = torch.tensor([3.0 + 4.0j]), torch.tensor([4.0 - 3.0j])
    assert gradient_cosine([one], [one]).item() == pytest.approx(1.0)
    assert gradient_cosine([one], [turned]).item() == pytest.approx(0.0)
    # After one step the mean of squares is 2 g^2 here, so signal and noise are the same.
    state = {"step": torch.tensor(1.0), "exp_avg": 0.1 * one, "exp_avg_sq": torch.tensor([0.018 + 0.032j])}
    found = moment_signal_to_noise([state], (0.9, 0.999))
    assert found is not None
    assert found.item() == pytest.approx(1.0, rel=1e-3)


# Zeros.


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_zero_share_counts_entries_of_all_gradients_together(dtype: torch.dtype) -> None:
    gradients = [tensor.clamp(min=0.0) for tensor in draw(2, dtype)]
    expected = (vector(gradients) == 0).double().mean().item()
    assert 0.2 < expected < 0.8
    assert zero_share(gradients).item() == pytest.approx(expected)
    assert zero_share([torch.tensor([-0.0, 1e-30])]).item() == 0.5


def test_averages_of_noise_terms_ignore_what_is_not_finite() -> None:
    """The first steps in fp16 overflow, and an average that began with them would stay NaN."""
    bad, terms = torch.tensor([math.inf, 1.0]), [torch.tensor([4.0, 2.0]), torch.tensor([2.0, 1.0])]
    averages = None
    for step in (bad, terms[0], bad, terms[1]):
        averages = average_noise_terms(averages, step, decay=0.75)
    assert averages is not None
    assert averages.tolist() == [0.75 * 4.0 + 0.25 * 2.0, 0.75 * 2.0 + 0.25 * 1.0]
    assert average_noise_terms(None, bad, decay=0.75).isnan().all()


def test_learning_rate_sensitivity_is_the_mean_over_logs_above_the_best() -> None:
    assert learning_rate_sensitivity({0.1: 1.0, 1.0: 1.0, 0.01: 1.0}, 2.0) == 0
    # Over two decades: means 1.0 and 2.0, the second cut at the initial loss of 2.5; the best is 0.5.
    assert learning_rate_sensitivity({1e-3: 1.5, 1e-2: 0.5, 1e-1: 9.0}, 2.5) == pytest.approx((1.0 + 1.5) / 2 - 0.5)
    uneven = learning_rate_sensitivity({1e-3: 1.0, 1e-2: 0.5, 1e-1: 0.5, 1.0: 0.5}, 2.0)
    assert uneven == pytest.approx((0.75 + 0.5 + 0.5) / 3 - 0.5)
    assert learning_rate_sensitivity({1e-3: 1.0, 1e-2: float("inf")}, 2.0) == pytest.approx(0.5)
    for losses, words in (
        ({0.1: 1.0}, "at least two"),
        ({0.0: 1.0, 1.0: 1.0}, "above 0"),
        ({0.1: math.nan, 1.0: math.inf}, "diverged"),
    ):
        with pytest.raises(ValueError, match=words):
            learning_rate_sensitivity(losses, 2.0)
