"""Checkpoints and early stopping start over when the final pattern begins, and weights without it are named when tested."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import pytorch_lightning
import torch
from lightning.pytorch.callbacks import EarlyStopping, OnExceptionCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_grad.callbacks import NMSparsity
from lightning_grad.functional import is_nm
from lightning_grad.testing import ResumableLoader, assert_identical, make_trainer

EPOCHS, FINAL = 5, 16  # of 20 steps, after the 16th of which the final pattern holds by default


@functools.cache
def worsening(base: type) -> type:
    class Worsening(base):
        """Validates worse and worse, as a network may that is pruned: its best checkpoint is its first."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.log("train_score", -float(self.global_step))
            return F.mse_loss(self.net(batch[0]), batch[1])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("score", -float(self.global_step))
            self.log("misery", float(self.global_step))

        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.log("test_loss", F.mse_loss(self.net(batch[0]), batch[1]))

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=0.01)

    return Worsening


def data(kind: type = DataLoader) -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    return kind(TensorDataset(torch.randn(8, 8, generator=generator), torch.randn(8, 4, generator=generator)), 2)


def run(
    *callbacks: Any, validate: bool = True, ckpt: Any = None, package: Any = pl, **arguments: Any
) -> tuple[Any, pl.LightningModule]:
    saves = any(hasattr(callback, "best_k_models") for callback in callbacks)
    defaults = {"max_epochs": EPOCHS, "enable_checkpointing": saves, "num_sanity_val_steps": 0}
    trainer = make_trainer(package.Trainer, callbacks=list(callbacks), **{**defaults, **arguments})
    module = worsening(package.LightningModule)()
    trainer.fit(module, data(ResumableLoader), data() if validate else None, ckpt_path=ckpt)
    return trainer, module


def sparse(pattern: str = "1:4", **arguments: Any) -> NMSparsity:
    return NMSparsity(pattern, figure=False, include=["net.2"], **arguments)


def has_pattern(path: str | Path) -> bool:
    return is_nm(torch.load(path, weights_only=True)["state_dict"]["net.2.weight"], 1, 4)


def saving(folder: Path, package: Any = pl, **arguments: Any) -> Any:
    defaults = {"dirpath": folder, "monitor": "score", "mode": "max", "filename": "{step}"}
    return package.callbacks.ModelCheckpoint(**{**defaults, **arguments})


WHEN = [
    {},
    {"finetune_fraction": 0.3},  # begins in mid-epoch
    {"recipe": "sdgf-stepwise", "finetune_fraction": 0.3},
    {"recipe": "step", "dense_fraction": 0.5, "sr_ste_lambda": 0.1},
    {"recipe": [[0.0, "2:4"], [0.6, "1:4"]]},
]


@pytest.mark.parametrize("schedule", WHEN, ids=str)
@pytest.mark.parametrize(
    "often", [{}, {"val_check_interval": 1}, {"check_val_every_n_epoch": 2, "max_epochs": 10}], ids=str
)
def test_the_best_checkpoints_hold_the_final_pattern(schedule: Any, often: Any, tmp_path: Path) -> None:
    best, both = (
        saving(tmp_path / "a"),
        saving(tmp_path / "b", monitor="misery", mode="min", save_top_k=2, save_last=True),
    )
    run(sparse(**schedule), best, both, **often)
    assert len(both.best_k_models) <= 2
    for path in [best.best_model_path, *both.best_k_models, both.last_model_path]:
        assert has_pattern(path), path
    assert best.best_model_score == -min(both.best_k_models.values())
    dense = [path for path in (tmp_path / "a").iterdir() if not has_pattern(path)]
    assert dense, "what was best before stays on disk"


def test_a_checkpoint_between_two_validations_does_not_keep_the_old_value(tmp_path: Path) -> None:
    """Every second step is saved by the value of the last validation, which was one of dense weights."""
    best = saving(tmp_path, every_n_train_steps=2, save_top_k=1)
    run(sparse(finetune_fraction=0.45), best, check_val_every_n_epoch=2, max_epochs=8)
    assert has_pattern(best.best_model_path)
    assert best.best_model_score < -17.6, "the value of a validation that saw the pattern, which holds from step 18 on"


@pytest.mark.parametrize("package", [pl, pytorch_lightning])
def test_without_validation_monitors_restart_with_the_pattern(package: Any, tmp_path: Path) -> None:
    best = saving(tmp_path, package, monitor="train_score", every_n_train_steps=1)
    run(sparse(), best, validate=False, package=package)
    assert has_pattern(best.best_model_path)
    assert best.best_model_score == -(FINAL - 1), "the step after which the pattern holds is the first that counts"


def test_what_restarts_is_said_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain = saving(tmp_path / "plain", monitor=None, mode="min", save_top_k=-1)
    stopping = EarlyStopping("score", mode="max", patience=9)
    with caplog.at_level("INFO"):
        run(sparse(), saving(tmp_path), plain, stopping)
    lines = [record.message for record in caplog.records if "NMSparsity resets" in record.message]
    assert len(lines) == 1
    assert "ModelCheckpoint of 'score' (step=4.ckpt stays on disk)" in lines[0]
    assert "EarlyStopping of 'score'" in lines[0]
    assert len(list((tmp_path / "plain").iterdir())) == EPOCHS


@pytest.mark.parametrize("patience", [0, 1, 3])
def test_early_stopping_waits_for_the_pattern_and_then_stops(patience: int, caplog: pytest.LogCaptureFixture) -> None:
    stopping = EarlyStopping("score", mode="max", patience=patience)
    with caplog.at_level("INFO"):
        _, module = run(sparse(), stopping, max_epochs=10)
    assert is_nm(module.net[2].weight, 1, 4)
    assert stopping.stopped_epoch == (7 + max(patience, 1)) % 10, "the pattern begins after epoch 7"
    assert any("holds EarlyStopping until the final pattern has begun" in record.message for record in caplog.records)


def test_early_stopping_may_end_the_run_before_if_asked() -> None:
    stopping = EarlyStopping("score", mode="max", patience=1)
    with pytest.warns(UserWarning, match="before the final pattern was"):
        trainer, _ = run(sparse(restart_monitors=False), stopping)
    assert trainer.current_epoch == 2


def test_a_held_wait_count_does_not_outlive_the_fit() -> None:
    stopping = EarlyStopping("score", mode="max", patience=3)
    with pytest.warns(UserWarning, match="before the final pattern was"):
        run(sparse(), stopping, Stop(at=7))
    assert stopping.wait_count == 0


@pytest.mark.parametrize(
    "arguments", [{"pattern": "4:4"}, {"pattern": "4:4", "recipe": "sdgf-geometric"}, {"recipe": "ste"}], ids=str
)
def test_nothing_restarts_where_no_pattern_changes(
    arguments: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    best, stopping = saving(tmp_path), EarlyStopping("score", mode="max", patience=9)
    with caplog.at_level("INFO"):
        run(sparse(**arguments), best, stopping)
    assert best.best_model_score == -4
    assert stopping.wait_count == EPOCHS - 1
    assert not [record for record in caplog.records if "has begun" in record.message]


class Stop(pl.Callback):
    """Ends the run after a step, in the way that Ctrl-C does not."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.at


def books(best: Any, stopping: Any) -> dict[str, Any]:
    return {"best": best.state_dict(), "stopping": stopping.state_dict()}


@pytest.mark.parametrize("step", [4, 12, 15, 16, 17, 20])
def test_resuming_is_exact_before_at_and_after_the_restart(step: int, tmp_path: Path) -> None:
    folder = tmp_path / "best"

    def whole(**arguments: Any) -> Any:
        best = saving(folder, save_top_k=2)
        stopping = EarlyStopping("score", mode="max", patience=9)
        every = saving(tmp_path / "every", monitor=None, mode="min", every_n_train_steps=1, save_top_k=-1)
        _, module = run(sparse(), stopping, best, every, max_epochs=7, **arguments)
        return books(best, stopping), module.state_dict()

    expected = whole()
    path = tmp_path / f"step={step}.ckpt"
    shutil.copy(tmp_path / "every" / path.name, path)
    shutil.rmtree(folder)
    shutil.rmtree(tmp_path / "every")
    resumed = whole(ckpt=path)
    if step % 4:  # Lightning runs no validation that was due behind the last step of a checkpoint
        assert_identical(expected, resumed)
    assert_identical(expected[1], resumed[1])
    assert all(has_pattern(path) for path in resumed[0]["best"]["best_k_models"])


@pytest.mark.filterwarnings("ignore:.*was called without a model", "ignore:.*there is no last checkpoint")
def test_an_exception_before_the_restart_leaves_it_due(tmp_path: Path) -> None:
    class Fail(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 15:
                raise RuntimeError("lost")

    best = saving(tmp_path / "best")
    with pytest.raises(RuntimeError, match="lost"):
        run(sparse(), best, OnExceptionCheckpoint(tmp_path, "exception"), Fail())
    assert best.best_model_score == -4
    again = saving(tmp_path / "best")
    run(sparse(), again, ckpt=tmp_path / "exception.ckpt")
    assert has_pattern(again.best_model_path)


# Weights that are tested.


def test_weights_that_lack_the_pattern_are_named_when_tested(tmp_path: Path) -> None:
    every = saving(tmp_path, monitor=None, mode="min", save_top_k=-1)
    trainer, module = run(sparse(), every)
    words = r"1 of its 1 weights are not sparse in the checkpoint .*step=4.ckpt \(net.2.weight\)"
    with pytest.warns(UserWarning, match=words):
        trainer.test(module, data(), ckpt_path=tmp_path / "step=4.ckpt", verbose=False)
    with pytest.warns(UserWarning, match=words):
        trainer.validate(module, data(), ckpt_path=tmp_path / "step=4.ckpt", verbose=False)
    fresh = make_trainer(
        callbacks=[sparse(), saving(tmp_path, monitor=None, mode="min", save_top_k=-1)], enable_checkpointing=True
    )  # another process: the checkpoint says what the run had
    with pytest.warns(UserWarning, match=words):
        fresh.test(worsening(pl.LightningModule)(), data(), ckpt_path=tmp_path / "step=4.ckpt", verbose=False)
    with pytest.warns(UserWarning, match="not sparse in the module"):
        trainer.test(worsening(pl.LightningModule)(), data(), verbose=False)


def test_weights_that_have_the_pattern_are_not_talked_of(tmp_path: Path) -> None:
    best = saving(tmp_path)
    trainer, module = run(sparse(), best)
    trainer.test(module, data(), verbose=False)
    trainer.test(module, data(), ckpt_path="best", verbose=False)
    trainer.validate(module, data(), ckpt_path=best.best_model_path, verbose=False)
    dense = NMSparsity("4:4", include=["net.2"], figure=False)
    trainer, module = run(dense)
    trainer.test(worsening(pl.LightningModule)(), data(), verbose=False)
