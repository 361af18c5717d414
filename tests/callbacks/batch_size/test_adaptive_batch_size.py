"""AdaptiveBatchSize: the size on known noise, gradients of its windows, resuming, ranks, fp16, and refusals."""

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_grad.callbacks import (
    SAM,
    AdaptiveBatchSize,
    AnnealingLaw,
    BatchSizeLRScaling,
    GradientMonitor,
    NormClipping,
)
from lightning_grad.testing import ResumableLoader, assert_identical, make_trainer, on_ranks, state_of

ENTRIES, SIGMA, MEAN, ETA, BATCH = 50, 2.0, 0.3, 0.5, 8
TRUTH = ENTRIES * SIGMA**2 / (ETA**2 * ENTRIES * MEAN**2)  # 178 samples

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
]


class Noise(Dataset[Tensor]):
    """Samples whose loss has a gradient of known mean and variance."""

    def __init__(self, batches: int) -> None:
        self.samples = torch.randn(batches * BATCH, ENTRIES, generator=torch.Generator().manual_seed(3))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Tensor:
        return self.samples[index]


class Known(pl.LightningModule):
    """A linear loss: its gradient has the same mean and the same noise at all weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(ENTRIES))
        self.sizes: list[int] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return ((MEAN + SIGMA * batch) @ self.weight).mean()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.sizes.append(self.trainer.accumulate_grad_batches)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def known(acting: Any, epochs: int = 1, batches: int = 500, **arguments: Any) -> tuple[pl.Trainer, Known]:
    module = Known()
    trainer = make_trainer(callbacks=[acting], **{"max_epochs": epochs, "log_every_n_steps": 1, **arguments})
    trainer.fit(module, DataLoader(Noise(batches), BATCH))
    return trainer, module


def test_the_size_on_known_noise() -> None:
    acting = AdaptiveBatchSize(ETA, 64, start=4, every_n_steps=1)
    trainer, module = known(acting, epochs=4, batches=250)
    assert module.sizes == sorted(module.sizes)
    assert module.sizes[0] == 4
    assert module.sizes[-1] * BATCH == pytest.approx(TRUTH, rel=0.1)
    assert trainer.callback_metrics["batch_size/wanted"] == pytest.approx(TRUTH, rel=0.1)
    assert trainer.callback_metrics["batch_size/samples"] == module.sizes[-1] * BATCH
    assert trainer.accumulate_grad_batches == 1, "as before the fit"


def test_a_smaller_last_batch_has_its_own_noise() -> None:
    """Every step has batches of 8, 8 and 1."""
    acting = AdaptiveBatchSize(ETA, 3, start=3, every_n_steps=1)
    samples = torch.randn(300, 17, ENTRIES, generator=torch.Generator().manual_seed(3))
    sizes = [part for window in samples for part in window.split(BATCH)]
    make_trainer(callbacks=[acting], max_epochs=1).fit(Known(), DataLoader(sizes, batch_size=None))  # type: ignore[arg-type]
    averages = acting._noise.read()
    assert float(averages["noise_trace"]) == pytest.approx(ENTRIES * SIGMA**2, rel=0.1)


def test_steps_that_overflow_are_no_measurements() -> None:
    class Late(Known):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * (torch.inf if batch_idx < 20 else 1.0)

    module = Late()
    trainer = make_trainer(callbacks=[AdaptiveBatchSize(ETA, 64, start=4, every_n_steps=1)], max_epochs=1)
    trainer.fit(module, DataLoader(Noise(80), BATCH))
    assert module.sizes[:10] == [4] * 10  # five overflows, and five measurements for the first decision
    assert module.sizes[-1] > 4


def test_the_paper_asks_for_fewer() -> None:
    """Its first size is that of one step with four batches, whose norm is mostly noise."""
    trainer, _ = known(AdaptiveBatchSize(ETA, 64, start=4, estimator="paper", every_n_steps=1), batches=4)
    biased = ENTRIES * SIGMA**2 / (ETA**2 * (ENTRIES * MEAN**2 + ENTRIES * SIGMA**2 / (4 * BATCH)))
    assert biased < 0.5 * TRUTH
    assert trainer.callback_metrics["batch_size/wanted"] == pytest.approx(biased, rel=0.5)
    assert trainer.callback_metrics["batch_size/wanted"] < 0.9 * TRUTH


class Windows(pl.LightningModule):
    """Compares each gradient with one that is computed again from the batches of its step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        self.window: list[Tensor] = []
        self.sizes: list[int] = []
        self.worst = 0.0

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.net(batch) - batch.sum(1, keepdim=True)).square().mean()

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        self.window.append(batch)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        parameters = list(self.parameters())
        with torch.enable_grad():
            loss = sum(self.training_step(batch, 0) for batch in self.window) / self.trainer.accumulate_grad_batches
            expected = torch.autograd.grad(loss, parameters)
        errors = [(p.grad - e).abs().max().item() for p, e in zip(parameters, expected, strict=True)]
        self.worst = max(self.worst, *errors)
        self.sizes.append(len(self.window))
        self.window = []

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


DATA = torch.randn(112, 4, generator=torch.Generator().manual_seed(0))


def run(*acting: Any, module: Any = None, ckpt: Any = None, loader: Any = DataLoader, **arguments: Any) -> Any:
    module = Windows() if module is None else module
    trainer = make_trainer(callbacks=list(acting), **{"max_epochs": 2, **arguments})
    trainer.fit(module, loader(DATA, 4), ckpt_path=ckpt)
    return trainer, module


def growing(**changes: Any) -> AdaptiveBatchSize:
    return AdaptiveBatchSize(**{"eta": 0.2, "max_accumulation": 6, "start": 2, "every_n_steps": 1, **changes})


@pytest.mark.parametrize("estimator", ["paper", "unbiased"])
@pytest.mark.parametrize("start", [2, 3])
def test_gradients_are_those_of_their_windows(estimator: str, start: int) -> None:
    _, module = run(growing(estimator=estimator, start=start))
    assert module.worst < 1e-6
    assert module.sizes[0] == start
    assert max(module.sizes) > start


def test_a_change_anywhere_fails_the_same_test() -> None:
    class Naive(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            trainer.accumulate_grad_batches = 3 if batch_idx >= 3 else 2

    assert run(Naive(), accumulate_grad_batches=2)[1].worst > 0.1


class Saves(pl.Callback):
    """Saves once, after a batch of the run or, if asked, after the step that this batch belongs to."""

    def __init__(self, batch: int, path: Path, at_step: bool = True) -> None:
        self.batch, self.path, self.at_step, self.seen = batch, path, at_step, 0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen += 1
        ends = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if self.seen >= self.batch and (ends or not self.at_step):
            trainer.save_checkpoint(self.path)
            self.batch = 10**6


@pytest.mark.parametrize("estimator", ["paper", "unbiased"])
@pytest.mark.parametrize("batch", [6, 12, 18, 28])
def test_a_resumed_run_is_the_same(estimator: str, batch: int, tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    whole = growing(estimator=estimator, every_n_steps=2)
    trainer, module = run(whole, Saves(batch, path), loader=ResumableLoader)
    resumed = growing(estimator=estimator, every_n_steps=2)
    again, other = run(resumed, ckpt=path, loader=ResumableLoader)
    assert max(module.sizes) > 2
    assert_identical(state_of(trainer, module), state_of(again, other))
    assert_identical(whole.state_dict(), resumed.state_dict())
    assert other.worst < 1e-6


def test_a_run_that_was_stopped_within_a_window_continues_on_the_grid(tmp_path: Path) -> None:
    """Lightning loses the gradients of the unfinished window, with or without the callback."""
    path = tmp_path / "a.ckpt"
    run(growing(estimator="paper"), Saves(15, path, at_step=False), loader=ResumableLoader)
    saved = torch.load(path, weights_only=True)["callbacks"]["AdaptiveBatchSize"]
    assert 15 % saved["accumulation"] != 0
    _, module = run(growing(estimator="paper"), ckpt=path, loader=ResumableLoader)
    first, *later = module.sizes
    assert first == saved["accumulation"] - 15 % saved["accumulation"]
    assert set(later) <= set(range(saved["accumulation"], 7)) | {28 % n for n in range(2, 7)}
    assert module.worst < 1e-6


def test_a_run_that_continues_with_a_smaller_limit_keeps_to_it(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    _, module = run(growing(estimator="paper"), Saves(28, path), loader=ResumableLoader)
    assert max(module.sizes) > 4
    _, module = run(growing(estimator="paper", max_accumulation=4), ckpt=path, loader=ResumableLoader)
    assert max(module.sizes) == 4
    assert module.worst < 1e-6


def on_each_rank() -> tuple[list[int], float, float]:
    class Plain(Windows):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            self.sizes.append(self.trainer.accumulate_grad_batches)

    acting = growing(start=1, estimator="paper", eta=0.3)
    trainer, module = run(acting, module=Plain(), strategy="ddp", devices=2, log_every_n_steps=1)
    return (
        module.sizes,
        float(trainer.callback_metrics["batch_size/variance"]),
        float(next(module.parameters()).detach().sum()),
    )


def test_ranks_have_a_variance_and_change_together() -> None:
    one, other = on_ranks(2, on_each_rank)
    assert one == other
    assert one[0][0] == 1
    assert one[0][-1] > 1
    assert one[1] > 0


def test_it_measures_what_the_monitor_measures() -> None:
    monitor = GradientMonitor(figure=False, logits=False)
    acting = AdaptiveBatchSize(1e-3, 2, start=2, every_n_steps=1)
    trainer, _ = known(monitor, batches=8, accumulate_grad_batches=2)
    expected = trainer.callback_metrics["grad/norm"]
    trainer, _ = known(acting, batches=8)
    assert trainer.callback_metrics["batch_size/norm"] == pytest.approx(expected.item(), rel=1e-4)


def test_a_grad_scaler_changes_nothing() -> None:
    def scaled() -> Any:
        plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))
        plugin.autocast_context_manager = torch.enable_grad
        return plugin

    plain = run(growing(estimator="paper"))[1]
    assert run(growing(estimator="paper"), plugins=[scaled()])[1].sizes == plain.sizes


def test_rates_follow() -> None:
    class Rates(Windows):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            self.sizes.append(self.trainer.accumulate_grad_batches)
            assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01 * self.sizes[-1] / 2)

    for acting in ([growing(), BatchSizeLRScaling(8)], [BatchSizeLRScaling(8), growing()]):
        assert max(run(*acting, module=Rates())[1].sizes) > 2


def test_others_see_the_number_of_each_step() -> None:
    """AnnealingLaw multiplies losses, which Lightning has divided by the accumulated batches of their step."""

    class Losses(Windows):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            self.seen.append(loss.item())
            return loss

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            self.sizes.append(len(self.seen))
            self.means.append(sum(self.seen) / len(self.seen))
            self.seen = []

    module, law = Losses(), AnnealingLaw(0.5, figure=False)
    module.seen, module.means = [], []
    run(growing(), law, module=module)
    assert max(module.sizes) > 2
    assert law.curve[1] == pytest.approx(module.means, rel=1e-5)


def test_it_measures_the_gradients_of_sam() -> None:
    class Plain(Windows):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            self.sizes.append(self.trainer.accumulate_grad_batches)

    assert max(run(SAM(0.01), growing(estimator="paper"), module=Plain())[1].sizes) > 2


def test_a_schedule_that_counts_steps_is_told(caplog: pytest.LogCaptureFixture) -> None:
    class Scheduled(Windows):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 28)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    with caplog.at_level("INFO", "lightning.pytorch"):
        run(growing(), module=Scheduled())
    assert "a schedule counts optimizer steps" in caplog.text


def test_the_largest_size_needs_no_wait() -> None:
    acting = growing(max_accumulation=2)
    trainer, module = run(acting, log_every_n_steps=1)
    assert set(module.sizes) == {2}
    assert trainer.callback_metrics["batch_size/variance"] > 0


@pytest.mark.parametrize(
    ("acting", "arguments", "error"),
    [
        ([AdaptiveBatchSize()], {}, "cannot measure the noise of the gradient.*Set start=2"),
        (
            [AdaptiveBatchSize()],
            {"accumulate_grad_batches": 64},
            r"must be at least Trainer\(accumulate_grad_batches=64",
        ),
        ([growing(), growing(name="b")], {}, "would both set the number of accumulated batches"),
        ([growing(), GradientAccumulationScheduler({0: 2})], {}, "and GradientAccumulationScheduler would both set"),
        ([NormClipping(1.0), growing()], {}, "Put AdaptiveBatchSize in front of it"),
    ],
)
def test_what_it_refuses(acting: list[Any], arguments: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        run(*copy.deepcopy(acting), **arguments)
