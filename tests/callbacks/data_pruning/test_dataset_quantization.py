"""``select="dq"`` keeps an even share of bins of the last layer's inputs, and refuses settings that it ignores."""

import csv
import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.nn import functional as F

from lightning_grad.callbacks import DataPruning
from lightning_grad.data import load_scores
from lightning_grad.functional import dataset_quantization, select_samples
from tests.callbacks.data_pruning.test_data_pruning import (
    CLASSES,
    Classifier,
    Fixed,
    Manual,
    make_data,
    scores_of,
    train,
)


def pruning(prune: Any = 0.5, **arguments: Any) -> DataPruning:
    given: dict[str, Any] = {"select": "dq", "epoch": 1, "num_shown": 0, "figure": False, "strata": 4}
    return DataPruning(prune, **{**given, **arguments})


@pytest.mark.parametrize("balance", [None, "class"])
def test_an_even_share_of_each_bin_is_kept(balance: Any, tmp_path: Path) -> None:
    path = tmp_path / "places.npz"
    callback = pruning(balance=balance, save_scores=str(path), seed=3)
    values, module = scores_of(callback)
    x, y, _ = make_data().tensors
    labels = y if balance else None
    expected = dataset_quantization(module.body(x).detach(), 4, labels)
    torch.testing.assert_close(values, expected, rtol=0, atol=0)
    kept = select_samples(expected, 11, rule="dq", strata=4, seed=3, labels=labels, balance=balance)
    assert callback.scored is not None
    assert torch.equal(callback.scored.kept, kept)
    assert callback.scored.name == "dq"
    assert torch.equal(callback.scored.labels, y)
    assert torch.equal(callback.scored.predictions, module(x).argmax(1))
    assert torch.equal(load_scores(path).values, expected)


def test_ten_bins_by_default() -> None:
    values, module = scores_of(pruning(strata=None))
    assert torch.equal(values, dataset_quantization(module.body(make_data().tensors[0]).detach(), 10))
    assert DataPruning(select="ccs").num_strata == 50


class Regression(Classifier):
    """Learns numbers, so its samples have no classes."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, _ = batch
        return F.mse_loss(self(x), F.one_hot(y, CLASSES).float())


def test_a_loss_without_classes() -> None:
    callback = pruning()
    values, module = scores_of(callback, Regression())
    assert torch.equal(values, dataset_quantization(module.body(make_data().tensors[0]).detach(), 4))
    assert callback.scored is not None
    assert callback.scored.labels is None


def test_rounds_prune_more_and_more() -> None:
    found = train(pruning([0.2, 0.6], epoch=[1, 2]), epochs=3)
    assert [len(epoch) for epoch in found.watch.epochs] == [22, 18, 9 + 1]  # no last batch of one


def test_a_resumed_run_draws_from_the_same_bins(tmp_path: Path) -> None:
    half = train(pruning(), epochs=2)
    half.trainer.save_checkpoint(tmp_path / "half.ckpt")
    known = half.trainer.callbacks[1].scored
    for arguments, same in (({"prune": 0.3}, True), ({"strata": 3}, False), ({"seed": 1}, False)):
        callback = pruning(**arguments)
        train(callback, epochs=3, ckpt=tmp_path / "half.ckpt")
        assert callback.scored is not None
        assert (callback.scored.epoch == known.epoch) == same, arguments
        assert torch.equal(callback.scored.values, known.values) == same or "seed" in arguments


def test_the_report_has_label_errors(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name=None, version="")
    callback = pruning(0.0, num_shown=2, figure=True)
    train(callback, logger=logger)
    assert callback.scored is not None
    with (tmp_path / "data_pruning_epoch1_label_errors.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["index"]) for row in rows] == callback.scored.label_errors.tolist()
    assert (tmp_path / "data_pruning_epoch1_scores.png").exists()


class Write(pl.Callback):
    def __init__(self, callback: DataPruning, folder: Path) -> None:
        self.callback, self.folder = callback, folder

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        scored: Any = self.callback.scored
        path = self.folder / f"{trainer.world_size}-{trainer.global_rank}.json"
        path.write_text(json.dumps([scored.values.tolist(), scored.kept.tolist()]))


def test_ranks_have_the_same_bins(tmp_path: Path) -> None:
    for more in ({}, {"strategy": "ddp_fork", "devices": 2}):
        callback = pruning()
        train(callback, Fixed(), make_data(20), more=[Write(callback, tmp_path)], **more)
    alone, first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1-0", "2-0", "2-1"))
    assert first == second
    assert alone == first


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"score": "grand"}, "score"),
        ({"score_fn": lambda module, batch: batch[0][:, 0]}, "score_fn"),
        ({"score_files": ["scores.npz"]}, "score_files"),
        ({"keep": "easy"}, "keep"),
        ({"keep": "random"}, "keep"),
        ({"offset": 0.1}, "offset"),
        ({"class_floor": 0.1}, "class_floor"),
        ({"loss_fn": lambda module, batch: batch[0][:, 0]}, "loss_fn"),
        ({"scores_by": "sample"}, "scores_by"),
    ],
)
def test_settings_without_effect_are_refused(arguments: Any, name: str) -> None:
    with pytest.raises(
        ValueError, match=f"bins of the features of the last layer, so {name} has no effect. Leave {name}"
    ):
        pruning(**arguments)


def test_what_cannot_work() -> None:
    with pytest.raises(ValueError, match="DataPruning with select='dq' does not work with manual optimization"):
        train(pruning(), Manual())
    with pytest.raises(ValueError, match="strata must be at least 1; got 0"):
        pruning(strata=0)

    class Tied(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) @ self.head.weight.T

    with pytest.raises(ValueError, match=r"DataPruning needs the features of the last layer .* nn\.Linear"):
        train(pruning(), Tied())


def test_features_of_a_pretrained_network_can_be_used_at_once() -> None:
    callback = pruning(epoch=0)
    values, module = scores_of(callback, epochs=1)
    assert torch.equal(values, dataset_quantization(module.body(make_data().tensors[0]).detach(), 4))
