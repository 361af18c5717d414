"""Local SGD and DiLoCo against loops by hand, and what others see between two exchanges."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import LearningRateFinder, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_grad.callbacks import Lookahead, NMSparsity, SkipNonFinite, ZClip
from lightning_grad.strategies import DGCStrategy, DiLoCoStrategy, LocalSGDStrategy
from lightning_grad.strategies._move_codecs import Int8, MoveCodec, TopK
from lightning_grad.testing import StopAt, make_classifier, on_ranks
from tests.contract.test_strategies_checkpoints import RememberLogits, assert_computes_what_was_validated
from tests.strategies.fits import finish, outcome, train_on_ranks
from tests.strategies.ranks import BATCH, BATCHES, Task, assert_close, assert_same, fit, said, samples

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
]

OPTIONS = {"lr": 0.1, "momentum": 0.9}
STEPS = 2 * BATCHES


# Against loops by hand.


def _by_hand(every: int, lr: float, momentum: float, overlap: bool = False) -> dict[str, Tensor]:
    """Train as the page of the method says, with torch's SGD as the outer optimizer."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    task = Task(**OPTIONS)
    inner, weights = task.configure_optimizers(), list(task.parameters())
    outer = [weight.detach().clone() for weight in weights]
    begun = [weight.detach().clone() for weight in weights]
    optimizer = torch.optim.SGD(outer, lr, momentum, nesterov=momentum > 0)
    late: list[Tensor] = []
    for step in range(1, STEPS + 1):
        batch = [part[(step - 1) % BATCHES * BATCH :][:BATCH] for part in samples()]
        inner.zero_grad()
        task.loss(batch, rank, ranks).backward()
        inner.step()
        if step % every and step < STEPS:
            continue
        own = [start - weight.detach() for start, weight in zip(begun, weights, strict=True)]
        for moves in ([late, own] if step == STEPS else [late]) if overlap else [own]:
            if moves:
                for weight, move in zip(outer, moves, strict=True):
                    weight.grad = move / ranks
                    dist.all_reduce(weight.grad)
                optimizer.step()
        ahead = [move * (overlap and step < STEPS) for move in own]
        late = own
        for weight, shared, move, start in zip(weights, outer, ahead, begun, strict=True):
            weight.data.copy_(shared - move)
            start.copy_(weight.data)
    return dict(task.state_dict())


def _rounds() -> None:
    for every in (1, 3, 5):
        assert_same(fit(DiLoCoStrategy(every), Task(**OPTIONS))["weights"], _by_hand(every, 0.7, 0.9))
    overlapped = fit(DiLoCoStrategy(3, outer_lr=0.5, outer_momentum=0.5, overlap=True), Task(**OPTIONS))["weights"]
    assert_same(overlapped, _by_hand(3, 0.5, 0.5, overlap=True))
    with pytest.raises(AssertionError):
        assert_same(overlapped, _by_hand(3, 0.5, 0.5))


def test_rounds_are_those_of_a_loop_by_hand():
    """Bitwise, also if the rounds do not divide the steps: the last step ends a round."""
    on_ranks(2, _rounds)


def _ddp() -> None:
    plain = fit("ddp", Task(lr=0.1))["weights"]
    assert_close(fit(LocalSGDStrategy(1), Task(lr=0.1))["weights"], plain)
    with pytest.raises(AssertionError):
        assert_close(fit(LocalSGDStrategy(2), Task(lr=0.1))["weights"], plain)
    dense = fit("ddp", Task(**OPTIONS))
    half = fit(LocalSGDStrategy(3, dense_fraction=0.5, gradient_as_bucket_view=True), Task(**OPTIONS))
    for step in range(STEPS):  # gradients are those of all ranks in the first half, and its own afterwards
        same = all(
            torch.equal(a, b) for a, b in zip(*(run["mean"][step].values() for run in (dense, half)), strict=True)
        )
        assert same == (step < STEPS // 2), step
    shapes = [value.numel() for value in dense["weights"].values()]
    # Six dense steps and two rounds, whose messages end with two numbers.
    assert half["ledger"]["sent_bytes"] == 4 * (8 * sum(shapes) + 2 * 2)
    assert half["ledger"]["dense_bytes"] == 4 * STEPS * sum(shapes)


def test_one_step_a_round_is_ddp_and_a_dense_share_begins_with_it():
    """SGD without momentum, up to rounding: the mean of moved weights is rounded otherwise than the mean gradient."""
    on_ranks(2, _ddp)


def _finds_first() -> list[str]:
    """Return what the optimizer steps of the run had as a model."""
    models: list[str] = []

    class Looks(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.max_steps == -1:
                models.append(type(trainer.strategy.model).__name__)

    finder = LearningRateFinder(num_training_steps=10, update_attr=False)
    module = Task(lr=0.1)
    module.lr = 0.1  # type: ignore[assignment]
    fit(LocalSGDStrategy(3, dense_fraction=0.5), module, [finder, Looks()])
    return models


def test_a_learning_rate_finder_does_not_use_up_the_dense_share():
    (models,) = on_ranks(1, _finds_first)
    half = STEPS // 2
    assert models == ["DistributedDataParallel"] * (half - 1) + ["Task"] * (half + 1)


# What others see within a round.


TABLE = torch.linspace(0.1, 0.9, 50)
assert not torch.equal(sum(TABLE * (1 / 3) for _ in range(3)), TABLE)  # the mean of equal numbers


class _Statistics(nn.Module):
    """A batch norm, and constant buffers: one is not finite, one would be rounded."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(32)
        self.register_buffer("mask", torch.full((50,), -torch.inf))
        self.register_buffer("table", TABLE.clone())
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x))  # type: ignore[no-any-return]


class _Seen(pl.Callback):
    """Keeps the state of the module in training, in validation, and after it."""

    def __init__(self) -> None:
        self.local: list[dict[str, Tensor]] = []
        self.shown: list[dict[str, Tensor]] = []
        self.after: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.local.append(_state(pl_module))

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self.shown.append(_state(pl_module))

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.after.append(_state(pl_module))


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in (*module.named_parameters(), *module.named_buffers())}


class _Validated(Task):
    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        pass


def _watched() -> tuple[dict[str, list[dict[str, Tensor]]], int]:
    seen = _Seen()
    loader = DataLoader(TensorDataset(*samples()), BATCH)
    module = _Validated(_Statistics(), **OPTIONS)
    module.val_dataloader = lambda: loader  # type: ignore[method-assign]
    strategy = LocalSGDStrategy(4)
    ran = fit(strategy, module, [seen], num_sanity_val_steps=0)
    return {"local": seen.local, "shown": seen.shown, "after": seen.after}, ran["ledger"]["sent_bytes"]


def test_validation_in_mid_round_has_the_model_of_the_last_exchange():
    (first, sent), (second, _), (third, _) = on_ranks(3, _watched)
    for shown, others in zip(first["shown"], zip(second["shown"], third["shown"], strict=True), strict=True):
        for other in others:
            assert_same(shown, other)
    assert_same(first["shown"][0], first["local"][3])  # after four of six steps
    assert_same(first["after"][0], first["local"][5])  # training goes on from the weights of this rank
    with pytest.raises(AssertionError):
        assert_same(first["after"][0], second["after"][0])
    assert_same(first["local"][11], first["after"][1])
    assert_same(second["local"][11], first["local"][11])
    # Statistics are those of all ranks, and constant buffers keep their bits, and are sent once.
    statistics = [seen["local"][2]["net.norm.running_mean"] for seen in (first, second, third)]
    assert not torch.equal(statistics[0], statistics[1])
    assert torch.equal(first["local"][3]["net.norm.num_batches_tracked"], torch.tensor(4))
    for end in (first["local"][3], first["local"][11]):
        assert torch.equal(end["net.mask"], torch.full((50,), -torch.inf))
        assert torch.equal(end["net.table"], TABLE)
    moving, tail = 32 + 32 + 4 * 32 + 4 + 64, 2
    assert sent == 3 * (4 * (moving + tail + 5) + 8) + 4 * 2 * 50


class _Late(_Statistics):
    """Uses fixed statistics in the first epoch, and puts a new buffer in place of the old one in each step."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(32))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.center = self.center.lerp(x.mean(0), 0.5)
        return super().forward(x)


class _ThawsNorm(pl.Callback):
    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        pl_module.net.norm.train(trainer.current_epoch > 0)


def _late(overlap: bool, log_every_n_steps: int) -> tuple[list[Tensor], dict[str, Tensor]]:
    seen, module = _Seen(), _Validated(_Late(), **OPTIONS)
    loader = DataLoader(TensorDataset(*samples()), BATCH)
    module.val_dataloader = lambda: loader  # type: ignore[method-assign]
    options = {"num_sanity_val_steps": 0, "log_every_n_steps": log_every_n_steps}
    weights = fit(LocalSGDStrategy(4, overlap=overlap), module, [seen, _ThawsNorm()], **options)["weights"]
    return [state["net.center"] for state in seen.shown], weights


@pytest.mark.parametrize(("overlap", "log_every_n_steps"), [(False, 1), (False, 100), (True, 100)])
def test_buffers_that_change_late_or_are_replaced_are_exchanged(overlap, log_every_n_steps):
    (shown, weights), (others, end) = on_ranks(2, _late, overlap, log_every_n_steps)
    assert_same(shown, others)  # in mid-round: a new tensor is hidden too
    assert_same(weights, end)
    assert weights["net.norm.num_batches_tracked"] == BATCHES
    assert weights["net.norm.running_mean"].abs().min() > 0


def _early() -> dict[str, Tensor]:
    module = Task(**OPTIONS)

    class Stops(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            trainer.should_stop = trainer.global_step == 4

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            self.state = _state(pl_module)

    stops = Stops()
    for overlap in (False, True):
        weights = fit(DiLoCoStrategy(3, overlap=overlap), module, [stops])["weights"]
        assert_same(weights, stops.state)
    return weights


def test_a_run_that_ends_in_mid_round_ends_with_an_exchange():
    """Before callbacks learn of the end, so what they save is the model of all ranks."""
    first, second = on_ranks(2, _early)
    assert_same(first, second)


class _Grows(pl.Callback):
    """Registers a buffer in mid-run, and lets another one grow in each step."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == 5:
            pl_module.register_buffer("new", torch.full((3,), float(trainer.global_rank)))
        pl_module.bank = torch.full((trainer.global_step,), float(trainer.global_rank))


def _grown() -> list[list[float]]:
    module = Task(lr=0.1)
    module.register_buffer("bank", torch.zeros(1))
    weights = fit(LocalSGDStrategy(4), module, [_Grows()])["weights"]
    return [weights["new"].tolist(), weights["bank"].tolist()]


def test_a_buffer_that_a_module_gets_or_resizes_in_mid_run_is_averaged():
    first, second = on_ranks(2, _grown)
    assert first[0] == second[0] == [0.5] * 3
    assert len(first[1]) == STEPS  # the callback runs after the last exchange


# Compression.


@pytest.mark.parametrize("codec", [TopK(0.25, 1, 1.0), Int8(1, 1.0)], ids=["topk", "int8"])
def test_what_arrives_and_what_is_kept_is_what_was_moved(codec: MoveCodec) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": torch.Size((30, 50)), "b": torch.Size((7, 3))}
    residuals = [{name: torch.zeros(shape.numel()) for name, shape in shapes.items()} for _ in range(3)]
    moved = {name: torch.zeros(shape) for name, shape in shapes.items()}
    arrived = {name: torch.zeros(shape) for name, shape in shapes.items()}
    for _ in range(4):
        messages = []
        for kept in residuals:
            moves = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
            messages.append(codec.pack({name: (move, kept[name]) for name, move in moves.items()}))
            moved = {name: total + moves[name] / 3 for name, total in moved.items()}
        assert messages[0].numel() == sum(codec.sent_bytes(shape.numel()) for shape in shapes.values())
        mean = codec.mean(torch.stack(messages), shapes)
        arrived = {name: total + mean[name] for name, total in arrived.items()}
    for name, shape in shapes.items():
        kept = sum(one[name] for one in residuals) / 3
        assert kept.abs().max() > 0
        assert_close(arrived[name] + kept.view(shape), moved[name], 1e-5)


def test_a_residual_decays_and_a_move_that_is_not_finite_shows():
    codec, residual = TopK(0.5, 1, 0.5), torch.tensor([0.0, 2.0])
    codec.pack({"a": (torch.tensor([3.0, 0.0]), residual)})
    assert residual.tolist() == [0.0, 1.0]
    for one in (codec, Int8(1, 1.0)):
        message = one.pack({"a": (torch.tensor([1.0, torch.nan]), torch.zeros(2))})
        assert one.mean(message[None], {"a": torch.Size((2,))})["a"].isnan().any()


# Guards.


class _Breaks(pl.Callback):
    """Makes the loss of rank 1 NaN in the second step."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        step = pl_module.training_step

        def breaking(batch: Any, batch_idx: int) -> Any:
            loss = step(batch, batch_idx)
            return loss * torch.nan if trainer.global_rank == trainer.global_step == 1 else loss

        pl_module.training_step = breaking


def _nan(callbacks: Callable[[], list[pl.Callback]]) -> list[bool]:
    finite: list[bool] = []

    class Looks(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            finite.append(all(weight.isfinite().all() for weight in pl_module.parameters()))

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "SkipNonFinite skips a step")
        fit(LocalSGDStrategy(3), Task(**OPTIONS), [*callbacks(), Looks()], epochs=1)
    return finite


def test_a_weight_that_is_not_finite_spreads_with_the_next_exchange_unless_a_guard_skips_the_step():
    works = (lambda: [_Breaks()], lambda: [_Breaks(), SkipNonFinite()])
    (first, guarded), (second, also) = on_ranks(2, lambda: [_nan(work) for work in works])
    assert first == [True, True, False, False, False, False]
    assert second == [True] + [False] * 5
    assert guarded == also == [True] * 6


# Parameters that come and go.


class _Thaws(pl.Callback):
    """Freezes the head in the first round's second step, and gives it back after the third epoch has begun."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, batch: Any, outputs: Any, batch_idx: int) -> None:
        if trainer.global_step == 2:
            pl_module.net[2].requires_grad_(False)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            pl_module.net[2].requires_grad_(True)


class _Taught(Task):
    """Has a teacher: an average of the net that no optimizer trains."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.teacher = nn.Linear(32, 64).requires_grad_(False)

    def on_train_batch_end(self, *_: Any) -> None:
        with torch.no_grad():
            self.teacher.weight.lerp_(self.net[0].weight, 0.1)


def _come_and_go(overlap: bool) -> list[dict[str, Tensor]]:
    strategy = LocalSGDStrategy(4, overlap=overlap)
    changing = fit(strategy, Task(**OPTIONS), [_Thaws()])["weights"]
    pl.seed_everything(1, verbose=False)
    taught = fit(LocalSGDStrategy(4, overlap=overlap, average_frozen=True), _Taught(lr=0.1))["weights"]
    pl.seed_everything(1, verbose=False)
    apart = fit(LocalSGDStrategy(4, overlap=overlap), _Taught(lr=0.1))["weights"]
    return [changing, taught, {"teacher": apart["teacher.weight"]}]


@pytest.mark.parametrize("overlap", [False, True])
def test_a_parameter_that_is_frozen_in_mid_round_is_exchanged_once_more(overlap):
    first, second = on_ranks(2, _come_and_go, overlap)
    for one, other in zip(first[:2], second[:2], strict=True):
        assert_same(one, other)
    with pytest.raises(AssertionError):
        assert_same(first[2], second[2])


# Refusals, in words that say what to do.


def _raises(words: str, strategy: Any, callbacks: Any = (), module: Any = None, **arguments: Any) -> None:
    with pytest.raises(ValueError, match=words):
        train_on_ranks(strategy, callbacks, module, **arguments)


class _Stream(IterableDataset):  # type: ignore[type-arg]
    """The samples, without a length."""

    def __iter__(self) -> Iterator[Any]:
        return zip(*samples(), strict=True)


def _refusals() -> None:
    uneven = "the same number of batches on every rank, but they have 4 to 6.*set limit_train_batches"
    _raises(uneven, LocalSGDStrategy(2), limit_train_batches=4 + 2 * dist.get_rank(), use_distributed_sampler=False)
    _raises("set sync_batchnorm=False", LocalSGDStrategy(2), sync_batchnorm=True)
    own = make_classifier(optimizer="sgd")
    own.norm = nn.SyncBatchNorm(32)
    _raises(r"SyncBatchNorm \(norm\) exchanges statistics in every forward pass", LocalSGDStrategy(2), module=own)
    _raises("Lookahead pulls each rank back to its own slow weights", DiLoCoStrategy(2), [Lookahead(k=2)])
    endless = {"max_epochs": -1, "limit_train_batches": 4}
    _raises(
        "no known end. Set max_steps of the Trainer, max_epochs", LocalSGDStrategy(2, dense_fraction=0.5), **endless
    )
    with pytest.raises(ValueError, match=r"no known end\. Set max_steps of the Trainer"):
        fit(LocalSGDStrategy(2, dense_fraction=0.5), data=_Stream(), epochs=1)
    with said() as lines:
        sent = fit(LocalSGDStrategy(3, dense_fraction=0.1), data=_Stream())["ledger"]["steps"]
    assert any("waits for the end of the first epoch" in line for line in lines) == (dist.get_rank() == 0)
    assert sent == BATCHES + 1 + 2


def test_runs_that_cannot_train_apart_are_refused():
    on_ranks(2, _refusals)


# Rank files.


def _save(folder: Path, overlap: bool = False) -> None:
    saving = ModelCheckpoint(folder, "mid", every_n_train_steps=5)
    train_on_ranks(DiLoCoStrategy(3, overlap=overlap), [saving, StopAt(6)], make_classifier())


def _save_in_mid_round(folder: Path, overlap: bool = False) -> None:
    with pytest.raises(RuntimeError, match="on purpose"):
        _save(folder, overlap)


def _go_on(folder: Path, **changes: Any) -> dict[str, Any]:
    arguments = {"module": make_classifier(), "ckpt": folder / "mid.ckpt", "max_epochs": 3}
    return finish(DiLoCoStrategy(3, **changes), **arguments)


def _turn_on_overlap(folder: Path) -> list[dict[str, Tensor]]:
    saving = ModelCheckpoint(folder, "mid", every_n_train_steps=5)
    with pytest.raises(RuntimeError, match="on purpose"):
        train_on_ranks(LocalSGDStrategy(3), [saving, StopAt(6)])
    runs = [finish(LocalSGDStrategy(3, overlap=overlap), ckpt=folder / "mid.ckpt") for overlap in (False, True)]
    return [run["module"] for run in runs]


def test_overlap_that_begins_in_mid_round_keeps_the_steps_of_that_round(tmp_path):
    """On one rank, local SGD is SGD, with overlap or without."""
    ((plain, overlapped),) = on_ranks(1, _turn_on_overlap, tmp_path)
    assert_close(overlapped, plain)


def _resume_a_schedule_of_numpy(folder: Path) -> int:
    def build() -> Task:
        module = Task()
        optimizer = torch.optim.SGD(module.parameters(), 0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: np.cos(step / 100))
        module.configure_optimizers = lambda: ([optimizer], [schedule])  # type: ignore[method-assign]
        return module

    saving = ModelCheckpoint(folder, "mid", every_n_train_steps=BATCHES)
    fit(LocalSGDStrategy(4), build(), [saving], epochs=1, enable_checkpointing=True)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = pl.Trainer(accelerator="cpu", devices=1, strategy=LocalSGDStrategy(4), max_epochs=2, **quiet)
    loader = DataLoader(TensorDataset(*samples()), BATCH)
    trainer.fit(build(), loader, ckpt_path=folder / "mid.ckpt", weights_only=False)
    return trainer.global_step


def test_rank_files_with_other_objects_are_read_if_the_checkpoint_may_have_them(tmp_path):
    """A schedule that uses numpy leaves its numbers in the state of the optimizer."""
    assert on_ranks(1, _resume_a_schedule_of_numpy, tmp_path) == [STEPS]


def _go_on_on_three(folder: Path) -> tuple[Any, list[str]]:
    with pytest.raises(ValueError, match=r"saved on 2 rank\(s\), and this run has 3. Each rank has local states"):
        _go_on(folder / "plain")
    with said() as lines:
        plain = _go_on(folder / "plain", residual_policy="mean")
        late = _go_on(folder / "late", residual_policy="mean", overlap=True)
    return (plain, late), lines


def test_another_number_of_ranks_is_refused_or_gets_the_mean(tmp_path):
    on_ranks(2, _save_in_mid_round, tmp_path / "plain")
    on_ranks(2, _save_in_mid_round, tmp_path / "late", True)
    (first, lines), (second, _), _ = on_ranks(3, _go_on_on_three, tmp_path)
    for one, other in zip(first, second, strict=True):
        assert_same(one["module"], other["module"])
    assert any("moves that were on their way are lost" in line for line in lines)
    (states,) = [torch.load(path, weights_only=True) for path in (tmp_path / "plain").glob("*.ranks/*/1.pt")]
    assert states["own"]["optimizers"][0]["state"][0]["exp_avg"].abs().sum() > 0
    assert states["shared"] == {}


def _go_on_as_another(folder: Path) -> list[str]:
    with said() as lines:
        finish(
            DGCStrategy(0.05, warmup=None, min_numel=1),
            module=make_classifier(),
            ckpt=folder / "mid.ckpt",
            max_epochs=3,
        )
        _go_on(folder, dense_fraction=1.0)
    return lines


def test_a_checkpoint_goes_to_another_strategy_without_the_local_states(tmp_path):
    on_ranks(1, _save_in_mid_round, tmp_path)
    (lines,) = on_ranks(1, _go_on_as_another, tmp_path)
    assert any("the checkpoint was saved by DiLoCoStrategy" in line for line in lines), lines
    assert any("DiLoCoStrategy is plain DDP now: the local states of DiLoCoStrategy are lost" in line for line in lines)


def _beside(folder: Path, ranks_save_callbacks: bool) -> list[str]:
    """Clip by what each rank has seen, prune, and validate in mid-round; return what a resumed run ends with."""

    class Strategy(DiLoCoStrategy):
        def state_beyond(self, checkpoint: Any) -> dict[str, Any]:
            state = super().state_beyond(checkpoint)
            return state if ranks_save_callbacks else {**state, "callbacks": {}}

    def build() -> tuple[Any, list[pl.Callback]]:
        clipping = ZClip(z_threshold=0.1, alpha=0.5, warmup_steps=2)
        return Strategy(4, overlap=True, compression="int8", min_numel=1), [clipping, NMSparsity(**NMSparsity.trial)]

    strategy, callbacks = build()
    saving = ModelCheckpoint(folder, save_top_k=-1, monitor="val_loss")
    seen = RememberLogits()
    trainer, module = train_on_ranks(strategy, [*callbacks, seen, saving], make_classifier())
    expected = outcome(trainer, module)
    if dist.get_world_size() == 1:
        for path in folder.glob("*.ckpt"):
            assert_computes_what_was_validated(path, seen.by_step)
    dist.barrier()
    for path in sorted(folder.glob("*.ckpt"))[:1]:
        strategy, callbacks = build()
        resumed = outcome(*train_on_ranks(strategy, callbacks, make_classifier(), ckpt=path))
        assert_same(resumed["module"], expected["module"])
        assert_same(resumed["memory"], expected["memory"])
    return [path.name for path in folder.glob("*.ckpt")]


def test_callbacks_resume_on_each_rank_with_what_it_has_seen(tmp_path):
    """Also under a view of the weights, while a message is on its way; the checkpoint has what was validated."""
    for ranks in (1, 2):
        (found, *_) = on_ranks(ranks, _beside, tmp_path / str(ranks), True)
        assert len(found) == 3
    with pytest.raises(AssertionError):
        on_ranks(2, _beside, tmp_path / "lost", False)
