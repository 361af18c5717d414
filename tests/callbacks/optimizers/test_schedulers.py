"""Every scheduler follows the new optimizer: bitwise as in a module that returns it itself, fresh and resumed."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import pytest
from torch.optim import AdamW, Optimizer
from torch.optim import lr_scheduler as kinds
from torch.optim.swa_utils import SWALR

from lightning_grad.callbacks import OptimizerSwap
from tests.callbacks.optimizers.swapped import BATCHES, EPOCHS, Nets, train, weights

po = pytest.importorskip("pytorch_optimizer")
STEPS = BATCHES * EPOCHS
SAVED = (6, 8)  # in the middle of an epoch, and at its end


class Timm:
    """A scheduler with the structure of timm's: it derives from nothing, and steps by the number of the update."""

    def __init__(self, optimizer: Optimizer, steps: int) -> None:
        self.optimizer, self.steps = optimizer, steps
        self.base_values = [group.setdefault("initial_lr", group["lr"]) for group in optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "optimizer"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    def step(self, epoch: int) -> None:
        """Do nothing: it counts updates, not epochs."""

    def step_update(self, number: int) -> None:
        for group, base in zip(self.optimizer.param_groups, self.base_values, strict=True):
            group["lr"] = base * (1 - number / self.steps) * group.get("lr_scale", 1.0)


class Warmup(kinds.LRScheduler):
    """A scheduler that steps another one after a warm-up, and keeps it under a name of its own."""

    def __init__(self, optimizer: Optimizer, steps: int, after: kinds.LRScheduler) -> None:
        self.steps, self.after_scheduler, self.parts = steps, after, {"others": [after]}
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        return [base * min(1.0, self.last_epoch / self.steps) for base in self.base_lrs]

    def step(self, epoch: int | None = None) -> None:
        if getattr(self, "last_epoch", -1) >= self.steps:
            self.after_scheduler.step()
        else:
            super().step()

    def state_dict(self) -> dict[str, Any]:
        return {"last_epoch": self.last_epoch, "after": self.after_scheduler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.last_epoch = state["last_epoch"]
        self.after_scheduler.load_state_dict(state["after"])


SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": lambda o: kinds.LambdaLR(o, [lambda step: 0.95**step, lambda step: 0.9**step]),
    "MultiplicativeLR": lambda o: kinds.MultiplicativeLR(o, lambda _: 0.95),
    "StepLR": lambda o: kinds.StepLR(o, 3, 0.5),
    "MultiStepLR": lambda o: kinds.MultiStepLR(o, [2, 5], 0.5),
    "ConstantLR": lambda o: kinds.ConstantLR(o, 0.3, 4),
    "LinearLR": lambda o: kinds.LinearLR(o, 0.1, 1.0, 5),
    "ExponentialLR": lambda o: kinds.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: kinds.PolynomialLR(o, STEPS, 2.0),
    "CosineAnnealingLR": lambda o: kinds.CosineAnnealingLR(o, STEPS),
    "CosineAnnealingWarmRestarts": lambda o: kinds.CosineAnnealingWarmRestarts(o, 4),
    "SequentialLR": lambda o: kinds.SequentialLR(
        o, [kinds.LinearLR(o, 0.1, 1.0, 3), kinds.CosineAnnealingLR(o, 9)], [3]
    ),
    "ChainedScheduler": lambda o: kinds.ChainedScheduler([kinds.ConstantLR(o, 0.5, 3), kinds.ExponentialLR(o, 0.9)]),
    "CyclicLR": lambda o: kinds.CyclicLR(o, 1e-4, 1e-3, 3, cycle_momentum=True),
    "OneCycleLR": lambda o: kinds.OneCycleLR(o, [1e-3, 2e-3], total_steps=STEPS + 2),
    "SWALR": lambda o: SWALR(o, [5e-5, 1e-4], 4),
    "ReduceLROnPlateau": lambda o: kinds.ReduceLROnPlateau(o, mode="max", factor=0.5, patience=0),
    "nested": lambda o: Warmup(o, 3, kinds.SequentialLR(o, [kinds.ExponentialLR(o, 0.9), kinds.StepLR(o, 2)], [2])),
    "as in timm": lambda o: Timm(o, STEPS + 2),
    "timm": lambda o: _timm().CosineLRScheduler(o, STEPS, warmup_t=3, warmup_lr_init=1e-5, t_in_epochs=False),
    "transformers": lambda o: importlib.import_module("transformers").get_cosine_schedule_with_warmup(o, 3, STEPS),
}


def _timm() -> Any:
    return importlib.import_module("timm.scheduler")  # timm imports torchvision


def _is_there(name: str) -> bool:
    try:
        importlib.import_module("timm.scheduler" if name == "timm" else "transformers.optimization")
    except ImportError:
        return False
    return True


THERE = {name: make for name, make in SCHEDULERS.items() if name not in ("timm", "transformers") or _is_there(name)}


class Naive(pl.Callback):
    """What one would write first: a new optimizer over the same groups, which no scheduler knows."""

    def on_fit_start(self, trainer: Any, *_: Any) -> None:
        keys = ("params", "lr", "initial_lr", "weight_decay", "name")
        trainer.strategy.optimizers = [
            po.Lion([{key: group[key] for key in keys if key in group} for group in old.param_groups])
            for old in trainer.optimizers
        ]


class Bound(pl.Callback):
    """Records whether each scheduler holds the optimizer of the trainer."""

    def on_train_end(self, trainer: Any, *_: Any) -> None:
        pairs = zip(trainer.lr_scheduler_configs, trainer.optimizers, strict=True)
        self.of = [config.scheduler.optimizer is optimizer for config, optimizer in pairs]


class Trained(NamedTuple):
    weights: dict[str, Any]
    rates: list[list[list[Any]]]
    trainer: Any
    bound: list[bool]

    def of(self, name: str, from_batch: int = 0) -> list[Any]:
        """Return weights and rates of one net, bitwise."""
        index = list(THERE).index(name)
        values = [self.weights[f"nets.{name}.{part}"].tolist() for part in ("weight", "bias")]
        return [values, [rates[index] for rates in self.rates[from_batch:]]]


class Runs(NamedTuple):
    native: Trained
    swapped: Trained
    resumed: dict[int, Trained]
    naive: Trained
    warned: list[str]


def _trained(optimizer: Any, callbacks: list[Any], **arguments: Any) -> Trained:
    module, bound = Nets(optimizer, THERE), Bound()
    trainer, rates = train(module, [*callbacks, bound], **arguments)
    return Trained(weights(module), rates, trainer, bound.of)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Five fits for all schedulers, each with an optimizer and a net of its own."""
    folder: Path = tmp_path_factory.mktemp("swapped")
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        swapped = _trained(AdamW, [OptimizerSwap("lion")], save=(folder, SAVED))
        resumed = {at: _trained(AdamW, [OptimizerSwap("lion")], ckpt=folder / f"{at}.ckpt") for at in SAVED}
    words = [str(each.message) for each in warned if "scheduler" in str(each.message)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        naive = _trained(AdamW, [Naive()])
    return Runs(_trained(po.Lion, []), swapped, resumed, naive, words)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_it_follows_the_new_optimizer(name: str, runs: Runs) -> None:
    if name not in THERE:
        pytest.skip(f"{name} is not installed, or lacks torchvision")
    index = list(THERE).index(name)
    rates = {tuple(step[index][:1]) for step in runs.native.rates}
    assert len(rates) > 1, "the scheduler changes no rate, so nothing is compared"
    assert runs.swapped.of(name) == runs.native.of(name)
    for batch, resumed in runs.resumed.items():
        assert resumed.of(name) == runs.native.of(name, from_batch=batch)
    assert runs.naive.of(name) != runs.native.of(name), "the naive swap passes this test"
    assert runs.swapped.bound[index]


def test_a_factor_scales_the_whole_schedule(runs: Runs, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    known = {name: make for name, make in THERE.items() if name not in ("as in timm", "timm")}
    _, rates = train(Nets(AdamW, known), [OptimizerSwap("lion", lr_factor=0.5)])
    for index, name in enumerate(known):
        whole = [step[list(THERE).index(name)] for step in runs.native.rates]
        assert [(step[index][0], step[index][4]) for step in rates] == [(s[0] * 0.5, s[4] * 0.5) for s in whole], name
    assert "multiplies the base rates of Warmup. Schedulers outside torch" in caplog.text


def test_a_factor_needs_a_scheduler_that_it_can_scale() -> None:
    with pytest.raises(ValueError, match=r"cannot multiply the rates of Timm.*lr_factor=1\.0"):
        train(Nets(AdamW, {"timm": SCHEDULERS["as in timm"]}), [OptimizerSwap("lion", lr_factor=0.5)])


def test_no_scheduler_warns_of_its_optimizer(runs: Runs) -> None:
    assert not runs.warned


def test_groups_keep_names_and_decays(runs: Runs) -> None:
    for optimizer in runs.swapped.trainer.optimizers:
        assert type(optimizer) is po.Lion
        assert [(group["name"], group["weight_decay"]) for group in optimizer.param_groups] == [
            ("weight", 0.1),
            ("bias", 0.0),
        ]
        assert "eps" not in optimizer.param_groups[0], "an option of AdamW"
