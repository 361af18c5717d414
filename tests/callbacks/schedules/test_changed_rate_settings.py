"""AccuracyGradientLR resumed with other settings: each is followed, or refused with a way out."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_grad.callbacks import AccuracyGradientLR
from lightning_grad.testing import ResumableLoader, make_trainer
from tests.callbacks.schedules.dictated import BATCHES, QUICK, Dictated, Rates, data, train

RATE, EPOCHS = 0.1, 6  # by QUICK a constant accuracy is cut after epochs 4 and 6


class TwoMetrics(Dictated):
    """Logs a constant accuracy, and a loss that falls by 0.1 with each validation."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.log("val_loss", 9.0 - 0.1 * self.trainer.current_epoch)
        self.log("rising", 0.1 * self.trainer.current_epoch)


def resumed(
    folder: Path, before: dict[str, Any], after: dict[str, Any], module: Any = TwoMetrics, more: int = 6
) -> Any:
    """Train six epochs with some settings and more with others; return the callback and the rate of each further epoch."""
    first = AccuracyGradientLR(**{**QUICK, **before})
    trainer, _ = train([first], module(), max_epochs=EPOCHS)
    trainer.save_checkpoint(folder / "first.ckpt")
    callback = AccuracyGradientLR(**{**QUICK, **after})
    _, rates = train([callback], module(), ckpt=folder / "first.ckpt", max_epochs=EPOCHS + more)
    return callback, rates.first()[::BATCHES]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr("lightning_grad.core.callback.rank_zero_info", lines.append)
    monkeypatch.setattr("lightning_grad.utilities.arguments.rank_zero_info", lines.append)
    return lines


def scales(cuts_after: list[int], factor: float = 0.5) -> list[float]:
    """Return the rate of epochs 7 to 12, of which some cuts come after; two cuts were before."""
    return [RATE * 0.25 * factor ** sum(cut < epoch for cut in cuts_after) for epoch in range(7, 13)]


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        ({}, scales([8, 10, 12])),
        ({"factor": 0.1}, scales([8, 10, 12], 0.1)),
        ({"cooldown": 4}, scales([10])),
        ({"window": 5}, scales([8, 10, 12])),
        ({"window": 9}, scales([11])),
        ({"start_after": 9}, scales([10, 12])),
        ({"threshold": -1.0}, scales([])),
        ({"min_lr": RATE * 0.25 * 0.5}, scales([8])),
        ({"min_lr": 0.0}, scales([8, 10, 12])),
    ],
    ids=str,
)
def test_settings_of_the_rule_hold_from_then_on(after, expected, tmp_path, said):
    _, rates = resumed(tmp_path, {"min_lr": RATE * 0.2}, after)
    assert rates == pytest.approx(expected)
    assert [line for line in said if "resumes with changed settings" in line and "min_lr" in line]


def test_reaching_what_is_enough_is_asked_from_then_on(tmp_path):
    callback, rates = resumed(tmp_path, {}, {"stop_at": 0.4})
    assert len(rates) == 1
    assert len(callback.state_dict()["values"]) == EPOCHS + 1


@pytest.mark.parametrize(("mode", "expected"), [("max", scales([])), ("min", scales([8, 10, 12]))])
def test_the_direction_is_that_of_all_observations(mode, expected, tmp_path):
    """Of a rising metric; by the threshold of 0.005 nothing is cut while it is to rise."""
    rising = {"monitor": "rising", "threshold": 0.005}
    _, rates = resumed(tmp_path, {"monitor": "rising", "threshold": 9.0}, {**rising, "mode": mode})
    assert rates == pytest.approx(expected)


def test_another_metric_restarts_the_observations(tmp_path, said):
    """Naively a loss of 8 follows accuracies of 0.5, and the mean of both decides."""
    callback, rates = resumed(tmp_path, {}, {"monitor": "val_loss", "mode": "min", "threshold": 9.0})
    state = callback.state_dict()
    assert state["values"] == pytest.approx([8.4, 8.3, 8.2, 8.1, 8.0, 7.9])
    # Four new observations until the first cut, and the cuts of before stay.
    assert rates == pytest.approx(scales([10, 12]))
    assert state["cuts"] == 2 + sum(row["cut"] for row in callback.record.rows()) > 2
    assert [line for line in said if "restarts its observations, because monitor changed" in line]


def test_another_interval_restarts_the_observations(tmp_path, said):
    callback, rates = resumed(tmp_path, {}, {"interval": "epoch"})
    assert len(callback.state_dict()["values"]) == 6
    assert rates == pytest.approx(scales([10, 12]))
    assert [line for line in said if "because interval changed" in line]


def test_cuts_of_before_are_counted_and_the_table_has_the_new_observations(tmp_path):
    first = AccuracyGradientLR(**QUICK)
    trainer, _ = train([first], TwoMetrics(), max_epochs=EPOCHS)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    callback = AccuracyGradientLR("val_loss", "min", **{**QUICK, "threshold": 9.0})
    trainer, _ = train([callback], TwoMetrics(), ckpt=tmp_path / "first.ckpt", max_epochs=EPOCHS + 4)
    assert trainer.callback_metrics["lr/cuts"] == 3.0


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [("policy", "multiply", "replace"), ("optimizers", None, [0]), ("param_groups", [0], [1])],
)
def test_what_cannot_change_is_refused_with_a_way_out(name, before, after, tmp_path):
    def two_groups(parameters: list[Any]) -> Any:
        return torch.optim.SGD([{"params": [parameter]} for parameter in parameters], lr=RATE)

    class Grouped(Dictated):
        def __init__(self) -> None:
            super().__init__(configure=two_groups)

    with pytest.raises(ValueError, match=f"cannot resume with {name}=.*Set {name}=") as error:
        resumed(tmp_path, {name: before}, {name: after}, Grouped)
    assert repr(before) in str(error.value)
    callback, rates = AccuracyGradientLR(**QUICK, **{name: before}), Rates()
    trainer = make_trainer(callbacks=[callback, rates], max_epochs=EPOCHS + 1)
    trainer.fit(Grouped(), ResumableLoader(data(), 1), ResumableLoader(data(1), 1), ckpt_path=tmp_path / "first.ckpt")
    assert len(callback.state_dict()["values"]) == EPOCHS + 1
