"""What PerSampleGradientNorms learned serves the next pass, unless the network has changed by then."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_grad.functional.gradients._ghost import graph
from lightning_grad.functional.gradients.per_sample_gradients import PerSampleGradientNorms
from tests.functional.gradients.test_per_sample_gradients import reference

SAMPLES = 4  # also the number of positions, so shapes do not tell them apart


class Network(nn.Module):
    """Reads (B, T, D); the options change where the samples are, and what is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.place = nn.Linear(5, 6), nn.Linear(6, 3), nn.Parameter(torch.randn(SAMPLES, 5))
        self.memory = nn.GRU(3, 3, batch_first=True)
        self.turns = self.averages_samples = self.remembers = False

    def forward(self, x: Tensor) -> Tensor:
        if self.turns:
            x = x.transpose(0, 1)
        out = self.second(self.first(x + self.place).tanh())
        if self.turns:
            out = out.transpose(0, 1)
        if self.remembers:
            out, _ = self.memory(out)
        return out

    def losses(self, x: Tensor) -> Tensor:
        return self(x).sin().mean((0, 2) if self.averages_samples else (1, 2))


def turn(network: Any) -> None:
    network.turns = not network.turns


def take_other_losses(network: Any) -> None:
    network.averages_samples = not network.averages_samples


def unfreeze(network: Any) -> None:
    network.first.requires_grad_()


def remember(network: Any) -> None:
    network.remembers = not network.remembers


def replace_a_layer(network: Any) -> None:
    network.second = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def leave(network: Any) -> None:
    """Change nothing."""


CHANGES = [turn, take_other_losses, unfreeze, remember, replace_a_layer]
# A recurrent layer is left to autograd. With it, losses of positions instead of samples would depend on each other.
PAIRS = [(leave, change) for change in CHANGES] + [(remember, c) for c in CHANGES if c is not take_other_losses]


@pytest.fixture
def network() -> Network:
    torch.manual_seed(0)
    return Network().double()


@pytest.fixture
def probes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the times that layouts are learned."""
    found: list[int] = []
    probe = graph.probe_layouts

    def counted(uses: Any, tracer: Any, most: int) -> Any:
        found.append(len(uses))
        return probe(uses, tracer, most)

    monkeypatch.setattr(graph, "probe_layouts", counted)
    return found


def batch(samples: int = SAMPLES, positions: int = SAMPLES) -> Tensor:
    return torch.randn(samples, positions, 5, dtype=torch.float64)


def assert_exact(norms: PerSampleGradientNorms, network: Network, x: Tensor) -> None:
    torch.testing.assert_close(norms(lambda: network.losses(x)), reference(network, network.losses(x)))


@pytest.mark.parametrize("prepare", [leave, remember])
def test_an_unchanged_network_is_not_learned_again(
    prepare: Callable[[Any], None], network: Network, probes: list[int]
) -> None:
    prepare(network)
    norms, runs, x = PerSampleGradientNorms(network), list[int](), batch()

    def losses() -> Tensor:
        runs.append(1)
        return network.losses(x)

    norms(losses)
    probes.clear()
    for _ in range(2):
        runs.clear()
        norms.begin_pass()
        with torch.no_grad():
            for parameter in network.parameters():
                parameter *= 1.1  # training goes on between passes
        assert_exact(norms, network, x)
        norms(losses)
        assert len(runs) == 1
    assert not probes


@pytest.mark.parametrize(("before", "change"), PAIRS)
def test_a_changed_network_is_learned_again(
    before: Callable[[Any], None], change: Callable[[Any], None], network: Network, probes: list[int]
) -> None:
    if change is unfreeze:
        network.first.requires_grad_(False)
    before(network)
    norms = PerSampleGradientNorms(network)
    for number in range(3):
        probes.clear()
        assert_exact(norms, network, batch())
        assert bool(probes) == (number < 2)
        if number < 2:
            norms.begin_pass()
        if number == 0:
            change(network)


@pytest.mark.parametrize("change", [turn, take_other_losses])
def test_without_the_comparison_stale_layouts_give_other_norms(change: Callable[[Any], None], network: Network) -> None:
    norms, x = PerSampleGradientNorms(network), batch()
    norms(lambda: network.losses(x))
    change(network)
    stale = norms(lambda: network.losses(x))
    assert not torch.allclose(stale, reference(network, network.losses(x)), rtol=1e-3)
    norms.begin_pass()
    assert_exact(norms, network, x)


def test_layouts_of_shapes_that_the_first_batch_does_not_show_are_learned_again(probes: list[int]) -> None:
    network = nn.Linear(5, 3).double()

    def losses(x: Tensor, dim: int = 0) -> Tensor:
        return network(x).sin().movedim(dim, 0).flatten(1).sum(1)

    norms, table, cube = PerSampleGradientNorms(network), batch()[0], batch()
    norms(lambda: losses(table))
    norms(lambda: losses(cube))
    norms.begin_pass()
    norms(lambda: losses(table))
    probes.clear()
    found = norms(lambda: losses(cube, 1))
    assert probes
    torch.testing.assert_close(found, reference(network, losses(cube, 1)))


def test_parameters_that_a_rule_covers_again(network: Network) -> None:
    remember(network)
    norms = PerSampleGradientNorms(network)
    assert_exact(norms, network, batch())
    assert norms.coverage["memory.weight_ih_l0"].startswith("per-sample backward")
    network.memory = nn.ModuleList([nn.Linear(3, 3).double()])  # type: ignore[assignment]
    network.remembers = False
    norms.begin_pass()
    assert_exact(norms, network, batch())
    assert norms.coverage["second.weight"] == "ghost: linear"
    assert "memory.weight_ih_l0" not in norms.coverage


def test_no_graph_is_kept(network: Network) -> None:
    nodes: list[Any] = []

    def losses() -> Tensor:
        out = network.losses(batch())
        out.grad_fn.metadata["dies"] = Dies(nodes)  # type: ignore[union-attr]
        return out

    norms = PerSampleGradientNorms(network)
    for _ in range(2):
        norms(losses)
        norms.begin_pass()
    assert len(nodes) == 2


class Dies:
    def __init__(self, dead: list[Any]) -> None:
        self.dead = dead

    def __del__(self) -> None:
        self.dead.append(1)
