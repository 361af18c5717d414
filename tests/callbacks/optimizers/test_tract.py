"""TrAct in a fit: which layer it finds, gradients by hand, accumulation, ranks, no trace, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_grad.callbacks import NMSparsity, TrAct, ZerothOrder
from lightning_grad.functional import precondition
from lightning_grad.testing import assert_identical
from tests.core.test_step_window import DATA, Module, Plain, Saves, run


class WithSGD(Plain):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def by_hand(damping: float = 0.1, accumulate: int = 1, epochs: int = 3) -> Module:
    module = WithSGD()
    optimizer, weight = module.configure_optimizers(), module.net[0].weight
    for step in range(6 * epochs // accumulate):
        total = torch.zeros_like(weight)
        optimizer.zero_grad()
        for part in range(accumulate):
            batch = DATA.split(8)[(step * accumulate + part) % 6]
            weight.grad = None
            (module.loss(batch) / accumulate).backward()
            total += precondition(weight.grad, batch, damping)
        weight.grad = total
        optimizer.step()
    return module


def close(a: Module, b: Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.allclose(x, y, rtol=1e-4, atol=1e-6) for x, y in pairs)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_it_is_a_loop_by_hand(accumulate: int) -> None:
    _, module = run(TrAct(0.2), module=WithSGD(), accumulate_grad_batches=accumulate)
    assert close(module, by_hand(0.2, accumulate))
    assert not close(module, run(module=WithSGD(), accumulate_grad_batches=accumulate)[1])


def test_it_finds_the_layer_that_the_batch_reaches_first() -> None:
    class Backwards(WithSGD):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.ModuleList([nn.Linear(16, 1), nn.Linear(8, 16)])

        def loss(self, x: Tensor) -> Tensor:
            return self.net[0](self.net[1](x).tanh()).square().mean()

    found: list[Any] = []

    class Looks(TrAct):
        def on_train_batch_end(self, *_: Any) -> None:
            found.append(self.chosen().names)

    _, first = run(Looks(), module=Backwards(), epochs=1)
    assert found == [["net.1"]] * 6
    _, named = run(TrAct(layer="net.1"), module=Backwards(), epochs=1)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), named.parameters(), strict=True))


def test_nothing_is_left() -> None:
    _, module = run(TrAct(), module=WithSGD())
    layer = module.net[0]
    assert type(layer) is nn.Linear
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks
    assert set(vars(layer)) == set(vars(nn.Linear(1, 1)))


@pytest.mark.filterwarnings("ignore:It is recommended to use `self.log")
def test_each_rank_uses_its_own_inputs_before_gradients_are_reduced(tmp_path: Path) -> None:
    class Halves(WithSGD):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.loss(batch[0][self.global_rank :: self.trainer.world_size])

    ranks = {"strategy": "ddp_fork", "devices": 2, "use_distributed_sampler": False}
    run(TrAct(0.2), Saves(tmp_path), module=Halves(), **ranks)
    saved = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert_identical(saved[0], saved[1])
    expected = WithSGD()
    optimizer, weight = expected.configure_optimizers(), expected.net[0].weight
    for step in range(18):
        total = torch.zeros_like(weight)
        optimizer.zero_grad()
        for rank in range(2):
            batch = DATA.split(8)[step % 6][rank::2]
            weight.grad = None
            (expected.loss(batch) / 2).backward()
            total += precondition(weight.grad, batch, 0.2)
        weight.grad = total
        optimizer.step()
    for key, value in expected.state_dict().items():
        torch.testing.assert_close(saved[0][key], value, rtol=1e-4, atol=1e-6)


def test_under_autocast_it_solves_in_full_precision() -> None:
    _, module = run(TrAct(0.2), module=WithSGD(), precision="bf16-mixed")
    exact = by_hand(0.2)
    for key, value in exact.state_dict().items():
        torch.testing.assert_close(module.state_dict()[key], value, rtol=0.1, atol=0.02)


class Embedded(WithSGD):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Embedding(4, 8), nn.Linear(8, 1))

    def loss(self, x: Tensor) -> Tensor:
        return self.net((x[:, 0] > 0).long()).square().mean()


def test_it_says_what_came_before_the_layer(caplog: Any) -> None:
    caplog.set_level("INFO")
    run(TrAct(), module=Embedded(), epochs=1)
    assert "trains the activations of net.1, the first Linear or convolution that trains, after net.0" in caplog.text


class Frozen(WithSGD):
    def __init__(self) -> None:
        super().__init__()
        self.net[0].requires_grad_(False)


def test_a_checkpointed_layer_is_preconditioned_once() -> None:
    class Checkpointed(WithSGD):
        def loss(self, x: Tensor) -> Tensor:
            return (checkpoint(self.net, x, use_reentrant=False) - x.sum(1, keepdim=True)).square().mean()

    _, module = run(TrAct(0.2), module=Checkpointed(), epochs=1)
    assert close(module, by_hand(0.2, epochs=1))


@pytest.mark.filterwarnings("ignore:.*returned `None`")  # which Lightning says once in a process
def test_a_first_batch_without_a_loss_is_no_error() -> None:
    class Skips(WithSGD):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) if batch_idx else None

    _, module = run(TrAct(), module=Skips(), epochs=1)
    assert not torch.equal(module.net[0].weight, WithSGD().net[0].weight)


def test_a_batch_that_reaches_no_layer_is_an_error() -> None:
    class Unused(WithSGD):
        def loss(self, x: Tensor) -> Tensor:
            return self.net[0].weight.square().sum()

    with pytest.raises(RuntimeError, match=r"the first batch reached no Linear .* set layer="):
        run(TrAct(), module=Unused())


class Compiled(WithSGD):
    def __init__(self) -> None:
        super().__init__()
        self.net.compile(backend="eager")


class FrozenNet(WithSGD):
    def __init__(self) -> None:
        super().__init__()
        self.net.requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(()))


@pytest.mark.parametrize(
    ("build", "callbacks", "words"),
    [
        (WithSGD, [TrAct(layer="net.00")], "no layer is named 'net.00'. Did you mean 'net.0'"),
        (WithSGD, [TrAct(layer="net.1")], "'net.1' is a Tanh"),
        (Embedded, [TrAct(layer="net.0")], "needs a Linear or a convolution, and 'net.0' is a Embedding"),
        (Frozen, [TrAct(layer="net.0")], "'net.0' is frozen"),
        (WithSGD, [NMSparsity("2:4", include=["net.0"]), TrAct(layer="net.0")], "computed from another tensor"),
        (
            WithSGD,
            [TrAct(layer="net.0"), NMSparsity("2:4", include=["net.0"])],
            "NMSparsity and another technique both",
        ),
        (WithSGD, [ZerothOrder(), TrAct()], "TrAct changes a gradient.*but ZerothOrder runs none"),
        (Compiled, [TrAct(layer="net.0")], "in a compiled module"),
        (Compiled, [TrAct()], "finds no Linear or convolution that trains and is not in a compiled module"),
        (FrozenNet, [TrAct()], "finds no Linear or convolution that trains"),
    ],
)
def test_other_layers_are_refused(build: Any, callbacks: list[Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        run(*callbacks, module=build())
