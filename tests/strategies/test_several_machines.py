"""torchrun on two machines with two ranks each, over a slow and lossy link: runs end well, or in time and with clear words.

A machine is a network namespace. torchrun parses its command line and meets over the link, as always; only the ranks are
forked, so they need not import everything again.
"""

import os
import re
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch.distributed.elastic.rendezvous import dynamic_rendezvous
from torch.distributed.launcher.api import elastic_launch
from torch.distributed.run import config_from_args, get_args_parser
from torch.multiprocessing import ProcessContext
from torch.utils.data import DataLoader

from benchmarks.network import ADDRESSES, INTERFACE, Forked, Link, Quality, forked, sent_bytes, slow_link, wait
from benchmarks.network import why_unavailable as why_no_link
from benchmarks.slow_link import Perceptron, digest, noise
from benchmarks.wire import end_with_parent
from lightning_grad.functional.torch_version import TORCH
from lightning_grad.strategies import DGCStrategy, DiLoCoStrategy, PowerSGDStrategy, _lost_ranks
from lightning_grad.testing import on_ranks

pytestmark = [
    pytest.mark.needs_root,
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
]

PAGE = Path(__file__).parents[2] / "docs/several_machines.md"
LOSSY, CLEAN = Quality(megabits=50.0, delay_ms=4.0, jitter_ms=3.0, loss=0.01), Quality(1000.0)
WIDTHS = (128, 128, 64)
ENTRIES = 128 * 128 + 128 + 128 * 64 + 64
STEPS, FAULT = 6, 3  # the fault is in the fourth step
RANKS = 4
LIMIT = 60.0  # seconds, for a busy machine
TIMEOUT, SHORT = timedelta(minutes=10), timedelta(milliseconds=500)  # of a collective
STRATEGIES: dict[str, Callable[..., Any]] = {
    "DDPStrategy": DDPStrategy,
    "DGCStrategy": partial(DGCStrategy, ratio=0.01, warmup=None),
    "PowerSGDStrategy": partial(PowerSGDStrategy, rank=1),
    "DiLoCoStrategy": partial(DiLoCoStrategy, sync_every_n_steps=2),
}
FAULTY = ("DDPStrategy", "DGCStrategy", "DiLoCoStrategy")  # PowerSGD loses ranks as DGC does


@pytest.fixture
def lossy() -> Iterator[Link]:
    yield from _link(LOSSY)


@pytest.fixture
def clean() -> Iterator[Link]:
    yield from _link(CLEAN)


def _link(quality: Quality) -> Iterator[Link]:
    if reason := why_no_link():
        pytest.skip(reason)
    with slow_link(quality) as joined:
        yield joined


@dataclass(frozen=True)
class Learned:
    """What a fit has left: a hash of the weights, and the bytes that this machine sent per step."""

    weights: str
    sent: float


class Meter(pl.Callback):
    """Reads the counter of the interface after the first step, and at the end."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step in (1, STEPS):
            trainer.strategy.barrier()
            self.counts.append(sent_bytes())


class Killed(pl.Callback):
    """Leaves a note, and kills the last rank within a step.

    Args:
        note: File of the note.
    """

    def __init__(self, note: Path) -> None:
        self.note = note

    def on_before_backward(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == FAULT and trainer.global_rank == RANKS - 1:
            self.note.touch()
            os.kill(os.getpid(), signal.SIGKILL)


class Hangs(pl.Callback):
    """Stops the last rank within a step, and leaves a note. The others wait for the note.

    Args:
        note: File of the note.
        is_short: Whether they then shorten their timeout, so a busy machine is not taken for one that hangs.
    """

    def __init__(self, note: Path, is_short: bool) -> None:
        self.note, self.is_short = note, is_short

    def on_before_backward(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step != FAULT:
            return
        if trainer.global_rank == RANKS - 1:
            self.note.touch()
            os.kill(os.getpid(), signal.SIGSTOP)
        while not self.note.exists():
            time.sleep(0.02)
        group = dist.distributed_c10d._get_default_group()
        assert group._get_backend(torch.device("cpu")).options._timeout == TIMEOUT
        if self.is_short:
            dist.distributed_c10d._set_pg_timeout(SHORT)


def _train(name: str, *callbacks: pl.Callback, machines: int = 2, ckpt: Path | None = None) -> str:
    """Train as a rank, and return a hash of the weights."""
    torch.set_num_threads(1)
    _lost_ranks._GRACE_SECONDS = 1.2
    pl.seed_everything(0, verbose=False)
    module = Perceptron(WIDTHS)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(
        accelerator="cpu",
        num_nodes=machines,
        devices=RANKS // machines,
        strategy=STRATEGIES[name](timeout=TIMEOUT),
        max_steps=STEPS,
        callbacks=list(callbacks),
        enable_checkpointing=any(isinstance(each, ModelCheckpoint) for each in callbacks),
        use_distributed_sampler=False,
        **quiet,
    )
    batches: Any = [noise(WIDTHS, trainer.global_rank)] * STEPS
    trainer.fit(module, DataLoader(batches, batch_size=None), ckpt_path=ckpt)
    return digest(module)


def _documented(node: int) -> list[str]:
    """Return the options of torchrun on the page for one of its two machines, with the addresses of the namespaces."""
    text = PAGE.read_text(encoding="utf-8").replace("\\\n", " ")
    for shown, real in zip(("10.0.0.1", "10.0.0.2"), ADDRESSES, strict=True):
        text = text.replace(shown, real)
    lines = [line.split() for line in text.splitlines() if line.startswith("torchrun ")]
    assert [line[-1] for line in lines] == ["train.py"] * 2
    return lines[node][1:-1]


def _torchrun(node: int, work: Callable[[], Any], options: Sequence[str], folder: str) -> Any:
    """Be torchrun on one machine, and return the results of its ranks by number."""
    tempfile.tempdir = folder  # torch leaves files of failed ranks
    os.environ |= {"GLOO_SOCKET_IFNAME": INTERFACE, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
    _shorten_waits()
    line = [*_documented(node), *options, "--start-method=fork", "train.py"]
    config, _, _ = config_from_args(get_args_parser().parse_args(line))
    return elastic_launch(config, _as_script)(work)


def _shorten_waits() -> None:
    """Let torchrun look for the other machine every 50 ms, not every second, and kill a hanging rank soon, not after 30 s."""
    state = dynamic_rendezvous._BackendRendezvousStateHolder
    dynamic_rendezvous._BackendRendezvousStateHolder = partial(state, cache_duration=0)
    dynamic_rendezvous._delay = lambda seconds: time.sleep(0.05)
    join = ProcessContext._join_procs_with_timeout
    ProcessContext._join_procs_with_timeout = lambda context, _: join(context, 0.7)


def _as_script(work: Callable[[], Any]) -> Any:
    """Be a rank as a script is one: it does not inherit the handlers of torchrun, and prints its own error.

    torch ends it by SIGINT if the tests are killed, which a rank that waits for another does not notice.
    """
    end_with_parent()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return work()
    except Exception:
        print(traceback.format_exc(), flush=True)
        raise


@contextmanager
def torchrun(link: Link, work: Callable[[], Any], *options: str) -> Iterator[list[Forked]]:
    """Start torchrun on both machines."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
        yield [
            stack.enter_context(forked(name, partial(_torchrun, node, work, options, folder), {}))
            for node, name in enumerate(link.names)
        ]


def _assert_ends(machines: Sequence[Forked], well: bool) -> None:
    assert wait(machines, LIMIT, grace_s=LIMIT / 2), "still running:" + _outputs(machines)
    assert [each.code for each in machines] == [int(not well)] * 2, _outputs(machines)


def _outputs(machines: Sequence[Forked]) -> str:
    return "".join(f"\n--- machine {node} ended with {each.code}:\n{each.output}" for node, each in enumerate(machines))


def _train_all() -> dict[str, Learned]:
    found = {}
    for name in STRATEGIES:
        meter = Meter()
        weights = _train(name, meter)
        found[name] = Learned(weights, (meter.counts[1] - meter.counts[0]) / (STEPS - 1))
    return found


@cache
def _expected() -> dict[str, str]:
    """Return the weights of the same runs on one machine."""
    found: dict[str, str] = on_ranks(RANKS, lambda: {name: _train(name, machines=1) for name in STRATEGIES})[0]
    return found


def test_four_ranks_learn_over_a_lossy_link_what_they_learn_on_one_machine(lossy):
    with torchrun(lossy, _train_all, "--max-restarts=0") as machines:
        _assert_ends(machines, well=True)
        found = {rank: learned for each in machines for rank, learned in each.result.items()}
    assert sorted(found) == [*range(RANKS)]
    assert lossy.lost_packets > 0
    for name, expected in _expected().items():
        assert {learned[name].weights for learned in found.values()} == {expected}, name
    # The gradients cross the interface of each machine: those of DDP at least once each way.
    for rank in (0, 2):
        sent = {name: learned.sent for name, learned in found[rank].items()}
        assert 4 * ENTRIES < sent["DDPStrategy"] < 40 * ENTRIES, sent
        assert sent["DGCStrategy"] < sent["DDPStrategy"] / 4, sent
        assert sent["PowerSGDStrategy"] < sent["DDPStrategy"] / 4, sent
        assert 4 * ENTRIES / 2 < sent["DiLoCoStrategy"] < sent["DDPStrategy"], sent


def _next(folder: Path) -> str | None:
    """Return the next strategy, or None after the last. Both machines must agree, and each torchrun counts for itself."""
    return next((name for name in FAULTY if not (folder / name).exists()), None)


def _lose_a_rank(folder: Path) -> str:
    """Lose a rank with each strategy in turn, as torchrun starts the ranks again; then resume one of the runs and finish."""
    name = _next(folder)
    if name is None:
        return _train("DGCStrategy", ckpt=folder / "DGCStrategy.ckpt")
    return _train(name, ModelCheckpoint(folder, name, every_n_train_steps=2), Killed(folder / name))


def _hang(folder: Path, is_short: bool) -> str:
    """Let a rank hang with each strategy in turn, as torchrun starts the ranks again."""
    name = _next(folder)
    return "the end" if name is None else _train(name, Hangs(folder / name, is_short))


def _assert_named(name: str, words: str) -> None:
    """Raise unless the others say which rank was lost; DDP says so in torch's words."""
    said = re.findall(rf"RuntimeError: {name}: rank \d could not exchange the \w+ of \w+ \d, because (.*?) \(", words)
    expected = "rank 3 has stopped or cannot be reached; see its log. Start the run again from its last checkpoint."
    assert set(said) == (set() if name == "DDPStrategy" else {expected}), words


def test_a_killed_rank_is_named_and_torchrun_starts_all_again(clean, tmp_path):
    with torchrun(clean, partial(_lose_a_rank, tmp_path), f"--max-restarts={len(FAULTY)}") as machines:
        _assert_ends(machines, well=True)
        assert not clean.processes
        found = {weights for each in machines for weights in each.result.values()}
        others = machines[0].output
    assert found == {_expected()["DGCStrategy"]}
    assert all((tmp_path / name).exists() for name in FAULTY), "a rank of each was killed"
    assert f"[{ADDRESSES[1]}]" in others, "torch names the machine"
    for name in FAULTY:
        _assert_named(name, others)


@pytest.mark.skipif(TORCH < (2, 7), reason="torch 2.6 does not change the timeout of a running gloo group")
def test_a_rank_that_hangs_is_named_when_the_timeout_has_passed(clean, tmp_path):
    (tmp_path / "patient").mkdir()
    options = f"--max-restarts={len(FAULTY)}"
    with (
        slow_link(CLEAN) as other,
        torchrun(other, partial(_hang, tmp_path / "patient", False), options) as patient,
        torchrun(clean, partial(_hang, tmp_path, True), options) as machines,
    ):
        _assert_ends(machines, well=True)
        assert not clean.processes
        assert (tmp_path / "patient" / FAULTY[0]).exists()
        assert [each.code for each in patient] == [None, None], "without the timeout, they would still wait"
        others = machines[0].output
    assert "Timed out waiting 500ms" in others
    assert all((tmp_path / name).exists() for name in FAULTY), "a rank of each hung"
    for name in FAULTY:
        _assert_named(name, others)
