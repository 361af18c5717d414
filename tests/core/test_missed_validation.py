"""A validation that was due when a checkpoint was written is run when the fit goes on from it."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_grad.core.missed_validation import is_validation_due, run_missed_validation
from lightning_grad.testing import fit, make_classifier

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


class Follow(pl.Callback):
    """Notes each validation of the fit, with its loss and the step at which loggers put it."""

    def __init__(self, mends: bool = True) -> None:
        self.mends = mends
        self.due = False
        self.seen: list[tuple[int, float]] = []
        self.ended: list[int] = []

    def state_dict(self) -> dict[str, Any]:
        return {"due": self.due, "seen": list(self.seen)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.due, self.seen = state_dict["due"], [tuple(row) for row in state_dict["seen"]]

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if self.due and self.mends:
            run_missed_validation(trainer, lambda: self.ended.append(len(self.seen)))

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.due = is_validation_due(trainer)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.due = False
            step = trainer.fit_loop.epoch_loop._batches_that_stepped
            self.seen.append((step, float(trainer.callback_metrics["val_loss"])))


@pytest.mark.parametrize(
    "arguments",
    [{}, {"val_check_interval": 2}, {"check_val_every_n_epoch": 2}, {"accumulate_grad_batches": 3}],
    ids=lambda arguments: next(iter(arguments), "plain"),
)
def test_every_checkpoint_leads_to_the_same_validations(arguments: dict[str, Any], tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=2)
    expected = Follow()
    _, module = fit([expected, saving], make_classifier(), resumable=True, max_epochs=3, **arguments)
    paths = sorted(tmp_path.glob("*.ckpt"), key=lambda path: torch.load(path, weights_only=True)["global_step"])
    missed = 0
    for path in paths[:-1]:  # behind the last step nothing is run
        resumed = Follow()
        _, other = fit([resumed], make_classifier(), resumable=True, ckpt=path, max_epochs=3, **arguments)
        assert resumed.seen == expected.seen, path.name
        assert all(torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters(), strict=True))
        missed += len(resumed.ended)
    assert missed > 0


def test_lightning_leaves_it_out(tmp_path: Path) -> None:
    expected = Follow()
    fit([expected, ModelCheckpoint(tmp_path, every_n_train_steps=6, save_top_k=-1)], resumable=True)
    resumed = Follow(mends=False)
    fit([resumed], resumable=True, ckpt=tmp_path / "epoch=1-step=12.ckpt")
    assert resumed.seen == [row for row in expected.seen if row[0] != 11]


def test_nothing_is_left_on_the_loop(tmp_path: Path) -> None:
    fit([Follow(), ModelCheckpoint(tmp_path, every_n_train_steps=6, save_top_k=-1)], resumable=True)
    trainer, _ = fit([Follow()], resumable=True, ckpt=tmp_path / "epoch=1-step=12.ckpt")
    assert "advance" not in vars(trainer.fit_loop.epoch_loop)


def test_it_can_be_taken_back(tmp_path: Path) -> None:
    class TakeBack(Follow):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            if self.due:
                run_missed_validation(trainer, lambda: None)()

    fit([Follow(), ModelCheckpoint(tmp_path, every_n_train_steps=6, save_top_k=-1)], resumable=True)
    path = tmp_path / "epoch=1-step=12.ckpt"
    state = torch.load(path, weights_only=True)
    state["callbacks"]["TakeBack"] = state["callbacks"].pop("Follow")
    torch.save(state, path)
    taken = TakeBack()
    fit([taken], resumable=True, ckpt=path)
    assert 11 not in [step for step, _ in taken.seen]
