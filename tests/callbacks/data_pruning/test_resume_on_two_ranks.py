"""What two ranks record is in the checkpoint of an epoch's end, so that the run resumed from it is bitwise the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_grad.callbacks import DataPruning, GradientNormSampling, InfoBatch
from lightning_grad.testing import assert_identical
from tests.callbacks.data_pruning.test_data_pruning import BATCH, Classifier, make_data, train

SAMPLES, EPOCHS = 22, 4


class Validated(Classifier):
    """Has validation, so that Lightning writes its checkpoints behind it, and not at the very end of the epoch."""

    def __init__(self) -> None:
        super().__init__(normalizes=False)

    def val_dataloader(self) -> Any:
        return DataLoader(make_data(8), BATCH)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])


class Write(pl.Callback):
    """Every rank writes what it ends with."""

    def __init__(self, callback: Any, path: Path) -> None:
        self.callback, self.path = callback, path

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        found = {
            "weights": dict(pl_module.state_dict()),
            "kept": self.callback.kept,
            "seen": self.callback._samples_seen,
            "steps": trainer.global_step,
        }
        torch.save(found, self.path.with_name(f"{self.path.name}-{trainer.global_rank}.pt"))


def fit(callback: Any, path: Path, more: Any = (), ckpt: Any = None) -> list[Any]:
    """Train on two ranks, and return what each of them has written."""
    arguments: Any = {
        "strategy": "ddp_fork",
        "devices": 2,
        "enable_checkpointing": bool(more),
        "num_sanity_val_steps": 0,
    }
    train(
        callback, Validated(), make_data(SAMPLES), EPOCHS, more=[Write(callback, path), *more], ckpt=ckpt, **arguments
    )
    return [torch.load(path.with_name(f"{path.name}-{rank}.pt"), weights_only=True) for rank in (0, 1)]


TECHNIQUES: dict[str, tuple[Callable[[], Any], int]] = {
    "norms": (GradientNormSampling, 1),
    "info": (lambda: InfoBatch(0.5, prune_until=1.0), 1),
    "aum": (lambda: DataPruning(0.5, "aum", epoch=2, num_shown=0, figure=False), 0),
    "vog": (lambda: DataPruning(0.5, "vog", epoch=3, checkpoints=3, num_shown=0, figure=False), 1),
    "less": (lambda: DataPruning(0.5, "less", epoch=3, checkpoints=3, num_shown=0, figure=False), 1),
}


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("at_epoch_end", [True, False], ids=["epoch end", "validation"])
@pytest.mark.parametrize("technique", TECHNIQUES)
def test_resume_is_bitwise(technique: str, at_epoch_end: bool, tmp_path: Path) -> None:
    make, epoch = TECHNIQUES[technique]
    saving = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=at_epoch_end)
    whole = fit(make(), tmp_path / "whole", [saving])
    resumed = fit(make(), tmp_path / "resumed", ckpt=tmp_path / f"epoch={epoch}.ckpt")
    assert len(whole[0]["kept"].unique()) < SAMPLES
    assert_identical(resumed, whole)
    assert_identical(whole[1], whole[0])
