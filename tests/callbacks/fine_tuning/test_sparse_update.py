"""SparseUpdate: what trains stays within the budget as measured, everything else stays as it is to the bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_grad.callbacks import LoRA, SparseUpdate
from lightning_grad.callbacks.fine_tuning import sparse_update
from lightning_grad.functional import SavedActivations
from lightning_grad.testing import assert_identical, make_trainer, on_ranks

CLASSES, BATCH = 5, 16


class Net(pl.LightningModule):
    """Convolutions with BatchNorm, and a head; dropout and a metric, so a trace would show."""

    def __init__(self, optimizer: Callable[..., Any] = torch.optim.Adam, manual: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 16, 3, 2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Flatten(), nn.Linear(256, 32), nn.ReLU(), nn.Dropout(0.2),
        )  # fmt: skip
        self.head = nn.Linear(32, CLASSES)
        self.accuracy = MulticlassAccuracy(CLASSES)
        self.optimizer = optimizer
        self.automatic_optimization = not manual

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))  # type: ignore[no-any-return]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self(batch[0])
        self.accuracy(logits, batch[1])
        self.log("train_acc", self.accuracy)
        loss = F.cross_entropy(logits, batch[1])
        if not self.automatic_optimization:
            self.optimizers().zero_grad()  # type: ignore[union-attr]
            self.manual_backward(loss)
            self.optimizers().step()  # type: ignore[union-attr]
        return loss

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters(), lr=0.01)


def data(batches: int = 4) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batches * BATCH, 1, 8, 8, generator=generator)
    y = torch.randint(CLASSES, (batches * BATCH,), generator=generator)
    return DataLoader(TensorDataset(x, y), BATCH, shuffle=True)


def fit(*callbacks: Any, module: Any = None, loader: Any = None, ckpt: Any = None, **arguments: Any) -> Any:
    module = Net() if module is None else module
    pl.seed_everything(1, verbose=False)
    trainer = make_trainer(callbacks=list(callbacks), **{"max_epochs": 2, **arguments})
    trainer.fit(module, data() if loader is None else loader, ckpt_path=ckpt)
    return trainer, module


def changed(module: nn.Module, start: nn.Module | None = None) -> set[str]:
    """Return the names of the parameters that differ from the start."""
    was = dict((Net() if start is None else start).named_parameters())
    return {name for name, parameter in module.named_parameters() if not torch.equal(parameter, was[name])}


class Watch(pl.Callback):
    """Counts what training really needs, in each step."""

    def __init__(self) -> None:
        self.saved: list[int] = []
        self.gradients = 0
        self.trained: set[str] = set()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        present = [*pl_module.parameters(), *pl_module.buffers()]
        self.count = SavedActivations(present)
        self.count.__enter__()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.count.__exit__(None, None, None)
        self.saved.append(self.count.bytes)
        self.trained = {name for name, p in pl_module.named_parameters() if p.grad is not None}
        self.gradients = sum(p.grad.numel() * 4 for p in pl_module.parameters() if p.grad is not None)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        states = trainer.optimizers[0].state.values()
        self.state = sum(v.numel() * v.element_size() for state in states for v in state.values() if v.ndim)


@pytest.mark.parametrize("rule", ["gain", "first", "last", "random"])
@pytest.mark.parametrize("budget", [0.9, 0.5, 0.3])
def test_training_needs_what_was_measured_and_not_more_than_the_budget(budget: float, rule: str) -> None:
    callback, watch = SparseUpdate(budget, rule=rule), Watch()  # type: ignore[arg-type]
    if rule == "first" and budget == 0.3:  # the first layer needs the graph of the whole network
        with pytest.raises(ValueError, match=r"below what the first layer needs: 'backbone\.0'"):
            fit(callback)
        return
    _, module = fit(callback, watch)
    memory = callback.memory
    assert set(watch.saved) == {memory["saved"]}
    assert (watch.gradients, watch.state) == (memory["gradient"], memory["state"])
    assert memory["needed"] == memory["saved"] + memory["gradient"] + memory["state"]
    assert memory["needed"] <= memory["budget"] == int(budget * memory["dense"])
    assert changed(module) == watch.trained


def test_a_dense_fit_needs_what_it_is_said_to_need() -> None:
    callback, watch = SparseUpdate(0.5), Watch()
    fit(callback)
    fit(watch)
    assert callback.memory["dense"] == watch.saved[0] + watch.gradients + watch.state


def test_untouched_tensors_are_bitwise_equal_and_train_again_afterwards() -> None:
    callback = SparseUpdate(0.4, name="x")
    trainer, module = fit(callback)
    trained = set(callback._trained)
    assert changed(module) == trained
    assert 0 < len(trained) < len(list(module.parameters()))
    assert all(parameter.requires_grad for parameter in module.parameters())
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    assert {names[id(parameter)] for parameter in trainer.optimizers[0].state} == trained
    assert changed(fit()[1]) == set(names.values())  # without it, everything changes


def test_the_look_at_a_batch_leaves_no_trace() -> None:
    callback = SparseUpdate(0.4)
    _, module = fit(callback)
    trainer, other = fit(SparseUpdate(layers=callback._trained))
    assert_identical(dict(module.state_dict()), dict(other.state_dict()))
    assert "train_acc" in trainer.callback_metrics


def test_a_frozen_batchnorm_follows_the_data_unless_the_module_keeps_it() -> None:
    _, module = fit(SparseUpdate(layers=["head"]))
    fresh = Net()
    assert torch.equal(module.backbone[1].weight, fresh.backbone[1].weight)
    assert not torch.equal(module.backbone[1].running_mean, fresh.backbone[1].running_mean)
    kept = Net()
    kept.backbone.eval()
    with pytest.warns(UserWarning, match="in eval mode"):
        fit(SparseUpdate(0.4), module=kept)
    assert torch.equal(kept.backbone[1].running_mean, fresh.backbone[1].running_mean)


def test_a_budget_is_finite() -> None:
    with pytest.raises(ValueError, match="budget must be finite; got inf"):
        SparseUpdate(float("inf"))


def test_the_budget_may_be_bytes_and_below_the_smallest_layer_it_says_what_is_needed() -> None:
    with pytest.raises(ValueError, match=r"of 100 bytes is below what the smallest layer needs: '(.*)' needs") as error:
        fit(SparseUpdate(100))
    needed = int(str(error.value).split("Set budget=")[1].split()[0])
    callback = SparseUpdate(needed)
    fit(callback)
    assert callback.memory["needed"] <= needed
    with pytest.raises(ValueError, match="below what the smallest layer needs"):
        fit(SparseUpdate(needed - 1))


def test_listed_layers_train_and_must_fit_into_a_budget() -> None:
    _, module = fit(SparseUpdate(layers=["head", "backbone.7.bias"]))
    assert changed(module) == {"head.weight", "head.bias", "backbone.7.bias"}
    _, module = fit(SparseUpdate(0.5, layers=["head"], exclude=["head.bias"]))
    assert changed(module) == {"head.weight"}
    with pytest.raises(ValueError, match=r"the listed layers need .* set budget=\d+ or more"):
        fit(SparseUpdate(200, layers=["head"]))
    with pytest.raises(ValueError, match="Did you mean 'head'"):
        fit(SparseUpdate(layers=["haed"]))
    with pytest.raises(ValueError, match="found no parameter to train"):
        fit(SparseUpdate(layers=["head"], exclude=["*"]))


def test_a_resumed_run_trains_the_same_without_another_look(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    saving = ModelCheckpoint(tmp_path, save_last=True, every_n_epochs=1)
    callback = SparseUpdate(0.4)
    fit(callback, saving, max_epochs=1, enable_checkpointing=True)

    def refuse(*args: Any) -> Any:
        raise AssertionError("measured again")

    monkeypatch.setattr(sparse_update, "first_step", refuse)
    again, arguments = (
        SparseUpdate(0.4),
        {"ckpt": saving.last_model_path, "max_epochs": 3, "enable_checkpointing": True},
    )
    _, module = fit(again, saving, **arguments)
    assert (again._trained, again.memory) == (callback._trained, callback.memory)
    assert changed(module) == set(callback._trained)
    with pytest.raises(AssertionError, match="measured again"):
        fit(SparseUpdate(0.4))
    with pytest.raises(ValueError, match="budget"):
        fit(SparseUpdate(0.3), saving, **arguments)


class Filtered(Net):
    """Gives its optimizer what requires a gradient, as finetuning callbacks ask for."""

    def configure_optimizers(self) -> Any:
        return self.optimizer([p for p in self.parameters() if p.requires_grad], lr=0.01)


def _train_on_rank() -> tuple[list[str], dict[str, Tensor]]:
    callback = SparseUpdate(0.4)
    _, module = fit(callback, strategy="ddp", devices=2, max_epochs=1)
    return callback._trained, {name: value.clone() for name, value in module.state_dict().items()}


def test_all_ranks_train_the_same_and_ddp_waits_for_no_frozen_parameter() -> None:
    (first, weights), (second, others) = on_ranks(2, _train_on_rank)
    assert first == second
    assert first
    parameters = dict(Net().named_parameters())
    assert all(torch.equal(weights[name], others[name]) for name in parameters)
    assert {name for name in parameters if not torch.equal(weights[name], parameters[name])} == set(first)


def test_a_finetuning_callback_freezes_first_and_its_layers_do_not_count() -> None:
    callback = SparseUpdate(1.0, exclude=["head.bias"])
    norms = {f"backbone.{place}.{name}" for place in (1, 4) for name in ("weight", "bias")}  # which it lets train
    _, module = fit(callback, BackboneFinetuning(unfreeze_backbone_at_epoch=5), module=Filtered())
    assert changed(module) == {"head.weight", *norms}
    assert callback.memory["gradient"] == 4 * sum(
        p.numel() for n, p in module.named_parameters() if n in changed(module)
    )
    later = SparseUpdate(layers=["head.weight"])
    _, module = fit(later, BackboneFinetuning(unfreeze_backbone_at_epoch=1), module=Filtered(), max_epochs=3)
    assert "backbone.0.weight" in changed(module)  # unfrozen later, on top of the choice
    assert "head.bias" not in changed(module)


def test_optimizers_that_make_their_state_at_once_hold_none_for_frozen_parameters() -> None:
    callback = SparseUpdate(0.4, state=1.0)
    trainer, module = fit(callback, module=Net(torch.optim.Adagrad))
    assert len(trainer.optimizers[0].state) == len(callback._trained)
    assert changed(module) == set(callback._trained)


def test_more_state_than_declared_warns() -> None:
    with pytest.warns(UserWarning, match=r"the budget\. Set state=2\.0"):
        fit(SparseUpdate(0.9, state=1.0))


def test_a_data_set_of_whole_batches_works_too() -> None:
    batches: Any = list(data())
    callback, watch = SparseUpdate(0.4), Watch()
    fit(callback, watch, loader=DataLoader(batches, batch_size=None))
    assert set(watch.saved) == {callback.memory["saved"]}


def test_what_it_logs() -> None:
    callback = SparseUpdate(0.4)
    trainer, module = fit(callback)
    found = {key.removeprefix("fine_tuning/"): float(v) for key, v in trainer.callback_metrics.items()}
    assert found["needed_bytes"] == callback.memory["needed"]
    assert found["dense_bytes"] == callback.memory["dense"]
    trained = sum(p.numel() for name, p in module.named_parameters() if name in callback._trained)
    assert found["trained_share"] == pytest.approx(trained / sum(p.numel() for p in module.parameters()))


def test_what_it_refuses() -> None:
    with pytest.raises(ValueError, match="would both choose what trains"):
        fit(SparseUpdate(0.5), LoRA(rank=2))
    with pytest.raises(ValueError, match="manual optimization"):
        fit(SparseUpdate(0.5), module=Net(manual=True))
    _, module = fit(SparseUpdate(layers=["head"]), module=Net(manual=True))
    assert changed(module) == {"head.weight", "head.bias"}

    class Endless(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(data().dataset)  # type: ignore[call-overload]

    with pytest.raises(TypeError, match="has none"):
        fit(SparseUpdate(0.5), loader=DataLoader(Endless(), BATCH))

    class HeadOnly(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.head.parameters(), lr=0.1)

    with pytest.raises(ValueError, match=r"chose backbone.* but no optimizer of configure_optimizers holds it"):
        fit(SparseUpdate(0.9), module=HeadOnly())

    class Later(Net):
        def on_fit_start(self) -> None:
            self.weight = 1.0

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.weight * super().training_step(batch, batch_idx)

    with pytest.raises(AttributeError) as error:
        fit(SparseUpdate(0.9), module=Later())
    assert "before the optimizers exist" in "".join(error.value.__notes__)
    fit(SparseUpdate(layers=["head"]), module=Later())
