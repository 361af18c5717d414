"""ZClip in a fit: its clipped norms, and norms that are not finite, from bad batches and from fp16 overflow."""

import warnings
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision

from lightning_grad.callbacks import ZClip
from lightning_grad.testing import assert_identical, fit, make_classifier, make_trainer, state_of
from tests.callbacks.clipping import Dictated, Gradients, Spoil, rows_of, rows_with_norms, train

NAN, INF = float("nan"), float("inf")
WARM = [1.0, 1.2, 0.8, 1.1, 0.9]


def state_of_zclip(callback: ZClip) -> dict[str, float]:
    state = callback.state_dict()["optimizers"]["0"]["states"][""]
    return {key: state[key].item() for key in ("count", "mean", "variance")}


def test_a_spike_is_clipped_as_worked_by_hand() -> None:
    after = Gradients()
    train([ZClip(max_norm=None, warmup_steps=5), after], Dictated(), rows_of(rows_with_norms([*WARM, 1.1, 9.0])))
    # Mean 1, variance 0.02; 1.1 is no spike, and moves them to 1.003 and 0.97 * 0.02 + 0.03 * 0.097**2.
    mean, deviation = 1.003, (0.97 * 0.02 + 0.03 * 0.097**2) ** 0.5
    z = (9.0 - mean) / (deviation + 1e-6)
    expected = [*WARM, 1.1, mean + 2.5 * deviation / (z / 2.5)]
    assert after.norms() == pytest.approx(expected, rel=1e-5)


def test_the_bound_holds_from_the_first_step_on() -> None:
    after, callback = Gradients(), ZClip(max_norm=0.95, warmup_steps=5)
    train([callback, after], Dictated(), rows_of(rows_with_norms([*WARM, 1.1])))
    assert after.norms() == pytest.approx([0.95, 0.95, 0.8, 0.95, 0.9, 0.95], rel=1e-5)
    # The statistics see the norms themselves, as in the published code.
    assert state_of_zclip(callback)["mean"] == pytest.approx(1.003, rel=1e-5)


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("position", [2, 7], ids=["in the warm-up", "after it"])
@pytest.mark.parametrize("by", ["batch", "gradient"])
def test_a_step_that_is_not_finite_leaves_no_trace_in_the_statistics(by: str, position: int, bad: float) -> None:
    norms = [*WARM, 1.1, 0.9, 1.0, 9.0, 0.9]
    expected, finite = Gradients(), ZClip(max_norm=None, warmup_steps=5)
    train([finite, expected], Dictated(), rows_of(rows_with_norms(norms)))
    rows = rows_with_norms(norms)
    spoilt = torch.full((1, rows.shape[1]), bad if by == "batch" else 1.0)
    found, callback = Gradients(), ZClip(max_norm=None, warmup_steps=5)
    callbacks = [Spoil({position: bad}), callback, found] if by == "gradient" else [callback, found]
    train(callbacks, Dictated(), rows_of(torch.cat([rows[:position], spoilt, rows[position:]])))
    assert state_of_zclip(callback) == state_of_zclip(finite)
    assert not found.seen.pop(position)["w"].isfinite().any(), "it is left for SkipNonFinite"
    assert_identical(found.seen, expected.seen)


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # the optimizer rightly skips its first step
def test_overflow_at_the_start_of_fp16_leaves_the_statistics_finite() -> None:
    module, callback = make_classifier(), ZClip(warmup_steps=5)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=1000)
    trainer, _ = fit([callback], module, plugins=[MixedPrecision("16-mixed", "cpu", scaler)], max_epochs=8)
    steps = int(trainer.optimizers[0].state[module.head.weight]["step"].item())
    assert 5 < steps < trainer.global_step == 48, "the run was meant to begin with overflows"
    state = state_of_zclip(callback)
    assert state["count"] == steps
    assert 0.0 < state["mean"] < 100.0
    assert 0.0 < state["variance"] < 100.0


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_resume_in_the_middle_of_the_warmup_is_bitwise(tmp_path: Any) -> None:
    def run(extra: list[Any], **arguments: Any) -> Any:
        callback = ZClip(z_threshold=1.0, warmup_steps=10)
        state = state_of(*fit([callback, *extra], resumable=True, **arguments))
        return state["module"], state["optimizers"], callback.state_dict()

    # The fourth of ten steps of the warm-up, and in mid-epoch.
    saving = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=4)
    expected = run([saving])
    path = tmp_path / "step=4.ckpt"
    saved = torch.load(path, weights_only=True)["callbacks"]["ZClip"]["optimizers"]["0"]["states"][""]
    assert saved["count"].item() == 4
    assert_identical(expected, run([], ckpt=path))


def test_what_is_logged() -> None:
    trainer = train(
        [ZClip(max_norm=1.0, warmup_steps=5)],
        Dictated(),
        rows_of(rows_with_norms([*WARM, 3.0])),
        log_every_n_steps=1,
    )
    found = {key.removeprefix("grad/zclip/"): value.item() for key, value in trainer.callback_metrics.items()}
    assert set(found) == {"norm", "threshold", "mean", "deviation", "clipped_share"}
    assert found["norm"] == pytest.approx(3.0)
    assert found["threshold"] == 1.0, "the spike is held to less by max_norm"
    assert found["clipped_share"] == pytest.approx(3 / 6)
    assert found["mean"] == pytest.approx(1.0, abs=0.02)
    assert found["deviation"] == pytest.approx(0.14, abs=0.02)


# The bound.

MANY = [1.0 + 0.1 * (step % 7) for step in range(60)]  # from 1 to 1.6


def warnings_of(norms: list[float], callback: ZClip, names: Any = ("w",), **arguments: Any) -> list[str]:
    rows = rows_with_norms(norms, 4 * len(names))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train([callback], Dictated(names), rows_of(rows), **arguments)
    return [str(warning.message) for warning in caught if "max_norm" in str(warning.message)]


def test_no_bound_is_the_default() -> None:
    after = Gradients()
    train([ZClip(z_threshold=float("inf")), after], Dictated(), rows_of(rows_with_norms([9.0, 1.0, 3.0])))
    assert ZClip().max_norm is None
    assert after.norms() == pytest.approx([9.0, 1.0, 3.0])


@pytest.mark.parametrize("every", [1, 10, 50, 10_000], ids=lambda every: f"logs every {every}")
def test_a_bound_that_clips_many_steps_is_told_once(every: int) -> None:
    (said,) = warnings_of(MANY, ZClip(max_norm=1.3), log_every_n_steps=every)
    assert said.startswith("ZClip: max_norm=1.3 clips 4")
    assert "Set max_norm=None, or a limit well above the usual norm; the mean is 1.29." in said


@pytest.mark.parametrize(
    ("norms", "bound"),
    [
        (MANY, None),
        (MANY, 1.55),  # one step in seven
        (MANY[:49], 0.1),  # too few to say
        ([1.0] * 60, 1.0),
        ([NAN] * 20 + [1.0] * 60, 1.5),
        ([1.0, 1.1] * 25 + [50.0] * 12, 25.0),  # spikes
    ],
    ids=["no bound", "few", "short", "at the bound", "not finite", "spikes"],
)
def test_a_bound_above_the_usual_norm_is_not_told(norms: list[float], bound: float | None) -> None:
    assert not warnings_of(norms, ZClip(max_norm=bound), log_every_n_steps=7)


def test_bounds_by_name_are_told_by_themselves() -> None:
    assert len(warnings_of(MANY, ZClip(max_norm={"a": 99.0, "b": 0.1}), ("a", "b"))) == 1
    assert not warnings_of(MANY, ZClip(max_norm={"a": 99.0, "b": 98.0}), ("a", "b"))


def test_what_an_earlier_bound_clipped_does_not_count(tmp_path: Any) -> None:
    def run(bound: float, **arguments: Any) -> Any:
        trainer = make_trainer(callbacks=[ZClip(max_norm=bound)], log_every_n_steps=5, **arguments)
        return trainer, (Dictated(), rows_of(rows_with_norms(MANY[:49])))

    trainer, inputs = run(0.1, max_epochs=1)
    trainer.fit(*inputs)
    trainer.save_checkpoint(tmp_path / "tight.ckpt")
    trainer, inputs = run(99.0, max_epochs=2)
    trainer.fit(*inputs, ckpt_path=tmp_path / "tight.ckpt")  # a warning is an error
    trainer, inputs = run(0.1, max_epochs=2)
    with pytest.warns(UserWarning, match="max_norm=0.1 clips 100%"):
        trainer.fit(*inputs, ckpt_path=tmp_path / "tight.ckpt")
