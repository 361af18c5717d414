"""LayerwiseLearningRateDecay against groups made by hand, with every scheduler; the order of layers; refusals."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning, LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam, AdamW, Optimizer
from torch.optim import lr_scheduler as kinds
from torch.optim.swa_utils import SWALR

from lightning_grad.callbacks import LayerwiseLearningRateDecay, NormClipping, OptimizerSwap, ZerothOrder
from lightning_grad.testing import ResumableLoader, assert_identical, make_trainer, on_ranks
from lightning_grad.utilities import optimizer_report
from tests.callbacks.optimizers.swapped import BATCHES, Rates, SaveAt, equal, searched, step, weights
from tests.callbacks.optimizers.test_schedulers import SAVED, STEPS, THERE

DECAY = 0.5  # a power of two, so products round alike in whatever order a scheduler makes them
Spread = Callable[..., list[Any]]

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
]


def of_the_user(values: Sequence[Any], rates: bool = True) -> list[Any]:
    """Return a value for each group: the weights and the biases."""
    return list(values)


def by_hand(values: Sequence[Any], rates: bool = True) -> list[Any]:
    """Return a value for each group: the weight of the first layer, of the last, and the biases of both."""
    return [value * factor if rates else value for value in values for factor in (DECAY, 1.0)]


# Schedulers that take a value for each group; the others serve any number of groups.
LISTS: dict[str, Callable[[Optimizer, Spread], Any]] = {
    "LambdaLR": lambda o, s: kinds.LambdaLR(o, s([lambda n: 0.95**n, lambda n: 0.9**n], rates=False)),
    "CyclicLR": lambda o, s: kinds.CyclicLR(o, s([1e-4, 2e-4]), s([1e-3, 2e-3]), 3, cycle_momentum=True),
    "OneCycleLR": lambda o, s: kinds.OneCycleLR(o, s([1e-3, 2e-3]), total_steps=STEPS + 2),
    "SWALR": lambda o, s: SWALR(o, s([5e-5, 1e-4]), 4),
}
MAKERS = {name: LISTS.get(name, lambda o, s, make=make: make(o)) for name, make in THERE.items() if name != "timm"}


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))


def groups_of(layers: nn.Sequential, spread: Spread) -> list[dict[str, Any]]:
    first, last = layers[0], layers[2]
    rates, decays = spread([1e-3, 2e-3]), spread([0.1, 0.0], rates=False)
    held = [[first.weight], [last.weight], [first.bias], [last.bias]]
    if spread is of_the_user:
        held = [held[0] + held[1], held[2] + held[3]]
    return [
        {"params": params, "lr": lr, "weight_decay": decay}
        for params, lr, decay in zip(held, rates, decays, strict=True)
    ]


class Nets(pl.LightningModule):
    """A small net, an optimizer and a scheduler for each maker; all see the same data."""

    def __init__(self, spread: Spread, makers: Any = MAKERS, kind: Any = AdamW) -> None:
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(3)
        self.nets = nn.ModuleDict({name: net() for name in makers})
        self.spread, self.makers, self.kind = spread, makers, kind

    def configure_optimizers(self) -> Any:
        optimizers = [self.kind(groups_of(each, self.spread)) for each in self.nets.values()]
        return optimizers, [make(o, self.spread) for make, o in zip(self.makers.values(), optimizers, strict=True)]

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizers, schedulers = self.optimizers(), self.lr_schedulers()
        if len(self.nets) == 1:
            optimizers, schedulers = [optimizers], [schedulers]
        for each, optimizer, scheduler in zip(self.nets.values(), optimizers, schedulers, strict=True):
            optimizer.zero_grad()
            loss = (each(batch) - batch.sum(1, keepdim=True)).square().mean()
            self.manual_backward(loss)
            optimizer.step()
            step(scheduler, loss.detach(), self.trainer.fit_loop.total_batch_idx + 1)


class Net(pl.LightningModule):
    """One net under automatic optimization."""

    def __init__(self, spread: Spread = of_the_user, kind: Any = AdamW, scheduler: Any = LISTS["OneCycleLR"]) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net, self.spread, self.kind, self.scheduler = net(), spread, kind, scheduler

    def configure_optimizers(self) -> Any:
        optimizer = self.kind(groups_of(self.net, self.spread))
        scheduler = self.scheduler(optimizer, self.spread)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = (self.net(batch) - batch.sum(1, keepdim=True)).square().mean()
        self.log("loss", loss)
        return loss


def train(module: pl.LightningModule, callbacks: Sequence[Any] = (), ckpt: Any = None, **arguments: Any) -> Any:
    data = torch.randn(8 * BATCHES, 4, generator=torch.Generator().manual_seed(0))
    trainer = make_trainer(callbacks=list(callbacks), **{"max_epochs": 3, **arguments})
    trainer.fit(module, ResumableLoader(data, 8), ckpt_path=ckpt, weights_only=None if ckpt is None else True)
    return trainer


def decayed(module: pl.LightningModule, *others: Any, decay: float = DECAY, **arguments: Any) -> Any:
    return train(module, [LayerwiseLearningRateDecay(decay), *others], **arguments)


# With groups made by hand.


class Runs(NamedTuple):
    native: Nets
    decayed: Nets
    resumed: list[Nets]
    rates: tuple[list[Any], list[Any]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder, with_hand, without = tmp_path_factory.mktemp("decayed"), Rates(), Rates()
    native, ours, resumed = Nets(by_hand), Nets(of_the_user), [Nets(of_the_user) for _ in SAVED]
    train(native, [with_hand])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*LeafSpec.*|.*checkpoint.*|.*resuming.*")
        decayed(ours, without, SaveAt(folder, SAVED))
        for at, each in zip(SAVED, resumed, strict=True):
            decayed(each, ckpt=folder / f"{at}.ckpt")
    return Runs(native, ours, resumed, (with_hand.of, without.of))


@pytest.mark.parametrize("name", MAKERS)
def test_it_is_groups_made_by_hand_with_every_scheduler(name: str, runs: Runs) -> None:
    index = list(MAKERS).index(name)
    by_us = [rates[index] for rates in runs.rates[1]]
    assert len({tuple(rates[:1]) for rates in by_us}) > 1, "the scheduler changes no rate, so nothing is compared"
    of_last = [rates[index][4:8] + rates[index][12:] for rates in runs.rates[0]]
    assert by_us == of_last  # rates, betas, momenta and decays of both groups
    for each in (runs.decayed, *runs.resumed):
        assert equal(each.nets[name], runs.native.nets[name])


class SplitsGroups(pl.Callback):
    """What one would write first: a group for each layer, once the optimizer is there."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        (optimizer,) = trainer.optimizers
        optimizer.param_groups[:] = [
            {**group, "params": [parameter], "lr": group["lr"] * factor}
            for group in optimizer.param_groups
            for parameter, factor in zip(group["params"], (DECAY, 1.0), strict=True)
        ]


@pytest.mark.parametrize("name", ["LambdaLR", "OneCycleLR", "SWALR", "nested"])
def test_groups_that_are_split_under_a_scheduler_are_not(name: str, runs: Runs) -> None:
    module = Nets(of_the_user, {name: MAKERS[name]})
    module.nets[name].load_state_dict(Nets(of_the_user).nets[name].state_dict())
    with suppress(ValueError, IndexError):
        train(module, [SplitsGroups()])
    assert not equal(module.nets[name], runs.native.nets[name])


SCALED: dict[str, Any] = {"plugins": lambda: [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", 2.0**10))]}


@pytest.mark.parametrize("kind", [AdamW, Adam, lambda groups: SGD(groups, momentum=0.9), torch.optim.Adafactor])
@pytest.mark.parametrize("way", ["plain", "fp16", "accumulation"])
def test_it_is_groups_made_by_hand_under_automatic_optimization(kind: Any, way: str) -> None:
    if way == "fp16" and kind is torch.optim.Adafactor:
        pytest.skip("its rule is the same under a GradScaler")
    more: dict[str, Any] = {"plain": {}, "fp16": {}, "accumulation": {"accumulate_grad_batches": 3}}[way]

    def plugins() -> dict[str, Any]:
        return {"plugins": SCALED["plugins"]()} if way == "fp16" else {}

    def scheduler(optimizer: Any, spread: Spread) -> Any:
        return kinds.OneCycleLR(optimizer, spread([1e-3, 2e-3]), total_steps=STEPS + 2, cycle_momentum=False)

    native, ours, none = (Net(spread, kind, scheduler) for spread in (by_hand, of_the_user, of_the_user))
    train(native, **more, **plugins())
    decayed(ours, **more, **plugins())
    decayed(none, decay=1.0, **more, **plugins())
    assert equal(ours, native)
    assert not equal(none, native)


def _on_this_rank(folder: Path) -> tuple[bool, dict[str, Any]]:
    native, ours, resumed = Net(by_hand), Net(), Net()
    arguments: dict[str, Any] = {"strategy": "ddp", "devices": 2, "max_epochs": 2}
    train(native, **arguments)
    decayed(ours, SaveAt(folder, [2]), **arguments)
    decayed(resumed, ckpt=folder / "2.ckpt", **arguments)
    return equal(native, ours) and equal(native, resumed), weights(ours)


def test_two_ranks(tmp_path: Path) -> None:
    first, second = on_ranks(2, _on_this_rank, tmp_path)
    assert first[0]
    assert second[0]
    assert all(torch.equal(first[1][name], value) for name, value in second[1].items())


# What others see.


def test_monitors_reports_and_checkpoints(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    arguments = {"logger": logger, "log_every_n_steps": 1, "barebones": False}
    module, path = Net(), tmp_path / "last.ckpt"
    callback = LayerwiseLearningRateDecay(DECAY)
    trainer = train(module, [LearningRateMonitor("step"), callback], **arguments)
    rows = list(csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines()))

    def column(key: str) -> list[float]:
        return [float(row[key]) for row in rows if row.get(key)]

    assert column("lr-AdamW/pg1") == pytest.approx(column("layer_rate/net.2"))
    assert column("layer_rate/net.0") == pytest.approx([rate * DECAY for rate in column("layer_rate/net.2")])
    assert len(set(column("layer_rate/net.0"))) == STEPS
    report = optimizer_report(trainer)
    (optimizer,) = trainer.optimizers
    base = [group["lr"] for group in optimizer.param_groups]
    assert [(row.group, row.parameters, row.lr) for row in report.rows] == [
        ("0", ("net.0.weight",), base[0] * DECAY),
        ("0", ("net.2.weight",), base[0]),
        ("1", ("net.0.bias",), base[1] * DECAY),
        ("1", ("net.2.bias",), base[1]),
    ]
    trainer.save_checkpoint(path)
    saved = torch.load(path, weights_only=True)["optimizer_states"][0]
    plain = Net()
    own = train(plain).optimizers[0]
    assert [len(group["params"]) for group in saved["param_groups"]] == [2, 2]
    own.load_state_dict(saved)  # the state of the module's own optimizer


def test_it_says_what_got_which_factor(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        decayed(Net(), max_epochs=2)
    said = [record.message for record in caplog.records if "LayerwiseLearningRateDecay" in record.message]
    said = said or [line for line in capsys.readouterr().err.splitlines() if "LayerwiseLearningRateDecay" in line]
    assert sum("by layer: net.0 0.5, net.2 1." in words for words in said) == 1


# Layers and their order.


class Odd(pl.LightningModule):
    """Layers that are called in another order than they are registered; one that is not called; a tied weight."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.head, self.spare, self.body, self.embed = (
            nn.Linear(4, 4),
            nn.Linear(2, 2),
            nn.Linear(4, 4),
            nn.Linear(4, 4),
        )
        if tied:
            self.head.weight = self.embed.weight

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.head(self.body(self.embed(batch)).tanh()) * self.scale).square().mean()

    def configure_optimizers(self) -> Any:
        return SGD(self.parameters(), lr=0.1)


def factors(module: pl.LightningModule, *others: Any, **settings: Any) -> dict[str, float]:
    callback = LayerwiseLearningRateDecay(**{"decay": DECAY, **settings})
    train(module, [callback, *others], max_epochs=1)
    return dict(callback.rate_factors(0))


def test_layers_count_in_the_order_of_calls() -> None:
    found = factors(Odd())
    assert {name: found[name] for name in ("scale", "embed.weight", "body.weight", "head.weight")} == {
        "scale": 0.125,
        "embed.weight": 0.25,
        "body.weight": 0.5,
        "head.weight": 1.0,
    }
    assert found["spare.weight"] == found["head.weight"]  # registered before it
    assert all(found[f"{name}.bias"] == found[f"{name}.weight"] for name in ("embed", "body", "head", "spare"))


def test_a_norm_does_not_place_the_layer_that_it_is_registered_after() -> None:
    class NormFirst(Odd):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(4)
            for name in ("spare", "body", "embed"):
                self._modules[name] = self._modules.pop(name)  # so the norm is registered after the head

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return super().training_step(self.norm(batch), batch_idx)

    found = factors(NormFirst())
    del found["norm.weight"], found["norm.bias"]
    assert found == factors(Odd())


def test_a_tied_weight_has_one_factor() -> None:
    found = factors(Odd(tied=True))
    assert found["head.weight"] == 0.25  # under its first name, with the factor of the layer that uses it first
    assert (found["embed.bias"], found["head.bias"]) == (0.25, 1.0)


def test_patterns_group_layers() -> None:
    found = factors(Odd(), layers=["e*", "b*"])
    assert (found["embed.weight"], found["body.weight"]) == (0.25, 0.5)
    module = Net()
    module.net = nn.Sequential(*(nn.Sequential(*net()[:2], nn.Linear(3, 4)) for _ in range(3)))
    module.configure_optimizers = lambda: SGD(module.parameters(), lr=0.1)  # type: ignore[method-assign]
    assert sorted(set(factors(module, layers=["net.*"]).values())) == [0.25, 0.5, 1.0]
    assert sorted(set(factors(module, layers=["net.*.*"]).values())) == [DECAY**depth for depth in (5, 4, 3, 2, 1, 0)]


def test_order_of_calls_is_kept_in_checkpoints(tmp_path: Path) -> None:
    callback = LayerwiseLearningRateDecay(DECAY)
    train(Odd(), [callback, SaveAt(tmp_path, [2])], max_epochs=1)

    class Turned(Odd):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.embed(self.body(self.head(batch))).square().mean()

    again = LayerwiseLearningRateDecay(DECAY)
    train(Turned(), [again], ckpt=tmp_path / "2.ckpt", max_epochs=1)
    assert again.rate_factors(0) == callback.rate_factors(0)


def test_other_patterns_on_resume_count_again(tmp_path: Path) -> None:
    train(Odd(), [LayerwiseLearningRateDecay(DECAY), SaveAt(tmp_path, [2])], max_epochs=1)
    again = LayerwiseLearningRateDecay(DECAY, layers=["e*", "[bh]*"])
    train(Odd(), [again], ckpt=tmp_path / "2.ckpt", max_epochs=1)
    assert again.rate_factors(0) == factors(Odd(), layers=["e*", "[bh]*"])


def test_a_search_for_a_learning_rate_changes_nothing(tmp_path: Path) -> None:
    found = [searched(LayerwiseLearningRateDecay(DECAY), tmp_path / str(i), searches=bool(i)) for i in range(2)]
    assert_identical(found[1], found[0], "after a search")
    assert found[0][-1]["orders"]


def test_parameters_that_are_added_later_get_their_factors() -> None:
    class Late(Odd):
        def configure_optimizers(self) -> Any:
            return SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

    class Unfreezes(BaseFinetuning):
        def freeze_before_training(self, pl_module: Any) -> None:
            self.freeze([pl_module.embed, pl_module.body])

        def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
            if epoch == 1:
                self.unfreeze_and_add_param_group([pl_module.embed, pl_module.body], optimizer, lr=0.1)

    callback = LayerwiseLearningRateDecay(DECAY)
    module = Late()
    train(module, [callback, Unfreezes()], max_epochs=1)
    assert callback.rate_factors(0)["scale"] == 0.5  # two layers
    module = Late()
    train(module, [callback, Unfreezes()], max_epochs=2)
    assert callback.rate_factors(0) == factors(Odd())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_layers_count_as_they_are_registered() -> None:
    module = Odd()
    module.body = torch.compile(module.body, backend="eager")  # type: ignore[assignment]
    assert factors(module)["head.weight"] == 0.125  # the last one is the embedding


def test_one_layer_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    class One(Odd):
        def configure_optimizers(self) -> Any:
            return SGD(self.body.parameters(), lr=0.1)

    assert set(factors(One()).values()) == {1.0}


# With other techniques.


def moved(module: pl.LightningModule, callbacks: Sequence[Any]) -> dict[str, float]:
    before = weights(module)
    train(module, callbacks, max_epochs=1, limit_train_batches=1)
    return {name: (value - before[name]).norm().item() for name, value in weights(module).items()}


@pytest.mark.parametrize(
    "other",
    [
        lambda: OptimizerSwap("sgd"),
        lambda: OptimizerSwap("muon", lr_factor=1.0, include=["body", "embed"]),
        lambda: NormClipping(0.01),
        lambda: ZerothOrder(),
    ],
    ids=["swap", "parts", "clipping", "zeroth order"],
)
@pytest.mark.parametrize("first", [True, False])
def test_first_steps_have_the_ratio_of_the_factors(other: Any, first: bool) -> None:
    decay = LayerwiseLearningRateDecay(DECAY)
    torch.manual_seed(0)
    module = Odd()
    start = {key: value.clone() for key, value in module.state_dict().items()}
    with_decay = moved(module, [decay, other()] if first else [other(), decay])
    module.load_state_dict(start)
    without = moved(module, [other()])
    for name, factor in decay.rate_factors(0).items():
        assert with_decay[name] == pytest.approx(factor * without[name], rel=1e-3, abs=1e-8)
    assert without["body.weight"] > 1e-5


def test_a_report_shows_the_rates_of_parts() -> None:
    swap = OptimizerSwap("muon", lr_factor=10.0, include=["body", "embed"])
    rows = optimizer_report(train(Odd(), [swap, LayerwiseLearningRateDecay(DECAY)], max_epochs=1)).rows
    rates = {name: row.lr for row in rows for name in row.parameters}
    assert rates["embed.weight"] == pytest.approx(0.25)  # 0.1 * 10 * 0.25
    assert rates["body.weight"] == pytest.approx(0.5)
    assert (rates["embed.bias"], rates["head.weight"]) == (pytest.approx(0.025), pytest.approx(0.1))


# Refusals.


class Wraps(SGD):
    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)
        self.inner = SGD(self.param_groups, **options)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (LBFGS, "gives each layer its own rate, and LBFGS moves all parameters along one line. Train with a plain"),
        (Wraps, "Wraps moves parameters by another optimizer inside it"),
    ],
)
def test_optimizers_that_have_one_rate_raise(kind: Any, words: str) -> None:
    module = Odd()
    module.configure_optimizers = lambda: kind(module.parameters(), lr=0.1)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=words):
        decayed(module)
    decayed(module, decay=1.0)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("schedulefree-adamw", "AdamWScheduleFree averages weights with its largest rate"),
        ("frugal", "Frugal chooses its block among all matrices of a group"),
    ],
)
def test_optimizers_of_a_swap_that_have_one_rate_raise(name: str, words: str) -> None:
    if name == "schedulefree-adamw":
        pytest.importorskip("schedulefree")
    include = ["body", "embed"] if name == "frugal" else None
    with pytest.raises(ValueError, match=words):
        decayed(Odd(), OptimizerSwap(name, lr_factor=1.0, include=include))


def test_two_instances_and_unknown_layers_raise() -> None:
    with pytest.raises(ValueError, match="Use only one LayerwiseLearningRateDecay per Trainer"):
        decayed(Odd(), LayerwiseLearningRateDecay(name="other"))
    with pytest.raises(ValueError, match=r"LayerwiseLearningRateDecay\(layers=...\): .* Did you mean 'body'"):
        train(Odd(), [LayerwiseLearningRateDecay(layers=["bodi"])])
