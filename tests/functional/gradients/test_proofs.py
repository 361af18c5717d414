"""What only running a step can show: coincidences of shapes, noise, and what the loss of a sample alone is."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_grad.functional import InseparableLossError, LossTrace
from lightning_grad.functional.gradients.follow import RowTracker
from tests.functional.gradients.catalogue import B, Batch, Net, absolute, errors, make_batch
from tests.functional.gradients.coincidences import COINCIDENCES, FISHER, FOLLOWED, OLD, QUEUE
from tests.functional.gradients.losses_by_hand import mae
from tests.functional.gradients.losses_of_torch import mse
from tests.functional.gradients.proofs import is_noisy, prove_terms, solo_losses, trace_step, unordered_terms


class BlindTracker(RowTracker):
    """Follows nothing, so that the shape rule stands alone."""

    def set(self, tensor: Tensor, rows: Any) -> None:
        pass


class ShapeRuleOnly(LossTrace):
    """The naive way: k B rows are k rows of each sample."""

    def __init__(self, samples: int, **options: Any) -> None:
        super().__init__(samples, **options)
        self._rows = BlindTracker(self._record)


def setting() -> tuple[Net, Batch]:
    torch.manual_seed(0)
    return Net(), make_batch()


def picker(batch: Batch) -> Any:
    return lambda indices: batch[torch.tensor(indices)]


@pytest.mark.parametrize("name", COINCIDENCES)
def test_the_permutation_catches_each_coincidence_that_the_shape_rule_accepts(name: str) -> None:
    net, batch = setting()
    step = COINCIDENCES[name]
    accepted = trace_step(lambda b: step(net, b), batch, B, ShapeRuleOnly)  # no complaint
    torch.testing.assert_close(accepted.shares.mean() + accepted.constant, step(net, batch).detach())
    assert unordered_terms(lambda b: step(net, b), picker(batch), range(B), ShapeRuleOnly)


@pytest.mark.parametrize("name", COINCIDENCES)
def test_following_and_permutation_together_never_accept_a_wrong_one(name: str) -> None:
    net, batch = setting()
    step = COINCIDENCES[name]

    def make_trace(samples: int) -> LossTrace:
        return LossTrace(samples, constants=[QUEUE])

    expected = FOLLOWED.get(name)
    if isinstance(expected, str):
        with pytest.raises(InseparableLossError, match=expected):
            trace_step(lambda b: step(net, b), batch, B, make_trace)
        return
    wrong = unordered_terms(lambda b: step(net, b), picker(batch), range(B), make_trace)
    if expected is None:
        assert wrong
    else:
        assert wrong == ()
        terms = trace_step(lambda b: step(net, b), batch, B, make_trace)
        torch.testing.assert_close(terms.shares, expected(net, batch).detach())


def test_each_term_is_tested_and_not_their_sum() -> None:
    net, batch = setting()
    found = unordered_terms(lambda b: COINCIDENCES["elastic_weights"](net, b), picker(batch), range(B))
    assert len(found) == 1  # the mean of errors is right
    assert found[0].startswith("sum (coincidences.py:")


def test_constants_that_are_named_end_the_coincidence() -> None:
    net, batch = setting()
    step = COINCIDENCES["elastic_weights"]
    proof = prove_terms(
        lambda b: step(net, b), picker(batch), range(B), make_trace=lambda n: LossTrace(n, constants=[FISHER, OLD])
    )
    assert proof.is_proven
    assert proof.sample_loss == "share"
    torch.testing.assert_close(proof.terms.shares, absolute(net, batch).detach())
    torch.testing.assert_close(proof.terms.constant, (FISHER * (net.six.weight - OLD) ** 2).sum().detach())


def test_proven_terms_rule_out_a_coincidence_of_a_later_batch() -> None:
    """Classes and samples agree in the last, smaller batch only."""
    net, batch = setting()

    def step(b: Batch) -> Tensor:
        each = torch.full((len(b),), 1 / len(b), dtype=torch.float64)
        return 2 * (each @ net(b.x).abs()).mean() + mse(net, b)

    proof = prove_terms(step, picker(batch), range(B))
    assert proof.is_proven
    small = make_batch(3, samples=4)  # 8 features, 4 samples
    expected = (2 * net(small.x).abs().mean(1) + errors(net, small)).detach()
    with LossTrace(4) as trace:
        loss = step(small)
    terms = trace.terms(loss, like=proof.terms)
    assert terms.keys <= proof.terms.keys
    torch.testing.assert_close(terms.shares, expected)
    assert not torch.allclose(trace.terms(loss).shares, expected)  # what the shapes alone say


def test_a_batch_sorted_by_the_collate_function_is_caught() -> None:
    net, batch = setting()

    def collate(indices: list[int]) -> Batch:
        found = batch[torch.tensor(indices)]
        return found[found.y[:, 0].argsort()]

    assert unordered_terms(lambda b: mae(net, b), collate, range(B))


def test_noise_is_told_and_nothing_else_is_claimed() -> None:
    net, batch = setting()

    def step(b: Batch) -> Tensor:
        return ((net(b.x) + torch.randn_like(b.x) - b.y) ** 2).mean()

    before = torch.get_rng_state()
    proof = prove_terms(step, picker(batch), range(B))
    assert proof.noisy
    assert not proof.is_proven
    assert proof.sample_loss is None
    assert torch.equal(torch.get_rng_state(), before)
    assert not is_noisy(lambda b: mae(net, b), picker(batch), range(B))


def test_solo_losses_are_those_of_batches_of_one() -> None:
    net, batch = setting()
    found = solo_losses(lambda b: mse(net, b), picker(batch), range(B))
    torch.testing.assert_close(found, errors(net, batch).detach())


def test_a_step_that_fails_for_one_sample_says_why() -> None:
    net, batch = setting()

    def step(b: Batch) -> Tensor:
        return F.mse_loss(net(b.x).squeeze().sum(1), b.y.sum(1))

    proof = prove_terms(step, picker(batch), range(B))
    assert proof.is_proven
    assert proof.solo is None
    assert proof.solo_error.startswith("IndexError")


@pytest.mark.parametrize("samples", [1, 2])
def test_small_batches(samples: int) -> None:
    net, batch = setting()
    proof = prove_terms(lambda b: mae(net, b), picker(batch), range(samples))
    assert proof.is_proven
    assert proof.sample_loss == "share"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_no_disorder(dtype: torch.dtype) -> None:
    net, batch = setting()
    net = net.to(dtype)

    def step(b: Batch) -> Tensor:
        return (net(b.x.to(dtype)) - b.y.to(dtype)).abs().mean() + 3.0

    proof = prove_terms(step, picker(batch), range(B))
    assert proof.is_proven
    assert proof.sample_loss == "share"
