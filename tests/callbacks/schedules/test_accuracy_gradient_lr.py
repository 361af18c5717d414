"""AccuracyGradientLR: what is an observation, when it cuts, what it says and leaves, resuming, ranks."""

import copy
import csv
import math
import pickle
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import pytorch_lightning
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch.utils.data import DataLoader, IterableDataset

from lightning_grad.callbacks import AdversarialEvaluation
from lightning_grad.callbacks.schedules import accuracy_gradient_lr
from lightning_grad.callbacks.schedules._rate_figure import draw_rates
from lightning_grad.callbacks.schedules.accuracy_gradient_lr import AccuracyGradientLR
from lightning_grad.functional.schedules.accuracy_gradient_lr import accuracy_gradient, accuracy_gradient_scales
from lightning_grad.testing import assert_identical, fit, loaders, make_classifier, make_trainer, state_of
from lightning_grad.utilities import reporting
from tests.callbacks.schedules.dictated import BATCHES, QUICK, Dictated, Rates, data, train

RISES_THEN_STAYS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]
NOISY = [0.1, 0.5, 0.3, 0.35, 0.5, 0.45, 0.62, 0.6, 0.58, 0.57]


def expected_epochs(values: list[float], **settings: Any) -> list[float]:
    """Return the rate of each epoch: that of the observation before it."""
    return [0.1 * scale for scale in [1.0, *accuracy_gradient_scales(values, **settings)][: len(values)]]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return what is told by rank_zero_info."""
    messages: list[str] = []
    monkeypatch.setattr(accuracy_gradient_lr, "rank_zero_info", messages.append)
    return messages


# When it cuts.


@pytest.mark.parametrize("values", [[0.5] * 10, RISES_THEN_STAYS, NOISY, [0.9 - v for v in NOISY]])
@pytest.mark.parametrize(
    "settings",
    [QUICK, {**QUICK, "window": 1}, {**QUICK, "cooldown": 3, "threshold": 0.05}, {**QUICK, "start_after": 5}],
)
def test_rates_follow_the_rule(settings: dict[str, Any], values: list[float]) -> None:
    _, rates = train([AccuracyGradientLR(**settings)], Dictated(values))
    assert rates.epochs() == pytest.approx(expected_epochs(values, **settings), rel=1e-12)
    assert rates.first() == [rate for rate in rates.epochs() for _ in range(BATCHES)], "never within an epoch"


def test_by_default_a_constant_accuracy_cuts_after_validations_7_12_and_17() -> None:
    trainer, rates = train([AccuracyGradientLR()], max_epochs=19)
    assert rates.epochs() == pytest.approx([0.1] * 7 + [0.08] * 5 + [0.064] * 5 + [0.0512] * 2)
    assert trainer.callback_metrics["lr/cuts"] == 3


def test_of_a_loss_smaller_is_better() -> None:
    values = [1.0 - value for value in NOISY]
    _, rates = train([AccuracyGradientLR(mode="min", **QUICK)], Dictated(values))
    assert rates.epochs() == pytest.approx(expected_epochs([-value for value in values], **QUICK))
    _, other = train([AccuracyGradientLR(mode="max", **QUICK)], Dictated(values))
    assert other.epochs() != rates.epochs()


def test_factor_one_changes_no_bit() -> None:
    one = state_of(*fit([AccuracyGradientLR(factor=1.0, window=1, cooldown=1, threshold=9.0, min_lr=9.0)]))
    other = state_of(*fit([]))
    assert_identical(one, other)


# What is an observation.


def test_the_sanity_check_and_validate_are_none() -> None:
    callback = AccuracyGradientLR(**QUICK)
    trainer, rates = train([callback], num_sanity_val_steps=2)
    assert rates.epochs() == expected_epochs([0.5] * 10, **QUICK)
    before = copy.deepcopy(callback.state_dict())
    assert len(before["values"]) == 10
    trainer.validate(trainer.lightning_module, DataLoader(data(1), 1), verbose=False)
    assert_identical(callback.state_dict(), before)
    other = AccuracyGradientLR("nothing")
    make_trainer(callbacks=[other]).validate(NeverFitted(), DataLoader(data(1), 1), verbose=False)


class NeverFitted(Dictated):
    def accuracy(self) -> float:
        return 0.5


def test_each_of_several_validations_of_an_epoch_is_one() -> None:
    callback = AccuracyGradientLR(**QUICK)
    _, rates = train([callback], Dictated(NOISY, every=2), val_check_interval=2, max_epochs=5)
    assert callback.state_dict()["values"] == pytest.approx(NOISY)
    assert rates.first()[::2] == pytest.approx(expected_epochs(NOISY, **QUICK))
    assert [row["epoch"] for row in callback.record.rows()] == [0.5 * number for number in range(1, 11)]


def test_validating_every_second_epoch_gives_the_same_cuts_by_validations() -> None:
    callback = AccuracyGradientLR(**QUICK)
    module = Dictated([value for value in NOISY for _ in range(2)])
    _, rates = train([callback], module, check_val_every_n_epoch=2, max_epochs=20)
    assert callback.state_dict()["values"] == pytest.approx(NOISY)
    assert rates.epochs()[::2] == pytest.approx(expected_epochs(NOISY, **QUICK))
    assert rates.epochs()[1::2] == rates.epochs()[::2]


def test_a_value_that_was_not_logged_anew_is_none() -> None:
    """Lightning keeps the old one among its metrics."""
    callback = AccuracyGradientLR(**QUICK)
    values = [value for value in NOISY for value in (value, None)]
    trainer, rates = train([callback], Dictated(values), max_epochs=20)
    assert "val_acc" in trainer.callback_metrics
    assert callback.state_dict()["values"] == pytest.approx(NOISY)
    assert rates.epochs()[1::2] == pytest.approx([*expected_epochs([*NOISY, 0.0], **QUICK)[1:]])


def test_values_that_are_not_finite_are_ignored_and_told_once() -> None:
    values = [math.nan, *NOISY[:3], math.inf, math.nan, *NOISY[3:]]
    callback = AccuracyGradientLR(**QUICK)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, rates = train([callback], Dictated(values), max_epochs=len(values))
    said = [str(warning.message) for warning in caught if "AccuracyGradientLR" in str(warning.message)]
    assert said == ["AccuracyGradientLR: val_acc is nan; non-finite values are ignored."]
    assert callback.state_dict()["values"] == pytest.approx(NOISY)
    assert rates.epochs()[6:] == pytest.approx(expected_epochs(NOISY, **QUICK)[3:])


def test_a_value_that_was_not_finite_was_logged_all_the_same() -> None:
    callback = AccuracyGradientLR(**QUICK)
    with pytest.warns(UserWarning, match="val_acc is nan"):
        train([callback], Dictated([math.nan, None, 0.5]), max_epochs=4)
    assert callback.state_dict()["values"] == [0.5, 0.5]


# One observation an epoch.


class LogsInTraining(Dictated):
    """Logs a metric in its steps, and another at the end of an epoch."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("train_acc", self.at_epoch() + 0.01 * (batch_idx - 1.5), on_step=True, on_epoch=True)
        return super().training_step(batch, batch_idx)

    def on_train_epoch_end(self) -> None:
        if not math.isnan(self.at_epoch()):
            self.log("own_acc", self.at_epoch())

    def at_epoch(self) -> float:
        return self.accuracies[min(self.current_epoch, len(self.accuracies) - 1)]


@pytest.mark.parametrize("monitor", ["train_acc", "train_acc_epoch", "own_acc", "val_acc"])
def test_an_epoch_is_an_observation_of_whatever_was_logged(monitor: str) -> None:
    callback = AccuracyGradientLR(monitor, interval="epoch", **QUICK)
    _, rates = train([callback], LogsInTraining(NOISY))
    assert callback.state_dict()["values"] == pytest.approx(NOISY)
    assert rates.epochs() == pytest.approx(expected_epochs(NOISY, **QUICK))


def test_an_epoch_needs_no_validation() -> None:
    callback = AccuracyGradientLR("own_acc", interval="epoch", **QUICK)
    train([callback], LogsInTraining(NOISY), limit_val_batches=0)
    assert callback.state_dict()["values"] == pytest.approx(NOISY)


def test_an_epoch_without_a_new_value_is_none() -> None:
    callback = AccuracyGradientLR(interval="epoch", **QUICK)
    _, rates = train(
        [callback], LogsInTraining([v for v in NOISY for _ in range(2)]), check_val_every_n_epoch=2, max_epochs=20
    )
    assert callback.state_dict()["values"] == pytest.approx(NOISY)
    assert rates.epochs()[::2] == pytest.approx(expected_epochs(NOISY, **QUICK))
    own = AccuracyGradientLR("own_acc", interval="epoch", **QUICK)
    train([own], LogsInTraining([v for v in NOISY[:5] for v in (v, math.nan)]))
    assert own.state_dict()["values"] == pytest.approx(NOISY[:5])


def test_of_several_validations_an_epoch_observes_the_last() -> None:
    callback = AccuracyGradientLR(interval="epoch", **QUICK)
    train([callback], Dictated(NOISY, every=2), val_check_interval=2, max_epochs=5)
    assert callback.state_dict()["values"] == pytest.approx(NOISY[1::2])


def test_callbacks_that_monitor_come_after_it() -> None:
    callback = AccuracyGradientLR("own_acc", interval="epoch", **QUICK)
    stop = EarlyStopping("lr/cuts", mode="max", stopping_threshold=1.5, patience=99, check_on_train_epoch_end=True)
    trainer, _ = train([stop, callback], LogsInTraining([0.5] * 10))
    assert trainer.current_epoch == 6


# What cannot work is said.


@pytest.mark.parametrize("arguments", [{"interval": "epoch"}, {"num_sanity_val_steps": 0}], ids=str)
def test_an_unknown_metric_is_said_after_the_first_time(arguments: dict[str, Any]) -> None:
    said = r"monitor='val_ac' is not logged. Logged metrics: .*val_acc.* Did you mean 'val_acc'\?"
    interval, seen = arguments.pop("interval", "validation"), Rates()
    with pytest.raises(RuntimeError, match=said):
        train([AccuracyGradientLR("val_ac", interval=interval), seen], **arguments)
    assert len(seen.seen) == BATCHES


def test_an_unknown_metric_is_refused_once_the_sanity_check_has_logged_others() -> None:
    seen = Rates()
    with pytest.raises(
        ValueError, match=r"monitor='val_ac' is not logged. Logged metrics: val_acc. Did you mean 'val_acc'"
    ):
        train([AccuracyGradientLR("val_ac"), seen])
    assert not seen.seen, "no batch was trained"


class NotInTheSanityCheck(Dictated):
    """Logs its accuracy in real validations, and another metric in all."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", 1.0)
        if not self.trainer.sanity_checking:
            super().validation_step(batch, batch_idx)


def test_a_metric_that_the_sanity_check_lacks_has_a_way_out() -> None:
    with pytest.raises(ValueError, match="if only in later validations, set num_sanity_val_steps=0"):
        train([AccuracyGradientLR(**QUICK)], NotInTheSanityCheck())
    callback = AccuracyGradientLR(**QUICK)
    train([callback], NotInTheSanityCheck(), num_sanity_val_steps=0)
    assert len(callback.state_dict()["values"]) == 10


@pytest.mark.parametrize("interval", ["validation", "epoch"])
@pytest.mark.parametrize("sanity", [0, 2])
def test_the_accuracy_under_attack_asks_for_the_callback_that_logs_it(sanity: int, interval: str) -> None:
    seen, callback = Rates(), AccuracyGradientLR("adversarial/val_acc", interval=interval)
    with pytest.raises(ValueError, match=r"logged by AdversarialEvaluation.*Add AdversarialEvaluation\(\)"):
        train([callback, seen], num_sanity_val_steps=sanity)
    assert not seen.seen, "no batch was trained"


class LossOfItsData(pl.LightningModule):
    """Its loss depends on its data, so that they can be attacked."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch[0]).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.training_step(batch, batch_idx)
        self.log("val_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("sanity", [0, 2])
def test_the_accuracy_under_attack_is_observed_beside_that_callback(sanity: int) -> None:
    for every, observed in ((1, 4), (2, 2)):
        callback = AccuracyGradientLR("adversarial/val_loss", mode="min", **QUICK)
        evaluation = AdversarialEvaluation(0.1, steps=1, every_n_validations=every)
        train([evaluation, callback], LossOfItsData(), max_epochs=4, num_sanity_val_steps=sanity)
        assert len(callback.state_dict()["values"]) == observed


def test_a_key_of_the_modules_own_in_that_namespace_is_seen_in_the_sanity_check() -> None:
    callback = AccuracyGradientLR("adversarial/mine", **QUICK)
    train([callback], Dictated(key="adversarial/mine"))
    assert len(callback.state_dict()["values"]) == 10


def test_it_says_what_it_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("lightning_grad.core.callback.rank_zero_info", said.append)
    train([AccuracyGradientLR(start_after=9, name="a")], max_epochs=1)
    assert said == [
        "AccuracyGradientLR[a] multiplies the learning rate by 0.8 when the mean of 'val_acc' over 5 observations improves "
        "by less than 0.005: at each validation, from observation 10 on."
    ]


def test_barebones_is_refused_before_the_first_batch() -> None:
    with pytest.raises(ValueError, match=r"Trainer\(barebones=True\) turns logging off"):
        pl.Trainer(accelerator="cpu", max_epochs=1, barebones=True, callbacks=[AccuracyGradientLR()]).fit(
            Dictated(), DataLoader(data(), 1), DataLoader(data(1), 1)
        )


def test_where_nothing_is_logged_that_is_said() -> None:
    with pytest.raises(RuntimeError, match="Logged metrics: none"):
        train([AccuracyGradientLR()], Dictated([None]))


def test_the_name_that_lightning_made_of_it_is_found() -> None:
    class TwoLoaders(Dictated):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            super().validation_step(batch, batch_idx)

    trainer = make_trainer(callbacks=[AccuracyGradientLR()])
    with pytest.raises(ValueError, match="Did you mean 'val_acc/dataloader_idx_0' or 'val_acc/dataloader_idx_1'"):
        trainer.fit(TwoLoaders(), DataLoader(data(), 1), [DataLoader(data(1), 1), DataLoader(data(1), 1)])


class PutsNumbers(pl.Callback):
    """Puts a metric among those of the Trainer by hand, as a number and not as a tensor."""

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.callback_metrics["by_hand"] = 0.5 + trainer.current_epoch / 10


def test_a_metric_may_be_a_number_that_a_callback_has_put_there() -> None:
    callback = AccuracyGradientLR("by_hand", window=1)
    train([PutsNumbers(), callback], max_epochs=3)
    assert callback.state_dict()["values"] == [0.5, 0.6, 0.7]


def test_a_metric_of_training_asks_for_epochs() -> None:
    with pytest.raises(
        ValueError, match=r"'train_acc' is not logged.*If the module logs it in training, set interval="
    ):
        train([AccuracyGradientLR("train_acc")], LogsInTraining())
    with pytest.raises(
        RuntimeError, match=r"'train_acc' is logged in training, not in validation. Set interval='epoch'"
    ):
        train([AccuracyGradientLR("train_acc")], LogsInTraining(), num_sanity_val_steps=0)


def test_a_validation_metric_may_come_in_a_later_epoch() -> None:
    callback = AccuracyGradientLR(interval="epoch", **QUICK)
    train([callback], check_val_every_n_epoch=3)
    assert callback.state_dict()["values"] == [0.5] * 3
    with pytest.raises(RuntimeError, match="monitor='nothing' is not logged"):
        train([AccuracyGradientLR("nothing", interval="epoch")], check_val_every_n_epoch=3)


class NoValidation(pl.LightningModule):
    training_step = Dictated.training_step
    configure_optimizers = Dictated.configure_optimizers
    weights, configure = (), None


def test_without_validation_nothing_starts() -> None:
    said = "observes 'val_acc' at validations, and this fit has none"
    with pytest.raises(ValueError, match=said):
        train([AccuracyGradientLR()], limit_val_batches=0)
    with pytest.raises(ValueError, match=said):
        make_trainer(callbacks=[AccuracyGradientLR()]).fit(Dictated(), DataLoader(data(), 1))
    with pytest.raises(ValueError, match=said), pytest.warns(UserWarning, match="Total length of `list`"):
        make_trainer(callbacks=[AccuracyGradientLR()]).fit(Dictated(), DataLoader(data(), 1), [])
    with pytest.raises(ValueError, match=said), pytest.warns(UserWarning, match="have no `validation_step`"):
        train([AccuracyGradientLR()], NoValidation())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"mode": "mx"}, "Did you mean 'max'"),
        ({"window": 0}, "window must be at least 1"),
        ({"window": 2.5}, "window must be an integer"),
        ({"cooldown": -1}, "cooldown must be at least 0"),
        ({"threshold": math.nan}, "threshold must be"),
        ({"factor": 0.0}, "factor must be above 0"),
        ({"factor": 1.1}, "factor must be from 0 to 1"),
        ({"min_lr": -1e-6}, "min_lr must be at least 0"),
        ({"start_after": -1}, "start_after must be at least 0"),
        ({"policy": "replaces"}, "Did you mean 'replace'"),
        ({"interval": "epochs"}, "Did you mean 'epoch'"),
        ({"stop_at": math.nan}, "stop_at must be"),
        ({"optimizers": []}, "optimizers must hold at least one index"),
        ({"optimizers": [-1]}, "optimizers must be at least 0"),
        ({"param_groups": [0, 0]}, "param_groups must not hold an index twice"),
        ({"param_groups": ["0"]}, "a list of integers"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises((TypeError, ValueError), match=said):
        AccuracyGradientLR(**arguments)


@pytest.mark.parametrize("arguments", [{"optimizers": [1]}, {"param_groups": [0, 1]}])
def test_what_is_not_there_is_said_before_the_first_batch(arguments: dict[str, Any]) -> None:
    seen = Rates()
    with pytest.raises(ValueError, match=r"must hold indices below 1, because .* has 1; got .*1\]. Remove 1"):
        train([AccuracyGradientLR(**arguments), seen])
    assert seen.seen == []


def test_a_module_without_optimizer_is_refused() -> None:
    module = Dictated(configure=lambda parameters: None)
    with (
        pytest.warns(UserWarning, match="`LightningModule.configure_optimizers` returned `None`"),
        pytest.raises(ValueError, match="configure_optimizers returns no optimizer"),
    ):
        train([AccuracyGradientLR()], module)


# What it says and leaves.


def test_each_cut_is_told(told: list[str]) -> None:
    train([AccuracyGradientLR(min_lr=0.025, **QUICK)])
    after = "the mean of val_acc gained 0, less than 0.005."
    assert told == [
        f"AccuracyGradientLR cuts the learning rate from 0.1 to 0.05 after observation 4 (epoch 4): {after}",
        f"AccuracyGradientLR cuts the learning rate from 0.05 to 0.025 after observation 6 (epoch 6): {after}",
        "AccuracyGradientLR: the learning rate is at its floor, min_lr=0.025.",
    ]


@pytest.mark.parametrize(("mode", "stop_at"), [("max", 0.4), ("min", 0.6)])
def test_training_stops_when_it_has_reached(mode: Any, stop_at: float, told: list[str]) -> None:
    values = RISES_THEN_STAYS if mode == "max" else [1.0 - value for value in RISES_THEN_STAYS]
    callback = AccuracyGradientLR(mode=mode, stop_at=stop_at - (1e-6 if mode == "max" else -1e-6), **QUICK)
    trainer, _ = train([callback], Dictated(values), min_epochs=6)
    assert trainer.current_epoch == 6
    assert [text for text in told if "reached" in text] == [
        f"AccuracyGradientLR: val_acc has reached {stop_at:g}: training stops."
    ]
    assert train([callback], Dictated(values))[0].current_epoch == 4


def rows_of(folder: Path, *keys: str) -> list[dict[str, float]]:
    """Return the logged rows that hold the first key."""
    text = (folder / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    rows = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(text)]
    return [row for row in rows if keys[0] in row]


def test_gradient_scale_and_cuts_are_logged(tmp_path: Path) -> None:
    train([AccuracyGradientLR(**QUICK)], Dictated(NOISY), logger=CSVLogger(tmp_path))
    *rows, last = rows_of(tmp_path, "lr/scale")  # the last is what a summary gets
    scales = accuracy_gradient_scales(NOISY, **QUICK)
    assert [row["lr/scale"] for row in rows] == scales
    assert [row["step"] for row in rows] == [row["step"] for row in rows_of(tmp_path, "val_acc")]
    assert [row["lr/cuts"] for row in rows] == [round(-math.log2(scale)) for scale in scales]
    gradients = [accuracy_gradient(NOISY[:end], 2) for end in range(3, 11)]
    assert [row["lr/accuracy_gradient"] for row in rows[2:]] == pytest.approx(gradients, rel=1e-5)
    assert not any("lr/accuracy_gradient" in row for row in rows[:2])
    assert (last["lr/scale"], last["lr/cuts"]) == (scales[-1], rows[-1]["lr/cuts"])


def test_two_instances_have_names_and_keys_of_their_own(tmp_path: Path) -> None:
    one = AccuracyGradientLR(param_groups=[0], **QUICK)
    other = AccuracyGradientLR("val_acc", param_groups=[0], name="slow", **{**QUICK, "cooldown": 8})
    trainer, rates = train([one, other], logger=CSVLogger(tmp_path))
    assert trainer.callback_metrics["lr/scale"] == 0.125 / 2
    assert trainer.callback_metrics["lr/slow/scale"] == 0.5
    assert rates.epochs()[-1] == pytest.approx(0.1 * 0.125 * 0.5)
    folder = tmp_path / "lightning_logs" / "version_0"
    assert {path.name for path in folder.iterdir()} >= {
        "accuracy_gradient_lr.csv",
        "accuracy_gradient_lr.png",
        "accuracy_gradient_lr_slow.csv",
        "accuracy_gradient_lr_slow.png",
    }


def test_the_table_has_a_row_for_each_observation(tmp_path: Path) -> None:
    train([AccuracyGradientLR(**QUICK)], Dictated(NOISY), logger=CSVLogger(tmp_path))
    with (tmp_path / "lightning_logs" / "version_0" / "accuracy_gradient_lr.csv").open() as file:
        rows = list(csv.DictReader(file))
    scales = accuracy_gradient_scales(NOISY, **QUICK)
    assert [float(row["val_acc"]) for row in rows] == pytest.approx(NOISY)
    assert [float(row["scale"]) for row in rows] == scales
    assert [float(row["learning_rate"]) for row in rows] == [0.1 * scale for scale in scales]
    assert [row["cut"] == "True" for row in rows] == [
        scale < before for before, scale in zip([1.0, *scales], scales, strict=False)
    ]
    assert [float(row["epoch"]) for row in rows] == list(range(1, 11))
    assert float(rows[3]["mean"]) == pytest.approx((NOISY[2] + NOISY[3]) / 2)
    assert [rows[0]["accuracy_gradient"], float(rows[3]["accuracy_gradient"])] == ["", pytest.approx(-0.075)]


def test_the_figure_has_three_panels_with_the_cuts() -> None:
    callback = AccuracyGradientLR(**QUICK)
    train([callback], Dictated(NOISY))
    figure = draw_rates(callback.record, "title", "val_acc", callback.window, callback.threshold)
    values, gradient, rate = figure.axes
    cuts = [row["observation"] for row in callback.record.rows() if row["cut"]]
    assert cuts == [4, 9]
    for axis in figure.axes:
        vertical = [line.get_xdata()[0] for line in axis.lines if len(set(line.get_xdata())) == 1]
        assert vertical[: len(cuts)] == cuts, "at observation n epoch n is over"
    assert rate.get_yscale() == "log"
    assert rate.get_xlabel() == "epoch"
    assert any(list(line.get_ydata()) == pytest.approx(NOISY) for line in values.lines)
    assert any(list(line.get_ydata()) == [0.005, 0.005] for line in gradient.lines)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_short_runs_have_a_figure_or_none(count: int, tmp_path: Path) -> None:
    train([AccuracyGradientLR()], Dictated([0.5]), max_epochs=count, logger=TensorBoardLogger(tmp_path))
    assert len(list(tmp_path.rglob("accuracy_gradient_lr.png"))) == (count > 0)


def test_no_figure_is_drawn_where_none_is_wanted_or_matplotlib_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train([AccuracyGradientLR(figure=False)], max_epochs=2, logger=CSVLogger(tmp_path))
    said: list[str] = []
    monkeypatch.setattr(reporting, "is_installed", lambda package: False)
    monkeypatch.setattr(reporting, "rank_zero_info", said.append)
    train([AccuracyGradientLR()], max_epochs=2, logger=CSVLogger(tmp_path))
    assert len(said) == 1
    assert "pip install 'lightning-grad[plot]'" in said[0]
    assert len(list(tmp_path.rglob("accuracy_gradient_lr.csv"))) == 2
    assert not list(tmp_path.rglob("*.png"))


class Endless(IterableDataset):
    """Has no length."""

    def __iter__(self) -> Any:
        return iter(torch.ones(8, 2).split(1))


def test_epochs_without_a_length_have_steps_on_the_axis() -> None:
    callback = AccuracyGradientLR(**QUICK)
    trainer = make_trainer(callbacks=[callback], max_epochs=2, val_check_interval=2)
    trainer.fit(Dictated(every=2), DataLoader(Endless(), None), DataLoader(data(1), 1))
    assert [row["epoch"] for row in callback.record.rows()] == [1.0] * 4 + [2.0] * 4
    assert [row["step"] for row in callback.record.rows()] == [1, 3, 5, 7, 9, 11, 13, 15]
    axis = draw_rates(callback.record, "title", "val_acc", 2, 0.005).axes[-1]
    assert axis.get_xlabel() == "optimizer step"


# Beginning, resuming and leaving.


def test_a_second_fit_starts_afresh() -> None:
    callback = AccuracyGradientLR(**QUICK)
    first = train([callback])[1]
    state = copy.deepcopy(callback.state_dict())
    assert train([callback])[1].seen == first.seen
    assert_identical(callback.state_dict(), state)


def test_state_is_loaded_in_a_fit_only() -> None:
    callback, other = AccuracyGradientLR(**QUICK), AccuracyGradientLR(**QUICK)
    train([callback])
    other.load_state_dict(callback.state_dict())
    assert other.state_dict()["values"] == []


def saving(folder: Path, **when: Any) -> ModelCheckpoint:
    return ModelCheckpoint(folder, save_top_k=-1, filename="{epoch}-{step}", **when)


@pytest.mark.parametrize("at_epoch_end", [False, True])
@pytest.mark.parametrize(
    ("interval", "monitor"), [("validation", "val_acc"), ("epoch", "val_acc"), ("epoch", "own_acc")]
)
def test_resuming_is_bit_exact(interval: Any, monitor: str, at_epoch_end: bool, tmp_path: Path) -> None:
    make = lambda: AccuracyGradientLR(monitor, interval=interval, min_lr=0.03, **QUICK)  # noqa: E731
    when = {"save_on_train_epoch_end": at_epoch_end}
    whole = make()
    _, rates = train([whole, saving(tmp_path, **when)], LogsInTraining(NOISY))
    for epoch in (2, 4, 7, 9):
        rest = make()
        path = tmp_path / f"epoch={epoch}-step={(epoch + 1) * BATCHES}.ckpt"
        _, seen = train([rest, saving(tmp_path, **when)], LogsInTraining(NOISY), ckpt=path)
        assert seen.seen == rates.seen[(epoch + 1) * BATCHES :]
        assert_identical(rest.state_dict(), whole.state_dict())


def test_a_training_metric_of_an_epoch_that_was_over_is_passed_over(tmp_path: Path) -> None:
    """Lightning does not save it, nor tell that it was logged."""
    train([saving(tmp_path)], LogsInTraining(NOISY), max_epochs=1)
    callback = AccuracyGradientLR("train_acc", interval="epoch", **QUICK)
    path = tmp_path / f"epoch=0-step={BATCHES}.ckpt"
    train([callback, saving(tmp_path)], LogsInTraining(NOISY), ckpt=path)
    assert callback.state_dict()["values"] == pytest.approx(NOISY[1:])


@pytest.mark.filterwarnings("ignore:.*was called without a model", "ignore:.*there is no last checkpoint available")
@pytest.mark.parametrize("hook", ["on_validation_end", "on_train_batch_end"])
@pytest.mark.parametrize("interval", ["validation", "epoch"])
def test_resuming_after_an_exception_is_bit_exact(interval: Any, hook: str, tmp_path: Path) -> None:
    whole = AccuracyGradientLR(interval=interval, **QUICK)
    _, rates = train([whole], Dictated(NOISY))
    first = AccuracyGradientLR(interval=interval, **QUICK)
    with pytest.raises(KeyError):
        train([first, Fails(hook, 5), OnExceptionCheckpoint(tmp_path, "broken")], Dictated(NOISY))
    rest = AccuracyGradientLR(interval=interval, **QUICK)
    _, seen = train([rest], Dictated(NOISY), ckpt=tmp_path / "broken.ckpt")
    assert seen.seen == rates.seen[len(rates.seen) - len(seen.seen) :]
    assert_identical(rest.state_dict(), whole.state_dict())


def test_resuming_in_mid_epoch_is_bit_exact(tmp_path: Path) -> None:
    def run(ckpt: Any = None) -> tuple[AccuracyGradientLR, Rates]:
        callback = AccuracyGradientLR(**QUICK)
        when = saving(tmp_path, every_n_train_steps=3)
        _, rates = train([callback, when], Dictated(NOISY, every=2), ckpt, val_check_interval=2, max_epochs=5)
        return callback, rates

    whole, rates = run()
    for step in (3, 9, 15):
        path = tmp_path / f"epoch={step // 4}-step={step}.ckpt"
        rest, seen = run(path)
        assert seen.seen == rates.seen[step:]
        assert_identical(rest.state_dict(), whole.state_dict())


def test_it_goes_on_after_the_last_validation(tmp_path: Path) -> None:
    whole = train([AccuracyGradientLR(**QUICK)], max_epochs=14)[1]
    first = train([AccuracyGradientLR(**QUICK), saving(tmp_path)], max_epochs=7)[1]
    path = tmp_path / f"epoch=6-step={7 * BATCHES}.ckpt"
    rest = train([AccuracyGradientLR(**QUICK), saving(tmp_path)], ckpt=path, max_epochs=14)[1]
    assert [*first.seen, *rest.seen] == whole.seen


class Fails(pl.Callback):
    """Raises in an epoch, in one of several hooks."""

    def __init__(self, hook: str, epoch: int) -> None:
        self.hook, self.epoch = hook, epoch

    def _raise(self, trainer: Any, hook: str) -> None:
        if hook == self.hook and trainer.current_epoch == self.epoch and not trainer.sanity_checking:
            raise KeyError("no luck")

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self._raise(trainer, "on_train_batch_end")

    def on_validation_end(self, trainer: Any, *_: Any) -> None:
        self._raise(trainer, "on_validation_end")


@pytest.mark.parametrize("interval", ["validation", "epoch"])
@pytest.mark.parametrize("policy", ["multiply", "replace"])
def test_nothing_is_left_behind(policy: Any, interval: Any) -> None:
    def configure(parameters: Any) -> Any:
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 3)]

    for others in ([], [Fails("on_train_batch_end", 5)], [Fails("on_validation_end", 5)]):
        module = Dictated(NOISY, configure)
        before = set(module.__dict__)
        callback = AccuracyGradientLR(policy=policy, interval=interval, **QUICK)
        if others:
            with pytest.raises(KeyError):
                train([callback, *others], module)
        else:
            train([callback], module)
        assert set(module.__dict__) - before <= {"_hparams"}, "which Lightning leaves"
        assert len(callback.undo) == 0
        assert not any(isinstance(value, pl.Trainer) for value in vars(callback).values())
        pickle.dumps(module.weights)
        train([callback], module.train())


class Copies(pl.Callback):
    """Copies a callback in mid-fit."""

    def __init__(self, other: Any) -> None:
        self.other = other
        self.copies: list[Any] = []

    def on_validation_end(self, trainer: Any, *_: Any) -> None:
        if trainer.current_epoch == 5:
            self.copies = [copy.deepcopy(self.other), pickle.loads(pickle.dumps(self.other))]
            self.state = copy.deepcopy(self.other.state_dict())


class LogsWithGraph(LogsInTraining):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("graph", loss, enable_graph=True)
        return loss


@pytest.mark.parametrize(("interval", "monitor"), [("validation", "val_acc"), ("epoch", "graph")])
def test_it_is_copied_in_mid_fit(interval: Any, monitor: str) -> None:
    callback = AccuracyGradientLR(monitor, interval=interval, **QUICK)
    copies = Copies(callback)
    train([callback, copies], LogsWithGraph(NOISY))
    for copied in copies.copies:
        assert_identical(copied.state_dict(), copies.state)
        assert copied.settings == callback.settings
        assert copied._in_epoch._before is None
        assert train([copied], LogsWithGraph(NOISY))[1].seen == train([callback], LogsWithGraph(NOISY))[1].seen


# Elsewhere.


class ByRank(Dictated):
    """Logs without synchronization, another value on each rank, and on one of them nothing every third time."""

    def __init__(self, mean: list[float], **rest: Any) -> None:
        super().__init__(mean, **rest)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        mean = self.accuracy()
        if self.current_epoch % 3 == 2:
            if self.global_rank == 1:
                self.log("val_acc", mean)
        else:
            self.log("val_acc", mean + (0.3 if self.global_rank == 0 else -0.3) * (-1) ** self.current_epoch)


class Saves(pl.Callback):
    """Every rank writes what it saw."""

    def __init__(self, callback: Any, rates: Rates, folder: Path) -> None:
        self.callback, self.rates, self.folder = callback, rates, folder

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        torch.save([self.callback.state_dict(), self.rates.seen], self.folder / f"{trainer.global_rank}.pt")


@pytest.mark.parametrize("interval", ["validation", "epoch"])
@pytest.mark.filterwarnings("ignore:It is recommended to use `self.log")
def test_two_ranks_cut_together(interval: Any, tmp_path: Path) -> None:
    callback, rates = AccuracyGradientLR(interval=interval, **QUICK), Rates()
    ranks = {"strategy": "ddp_fork", "devices": 2, "use_distributed_sampler": False}
    train([callback, rates, Saves(callback, rates, tmp_path)], ByRank(NOISY), **ranks)
    states, seen = zip(*(torch.load(tmp_path / f"{rank}.pt") for rank in range(2)), strict=True)
    assert_identical(states[0], states[1])
    assert seen[0] == seen[1]
    assert states[0]["values"] == pytest.approx(NOISY, abs=1e-7)
    assert [step[0] for step in seen[0]][::BATCHES] == pytest.approx(expected_epochs(NOISY, **QUICK))


@pytest.mark.filterwarnings("ignore:It is recommended to use `self.log")
def test_two_ranks_refuse_together() -> None:
    ranks = {"strategy": "ddp_fork", "devices": 2, "use_distributed_sampler": False}
    with pytest.raises(Exception, match="monitor='other' is not logged"):
        train([AccuracyGradientLR("other")], ByRank(NOISY), **ranks)


@pytest.mark.parametrize(("interval", "monitor"), [("validation", "val_acc"), ("epoch", "train_loss")])
def test_a_trainer_of_the_other_namespace_takes_it(interval: Any, monitor: str) -> None:
    callback = AccuracyGradientLR(monitor, interval=interval, window=1, cooldown=1, threshold=9.0, factor=0.5)
    trainer = make_trainer(pytorch_lightning.Trainer, callbacks=[callback], max_epochs=5)
    trainer.fit(make_classifier(pytorch_lightning.LightningModule), *loaders())
    assert len(callback.state_dict()["values"]) == 5
    assert trainer.callback_metrics["lr/scale"] == 0.5**3


@pytest.mark.parametrize(
    "arguments", [{"accumulate_grad_batches": 3}, {"precision": "bf16-mixed"}, {"fast_dev_run": True}]
)
def test_it_works_with(arguments: dict[str, Any]) -> None:
    callback = AccuracyGradientLR(**QUICK)
    _, rates = train([callback], **arguments)
    if "fast_dev_run" not in arguments:
        assert rates.epochs() == expected_epochs([0.5] * 10, **QUICK)
