"""After a bad batch, the run is bit for bit the one that never had the batches since the copy."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler, Subset, TensorDataset

from lightning_grad.callbacks import NMSparsity, SkipNonFinite, SpikeRewind
from lightning_grad.core.steps.run_copy import take_copy
from lightning_grad.functional import is_nm
from lightning_grad.optimizers import Frugal, Part, PartedOptimizer
from lightning_grad.testing import ResumableLoader, assert_identical, make_trainer, state_of

BATCH, BATCHES, BAD = 4, 32, 21  # the bad batch
WARNING = "ignore:SpikeRewind.* goes back to the weights"


class CountingSGD(torch.optim.SGD):
    """Counts steps for all parameters at once, like SPAM, and decays by the count."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        self.state["steps"] = self.state.get("steps", 0) + 1  # type: ignore
        self.param_groups[0]["weight_decay"] = 0.1 / self.state["steps"]  # type: ignore
        return loss


def parted(parameters: Iterator[nn.Parameter]) -> PartedOptimizer:
    """AdamW, with a Frugal for the matrices, whose block is in no group of the whole."""
    given = list(parameters)
    part = Part([parameter for parameter in given if parameter.ndim > 1], Frugal, {"density": 0.5, "update_gap": 3})
    return PartedOptimizer(torch.optim.AdamW(given, lr=0.01), [part])


OPTIMIZERS: dict[str, Any] = {
    "parted": parted,
    "counting": lambda parameters: CountingSGD(parameters, lr=0.05),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.01),
}


class Noisy(pl.LightningModule):
    """Batch norm, dropout and a scheduler: all of it changes in a step."""

    def __init__(self, optimizer: str = "adamw", dropout: float = 0.3) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(dropout))
        self.head = nn.Linear(16, 3)
        self.optimizer = optimizer

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, factor = batch
        return (F.cross_entropy(self.head(self.body(x)), y, reduction="none") * factor).mean()

    def configure_optimizers(self) -> Any:
        optimizer = OPTIMIZERS[self.optimizer](self.parameters())
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def data(factor: float = 1e4, bad: Sequence[int] = (BAD,)) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    factors = torch.ones(BATCH * BATCHES)
    for batch in bad:
        factors[batch * BATCH + 1] = factor
    x = torch.randn(BATCH * BATCHES, 8, generator=generator)
    return TensorDataset(x, torch.arange(BATCH * BATCHES) % 3, factors)


def without(dataset: Any, batches: Sequence[int]) -> Any:
    return Subset(dataset, [index for index in range(len(dataset)) if index // BATCH not in batches])


def run(
    dataset: Any, *callbacks: Any, module: Any = None, ckpt: Any = None, loader: Any = DataLoader, **arguments: Any
) -> Any:
    pl.seed_everything(3, verbose=False)
    module = Noisy() if module is None else module()
    saves = any(isinstance(callback, Checkpoint) for callback in callbacks)
    arguments = {"max_epochs": 1, "enable_checkpointing": saves, **arguments}
    trainer = make_trainer(callbacks=list(callbacks), **arguments)
    trainer.fit(module, loader(dataset, BATCH), ckpt_path=ckpt)
    return trainer, module


def left_by(trainer: Any, module: Any) -> dict[str, Any]:
    schedulers = [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]
    for state in schedulers:
        state.pop("_get_lr_called_within_step", None)
    return {
        **state_of(trainer, module),
        "schedulers": schedulers,
        "groups": trainer.optimizers[0].state_dict()["param_groups"],
    }


@pytest.mark.filterwarnings(WARNING)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("factor", [1e4, math.nan])
def test_the_run_is_bitwise_the_one_that_never_had_the_batches(optimizer: str, factor: float) -> None:
    def make() -> Noisy:
        return Noisy(optimizer)

    rewind = SpikeRewind(window=8, copies=2)
    rewound = left_by(*run(data(factor), rewind, module=make))
    skipped = range(16, BAD + 1)  # copies were taken after 16 and after 20 batches
    assert_identical(left_by(*run(without(data(factor), skipped), module=make)), rewound)
    (row,) = rewind.rewinds.rows()
    assert (row["step"], row["samples"]) == (BAD, " ".join(str(BAD * BATCH + place) for place in range(BATCH)))
    for other in (data(1.0), without(data(factor), [BAD])):  # a run that only lacks the bad batch is another one
        with pytest.raises(AssertionError):
            assert_identical(left_by(*run(other, module=make)), rewound)


def test_a_bad_batch_before_the_second_copy_goes_back_to_the_start() -> None:
    with pytest.warns(UserWarning, match="goes back to the first weights"):
        rewound = left_by(*run(data(math.nan, [2]), SpikeRewind()))
    assert_identical(left_by(*run(without(data(math.nan, [2]), range(3)))), rewound)


@pytest.mark.filterwarnings(WARNING)
def test_under_accumulation_whole_steps_are_taken_back() -> None:
    rewind = SpikeRewind(window=2, copies=1)  # a copy every two steps of two batches
    rewound = left_by(*run(data(), rewind, accumulate_grad_batches=2))
    assert_identical(left_by(*run(without(data(), range(20, 22)), accumulate_grad_batches=2)), rewound)
    assert rewind.rewinds.last["samples"].split() == [str(index) for index in range(80, 88)]


@pytest.mark.filterwarnings(WARNING)
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("save_copies", [True, False])
def test_a_resumed_run_goes_back_to_the_same_copy(save_copies: bool, tmp_path: Path) -> None:
    def make() -> Noisy:
        return Noisy(dropout=0.0)  # Lightning restores no random states

    def rewind() -> SpikeRewind:
        return SpikeRewind(save_copies=save_copies)

    saving = ModelCheckpoint(tmp_path, every_n_train_steps=6, save_top_k=-1)
    whole = left_by(*run(data(), rewind(), saving, module=make, loader=ResumableLoader))
    (path,) = tmp_path.glob("*step=18.ckpt")
    resumed = left_by(*run(data(), rewind(), module=make, loader=ResumableLoader, ckpt=path))
    whole.pop("random"), resumed.pop("random")
    if save_copies:
        assert_identical(whole, resumed)
    else:
        with pytest.raises(AssertionError):  # the oldest copy is that of the resumed step
            assert_identical(whole, resumed)


@pytest.mark.filterwarnings(WARNING)
def test_sparse_weights_stay_sparse_when_they_go_back() -> None:
    sparse = NMSparsity("1:4", include=["body.0"], figure=False)
    rewind = SpikeRewind()
    _, module = run(data(), rewind, sparse)
    assert rewind.rewinds.count == 1
    assert is_nm(module.body[0].weight.detach(), 1, 4)
    assert not torch.equal(
        module.body[0].weight, run(data(), NMSparsity("1:4", include=["body.0"], figure=False))[1].body[0].weight
    )


def test_it_says_where_it_goes_and_which_samples_were_bad(tmp_path: Path) -> None:
    words = r"SpikeRewind goes back to the weights after step 15: a spike at step 21, .* the samples 84, 85, 86, 87\."
    with pytest.warns(UserWarning, match=words):
        run(data(), SpikeRewind(), logger=CSVLogger(tmp_path, name="", version=""), log_every_n_steps=1)
    (row,) = csv.DictReader((tmp_path / "spike_rewind.csv").read_text().splitlines())
    assert (row["back_to"], row["samples"]) == ("15", "84 85 86 87")
    assert float(row["norm"]) > 10 * float(row["usual_norm"])
    logged = list(csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines()))
    found = [float(r["grad/spike_rewind/rewinds"]) for r in logged if r["grad/spike_rewind/rewinds"]]
    assert (found[20], found[21], found[-1]) == (0.0, 1.0, 1.0)
    assert (tmp_path / "spike_rewind.png").is_file()


@pytest.mark.filterwarnings(WARNING)
def test_spikes_without_good_steps_in_between_end_the_fit() -> None:
    bad = data(math.nan, range(BAD, BATCHES))
    with pytest.raises(
        RuntimeError, match=r"back to the weights after step 15 3 times, .* within 8 steps.*Lower the learning rate"
    ):
        run(bad, SpikeRewind(max_in_row=3))
    rewind = SpikeRewind(max_in_row=None)
    trainer, module = run(bad, rewind)
    assert rewind.rewinds.count == BATCHES - BAD
    assert_identical(left_by(trainer, module), left_by(*run(without(bad, range(16, BATCHES)))))


@pytest.mark.filterwarnings(WARNING)
def test_a_spike_that_always_follows_ends_the_fit_despite_good_steps() -> None:
    """Four good steps add a copy, but the oldest one stays, so the run would never get past it."""
    with pytest.raises(RuntimeError, match="back to the weights after step 15 1 time, "):
        run(data(math.nan, [BAD, BAD + 6]), SpikeRewind(max_in_row=1))
    with pytest.warns(UserWarning, match="a spike at step 30"):  # nine steps later, the oldest copy is another one
        run(data(math.nan, [BAD, BAD + 9]), SpikeRewind(max_in_row=1))


def fit_plan(kind: type, *epochs: Sequence[int], bad: Sequence[int] = (), callbacks: Sequence[Any] = ()) -> Any:
    """Fit a module without dropout on other batches in each epoch, and return what it left."""

    class Planned(kind):  # type: ignore[misc]
        def train_dataloader(self) -> Any:
            batches = [range(BATCH * batch, BATCH * (batch + 1)) for batch in epochs[self.current_epoch]]
            return DataLoader(data(bad=bad), batch_sampler=batches)

    plan = {"max_epochs": len(epochs), "reload_dataloaders_every_n_epochs": 1, "loader": lambda *_: None}
    # The loader draws a seed at the start of each epoch, so dropout would differ.
    return left_by(*run(None, *callbacks, module=lambda: Planned(dropout=0.0), **plan))


class Halved(Noisy):
    """One scheduler steps once per epoch, and the other one at each step."""

    def configure_optimizers(self) -> Any:
        optimizer = OPTIMIZERS["adamw"](self.parameters())
        halving = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1], 0.5)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
        return [optimizer], [halving, {"scheduler": cosine, "interval": "step"}]


@pytest.mark.filterwarnings(WARNING)
@pytest.mark.parametrize(("bad", "last"), [(17, 11), (15, 7)])  # behind an epoch's end, and in its last step
def test_schedulers_of_the_epoch_stay_in_their_epoch(bad: int, last: int) -> None:
    rewind = SpikeRewind()
    rewound = fit_plan(Halved, range(16), range(16, 32), bad=[bad], callbacks=[rewind])
    assert rewind.rewinds.last["back_to"] == last
    assert_identical(fit_plan(Halved, range(last + 1), range(max(bad + 1, 16), 32)), rewound)
    assert rewound["groups"][0]["lr"] < 0.5 * rewound["groups"][0]["initial_lr"]


@pytest.mark.filterwarnings("ignore:SpikeRewind goes back")
def test_going_back_over_the_end_of_an_epoch_repeats_no_order() -> None:
    orders: list[list[float]] = [[], [], []]

    class Shuffled(Noisy):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            orders[self.current_epoch] += batch[0][:, 0].tolist()
            bad = (self.current_epoch, batch_idx) == (1, 1)
            return super().training_step(batch, batch_idx) * (math.nan if bad else 1.0)

    def shuffled(dataset: Any, size: int) -> DataLoader[Any]:
        return DataLoader(dataset, size, shuffle=True)

    rewind = SpikeRewind()
    run(data(1.0), rewind, module=lambda: Shuffled(dropout=0.0), loader=shuffled, max_epochs=3)
    assert (rewind.rewinds.count, rewind.rewinds.last["back_to"]) == (1, 27)
    assert len({tuple(order) for order in orders}) == 3


@pytest.mark.filterwarnings(WARNING)
def test_copies_start_over_when_an_optimizer_is_given_more_parameters() -> None:
    class Part(Noisy):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.head.parameters(), lr=0.01)

        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                self.trainer.optimizers[0].add_param_group({"params": list(self.body.parameters())})

    rewind = SpikeRewind()
    rewound = fit_plan(Part, range(16), range(16, 32), bad=[18], callbacks=[rewind])
    assert rewind.rewinds.last["back_to"] == 15
    assert_identical(fit_plan(Part, range(16), range(19, 32)), rewound)


@pytest.mark.filterwarnings(WARNING)
@pytest.mark.filterwarnings("ignore:SkipNonFinite")
def test_memory_holds_no_copy_more_and_rows_hold_only_the_bad_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    rewind, held = SpikeRewind(copies=2), []

    def count(*run: Any) -> dict[str, Any]:
        held.append(len(rewind._copies))
        return take_copy(*run)

    monkeypatch.setattr("lightning_grad.callbacks.clipping.spike_rewind.take_copy", count)
    dataset = data(bad=[BAD])
    dataset.tensors[2][18 * BATCH] = math.nan  # SkipNonFinite skips this step
    run(dataset, SkipNonFinite(), rewind)
    assert held[:4] == [0, 1, 1, 1]
    row = rewind.rewinds.last
    assert row["samples"] == "84 85 86 87"
    norms = [each["norm"] for each in rewind.norms.kept if each["step"] < BAD]
    assert len(norms) == 20
    assert row["usual_norm"] == statistics.median(norms)


@pytest.mark.filterwarnings(WARNING)
def test_the_grad_scaler_goes_back_and_overflows_are_left_to_it() -> None:
    def fit(dataset: Any, *callbacks: Any) -> dict[str, Any]:
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=7)
        precision = MixedPrecision("16-mixed", "cpu", scaler)
        return {**left_by(*run(dataset, *callbacks, plugins=[precision])), "scaler": scaler.state_dict()}

    rewind, overflow = SpikeRewind(), data(1e3)
    overflow.tensors[2][5 * BATCH] = math.inf
    rewound = fit(overflow, rewind)
    assert [row["step"] for row in rewind.rewinds.kept] == [BAD]
    assert_identical(fit(without(overflow, range(16, BAD + 1))), rewound)
    assert rewound["scaler"]["scale"] != 8.0


@pytest.mark.filterwarnings(WARNING)
@pytest.mark.filterwarnings("ignore:.*use of fork\\(\\) may lead to deadlocks:DeprecationWarning")
def test_all_ranks_go_back_at_a_spike_on_one_of_them(tmp_path: Path) -> None:
    class Module(Noisy):
        samples: Any

        def on_train_end(self) -> None:
            torch.save(self.state_dict(), tmp_path / f"{len(self.trainer.train_dataloader)}_{self.global_rank}")

        def train_dataloader(self) -> Any:
            sampler = DistributedSampler(self.samples, 2, self.global_rank, shuffle=False)
            return DataLoader(self.samples, BATCH, sampler=sampler)

    for samples, callbacks in ((data(), [SpikeRewind()]), (Subset(data(), [*range(32), *range(88, 128)]), [])):
        pl.seed_everything(3, verbose=False)
        module = Module()
        module.samples = samples
        ranks = {"strategy": "ddp_fork", "devices": 2, "use_distributed_sampler": False}
        logger = CSVLogger(tmp_path / str(len(samples)), name="", version="")
        make_trainer(callbacks=callbacks, max_epochs=1, logger=logger, **ranks).fit(module)
    (row,) = csv.DictReader((tmp_path / "128" / "spike_rewind.csv").read_text().splitlines())
    assert (row["back_to"], row["samples"]) == ("3", "80 82 84 86 81 83 85 87")
    for rank in range(2):
        assert_identical(torch.load(tmp_path / f"9_{rank}"), torch.load(tmp_path / f"16_{rank}"))


@pytest.mark.filterwarnings("ignore:.*fit.ckpt_path=")
def test_after_an_exception_a_checkpoint_has_the_copies_and_memory_has_none(tmp_path: Path) -> None:
    class Fails(Noisy):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if batch_idx == 10:
                raise KeyError("stop")
            return super().training_step(batch, batch_idx)

    rewind = SpikeRewind()
    with pytest.raises(KeyError):
        run(data(1.0), rewind, OnExceptionCheckpoint(tmp_path), module=Fails)
    assert rewind._copies == []
    (path,) = tmp_path.glob("*.ckpt")
    assert len(torch.load(path)["callbacks"]["SpikeRewind"]["copies"]) == 2


def test_an_ordinary_run_and_one_with_clipping_in_front_are_told_apart() -> None:
    rewind = SpikeRewind()
    assert_identical(left_by(*run(data(1.0))), left_by(*run(data(1.0), rewind)))
    assert rewind.rewinds.count == 0
    assert rewind._copies == [], "they take no memory after the fit"
    from lightning_grad.callbacks import NormClipping

    with pytest.raises(ValueError, match=r"Write callbacks=\[SpikeRewind \(guard\), NormClipping \(clip\)\]"):
        run(data(), NormClipping(1.0), SpikeRewind())
