"""The directions are those of torch's own Adam, and the cosines those of whole vectors, without storing any."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_grad.functional import AdamMoments, GradientCosines, PerSampleGradients
from lightning_grad.functional.gradients import gradient_rows as projected
from lightning_grad.functional.gradients._ghost import gradient_rows

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.1, betas=(0.8, 0.95), eps=1e-3),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.0),
    "amsgrad": lambda parameters: torch.optim.Adam(parameters, lr=0.1, betas=(0.5, 0.6), amsgrad=True),
}


def trained(name: str) -> tuple[nn.Parameter, torch.optim.Optimizer]:
    """A weight after some steps; the first gradients are large, so AMSGrad keeps another v."""
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.zeros(3, 2, dtype=torch.float64))
    optimizer = OPTIMIZERS[name]([weight])
    for size in (4.0, 3.0, 0.1, 0.1, 0.1):
        weight.grad = size * torch.randn(3, 2, dtype=torch.float64, generator=generator)
        optimizer.step()
    return weight, optimizer


def moments_of(weight: Tensor, optimizer: torch.optim.Optimizer) -> AdamMoments:
    state, group = optimizer.state[weight], optimizer.param_groups[0]
    own = state["exp_avg"], state["exp_avg_sq"], float(state["step"]), group["betas"], group["eps"]
    return AdamMoments(*own, state.get("max_exp_avg_sq"))


def moved_by(weight: Tensor, optimizer: torch.optim.Optimizer, gradient: Tensor) -> Tensor:
    """How far a step on this gradient moves the weight, divided by minus the learning rate."""
    weight, optimizer = copy.deepcopy((weight, optimizer))
    before = weight.detach().clone()
    weight.grad = gradient.view_as(weight)
    optimizer.step()
    return (weight.detach() - before).flatten() / -0.1


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_directions_are_those_of_the_next_step(name: str) -> None:
    weight, optimizer = trained(name)
    gradients = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = torch.stack([moved_by(weight, optimizer, gradient) for gradient in gradients])
    found = moments_of(weight, optimizer).directions(gradients)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-8)
    plain = F.cosine_similarity(gradients, expected)
    assert plain.max() < 0.99, "the gradients alone are other directions"


def blocks(rows: dict[str, Tensor], cosines: GradientCosines, most: int = 2) -> GradientCosines:
    for name, gradients in rows.items():
        for start in range(0, len(gradients), most):
            cosines.add(name, start, gradients[start : start + most])
    return cosines


SHAPES = {"weight": (40, 50), "bias": (40,), "silent": (70, 3)}


def random(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


@pytest.fixture(scope="module")
def case() -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, AdamMoments], Tensor]:
    """Target, gradients, moments, and the cosines of whole vectors; one parameter has no gradient in this batch."""
    generator = torch.Generator().manual_seed(0)
    target = {name: random(generator, *shape) for name, shape in SHAPES.items()}
    rows = {name: random(generator, 5, target[name].numel()) for name in ("weight", "bias")}
    rows["weight"] += 2 * target["weight"].flatten()
    moments = {
        name: AdamMoments(
            random(generator, *SHAPES[name]) / 9, 1 + random(generator, *SHAPES[name]).square(), step=3000
        )
        for name in ("weight", "silent")
    }
    silent = torch.zeros(5, 210)
    whole = [moments["weight"].directions(rows["weight"]), rows["bias"], moments["silent"].directions(silent)]
    aim = torch.cat([value.flatten() for value in target.values()])
    return target, rows, moments, F.cosine_similarity(torch.cat(whole, dim=1), aim[None])[:, None]


def test_cosines_are_those_of_whole_vectors(case: Any) -> None:
    target, rows, moments, expected = case
    found = blocks(rows, GradientCosines(5, [target], moments)).values
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    without = blocks(rows, GradientCosines(5, [target], {"weight": moments["weight"]})).values
    assert (without - expected).abs().max() > 1e-3, "Adam's mean moves the silent parameter too"


def test_projected_cosines_are_within_their_standard_error(case: Any) -> None:
    target, rows, moments, expected = case
    dim = 8192
    found = blocks(rows, GradientCosines(5, [target], moments, dim)).values
    assert (found - expected).abs().max() < 3 * (2 / dim) ** 0.5
    other = blocks(rows, GradientCosines(5, [target], moments, dim, seed=1)).values
    assert not torch.equal(other, found), "another seed is another matrix"


def test_several_targets_and_batches(case: Any) -> None:
    target, rows, moments, expected = case
    other = {name: -2 * value for name, value in target.items()}
    cosines = blocks(
        {name: value.flip(0) for name, value in rows.items()}, GradientCosines(5, [target, other], moments)
    )
    cosines.begin(3)
    found = blocks({name: value[:3] for name, value in rows.items()}, cosines).values
    torch.testing.assert_close(found, torch.cat([expected[:3], -expected[:3]], dim=1), atol=1e-6, rtol=1e-5)


def test_a_sample_without_a_gradient_has_no_influence() -> None:
    cosines = blocks({"w": torch.tensor([[0.0, 0.0], [1.0, 0.0]])}, GradientCosines(2, [{"w": torch.ones(2)}]))
    torch.testing.assert_close(cosines.values, torch.tensor([[0.0], [0.5**0.5]]))


class Largest(TorchDispatchMode):
    """Find the largest tensor that operations return, in entries of float32."""

    entries = 0

    def __torch_dispatch__(self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        found = [leaf.untyped_storage().nbytes() // 4 for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.entries = max(self.entries, *found, 0)
        return result


@pytest.mark.parametrize("dim", [None, 64])
def test_memory_is_that_of_one_block(dim: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = 1 << 14
    monkeypatch.setattr(projected, "_MOST_SIGNS", limit)
    monkeypatch.setattr(gradient_rows, "BLOCK", limit)
    largest = []
    for width in (64, 256):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(64, width), nn.Tanh(), nn.Linear(width, 3))
        x, y = torch.randn(64, 64), torch.arange(64) % 3
        moments = {name: AdamMoments(torch.zeros_like(p), torch.ones_like(p), 5) for name, p in net.named_parameters()}
        target = {name: p.detach() for name, p in net.named_parameters()}
        gradients, cosines = PerSampleGradients(net), GradientCosines(64, [target], moments, dim)
        with Largest() as found:
            gradients.stream(lambda net=net, x=x, y=y: F.cross_entropy(net(x), y, reduction="none"), cosines.add)
        assert cosines.values.abs().max() > 0
        assert found.entries < 64 * 64 * width / 4, "below one gradient for each sample"
        largest.append(found.entries)
    assert max(largest) <= 2 * limit
