"""After a bad batch, the run is bit for bit the one that never had the batches since the copy."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_grad.callbacks import NMSparsity, SpikeRewind
from lightning_grad.functional import is_nm
from lightning_grad.testing import ResumableLoader, assert_identical, make_trainer, state_of

BATCH, BATCHES, BAD = 4, 32, 21  # the bad batch
WARNING = "ignore:SpikeRewind.* goes back to the weights"
OPTIMIZERS: dict[str, Any] = {
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
    saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
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
    with pytest.raises(RuntimeError, match=r"went back 3 times without 4 good steps.*Lower the learning rate"):
        run(bad, SpikeRewind(max_in_row=3))
    rewind = SpikeRewind(max_in_row=None)
    trainer, module = run(bad, rewind)
    assert rewind.rewinds.count == BATCHES - BAD
    assert_identical(left_by(trainer, module), left_by(*run(without(bad, range(16, BATCHES)))))


def test_an_ordinary_run_and_one_with_clipping_in_front_are_told_apart() -> None:
    rewind = SpikeRewind()
    assert_identical(left_by(*run(data(1.0))), left_by(*run(data(1.0), rewind)))
    assert rewind.rewinds.count == 0
    assert rewind._copies == [], "they take no memory after the fit"
    from lightning_grad.callbacks import NormClipping

    with pytest.raises(ValueError, match=r"Write callbacks=\[SpikeRewind \(guard\), NormClipping \(clip\)\]"):
        run(data(), NormClipping(1.0), SpikeRewind())
