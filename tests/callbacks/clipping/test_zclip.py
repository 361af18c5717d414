"""ZClip in a fit: its clipped norms, and norms that are not finite, from bad batches and from fp16 overflow."""

from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision

from lightning_grad.callbacks import ZClip
from tests.callbacks.clipping import Dictated, Gradients, Spoil, rows_of, rows_with_norms, train
from tests.contract.projects import assert_identical, fit, make_classifier, state_of

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
