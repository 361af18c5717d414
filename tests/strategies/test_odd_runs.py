"""Runs that are broken off at bad moments, or are unlike what most people do: nothing is lost, and ranks stay equal."""

from __future__ import annotations

import copy
import csv
import functools
import importlib
import itertools
import shutil
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_grad.strategies import DGCStrategy, PowerSGDStrategy, _lost_ranks, _rank_files
from lightning_grad.testing import StopIn, on_ranks
from tests.strategies.fits import outcome
from tests.strategies.ranks import BATCH, BATCHES, Task, assert_close, assert_same, dgc, samples

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:`.fit.ckpt_path=None.` was called without a model"),
    pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available"),
    pytest.mark.filterwarnings("ignore:It is recommended to use .self.log"),
]

Build = Callable[..., Any]


def power(**changes: Any) -> PowerSGDStrategy:
    return PowerSGDStrategy(**{"rank": 2, "min_numel": 1, "min_gain": 1.0, **changes})


BOTH = [(dgc,), (power,)]


def fit(
    strategy: Any, callbacks: Any = (), module: Any = None, ckpt: Any = None, epochs: int = 2, **options: Any
) -> tuple[Any, Any]:
    """Train on batches that are all the same, so that a batch which is run again is, for DDP itself, the one it was."""
    module = Task(momentum=0.9, weight_decay=0.01) if module is None else module
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=dist.get_world_size(),
        strategy=strategy,
        max_epochs=epochs,
        callbacks=list(callbacks),
        use_distributed_sampler=False,
        enable_checkpointing=any(isinstance(callback, pl.callbacks.Checkpoint) for callback in callbacks),
        **{**quiet, **options},
    )
    x, y = (part[:BATCH] for part in samples())
    data = TensorDataset(x.repeat(BATCHES, 1), y.repeat(BATCHES))
    trainer.fit(module, DataLoader(data, BATCH), ckpt_path=ckpt)
    return trainer, module


def finish(*arguments: Any, **more: Any) -> dict[str, Any]:
    return outcome(*fit(*arguments, **more))


@functools.cache  # on a rank, for the cases that it runs
def uninterrupted(build: Build) -> dict[str, Any]:
    return finish(build())


def stop(match: str | None, *arguments: Any, kind: Any = RuntimeError, **more: Any) -> None:
    """Fit, which must raise on every rank, and wait for all of them to have written what they write."""
    with pytest.raises(kind, match=match):
        fit(*arguments, **more)
    dist.barrier()


def said(work: Callable[[], Any]) -> tuple[Any, str]:
    """Return what ``work`` does, and all warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = work()
    return result, "\n".join(str(warning.message) for warning in caught)


def assert_equal_on_ranks(states: list[dict[str, Any]]) -> None:
    for other in states[1:]:
        assert_same(other["module"], states[0]["module"])
        assert_same(other["optimizers"], states[0]["optimizers"])


def assert_resumed(pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    """Take what an uninterrupted run and the resumed one left on each rank."""
    assert_equal_on_ranks([resumed for _, resumed in pairs])
    for expected, resumed in pairs:
        assert_same(resumed, expected)


class LooksAtStart(pl.Callback):
    """Keeps the strategy's memory as it is before the first step of a fit."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.memory, self.steps = copy.deepcopy(trainer.strategy.memory), trainer.strategy.ledger.steps


class SavesEpochs(pl.Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.save_checkpoint(self.folder / f"{trainer.current_epoch}.ckpt")


# Names of checkpoints.


class LogsItsOwnLoss(Task):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch, self.global_rank, self.trainer.world_size)
        self.log("loss", loss, on_epoch=True, on_step=False)
        return loss


def _save_by_loss(build: Build, folder: Path) -> tuple[Any, Any]:
    saving = ModelCheckpoint(folder, filename="{epoch}-{loss:.4f}", monitor="loss", save_top_k=1)
    trainer, _ = fit(build(), [saving], LogsItsOwnLoss(momentum=0.9), epochs=3)
    names = [None] * 2
    dist.all_gather_object(names, saving.best_model_path)
    assert names[0] != names[1], "the ranks would name it differently, or this tests nothing"
    expected = finish(build(), (), LogsItsOwnLoss(momentum=0.9), epochs=4)
    resumed = finish(build(), (), LogsItsOwnLoss(momentum=0.9), epochs=4, ckpt=names[0])
    assert trainer.global_step == 3 * BATCHES
    return expected, resumed


@pytest.mark.parametrize("case", BOTH)
def test_all_files_lie_where_rank_0_says_when_the_name_holds_a_metric_of_the_rank(case, together):
    pairs, folder = together(_save_by_loss, BOTH, case)
    assert_resumed(pairs)
    (path,) = folder.glob("*.ckpt")
    assert sorted(folder.iterdir()) == [path, folder / f"{path.name}.ranks"]
    assert sorted(file.name for file in folder.rglob("*.pt")) == ["0.pt", "1.pt"]


# Exceptions at bad moments.


class FailsOnce:
    """A function that raises at one of its calls, and is what it was at all others."""

    def __init__(self, function: Callable[..., Any], at: int) -> None:
        self.function, self.at, self.calls = function, at, 0

    def __call__(self, *arguments: Any, **more: Any) -> Any:
        self.calls += 1
        if self.calls == self.at:
            raise RuntimeError("failed on purpose")
        return self.function(*arguments, **more)


def _fail_in_the_update(folder: Path) -> Any:
    functional = importlib.import_module("torch.optim.sgd")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "sgd", FailsOnce(functional.sgd, at=5))
        stop("on purpose", dgc(), [OnExceptionCheckpoint(folder)])
    path = folder / "on_exception.ckpt"
    fit("ddp", ckpt=path)
    return finish(dgc(), ckpt=path)["steps"]


def test_a_checkpoint_of_an_update_that_failed_holds_the_users_groups(tmp_path):
    assert on_ranks(2, _fail_in_the_update, tmp_path) == [2 * BATCHES] * 2
    saved = torch.load(tmp_path / "on_exception.ckpt", weights_only=True)["optimizer_states"][0]
    (group,) = saved["param_groups"]
    assert (group["momentum"], group["weight_decay"], len(group["params"])) == (0.9, 0.01, 4)


class Patches(pl.Callback):
    """Puts a function that fails once in the place of one of the strategy's collectives."""

    def __init__(self, name: str, at: int) -> None:
        self.name, self.at = name, at

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        ranks = trainer.strategy.ranks
        setattr(ranks, self.name, FailsOnce(getattr(ranks, self.name), self.at))


def _fail_to_exchange(build: Build, collective: str, at: int, folder: Path) -> tuple[Any, Any]:
    stop("on purpose", build(), [Patches(collective, at), OnExceptionCheckpoint(folder)])
    return uninterrupted(build), finish(build(), ckpt=folder / "on_exception.ckpt")


def adapted() -> Any:
    return power(adapt="lgreco", adapt_every=3)


# The last two fail in a plan: while errors are averaged, and while rank 0 sends its choice.
EXCHANGES = [(dgc, "gather", 1), (dgc, "gather", 4), (power, "mean_", 7), (power, "mean_", 8)]
EXCHANGES += [(adapted, "mean_", 7), (adapted, "begin_copy_", 1)]


@pytest.mark.parametrize("case", EXCHANGES)
def test_what_was_taken_in_but_not_exchanged_is_not_taken_in_again(case, together):
    assert_resumed(together(_fail_to_exchange, EXCHANGES, case)[0])


def _stop_on_either_side(build: Build, hooks: tuple[str, str], folder: Path) -> tuple[Any, Any]:
    hook = hooks[dist.get_rank()]
    step = 4 if hook == "on_train_batch_end" else 3  # the fourth update is made, or is next
    stop("on purpose", build(), [StopIn(hook, step), OnExceptionCheckpoint(folder)], log_every_n_steps=1)
    return uninterrupted(build), finish(build(), ckpt=folder / "on_exception.ckpt")


_AFTER_AND_BEFORE = ("on_train_batch_end", "on_before_optimizer_step")


SIDES = list(itertools.product([dgc, power], [_AFTER_AND_BEFORE, _AFTER_AND_BEFORE[::-1]]))


@pytest.mark.parametrize("case", SIDES)
def test_ranks_that_stop_on_either_side_of_an_update_go_on_together(case, together):
    assert_resumed(together(_stop_on_either_side, SIDES, case)[0])


class StopsOneRank(pl.Callback):
    """Raises on rank 0 in a step; the other rank finds out when rank 0 has ended."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_before_backward(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step and trainer.global_rank == 0:
            trainer.strategy.barrier = lambda *_: None  # in which Lightning would wait for the other, after the save
            raise RuntimeError("alone, on purpose")


def _stop_alone(build: Build, folder: Path, former: bool) -> None:
    _rank_files._GRACE_SECONDS = _lost_ranks._GRACE_SECONDS = 0.2
    path, earlier = folder / "on_exception.ckpt", None
    if former:
        stop("on purpose", build(), [StopIn("on_before_optimizer_step", 3), OnExceptionCheckpoint(folder)])
        earlier = path
    with pytest.raises(RuntimeError):  # on rank 1 gloo's, from Lightning's barrier after a save
        said(lambda: fit(build(), [StopsOneRank(5), OnExceptionCheckpoint(folder)], ckpt=earlier))
    if dist.get_rank() == 0:
        files = [str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()]
        (folder / "files.txt").write_text("\n".join(files))


ALONE = list(itertools.product([dgc, power], [False, True]))


@pytest.fixture(scope="module")
def stopped_alone(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, tuple[Path, list[Any]]]:
    """Return of each case the folder, and what an uninterrupted run and the resumed one left on each rank."""
    folders = {case: tmp_path_factory.mktemp("alone") for case in ALONE}
    for (build, former), folder in folders.items():
        on_ranks(2, _stop_alone, build, folder, former)  # whose group is of no use afterwards

    def resume() -> list[Any]:
        paths = {case: folder / "on_exception.ckpt" for case, folder in folders.items()}
        return [(uninterrupted(build), finish(build(), ckpt=path)) for (build, _), path in paths.items()]

    resumed = zip(*on_ranks(2, resume), strict=True)
    return {case: (folders[case], list(ranks)) for case, ranks in zip(ALONE, resumed, strict=True)}


@pytest.mark.parametrize("case", ALONE)
def test_one_rank_that_fails_alone_saves_what_can_be_resumed(case, stopped_alone):
    """The former checkpoint, if there is one; else its own, for which the other rank writes its file when it notices."""
    folder, pairs = stopped_alone[case]
    path = folder / "on_exception.ckpt"
    assert path.name in (folder / "files.txt").read_text().splitlines()
    assert torch.load(path, weights_only=True)["global_step"] == (3 if case[1] else 5)
    assert_resumed(pairs)


class InterruptsSend(pl.Callback):
    """Presses Ctrl-C while a message is made, before and after the collective in it."""

    def __init__(self, at: int, after: bool) -> None:
        self.at, self.after, self.calls = at, after, 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        send = trainer.strategy.send

        def interrupted(gradients: Any) -> Any:
            self.calls += 1
            if self.calls == self.at and not self.after:
                signal.raise_signal(signal.SIGINT)
            message = send(gradients)
            if self.calls == self.at and self.after:
                signal.raise_signal(signal.SIGINT)
            return message

        trainer.strategy.send = interrupted


def _interrupt_send(build: Build, after: bool, folder: Path) -> tuple[Any, Any]:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    callbacks = [InterruptsSend(4, after), OnExceptionCheckpoint(folder)]
    stop(None, build(), callbacks, kind=SystemExit)  # as which Lightning hands on a KeyboardInterrupt
    return uninterrupted(build), finish(build(), ckpt=folder / "on_exception.ckpt")


INTERRUPTS = list(itertools.product([dgc, power], [False, True]))


@pytest.mark.parametrize("case", INTERRUPTS)
def test_an_interrupt_within_an_exchange_waits_for_its_end(case, together):
    pairs, folder = together(_interrupt_send, INTERRUPTS, case)
    assert_resumed(pairs)
    assert torch.load(folder / "on_exception.ckpt", weights_only=True)["global_step"] == 3


# What is saved and read.


def _resume_after_rank_1_counted_otherwise(build: Build, folder: Path) -> tuple[Any, Any]:
    trainer, _ = fit(build(), epochs=1)
    trainer.save_checkpoint(folder / "saved.ckpt")
    dist.barrier()
    if dist.get_rank() == 1:
        (file,) = folder.rglob("1.pt")
        state = torch.load(file, weights_only=True)
        state.get("shared", state)["ledger"]["steps"] += 1
        torch.save(state, file)
    dist.barrier()
    return finish(build()), finish(build(), ckpt=folder / "saved.ckpt")


def _dgc_that_turns() -> DGCStrategy:
    return dgc(warmup=[0.5, 0.2], warmup_steps=4)


def _power_that_turns() -> PowerSGDStrategy:
    return power(start_step=7)


TURNS = [(_dgc_that_turns,), (_power_that_turns,)]


@pytest.mark.parametrize("case", TURNS)
def test_the_count_of_rank_0_is_that_of_all(case, together):
    """On one count too much, a rank would turn to another density or to compression a step before the others."""
    assert_resumed(together(_resume_after_rank_1_counted_otherwise, TURNS, case)[0])


class SkipsOddBatches(Task):
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        if batch_idx % 2 == 0:
            optimizer.step(closure=optimizer_closure)
        else:
            optimizer_closure()


def _resume_after_a_batch_that_was_skipped(build: Build, folder: Path) -> tuple[Any, Any]:
    expected = finish(build(), [SavesEpochs(folder)], SkipsOddBatches(momentum=0.9))
    return expected, finish(build(), (), SkipsOddBatches(momentum=0.9), ckpt=folder / "0.ckpt")


@pytest.mark.parametrize("case", BOTH)
def test_a_step_that_the_module_leaves_out_leaves_no_message_behind(case, together):
    assert_resumed(together(_resume_after_a_batch_that_was_skipped, BOTH, case)[0])


def _stop_after_a_batch_that_was_skipped(build: Build, hook: str, step: int, folder: Path) -> list[Any]:
    callbacks = [StopIn(hook, step), OnExceptionCheckpoint(folder)]
    stop("on purpose", build(), callbacks, SkipsOddBatches(momentum=0.9))
    return [finish(build(), (), SkipsOddBatches(momentum=0.9), path) for path in (None, folder / "on_exception.ckpt")]


SKIPS = [
    (build, *at) for build in (dgc, power) for at in (("on_train_batch_start", 4), ("on_train_epoch_end", BATCHES))
]


@pytest.mark.parametrize("case", SKIPS)
def test_nor_does_one_that_is_followed_by_an_exception(case, together):
    """The message is of a batch that is over; the next one must not take it for its own."""
    assert_resumed(together(_stop_after_a_batch_that_was_skipped, SKIPS, case)[0])


def _resume_with_another_rank(before: int, after: int, folder: Path) -> tuple[Any, Any, Any]:
    trainer, _ = fit(power(rank=before), epochs=1)
    trainer.save_checkpoint(folder / "saved.ckpt")
    look = LooksAtStart()
    return copy.deepcopy(trainer.strategy.memory), look, finish(power(rank=after), [look], ckpt=folder / "saved.ckpt")


OTHER_RANK = [(2, 1), (1, 2)]


@pytest.mark.parametrize("case", OTHER_RANK)
def test_powersgd_keeps_its_error_when_it_goes_on_with_another_rank(case, together):
    found, _ = together(_resume_with_another_rank, OTHER_RANK, case)
    for saved, look, left in found:
        for name, kept in saved.items():
            assert kept["error"].norm() > 0
            assert_same(look.memory[name]["error"], kept["error"])
            assert left["memory"][name]["right"].shape[1] == case[1]
        assert all(value.isfinite().all() for value in left["module"].values())
    assert_equal_on_ranks([left for *_, left in found])


def _resume_in_flight(name: str, value: Any, folder: Path) -> tuple[Any, str]:
    stop("on purpose", dgc(), [StopIn("on_before_optimizer_step", 3), OnExceptionCheckpoint(folder)])
    return said(lambda: finish(dgc(**{name: value}), ckpt=folder / "on_exception.ckpt"))


UNREADABLE = [("value_dtype", "float16"), ("ratio", 0.2), ("ratio", 0.01)]


@pytest.mark.parametrize("case", UNREADABLE)
def test_a_message_that_other_settings_cannot_read_is_dropped(case, together):
    found, _ = together(_resume_in_flight, UNREADABLE, case)
    assert "DGCStrategy has new settings: the gradient that was exchanged but not used yet is lost" in found[0][1]
    for left, _ in found:
        assert all(value.isfinite().all() and value.abs().max() < 10 for value in left["module"].values())
        assert left["steps"] == 2 * BATCHES
    assert_equal_on_ranks([left for left, _ in found])


def _resume_with_exclude(folder: Path) -> tuple[Any, Any, str]:
    trainer, _ = fit(dgc(), epochs=1)
    trainer.save_checkpoint(folder / "saved.ckpt")
    look = LooksAtStart()
    left, words = said(lambda: finish(dgc(exclude=["net.0"]), [look], ckpt=folder / "saved.ckpt"))
    return look, left, words


def test_what_is_excluded_on_resuming_is_forgotten_by_name(tmp_path):
    found = on_ranks(2, _resume_with_exclude, tmp_path)
    assert "no longer compresses net.0.weight: their unsent gradients are lost" in found[0][2]
    for look, left, _ in found:
        assert set(look.memory) == set(left["memory"]) == {"net.2.weight"}


def _resume_with_reset(build: Build, with_files: bool, folder: Path) -> tuple[Any, Any, Any, str]:
    expected = finish(build(), [SavesEpochs(folder)])
    dist.barrier()
    if not with_files and dist.get_rank() == 0:
        shutil.rmtree(folder / "0.ckpt.ranks")
    dist.barrier()
    look = LooksAtStart()
    left, words = said(lambda: finish(build(residual_policy="reset"), [look], ckpt=folder / "0.ckpt"))
    return expected, left, look, words


RESETS = list(itertools.product([dgc, power], [True, False]))


@pytest.mark.parametrize("case", RESETS[::2])
def test_reset_drops_nothing_while_all_files_are_there(case, together):
    found, _ = together(_resume_with_reset, RESETS, case)
    assert_resumed([(expected, left) for expected, left, *_ in found])
    assert "lost" not in found[0][3]


@pytest.mark.parametrize("case", RESETS[1::2])
def test_reset_begins_empty_without_the_files_and_says_so(case, together):
    found, _ = together(_resume_with_reset, RESETS, case)
    assert "starts without unsent gradients: the unsent gradients of the saved run are lost" in found[0][3]
    for _, left, look, _ in found:
        assert (look.memory, look.steps) == ({}, 0)
        assert left["steps"] == 2 * BATCHES
    assert_equal_on_ranks([left for _, left, *_ in found])


def _resume_a_renamed_copy(folder: Path) -> str:
    trainer, _ = fit(dgc(), epochs=1)
    trainer.save_checkpoint(folder / "epoch=0.ckpt")
    dist.barrier()
    if dist.get_rank() == 0:
        (folder / "elsewhere").mkdir()
        shutil.copy(folder / "epoch=0.ckpt", folder / "elsewhere" / "model.ckpt")
    dist.barrier()
    with pytest.raises(FileNotFoundError) as error:
        fit(dgc(), ckpt=folder / "elsewhere" / "model.ckpt")
    return str(error.value)


def test_who_copies_and_renames_a_checkpoint_is_told_the_folder_that_belongs_to_it(tmp_path):
    for message in on_ranks(2, _resume_a_renamed_copy, tmp_path):
        assert "Copy epoch=0.ckpt.ranks along with the checkpoint" in message
        assert str(tmp_path / "elsewhere" / "model.ckpt") in message


class SlowAtRankFiles(TorchCheckpointIO):
    """Takes its time over the file of rank 1, and notes which rank files are there when a checkpoint is written."""

    def __init__(self) -> None:
        self.seen: list[list[str]] = []

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        if str(path).endswith("1.pt"):
            time.sleep(0.2)
        if "state_dict" in checkpoint:
            save = Path(f"{path}.ranks", checkpoint["lightning_grad_ranks"]["save"])
            self.seen.append(sorted(file.name for file in save.glob("*.pt")))
        super().save_checkpoint(checkpoint, path, storage_options)


def _save_slowly(folder: Path) -> list[list[str]]:
    disk = SlowAtRankFiles()
    fit(dgc(), [SavesEpochs(folder)], plugins=[AsyncCheckpointIO(disk)])
    return disk.seen


def test_a_checkpoint_that_is_written_by_a_thread_comes_after_its_rank_files(tmp_path):
    assert on_ranks(2, _save_slowly, tmp_path)[0] == [["0.pt", "1.pt"]] * 2


# Odd models and optimizers.


class HeadOnly(Task):
    """Trains the last layer; the others have gradients that nobody zeroes, or are frozen, or join later."""

    def __init__(self, frozen: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.net[0].requires_grad_(not frozen)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net[2].parameters(), **self.options)


class Joins(pl.Callback):
    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.before = getattr(self, "before", None) or copy.deepcopy(getattr(trainer.strategy, "memory", None))
        if trainer.current_epoch == 1:
            trainer.optimizers[0].add_param_group({"params": list(pl_module.net[0].parameters())})


def _beside_and_alone(clip: float | None, folder: Path) -> list[dict[str, Any]]:
    modules = [HeadOnly(frozen, momentum=0.9) for frozen in (False, True)]
    return [finish(dgc(ratio=0.5, local_clip=clip), (), module, epochs=4) for module in modules]


@pytest.mark.parametrize("case", CLIPS := [(0.05,), (None,)])
def test_what_no_optimizer_moves_changes_nothing(case, together):
    for beside, alone in together(_beside_and_alone, CLIPS, case)[0]:
        assert set(beside["memory"]) == {"net.2.weight"}
        assert_same(beside["memory"], alone["memory"])
        assert_same(beside["module"], alone["module"])


JOIN = [(0.05,), (0.9999999,)]


def _join(ratio: float, folder: Path) -> tuple[Any, Any, Any]:
    joins, options = Joins(), {"momentum": 0.9, "weight_decay": 0.01}
    left = finish(dgc(ratio=ratio, momentum_masking=False), [joins], HeadOnly(**options))
    return joins.before, left, finish("ddp", [Joins()], HeadOnly(**options))


def test_what_joins_the_optimizer_later_is_compressed_from_then_on(together):
    found, _ = together(_join, JOIN, JOIN[0])
    for before, left, _ in found:
        assert set(before) <= {"net.2.weight"}
        assert set(left["memory"]) == {"net.0.weight", "net.2.weight"}
        assert left["memory"]["net.0.weight"]["residual"].norm() > 0
    assert_equal_on_ranks([left for _, left, _ in found])


def test_what_joins_the_optimizer_later_moves_as_in_plain_ddp(together):
    for _, left, plain in together(_join, JOIN, JOIN[1])[0]:
        assert set(left["memory"]) == {"net.0.weight", "net.2.weight"}
        assert_close(left["module"], plain["module"])


class WithAnEmptyParameter(Task):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.empty = nn.Parameter(torch.zeros(0, 8))

    def loss(self, batch: Any, rank: int, ranks: int) -> Tensor:
        return super().loss(batch, rank, ranks) + self.empty.sum()


def _train_an_empty_parameter(build: Build, folder: Path) -> int:
    return finish(build(), (), WithAnEmptyParameter(momentum=0.9), logger=CSVLogger(folder, "", ""))["steps"]


@pytest.mark.parametrize("case", BOTH)
def test_a_parameter_without_entries(case, together):
    steps, folder = together(_train_an_empty_parameter, BOTH, case)
    assert steps == [2 * BATCHES] * 2
    (table,) = folder.rglob("*_strategy_layers.csv")
    rows = {row["layer"]: row for row in csv.DictReader(table.read_text().splitlines())}
    assert rows["empty"]["entries"] == "0"
    assert float(rows["net.0.weight"]["ratio"]) > 1
    assert list(folder.rglob("*_strategy.png"))


class WithMore(DGCStrategy):
    def __init__(self, *args: Any, extra: int = 1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.extra = extra


def test_a_strategy_of_ones_own_need_not_repeat_the_arguments(tmp_path):
    def work() -> Any:
        strategy = WithMore(0.1, min_numel=1, extra=3)
        return finish(strategy, logger=CSVLogger(tmp_path, "", "")), strategy.settings

    for left, settings in on_ranks(2, work):
        assert left["steps"] == 2 * BATCHES
        assert (settings["ratio"], settings["min_numel"], settings["extra"]) == (0.1, 1, 3)
        assert not {"args", "kwargs", "timeout"} & set(settings)
    (file,) = tmp_path.rglob("hparams.yaml")
    words = file.read_text()
    assert "WithMore" in words
    assert "ratio: 0.1" in words
    assert "extra: 3" in words


class OneMatrix(Task):
    """A matrix whose gradient, from one sample, has rank one; in memory it may lie transposed."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        weight = self.net[0].weight.data.clone()
        self.weight = nn.Parameter(weight.t().contiguous().t() if transposed else weight)
        self.net = nn.Identity()

    def loss(self, batch: Any, rank: int, ranks: int) -> Tensor:
        return F.linear(batch[0][:1], self.weight).square().mean()


def _train_a_matrix(transposed: bool) -> tuple[Any, float]:
    trainer, module = fit(power(rank=1), (), OneMatrix(transposed))
    assert module.weight.is_contiguous() is not transposed
    return outcome(trainer, module), trainer.strategy.residual_norm()


def test_powersgd_sees_the_matrix_of_a_weight_that_lies_transposed_in_memory():
    for (plain, _), (turned, residual) in on_ranks(2, lambda: [_train_a_matrix(False), _train_a_matrix(True)]):
        assert residual < 1e-5
        assert_close(turned["module"], plain["module"])


class Twice(torch.optim.SGD):
    """Looks at the gradient at two places, as SAM does."""

    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            closure()
            loss = closure()
        super().step()
        return loss


class TrainsTwice(Task):
    def configure_optimizers(self) -> Any:
        return Twice(self.parameters(), lr=0.1)


def _train_twice() -> None:
    for strategy in (dgc(correction="error_feedback"), power()):
        stop("needs one backward pass per step", strategy, (), TrainsTwice())


def test_two_backward_passes_in_a_step_are_refused():
    on_ranks(2, _train_twice)


def _metrics(build: Build, folder: Path) -> dict[str, float]:
    trainer, _ = fit(build(log_noise_scale=True))
    metrics = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("comm/")}
    norms: list[Any] = [None, None]
    dist.all_gather_object(norms, trainer.strategy.residual_norm())
    assert norms[0] != norms[1], "the ranks would log different ones, or this tests nothing"
    return metrics


@pytest.mark.parametrize("case", BOTH)
def test_a_callback_that_monitors_the_communication_sees_the_same_on_all_ranks(case, together):
    (first, second), _ = together(_metrics, BOTH, case)
    assert {"comm/residual_norm", "comm/compress_ms", "comm/ratio"} <= set(first)
    assert first == second


# Works that share two ranks; in two groups, so that none takes long on a busy machine.
TOGETHER = (
    {
        _save_by_loss: BOTH,
        _fail_to_exchange: EXCHANGES,
        _stop_on_either_side: SIDES,
        _interrupt_send: INTERRUPTS,
        _resume_after_rank_1_counted_otherwise: TURNS,
        _resume_after_a_batch_that_was_skipped: BOTH,
        _stop_after_a_batch_that_was_skipped: SKIPS,
    },
    {
        _resume_with_another_rank: OTHER_RANK,
        _resume_in_flight: UNREADABLE,
        _resume_with_reset: RESETS,
        _beside_and_alone: CLIPS,
        _join: JOIN,
        _train_an_empty_parameter: BOTH,
        _metrics: BOTH,
    },
)
