"""Settings that differ from a checkpoint's when a run resumes: what they mean from then on, and what is said of it."""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_grad.callbacks import (
    AutoClip,
    GradientMonitor,
    GradientNoise,
    LayerwiseClipping,
    MomentumReset,
    NormClipping,
    SkipNonFinite,
    SpikeClipping,
    ZClip,
)
from lightning_grad.functional import reset_warmup
from lightning_grad.testing import assert_identical, make_trainer
from tests.callbacks.clipping import WIDTH, Dictated, Gradients, rows_of, rows_with_norms, train

RATE, EPOCH = 1e-2, 12
ROWS = rows_with_norms([1.0 + 0.1 * (7 * step % 5) for step in range(EPOCH)], 2 * WIDTH)


def adam(parameters: Any) -> torch.optim.Adam:
    return torch.optim.Adam(parameters, lr=RATE)


def two() -> Dictated:
    """Two parameters of WIDTH entries, so that names can choose between them."""
    return Dictated(("a", "b"), adam)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr("lightning_grad.core.callback.rank_zero_info", lines.append)
    monkeypatch.setattr("lightning_grad.utilities.arguments.rank_zero_info", lines.append)
    return lines


def resumed(
    folder: Any, before: Any, after: Any, *others: Any, rows: Any = ROWS, then: Any = None, **arguments: Any
) -> pl.Trainer:
    """Train one epoch with a callback, go on for another one with the next, and return the second trainer."""
    path = folder / "first.ckpt"
    train([before], two(), rows_of(rows), **arguments).save_checkpoint(path)
    second = make_trainer(callbacks=[after, *others], **{"max_epochs": 2, "log_every_n_steps": 1, **arguments})
    second.fit(two(), rows_of(rows if then is None else then), ckpt_path=path)
    return second


def states(callback: Any) -> dict[str, dict[str, torch.Tensor]]:
    return callback.state_dict()["optimizers"]["0"]["states"]


# What decides by itself from then on.


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (NormClipping(0.9), NormClipping(0.1)),
        (NormClipping(0.9), NormClipping(0.1, norm_type=float("inf"))),
        (LayerwiseClipping(9.0), LayerwiseClipping(0.1, weighted=True, per="parameter")),
    ],
    ids=["max_norm", "norm_type", "per"],
)
def test_a_bound_holds_from_the_step_on_in_which_it_was_changed(before, after, tmp_path):
    found = Gradients()
    trainer = resumed(tmp_path, before, after, found)
    norm_type = getattr(after, "norm_type", 2.0)
    norms = [torch.cat(list(step.values())).norm(norm_type).item() for step in found.seen]
    assert norms == pytest.approx([0.1] * EPOCH, rel=1e-4)
    share = next(value for key, value in trainer.callback_metrics.items() if key.endswith("clipped_share"))
    assert share >= 0.5


def test_noise_of_another_seed_and_size_goes_on_from_the_step_reached(tmp_path, said):
    plain, noisy = Gradients(), Gradients()
    resumed(tmp_path / "plain", NormClipping(), NormClipping(), plain)
    after = GradientNoise(eta=4.0, decay=1.0, seed=5)
    resumed(tmp_path / "noise", GradientNoise(eta=0.0, seed=1), after, noisy)
    assert after.state_dict()["optimizers"]["0"]["steps"] == 2 * EPOCH
    clean = resumed_gradients(ROWS)
    noise = torch.stack([step["a"] - row for step, row in zip(noisy.seen, clean, strict=True)])
    # Of variance 4 / (1 + t), t from 12 on: about 0.47 in the mean of twelve steps.
    assert 0.25 < noise.std().item() < 0.75
    assert any("eta=4.0 (was 0.0)" in line and "seed=5 (was 1)" in line for line in said)


def resumed_gradients(rows: torch.Tensor) -> list[torch.Tensor]:
    return [row[:WIDTH] for row in rows]


# Statistics.


@pytest.mark.parametrize("window", [3, 50])
def test_a_window_of_another_length_keeps_the_last_norms(window, tmp_path):
    before, after = AutoClip(50.0, window=8), AutoClip(80.0, window=window)
    norms = ROWS.norm(dim=1).tolist()
    found = Gradients()
    resumed(tmp_path, before, after, found)
    history = norms[-8:][-window:] if window < 8 else norms[-8:]
    for norm, clipped in zip(norms, found.norms(), strict=True):
        history = [*history, norm][-window:]
        expected = min(norm, torch.tensor(history, dtype=torch.float64).quantile(0.8).item())
        assert clipped == pytest.approx(expected, rel=1e-5)


def test_zclip_goes_on_from_its_mean_by_the_new_rule(tmp_path):
    before, after = ZClip(warmup_steps=4, alpha=0.97), ZClip(warmup_steps=100, alpha=0.5, z_threshold=0.1)
    resumed(tmp_path, before, after)
    assert states(after)[""]["count"].item() == 2 * EPOCH
    # The warm-up is longer now, so its plain mean goes on from the mean of before.
    mean = states(before)[""]["mean"].item()
    for seen, norm in enumerate(ROWS.norm(dim=1).tolist(), EPOCH + 1):
        mean += (norm - mean) / seen
    assert states(after)[""]["mean"].item() == pytest.approx(mean, rel=1e-6)


CHOICES = {
    "include": ({"include": ["a"]}, {"include": ["b"]}, [""]),
    "exclude": ({}, {"exclude": ["a"]}, [""]),
    "number to mapping": ({"max_norm": 9.0}, {"max_norm": {"a": 9.0, "*": 8.0}}, ["a", "*"]),
    "mapping to number": ({"max_norm": {"a": 9.0, "*": 8.0}}, {"max_norm": 9.0}, [""]),
    "one pattern narrower": ({"max_norm": {"*": 9.0}}, {"max_norm": {"a": 9.0, "*": 9.0}}, ["a", "*"]),
}


@pytest.mark.parametrize("name", CHOICES)
def test_statistics_of_other_parameters_are_not_taken_over(name, tmp_path, said):
    """Naively they are, under the same name, or lost without a word."""
    old, new, lost = CHOICES[name]
    after, fresh = ZClip(warmup_steps=5, **new), ZClip(warmup_steps=5, **new)
    trainer = resumed(tmp_path / "resumed", ZClip(warmup_steps=5, **old), after)
    train([fresh], two(), rows_of(ROWS), max_epochs=1)
    assert states(after).keys() == states(fresh).keys()
    assert_identical(states(after), states(fresh))
    text = next(line for line in said if "restarts its statistics" in line)
    assert "because the checkpoint's statistics belong to other parameters" in text
    assert all(repr(bucket) in text for bucket in lost if bucket)
    shares = [value for key, value in trainer.callback_metrics.items() if "clipped_share" in key]
    assert max(shares) <= 1.0


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"max_norm": 9.0, "include": ["a"]}, {"max_norm": {"a": 7.0}}),
        ({"max_norm": {"a": 9.0, "b": 9.0}}, {"max_norm": {"b": 8.0, "*": 9.0}}),
        ({"max_norm": {"a*": 9.0}}, {"max_norm": 9.0, "exclude": ["b"]}),
        ({"max_norm": {"a": 9.0}}, {"max_norm": {"a": 8.0, "b": 9.0}}),
    ],
    ids=str,
)
def test_statistics_of_the_same_parameters_are_kept_under_another_name(old, new, tmp_path):
    before, after, same = ZClip(warmup_steps=5, **old), ZClip(warmup_steps=5, **new), ZClip(warmup_steps=5, **old)
    resumed(tmp_path / "changed", before, after)
    resumed(tmp_path / "same", ZClip(warmup_steps=5, **old), same)
    means = {state["mean"].item() for state in states(same).values()}
    assert means <= {state["mean"].item() for state in states(after).values()}


def test_a_share_counts_the_steps_of_its_own_parameters(tmp_path):
    trainer = resumed(tmp_path, NormClipping(99.0), NormClipping(1e-3, include=["b"]))
    assert trainer.callback_metrics["grad/norm_clipping/clipped_share"].item() == 1.0


def test_the_same_settings_restart_nothing(tmp_path, said):
    resumed(tmp_path, ZClip(max_norm={"a": 9.0, "*": 8.0}), ZClip(max_norm={"a": 9.0, "*": 8.0}))
    assert not [line for line in said if "restarts" in line or "changed" in line]


def test_the_order_of_patterns_counts(tmp_path, said):
    """The first that matches counts, so that the same mapping in another order is another choice."""
    before, after = ZClip(max_norm={"a": 9.0, "*": 9.0}), ZClip(max_norm={"*": 9.0, "a": 9.0})
    resumed(tmp_path, before, after)
    assert states(after)["*"]["count"].item() == EPOCH
    assert [line for line in said if "restarts its statistics" in line]


def test_a_checkpoint_without_settings_loads():
    callback = ZClip(max_norm={"a": 9.0})
    train([callback], two(), rows_of(ROWS))
    state = callback.state_dict()
    state.pop("settings")
    for saved in state["optimizers"].values():
        saved.pop("since"), saved.pop("digests")
    callback._stage = "fit"
    callback.load_state_dict(state)
    assert states(callback)["a"]["count"].item() == EPOCH


# SPAM.


@pytest.mark.parametrize(("every", "expected"), [(4, [0, 4, 8]), (9, [4]), (20, []), (15, [10])])
def test_the_next_reset_comes_so_many_steps_after_the_last(every, expected, tmp_path):
    """Counted from the start of the run they would come at steps that have nothing to do with the last reset."""
    seen: list[tuple[float, float]] = []

    class Inside(pl.Callback):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            trainer.optimizers[0].register_step_pre_hook(self.look)

        def look(self, optimizer: Any, *_: Any) -> None:
            state = optimizer.state[optimizer.param_groups[0]["params"][0]]
            seen.append((state["exp_avg_sq"].abs().sum().item(), optimizer.param_groups[0]["lr"]))

    # Twelve steps with a reset in the 8th; the epoch that follows begins with step 13.
    after = MomentumReset(every, warmup_steps=3)
    resumed(tmp_path, MomentumReset(8, warmup_steps=3), after, Inside())
    assert [step for step, (moments, _) in enumerate(seen) if moments == 0.0] == expected
    rates = [RATE] * EPOCH
    for reset in expected:
        for since, step in enumerate(range(reset, min(reset + 3, EPOCH))):
            rates[step] = RATE * reset_warmup(since, 3)
    assert [rate for _, rate in seen] == pytest.approx(rates)
    assert after.state_dict()["resets"] == {"0": 1 + len(expected)}


def test_a_longer_warmup_goes_on_from_the_last_reset(tmp_path):
    after = MomentumReset(20, warmup_steps=15)
    trainer = resumed(tmp_path, MomentumReset(10, warmup_steps=2), after)
    # 24 steps, the last reset was the tenth.
    assert trainer.callback_metrics["grad/momentum_reset/lr_factor"] == pytest.approx(reset_warmup(14, 15))


def test_a_pause_of_another_length_counts_from_the_start_of_the_run(tmp_path):
    rows = rows_with_norms([1.0] * (EPOCH - 1) + [100.0], 2 * WIDTH)
    for pause, clips in ((EPOCH, True), (2 * EPOCH, False)):
        found = Gradients()
        resumed(tmp_path, SpikeClipping(2.0, 0), SpikeClipping(2.0, pause), found, rows=rows)
        assert (found.norms()[-1] < 50.0) == clips


# What only watches or guards.


def test_a_monitor_goes_on_with_other_settings(tmp_path):
    before = GradientMonitor(include=["a"], layer_depth=1, slow_stats_every=1)
    after = GradientMonitor(include=["b"], layer_depth=None, slow_stats_every=2, figure=False, max_layers=3)
    trainer = resumed(tmp_path, before, after, accumulate_grad_batches=2)
    record = after.state_dict()["records"]["0"]
    assert record["count"] == EPOCH
    names = [name for row in record["layers"]["rows"] for name in row["norms"]]
    assert list(dict.fromkeys(names)) == ["a", "b"]
    assert "grad_layers/norm/b" in trainer.callback_metrics


def test_the_noise_scale_of_other_parameters_is_not_taken_over(tmp_path):
    after, fresh = GradientMonitor(include=["b"]), GradientMonitor(include=["b"])
    resumed(tmp_path, GradientMonitor(include=["a"]), after, accumulate_grad_batches=2)
    train([fresh], two(), rows_of(ROWS), accumulate_grad_batches=2, log_every_n_steps=1)
    found, expected = (callback.state_dict()["noise"]["averages"] for callback in (after, fresh))
    assert torch.equal(found, expected)


def test_a_guard_goes_on_counting(tmp_path):
    rows, then = ROWS.clone(), ROWS.clone()
    rows[-1] = then[0] = torch.nan
    with pytest.raises(RuntimeError, match="2 steps in a row"):
        resumed(
            tmp_path, SkipNonFinite(max_warnings=0), SkipNonFinite(max_in_row=2, max_warnings=0), rows=rows, then=then
        )
