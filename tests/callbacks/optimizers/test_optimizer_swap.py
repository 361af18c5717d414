"""OptimizerSwap: what the new optimizer takes over, who sees it, and what is refused."""

from __future__ import annotations

import copy
import functools
import pickle
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning, EMAWeightAveraging, LearningRateMonitor
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR, ReduceLROnPlateau, StepLR

from lightning_grad.callbacks import NormClipping, OptimizerSwap
from lightning_grad.callbacks.optimizers._names import NAMES, find_class
from lightning_grad.cli.check.outcome import outcome_of
from lightning_grad.testing import on_ranks
from tests.callbacks.optimizers.swapped import BATCHES, Net, Nets, equal, train, weights
from tests.cases import cases

po = pytest.importorskip("pytorch_optimizer")
Lion = po.Lion


def fp16() -> dict[str, Any]:
    return {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))]}


# The same as a module that returns the new optimizer itself.


@cases(
    ("scheduler", "arguments"),
    [
        (None, dict),
        (lambda o: ReduceLROnPlateau(o, mode="max", factor=0.5, patience=0), dict),
        (lambda o: OneCycleLR(o, 1e-3, total_steps=20), lambda: {"accumulate_grad_batches": 3}),
        (lambda o: StepLR(o, 2), fp16),
    ],
)
def test_it_equals_a_module_with_the_new_optimizer(
    scheduler: Callable[[Any], Any] | None, arguments: Callable[[], dict[str, Any]]
) -> None:
    native, swapped = Net(Lion, scheduler), Net(AdamW, scheduler)
    given = train(native, **arguments())[1]
    assert train(swapped, [OptimizerSwap("lion")], **arguments())[1] == given
    assert equal(native, swapped)


@pytest.mark.parametrize("fused", [False, True])
def test_nothing_of_the_old_class_is_left(fused: bool) -> None:
    native, swapped = Net(Lion), Net(AdamW, fused=fused, betas=(0.5, 0.6), eps=1.0)
    train(native, **fp16())
    trainer = train(swapped, [OptimizerSwap("lion")], **fp16())[0]
    assert equal(native, swapped)
    assert vars(trainer.optimizers[0]).keys() - {"step", "_opt_called"} == vars(native.mine).keys()


def test_factors_multiply_rates_and_decays() -> None:
    native = Net(
        lambda groups, lr: Lion(
            [{**g, "lr": g.get("lr", lr) / 4, "weight_decay": g["weight_decay"] * 8} for g in groups]
        )
    )
    swapped = Net()
    trainer, _ = train(swapped, [OptimizerSwap("lion", lr_factor=0.25, wd_factor=8.0)])
    train(native)
    assert equal(native, swapped)
    assert trainer.optimizers[0].defaults["lr"] == 2.5e-4, "for groups that are added later"


@cases(
    "swap",
    [
        lambda: OptimizerSwap("adamw"),
        lambda: OptimizerSwap("torch.optim.AdamW", lr_factor=1.0, wd_factor=1.0),
        lambda: OptimizerSwap(AdamW),
        lambda: OptimizerSwap(None, lr_factor=1.0),
        lambda: OptimizerSwap(None, options={"foreach": False}),
    ],
)
def test_swapping_a_class_for_itself_changes_nothing(swap: Callable[[], OptimizerSwap]) -> None:
    options = {"betas": (0.8, 0.95), "eps": 1e-3, "amsgrad": True}
    plain, swapped = Net(**options), Net(**options)
    plain_trainer, _ = train(plain)
    trainer, _ = train(swapped, [swap()])
    assert equal(plain, swapped)
    assert trainer.optimizers[0].defaults == {**plain_trainer.optimizers[0].defaults, **(swap().options or {})}


@cases(
    ("swap", "others"),
    [
        (lambda: OptimizerSwap(None, {"betas": [0.5, 0.9], "amsgrad": True}), {"eps": 1e-2}),
        (lambda: OptimizerSwap("adamw", {"betas": [0.5, 0.9], "amsgrad": True}), {"eps": 1e-2}),
        (lambda: OptimizerSwap(functools.partial(AdamW, betas=(0.5, 0.9), amsgrad=True)), {}),
    ],
)
def test_options_replace_those_of_the_same_class(swap: Callable[[], OptimizerSwap], others: dict[str, Any]) -> None:
    native, swapped = Net(betas=(0.5, 0.9), amsgrad=True, **others), Net(betas=(0.8, 0.95), eps=1e-2)
    train(native, max_epochs=1)
    trainer, _ = train(swapped, [swap()], max_epochs=1)
    assert equal(native, swapped)
    assert {group["betas"] for group in trainer.optimizers[0].param_groups} == {(0.5, 0.9)}


def test_options_of_a_class_that_are_no_keys_of_groups_are_kept() -> None:
    plain, swapped = Net(Lion, maximize=True), Net(Lion, maximize=True)
    train(plain)
    train(swapped, [OptimizerSwap("lion", {"foreach": False})])
    assert all(torch.allclose(a, b) for a, b in zip(plain.parameters(), swapped.parameters(), strict=True))
    assert not equal(plain, Net(Lion)), "it trained"


def test_one_decay_is_replaced() -> None:
    native, swapped = (
        Net(lambda g, lr: Lion(_flat(g), lr=lr, weight_decay=0.5)),
        Net(lambda g, lr: Adam(_flat(g), lr=lr)),
    )
    train(native)
    train(swapped, [OptimizerSwap("lion", {"weight_decay": 0.5})])
    assert equal(native, swapped)


def _flat(groups: list[dict[str, Any]]) -> list[Any]:
    return [parameter for group in groups for parameter in group["params"]]


# Everything that holds the old optimizer sees the new one.


class Holding(Net):
    """Holds its optimizer, its list of groups, one group, and a function that reads the rate."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        self.calls: list[Any] = []
        self.handle = optimizer.register_step_post_hook(lambda o, *_: self.calls.append(o))
        self.groups, self.group, self.rate = (
            optimizer.param_groups,
            optimizer.param_groups[0],
            lambda: optimizer.param_groups[0]["lr"],
        )
        return optimizer

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        now = self.trainer.optimizers[0]
        assert self.groups is now.param_groups
        assert self.group is now.param_groups[0]
        assert self.mine.state is now.state
        assert self.rate() == self.group["lr"] == 1e-3 * (self.trainer.global_step + 1)
        self.mine.param_groups[0]["lr"] = 1e-3 * (self.trainer.global_step + 2)
        if self.trainer.global_step == BATCHES:
            self.handle.remove()
        return super().training_step(batch, batch_idx)


def test_whoever_holds_the_old_optimizer_sees_the_new_one() -> None:
    module = Holding()
    trainer, rates = train(module, [OptimizerSwap("lion")])
    assert [step[0][0] for step in rates] == [1e-3 * (number + 1) for number in range(len(rates))]
    assert len(module.calls) == BATCHES, "its hook ran until it was removed"
    assert {id(each) for each in module.calls} == {id(trainer.optimizers[0])}
    assert type(module.mine) is AdamW
    assert module.mine.param_groups[0]["lr"] == 1e-3, "after the fit it is what it was"
    assert "eps" in module.mine.param_groups[0]
    assert not module.mine.state
    assert "exp_avg" in next(iter(trainer.optimizers[0].state.values()))


def test_schedulers_that_the_module_keeps_follow_too() -> None:
    class Keeps(Net):
        automatic_optimization = False

        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            self.schedulers = {"main": OneCycleLR(optimizer, self.options["lr"], total_steps=20)}
            return optimizer

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()
            self.schedulers["main"].step()

    given = train(Keeps(Lion), max_epochs=1)[1]
    found = train(Keeps(SGD, lr=2e-3, momentum=0.9), [OptimizerSwap("lion", lr_factor=0.5)], max_epochs=1)[1]
    assert found == given


def test_a_step_of_the_old_object_is_one_of_the_new() -> None:
    class Raw(Net):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.mine.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            self.mine.step()

    native, swapped = Raw(Lion), Raw(AdamW)
    train(native)
    train(swapped, [OptimizerSwap("lion")])
    assert equal(native, swapped)


@cases(
    ("old", "make", "new", "expected"),
    [
        (SGD, lambda o: OneCycleLR(o, 1e-3, total_steps=20), OptimizerSwap("lion", lr_factor=1.0), "betas"),
        (
            AdamW,
            lambda o: CyclicLR(o, 1e-4, 1e-3, 3, cycle_momentum=True),
            OptimizerSwap("sgd", {"momentum": 0.1}, 1.0),
            "momentum",
        ),
        (AdamW, lambda o: OneCycleLR(o, 1e-3, total_steps=20), OptimizerSwap("adafactor", lr_factor=1.0), None),
    ],
)
def test_momentum_is_cycled_where_the_new_class_keeps_it(
    old: Any, make: Any, new: OptimizerSwap, expected: Any
) -> None:
    kind = find_class(new.optimizer)  # type: ignore[arg-type]
    options = {"momentum": 0.9} if old is SGD else {}
    rates = train(Net(old, make, **options), [copy.deepcopy(new)])[1]
    position = {"betas": 1, "momentum": 2}.get(expected, 0)
    if expected is None:
        assert all(step[0][1:3] == [None, None] for step in rates)
        return
    native = train(Net(kind, make, **(new.options or {})))[1]
    assert [step[0][position] for step in rates] == [step[0][position] for step in native]
    assert len({str(step[0][position]) for step in rates}) > 3


def test_callbacks_on_both_sides_and_monitors_see_it(tmp_path: Path) -> None:
    results = []
    for order in (1, -1):
        module, monitor = Net(SGD, lambda o: StepLR(o, 3)), LearningRateMonitor("step")
        callbacks = [OptimizerSwap("lion", lr_factor=0.01), NormClipping(0.1), EMAWeightAveraging(decay=0.5)]
        logger = pl.loggers.CSVLogger(tmp_path / str(order))
        train(module, [*callbacks[::order], monitor], logger=logger, log_every_n_steps=1)
        results.append(weights(module))
        assert monitor.lrs["lr-Lion/bias"][0] == pytest.approx(2e-5)
    assert all(torch.equal(results[0][name], value) for name, value in results[1].items())


class Unfreeze(BaseFinetuning):
    """Trains the bias from the second epoch on."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.late)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Optimizer) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.late, optimizer)


class Late(Net):
    def __init__(self, make: Any, **options: Any) -> None:
        super().__init__(make, **options)
        self.late = nn.Linear(4, 1)

    def configure_optimizers(self) -> Any:
        return self.make(self.net.parameters(), **self.options)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) + self.late(batch).square().mean()


def test_finetuning_callbacks_add_groups(tmp_path: Path) -> None:
    ends = []
    for make, swaps in ((Lion, []), (AdamW, [OptimizerSwap("lion")])):
        whole, resumed, folder = Late(make, weight_decay=0.3), Late(make, weight_decay=0.3), tmp_path / make.__name__
        rates = train(whole, [*swaps, Unfreeze()], save=(folder, [8]))[1]
        assert len(rates[-1][0]) == 2 * len(rates[0][0])
        # The callback restores the groups of its last change, so a run with it does not resume bitwise by itself.
        again = train(resumed, [*copy.deepcopy(swaps), Unfreeze()], ckpt=folder / "8.ckpt")[1]
        ends.append([rates, again, weights(whole), weights(resumed)])
    assert str(ends[0]) == str(ends[1])
    assert all(torch.equal(ends[0][n][name], ends[1][n][name]) for n in (2, 3) for name in ends[0][2])


class OneForEach(pl.LightningModule):
    """A matrix and an AdamW for each short name."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(3)
        self.nets = nn.ModuleList(nn.Linear(4, 2, bias=False) for _ in THERE)

    def configure_optimizers(self) -> Any:
        return [AdamW(net.parameters(), lr=1e-2) for net in self.nets]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for net, optimizer in zip(self.nets, self.optimizers(), strict=True):  # type: ignore[arg-type]
            optimizer.zero_grad()
            self.manual_backward((net(batch) - batch[:, :2].sin()).square().mean())
            optimizer.step()


def _is_there(name: str) -> bool:
    try:
        find_class(name)
    except (ImportError, ValueError):  # no extra, or a torch without Muon
        return False
    return True


THERE = [name for name in NAMES if _is_there(name)]
SOON = {
    "spam": {"update_proj_gap": 5, "warmup_epoch": 3},
    "soap": {"precondition_frequency": 2},
    "frugal": {"density": 0.5, "update_gap": 2},
    "dct-adamw": {"rank": 1},
    "galore-adamw": {"rank": 1, "update_gap": 4},
    "q-galore": {"rank": 1, "update_gap": 1, "queue": 2},
}


def test_every_name_resumes_bitwise_and_leaves_no_mark(tmp_path: Path) -> None:
    def swaps() -> list[OptimizerSwap]:
        patterns = {name: ["nets.*.weight"] for name in THERE if NAMES[name].only_matrices}
        return [
            OptimizerSwap(name, SOON.get(name), 1.0, which=[i], include=patterns.get(name), name=name)
            for i, name in enumerate(THERE)
        ]

    whole, resumed, start = OneForEach(), OneForEach(), OneForEach()
    trainer, _ = train(whole, swaps(), save=(tmp_path, [6]))
    train(resumed, swaps(), ckpt=tmp_path / "6.ckpt")
    for index, name in enumerate(THERE):
        assert torch.equal(resumed.nets[index].weight, whole.nets[index].weight), name
        assert not torch.equal(start.nets[index].weight, whole.nets[index].weight), name
        assert not vars(whole.nets[index].weight), name
        optimizer = trainer.optimizers[index]
        assert type(optimizer.parts[0] if NAMES[name].only_matrices else optimizer) is find_class(name)


def test_two_optimizers_and_a_choice() -> None:
    makers = {"a": lambda o: StepLR(o, 2), "b": lambda o: StepLR(o, 3)}
    trainer, _ = train(Nets(AdamW, makers), [OptimizerSwap("lion", which=[1])])
    assert [type(each) for each in trainer.optimizers] == [AdamW, Lion]
    each = [OptimizerSwap("lion", which=[0], name="a"), OptimizerSwap("adabelief", which=[1], name="b")]
    trainer, _ = train(Nets(AdamW, makers), each)
    assert [type(each) for each in trainer.optimizers] == [Lion, po.AdaBelief]
    assert [type(each).__name__ for each in trainer.strategy._lightning_optimizers] == [
        "LightningLion",
        "LightningAdaBelief",
    ]


def _on_this_rank(folder: Path) -> tuple[bool, dict[str, Any]]:
    native, swapped = Net(Lion, lambda o: StepLR(o, 2)), Net(AdamW, lambda o: StepLR(o, 2))
    arguments = {"strategy": "ddp", "devices": 2, "max_epochs": 2}
    train(native, **arguments)
    train(swapped, [OptimizerSwap("lion")], **arguments, save=(folder, [2]))
    resumed = Net(AdamW, lambda o: StepLR(o, 2))
    train(resumed, [OptimizerSwap("lion")], **arguments, ckpt=folder / "2.ckpt")
    return equal(native, swapped) and equal(native, resumed), weights(swapped)


def test_two_ranks(tmp_path: Path) -> None:
    first, second = on_ranks(2, _on_this_rank, tmp_path)
    assert first[0]
    assert second[0]
    assert all(torch.equal(first[1][name], value) for name, value in second[1].items())


# How an optimizer is named.


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_an_optimizer(name: str) -> None:
    if NAMES[name].extra:
        pytest.importorskip(NAMES[name].path.partition(".")[0])
    assert issubclass(find_class(name), Optimizer)
    OptimizerSwap(name, dict(NAMES[name].options))


@cases(
    "optimizer",
    [Lion, functools.partial(Lion, betas=(0.9, 0.99)), functools.partial(Lion, lr=1e-4), lambda groups: Lion(groups)],
)
def test_a_callable_creates_it(optimizer: Any) -> None:
    native, swapped = Net(Lion), Net(AdamW)
    train(native, max_epochs=1)
    train(swapped, [OptimizerSwap(optimizer)], max_epochs=1)
    assert equal(native, swapped)


def test_it_pickles_with_a_partial_function() -> None:
    swap = pickle.loads(pickle.dumps(OptimizerSwap(functools.partial(Lion, betas=(0.5, 0.9)), {"foreach": False})))
    assert swap.optimizer.keywords == {"betas": (0.5, 0.9)}


def test_hydra_and_yaml_build_a_partial_function() -> None:
    hydra, omegaconf = pytest.importorskip("hydra"), pytest.importorskip("omegaconf")
    part = {"_target_": "pytorch_optimizer.Lion", "_partial_": True, "betas": [0.5, 0.9]}
    config = {"_target_": "lightning_grad.callbacks.OptimizerSwap", "optimizer": part, "which": [0]}
    swap = hydra.utils.instantiate(omegaconf.OmegaConf.create(config))
    assert swap.optimizer.func is Lion
    parser = pytest.importorskip("jsonargparse").ArgumentParser()
    parser.add_argument("--swap", type=pl.Callback)  # as LightningCLI does
    init = {"optimizer": {"class_path": "pytorch_optimizer.Lion", "init_args": {"betas": [0.5, 0.9]}}}
    text = {"swap": {"class_path": "lightning_grad.callbacks.OptimizerSwap", "init_args": init}}
    built = getattr(parser, "instantiate", parser.instantiate_classes)(parser.parse_object(text)).swap
    rates = train(Net(AdamW), [built], max_epochs=1)[1]
    assert [tuple(step[0][1]) for step in rates] == [(0.5, 0.9)] * BATCHES
    assert rates == train(Net(AdamW), [swap], max_epochs=1)[1]
    with pytest.raises(ValueError, match=r"options must be those of Lion.*Did you mean 'betas'"):
        OptimizerSwap(built.optimizer, {"beta": 0.9})
    assert OptimizerSwap(built.optimizer).works_with() == OptimizerSwap("lion").works_with()


# What it says.


@cases(
    ("old", "swap", "words"),
    [
        (AdamW, OptimizerSwap("lion"), "trains with Lion in place of AdamW (learning rate 0.001, weight decay 0.01)."),
        (AdamW, OptimizerSwap("lion"), "also takes over the weight decay 0.01, which is the default of AdamW."),
        (AdamW, OptimizerSwap("lion"), "keeps the learning rate of AdamW. Lion usually takes lr_factor=0.1 to 0.3"),
        (
            Adam,
            OptimizerSwap("adamw", wd_factor=2.0),
            "turns the L2 penalty of Adam into decoupled weight decay of AdamW.",
        ),
        (AdamW, OptimizerSwap(None), "trains with the module's own optimizers."),
        (
            Adagrad,
            OptimizerSwap("adamw"),
            "keeps the learning rate of Adagrad, and does not know whether it suits AdamW.",
        ),
    ],
)
def test_the_first_lines_say_what_changes(old: Any, swap: OptimizerSwap, words: str, caplog: Any) -> None:
    caplog.set_level("INFO")
    caplog.clear()
    decay = {"weight_decay": 0.1} if old is Adam else {}
    train(Net(lambda groups, **options: old(_flat(groups), **options), **decay), [copy.deepcopy(swap)], max_epochs=1)
    assert any(words in record.getMessage() for record in caplog.records), caplog.messages


# What is refused, before the first batch.


def _refused(module: Any, swaps: list[Any], words: str, error: type[Exception] = ValueError, **arguments: Any) -> None:
    class NoBatch(pl.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            raise AssertionError("a batch was trained")

    with pytest.raises(error, match=words):
        train(module, [*swaps, NoBatch()], **arguments)


@cases(
    ("old", "swap", "words"),
    [
        (
            SGD,
            OptimizerSwap("adamw"),
            r"usual rates.*factor of 0\.01\. Set lr_factor=0\.01.*lr_factor=1\.0 to keep 0\.001",
        ),
        (SGD, OptimizerSwap("lion"), r"Set lr_factor=0\.002"),
        (AdamW, OptimizerSwap("sgd"), r"Set lr_factor=100"),
        (AdamW, OptimizerSwap("adafactor"), r"Set lr_factor=10,"),
        (AdamW, OptimizerSwap("prodigy"), r"Set lr_factor=1000,"),
        (Adagrad, OptimizerSwap("prodigy"), r"Set lr_factor=1000,"),
        (AdamW, OptimizerSwap("pytorch_optimizer.DAdaptAdam"), r"Set lr_factor=1000,"),
        (torch.optim.Adadelta, OptimizerSwap("lion"), r"Set lr_factor=0\.0002"),
    ],
)
def test_a_rate_of_another_scale_needs_a_factor(old: Any, swap: OptimizerSwap, words: str) -> None:
    def module() -> Net:
        return Net(lambda groups, **options: old(_flat(groups), **options))

    _refused(module(), [swap], words)
    given = OptimizerSwap(swap.optimizer, lr_factor=1.0)
    assert train(module(), [given], max_epochs=1)[1][0][0][0] == 1e-3, "1.0 is accepted"


def test_a_class_of_unknown_scale_keeps_the_rate() -> None:
    assert train(Net(AdamW), [OptimizerSwap("torch.optim.Rprop")], max_epochs=1)[1][0][0][0] == 1e-3


class Pair(Optimizer):
    """Wraps another optimizer, like those of many libraries."""

    def __init__(self, inner: Optimizer) -> None:
        self.inner, self.defaults, self.state = inner, {}, inner.state

    def state_dict(self) -> Any:
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: Any) -> None:
        self.inner.load_state_dict(state_dict)

    @property
    def param_groups(self) -> Any:  # type: ignore[override]
        return self.inner.param_groups


class Absent(Net):
    def configure_optimizers(self) -> Any:
        return None


@cases(
    ("module", "words"),
    [
        (lambda: Absent(), "configure_optimizers returns none"),
        (lambda: Net(lambda g, lr: torch.optim.LBFGS(_flat(g))), r"cannot replace optimizers\[0\]: LBFGS evaluates"),
        (lambda: Net(lambda g, lr: _zero(g)), "splits the state"),
        (lambda: Net(lambda g, lr: Pair(SGD(_flat(g)))), "Pair wraps another optimizer"),
        (lambda: Net(lambda g, lr: SGD([{"params": _flat(g), "lr": None}])), "groups of SGD have no learning rate"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*returned `None`, this fit will run with no optimizer")
def test_it_refuses_what_it_cannot_replace(module: Callable[[], Any], words: str) -> None:
    _refused(module(), [OptimizerSwap("lion", lr_factor=1.0)], words)


def _zero(groups: Any) -> Any:
    return type("ZeroRedundancyOptimizer", (SGD,), {})(_flat(groups))  # importing the real one warns


def _fused_lamb(monkeypatch: pytest.MonkeyPatch) -> str:
    kind = type("FusedLAMB", (SGD,), {"__module__": "apex.optimizers", "__init__": lambda self, params: None})
    for name in ("apex", "apex.optimizers"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["apex.optimizers"].FusedLAMB = kind  # type: ignore[attr-defined]
    return "apex.optimizers.FusedLAMB"


def test_it_refuses_an_optimizer_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    _refused(Net(), [OptimizerSwap(_fused_lamb(monkeypatch))], "apex needs parameters on a GPU.*accelerator='gpu'")


@cases(
    ("swaps", "words"),
    [
        ([OptimizerSwap("torch.optim.LBFGS")], "cannot use LBFGS"),
        ([OptimizerSwap("lion", which=[0, 2])], r"which must hold indices below 1.*got \[0, 2\]"),
        (
            [OptimizerSwap("lion"), OptimizerSwap("lion", name="b")],
            r"would replace the same optimizer.*which=\[\.\.\.\]",
        ),
        ([OptimizerSwap("lion", which=[0]), OptimizerSwap("lion", which=[0], name="b")], "would replace the same"),
        ([OptimizerSwap("lion", {"betas": [2.0, 0.5]})], "cannot create Lion for the groups of AdamW"),
        ([OptimizerSwap("lion", {"weight_decay": 0.1})], "groups have different decays: 0.1, 0. Set wd_factor"),
        ([OptimizerSwap(lambda groups: Lion(groups, lr=0.3))], r"must not set a learning rate.*got lr=0\.3"),
        ([OptimizerSwap(functools.partial(Lion, lr=0.3))], r"must not set a learning rate.*got lr=0\.3"),
        ([OptimizerSwap(functools.partial(Lion, weight_decay=0.3))], r"must not set a weight decay.*set wd_factor"),
        ([OptimizerSwap(lambda groups: Lion(_flat(groups)))], "must have the parameter groups that it is given"),
    ],
)
def test_it_refuses_what_does_not_fit(swaps: list[OptimizerSwap], words: str) -> None:
    _refused(Net(AdamW), swaps, words)


def test_it_refuses_a_callable_that_returns_something_else() -> None:
    _refused(Net(), [OptimizerSwap(lambda groups: None)], "must return a torch.optim.Optimizer", TypeError)  # type: ignore[arg-type, return-value]


def test_answers_are_those_of_the_class() -> None:
    for path, name in (("pytorch_optimizer.SOAP", "soap"), (torch.optim.SGD, "sgd")):
        assert OptimizerSwap(path, lr_factor=1.0).works_with() == OptimizerSwap(name, lr_factor=1.0).works_with()
    module = Net(lambda groups, lr: AdamW([nn.Parameter(torch.ones(2, dtype=torch.complex64))], lr=lr))
    module.configure_optimizers = lambda: AdamW([module.c], lr=1e-3)  # type: ignore[method-assign]
    module.c = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    _refused(module, [OptimizerSwap("pytorch_optimizer.SOAP")], "optimizer for real parameters, and 'c' holds complex")


def test_sgd_takes_sparse_gradients() -> None:
    class Sparse(Net):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(3, 4, sparse=True)

        def configure_optimizers(self) -> Any:
            return AdamW(self.words.parameters(), lr=1e-3)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.words(torch.tensor([0, 2])).square().sum()

    _refused(Sparse(), [OptimizerSwap("lion")], "takes dense gradients only")
    module = Sparse()
    before = weights(module)["words.weight"]
    train(module, [OptimizerSwap("sgd", lr_factor=1.0, wd_factor=0.0)], max_epochs=1)
    assert (weights(module)["words.weight"] != before).any(1).tolist() == [True, False, True]


def test_names_of_absent_packages_and_classes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(ModuleNotFoundError, match=r'Run pip install "lightning-grad\[optimizers\]"') as raised:
        OptimizerSwap("lion")
    assert outcome_of(raised.value, OptimizerSwap).status == "refused", "for lightning-grad check"
    with pytest.raises(ModuleNotFoundError, match="Install no_such_package, or correct the path"):
        OptimizerSwap("no_such_package.Lion")
    (tmp_path / "of_a_colleague.py").write_text("import no_such_package")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        ModuleNotFoundError, match=r"needs no_such_package, which is not installed\. Install no_such_package\.$"
    ):
        OptimizerSwap("of_a_colleague.Lion")
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(ValueError, match=r"needs torch >= 2\.9; this is torch"):
        OptimizerSwap("muon")


@cases("name", ["torch.nn.Linear", "torch.optim"])
def test_a_path_must_name_an_optimizer(name: str) -> None:
    with pytest.raises(ValueError, match=r"optimizer must name a subclass of torch\.optim\.Optimizer; got"):
        OptimizerSwap(name)


# Checkpoints of other optimizers.


def test_checkpoints_of_other_optimizers_are_refused(tmp_path: Path) -> None:
    train(Net(), save=(tmp_path, [BATCHES]), max_epochs=1)
    path = tmp_path / f"{BATCHES}.ckpt"
    _refused(Net(), [OptimizerSwap("lion")], "the checkpoint was written without it.*load_from_checkpoint", ckpt=path)
    train(Net(), [OptimizerSwap(None)], ckpt=path, max_epochs=2, save=(tmp_path, [BATCHES]))  # nothing is swapped
    words = r"optimizers\[0\] is the module's own optimizer, but in this run it is Lion"
    _refused(Net(), [OptimizerSwap("lion")], words, ckpt=path)
    train(Net(), [OptimizerSwap("lion", {"betas": [0.5, 0.9]})], save=(tmp_path, [BATCHES]), max_epochs=1)
    words = r"cannot resume: in the checkpoint, optimizers\[0\] is {}, but in this run it is {}\. Use the same"
    for swap, was, now in (
        (OptimizerSwap("adabelief"), "Lion", "AdaBelief"),
        (OptimizerSwap("lion"), r"Lion\(betas=\[0\.5, 0\.9\]\)", r"Lion\(betas=\[0\.9, 0\.99\]\)"),
        (OptimizerSwap(None, {"amsgrad": True}), "Lion", "AdamW"),
        (OptimizerSwap(None), "Lion", "the module's own optimizer"),
    ):
        _refused(Net(), [swap], words.format(was, now), ckpt=path)
    _refused(
        Net(),
        [OptimizerSwap("lion", {"betas": [0.5, 0.9]}, lr_factor=0.5)],
        "cannot resume with lr_factor=0.5",
        ckpt=path,
    )
    same = OptimizerSwap("pytorch_optimizer.Lion", {"betas": [0.5, 0.9]})
    assert train(Net(), [same], ckpt=path, max_epochs=2)[0].global_step == 2 * BATCHES


def test_without_it_lightning_names_it_when_its_checkpoint_is_loaded(tmp_path: Path) -> None:
    train(Net(), [OptimizerSwap("lion")], save=(tmp_path, [BATCHES]), max_epochs=1)
    with pytest.warns(UserWarning, match=r"add the following callbacks: \['OptimizerSwap'\]"), pytest.raises(KeyError):
        train(Net(), ckpt=tmp_path / f"{BATCHES}.ckpt", max_epochs=2)


class Keeping(Net):
    """Returns the same objects in each fit."""

    def configure_optimizers(self) -> Any:
        self.kept = vars(self).get("kept") or super().configure_optimizers()
        return self.kept


def test_schedulers_of_a_second_fit() -> None:
    module = Keeping(AdamW, lambda o: StepLR(o, 2, 0.5))
    for factor in (1.0, 0.25):
        _, rates = train(module, [OptimizerSwap("lion")], max_epochs=1)
        assert [step[0][0] for step in rates] == [1e-3, 1e-3, 5e-4, 5e-4], factor
        module.kept["lr_scheduler"]["scheduler"].last_epoch = 0
    train(module, [OptimizerSwap("lion", lr_factor=0.5)], max_epochs=1)
    _refused(module, [OptimizerSwap("lion", lr_factor=0.5)], "would multiply the base rates of StepLR again")


def test_a_second_fit_scales_the_rates_once() -> None:
    module, swap = Keeping(), OptimizerSwap("lion", lr_factor=0.5)
    for _ in range(2):
        assert train(module, [swap], max_epochs=1)[1][0][0][0] == 5e-4
    assert train(module, max_epochs=1)[1][0][0][0] == 1e-3
