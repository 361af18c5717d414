"""A technique written from public names of core: a loop by hand in float64, neutral, resumed, and without a trace."""

import ast
import pickle
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_grad.testing import ResumableLoader, assert_identical, make_trainer, state_of
from tests.core import distance_rate
from tests.core.distance_rate import DistanceRate

FIRST, EPOCHS = 0.05, 4
DATA = torch.randn(40, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


class Quadratic(pl.LightningModule):
    def __init__(self, dtype: torch.dtype = torch.float64, spoilt: int | None = None, momentum: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)).to(dtype)
        self.dtype_of_data, self.spoilt, self.momentum = dtype, spoilt, momentum

    def loss(self, x: Tensor) -> Tensor:
        return (self.net(x) - x.sum(1, keepdim=True)).square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch[0].to(self.dtype_of_data))
        return loss * torch.inf if batch_idx == self.spoilt and self.current_epoch == 1 else loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0, momentum=self.momentum)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


def run(callbacks: list[Any], module: Any = None, ckpt: Any = None, **arguments: Any) -> tuple[Any, Any]:
    module = Quadratic() if module is None else module
    if any(isinstance(callback, pl.callbacks.Checkpoint) for callback in callbacks):
        arguments["enable_checkpointing"] = True
    trainer = make_trainer(callbacks=callbacks, max_epochs=EPOCHS, **arguments)
    trainer.fit(module, ResumableLoader(TensorDataset(DATA), 8), ckpt_path=ckpt)
    return trainer, module


def by_hand(skip: int | None = None, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    weights = [p.detach().clone().requires_grad_() for p in Quadratic(dtype).parameters()]
    start = [w.detach().clone() for w in weights]
    distance, total = torch.tensor(FIRST, dtype=dtype), torch.tensor(0.0, dtype=dtype)
    for epoch in range(EPOCHS):
        for index, x in enumerate(DATA.to(dtype).split(8)):
            if epoch == 1 and index == skip:
                continue
            hidden = torch.tanh(x @ weights[0].T + weights[1])
            loss = (hidden @ weights[2].T + weights[3] - x.sum(1, keepdim=True)).square().mean()
            gradients = torch.autograd.grad(loss, weights)
            with torch.no_grad():
                away = torch.cat([(w - s).flatten() for w, s in zip(weights, start, strict=True)]).norm()
                distance = torch.maximum(distance, away)
                total = total + distance**2 * torch.cat([g.flatten() for g in gradients]).square().sum()
                for weight, gradient in zip(weights, gradients, strict=True):
                    weight -= 0.9**epoch * distance**2 / total.sqrt() * gradient
    return weights


def test_it_is_a_loop_by_hand_in_float64() -> None:
    _, module = run([DistanceRate(FIRST)])
    for weight, expected in zip(module.parameters(), by_hand(), strict=True):
        torch.testing.assert_close(weight, expected, rtol=1e-10, atol=1e-12)
    _, plain = run([])
    assert not torch.allclose(plain.net[0].weight, module.net[0].weight, rtol=1e-3)


def test_a_step_that_the_scaler_skips_counts_nowhere() -> None:
    """Its gradients are infinite, and so would the sum be that all later steps are divided by."""
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=4.0))
    plugin.autocast_context_manager = torch.enable_grad
    _, module = run([DistanceRate(FIRST)], Quadratic(torch.float32, spoilt=2), plugins=[plugin])
    for weight, expected in zip(module.parameters(), by_hand(2, torch.float32), strict=True):
        torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-5)


def test_the_rates_outside_a_step_are_the_users() -> None:
    class Looks(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            (group,) = trainer.optimizers[0].param_groups
            assert type(group["lr"]) is float
            assert group["lr"] == pytest.approx(0.9 ** (trainer.current_epoch + trainer.is_last_batch))

    run([DistanceRate(FIRST), Looks()])


def test_its_neutral_setting_changes_no_bit() -> None:
    assert_identical(state_of(*run([DistanceRate(power=0.0)])), state_of(*run([])))


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_resuming_is_bitwise(momentum: float, tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1)
    whole = DistanceRate(FIRST)
    expected = state_of(*run([whole, saving], Quadratic(momentum=momentum)))
    for path in sorted(tmp_path.glob("*.ckpt")):
        rest = DistanceRate(FIRST)
        assert_identical(state_of(*run([rest], Quadratic(momentum=momentum), ckpt=path))["module"], expected["module"])
        assert_identical(rest.state_dict(), whole.state_dict())


class Fails(pl.Callback):
    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 8:
            raise KeyError("on purpose")


@pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available", "ignore:.*was called without a model")
def test_nothing_is_left_and_a_run_that_failed_goes_on(tmp_path: Path) -> None:
    expected = state_of(*run([DistanceRate(FIRST)]))["module"]
    callback, module, trainers = DistanceRate(FIRST), Quadratic(), []
    keep = pl.callbacks.LambdaCallback(on_train_start=lambda trainer, _: trainers.append(trainer))
    with pytest.raises(KeyError):
        run([callback, keep, Fails(), OnExceptionCheckpoint(tmp_path, "broken")], module)
    (optimizer,) = trainers[0].optimizers
    assert [group["lr"] for group in optimizer.param_groups] == [0.9]
    assert len(optimizer._optimizer_step_pre_hooks) == len(optimizer._optimizer_step_post_hooks) == 0
    assert {"optimizer_step", "backward", "training_step"}.isdisjoint(vars(trainers[0].strategy))
    pickle.loads(pickle.dumps(callback))
    assert_identical(state_of(*run([DistanceRate(FIRST)], ckpt=tmp_path / "broken.ckpt"))["module"], expected)
    assert_identical(state_of(*run([callback]))["module"], expected)


def test_it_is_short_and_knows_public_names_of_core_only() -> None:
    source = Path(distance_rate.__file__).read_text()
    assert len(source.splitlines()) <= 60
    names = [
        (node.module, alias.name)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if (node.module or "").startswith("lightning_grad")
    ]
    assert {module for module, _ in names} == {"lightning_grad.core"}
    assert not [name for _, name in names if name.startswith("_")]


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="first must be a number"):
        DistanceRate(first="0.1")  # type: ignore[arg-type]
