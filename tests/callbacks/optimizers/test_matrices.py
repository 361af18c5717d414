"""OptimizerSwap with optimizers of matrices: which matrices, the rest on the module's optimizer, and what is refused."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import OneCycleLR, StepLR

from lightning_grad.callbacks import MomentumReset, NMSparsity, NormClipping, OptimizerSwap, SpikeClipping
from lightning_grad.functional.torch_version import TORCH
from lightning_grad.optimizers import DCTAdamW, Frugal, GaLoreAdamW, Part, PartedOptimizer
from lightning_grad.testing import on_ranks
from lightning_grad.utilities import optimizer_report
from lightning_grad.utilities.checks import lacking
from tests.callbacks.optimizers.swapped import BATCHES, EPOCHS, Nets, equal, train, weights
from tests.callbacks.optimizers.test_optimizer_swap import fp16
from tests.callbacks.optimizers.test_schedulers import THERE
from tests.cases import cases

needs_muon = pytest.mark.skipif(TORCH < (2, 9), reason="torch has no Muon")

DCT: dict[str, Any] = {"rank": 2}


class Deep(pl.LightningModule):
    """A network with hidden matrices, an optimizer of two groups, and a schedule."""

    def __init__(self, optimizer: Any = AdamW, scheduler: Callable[[Optimizer], Any] | None = None, **options: Any):
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 6), nn.Linear(6, 1))
        self.make, self.scheduler, self.options = optimizer, scheduler, {"lr": 1e-2, **options}

    def groups(self) -> list[dict[str, Any]]:
        matrices = [parameter for parameter in self.net.parameters() if parameter.ndim > 1]
        others = [parameter for parameter in self.net.parameters() if parameter.ndim == 1]
        return [{"params": matrices, "weight_decay": 0.1, "name": "matrices"}, {"params": others, "weight_decay": 0.0}]

    def configure_optimizers(self) -> Any:
        optimizer = self.make(self.groups(), **self.options)
        if self.scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.scheduler(optimizer), "interval": "step"}}

    def loss(self, batch: Tensor) -> Tensor:
        return (self.net(batch) - batch.sum(1, keepdim=True)).square().mean()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.loss(batch)


HIDDEN = ["net.1.weight", "net.3.weight"]


def hidden(module: Deep) -> list[nn.Parameter]:
    return [module.net[1].weight, module.net[3].weight]


def one_cycle(optimizer: Optimizer) -> OneCycleLR:
    return OneCycleLR(optimizer, 1e-2, total_steps=BATCHES * EPOCHS + 2)


# The same as by hand.


@needs_muon
def test_muon_and_adamw_are_two_optimizers_by_hand(tmp_path: Path) -> None:
    """Under OneCycleLR, which cycles beta1 of AdamW and the momentum of Muon; also resumed, and with clipping."""
    hand = Deep(scheduler=one_cycle, betas=(0.9, 0.95))
    user, schedule = (lambda made: (made["optimizer"], made["lr_scheduler"]["scheduler"]))(hand.configure_optimizers())
    muon = torch.optim.Muon(hidden(hand), adjust_lr_fn="match_rms_adamw")
    chosen = {id(parameter) for parameter in hidden(hand)}
    left = [[p for p in group["params"] if id(p) not in chosen] for group in user.param_groups]
    adamw = AdamW([{"params": parameters} for parameters in left])
    data = torch.randn(8 * BATCHES, 4, generator=torch.Generator().manual_seed(0))
    momenta = []
    for step in range(BATCHES * EPOCHS):
        first = user.param_groups[0]
        momenta.append(first["betas"][0])
        muon.param_groups[0].update(lr=first["lr"], weight_decay=0.1, momentum=momenta[-1])
        for group, mine in zip(user.param_groups, adamw.param_groups, strict=True):
            mine.update({key: group[key] for key in ("lr", "betas", "weight_decay")})
        hand.zero_grad()
        hand.loss(data[8 * (step % BATCHES) :][:8]).backward()
        nn.utils.clip_grad_norm_([p for group in user.param_groups for p in group["params"]], 0.5)
        muon.step()
        adamw.step()
        user._opt_called = True
        schedule.step()
    assert len(set(momenta)) > 5, "the momentum is cycled"
    swapped, resumed = (Deep(scheduler=one_cycle, betas=(0.9, 0.95)) for _ in range(2))
    arguments = {"gradient_clip_val": 0.5}
    trainer, _ = train(swapped, [OptimizerSwap("muon")], save=(tmp_path, [5, 8]), **arguments)
    assert equal(swapped, hand)
    assert [type(part) for part in trainer.optimizers[0].parts] == [torch.optim.Muon, AdamW]
    for batch in (5, 8):
        resumed = Deep(scheduler=one_cycle, betas=(0.9, 0.95))
        train(resumed, [OptimizerSwap("muon")], ckpt=tmp_path / f"{batch}.ckpt", **arguments)
        assert equal(resumed, hand)
    plain = Deep(scheduler=one_cycle, betas=(0.9, 0.95))
    train(plain, **arguments)
    assert not equal(plain, hand)


def in_the_module(kind: Any, options: dict[str, Any]) -> Callable[..., PartedOptimizer]:
    """Return what a module would use to create the same optimizer itself: the second and third matrix are hidden."""

    def make(groups: list[dict[str, Any]], **arguments: Any) -> PartedOptimizer:
        return PartedOptimizer(AdamW(groups, **arguments), [Part(groups[0]["params"][1:3], kind, options)])

    return make


@cases(
    ("name", "kind", "options"),
    [
        ("galore-adamw", GaLoreAdamW, {"rank": 2, "update_gap": 3}),
        ("q-galore", GaLoreAdamW, {"rank": 2, "update_gap": 2, "queue": 1}),
        ("frugal", Frugal, {"density": 0.5, "update_gap": 3}),
        ("dct-adamw", DCTAdamW, {"rank": 2}),
    ],
)
def test_each_name_is_its_class_on_the_hidden_matrices(
    name: str, kind: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    of_name = {"lazy": True, "projector_bits": 4} if name == "q-galore" else {}
    native, swapped = Deep(in_the_module(kind, {**options, **of_name})), Deep()
    train(native, **fp16())
    train(swapped, [OptimizerSwap(name, options)], save=(tmp_path, [6]), **fp16())
    assert equal(native, swapped)
    resumed, plain = Deep(), Deep()
    train(resumed, [OptimizerSwap(name, options)], ckpt=tmp_path / "6.ckpt", **fp16())
    assert equal(native, resumed)
    train(plain, **fp16())
    assert not equal(native, plain)


def _on_this_rank(folder: Path) -> tuple[bool, dict[str, Tensor]]:
    arguments: dict[str, Any] = {"strategy": "ddp", "devices": 2, "max_epochs": 2}
    options = {"rank": 2, "update_gap": 2}
    modules = [
        Deep(in_the_module(GaLoreAdamW, options), lambda o: StepLR(o, 2)),
        Deep(scheduler=lambda o: StepLR(o, 2)),
    ]
    train(modules[0], **arguments)
    train(modules[1], [OptimizerSwap("galore-adamw", options)], **arguments, save=(folder, [2]))
    modules.append(Deep(scheduler=lambda o: StepLR(o, 2)))
    train(modules[2], [OptimizerSwap("galore-adamw", options)], **arguments, ckpt=folder / "2.ckpt")
    return all(equal(modules[0], other) for other in modules[1:]), weights(modules[1])


def test_two_ranks(tmp_path: Path) -> None:
    first, second = on_ranks(2, _on_this_rank, tmp_path)
    assert first[0]
    assert second[0]
    assert all(torch.equal(first[1][name], value) for name, value in second[1].items())


class Parts(pl.Callback):
    """Records whether all parts used the rate of the group in a batch, and who holds the optimizer."""

    def __init__(self) -> None:
        self.of: list[list[bool]] = []

    def on_train_end(self, trainer: Any, *_: Any) -> None:
        pairs = zip(trainer.lr_scheduler_configs, trainer.optimizers, strict=True)
        self.bound = [config.scheduler.optimizer is optimizer for config, optimizer in pairs]

    def on_train_start(self, trainer: Any, *_: Any) -> None:
        for optimizer in trainer.optimizers:
            optimizer.register_step_post_hook(self._compare)

    def _compare(self, optimizer: Any, *_: Any) -> None:
        inner = [part.param_groups[0]["lr"] for part in optimizer.parts]
        self.of.append([rate == group["lr"] for rate, group in zip(inner, optimizer.param_groups, strict=True)])


class OverCopies(pl.Callback):
    """What one would write first: a combined optimizer over copies of the groups, in on_fit_start."""

    def on_fit_start(self, trainer: Any, *_: Any) -> None:
        trainer.strategy.optimizers = [
            PartedOptimizer(
                AdamW([{key: group[key] for key in ("params", "lr", "weight_decay")} for group in old.param_groups]),
                [Part(old.param_groups[0]["params"], DCTAdamW, {"rank": 1})],
            )
            for old in trainer.optimizers
        ]


def test_every_scheduler_moves_both_parts(tmp_path: Path) -> None:
    """Each net has a matrix on DCTAdamW and a bias on AdamW, and a scheduler of its own."""

    def swap() -> OptimizerSwap:
        return OptimizerSwap("dct-adamw", {"rank": 1}, include=["nets.*.weight"])

    plain, swapped, resumed, naive, parts = *(Nets(AdamW, THERE) for _ in range(4)), Parts()
    native = Nets(_native, THERE)
    rates = train(plain)[1]
    assert train(native)[1] == rates
    assert train(swapped, [swap(), parts], save=(tmp_path, [6]))[1] == rates
    assert train(resumed, [swap()], ckpt=tmp_path / "6.ckpt")[1] == rates[6:]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(naive, [OverCopies()])
    for name in THERE:
        mine = swapped.nets[name]
        assert equal(mine, native.nets[name]), name
        assert equal(mine, resumed.nets[name]), name
        assert not equal(mine, naive.nets[name]), f"the naive swap passes for {name}"
    assert all(parts.bound)
    assert len(parts.of) == len(THERE) * BATCHES * EPOCHS
    assert all(all(each) for each in parts.of), "each part used the rate of its group"


def _native(groups: list[dict[str, Any]], lr: float) -> PartedOptimizer:
    matrix = groups[0]["params"]
    cycled = {"cycle_momentum": True}  # of no consequence without a scheduler that cycles
    return PartedOptimizer(AdamW(groups, lr=lr), [Part(matrix, DCTAdamW, {"rank": 1}, **cycled)])


def test_factors_and_a_decay_are_those_of_the_matrices_alone() -> None:
    swaps = [OptimizerSwap("dct-adamw", DCT, lr_factor=0.5, wd_factor=3.0)]
    swaps.append(OptimizerSwap("dct-adamw", {**DCT, "weight_decay": 0.7}, lr_factor=0.5))
    for swap, decay in zip(swaps, (0.3, 0.7), strict=True):
        trainer, rates = train(Deep(scheduler=lambda o: StepLR(o, 2)), [swap], max_epochs=1)
        assert [step[0][0] for step in rates] == pytest.approx([1e-2, 1e-2, 1e-3, 1e-3])
        rows = [(row.optimizer, row.group, row.lr, row.weight_decay) for row in optimizer_report(trainer).rows]
        assert rows == [
            ("0: DCTAdamW", "matrices", pytest.approx(5e-5), pytest.approx(decay)),
            ("0: AdamW", "matrices", pytest.approx(1e-4), 0.1),
            ("0: AdamW", "1", pytest.approx(1e-4), 0.0),
        ]


# Which matrices.


class Kinds(Deep):
    """A tied embedding and head, a convolution, attention, a frozen matrix, and a matrix of a module of the user."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.net = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 1))
        self.embed, self.out = nn.Embedding(9, 6), nn.Linear(6, 9, bias=False)
        self.out.weight = self.embed.weight
        self.conv, self.attention = nn.Conv1d(2, 3, 3), nn.MultiheadAttention(6, 2)
        self.frozen, self.w = nn.Linear(5, 5), nn.Parameter(torch.ones(3, 3))
        self.frozen.weight.requires_grad_(False)
        self.last = nn.Linear(6, 3)

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters(), **self.options)


@cases(
    ("include", "exclude", "chosen"),
    [
        (None, None, ["net.1.weight", "net.2.weight", "attention.in_proj_weight", "attention.out_proj.weight"]),
        (None, ["attention"], ["net.1.weight", "net.2.weight"]),
        (["net"], None, ["net.0.weight", "net.1.weight", "net.2.weight"]),
        (["net.1", "w", "embed.weight"], None, ["w", "net.1.weight", "embed.weight"]),
    ],
)
def test_hidden_matrices_are_chosen(include: Any, exclude: Any, chosen: list[str]) -> None:
    module = Kinds()
    trainer, _ = train(module, [OptimizerSwap("dct-adamw", DCT, 1.0, include=include, exclude=exclude)], max_epochs=1)
    named = {parameter: name for name, parameter in module.named_parameters()}
    moved, rest = (part.param_groups[0]["params"] for part in trainer.optimizers[0].parts)
    assert [named[parameter] for parameter in moved] == chosen
    assert {*map(id, moved), *map(id, rest)} == set(map(id, module.parameters()))
    assert len(trainer.optimizers[0].param_groups) == 1


def test_what_went_where_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    options = {"rank": 6, "update_gap": 1}
    trainer, _ = train(Kinds(), [OptimizerSwap("q-galore", options)], max_epochs=1)
    said = [record.getMessage() for record in caplog.records if "OptimizerSwap" in record.getMessage()]
    assert said == [
        "OptimizerSwap: GaLoreAdamW lowers rank=6 to the smaller side of net.2.weight (1, 6).",
        "OptimizerSwap trains with GaLoreAdamW for 4 matrices (net.1.weight, net.2.weight, attention.in_proj_weight, "
        "attention.out_proj.weight) of AdamW (learning rate 0.01, weight decay 0.01).",
        "OptimizerSwap also takes over the weight decay 0.01, which is the default of AdamW.",
        "OptimizerSwap leaves to AdamW: net.0.weight, last.weight (the first or the last layer), out.weight (tied to "
        "embed.weight), conv.weight (a convolution, not a matrix), frozen.weight (frozen), w (not the matrix of a linear "
        "layer), 8 biases and other vectors.",
    ]
    report = optimizer_report(trainer)
    assert [row.optimizer for row in report.rows] == ["0: GaLoreAdamW", "0: AdamW"]
    assert "fewer than with a fixed gap." in str(report)
    assert str(report).splitlines()[-1] in report.markdown()


def test_it_says_of_each_weight_why_it_stays(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    train(Kinds(), [OptimizerSwap("dct-adamw", DCT, include=["net.1", "net.2", "conv"])], max_epochs=1)
    assert (
        "leaves to AdamW: conv.weight (a convolution, not a matrix), w, net.0.weight, embed.weight, "
        "attention.in_proj_weight, ... (not in include), 8 biases"
    ) in caplog.text
    caplog.clear()
    module = Deep()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it initializes nothing
        module.net.append(nn.Linear(1, 0, bias=False)).append(nn.Linear(0, 1))
    train(module, [OptimizerSwap("dct-adamw", DCT)], max_epochs=1)
    assert "net.5.weight (without entries)" in caplog.text


def test_it_works_with_other_callbacks() -> None:
    ends = []
    for order in (1, -1):
        module = Deep()
        callbacks = [OptimizerSwap("dct-adamw", DCT), NormClipping(0.1), EMAWeightAveraging(decay=0.5)]
        train(module, callbacks[::order])
        ends.append(weights(module))
    assert all(torch.equal(ends[0][name], value) for name, value in ends[1].items())


def test_after_the_fit_the_module_has_its_own_optimizer_again() -> None:
    class Keeps(Deep):
        def configure_optimizers(self) -> Any:
            self.mine = super().configure_optimizers()
            self.before = list(self.mine.param_groups)
            return self.mine

    module, swap = Keeps(), OptimizerSwap("dct-adamw", DCT)
    for _ in range(2):
        trainer, _ = train(module, [swap], max_epochs=1)
        assert type(module.mine) is AdamW
        assert not module.mine.state
        assert trainer.optimizers[0].param_groups[0] is module.before[0], "during the fit, the groups were its own"
        assert [len(group["params"]) for group in module.mine.param_groups] == [4, 6]


@needs_muon
def test_a_module_with_muon_for_its_matrices_keeps_it() -> None:
    native, swapped = (Deep(lambda groups, lr: torch.optim.Muon(groups[0]["params"], lr=lr)) for _ in range(2))
    train(native, max_epochs=1)
    for swap in (OptimizerSwap(None, lr_factor=1.0), OptimizerSwap("torch.optim.Muon")):
        module = copy.deepcopy(swapped)
        trainer, _ = train(module, [swap], max_epochs=1)
        assert equal(module, native)
        assert type(trainer.optimizers[0]) is torch.optim.Muon


# What is refused, before the first batch.


class NoBatch(pl.Callback):
    def on_train_batch_start(self, *_: Any) -> None:
        raise AssertionError("a batch was trained")


def refused(module: Any, callbacks: list[Any], words: str, **arguments: Any) -> None:
    with pytest.raises(ValueError, match=words):
        train(module, [*callbacks, NoBatch()], **arguments)


@cases(
    ("arguments", "words"),
    [
        ({"optimizer": "lion", "include": ["net"]}, "include and exclude choose matrices, but Lion moves all param"),
        (
            {"optimizer": None, "exclude": ["net"]},
            "but the module's own class moves all parameters. Remove them, or use muon",
        ),
        ({"optimizer": "dct-adamw", "options": {"rnk": 3}}, r"must be those of DCTAdamW.*Did you mean 'rank'"),
        (
            {"optimizer": "dct-adamw", "options": {"rank": 0}},
            r"DCTAdamW does not take options=.*rank must be at least 1",
        ),
        ({"optimizer": "galore-adamw", "options": {"scale": -1.0}}, "options: scale must be at least 0; got -1.0"),
        ({"optimizer": "galore-adamw", "options": {"scale": float("inf")}}, "options: scale must be finite; got inf"),
        ({"optimizer": "galore-adamw", "options": {"betas": [0.9, float("inf")]}}, "options: betas must be finite"),
        ({"optimizer": "galore-adamw", "options": {"projector_bits": 3}}, "projector_bits must be 4 or None; got 3"),
        ({"optimizer": "frugal", "options": {"density": 1.5}}, "density must be from 0 to 1; got 1.5"),
    ],
)
def test_wrong_arguments_raise_in_the_constructor(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        OptimizerSwap(**arguments)


@needs_muon
def test_a_negative_option_of_muon_raises_in_the_constructor() -> None:
    with pytest.raises(ValueError, match="options: ns_steps must be at least 0; got -1"):
        OptimizerSwap("muon", {"ns_steps": -1})
    OptimizerSwap("muon", {"ns_coefficients": [3.4, -4.8, 2.0]})


class Small(Deep):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.net = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 1))


class Vectors(Deep):
    def groups(self) -> list[dict[str, Any]]:
        return super().groups()[1:]


@cases(
    ("module", "swap", "words"),
    [
        (Deep, partial(OptimizerSwap, include=["nte"]), r"\(include=...\): no parameter or module is named 'nte'. Did"),
        (Deep, partial(OptimizerSwap, exclude=["ned"]), r"\(exclude=...\): no parameter or module is named 'ned'"),
        (Deep, partial(OptimizerSwap, exclude=["net"]), "found no matrix to move. It skips net.0.weight, net.1.weight"),
        (Deep, partial(OptimizerSwap, include=["net.2"]), r"net\.2 \(not a linear layer; name parameters of other"),
        (Small, OptimizerSwap, r"found no matrix to move\. It skips net\.0\.weight, net\.1\.weight \(the first or"),
        (Vectors, OptimizerSwap, "found no matrix to move. The optimizer holds no weight with two dim"),
        (
            lambda: Deep(SGD),
            OptimizerSwap,
            r"with learning rate 0\.01, which configure_optimizers sets for SGD.*Set lr_fa",
        ),
        (
            lambda: Deep(Averages),
            partial(OptimizerSwap, lr_factor=1.0),
            "Averages averages weights in modes of its own",
        ),
    ],
)
def test_it_refuses_what_has_no_hidden_matrix(module: Any, swap: Any, words: str) -> None:
    refused(module(), [swap("dct-adamw", DCT)], words)


class Averages(AdamW):
    def train(self) -> None: ...
    def eval(self) -> None: ...


def test_the_first_line_has_the_highest_rate_of_a_schedule(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    train(Deep(scheduler=one_cycle), [OptimizerSwap("dct-adamw", DCT, lr_factor=0.5)], max_epochs=1)
    assert "of AdamW (learning rate 0.005, weight decay 0.1)." in caplog.text


def test_a_sparse_table_is_refused_if_it_is_named() -> None:
    class Sparse(Deep):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(9, 6, sparse=True)

        def groups(self) -> list[dict[str, Any]]:
            return [{"params": [self.table.weight, self.net[1].weight]}]

    refused(Sparse(), [OptimizerSwap("dct-adamw", DCT, include=["table.weight"])], "'table' computes sparse ones")


def test_an_own_rate_of_a_callable_is_refused() -> None:
    refused(Deep(), [OptimizerSwap(partial(DCTAdamW, lr=0.3, rank=2))], r"must not set a learning rate.*got lr=0\.3")


@pytest.mark.parametrize("field", ["fsdp1", "fsdp2", "deepspeed"])
def test_it_refuses_shards(field: str) -> None:
    for name in ("galore-adamw", "q-galore", "frugal", "dct-adamw"):
        assert getattr(OptimizerSwap(name).works_with(), field).is_no
    assert OptimizerSwap("lion").works_with().fsdp2.works == "yes" or field == "deepspeed"


def test_what_needs_a_second_moment_asks_all_parts() -> None:
    def optimizer(*parts: Part) -> PartedOptimizer:
        return PartedOptimizer(AdamW(module.parameters()), parts)

    module = nn.Linear(3, 3)
    assert not lacking(optimizer(Part([module.weight], DCTAdamW, DCT)), "exp_avg_sq")
    assert lacking(optimizer(Part([module.weight], SGD, {"momentum": 0.9})), "exp_avg_sq")
    assert lacking(optimizer(Part([module.weight], DCTAdamW, DCT)), "momentum_buffer")
    train(Deep(), [OptimizerSwap("dct-adamw", DCT), MomentumReset()], max_epochs=1)


class Wide(Deep):
    """Its hidden matrices have rows that NMSparsity can prune."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 12), nn.Linear(12, 4), nn.Linear(4, 1))


@pytest.mark.parametrize("name", ["muon", "galore-adamw", "frugal", "dct-adamw"])
def test_what_reads_the_moments_of_entries_refuses_the_part_without_them(name: str) -> None:
    if name == "muon" and TORCH < (2, 9):
        pytest.skip("torch has no Muon")
    options = {} if name in ("muon", "frugal") else DCT
    kind = {"muon": "Muon", "galore-adamw": "GaLoreAdamW", "frugal": "Frugal", "dct-adamw": "DCTAdamW"}[name]
    why = f"and {kind} keeps"
    refused(Wide(), [OptimizerSwap(name, options), SpikeClipping()], rf"SpikeClipping .*{why}.*or clip with ZClip")
    sparse = NMSparsity("2:4", recipe="step")
    refused(Wide(), [OptimizerSwap(name, options), sparse], rf"recipe='step' .*{why}.*Set recipe='sr-ste'")
    train(Wide(), [OptimizerSwap(name, options), NMSparsity("2:4")], max_epochs=1)
    if name == "muon":
        refused(Wide(), [OptimizerSwap(name), MomentumReset()], "MomentumReset .* and Muon keeps none")


def test_checkpoints_of_other_matrices_or_options_are_refused(tmp_path: Path) -> None:
    train(Deep(), [OptimizerSwap("dct-adamw", DCT)], save=(tmp_path, [BATCHES]), max_epochs=1)
    path = tmp_path / f"{BATCHES}.ckpt"
    for module, swap, words in (
        (Deep, OptimizerSwap("dct-adamw", DCT, include=["net.1"]), "DCTAdamW of 2 matrices, with net.3.weight, but in"),
        (
            Deep,
            OptimizerSwap("dct-adamw", {"rank": 3}),
            r"DCTAdamW\(rank=2\), but in this run it is DCTAdamW\(rank=3\)",
        ),
        (Deep, OptimizerSwap("frugal"), "is DCTAdamW, but in this run it is Frugal"),
        (Deep, OptimizerSwap("lion"), "is DCTAdamW, but in this run it is Lion"),
        (
            partial(Deep, Adam),
            OptimizerSwap("dct-adamw", DCT),
            "DCTAdamW and AdamW, but in this run it is DCTAdamW and",
        ),
    ):
        refused(module(), [swap], words, ckpt=path)
    train(Deep(), [OptimizerSwap("dct-adamw", DCT)], ckpt=path, max_epochs=2)
