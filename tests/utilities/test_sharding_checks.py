"""What gradients cannot be worked on is refused in words that say what to do."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lightning_grad.utilities.checks import (
    check_above,
    check_between,
    check_keeps,
    refuse_deepspeed,
    refuse_flat_shards,
    refuse_sparse_gradients,
)

NAN, INF = float("nan"), float("inf")


class DDPStrategy:
    """Stands in for Lightning's."""


class FSDPStrategy(DDPStrategy):
    """Stands in for Lightning's."""


class DeepSpeedStrategy(DDPStrategy):
    """Stands in for Lightning's, which derives from DDP too."""


class ModelParallelStrategy:
    """Stands in for Lightning's."""


class OwnDeepSpeed(DeepSpeedStrategy):
    """A strategy derived from one that is refused."""


class OwnFSDP(FSDPStrategy):
    """A strategy derived from one that is refused."""


def trainer_with(strategy: type) -> Any:
    return SimpleNamespace(strategy=strategy())


@pytest.mark.parametrize("strategy", [DeepSpeedStrategy, OwnDeepSpeed])
def test_deepspeed_is_refused(strategy: type) -> None:
    said = (
        rf"ZClip works on gradients, and under DeepSpeed \({strategy.__name__}\) the engine owns them.*strategy='ddp'"
    )
    with pytest.raises(ValueError, match=said):
        refuse_deepspeed(trainer_with(strategy), "ZClip")


@pytest.mark.parametrize("strategy", [DDPStrategy, FSDPStrategy, ModelParallelStrategy])
def test_every_other_strategy_passes_as_no_deepspeed(strategy: type) -> None:
    refuse_deepspeed(trainer_with(strategy), "ZClip")


@pytest.mark.parametrize("strategy", [FSDPStrategy, OwnFSDP])
def test_flat_shards_are_refused(strategy: type) -> None:
    said = rf"ZClip needs gradients in their own shapes, and under FSDP1 \({strategy.__name__}\).*ModelParallelStrategy"
    with pytest.raises(ValueError, match=said):
        refuse_flat_shards(trainer_with(strategy), "ZClip")


@pytest.mark.parametrize("strategy", [DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy])
def test_every_other_strategy_passes_as_no_flat_shards(strategy: type) -> None:
    refuse_flat_shards(trainer_with(strategy), "ZClip")


# Sparse gradients.


def ids(module: nn.Module) -> set[int]:
    return {id(parameter) for parameter in module.parameters()}


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_sparse_embedding_is_refused_by_its_name(kind: type) -> None:
    net = nn.ModuleDict({"words": kind(4, 2, sparse=True), "head": nn.Linear(2, 2)})
    said = rf"ZClip needs dense gradients, and {kind.__name__} 'words' makes sparse ones.*exclude=\['words'\]"
    with pytest.raises(ValueError, match=said):
        refuse_sparse_gradients(net, ids(net), "ZClip")


def test_sparse_embedding_that_is_not_chosen_passes() -> None:
    net = nn.ModuleDict({"words": nn.Embedding(4, 2, sparse=True), "head": nn.Linear(2, 2)})
    refuse_sparse_gradients(net, ids(net["head"]), "ZClip")


def test_dense_embedding_and_other_modules_called_sparse_pass() -> None:
    net = nn.ModuleDict({"words": nn.Embedding(4, 2), "own": nn.Linear(2, 2)})
    net["own"].sparse = "by 2:4"  # somebody's own attribute, which says nothing of gradients
    refuse_sparse_gradients(net, ids(net), "ZClip")


# What an optimizer keeps.

MESSAGE = "needs exp_avg_sq, and {} keeps none."


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1), "SGD"),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True), "SGD"),
        (lambda p: torch.optim.RMSprop(p), "RMSprop"),
        (lambda p: torch.optim.Adagrad(p), "Adagrad"),
    ],
)
def test_an_optimizer_that_keeps_no_second_moment_is_named(make: Any, name: str) -> None:
    with pytest.raises(ValueError, match=rf"Reader\[x\] needs exp_avg_sq, and {name} keeps none"):
        check_keeps(make(nn.Linear(2, 2).parameters()), "exp_avg_sq", "Reader[x]", MESSAGE)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam])
def test_optimizers_that_keep_it_pass_before_and_after_a_step(kind: type) -> None:
    layer = nn.Linear(2, 2)
    optimizer = kind(layer.parameters())
    check_keeps(optimizer, "exp_avg_sq", "Reader[x]", MESSAGE)
    assert not optimizer.state, "the optimizer itself is not stepped"
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    check_keeps(optimizer, "exp_avg_sq", "Reader[x]", MESSAGE)


def test_an_optimizer_that_cannot_be_built_anew_passes() -> None:
    class Odd(torch.optim.SGD):
        def __init__(self, parameters: Any, secret: str) -> None:
            super().__init__(parameters, lr=0.1)

    check_keeps(Odd(nn.Linear(2, 2).parameters(), "s"), "exp_avg_sq", "Reader[x]", MESSAGE)


def test_asking_draws_no_random_number() -> None:
    state = torch.get_rng_state()
    check_keeps(torch.optim.Adam(nn.Linear(2, 2, device="meta").parameters()), "exp_avg_sq", "Reader[x]", MESSAGE)
    assert torch.equal(torch.get_rng_state(), state)


# Ranges.


@pytest.mark.parametrize(("value", "bound"), [(1e-300, 0.0), (INF, 0.0), (2, 1)])
def test_number_above_a_bound_passes(value: float, bound: float) -> None:
    check_above(value, bound, "max_norm")


@pytest.mark.parametrize("value", [0.0, -1.0, NAN, -INF])
def test_number_at_a_bound_or_below_it_raises(value: float) -> None:
    with pytest.raises(ValueError, match=f"max_norm must be above 0; got {value}"):
        check_above(value, 0.0, "max_norm")


@pytest.mark.parametrize("value", [0, 0.0, 50, 100.0])
def test_number_in_a_range_passes(value: float) -> None:
    check_between(value, 0.0, 100.0, "percentile")


@pytest.mark.parametrize("value", [-1e-9, 100.001, NAN, INF])
def test_number_outside_a_range_raises(value: float) -> None:
    with pytest.raises(ValueError, match=f"percentile must be from 0 to 100; got {value}"):
        check_between(value, 0.0, 100.0, "percentile")
