"""What each rank keeps for itself follows its checkpoint wherever that goes."""

import copy
import shutil
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from lightning_grad.testing import StopIn, assert_identical, on_ranks
from tests.contract.strategy_settings import CANONICAL
from tests.strategies.fits import finish, outcome, train_on_ranks
from tests.strategies.ranks import said

DGC, POWER = CANONICAL
pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:`.fit.ckpt_path=None.` was called without a model"),
    pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available"),
]


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


def _resume(path: Any, strategy_arguments: dict[str, Any], arguments: dict[str, Any]) -> dict[str, Any]:
    return finish(DGC.build(**strategy_arguments), ckpt=path, **arguments)


def assert_resumes(expected: list[dict[str, Any]], path: Path, **arguments: Any) -> None:
    for before, after in zip(expected, on_ranks(2, _resume, path, {}, arguments), strict=True):
        assert_identical(before, after)


def test_they_go_with_a_checkpoint_that_is_removed(tmp_path):
    on_ranks(2, _save, tmp_path, {"save_top_k": 1, "every_n_train_steps": 2})
    (path,) = tmp_path.glob("*.ckpt")
    assert sorted(tmp_path.iterdir()) == sorted([path, ranks_of(path)])
    assert_complete(path)


def _save_and_go_on(folder: Path) -> list[str]:
    arguments = {"save_top_k": 2, "every_n_train_steps": 1, "filename": "{step}"}
    _save(folder, arguments, {"max_epochs": 1})
    before = sorted(path.name for path in folder.glob("*"))
    dist.barrier()  # nobody looks later than the other saves
    _save(folder, arguments, {"ckpt": folder / "step=3.ckpt"})
    return before


def test_those_of_a_run_before_go_with_its_checkpoint_when_it_is_resumed(tmp_path):
    def names(*steps: int) -> list[str]:
        return [f"step={step}.ckpt{end}" for step in steps for end in ("", ".ranks")]

    for before in on_ranks(2, _save_and_go_on, tmp_path):
        assert before == names(2, 3)
    # Lightning keeps the one from which it resumed.
    assert sorted(path.name for path in tmp_path.glob("*")) == names(3, 8, 9)
    for path in tmp_path.glob("*.ckpt"):
        assert_complete(path)


def test_of_a_checkpoint_that_is_written_over_one_save_is_left(tmp_path):
    arguments = {"save_top_k": 1, "every_n_train_steps": 2, "save_last": True, "enable_version_counter": False}
    expected = on_ranks(2, _save, tmp_path, arguments)
    (best,) = tmp_path.glob("epoch*.ckpt")
    assert sorted(tmp_path.iterdir()) == sorted(
        [best, ranks_of(best), tmp_path / "last.ckpt", tmp_path / "last.ckpt.ranks"]
    )
    assert_complete(tmp_path / "last.ckpt")
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 8
    assert_resumes(expected, tmp_path / "last.ckpt")


def test_a_link_to_the_last_checkpoint_resumes(tmp_path):
    expected = on_ranks(2, _save, tmp_path, {"save_top_k": 1, "every_n_train_steps": 2, "save_last": "link"})
    link = tmp_path / "last.ckpt"
    assert link.is_symlink()
    assert_resumes(expected, link)


def test_a_link_from_another_folder_resumes(tmp_path):
    expected = on_ranks(2, _save, tmp_path / "run", {"every_n_train_steps": 4})
    (path,) = (tmp_path / "run").glob("*.ckpt")
    (tmp_path / "best.ckpt").symlink_to(path)
    assert_resumes(expected, tmp_path / "best.ckpt")


@pytest.mark.parametrize("names", [("other.ckpt", "other.ckpt.ranks"), ("renamed.ckpt", None)])
def test_a_checkpoint_that_is_copied_with_its_folder_resumes(names, tmp_path):
    expected = on_ranks(2, _save, tmp_path / "run", {"every_n_train_steps": 4})
    (path,) = (tmp_path / "run").glob("*.ckpt")
    (tmp_path / "elsewhere").mkdir()
    copied = tmp_path / "elsewhere" / names[0]
    shutil.copytree(ranks_of(path), tmp_path / "elsewhere" / (names[1] or ranks_of(path).name))
    shutil.move(path, copied)
    shutil.rmtree(tmp_path / "run")
    assert_resumes(expected, copied)


def _raises(path: Path, strategy_arguments: dict[str, Any], kind: type[Exception]) -> str:
    with pytest.raises(kind) as error:
        finish(DGC.build(**strategy_arguments), ckpt=path, callbacks=[_NoBatch()])
    return str(error.value)


class _NoBatch(pl.Callback):
    def on_train_batch_start(self, *_: Any) -> None:
        raise AssertionError("a batch was trained before the refusal")


@pytest.mark.parametrize("policy", ["strict", "mean"])
def test_a_checkpoint_that_is_copied_alone_is_refused_with_the_name_of_the_file(policy, tmp_path):
    on_ranks(2, _save, tmp_path / "run", {"every_n_train_steps": 4})
    (path,) = (tmp_path / "run").glob("*.ckpt")
    alone = shutil.copy(path, tmp_path / "alone.ckpt")
    for message in on_ranks(2, _raises, Path(alone), {"residual_policy": policy}, FileNotFoundError):
        assert str(tmp_path / "alone.ckpt") in message
        assert "0.pt" in message
        assert "2 of the 2 files" in message
        assert "residual_policy='reset'" in message


def test_one_missing_file_is_named_on_every_rank(tmp_path):
    on_ranks(2, _save, tmp_path, {"every_n_train_steps": 4})
    (path,) = tmp_path.glob("*.ckpt")
    (save,) = saves_of(path)
    (save / "1.pt").unlink()
    for message in on_ranks(2, _raises, path, {}, FileNotFoundError):
        assert str(save / "1.pt") in message
        assert "1 of the 2 files" in message


class _MemoryAtStart(pl.Callback):
    """Keeps what the strategy remembers before the first step."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.memory = copy.deepcopy(trainer.strategy.memory)


def _start(path: Path, scheme: Any, policy: str) -> tuple[Any, dict[str, Any]]:
    look = _MemoryAtStart()
    trainer, module = train_on_ranks(scheme.build(residual_policy=policy), [look], scheme.module(), ckpt=path)
    return look.memory, outcome(trainer, module)


@pytest.mark.filterwarnings("ignore:DGCStrategy begins with nothing unsent. what the saved run had not sent is lost")
def test_reset_goes_on_without_them(tmp_path):
    on_ranks(2, _save, tmp_path, {"every_n_train_steps": 4})
    (path,) = tmp_path.glob("*.ckpt")
    shutil.rmtree(ranks_of(path))
    for memory, left in on_ranks(2, _start, path, DGC, "reset"):
        assert memory == {}
        assert left["steps"] == 9
        assert left["memory"]


def _save_of(scheme: Any, path: Path) -> Any:
    trainer, _ = train_on_ranks(scheme.build(), [], scheme.module(), max_epochs=2)
    trainer.save_checkpoint(path)
    return copy.deepcopy(trainer.strategy.memory)


@pytest.mark.parametrize("scheme", [DGC, POWER], ids=str)
@pytest.mark.parametrize(("before", "after"), [(4, 2), (2, 4), (2, 1)])
def test_another_number_of_ranks(scheme, before, after, tmp_path):
    path = tmp_path / "saved.ckpt"
    old = on_ranks(before, _save_of, scheme, path)
    assert_complete(path, before)
    if scheme is DGC:
        for message in on_ranks(after, _raises, path, {}, ValueError):
            assert f"on {after} rank(s) what was saved on {before}" in message
            assert "residual_policy='mean'" in message
    new = [memory for memory, _ in on_ranks(after, _start, path, scheme, "mean")]
    kinds = {"residual", "velocity"} if scheme is DGC else {"error", "right"}
    assert old[0]
    for name in old[0]:
        assert set(old[0][name]) == kinds
        for kind in kinds:
            mean = torch.stack([memory[name][kind] for memory in old]).double().mean(0)
            again = torch.stack([memory[name][kind] for memory in new]).double().mean(0)
            assert mean.abs().max() > 0
            torch.testing.assert_close(again, mean, rtol=1e-6, atol=1e-7)


def test_a_message_in_flight_goes_to_another_number_of_ranks(tmp_path):
    on_ranks(2, _stop_in_flight, tmp_path)
    path = tmp_path / "on_exception.ckpt"
    for _, left in on_ranks(1, _start, path, DGC, "mean"):
        assert all(value.isfinite().all() for value in left["module"].values())


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
    expected = finish(DGC.build())
    at = 3 if dist.get_rank() == 0 else 10**9
    saving = ModelCheckpoint(folder, filename="same", every_n_train_steps=2, enable_version_counter=False)
    with pytest.raises((OSError, RuntimeError)):
        finish(DGC.build(), [saving], plugins=[_FullDisk(at)])
    return expected


def test_a_crash_between_rank_files_and_checkpoint_leaves_the_former_one(tmp_path):
    script_ends_with_the_rank_that_failed = on_ranks(2, _fail_to_save, tmp_path)
    path = tmp_path / "same.ckpt"
    assert torch.load(path, weights_only=True)["global_step"] == 4
    assert len(saves_of(path)) == 2, "that of the checkpoint, and that of the one which never came"
    assert_resumes(script_ends_with_the_rank_that_failed, path)


def _requeue(folder: Path) -> None:
    expected = finish(DGC.build())
    trainer, _ = train_on_ranks(DGC.build(), max_epochs=2, default_root_dir=folder)
    trainer.save_checkpoint(folder / "hpc_ckpt_1.ckpt")
    assert_identical(expected, finish(DGC.build(), default_root_dir=folder, ckpt="hpc"))


def test_a_requeued_job_finds_them(tmp_path):
    on_ranks(2, _requeue, tmp_path)
    assert_complete(tmp_path / "hpc_ckpt_1.ckpt")


def _save_after_fit(folder: Path) -> None:
    expected = finish(DGC.build(), max_epochs=4)
    trainer, _ = train_on_ranks(DGC.build(), max_epochs=3)
    trainer.save_checkpoint(folder / "by_hand.ckpt")
    with said() as lines:
        left = finish(DGC.build(), max_epochs=4, ckpt=folder / "by_hand.ckpt")
    assert_identical(expected, left)
    assert not [line for line in lines if "changed settings" in line]


def test_a_checkpoint_saved_after_the_fit_holds_them(tmp_path):
    on_ranks(2, _save_after_fit, tmp_path)
    assert_complete(tmp_path / "by_hand.ckpt")


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


@pytest.mark.parametrize("plugin", [_OwnFormat, AsyncCheckpointIO, _slow_async])
def test_they_are_written_by_the_trainers_own_plugin(plugin, tmp_path):
    saving = {"filename": "same", "every_n_train_steps": 2, "enable_version_counter": False}
    expected = on_ranks(2, _save, tmp_path, saving, {"plugins": [plugin()]})
    path = tmp_path / "same.ckpt"
    if plugin is _OwnFormat:
        assert len(saves_of(path)) == 1
    else:  # which may write a checkpoint long after it was told to: the files of the one before stay
        assert torch.load(path, weights_only=True)["lightning_grad_ranks"]["save"] in {s.name for s in saves_of(path)}
    for before, after in zip(expected, on_ranks(2, _resume, path, {}, {"plugins": [plugin()]}), strict=True):
        assert_identical(before, after)


def test_weights_alone_bring_none(tmp_path):
    on_ranks(2, _save, tmp_path, {"every_n_train_steps": 4, "save_weights_only": True})
    (path,) = tmp_path.iterdir()
    assert "lightning_grad_ranks" not in torch.load(path, weights_only=True)


def _switch(folder: Path) -> None:
    train_on_ranks(POWER.build(), module=POWER.module(), max_epochs=2)[0].save_checkpoint(folder / "power.ckpt")
    with pytest.warns(UserWarning, match="the checkpoint is of PowerSGDStrategy"):
        memory = _start_memory(folder / "power.ckpt")
    assert memory == {}


def _start_memory(path: Path) -> Any:
    look = _MemoryAtStart()
    train_on_ranks(DGC.build(), [look], ckpt=path)
    return look.memory


def test_those_of_another_technique_are_left_with_a_warning(tmp_path):
    on_ranks(1, _switch, tmp_path)
