"""A step evaluated twice by a small technique, against loops by hand: accumulation, dropout, BatchNorm, fp16, ranks."""

import copy
from pathlib import Path
from types import MappingProxyType
from typing import Any

import lightning.pytorch as pl
import pytest
import pytorch_lightning
import torch
import torchmetrics
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_grad.callbacks import (
    SAM,
    AdversarialTraining,
    GradientMonitor,
    InfoBatch,
    LossReweighting,
    NMSparsity,
)
from lightning_grad.core import OptimizerCallback, StepClosure, is_repeated, read_losses
from lightning_grad.core.steps import step_window
from lightning_grad.testing import assert_identical, fit, loaders, make_classifier, make_trainer, state_of

RHO = 0.1
DATA = torch.randn(48, 8, generator=torch.Generator().manual_seed(3))


def ascend(parameters: list[Tensor], rho: float) -> list[Tensor]:
    """Move weights up the gradient by a length of rho, and return copies of where they were."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.stack(torch._foreach_norm(gradients)).norm()
    scale = torch.where(norm.isfinite(), rho / norm, 0.0)
    kept = [p.detach().clone() for p in parameters]
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.add_(torch.nan_to_num(parameter.grad, posinf=0.0, neginf=0.0) * scale)
    return kept


class Sharp(OptimizerCallback):
    """Steps by the gradient at weights that have moved up the gradient."""

    namespace = "sharp"

    def __init__(self, rho: float = RHO, name: str | None = None) -> None:
        super().__init__(name)
        self.rho = rho

    def evaluate(self, index: int, optimizer: Any, closure: StepClosure) -> Any:
        loss = closure()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        with torch.no_grad():
            kept = ascend(parameters, self.rho)
        closure.again()
        with torch.no_grad():
            torch._foreach_copy_(parameters, kept)
        return loss


class Twice(Sharp):
    """Does it the naive way: it calls Lightning's closure a second time."""

    def evaluate(self, index: int, optimizer: Any, closure: StepClosure) -> Any:
        naive = copy.copy(closure)
        naive.again = closure.__call__
        return super().evaluate(index, optimizer, naive)


class Module(pl.LightningModule):
    """BatchNorm, dropout, a metric, a list and a log: all that a second evaluation could leave a trace in."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.3), nn.Linear(16, 1))
        self.metric = torchmetrics.MeanMetric()
        self.losses: list[float] = []

    def loss(self, x: Tensor) -> Tensor:
        return (self.net(x) - x.sum(1, keepdim=True)).square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch[0])
        self.metric(loss.detach())
        self.losses.append(loss.item())
        self.log("loss", loss, on_epoch=True, on_step=False)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Draws(pl.Callback):
    """Seeds each batch, so that a loop by hand draws the same masks."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(100 * trainer.current_epoch + batch_idx)


def run(*callbacks: Any, module: Any = None, epochs: int = 3, **arguments: Any) -> tuple[Any, Any]:
    module = Module() if module is None else module
    trainer = make_trainer(max_epochs=epochs, callbacks=[Draws(), *callbacks], **arguments)
    trainer.fit(module, DataLoader(TensorDataset(DATA), 8))
    return trainer, module


def by_hand(
    accumulate: int = 1,
    rho: float = RHO,
    epochs: int = 3,
    clip: float | None = None,
    every: int = 1,
    move: Any = ascend,
) -> Any:
    """Train with the sharp gradient of each whole window in a loop of our own; of every so many windows."""
    module = Module()
    optimizer = module.configure_optimizers()
    batches = DATA.split(8)
    for epoch in range(epochs):
        for start in range(0, len(batches), accumulate):
            window = list(enumerate(batches))[start : start + accumulate]

            def gradients(window: Any = window, epoch: int = epoch) -> None:
                optimizer.zero_grad()
                for index, batch in window:
                    torch.manual_seed(100 * epoch + index)
                    (module.loss(batch) / accumulate).backward()

            gradients()
            if (epoch * len(batches) + start) // accumulate % every:
                optimizer.step()
                continue
            buffers = [(b, b.clone()) for b in module.net.buffers()]
            with torch.no_grad():
                kept = move(list(module.net.parameters()), rho)
            gradients()
            with torch.no_grad():
                torch._foreach_copy_(list(module.net.parameters()), kept)
                for buffer, value in buffers:
                    buffer.copy_(value)
            if clip is not None:
                nn.utils.clip_grad_norm_(module.net.parameters(), clip)
            optimizer.step()
    return module


def same(a: Any, b: Any) -> bool:
    pairs = zip(a.net.state_dict().values(), b.net.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def test_one_tensor_for_all_batches_is_evaluated_as_often_as_it_comes() -> None:
    again: list[int] = []

    class OfTensors(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            again.append(int(is_repeated(self)))
            return self.loss(batch)

    make_trainer(max_epochs=2, callbacks=[Sharp()], accumulate_grad_batches=2).fit(
        OfTensors(), DataLoader([DATA[:8]] * 4, batch_size=None)
    )
    assert sum(again) == 8


@pytest.mark.parametrize("accumulate", [1, 3, 4])
def test_it_is_a_loop_by_hand(accumulate: int) -> None:
    """The gradients of the whole window are evaluated again, also of a last one that is shorter."""
    expected = by_hand(accumulate)
    _, module = run(Sharp(), accumulate_grad_batches=accumulate)
    assert same(module, expected)
    _, plain = run(accumulate_grad_batches=accumulate)
    assert not same(plain, expected)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_lightnings_closure_called_twice_is_another_step(accumulate: int) -> None:
    _, module = run(Twice(), accumulate_grad_batches=accumulate)
    assert not same(module, by_hand(accumulate))


def test_lightning_clips_the_second_gradient() -> None:
    _, module = run(Sharp(), gradient_clip_val=0.1)
    assert same(module, by_hand(clip=0.1))


@pytest.mark.parametrize("scale", [2.0**4, 2.0**40])
def test_under_a_grad_scaler(scale: float) -> None:
    """A loss scale that is a power of two changes no bit."""
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10**6))
    plugin.autocast_context_manager = torch.enable_grad  # in full precision: what is tested is the scaler
    _, module = run(Sharp(), plugins=[plugin])
    assert same(module, by_hand())


def test_in_half_precision_with_overflows() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    _, module = run(Sharp(), plugins=[MixedPrecision("16-mixed", "cpu", scaler)], epochs=6)
    assert all(p.isfinite().all() for p in module.parameters())
    assert scaler.get_scale() < 2.0**40
    assert any(not torch.equal(x, y) for x, y in zip(module.parameters(), Module().parameters(), strict=True))


def test_moving_nowhere_is_the_run_without_it() -> None:
    """With a length of zero the second gradient is the first, bit for bit, and nothing else tells that there were two."""
    trainer, module = run(Sharp(rho=0.0), accumulate_grad_batches=3)
    other, plain = run(accumulate_grad_batches=3)
    assert_identical(state_of(trainer, module), state_of(other, plain))
    assert module.losses == plain.losses
    assert module.metric.compute() == plain.metric.compute()
    assert_identical(trainer.callback_metrics, other.callback_metrics)


def test_the_loss_that_is_reported_is_that_of_the_real_weights() -> None:
    seen: list[Tensor] = []

    class Reads(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            seen.append(outputs["loss"])

    _, module = run(Sharp(), Reads())
    assert [loss.item() for loss in seen] == module.losses


def test_nothing_is_left() -> None:
    callback = Sharp()
    trainer, module = run(callback)
    plain_trainer, plain = run()
    assert set(vars(module)) == set(vars(plain))
    assert {"optimizer_step", "training_step", "backward"}.isdisjoint(vars(trainer.strategy))
    assert [len(o._optimizer_step_pre_hooks) for o in trainer.optimizers] == [0]
    assert set(vars(trainer.strategy)) == set(vars(plain_trainer.strategy))


class SkipsHalf(Module):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx % 2 else MappingProxyType({"loss": loss})  # any mapping, as in Lightning


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_batches_without_a_loss_are_left_out_again() -> None:
    trainer, module = run(Sharp(rho=0.0), module=SkipsHalf(), accumulate_grad_batches=2)
    other, plain = run(module=SkipsHalf(), accumulate_grad_batches=2)
    assert_identical(state_of(trainer, module), state_of(other, plain))


def test_batches_of_a_step_that_an_epoch_ended_too_early_are_dropped() -> None:
    class Stops(Module):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
            return -1 if batch_idx == 4 and self.current_epoch == 0 else None

    runs = [run(*others, module=Stops(), accumulate_grad_batches=3) for others in ([Sharp(rho=0.0)], [])]
    assert_identical(*[state_of(*each) for each in runs])


def test_an_epoch_that_only_collects_statistics_is_evaluated_once() -> None:
    """Otherwise the gradients of all its batches would move the averaged weights."""

    def averaged(*callbacks: Any) -> Any:
        return run(*callbacks, StochasticWeightAveraging(1e-3, swa_epoch_start=1, annealing_epochs=1), epochs=2)

    assert_identical(state_of(*averaged(Sharp(rho=0.0))), state_of(*averaged()))


def test_batches_of_steps_without_a_second_evaluation_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[Any] = []

    class Never(Sharp):
        def evaluates_again(self) -> bool:
            return False

    monkeypatch.setattr(step_window, "copy_of", lambda batch: copied.append(batch) or batch)
    with pytest.raises(
        RuntimeError, match=r"again\(\) was called in a step for which evaluates_again\(\) returned False"
    ):
        run(Never())
    assert not copied
    run(SAM(every_n_steps=3), epochs=1, accumulate_grad_batches=2)
    assert len(copied) == 2 * 2, "one of three steps is sharp: two batches, each copied before its two evaluations"


# Manual optimization, and modules that evaluate the closure themselves.


class Manual(Module):
    def __init__(self, with_closure: bool) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.with_closure = with_closure

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()

        def closure() -> None:
            torch.manual_seed(100 * self.current_epoch + batch_idx)
            optimizer.zero_grad()
            self.manual_backward(Module.training_step(self, batch, batch_idx))

        if self.with_closure:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()


def test_under_manual_optimization_a_closure_is_evaluated_twice() -> None:
    _, module = run(Sharp(), module=Manual(with_closure=True))
    assert same(module, by_hand())
    assert len(module.losses) == 18, "the second evaluation leaves no trace"


def test_under_manual_optimization_the_same_random_numbers_are_drawn() -> None:
    class Unseeded(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()

            def closure() -> Tensor:
                optimizer.zero_grad()
                loss = Module.training_step(self, batch, batch_idx)
                self.manual_backward(loss)
                return loss

            optimizer.step(closure)

    trainer, module = run(Sharp(rho=0.0), module=Unseeded(with_closure=True))
    other, plain = run(module=Unseeded(with_closure=True))
    assert_identical(state_of(trainer, module), state_of(other, plain))


def test_under_manual_optimization_a_step_without_a_closure_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"Sharp must evaluate each step itself.*Call optimizer.step\(closure\)"):
        run(Sharp(), module=Manual(with_closure=False))


class CallsItself(Module):
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any) -> None:
        optimizer_closure()
        optimizer.step()


def test_a_module_that_evaluates_the_closure_itself_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"CallsItself\.optimizer_step has already run the closure"):
        run(Sharp(), module=CallsItself())


class StepsPastLightning(Module):
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any) -> None:
        optimizer.optimizer.step(optimizer_closure)


def test_a_step_of_the_raw_torch_optimizer_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"Sharp must evaluate each step itself.*on the raw torch optimizer"):
        run(Sharp(), module=StepsPastLightning())
    run(module=StepsPastLightning(), epochs=1)


def test_two_that_evaluate_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"Sharp and Sharp\[b\] would each evaluate every step several times. Keep one"
    ):
        run(Sharp(), Sharp(name="b"))


# Beside others, and on ranks.


@pytest.mark.parametrize("first", [True, False])
def test_sparse_weights_stay_sparse_beside_it(first: bool) -> None:
    """One layer is of another class, and the weight of the other is covered in place while a step runs."""
    seen: list[float] = []

    class Looks(Sharp):
        def evaluate(self, index: int, optimizer: Any, closure: StepClosure) -> Any:
            loss = super().evaluate(index, optimizer, closure)
            seen.append((module.mix._parameters["w"] == 0).float().mean().item())
            return loss

    module, sparse = make_classifier(), NMSparsity("2:4", include=["hidden", "mix.w"])
    fit([sparse, Looks()] if first else [Looks(), sparse], module)
    for weight in (module.hidden.weight, module.mix.w):
        assert (weight == 0).float().mean() == 0.5
    assert set(seen) == {0.0}, "between evaluations the weight is the dense one"


def test_hooks_around_backward_can_tell_the_second_evaluation() -> None:
    seen: list[bool] = []

    class Counts(pl.Callback):
        def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
            seen.append(is_repeated(pl_module))

    run(Sharp(), Counts(), accumulate_grad_batches=3, epochs=1)
    assert seen == [False, False, False, True, True, True] * 2


def test_a_trainer_of_the_other_namespace_takes_it() -> None:
    trainer = make_trainer(pytorch_lightning.Trainer, callbacks=[Sharp()], max_epochs=2, accumulate_grad_batches=2)
    module = make_classifier(pytorch_lightning.LightningModule)
    trainer.fit(module, *loaders())
    _, other = fit([Sharp()], max_epochs=2, accumulate_grad_batches=2)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_loss_at_the_other_weights_is_returned(accumulate: int) -> None:
    losses: list[tuple[float, float]] = []

    class Looks(Sharp):
        def evaluate(self, index: int, optimizer: Any, closure: StepClosure) -> Any:
            loss = closure()
            losses.append((float(sum(module.losses[-accumulate:]) / accumulate), closure.again().item()))
            return loss

    module = Module()
    run(Looks(), module=module, accumulate_grad_batches=accumulate)
    first, again = zip(*losses, strict=True)
    assert again == pytest.approx(first, rel=1e-6), "at the weights where they were"


class Saves(pl.Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        torch.save(pl_module.state_dict(), self.folder / f"{trainer.global_rank}.pt")


class Plain(Module):
    """Without dropout and BatchNorm, so that two ranks make what one makes of both their batches."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))


class FetchesItself(Plain):
    def training_step(self, dataloader_iter: Any) -> Tensor:
        return self.loss(next(dataloader_iter)[0][0])


@pytest.mark.filterwarnings("ignore:.*`dataloader_iter`")
def test_a_step_that_fetches_its_own_batches_is_refused() -> None:
    """It would get other batches in the second evaluation."""
    with pytest.raises(ValueError, match=r"Sharp needs the batch, but training_step\(dataloader_iter\) fetches it"):
        run(Sharp(), module=FetchesItself())
    make_trainer(max_epochs=1).fit(FetchesItself(), DataLoader(TensorDataset(DATA), 8))


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.filterwarnings("ignore:It is recommended to use `self.log")
def test_two_ranks_are_one_with_both_their_batches(accumulate: int, tmp_path: Path) -> None:
    class Halves(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            half = batch[0][self.global_rank :: self.trainer.world_size]
            return self.loss(half)

    ranks = {"strategy": "ddp_fork", "devices": 2, "use_distributed_sampler": False}
    run(Sharp(), Saves(tmp_path), module=Halves(), accumulate_grad_batches=accumulate, **ranks)
    _, one = run(Sharp(), module=Halves(), accumulate_grad_batches=accumulate)
    saved = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert_identical(saved[0], saved[1])
    for key, value in one.state_dict().items():
        torch.testing.assert_close(saved[0][key], value, rtol=1e-4, atol=1e-6)


def test_strategies_that_compress_gradients_are_refused() -> None:
    """They would add what is left of the first gradient to the second."""
    module, trainer = Module(), make_trainer(callbacks=[Sharp()])
    trainer.strategy.wants_to_compress = True
    with pytest.raises(ValueError, match=r"Sharp evaluates each step twice.*Train with strategy='ddp'"):
        trainer.fit(module, DataLoader(TensorDataset(DATA), 8))


class OnlyRAdam(Sharp):
    def acts_on(self, index: int, optimizer: Any) -> bool:
        return isinstance(optimizer, torch.optim.RAdam)


class Swaps(pl.Callback):
    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            trainer.strategy.optimizers = [torch.optim.RAdam(pl_module.parameters(), lr=1e-2)]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_it_begins_with_the_optimizer_that_it_acts_on(accumulate: int) -> None:
    """Until then no batch is kept, and from then on all batches of a step are evaluated again."""
    kept: list[int] = []

    class Looks(OnlyRAdam):
        def on_train_batch_end(self, *_: Any) -> None:
            kept.append(len(self._window._evaluations))

    run(Looks(), Swaps(), accumulate_grad_batches=accumulate)
    assert kept == [index % accumulate for index in range(1, 7)] * 3
    trainer, module = run(OnlyRAdam(rho=0.0), Swaps(), accumulate_grad_batches=accumulate)
    other, plain = run(Swaps(), accumulate_grad_batches=accumulate)
    assert_identical(state_of(trainer, module), state_of(other, plain))
    assert not same(run(OnlyRAdam(), Swaps(), accumulate_grad_batches=accumulate)[1], plain)


@pytest.mark.parametrize(
    "build",
    [
        lambda: InfoBatch(0.5, total_steps=100),
        lambda: LossReweighting(total_steps=100, start_temperature=2.0),
        lambda: AdversarialTraining(epsilon=0.1, attack="pgd"),
    ],
    ids=["InfoBatch", "LossReweighting", "AdversarialTraining"],
)
def test_what_belongs_to_a_batch_is_there_when_it_is_evaluated_again(build: Any) -> None:
    """With the samples, weights or attack of the last batch for all, earlier batches of a step would have other gradients."""
    plain, again = (fit([build(), *others], accumulate_grad_batches=2) for others in ([], [Sharp(rho=0.0)]))
    assert_identical(state_of(*plain), state_of(*again))
    assert_identical(plain[0].callback_metrics, again[0].callback_metrics)


def test_losses_at_other_weights_are_not_recorded() -> None:
    """In the first step the weights are those of the plain run, and so are the losses of its samples."""
    runs = [fit([InfoBatch(0.5, total_steps=100), *others], max_steps=1) for others in ([], [Sharp(rho=5.0)])]
    plain, sharp = (trainer.callbacks[0].state_dict() for trainer, _ in runs)
    assert_identical(plain, sharp)


def test_readers_of_losses_see_each_batch_once() -> None:
    seen: list[float] = []

    class Reads(pl.Callback):
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            self.stop = read_losses(pl_module, lambda call: seen.append(call.losses.mean().item()))

        def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
            self.stop()

    fit([Reads(), Sharp()], max_epochs=2)
    assert len(seen) == 12


def test_a_monitor_compares_parts_of_the_gradient_that_is_stepped_with() -> None:
    """The noise scale relates the norm of a step to those of its parts, which are evaluated twice, but count once."""

    def noise(*callbacks: Any) -> Any:
        trainer, _ = run(
            GradientMonitor(slow_stats_every=1), *callbacks, accumulate_grad_batches=3, log_every_n_steps=1
        )
        return {key: value for key, value in trainer.callback_metrics.items() if key.startswith("grad/")}

    assert "grad/noise_scale" in noise()
    assert_identical(noise(), noise(Sharp(rho=0.0)))
