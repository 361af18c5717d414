"""Steps of ten kinds of projects: shares, weights and proofs."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_grad.functional import LossTrace
from tests.functional.gradients.proofs import prove_terms
from tests.functional.gradients.steps import PROJECTS, Project
from tests.functional.gradients.test_losses import assert_close, gradients


def to_double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: to_double(v) for key, v in value.items()}
    return [to_double(v) for v in value] if isinstance(value, list) else value


def build(name: str) -> tuple[Project, list[Any]]:
    torch.manual_seed(0)
    project = PROJECTS[name]().double()
    return project, to_double(project.dataset())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", PROJECTS)
def test_shares_and_weights_of_a_step(name: str, training: bool) -> None:
    project, items = build(name)
    project.train(training)
    batch, weights = project.collate(items), torch.rand(len(items), dtype=torch.float64) + 0.1
    state = torch.get_rng_state()

    def seeded(run: Any) -> Tensor:
        torch.set_rng_state(state)
        found: Tensor = run(batch)
        return found

    plain = seeded(project.training_step)
    expected = seeded(project.shares)
    for values in (True, False):
        trace = LossTrace(len(items), values=values, constants=project.buffers())
        with trace:
            loss = seeded(project.training_step)
        terms = trace.terms(loss)
        assert torch.equal(loss, plain)
        if values:
            assert_close(terms.shares, expected.detach())
            assert_close(terms.constant, torch.as_tensor(project.constant()).detach() + 0.0 * plain.detach())
        handle = terms.weight_(torch.ones(len(items)))
        for found, one in zip(
            gradients(project, loss, retain=True), gradients(project, plain, retain=True), strict=True
        ):
            assert torch.equal(found, one)
        handle.remove()
        terms.weight_(weights)
        by_hand = gradients(project, (weights * expected).mean() + project.constant(), retain=True)
        for found, one in zip(gradients(project, loss), by_hand, strict=True):
            assert_close(found, one)


@pytest.mark.parametrize("name", PROJECTS)
def test_proof_of_a_step(name: str) -> None:
    project, items = build(name)
    project.eval()
    proof = prove_terms(
        project.training_step,
        lambda indices: project.collate([items[i] for i in indices]),
        range(len(items)),
        make_trace=lambda n: LossTrace(n, constants=project.buffers()),
    )
    assert proof.noisy == project.is_noisy
    assert proof.unordered == ()
    assert proof.sample_loss == project.sample_loss


@pytest.mark.parametrize("name", PROJECTS)
def test_a_smaller_last_batch_is_cut_alike(name: str) -> None:
    project, items = build(name)
    project.eval()
    proven = None
    for count in (6, 4, 3, 2, 1):
        if count < project.smallest:
            continue
        batch = project.collate(items[:count])
        torch.manual_seed(1)
        with LossTrace(count, constants=project.buffers()) as trace:
            loss = project.training_step(batch)
        terms = trace.terms(loss, like=proven)
        torch.manual_seed(1)
        expected = project.shares(batch).detach()
        if not expected.isnan().any():
            assert_close(terms.shares, expected)
        proven = proven or terms
