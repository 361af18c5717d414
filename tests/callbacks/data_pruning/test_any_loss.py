"""The steps of ten kinds of projects, as LightningModules: their samples are scored exactly, by losses and by gradients."""

import copy
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tests.callbacks.data_pruning.test_data_pruning import scores_of, train
from tests.callbacks.data_pruning.test_rows import pruning
from tests.functional.gradients.steps import PROJECTS, Project

BATCH = 6


class Foreign(pl.LightningModule):
    """A project's module, which knows nothing of this package."""

    def __init__(self, name: str, kind: type[Project] | None = None) -> None:
        super().__init__()
        pl.seed_everything(3, verbose=False)
        self.project: Project = (kind or PROJECTS[name])()
        self.items = [item for _ in range(3) for item in self.project.dataset()]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.project.training_step(batch)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def loader_of(module: Foreign, **arguments: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    return DataLoader(module.items, BATCH, shuffle=True, collate_fn=module.project.collate, generator=generator)


def each_alone(project: Project, items: list[Any]) -> list[Tensor]:
    return [project.training_step(project.collate([item])) - project.constant() for item in items]


def shares_of_batches(project: Project, items: list[Any]) -> Tensor:
    chunks = [items[start : start + BATCH] for start in range(0, len(items), BATCH)]
    return torch.cat([project.shares(project.collate(chunk)) for chunk in chunks]).detach()


def norms(losses: Any, project: Project) -> Tensor:
    parameters = list(project.parameters())
    found = [torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) for loss in losses]
    return torch.stack([nn.utils.get_total_norm([g for g in gradients if g is not None]) for gradients in found])


def scored(score: str, name: str) -> tuple[Tensor, Project, list[Any]]:
    module = Foreign(name)
    items = copy.deepcopy(module.items)
    values, module = scores_of(pruning(score), module, loader=loader_of(module))
    return values, module.project, items


EXACT = [name for name, kind in PROJECTS.items() if not kind.is_noisy]


@pytest.mark.parametrize("name", EXACT)
def test_losses_are_those_of_the_samples(name: str) -> None:
    values, project, items = scored("loss", name)
    if PROJECTS[name].sample_loss is None:  # what a sample alone has is not told by its batch: its share counts
        expected = shares_of_batches(project, items)
    else:
        expected = torch.stack(each_alone(project, items)).detach()
    torch.testing.assert_close(values, expected.double(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in EXACT if PROJECTS[name].sample_loss is not None])
def test_gradient_norms_are_those_of_the_samples(name: str) -> None:
    values, project, items = scored("grand", name)
    expected = norms(each_alone(project, items), project)
    torch.testing.assert_close(values, expected.double(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("score", ["loss", "grand"])
def test_a_step_that_draws_noise_is_scored_with_a_warning(score: str) -> None:
    module = Foreign("CellAutoencoder")
    callback = pruning(score)
    with pytest.warns(UserWarning, match="draws random numbers in eval mode too"):
        train(callback, module, loader=loader_of(module))
    assert callback.scored.values.isfinite().all()


@pytest.mark.parametrize("name", PROJECTS)
def test_a_pass_leaves_the_module_as_it_is(name: str) -> None:
    plain = Foreign(name)
    train(pl.Callback(), plain, loader=loader_of(plain))
    looked_at = Foreign(name)
    callback = pruning("loss", prune=0.0)
    if PROJECTS[name].is_noisy:
        with pytest.warns(UserWarning, match="draws random numbers"):
            train(callback, looked_at, loader=loader_of(looked_at))
    else:
        train(callback, looked_at, loader=loader_of(looked_at))
    for one, other in zip(plain.parameters(), looked_at.parameters(), strict=True):
        assert torch.equal(one, other)
