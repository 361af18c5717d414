"""GradientMonitor reports what is there: norms on both sides of clipping, layers, noise, logits, the first bad step."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_grad.callbacks import GradientMonitor, GradientNoise, NormClipping, SkipNonFinite, ZClip
from lightning_grad.callbacks.diagnostics._logits import LogitProbe
from lightning_grad.callbacks.diagnostics._monitor_record import MonitorRecord
from lightning_grad.functional import total_norm
from lightning_grad.testing import ResumableLoader, fit, make_classifier, make_trainer
from lightning_grad.utilities import reporting
from tests.wandb_offline import read_history

_INFO = "lightning_grad.core.callback.rank_zero_info"


def rows_of(folder: Path) -> list[dict[str, float]]:
    """Return what was logged at each step; scalars of layers stand in rows of their own."""
    text = (folder / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    steps: dict[float, dict[str, float]] = {}
    for row in csv.DictReader(text):
        steps.setdefault(float(row["step"]), {}).update({k: float(v) for k, v in row.items() if v})
    return [row for row in steps.values() if "grad/norm" in row]


def monitored(folder: Path, *callbacks: Any, module: Any = None, **arguments: Any) -> list[dict[str, float]]:
    """Fit with a monitor behind other callbacks, every step a log step, and return what the CSV logger got."""
    monitor = next((c for c in callbacks if isinstance(c, GradientMonitor)), GradientMonitor(histograms=False))
    others = [c for c in callbacks if c is not monitor]
    arguments = {"max_epochs": 1, "log_every_n_steps": 1, **arguments}
    fit([*others, monitor], module, logger=CSVLogger(folder), **arguments)
    return rows_of(folder)


class NormsAtTheStep(pl.Callback):
    """Writes down the norm that the optimizer really steps with."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        for optimizer in trainer.optimizers:
            optimizer.register_step_post_hook(self._look)

    def _look(self, optimizer: Any, *_: Any) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.norms.append(total_norm(gradients, accurate=True).item() if gradients else math.nan)


# Both sides of clipping.


@pytest.mark.parametrize("accumulate", [1, 2])
def test_norms_are_those_before_and_after_clipping(accumulate, tmp_path):
    plain, clipped = NormsAtTheStep(), NormsAtTheStep()
    fit([plain], max_epochs=1, accumulate_grad_batches=accumulate)
    rows = monitored(tmp_path, clipped, NormClipping(0.5), accumulate_grad_batches=accumulate)
    assert [row["grad/norm_after"] for row in rows] == pytest.approx(clipped.norms)
    assert rows[0]["grad/norm"] == pytest.approx(plain.norms[0])
    assert rows[0]["grad/coefficient"] == pytest.approx(min(1.0, 0.5 / plain.norms[0]), rel=1e-4)
    share = np.cumsum([row["grad/norm"] > 0.5 for row in rows]) / np.arange(1, len(rows) + 1)
    assert [row["grad/clipped_share"] for row in rows] == pytest.approx(list(share))


def test_lightnings_own_clipping_is_seen_too(tmp_path):
    at_the_step = NormsAtTheStep()
    rows = monitored(tmp_path, at_the_step, gradient_clip_val=0.3)
    assert [row["grad/norm_after"] for row in rows] == pytest.approx(at_the_step.norms)
    assert max(row["grad/norm"] for row in rows) > 0.3


def test_a_module_that_clips_by_itself_is_seen_too(tmp_path):
    module = make_classifier()
    cls = type(module)

    class Clips(cls):
        def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
            nn.utils.clip_grad_norm_(self.parameters(), 0.2)

    module.__class__ = Clips
    at_the_step = NormsAtTheStep()
    rows = monitored(tmp_path, at_the_step, module=module)
    assert [row["grad/norm_after"] for row in rows] == pytest.approx(at_the_step.norms)


def test_several_optimizers_under_manual_optimization_have_keys_of_their_own(tmp_path):
    at_the_step = NormsAtTheStep()
    clip, monitor = NormClipping(0.1), GradientMonitor(histograms=False)
    module = make_classifier(manual=True)
    fit([at_the_step, clip, monitor], module, logger=CSVLogger(tmp_path), log_every_n_steps=1, max_epochs=1)
    text = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    rows = [row for row in csv.DictReader(text) if row["grad/optimizer0/norm_after"]]
    seen = [float(row[f"grad/optimizer{i}/norm_after"]) for row in rows for i in (0, 1)]
    assert seen == pytest.approx(at_the_step.norms)
    assert (tmp_path / "lightning_logs" / "version_0" / "gradient_monitor_optimizer1.png").is_file()


def test_the_largest_norm_since_the_last_log_is_not_lost(tmp_path):
    every = monitored(tmp_path / "every", NormClipping(0.5))
    third = monitored(tmp_path / "third", NormClipping(0.5), log_every_n_steps=3)
    norms = [row["grad/norm"] for row in every]
    assert [row["grad/norm_max"] for row in third] == pytest.approx([max(norms[:3]), max(norms[3:])])


def test_order_behind_those_that_change_gradients_is_asked_for():
    with pytest.raises(ValueError, match=r"Write callbacks=\[ZClip \(clip\), GradientMonitor \(observe\)\]"):
        fit([GradientMonitor(), ZClip()])


# Layers.


class OneLayer(pl.LightningModule):
    """Its loss is linear in its weight, so that the gradient is the mean of the inputs."""

    def __init__(self, width: int, lr: float = 0.1) -> None:
        super().__init__()
        self.lr = lr
        self.layer = nn.Linear(width, 1, bias=False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.layer(batch[0]).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def inputs(batches: int, size: int, width: int, mean: float = 0.5) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return mean + torch.randn(batches * size, width, generator=generator)


def run_one_layer(folder: Path, x: Tensor, size: int, width: int, **arguments: Any) -> list[dict[str, float]]:
    pl.seed_everything(0, verbose=False)
    monitor = GradientMonitor(slow_stats_every=1)
    arguments = {"max_epochs": 1, "log_every_n_steps": 1, "logger": CSVLogger(folder), **arguments}
    trainer = make_trainer(callbacks=[monitor], **arguments)
    trainer.fit(OneLayer(width), DataLoader(TensorDataset(x), size))
    return rows_of(folder)


def test_update_ratio_and_cosine_equal_hand_computation(tmp_path):
    x = inputs(4, 8, 5)
    gradients = x.view(4, 8, 5).mean(1)
    pl.seed_everything(0, verbose=False)
    weight = OneLayer(5).layer.weight.detach()[0].clone()
    rows = run_one_layer(tmp_path, x, 8, 5)
    assert len(rows) == 4
    assert "grad/cosine" not in rows[0]
    for step, row in enumerate(rows):
        assert row["grad_layers/norm/layer"] == pytest.approx(gradients[step].norm().item(), rel=1e-5)
        assert row["grad_layers/weight_norm/layer"] == pytest.approx(weight.norm().item(), rel=1e-5)
        update = 0.1 * gradients[step]
        assert row["grad_layers/update_ratio/layer"] == pytest.approx((update.norm() / weight.norm()).item(), rel=1e-4)
        weight = weight - update
        if step:
            expected = F.cosine_similarity(gradients[step], gradients[step - 1], dim=0).item()
            assert row["grad/cosine"] == pytest.approx(expected, rel=1e-4)
        assert row["grad/rms_min"] == pytest.approx(row["grad/norm"] / 5**0.5, rel=1e-5)
        assert row["grad/zero_share"] == 0.0


def test_depth_joins_and_top_limits_the_layers_that_are_logged(tmp_path):
    (row, *_) = monitored(tmp_path, GradientMonitor(layer_depth=1, max_layers=2, histograms=False))
    layers = [key for key in row if key.startswith("grad_layers/norm/")]
    assert layers == ["grad_layers/norm/encoder", "grad_layers/norm/mix"]
    joined = math.hypot(*(row[key] for key in layers))
    assert joined < row["grad/norm"]


def test_gradients_that_adams_epsilon_swallows_are_counted(tmp_path):
    module = make_classifier()
    module.configure_optimizers = lambda: torch.optim.AdamW(module.parameters(), lr=1e-3, eps=1e3)
    rows = monitored(tmp_path, module=module)
    assert all(row["grad/below_epsilon"] == 1.0 for row in rows)
    assert all(row["grad/below_epsilon"] < 1.0 for row in monitored(tmp_path / "usual"))


# Noise scale.


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_noise_scale_comes_out_where_it_is_known(precision, tmp_path):
    width, mean, size, parts, steps = 400, 0.2, 4, 4, 100
    x = inputs(steps * parts, size, width, mean)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=10_000)
    plugins = [MixedPrecision("16-mixed", "cpu", scaler)] if precision == "16-mixed" else []
    rows = run_one_layer(tmp_path, x, size, width, accumulate_grad_batches=parts, plugins=plugins)
    # The gradient of one sample is the sample: covariance of trace `width`, mean of squared norm `width * mean**2`.
    assert len(rows) == steps
    assert rows[-1]["grad/noise_trace"] == pytest.approx(width, rel=0.1)
    assert rows[-1]["grad/signal_squared"] == pytest.approx(width * mean**2, rel=0.3)
    assert rows[-1]["grad/noise_scale"] == pytest.approx(1 / mean**2, rel=0.3)


def test_noise_scale_of_an_incomplete_accumulation_is_that_of_its_parts(tmp_path):
    x = inputs(6, 4, 50)
    rows = run_one_layer(tmp_path / "six", x, 4, 50, accumulate_grad_batches=4)
    small = x.view(6, 4, 50).mean(1).square().sum(1)
    expected = []
    for parts in (slice(0, 4), slice(4, 6)):
        count = len(small[parts])
        big = x.view(6, 4, 50)[parts].mean((0, 1)).square().sum()
        expected.append((small[parts].mean() - big) / (1 / 4 - 1 / (4 * count)))
    assert rows[0]["grad/noise_trace"] == pytest.approx(expected[0].item(), rel=1e-4)
    assert rows[1]["grad/noise_trace"] == pytest.approx((0.95 * expected[0] + 0.05 * expected[1]).item(), rel=1e-4)


def test_two_ranks_measure_what_accumulation_of_two_does(tmp_path):
    x = inputs(8, 4, 50)
    one = run_one_layer(tmp_path / "one", x, 4, 50, accumulate_grad_batches=2)
    order = x.view(4, 2, 4, 50).transpose(0, 1).reshape(32, 50)  # what rank 0 and rank 1 read, one after the other
    pl.seed_everything(0, verbose=False)
    trainer = make_trainer(
        callbacks=[GradientMonitor(), _ShardOfRank(order)],
        max_epochs=1,
        log_every_n_steps=1,
        logger=CSVLogger(tmp_path / "two"),
        strategy="ddp_fork",
        devices=2,
        use_distributed_sampler=False,
    )
    trainer.fit(_OwnData(50, order))
    two = rows_of(tmp_path / "two")
    for a, b in zip(one, two, strict=True):
        for key in ("grad/norm", "grad/noise_trace", "grad/signal_squared"):
            assert a[key] == pytest.approx(b[key], rel=1e-4), key


class _OwnData(OneLayer):
    def __init__(self, width: int, order: Tensor) -> None:
        super().__init__(width)
        self.order = order

    def train_dataloader(self) -> Any:
        half = len(self.order) // 2
        own = self.order[self.trainer.global_rank * half :][:half]
        return DataLoader(TensorDataset(own), 4)


class _ShardOfRank(pl.Callback):
    def __init__(self, order: Tensor) -> None:
        self.order = order


@pytest.mark.parametrize(("manual", "words"), [(False, "accumulate_grad_batches or several ranks"), (True, "manual")])
def test_where_there_is_no_noise_scale_it_says_why(manual, words, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(_INFO, said.append)
    trainer, _ = fit([GradientMonitor()], make_classifier(manual=manual), max_epochs=1)
    assert [text for text in said if words in text]
    assert not [key for key in trainer.callback_metrics if "noise" in key]


def test_it_says_what_it_watches_and_that_matplotlib_is_missing(tmp_path, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(_INFO, said.append)
    monkeypatch.setattr(reporting, "rank_zero_info", said.append)
    monkeypatch.setattr(reporting, "is_installed", lambda package: False)
    fit([GradientMonitor(include=["head"], histograms=False)], logger=CSVLogger(tmp_path), max_epochs=1)
    assert said[0] == (
        "Figures need matplotlib, which is not installed. Without figures: GradientMonitor. "
        "Run: pip install 'lightning-grad[plot]'."
    )
    assert said[1] == "GradientMonitor watches the gradients of 2 parameters."
    assert len([text for text in said if "pip install 'lightning-grad[plot]'" in text]) == 1
    assert not list(tmp_path.rglob("*.png"))


def test_a_barebones_trainer_logs_nothing_and_it_says_so(monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(_INFO, said.append)
    trainer = pl.Trainer(accelerator="cpu", barebones=True, max_epochs=1, callbacks=[GradientMonitor()])
    pl.seed_everything(0, verbose=False)
    with pytest.warns(UserWarning, match="not finite for the first time at step 3"):
        trainer.fit(Backwards(), DataLoader(TensorDataset(torch.randn(48, 4)), 8))
    assert [text for text in said if "logs nothing, because Trainer(barebones=True) turns logging off" in text]


# Logits.


def test_largest_logits_of_attention_and_output_are_read_off_the_operators():
    pl.seed_everything(1, verbose=False)
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(3, 5, 8)
    query, key, _ = F.linear(x, attention.in_proj_weight, attention.in_proj_bias).chunk(3, -1)
    heads = [t.view(3, 5, 2, 4).transpose(1, 2) for t in (query, key)]
    expected = (heads[0] @ heads[1].transpose(-2, -1) / 2.0).abs().max().item()
    logits = torch.randn(6, 4) * 7
    for need_weights in (False, True):
        with LogitProbe() as probe:
            attention(x, x, x, need_weights=need_weights)
            F.cross_entropy(logits, torch.zeros(6, dtype=torch.long))
        seen = {name: value.item() for name, value in probe.read().items()}
        assert seen["attention_logit_max"] == pytest.approx(expected, rel=1e-4)
        assert seen["output_logit_max"] == pytest.approx(logits.abs().max().item())


@pytest.mark.parametrize("masked", [-math.inf, torch.finfo(torch.float32).min])
def test_masked_logits_do_not_count(masked):
    logits = torch.tensor([1.0, -3.0, masked])
    query, keys = torch.ones(1, 1), torch.tensor([[1.0, -3.0, 9.0]])
    with LogitProbe() as probe:
        torch.softmax((query @ keys).masked_fill(logits == masked, masked), 1) @ torch.ones(3, 1)
        torch.log_softmax(logits, 0)
    assert {key: value.item() for key, value in probe.read().items()} == {
        "attention_logit_max": 1.0,
        "output_logit_max": 3.0,
    }


@pytest.mark.parametrize("how", ["causal", "bool mask", "added mask"])
def test_scores_that_a_mask_hides_do_not_count(how):
    query = torch.ones(1, 1, 2, 4)
    key = torch.stack([torch.ones(4), torch.full((4,), 100.0)])[None, None]
    seen = torch.tensor([[True, False], [True, False]])
    added = torch.where(seen, 0.0, -math.inf)
    causal = {"attn_mask": None, "is_causal": True}
    given = {"causal": causal, "bool mask": {"attn_mask": seen}, "added mask": {"attn_mask": added}}[how]
    with LogitProbe() as probe:
        F.scaled_dot_product_attention(query[..., :1, :] if how == "causal" else query, key, key, **given)
    assert probe.read()["attention_logit_max"].item() == pytest.approx(2.0)


def test_a_step_without_logits_and_one_with_control_flow_run_under_the_probe():
    with LogitProbe() as probe:
        F.cross_entropy(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long), reduction="sum")
        found = torch.cond(torch.tensor(True), lambda x: x + 1, lambda x: x - 1, (torch.ones(2),))
    assert found.tolist() == [2.0, 2.0]
    assert probe.read() == {}


def test_keys_that_queries_share_are_looked_at():
    query, key = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 3, 8)
    with LogitProbe() as probe:
        F.scaled_dot_product_attention(query, key, key, enable_gqa=True)
    expected = (query @ key.repeat_interleave(2, 1).transpose(-2, -1)).abs().max() / 8**0.5
    assert probe.read()["attention_logit_max"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_logits_are_logged_unless_modules_are_compiled_or_it_is_off(tmp_path):
    (row, *_) = monitored(tmp_path)
    assert row["grad/output_logit_max"] > 0
    assert row["grad/attention_logit_max"] > 0
    (row, *_) = monitored(tmp_path / "off", GradientMonitor(logits=False, histograms=False))
    assert "grad/output_logit_max" not in row


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_modules_are_left_compiled(tmp_path, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(_INFO, said.append)
    module = make_classifier()
    torch._dynamo.reset()
    module.hidden.compile(backend="eager")
    (row, *_) = monitored(tmp_path, module=module)
    assert "grad/output_logit_max" not in row
    assert [text for text in said if "no logits" in text]


# The first bad step.


class Backwards(pl.LightningModule):
    """Registers its layers in the reverse of the order in which it uses them, and meets a nan in one batch."""

    def __init__(self, bad_batch: int = 3) -> None:
        super().__init__()
        self.bad_batch = bad_batch
        self.last, self.first = nn.Linear(4, 1), nn.Linear(4, 4)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.last(self.first(batch[0])).square().mean()
        return loss * math.nan if batch_idx == self.bad_batch and self.current_epoch == 0 else loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def run_backwards(*callbacks: Any, **arguments: Any) -> Any:
    pl.seed_everything(0, verbose=False)
    arguments = {"max_epochs": 2, "log_every_n_steps": 5, **arguments}
    trainer = make_trainer(callbacks=list(callbacks), **arguments)
    trainer.fit(Backwards(), DataLoader(TensorDataset(inputs(6, 4, 4)), 4))
    return trainer


def test_first_bad_step_is_named_once_with_its_facts(tmp_path):
    with pytest.warns(
        UserWarning, match=r"step 3, epoch 0, batch 3, loss nan: 4 bad parameters, starting with first\.weight"
    ) as warned:
        trainer = run_backwards(SkipNonFinite(max_warnings=0), GradientMonitor(), logger=CSVLogger(tmp_path))
    assert len([w for w in warned if "not finite" in str(w.message)]) == 1
    folder = tmp_path / "lightning_logs" / "version_0"
    facts = json.loads((folder / "gradient_monitor_first_bad_step.json").read_text())
    assert (facts["step"], facts["batch_idx"], facts["parameter"]) == (3, 3, "first.weight")
    assert trainer.callback_metrics["grad/skipped_steps"] == 1.0
    assert (folder / "gradient_monitor.png").is_file()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_fit_that_breaks_off_before_the_log_step_still_tells(error, tmp_path):
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 3:
                raise error("stopped on purpose")

    with pytest.warns(UserWarning, match="step 3, epoch 0, batch 3"), pytest.raises((RuntimeError, SystemExit)):
        run_backwards(GradientMonitor(), Stop(), logger=CSVLogger(tmp_path), log_every_n_steps=50)
    assert (tmp_path / "lightning_logs" / "version_0" / "gradient_monitor_first_bad_step.json").is_file()


def test_alert_is_sent_where_a_logger_passes_it_on(tmp_path):
    class Alerting(CSVLogger):
        sent: list[dict[str, str]] = []  # noqa: RUF012

        @property
        def experiment(self) -> Any:
            inner = super().experiment
            inner.alert = lambda **message: self.sent.append(message)
            return inner

    with pytest.warns(UserWarning, match="not finite"):
        run_backwards(SkipNonFinite(max_warnings=0), GradientMonitor(alert=True), logger=Alerting(tmp_path))
    (message,) = Alerting.sent
    assert "not finite" in message["title"]
    assert "first.weight" in message["text"]


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_fp16_overflow_at_the_start_is_counted_and_not_called_bad(tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=1000)
    plugins = [MixedPrecision("16-mixed", "cpu", scaler)]
    rows = monitored(tmp_path, ZClip(), max_epochs=4, plugins=plugins)
    skipped = rows[-1]["grad/skipped_steps"]
    assert 0 < skipped < len(rows)
    assert math.isfinite(rows[-1]["grad/norm"])
    assert not (tmp_path / "lightning_logs" / "version_0" / "gradient_monitor_first_bad_step.json").exists()


# Loggers.


def test_every_logger_gets_what_it_can_show(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")
    import wandb

    wandb.teardown()  # of another test's run, whose settings would stay
    board, table = TensorBoardLogger(tmp_path / "board"), CSVLogger(tmp_path)
    cloud = WandbLogger(project="project", save_dir=tmp_path, offline=True)
    monitor = GradientMonitor(slow_stats_every=1)
    fit([NormClipping(0.5), monitor], logger=[table, board, cloud], log_every_n_steps=4)
    wandb.finish()

    rows = read_history(tmp_path)
    kinds = {key.removesuffix("/_type"): value for row in rows for key, value in row.items() if key.endswith("/_type")}
    assert kinds["grad_layers/histogram/hidden.weight"] == "histogram"
    assert kinds.get("grad/record") == "table-file", f"{len(rows)} rows: {kinds}, {rows[-1].keys()}"
    assert kinds["grad/figure"] == "images/separated"
    norms = [row["grad/norm"] for row in rows if "grad/norm" in row]
    assert len(norms) == 6

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(board.log_dir)
    events.Reload()
    tags = events.Tags()
    assert "grad_layers/histogram/hidden.weight" in tags["histograms"]
    assert "grad/figure" in tags["images"]
    assert any("grad/record" in tag for tag in tags["tensors"])
    assert "grad/norm" in tags["scalars"]

    assert [row["grad/norm"] for row in rows_of(tmp_path)] == pytest.approx(norms)
    assert not [key for row in rows_of(tmp_path) for key in row if "histogram" in key]


def test_without_a_logger_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fit([GradientMonitor()], max_epochs=1)
    assert not list(tmp_path.iterdir())


# The record.


def test_a_long_record_is_thinned_and_keeps_its_spikes():
    record = MonitorRecord()
    for step in range(20_000):
        record.add_step(step, 100.0 if step == 777 else 1.0, 1.0, skipped=False)
    rows = record.rows()
    assert len(rows) <= 2049
    assert max(row["norm"] for row in rows) == 100.0
    assert (record.count, record.clipped, record.skipped) == (20_000, 1, 0)


def test_a_long_heat_map_is_thinned():
    record = MonitorRecord()
    for step in range(1000):
        record.add_layers(step, {"a": 1.0, "b": 2.0})
    assert 128 < len(record.layers.rows()) <= 257


def test_a_record_with_bad_steps_is_drawn(tmp_path):
    record = MonitorRecord()
    for step, norm in enumerate([1.0, math.inf, 2.0, math.nan, 0.0, 3.0]):
        record.add_step(step, norm, min(norm, 1.5), skipped=not math.isfinite(norm))
        record.add_layers(step, {"a": norm, "b": 0.0})
    record.draw("title").savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    assert (record.count, record.clipped, record.skipped) == (6, 2, 2)


def test_a_record_of_bad_steps_without_layers_is_drawn(tmp_path):
    record = MonitorRecord()
    for step in range(2):
        record.add_step(step, math.inf, math.nan, skipped=True)
        record.add_layers(step, {})
    record.draw("title").savefig(tmp_path / "figure.png")


@pytest.mark.parametrize("limit", [9.0, 1.5])
def test_norms_that_nothing_changed_are_drawn_once(limit):
    record = MonitorRecord()
    for step, norm in enumerate([1.0, 2.0, math.nan]):
        record.add_step(step, norm, min(norm, limit), skipped=False)
    (axis,) = record.draw("title").axes
    legend = [text.get_text() for text in axis.get_legend().get_texts()]
    changed = ["before clipping or other changes", "as the optimizer used it", "clipped"]
    assert legend == [*(changed if limit < 2 else []), "not finite"]
    assert len(axis.lines) == (3 if limit < 2 else 1)
    assert "first non-finite gradient at step 2" in axis.figure.get_suptitle()


def test_an_empty_record_is_drawn(tmp_path):
    MonitorRecord().draw("title").savefig(tmp_path / "figure.png")


def test_state_survives_a_round_trip():
    record, other = MonitorRecord(), MonitorRecord()
    record.add_step(0, 2.0, 1.0, skipped=False)
    record.add_layers(0, {"a": 1.0})
    other.load_state_dict(record.state_dict())
    assert other.state_dict() == record.state_dict()
    assert other.summary() == record.summary()


def test_noise_behind_clipping_is_on_the_side_of_after(tmp_path):
    rows = monitored(tmp_path, NormClipping(1e-3), GradientNoise(eta=1.0))
    assert all(row["grad/norm_after"] > 1.0 for row in rows)


# Spikes and their culprits.


class Scaled(pl.LightningModule):
    """Two layers and a part that only large inputs reach; logs nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, factor = batch
        hidden = self.first(x).tanh()
        return (F.cross_entropy(self.second(hidden), y, reduction="none") * factor).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-4)


def spiky(factor: float, at: int = 77, amount: int = 100) -> TensorDataset:
    x = torch.randn(amount, 4, generator=torch.Generator().manual_seed(0))
    factors = torch.ones(amount)
    factors[at] = factor
    return TensorDataset(x, torch.arange(amount) % 3, factors)


def monitor_spikes(data: Any, folder: Path, *callbacks: Any, ckpt: Any = None, **arguments: Any) -> GradientMonitor:
    pl.seed_everything(1, verbose=False)
    monitor = GradientMonitor(logits=False, histograms=False)
    logger = CSVLogger(folder, name="", version="")
    saves = any(isinstance(callback, pl.callbacks.ModelCheckpoint) for callback in callbacks)
    arguments = {"max_epochs": 1, "log_every_n_steps": 5, "logger": logger, "enable_checkpointing": saves, **arguments}
    trainer = make_trainer(callbacks=[*callbacks, monitor], **arguments)
    trainer.fit(Scaled(), ResumableLoader(data, 4), ckpt_path=ckpt)
    return monitor


def test_a_spike_is_listed_with_its_parameter_and_the_samples_of_its_batch(tmp_path):
    monitor = monitor_spikes(spiky(2000.0), tmp_path)
    rows = list(csv.DictReader((tmp_path / "gradient_monitor_spikes.csv").read_text().splitlines()))
    (row,) = rows
    assert (row["step"], row["batch_idx"], row["samples"]) == ("19", "19", "76 77 78 79")
    assert float(row["norm"]) > 10 * float(row["usual_norm"]) > 0
    assert row["parameter"] in dict(Scaled().named_parameters())
    assert float(row["growth"]) > 10
    assert not (tmp_path / "gradient_monitor_first_bad_step.json").exists()
    assert monitor.spikes.count == 1
    assert monitor_spikes(spiky(1.0), tmp_path / "well").spikes.count == 0, "an ordinary run has none"
    assert not (tmp_path / "well" / "gradient_monitor_spikes.csv").exists()


def test_the_suspect_is_the_parameter_whose_gradient_grew(tmp_path):
    class Grows(Scaled):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y, factor = batch
            hidden = self.first(x).tanh()
            more = (factor[:, None] - 1) * hidden.detach()  # only the second weight sees the factor
            return F.cross_entropy(self.second(hidden) + more @ self.second.weight.mT, y)

    rows = []
    for kind in (Grows, Scaled):
        monitor = GradientMonitor(logits=False, histograms=False)
        pl.seed_everything(1, verbose=False)
        make_trainer(callbacks=[monitor], max_epochs=1, log_every_n_steps=5).fit(kind(), DataLoader(spiky(-3000.0), 4))
        rows.append(monitor.spikes.kept[0])
    assert rows[0]["parameter"] == "second.weight"
    assert rows[1]["parameter"] != "second.weight", "where all grow alike, the first in the forward pass is named"


def test_a_value_that_backward_made_bad_is_found_in_the_layer_next_to_it(tmp_path):
    class Root(Scaled):
        def __init__(self) -> None:
            super().__init__()
            self.third = nn.Linear(3, 3)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y, factor = batch
            hidden = self.second(self.first(x).tanh())
            if factor.max() > 1:
                hidden = hidden + (hidden - hidden.detach()).abs().sqrt()  # adds 0; its derivative is not finite
            return F.cross_entropy(self.third(hidden), y)

    monitor = GradientMonitor(logits=False, histograms=False)
    pl.seed_everything(1, verbose=False)
    trainer = make_trainer(callbacks=[SkipNonFinite(max_warnings=0), monitor], max_epochs=1, log_every_n_steps=5)
    with pytest.warns(UserWarning, match="4 bad parameters, starting with second.weight"):
        trainer.fit(Root(), DataLoader(spiky(2000.0), 4))
    assert monitor.spikes.kept[0]["parameter"] == "second.weight"


@pytest.mark.filterwarnings("ignore:GradientMonitor. the gradient was not finite")
def test_samples_of_a_bad_step_are_those_of_all_its_batches(tmp_path):
    monitor = monitor_spikes(spiky(math.nan), tmp_path, accumulate_grad_batches=2)
    facts = json.loads((tmp_path / "gradient_monitor_first_bad_step.json").read_text())
    assert facts["samples"] == list(range(72, 80))
    assert monitor.spikes.kept[0]["samples"] == "72 73 74 75 76 77 78 79"
    with pytest.warns(UserWarning, match=r"The batch has the samples 76, 77, 78, 79 of the training set\."):
        monitor_spikes(spiky(math.nan), tmp_path / "single")


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("every", [3, 7])
def test_spikes_do_not_depend_on_checkpoints_and_resuming(every, tmp_path):
    whole = monitor_spikes(spiky(2000.0), tmp_path / "whole", max_epochs=2)
    assert whole.spikes.count == 2
    saving = pl.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=every, save_top_k=-1)
    saved = monitor_spikes(spiky(2000.0), tmp_path / "saved", saving, max_epochs=2)
    assert saved.spikes.rows() == whole.spikes.rows()
    path = next(tmp_path.glob(f"*step={every * 2}.ckpt"))
    resumed = monitor_spikes(spiky(2000.0), tmp_path / "resumed", ckpt=path, max_epochs=2)
    assert resumed.spikes.rows() == whole.spikes.rows()
