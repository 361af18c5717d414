"""Weights in the backward pass: the training is that of a loss weighted by hand, for any step that is a sum over samples."""

import copy
import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_grad.callbacks import InfoBatch, LossReweighting
from lightning_grad.core.losses.given_functions import LossRequest
from lightning_grad.core.losses.loss_tap import reweight_losses
from lightning_grad.core.losses.weighted_steps import WeighingCapture
from lightning_grad.functional import InseparableLossError, LossCapture, loss_weights
from lightning_grad.testing import assert_identical, state_of
from tests.callbacks.data_pruning.test_any_loss import BATCH, Foreign, each_alone, loader_of
from tests.callbacks.data_pruning.test_data_pruning import Classifier, train
from tests.functional.gradients.spellings import REWEIGHTABLE, with_gradient
from tests.functional.gradients.steps import PROJECTS
from tests.functional.gradients.test_steps import to_double


class Weigh(pl.Callback):
    """Weights the samples by their places in the batch."""

    def __init__(self, ones: bool = False) -> None:
        self.ones = ones

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.undo = reweight_losses(pl_module, lambda seen: self.weights(seen.losses), LossRequest("Weigh"))

    def weights(self, losses: Tensor) -> Tensor:
        if self.ones:
            return torch.ones_like(losses)
        return torch.linspace(0.2, 2.0, len(losses), dtype=losses.dtype, device=losses.device)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.undo()


class Double(Foreign):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.items = to_double(self.items)

    def on_fit_start(self) -> None:
        pl.seed_everything(4, verbose=False)  # of the noise


class ByHand(Double):
    """Weights its losses itself."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        shares = self.project.shares(batch)
        return (Weigh().weights(shares) * shares).mean() + self.project.constant()


# Of molecules and images with a list of boxes, the batch does not tell the number of samples.
TOLD = [name for name in PROJECTS if name not in ("MoleculeNetwork", "Detector")]


def weights_after(module: Any, *callbacks: Any, **arguments: Any) -> dict[str, Tensor]:
    first, *more = callbacks or (pl.Callback(),)
    train(first, module, loader=loader_of(module), more=more, precision="64-true", **arguments)
    return module.state_dict()


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("name", TOLD)
def test_training_is_that_of_the_loss_weighted_by_hand(name: str, accumulated: int) -> None:
    arguments = {"accumulate_grad_batches": accumulated}
    expected = weights_after(ByHand(name), **arguments)
    assert_close(weights_after(Double(name), Weigh(), **arguments), expected)


@pytest.mark.parametrize("name", TOLD)
def test_weights_of_one_change_no_bit(name: str) -> None:
    plain, ones = weights_after(Double(name)), weights_after(Double(name), Weigh(ones=True))
    assert_identical(ones, plain)


# One call of a loss of torch.


@pytest.mark.parametrize("name", REWEIGHTABLE)
def test_hooks_give_the_gradient_of_the_loss_computed_with_weights(name: str) -> None:
    spelling = wide = REWEIGHTABLE[name]
    if spelling.input.dtype == torch.float32:
        target = spelling.target.double() if spelling.target.is_floating_point() else spelling.target
        wide = spelling._replace(input=spelling.input.double(), target=target)
    samples = spelling.samples or (len(spelling.input) if spelling.target.dim() else 1)
    weights = torch.linspace(0.2, 2.0, samples, dtype=torch.float64)
    try:
        plain, unweighted = with_gradient(wide)
    except RuntimeError:  # class weights of float32
        wide = spelling
        plain, unweighted = with_gradient(wide)
    _, expected = with_gradient(wide, LossCapture(spelling.samples, lambda call: weights))
    value, found = with_gradient(wide, WeighingCapture(spelling.samples, lambda seen: weights, ""))
    assert torch.equal(value, plain)
    exact = (
        1e-12
        if wide.input.dtype == torch.float64
        else 1e-5
        if name != "autocast" and wide.input.dtype == torch.float32
        else 1e-2
    )
    torch.testing.assert_close(found, expected, rtol=exact, atol=exact)
    ones = torch.ones(samples, dtype=torch.float64)
    value, found = with_gradient(wide, WeighingCapture(spelling.samples, lambda seen: ones, ""))
    assert torch.equal(value, plain)
    assert torch.equal(found, unweighted)


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="from torch 2.13 on")
def test_a_layer_inside_of_a_loss_gets_the_weighted_gradient_too() -> None:
    weights, matrix = torch.tensor([2.0, 0.5, 0.0]), nn.Parameter(torch.randn(4, 5))
    x, y = torch.randn(3, 5, requires_grad=True), torch.tensor([0, 3, 1])
    with WeighingCapture(3, lambda seen: weights, ""):
        loss = F.linear_cross_entropy(x, matrix, y)
    assert torch.equal(loss, F.linear_cross_entropy(x, matrix, y))
    expected = (F.cross_entropy(x @ matrix.T, y, reduction="none") * weights).mean()
    for found, one in zip(
        torch.autograd.grad(loss, [x, matrix]), torch.autograd.grad(expected, [x, matrix]), strict=True
    ):
        torch.testing.assert_close(found, one)


@pytest.mark.parametrize("by_name", [False, True])
def test_a_target_with_a_graph_gets_the_weighted_gradient_too(by_name: bool) -> None:
    weights = torch.tensor([2.0, 0.5, 0.0])
    x, y = (torch.randn(3, 5, requires_grad=True) for _ in range(2))
    arguments = {"target": y, "input": x}
    with WeighingCapture(3, lambda seen: weights, ""):
        loss = F.mse_loss(**arguments) if by_name else F.mse_loss(x, y)
    expected = (F.mse_loss(x, y, reduction="none").mean(1) * weights).mean()
    for found, one in zip(torch.autograd.grad(loss, [x, y]), torch.autograd.grad(expected, [x, y]), strict=True):
        torch.testing.assert_close(found, one)


@pytest.mark.parametrize("ignored", [True, False])
def test_a_weight_of_nan_is_left_out_only_for_a_sample_without_a_loss(ignored: bool) -> None:
    logits, weights = torch.randn(3, 4, requires_grad=True), torch.tensor([1.0, float("nan"), 1.0])
    with WeighingCapture(3, lambda seen: weights, ""):
        loss = F.cross_entropy(logits, torch.tensor([0, -100 if ignored else 1, 2]))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.isnan().any(1).tolist() == [False, not ignored, False]


# The techniques.


class Recorded(Foreign):
    """Does not learn, and keeps what it is weighted by."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.mark.parametrize(
    "name", ["ScaledForecaster", "MaskedForecaster", "ProximalPolicy", "MoleculeNetwork", "Detector"]
)
def test_infobatch_remembers_the_losses_that_samples_have_alone(name: str) -> None:
    module = Recorded(name)
    callback = InfoBatch(0.5, prune_until=1.0)
    items = copy.deepcopy(module.items)
    train(callback, module, loader=loader_of(module))
    expected = torch.stack(each_alone(module.project, items)).detach()
    torch.testing.assert_close(callback._values.float(), expected.float(), rtol=1e-3, atol=1e-5)


class Reweighted(Double):
    """Weights its losses by hand, by the rule of the callback."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        shares = self.project.shares(batch)
        weights = loss_weights(shares, "linupper", 0.5)
        return (weights * shares).sum() + self.project.constant()


@pytest.mark.parametrize("name", ["TabularHeads", "ProximalPolicy", "QuantileForecaster", "LanguageModel", "Detector"])
def test_reweighting_is_that_by_hand(name: str) -> None:
    callback = LossReweighting(temperature=0.5, start_temperature=0.5, warmup_fraction=0.0)
    assert_close(weights_after(Double(name), callback), weights_after(Reweighted(name)))


def callbacks_of(kind: str) -> Any:
    if kind == "info":
        return InfoBatch(0.5, prune_until=1.0)
    return LossReweighting(temperature=0.5, start_temperature=2.0, warmup_fraction=0.0)


@pytest.mark.parametrize("kind", ["info", "reweighting"])
def test_a_resumed_run_is_the_uninterrupted_one(kind: str, tmp_path: Path) -> None:
    def run(epochs: int, ckpt: Any = None, more: Any = ()) -> Any:
        module = Foreign("ScaledForecaster")
        loader = DataLoader(module.items, BATCH, collate_fn=module.project.collate)
        arguments = {"enable_checkpointing": bool(more)}
        callback = callbacks_of(kind)
        callback.start_temperature = 0.5  # which then doesn't depend on the length of the run
        return train(callback, module, loader=loader, epochs=epochs, ckpt=ckpt, more=more, **arguments)

    whole = run(4)
    saver = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_epochs=1)
    run(2, more=[saver])
    again = run(4, str(tmp_path / "epoch=1-step=6.ckpt"), [ModelCheckpoint(tmp_path, save_top_k=-1, every_n_epochs=1)])
    assert_identical(state_of(again.trainer, again.module), state_of(whole.trainer, whole.module))


@pytest.mark.parametrize("kind", ["info", "reweighting"])
def test_half_precision_with_a_scaler(kind: str) -> None:
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))
    module = Foreign("ScaledForecaster")
    before = copy.deepcopy(module.state_dict())
    train(callbacks_of(kind), module, loader=loader_of(module), epochs=3, plugins=[plugin])
    assert all(value.isfinite().all() for value in module.state_dict().values())
    assert any(not torch.equal(value, before[name]) for name, value in module.state_dict().items())


class Compiled(Foreign):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.project.net = torch.compile(self.project.net, backend="eager")


def test_a_compiled_network_is_weighted_as_one_that_is_not() -> None:
    found, expected = Compiled("ScaledForecaster"), Foreign("ScaledForecaster")
    for module in (found, expected):
        train(callbacks_of("reweighting"), module, loader=loader_of(module))
    for one, other in zip(found.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, other)


class Shared(Foreign):
    """Each rank takes its part of the batch."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        ranks = self.trainer.world_size
        return {key: value.chunk(ranks)[self.global_rank] for key, value in batch.items()}


class Write(pl.Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        weights = [parameter.tolist() for parameter in pl_module.parameters()]
        (self.folder / f"{trainer.world_size}-{trainer.global_rank}.json").write_text(json.dumps(weights))


def test_two_ranks_weigh_the_samples_of_both(tmp_path: Path) -> None:
    for arguments in ({}, {"strategy": "ddp_fork", "devices": 2, "use_distributed_sampler": False}):
        module = Shared("ProximalPolicy")
        loader = DataLoader(module.items, BATCH, collate_fn=module.project.collate)
        train(callbacks_of("reweighting"), module, loader=loader, more=[Write(tmp_path)], **arguments)
    alone, first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1-0", "2-0", "2-1"))
    assert first == second
    for one, other in zip(first, alone, strict=True):
        torch.testing.assert_close(torch.tensor(one), torch.tensor(other), rtol=1e-4, atol=1e-6)


def test_both_losses_are_logged(tmp_path: Path) -> None:
    module = Foreign("ProximalPolicy")
    run = train(
        callbacks_of("reweighting"), module, loader=loader_of(module), logger=CSVLogger(tmp_path), log_every_n_steps=1
    )
    found = run.trainer.callback_metrics
    torch.testing.assert_close(found["data/loss"], found["loss"], rtol=1e-4, atol=1e-5)
    assert found["data/weighted_loss"] != found["data/loss"]


# What cannot be weighted.


class LearnedFactor(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.log_variance = nn.Parameter(torch.zeros(()))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        error = (self(batch[0]) - batch[0][:, :3]).abs().mean()
        return (-self.log_variance).exp() * error + self.log_variance


@pytest.mark.parametrize("kind", ["info", "reweighting"])
def test_a_learned_factor_is_refused(kind: str) -> None:
    with pytest.raises(InseparableLossError, match=r"mul \(test_weights_of_any_loss.py:\d+\) multiplies.*learned"):
        train(callbacks_of(kind), LearnedFactor())


class Nothing(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"logits": self(batch[0])}


class Untrained(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self(batch[0]).abs().mean().detach()


@pytest.mark.parametrize("kind", ["info", "reweighting"])
@pytest.mark.parametrize(("module", "words"), [(Nothing, "got no loss"), (Untrained, "requires no gradient")])
def test_a_step_without_a_loss_says_so(kind: str, module: Any, words: str) -> None:
    with pytest.raises(ValueError, match=rf"training_step must return a scalar loss.*{words}"):
        train(callbacks_of(kind), module())


def test_weights_of_a_wrong_shape() -> None:
    class Wrong(Weigh):
        def weights(self, losses: Tensor) -> Tensor:
            return losses.new_ones(2)

    module = Foreign("ProximalPolicy")
    with pytest.raises(ValueError, match=r"shape \(6,\); got \(2,\)"):
        train(Wrong(), module, loader=loader_of(module))
    with pytest.raises(ValueError, match=r"shape \(8,\); got \(2,\)"):
        train(Wrong())
