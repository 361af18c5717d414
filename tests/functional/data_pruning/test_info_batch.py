"""InfoBatch by enumeration of all its subsets."""

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from lightning_grad.functional.data_pruning.info_batch import infobatch_count, infobatch_subset, infobatch_weights
from tests.cases import cases

NAN, INF = float("nan"), float("inf")
LOSSES = torch.tensor([0.1, 3.0, 0.4, 0.2, 5.0, 0.9, NAN, 0.3])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sample_gradients(n: int) -> tuple[Tensor, Tensor]:
    """Return the losses of n samples under a small network in float64, and the gradient of each, (n, parameters)."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    x, y = torch.randn(n, 3).double(), torch.randint(4, (n,))
    losses = nn.functional.cross_entropy(net(x), y, reduction="none")
    rows = [torch.autograd.grad(loss, list(net.parameters()), retain_graph=True) for loss in losses]
    return losses.detach(), torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


@pytest.mark.parametrize("dropped", range(5))
def test_the_mean_over_all_subsets_is_the_gradient_of_all_samples(dropped: int) -> None:
    losses, gradients = sample_gradients(10)
    is_low = losses < losses.mean()
    low = is_low.nonzero().flatten().tolist()
    assert 5 <= len(low) <= 8
    sums = []
    for left_out in itertools.combinations(low, dropped):
        kept = torch.tensor([i for i in range(10) if i not in left_out])
        sums.append(infobatch_weights(is_low, kept).double() @ gradients[kept])
    assert len(sums) == math.comb(len(low), dropped)
    torch.testing.assert_close(torch.stack(sums).mean(0), gradients.sum(0), rtol=1e-6, atol=1e-6)
    if dropped:
        assert not torch.allclose(sums[0], gradients.sum(0), rtol=1e-3), "one subset alone is not it"


def test_all_subsets_are_drawn_equally_often() -> None:
    """So that the enumeration above speaks for what is drawn."""
    losses = torch.tensor([0.1, 0.2, 0.3, 0.4, 9.0])
    draws = generator()
    counts: dict[tuple[int, ...], int] = {}
    for _ in range(1200):
        kept = tuple(infobatch_subset(losses, 0.5, draws)[0].tolist())
        counts[kept] = counts.get(kept, 0) + 1
    assert len(counts) == math.comb(4, 2)
    assert max(abs(count - 200) for count in counts.values()) < 50  # four standard deviations


def test_subset_by_hand() -> None:
    # The mean of the seven finite losses is 1.41; below are 0, 2, 3, 5 and 7.
    kept, weights = infobatch_subset(LOSSES, 0.4, generator())
    assert {1, 4, 6} <= set(kept.tolist())
    assert len(kept) == 6
    assert kept.tolist() == sorted(kept.tolist())
    expected = {i: 5 / 3 if i in (0, 2, 3, 5, 7) else 1.0 for i in range(8)}
    torch.testing.assert_close(weights, torch.tensor([expected[i] for i in kept.tolist()]))
    assert weights.sum().item() == pytest.approx(8.0), "the weights stand for all samples"


@cases("prune", [0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.999])
@cases("n", [1, 2, 3, 10, 101])
def test_the_number_left_out_is_exact(n: int, prune: float) -> None:
    losses = torch.rand(n, generator=generator(n)) ** 2
    low = int((losses.double() < losses.double().mean()).sum())
    kept, weights = infobatch_subset(losses, prune, generator())
    dropped = min(math.floor(prune * low + 0.5), max(low - 1, 0))
    assert len(kept) == n - dropped == infobatch_count(losses, prune)
    assert weights.sum().item() == pytest.approx(n, rel=1e-5)


def test_without_pruning_all_are_kept_with_weight_one() -> None:
    kept, weights = infobatch_subset(LOSSES, 0.0, generator())
    assert kept.tolist() == list(range(8))
    assert weights.tolist() == [1.0] * 8


@pytest.mark.parametrize("losses", [[NAN] * 4, [INF, NAN, -INF, NAN], [2.0] * 4, []])
def test_nothing_is_left_out_where_nothing_is_below_the_mean(losses: list[float]) -> None:
    kept, weights = infobatch_subset(torch.tensor(losses), 0.9, generator())
    assert kept.tolist() == list(range(len(losses)))
    assert weights.tolist() == [1.0] * len(losses)


def test_samples_never_seen_are_kept_and_do_not_move_the_mean() -> None:
    losses = torch.tensor([0.0, 0.0, 1.0, 1.0, INF, NAN])
    for seed in range(20):
        kept, weights = infobatch_subset(losses, 0.5, generator(seed))
        assert set(kept.tolist()) in ({0, 2, 3, 4, 5}, {1, 2, 3, 4, 5})
        assert sorted(weights.tolist()) == [1.0, 1.0, 1.0, 1.0, 2.0]


@pytest.mark.parametrize("extra", [0, 1, 2, 3, 100])
def test_extra_keeps_more_of_the_low_ones(extra: int) -> None:
    losses = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 20.0])
    kept, weights = infobatch_subset(losses, 0.5, generator(), extra)
    low = min(3 + extra, 6)
    assert len(kept) == low + 1
    torch.testing.assert_close(weights, torch.tensor([6 / low] * low + [1.0]))


def test_the_generator_alone_decides() -> None:
    losses = torch.rand(100, generator=generator())
    torch.manual_seed(0)
    state = torch.get_rng_state()
    draws = generator(5)
    before = draws.get_state()
    first, second = infobatch_subset(losses, 0.5, draws)[0], infobatch_subset(losses, 0.5, draws)[0]
    assert not torch.equal(first, second), "another subset each time"
    assert torch.equal(torch.get_rng_state(), state)
    draws.set_state(before)
    assert torch.equal(infobatch_subset(losses, 0.5, draws)[0], first)


def test_indices_do_not_pass_through_the_dtype_of_the_losses() -> None:
    """In half precision the numbers from 2049 on are even, in the released code those of indices too."""
    losses = torch.ones(4000, dtype=torch.float16)
    losses[3001] = 0.0
    kept, _ = infobatch_subset(losses, 0.5, generator())
    assert torch.equal(kept, torch.arange(4000))


@pytest.mark.parametrize("prune", [-0.1, 1.0, NAN])
def test_a_share_that_is_none_raises(prune: float) -> None:
    with pytest.raises(ValueError, match="at least 0 and below 1"):
        infobatch_subset(LOSSES, prune, generator())


def test_losses_must_be_a_vector() -> None:
    with pytest.raises(ValueError, match="one entry for each sample"):
        infobatch_subset(torch.zeros(2, 3), 0.5, generator())
