"""A rank that dies takes the others with it, quickly and with the cause in their words; a restart goes on bit for bit."""

import functools
import itertools
import multiprocessing
import os
import signal
import socket
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch import nn

from lightning_grad.functional.torch_version import TORCH
from lightning_grad.strategies import _lost_ranks, _rank_files
from lightning_grad.testing import assert_identical, fit, on_ranks
from tests.contract.strategy_settings import BROAD, CANONICAL, COMPRESSING, Scheme
from tests.strategies.fits import finish

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:`.fit.ckpt_path=None.` was called without a model"),
    pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available"),
]
_LIMIT = 30.0  # seconds that the others have; they notice at once, and a busy machine is slow
_TIMEOUT = timedelta(seconds=60)  # of a collective, so that no slow rank is taken for a lost one


class _SendSelf(pl.Callback):
    """Sends rank 1 a signal, and writes down when."""

    def __init__(self, hook: str, which: signal.Signals, note: Path) -> None:
        self.which, self.note = which, note
        setattr(self, hook, self._send)

    def _send(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 4 and trainer.global_rank == 1:
            # At once with what is in it: the other rank may wait for the file.
            (self.note.parent / "time").write_text(str(time.time()))
            (self.note.parent / "time").rename(self.note)
            os.kill(os.getpid(), self.which)


class _WaitsNoLonger(pl.Callback):
    """Shortens the time-out of rank 0 once the other answers no more, instead of a test that waits as long as a run would."""

    def __init__(self, note: Path) -> None:
        self.note = note

    def on_before_backward(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 4 and trainer.global_rank == 0:
            group = dist.distributed_c10d._get_default_group()
            assert group._get_backend(torch.device("cpu")).options._timeout == _TIMEOUT
            while not self.note.exists():
                time.sleep(0.02)
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1))


def _module(scheme: Scheme, buffers: bool = False) -> Any:
    """Make the module, without the batch norm whose buffers DDP sends before each forward pass, unless asked for."""
    module = scheme.module()
    module.norm = module.norm if buffers else nn.Identity()
    return module


def _be_rank(rank: int, port: int, folder: Path, scheme: Scheme, module: Any, callbacks: list[Any]) -> None:
    """Train as a launcher like torchrun would have it: Lightning sets up the process group."""
    torch.set_num_threads(1)
    os.environ |= {"LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    _rank_files._GRACE_SECONDS = _lost_ranks._GRACE_SECONDS = 0.5
    code = 0
    try:
        strategy = scheme.build(timeout=_TIMEOUT)
        fit(callbacks, module, resumable=True, strategy=strategy, devices=2, max_epochs=3, limit_val_batches=0)
    except BaseException:
        (folder / f"{rank}.txt").write_text(traceback.format_exc())
        code = 1
    os._exit(code)


def _every_other_step(folder: Path, **arguments: Any) -> ModelCheckpoint:
    return ModelCheckpoint(folder, **{"save_top_k": -1, "every_n_train_steps": 2, **arguments})


def _run_until_lost(folder: Path, scheme: Scheme, module: Any, callbacks: list[Any]) -> tuple[float, int, str]:
    """Return how long rank 0 outlived rank 1, with which code it ended, and its last words."""
    context, port = multiprocessing.get_context("fork"), _free_port()
    processes = [
        context.Process(target=_be_rank, args=(rank, port, folder, scheme, module, callbacks), daemon=True)
        for rank in (0, 1)
    ]
    try:
        for process in processes:
            process.start()
        processes[0].join(60.0)
        words = (folder / "0.txt").read_text()
        assert (folder / "lost").exists(), words
        outlived = time.time() - float((folder / "lost").read_text())
        assert processes[0].exitcode is not None, "rank 0 still runs"
        return outlived, processes[0].exitcode, words
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()


@functools.cache  # on a rank, for the runs that it resumes
def _uninterrupted(scheme: Scheme) -> dict[str, Any]:
    return finish(scheme.build(), module=_module(scheme), limit_val_batches=0)


def _resume(scheme: Scheme, path: Path, *callbacks: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    resumed = finish(scheme.build(), callbacks, module=_module(scheme), ckpt=path, limit_val_batches=0)
    return _uninterrupted(scheme), resumed


def _assert_resumes(scheme: Scheme, path: Path, *callbacks: Any) -> None:
    for expected, resumed in on_ranks(2, _resume, scheme, path, *callbacks):
        assert_identical(expected, resumed)


def _assert_says_why(words: str, scheme: Scheme) -> None:
    assert f"{scheme.name}: " in words
    assert "rank 1 has stopped or cannot be reached" in words
    assert "Start the run again from its last checkpoint" in words


_HOOKS = ("on_train_batch_start", "on_before_backward", "on_before_optimizer_step")
DGC, ONE_BIT, POWER = COMPRESSING
ONCE = [ONE_BIT, *(scheme for scheme in BROAD if scheme.is_local)]
KILLED = [*itertools.product((DGC, POWER), _HOOKS), *((scheme, _HOOKS[1]) for scheme in ONCE)]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, tuple[Any, Path, Any]]:
    """Return of each case how the run was lost, its last checkpoint, and what resuming from it leaves on each rank."""
    lost, paths = {}, {}
    for scheme, hook in KILLED:
        folder = tmp_path_factory.mktemp("killed")
        callbacks = [_SendSelf(hook, signal.SIGKILL, folder / "lost"), _every_other_step(folder)]
        lost[scheme, hook] = _run_until_lost(folder, scheme, _module(scheme), callbacks)
        paths[scheme, hook] = max(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    resumed = zip(*on_ranks(2, lambda: [_resume(case[0], path) for case, path in paths.items()]), strict=True)
    return {case: (lost[case], paths[case], ranks) for case, ranks in zip(KILLED, resumed, strict=True)}


@pytest.mark.parametrize("case", KILLED)
def test_a_killed_rank(case, killed):
    (seconds, code, words), path, resumed = killed[case]
    assert seconds < _LIMIT
    assert code != 0
    _assert_says_why(words, case[0])
    assert torch.load(path, weights_only=True)["global_step"] == 4
    for expected, found in resumed:
        assert_identical(expected, found)


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_before_optimizer_step"])
def test_a_killed_rank_that_is_missed_first_when_buffers_are_sent(hook, tmp_path):
    kill = _SendSelf(hook, signal.SIGKILL, tmp_path / "lost")
    seconds, code, words = _run_until_lost(tmp_path, CANONICAL[0], _module(CANONICAL[0], buffers=True), [kill])
    assert seconds < _LIMIT
    assert code != 0
    _assert_says_why(words, CANONICAL[0])


@pytest.mark.skipif(TORCH < (2, 7), reason="torch 2.6 does not change the timeout of a running gloo group")
def test_a_rank_that_answers_no_more(tmp_path):
    stop = _SendSelf("on_before_backward", signal.SIGSTOP, tmp_path / "lost")
    callbacks = [_WaitsNoLonger(tmp_path / "lost"), stop, _every_other_step(tmp_path)]
    seconds, code, words = _run_until_lost(tmp_path, CANONICAL[0], _module(CANONICAL[0]), callbacks)
    assert seconds < _LIMIT
    assert code != 0
    _assert_says_why(words, CANONICAL[0])


def test_a_checkpoint_on_the_way_out_does_not_hold_anybody_up(tmp_path):
    callbacks = [
        _SendSelf("on_before_backward", signal.SIGKILL, tmp_path / "lost"),
        _every_other_step(tmp_path),
        OnExceptionCheckpoint(tmp_path, "on_the_way_out"),
    ]
    seconds, code, words = _run_until_lost(tmp_path, CANONICAL[0], _module(CANONICAL[0]), callbacks)
    assert seconds < _LIMIT
    assert code != 0
    _assert_says_why(words, CANONICAL[0])
    (path,) = tmp_path.glob("*step=4.ckpt")
    _assert_resumes(CANONICAL[0], path)


def test_a_rank_that_is_missed_first_when_a_checkpoint_is_written_over_leaves_the_former_one(tmp_path):
    kill = _SendSelf("on_train_batch_end", signal.SIGKILL, tmp_path / "lost")
    over = _every_other_step(tmp_path, filename="same", save_top_k=1, enable_version_counter=False)
    _run_until_lost(tmp_path, CANONICAL[0], _module(CANONICAL[0]), [kill, over])
    assert torch.load(tmp_path / "same.ckpt", weights_only=True)["global_step"] == 2
    _assert_resumes(CANONICAL[0], tmp_path / "same.ckpt")


class _DiesInASave(pl.Callback):
    """Kills a rank in its second save: at its rank file, of which half is on the disk, or once that is whole.

    Args:
        rank: Which dies.
        torn: Whether its file is torn.
        note: Where it writes down when.
    """

    def __init__(self, rank: int, torn: bool, note: Path) -> None:
        self.rank, self.torn, self.note = rank, torn, note
        self.saves = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        io, mine = trainer.strategy.checkpoint_io, f"{self.rank}.pt"
        save = io.save_checkpoint

        def saved_until(checkpoint: Any, path: Any, *arguments: Any, **more: Any) -> None:
            save(checkpoint, path, *arguments, **more)
            self.saves += Path(path).name == mine
            if self.saves == 2 and Path(path).name == mine:
                if self.torn:
                    Path(path).write_bytes(Path(path).read_bytes()[:700])
                self.note.write_text(str(time.time()))
                os.kill(os.getpid(), signal.SIGKILL)

        if trainer.global_rank == self.rank:
            io.save_checkpoint = saved_until


@pytest.mark.parametrize(
    ("scheme", "torn", "over"),
    [(CANONICAL[0], True, True), (CANONICAL[0], False, False), (POWER, True, False)],
    ids=str,
)
def test_a_rank_that_is_killed_in_a_save_leaves_the_checkpoint_before(scheme, torn, over, tmp_path):
    """Also if that is written over by the next; what was left of the broken save goes when its path is saved to again."""
    names = {"filename": "same", "save_top_k": 1, "enable_version_counter": False} if over else {"filename": "{step}"}
    callbacks = [_DiesInASave(1, torn, tmp_path / "lost"), _every_other_step(tmp_path / "run", **names)]
    seconds, code, words = _run_until_lost(tmp_path, scheme, _module(scheme), callbacks)
    assert seconds < _LIMIT
    assert code != 0
    assert "rank 1 has stopped or cannot be reached" in words
    (path,) = (tmp_path / "run").glob("*.ckpt")
    assert torch.load(path, weights_only=True)["global_step"] == 2
    assert len(list((tmp_path / "run").glob("*.ranks/*"))) == 2, "that of the checkpoint, and that of the one to come"
    _assert_resumes(scheme, path, _every_other_step(tmp_path / "run", **names))
    for folder in (tmp_path / "run").glob("*.ranks"):
        (save,) = folder.iterdir()
        checkpoint = torch.load(folder.with_name(folder.name.removesuffix(".ranks")), weights_only=True)
        assert checkpoint["lightning_grad_ranks"]["save"] == save.name
        assert sorted(file.name for file in save.iterdir()) == ["0.pt", "1.pt"]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
