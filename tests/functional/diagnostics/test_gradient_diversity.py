"""The Vendi score of gradients against hand-worked cases, and GradSign against brute force."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_grad.functional import gradsign_score, project_gradients, vendi_score


def test_equal_gradients_count_as_one_and_orthogonal_ones_each() -> None:
    assert vendi_score(torch.ones(6, 3) * torch.arange(1.0, 7)[:, None])[0] == pytest.approx(1)
    assert vendi_score(torch.eye(7) * torch.arange(1.0, 8)[:, None])[0] == pytest.approx(7)
    half = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    assert vendi_score(half)[0] == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))
    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert vendi_score(opposite)[0] == pytest.approx(1), "opposite directions are one direction"


def test_rows_without_a_direction_are_ignored() -> None:
    rows = torch.cat([torch.eye(3), torch.zeros(1, 3), torch.full((1, 3), torch.nan)])
    score, cosines = vendi_score(rows)
    assert score == pytest.approx(3)
    assert cosines[3].isnan().all()
    assert cosines[4].isnan().all()
    torch.testing.assert_close(cosines[:3, :3], torch.eye(3, dtype=torch.float64))
    assert math.isnan(vendi_score(torch.zeros(2, 3))[0])


@pytest.fixture
def case():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 4))
    x, y = torch.randn(30, 6), torch.randint(4, (30,))
    return net, lambda scale=1.0: scale * F.cross_entropy(net(x), y, reduction="none")


def all_rows(net: nn.Module, losses: Tensor) -> Tensor:
    each = [torch.autograd.grad(loss, list(net.parameters()), retain_graph=True) for loss in losses]
    return torch.stack([torch.cat([g.flatten() for g in gradients]) for gradients in each])


def test_projected_gradients_have_about_the_score_of_the_whole_ones(case) -> None:
    net, losses = case
    exact, _ = vendi_score(all_rows(net, losses()))
    assert 3 < exact < 20
    assert vendi_score(project_gradients(net, losses, dim=1024))[0] == pytest.approx(exact, rel=0.03)
    assert vendi_score(project_gradients(net, losses, dim=64))[0] != pytest.approx(exact, rel=0.03)


def test_gradsign_is_brute_force_and_does_not_depend_on_the_scale_of_the_loss(case) -> None:
    net, losses = case
    expected = float(all_rows(net, losses()).sign().sum(0).abs().sum())
    assert gradsign_score(net, losses) == expected
    assert gradsign_score(net, lambda: losses(7.0)) == expected
    assert expected < 30 * sum(p.numel() for p in net.parameters()), "not all signs agree"
