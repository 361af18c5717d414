"""What each rank keeps for itself follows its checkpoint wherever that goes."""

import copy
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from lightning_grad.strategies import _lost_ranks
from lightning_grad.testing import StopIn, assert_identical, on_ranks
from tests.contract.strategy_settings import COMPRESSING
from tests.strategies.fits import outcome
from tests.strategies.fits import train_on_ranks as train_and_validate
from tests.strategies.ranks import said

DGC, _, POWER = COMPRESSING
AVERAGED = DGC, POWER  # 1-bit Adam spreads its errors in another way; see its own tests
pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:DGCStrategy starts without unsent gradients. the unsent gradients of the saved run are lost"
    ),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:`.fit.ckpt_path=None.` was called without a model"),
    pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available"),
]


def train_on_ranks(*arguments: Any, **more: Any) -> Any:
    """Fit without validations: nothing here hangs on them."""
    return train_and_validate(*arguments, **{"limit_val_batches": 0, **more})


def finish(*arguments: Any, **more: Any) -> dict[str, Any]:
    return outcome(*train_on_ranks(*arguments, **more))


def ranks_of(path: Path) -> Path:
    return path.with_name(path.name + ".ranks")


def saves_of(path: Path) -> list[Path]:
    return sorted(ranks_of(path).iterdir())


def assert_complete(path: Path, ranks: int = 2) -> None:
    """Look for one save with one file of each rank, the one that the checkpoint names."""
    (save,) = saves_of(path)
    manifest = torch.load(path, weights_only=True)["lightning_grad_ranks"]
    assert manifest["save"] == save.name
    assert manifest["ranks"] == ranks
    assert sorted(file.name for file in save.iterdir()) == [f"{rank}.pt" for rank in range(ranks)]


def _save(folder: Path, arguments: dict[str, Any], trainer_arguments: dict[str, Any] | None = None) -> dict[str, Any]:
    """Fit three epochs of three steps, saving as asked."""
    saving = ModelCheckpoint(folder, monitor="step", mode="max", **arguments)
    return finish(DGC.build(), [saving], **(trainer_arguments or {}))


def _on_rank_0(act: Callable[[], Any]) -> Any:
    """Return what ``act`` does on rank 0, before which all ranks have come here, and after which they go on."""
    dist.barrier()
    found = [act() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found)
    return found[0]


WORKS: list[tuple[Callable[[Path], Any]]] = []


def for_all(work: Callable[[Path], Any]) -> Callable[[Path], Any]:
    """Have the work done by the ranks that do that of all tests of this file."""
    WORKS.append((work,))
    return work


def _do(work: Callable[[Path], Any], folder: Path) -> Any:
    return work(folder)


@pytest.fixture
def done(together: Callable[..., Any]) -> Callable[..., tuple[list[Any], Path]]:
    """Return what takes a work, and returns what both ranks have of it, and its folder."""
    return lambda work: together(_do, WORKS, (work,))


@for_all
def _save_the_best(folder: Path) -> None:
    _save(folder, {"save_top_k": 1, "every_n_train_steps": 2})


def test_they_go_with_a_checkpoint_that_is_removed(done):
    _, folder = done(_save_the_best)
    (path,) = folder.glob("*.ckpt")
    assert sorted(folder.iterdir()) == sorted([path, ranks_of(path)])
    assert_complete(path)


@for_all
def _save_and_go_on(folder: Path) -> list[str]:
    arguments = {"save_top_k": 2, "every_n_train_steps": 1, "filename": "{step}"}
    _save(folder, arguments, {"max_epochs": 1})
    dist.barrier()  # rank 0 has removed what it does not keep
    before = sorted(path.name for path in folder.glob("*"))
    dist.barrier()  # nobody looks later than the other saves
    _save(folder, arguments, {"ckpt": folder / "step=3.ckpt"})
    return before


def test_those_of_a_run_before_go_with_its_checkpoint_when_it_is_resumed(done):
    def names(*steps: int) -> list[str]:
        return [f"step={step}.ckpt{end}" for step in steps for end in ("", ".ranks")]

    found, folder = done(_save_and_go_on)
    for before in found:
        assert before == names(2, 3)
    # Lightning keeps the one from which it resumed.
    assert sorted(path.name for path in folder.glob("*")) == names(3, 8, 9)
    for path in folder.glob("*.ckpt"):
        assert_complete(path)


def assert_resumed(found: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    """Take what the run that saved and the one that resumed left on each rank."""
    for before, after in found:
        assert_identical(before, after)


def _resume_the_last(folder: Path, arguments: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    expected = _save(folder, arguments)
    dist.barrier()
    return expected, finish(DGC.build(), ckpt=folder / "last.ckpt")


@for_all
def _write_over_the_last(folder: Path) -> Any:
    arguments = {"save_top_k": 1, "every_n_train_steps": 2, "save_last": True, "enable_version_counter": False}
    return _resume_the_last(folder, arguments)


def test_of_a_checkpoint_that_is_written_over_one_save_is_left(done):
    found, folder = done(_write_over_the_last)
    (best,) = folder.glob("epoch*.ckpt")
    assert sorted(folder.iterdir()) == sorted([best, ranks_of(best), folder / "last.ckpt", folder / "last.ckpt.ranks"])
    assert_complete(folder / "last.ckpt")
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 8
    assert_resumed(found)


@for_all
def _link_to_the_last(folder: Path) -> Any:
    return _resume_the_last(folder, {"save_top_k": 1, "every_n_train_steps": 2, "save_last": "link"})


def test_a_link_to_the_last_checkpoint_resumes(done):
    found, folder = done(_link_to_the_last)
    assert (folder / "last.ckpt").is_symlink()
    assert_resumed(found)


def _link(folder: Path) -> Path:
    (path,) = folder.glob("*.ckpt")
    link = folder / "elsewhere" / "best.ckpt"
    link.parent.mkdir()
    link.symlink_to(path)
    return link


def _move(folder: Path, name: str, ranks: str) -> Path:
    (path,) = folder.glob("*.ckpt")
    (folder / "elsewhere").mkdir()
    ranks_of(path).rename(folder / "elsewhere" / ranks.format(path.name))
    return path.rename(folder / "elsewhere" / name)


MOVES: dict[str, Callable[[Path], Path]] = {
    "a link from another folder": _link,
    "both are renamed": lambda folder: _move(folder, "other.ckpt", "other.ckpt.ranks"),
    "the checkpoint is renamed": lambda folder: _move(folder, "renamed.ckpt", "{}.ranks"),
}


@for_all
def _move_and_resume(folder: Path) -> list[Any]:
    expected, found = _save(folder / "run", {"every_n_train_steps": 4}), []
    for name, move in MOVES.items():
        path = _on_rank_0(lambda move=move, copied=folder / name: move(shutil.copytree(folder / "run", copied)))
        found.append((expected, finish(DGC.build(), ckpt=path)))
    return found


@pytest.mark.parametrize("move", MOVES)
def test_a_checkpoint_that_is_linked_or_moved_with_its_folder_resumes(move, done):
    found, _ = done(_move_and_resume)
    place = list(MOVES).index(move)
    assert_resumed([moves[place] for moves in found])


def _raises(path: Path, strategy_arguments: dict[str, Any], kind: type[Exception]) -> str:
    with pytest.raises(kind) as error:
        finish(DGC.build(**strategy_arguments), ckpt=path, callbacks=[_NoBatch()])
    return str(error.value)


class _NoBatch(pl.Callback):
    def on_train_batch_start(self, *_: Any) -> None:
        raise AssertionError("a batch was trained before the refusal")


def _take_away(folder: Path) -> Path:
    (path,) = folder.glob("*.ckpt")
    (save,) = saves_of(path)
    (save / "1.pt").unlink()
    return path


def _copy_alone(folder: Path) -> Path:
    (path,) = folder.glob("*.ckpt")
    (folder / "elsewhere").mkdir()
    return Path(shutil.copy(path, folder / "elsewhere" / "alone.ckpt"))


def _remove_files(folder: Path) -> Path:
    (path,) = folder.glob("*.ckpt")
    shutil.rmtree(ranks_of(path))
    return path


@for_all
def _lose_files(folder: Path) -> Any:
    _save(folder, {"every_n_train_steps": 4})
    alone = _on_rank_0(lambda: _copy_alone(folder))
    refused = [_raises(alone, {"residual_policy": policy}, FileNotFoundError) for policy in ("strict", "mean")]
    missed = _raises(_on_rank_0(lambda: _take_away(folder)), {}, FileNotFoundError)
    return refused, missed, _start(_on_rank_0(lambda: _remove_files(folder)), DGC, "reset")


@pytest.mark.parametrize("policy", [0, 1], ids=["strict", "mean"])
def test_a_checkpoint_that_is_copied_alone_is_refused_with_the_name_of_the_file(policy, done):
    found, folder = done(_lose_files)
    for refused, *_ in found:
        assert str(folder / "elsewhere" / "alone.ckpt") in refused[policy]
        assert "0.pt" in refused[policy]
        assert "2 of the 2 files" in refused[policy]
        assert "residual_policy='reset'" in refused[policy]


def test_one_missing_file_is_named_on_every_rank(done):
    found, folder = done(_lose_files)
    (path,) = folder.glob("*.ckpt")
    save = torch.load(path, weights_only=True)["lightning_grad_ranks"]["save"]
    for _, missed, _ in found:
        assert str(ranks_of(path) / save / "1.pt") in missed
        assert "1 of the 2 files" in missed


class _MemoryAtStart(pl.Callback):
    """Keeps what the strategy remembers before the first step."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.memory = copy.deepcopy(trainer.strategy.memory)


def _start(path: Path, scheme: Any, policy: str) -> tuple[Any, dict[str, Any]]:
    look = _MemoryAtStart()
    trainer, module = train_on_ranks(scheme.build(residual_policy=policy), [look], scheme.module(), ckpt=path)
    return look.memory, outcome(trainer, module)


def test_reset_goes_on_without_them(done):
    for *_, (memory, left) in done(_lose_files)[0]:
        assert memory == {}
        assert left["steps"] == 9
        assert left["memory"]


def _save_of(scheme: Any, path: Path) -> Any:
    trainer, _ = train_on_ranks(scheme.build(), [], scheme.module(), max_epochs=2)
    trainer.save_checkpoint(path)
    return copy.deepcopy(trainer.strategy.memory)


MOVED = [(4, 2), (2, 4), (2, 1)]


@pytest.fixture(scope="module")
def on_others(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, Any], dict[tuple[int, int], Any]]:
    """Return checkpoints by ranks and technique, what each rank had saved, and what other ranks make of it."""
    folder = tmp_path_factory.mktemp("ranks")

    def save(ranks: int) -> list[Any]:
        return [_save_of(scheme, folder / f"{ranks}-{scheme}.ckpt") for scheme in AVERAGED]

    def start(before: int) -> tuple[str, list[Any]]:
        paths = [folder / f"{before}-{scheme}.ckpt" for scheme in AVERAGED]
        refused = _raises(paths[0], {}, ValueError)
        return refused, [_start(path, scheme, "mean")[0] for path, scheme in zip(paths, AVERAGED, strict=True)]

    saved = {ranks: on_ranks(ranks, save, ranks) for ranks in (2, 4)}
    return folder, saved, {(before, after): on_ranks(after, start, before) for before, after in MOVED}


@pytest.mark.parametrize("place", [0, 1], ids=[str(scheme) for scheme in AVERAGED])
@pytest.mark.parametrize("ranks", MOVED)
def test_another_number_of_ranks(place, ranks, on_others):
    (before, after), (folder, saved, started) = ranks, on_others
    assert_complete(folder / f"{before}-{AVERAGED[place]}.ckpt", before)
    for message, _ in started[ranks]:
        assert f"it was saved on {before} rank(s), and this run has {after}" in message
        assert "residual_policy='mean'" in message
    old, new = ([of[place] for of in each] for each in (saved[before], [memories for _, memories in started[ranks]]))
    kinds = {"residual", "velocity"} if AVERAGED[place] is DGC else {"error", "right"}
    assert old[0]
    for name in old[0]:
        assert set(old[0][name]) == kinds
        for kind in kinds:
            mean = torch.stack([memory[name][kind] for memory in old]).double().mean(0)
            again = torch.stack([memory[name][kind] for memory in new]).double().mean(0)
            assert mean.abs().max() > 0
            torch.testing.assert_close(again, mean, rtol=1e-6, atol=1e-7)


def test_a_message_in_flight_goes_to_another_number_of_ranks(done):
    path = done(_stop_in_flight)[1] / "on_exception.ckpt"
    for _, left in on_ranks(1, _start, path, DGC, "mean"):
        assert all(value.isfinite().all() for value in left["module"].values())


@for_all
def _stop_in_flight(folder: Path) -> None:
    with pytest.raises(RuntimeError, match="on purpose"):
        train_on_ranks(DGC.build(), [StopIn("on_before_optimizer_step", 4), OnExceptionCheckpoint(folder)])


class _FullDisk(TorchCheckpointIO):
    """Fails at the main file of a save."""

    def __init__(self, at: int) -> None:
        self.at, self.mains = at, 0

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        if "state_dict" in checkpoint:
            self.mains += 1
            if self.mains == self.at:
                raise OSError("no space left on device")
        super().save_checkpoint(checkpoint, path, storage_options)


def _fail_to_save(folder: Path) -> dict[str, Any]:
    _lost_ranks._GRACE_SECONDS = 0.2
    expected = finish(DGC.build())
    at = 3 if dist.get_rank() == 0 else 10**9
    saving = ModelCheckpoint(folder, filename="same", every_n_train_steps=2, enable_version_counter=False)
    with pytest.raises((OSError, RuntimeError)):
        finish(DGC.build(), [saving], plugins=[_FullDisk(at)])
    return expected


def _resume(path: Path) -> dict[str, Any]:
    return finish(DGC.build(), ckpt=path)


def test_a_crash_between_rank_files_and_checkpoint_leaves_the_former_one(tmp_path):
    script_ends_with_the_rank_that_failed = on_ranks(2, _fail_to_save, tmp_path)
    path = tmp_path / "same.ckpt"
    assert torch.load(path, weights_only=True)["global_step"] == 4
    assert len(saves_of(path)) == 2, "that of the checkpoint, and that of the one which never came"
    for before, after in zip(script_ends_with_the_rank_that_failed, on_ranks(2, _resume, path), strict=True):
        assert_identical(before, after)


@for_all
def _requeue(folder: Path) -> None:
    expected = finish(DGC.build())
    trainer, _ = train_on_ranks(DGC.build(), max_epochs=2, default_root_dir=folder)
    trainer.save_checkpoint(folder / "hpc_ckpt_1.ckpt")
    assert_identical(expected, finish(DGC.build(), default_root_dir=folder, ckpt="hpc"))


def test_a_requeued_job_finds_them(done):
    assert_complete(done(_requeue)[1] / "hpc_ckpt_1.ckpt")


@for_all
def _save_after_fit(folder: Path) -> None:
    expected = finish(DGC.build(), max_epochs=4)
    trainer, _ = train_on_ranks(DGC.build(), max_epochs=3)
    trainer.save_checkpoint(folder / "by_hand.ckpt")
    with said() as lines:
        left = finish(DGC.build(), max_epochs=4, ckpt=folder / "by_hand.ckpt")
    assert_identical(expected, left)
    assert not [line for line in lines if "changed settings" in line]


def test_a_checkpoint_saved_after_the_fit_holds_them(done):
    assert_complete(done(_save_after_fit)[1] / "by_hand.ckpt")


class _OwnFormat(TorchCheckpointIO):
    """Writes files that nobody else can read, and counts."""

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        torch.save({"wrapped": checkpoint}, path)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> Any:
        return torch.load(path, map_location="cpu", weights_only=True)["wrapped"]


class _SlowDisk(TorchCheckpointIO):
    """Takes its time over every file."""

    def save_checkpoint(self, *arguments: Any, **more: Any) -> None:
        time.sleep(0.1)
        super().save_checkpoint(*arguments, **more)


def _slow_async() -> AsyncCheckpointIO:
    return AsyncCheckpointIO(_SlowDisk())


def _save_with(plugin: Callable[[], Any], folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    saving = {"filename": "same", "every_n_train_steps": 2, "enable_version_counter": False}
    expected = _save(folder, saving, {"plugins": [plugin()]})
    dist.barrier()
    return expected, finish(DGC.build(), ckpt=folder / "same.ckpt", plugins=[plugin()])


PLUGINS = [(_OwnFormat,), (AsyncCheckpointIO,), (_slow_async,)]


@pytest.mark.parametrize("case", PLUGINS)
def test_they_are_written_by_the_trainers_own_plugin(case, together):
    found, folder = together(_save_with, PLUGINS, case)
    path, plugin = folder / "same.ckpt", case[0]
    if plugin is _OwnFormat:
        assert len(saves_of(path)) == 1
    else:  # which may write a checkpoint long after it was told to: the files of the one before stay
        assert torch.load(path, weights_only=True)["lightning_grad_ranks"]["save"] in {s.name for s in saves_of(path)}
    assert_resumed(found)


@for_all
def _save_weights(folder: Path) -> None:
    _save(folder, {"every_n_train_steps": 4, "save_weights_only": True})


def test_weights_alone_bring_none(done):
    (path,) = done(_save_weights)[1].iterdir()
    assert "lightning_grad_ranks" not in torch.load(path, weights_only=True)


def _switch(folder: Path) -> None:
    train_on_ranks(POWER.build(), module=POWER.module(), max_epochs=2)[0].save_checkpoint(folder / "power.ckpt")
    with pytest.warns(UserWarning, match="the checkpoint was saved by PowerSGDStrategy"):
        memory = _start_memory(folder / "power.ckpt")
    assert memory == {}


def _start_memory(path: Path) -> Any:
    look = _MemoryAtStart()
    train_on_ranks(DGC.build(), [look], ckpt=path)
    return look.memory


def test_those_of_another_technique_are_left_with_a_warning(tmp_path):
    on_ranks(1, _switch, tmp_path)
