"""Every hand-made loss: shares and weighted gradients against those written by hand, or the words of its refusal."""

import pytest
import torch
from torch import Tensor

from lightning_grad.functional import InseparableLossError, LossTrace, Terms
from tests.cases import cases
from tests.functional.gradients.catalogue import B, Batch, Net, Step, make_batch
from tests.functional.gradients.losses import CASES, REFUSED
from tests.functional.gradients.proofs import prove_terms

pytestmark = pytest.mark.filterwarnings("ignore:.*lazily.*")


def setting(seed: int = 0) -> tuple[Net, Batch]:
    torch.manual_seed(seed)
    return Net(), make_batch(seed + 1)


def gradients(module: torch.nn.Module, loss: Tensor, retain: bool = False) -> list[Tensor]:
    parameters = list(module.parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=retain)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def traced(step: Step, net: Net, batch: Batch, values: bool = True, samples: int = B) -> tuple[Tensor, Terms]:
    with LossTrace(samples, values=values, constants=net.buffers()) as trace:
        loss = step(net, batch)
    return loss, trace.terms(loss)


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@cases("name", CASES)
def test_shares_and_constant_are_those_written_by_hand(name: str) -> None:
    case, (net, batch) = CASES[name], setting()
    loss, terms = traced(case.loss, net, batch)
    assert torch.equal(loss, case.loss(net, batch)), "the trace changed the loss"
    assert_close(terms.shares, case.shares(net, batch).detach())
    assert_close(terms.constant, case.constant(net, batch).detach())
    assert_close(terms.shares.mean() + terms.constant, loss.detach())


@cases("name", [name for name, case in CASES.items() if not case.learned])
def test_weighted_gradient_is_that_of_the_loss_weighted_by_hand(name: str) -> None:
    case, (net, batch) = CASES[name], setting()
    weights = torch.rand(B, dtype=torch.float64) + 0.1
    loss, terms = traced(case.loss, net, batch, values=False)
    terms.weight_(weights)
    by_hand = (weights * case.shares(net, batch)).mean() + case.constant(net, batch)
    for found, expected in zip(gradients(net, loss), gradients(net, by_hand), strict=True):
        assert_close(found, expected)


@cases("name", [name for name, case in CASES.items() if not case.learned])
def test_weights_of_one_give_the_plain_gradient_bit_for_bit(name: str) -> None:
    case, (net, batch) = CASES[name], setting()
    loss, terms = traced(case.loss, net, batch, values=False)
    terms.weight_(torch.ones(B))
    for found, plain in zip(gradients(net, loss), gradients(net, case.loss(net, batch)), strict=True):
        assert torch.equal(found, plain)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.learned])
def test_a_learned_factor_refuses_weights_by_name(name: str) -> None:
    case, (net, batch) = CASES[name], setting()
    _, terms = traced(case.loss, net, batch, values=False)
    with pytest.raises(InseparableLossError, match="learned factor") as caught:
        terms.weight_(torch.ones(B))
    assert caught.value.function == case.learned
    assert caught.value.location.startswith("losses.py:")


@cases("name", [name for name, case in CASES.items() if case.solo != "partners"])
def test_shares_follow_the_samples_and_are_the_loss_of_a_sample_alone(name: str) -> None:
    case, (net, batch) = CASES[name], setting()
    proof = prove_terms(lambda b: case.loss(net, b), lambda i: batch[torch.tensor(i)], range(B))
    assert not proof.noisy
    if name not in ("parts_of_the_batch", "one_row"):  # where a place in the batch counts, whoever is there
        assert proof.unordered == ()
    assert {"": (None,), "own": ("own",), "both": ("share",)}[case.solo] == (proof.sample_loss,)


@cases("name", CASES)
def test_values_with_a_graph_have_the_gradient_of_each_sample(name: str) -> None:
    case, (net, batch) = CASES[name], setting()
    with LossTrace(B, keep_graph=True) as trace:
        loss = case.loss(net, batch)
    shares = trace.terms(loss).shares
    weights = torch.rand(B, dtype=torch.float64)
    expected = gradients(net, (weights * case.shares(net, batch)).sum())
    found = gradients(net, (weights * shares).sum())
    if not case.learned:
        for a, b in zip(found, expected, strict=True):
            assert_close(a, b)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_sum_over_samples_is_refused(name: str) -> None:
    step, words = REFUSED[name]
    net, batch = setting()
    with pytest.raises(InseparableLossError, match=words) as caught:
        traced(step, net, batch)
    known = caught.value.function
    assert not known or known in str(caught.value)


@pytest.mark.parametrize("name", [n for n in REFUSED if n not in ("changed_in_place",)])
def test_what_is_refused_is_refused_for_weights_too(name: str) -> None:
    step, _ = REFUSED[name]
    net, batch = setting()
    with pytest.raises(InseparableLossError):
        traced(step, net, batch, values=False)


def test_there_are_enough_losses() -> None:
    assert len(CASES) + len(REFUSED) >= 50
