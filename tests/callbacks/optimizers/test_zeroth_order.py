"""Steps without gradients: the derivative against autograd's, a loop by hand, ranks, memory, and what is refused."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from lightning_grad.callbacks import SAM, GradientNoise, Lookahead, NormClipping, OptimizerSwap, ZerothOrder
from lightning_grad.functional import move_along_
from lightning_grad.testing import assert_identical, fit, make_classifier, state_of
from tests.core.test_step_window import DATA, Module, Plain, Saves, run

RATE, DECAY = 1e-2, 0.1


class ForSGD(Plain):
    rate = RATE

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.rate, weight_decay=DECAY)


class Derivatives(pl.Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.seen.append(trainer.callback_metrics["zeroth_order/derivative"].item())


class Double(ForSGD):
    """Differences of losses lose most digits of float32."""

    def __init__(self) -> None:
        super().__init__()
        self.double()

    def loss(self, x: Tensor) -> Tensor:
        return super().loss(x.double())


def close(a: Module, b: Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.allclose(x, y, rtol=1e-9, atol=1e-11) for x, y in pairs)


def by_hand(epsilon: float, epochs: int = 3) -> tuple[Module, list[float]]:
    module, derivatives = Double(), []
    weights = list(module.parameters())
    with torch.no_grad():
        for step in range(6 * epochs):
            batch, losses = DATA.split(8)[step % 6], []
            move_along_(weights, [epsilon] * len(weights), step)
            losses.append(module.loss(batch))
            move_along_(weights, [-2 * epsilon] * len(weights), step)
            losses.append(module.loss(batch))
            move_along_(weights, [epsilon] * len(weights), step)
            derivatives.append(((losses[0] - losses[1]) / (2 * epsilon)).item())
            for weight in weights:
                weight.mul_(1 - RATE * DECAY)
            move_along_(weights, [-RATE * derivatives[-1]] * len(weights), step)
    return module, derivatives


def test_it_is_a_loop_by_hand() -> None:
    seen = Derivatives()
    _, module = run(ZerothOrder(), seen, module=Double(), log_every_n_steps=1)
    expected, derivatives = by_hand(1e-3)
    assert seen.seen == pytest.approx(derivatives, rel=1e-6)
    assert close(module, expected)


def test_the_derivative_is_that_of_autograd() -> None:
    seen, module = Derivatives(), Double()
    module.loss(DATA[:8]).backward()
    directions = [torch.zeros_like(p) for p in module.parameters()]
    move_along_(directions, [1.0] * len(directions), 0)
    expected = sum((p.grad * z).sum().item() for p, z in zip(module.parameters(), directions, strict=True))
    module.zero_grad(set_to_none=True)
    run(ZerothOrder(1e-5), seen, module=module, max_steps=1, log_every_n_steps=1)
    assert seen.seen[0] == pytest.approx(expected, rel=1e-6)
    assert all(p.grad is None for p in module.parameters()), "no gradient is computed"


def test_it_trains() -> None:
    class Slow(ForSGD):
        rate = 3e-3

    start = Slow().loss(DATA).item()
    _, module = run(ZerothOrder(), module=Slow(), epochs=40)
    assert module.loss(DATA).item() < start / 3


def test_no_graph_is_built() -> None:
    class Looks(ForSGD):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            assert not loss.requires_grad
            return loss

    run(ZerothOrder(), module=Looks(), epochs=1)


def test_a_bound_limits_the_derivative() -> None:
    seen = Derivatives()
    run(ZerothOrder(max_derivative=0.5), seen, module=ForSGD(), log_every_n_steps=1)
    assert max(map(abs, seen.seen)) == 0.5


def test_only_chosen_parameters_train() -> None:
    _, module = run(ZerothOrder(include=["net.0"]), module=ForSGD())
    trained = {n for n, p in module.named_parameters() if not torch.equal(p, ForSGD().get_parameter(n))}
    assert trained == {"net.0.weight", "net.0.bias"}


class Halves(ForSGD):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch[0][self.global_rank :: self.trainer.world_size])


@pytest.mark.filterwarnings("ignore:It is recommended to use `self.log")
def test_two_ranks_are_one_with_both_their_batches(tmp_path: Path) -> None:
    ranks = {"strategy": "ddp_fork", "devices": 2, "use_distributed_sampler": False}
    run(ZerothOrder(), Saves(tmp_path), module=Halves(), **ranks)
    saved = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert_identical(saved[0], saved[1])
    _, one = run(ZerothOrder(), module=Halves())
    for key, value in one.state_dict().items():
        torch.testing.assert_close(saved[0][key], value, rtol=1e-3, atol=1e-4)


def test_it_resumes_bitwise(tmp_path: Path) -> None:
    def train(epochs: int, ckpt: Any = None) -> Any:
        return fit([ZerothOrder()], make_classifier(optimizer="sgd"), max_epochs=epochs, ckpt=ckpt)

    whole, (trainer, _) = train(4), train(2)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    assert_identical(state_of(*whole), state_of(*train(4, tmp_path / "two.ckpt")))


@pytest.mark.filterwarnings("ignore:.*returned `None`")  # which Lightning says once in a process
def test_a_batch_without_a_loss_moves_nothing() -> None:
    class Skips(ForSGD):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None

    _, module = run(ZerothOrder(), module=Skips(), epochs=1)
    for p, q in zip(module.parameters(), Skips().parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


@pytest.mark.parametrize("call", [1, 2])
def test_an_exception_in_either_pass_moves_the_weights_back(call: int) -> None:
    calls: list[int] = []

    class Fails(Double):
        def loss(self, x: Tensor) -> Tensor:
            calls.append(1)
            if len(calls) == call:
                raise ArithmeticError("at the moved weights")
            return super().loss(x)

    module = Fails()
    with pytest.raises(ArithmeticError):
        run(ZerothOrder(epsilon=1.0), module=module)
    assert close(module, Double())


@pytest.mark.parametrize(
    ("others", "arguments", "words"),
    [
        ([SAM()], {}, "would each evaluate every step several times"),
        ([], {"accumulate_grad_batches": 2}, "takes a step for each batch.*accumulate_grad_batches=1"),
    ],
)
def test_runs_that_evaluate_otherwise_are_refused(others: list[Any], arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        run(ZerothOrder(), *others, module=ForSGD(), **arguments)


def test_optimizers_that_need_exact_gradients_are_refused() -> None:
    class Other(ForSGD):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters())

    with pytest.raises(ValueError, match="does not work with LBFGS, which needs exact gradients"):
        run(ZerothOrder(), module=Other())
    with pytest.raises(ValueError, match="does not work with Sophia, which needs exact gradients"):
        run(ZerothOrder(), OptimizerSwap("sophia", lr_factor=1.0), module=ForSGD())


def test_what_reads_gradients_gets_them_and_is_named(caplog: Any) -> None:
    seen: list[bool] = []

    class Reads(Double):
        def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
            seen.append(all(p.grad is not None for p in self.parameters()))

    class Ascends(Double):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=self.rate, maximize=True)

    caplog.set_level("INFO")
    _, reads = run(ZerothOrder(), GradientNoise(0.0), module=Reads())
    assert seen == [True] * 18
    assert "stores gradients for GradientNoise, Reads.configure_gradient_clipping. SGD without" in caplog.text
    _, in_place = run(ZerothOrder(), module=Double())
    assert close(reads, in_place)
    caplog.clear()
    run(ZerothOrder(), OptimizerSwap("sgd", lr_factor=1.0), module=ForSGD(), epochs=1)
    assert "stores gradients" not in caplog.text
    run(ZerothOrder(), Lookahead(), module=ForSGD(), epochs=1)
    assert "stores gradients for Lookahead. SGD" in caplog.text
    _, ascends = run(ZerothOrder(), module=Ascends(), epochs=1)
    assert "stores gradients for SGD with maximize" in caplog.text
    assert ascends.loss(DATA) > Double().loss(DATA)


def test_other_optimizers_get_the_gradient_and_it_can_be_clipped() -> None:
    """Clipping by an infinite norm changes nothing, but makes the step go through the gradient."""
    seen: list[float] = []

    class Looks(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            seen.append(torch.cat([p.grad.flatten() for p in pl_module.parameters()]).norm().item())

    _, in_place = run(ZerothOrder(), module=Double())
    _, by_gradient = run(ZerothOrder(), NormClipping(float("inf")), module=Double())
    assert close(in_place, by_gradient)
    run(ZerothOrder(), NormClipping(0.5), Looks(), module=Double())
    assert max(seen) == pytest.approx(0.5, rel=1e-5)
    run(ZerothOrder(), module=Plain())
