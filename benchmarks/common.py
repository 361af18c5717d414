"""Shared parts of the benchmarks: the machine's name, a quiet Trainer, a clock, fits in turns, networks, options."""

from __future__ import annotations

import argparse
import logging
import platform
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Semaphore, Thread
from typing import Any, TypeVar, cast

import lightning
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from plain_project import ResidualConvNet
from torch import Tensor, nn
from torch.utils.data import DataLoader
from typing_extensions import override

from benchmarks.rows import MISSED, Results, Row, noise_of, table_of

WARM_STEPS = 2
T = TypeVar("T")


def machine(device: str = "cpu") -> str:
    """Return the name of the processor or GPU, the number of threads, and the versions."""
    versions = f"torch {torch.__version__}, lightning {lightning.__version__}, Python {platform.python_version()}"
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, {versions}"
    return f"{_cpu()}, {torch.get_num_threads()} thread(s), {versions}"


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def silence() -> None:
    """Turn off the messages that Lightning prints in every fit."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*GPU available but not used.*",
        ".*LeafSpec.*",
        ".*`validation_step` but have no.*",
    ):
        warnings.filterwarnings("ignore", message)


def quiet_trainer(device: str, **arguments: Any) -> Trainer:
    """Return a Trainer that prints nothing and writes no files unless you pass a logger."""
    quiet: dict[str, Any] = {
        "accelerator": "gpu" if device == "cuda" else "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(**(quiet | arguments))


@dataclass(frozen=True)
class Clock:
    """A clock for a device: processor time of one thread, else wall-clock time."""

    device: str

    def now(self) -> float:
        """Return the time in seconds, after the GPU has finished its work."""
        if self.device == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()

    def seconds(self, function: Callable[[], object]) -> float:
        """Time one call."""
        begin = self.now()
        function()
        return self.now() - begin


class StepTimer(Callback):
    """Record when each batch starts. Must be the first callback, so the steps include all other callbacks.

    Args:
        clock: The clock.
        pause: Called between steps, and not timed.
    """

    def __init__(self, clock: Clock, pause: Callable[[], None] | None = None) -> None:
        self._starts: list[float] = []
        self._ends: list[float] = []
        self._clock = clock
        self._pause = pause

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._ends.append(self._clock.now())
        if self._pause is not None:
            self._pause()
        self._starts.append(self._clock.now())

    @property
    def periods(self) -> list[float]:
        """Seconds from the start of each batch to the start of the next, without the warm-up."""
        return [end - start for start, end in zip(self._starts, self._ends[1:], strict=False)][WARM_STEPS:]


def timed_fit(
    module: LightningModule,
    batch: Any,
    steps: int,
    callbacks: Sequence[Callback],
    clock: Clock,
    pause: Callable[[], None] | None = None,
    **arguments: Any,
) -> list[float]:
    """Train on one batch repeatedly, and return the seconds of each step after the warm-up."""
    timer, batches = StepTimer(clock, pause), WARM_STEPS + steps + 1
    trainer = quiet_trainer(clock.device, max_steps=batches, max_epochs=1, callbacks=[timer, *callbacks], **arguments)
    trainer.fit(module, DataLoader(cast(Any, [batch] * batches), batch_size=None))
    return timer.periods


class SmallTransformer(LightningModule):
    """Four pre-norm layers of width 256 on four sequences of 256 tokens, with AdamW."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss on ``batch``."""
        return F.mse_loss(self.encoder(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Build the optimizer."""
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


def transformer() -> tuple[LightningModule, Any]:
    """Build the transformer and a batch for it."""
    return SmallTransformer(), (torch.randn(4, 256, 256), torch.randn(4, 256, 256))


def convnet() -> tuple[LightningModule, Any]:
    """Build the project's residual network and a batch of 32 images for it."""
    module = ResidualConvNet(channels=3, width=32, schedule="constant")
    return module, (torch.randn(32, 3, 32, 32), torch.randint(10, (32,)))


def rotated(items: Sequence[T], by: int) -> list[T]:
    """Return the items starting at another one, every other time in reverse."""
    start = by % len(items)
    turned = [*items[start:], *items[:start]]
    return turned[::-1] if by % 2 else turned


def in_turns(fits: Sequence[Callable[[Callable[[], None]], list[float]]]) -> list[list[float]]:
    """Run fits in threads, one step of one fit at a time, so neighboring steps run under the same load.

    Args:
        fits: Functions that train. Each gets a function to call between its steps, which returns when its turn comes.

    Returns:
        list: The result of each fit.
    """
    go, back = [Semaphore(0) for _ in fits], Semaphore(0)
    results: list[Future[list[float]]] = [Future() for _ in fits]

    def pause(number: int) -> None:
        back.release()
        go[number].acquire()

    def play(number: int) -> None:
        go[number].acquire()
        try:
            results[number].set_result(fits[number](partial(pause, number)))
        except BaseException as error:
            results[number].set_exception(error)
        back.release()

    for number in range(len(fits)):
        Thread(target=play, args=(number,), daemon=True).start()
    turn = 0
    while running := [number for number, result in enumerate(results) if not result.done()]:
        for number in rotated(running, turn):
            go[number].release()
            back.acquire()
        turn += 1
    return [result.result() for result in results]


def show(title: str, rows: Sequence[Row], unit: str = "") -> None:
    """Print one table; ``unit`` is what the ratios are to, if the rows do not name it."""
    print(f"\n{title}\n\n{table_of(rows, unit)}", flush=True)


def show_missed(tables: Mapping[str, Sequence[Row]]) -> None:
    """Print the names of the rows that miss their budgets by more than the noise."""
    missed = [
        f"{row.name} ({title})"
        for title, rows in tables.items()
        for row in rows
        if row.verdict(noise_of(rows)) == MISSED
    ]
    print(f"\nBudgets missed: {'; '.join(missed) or 'nothing'}.", flush=True)


def speed_options(description: str, arguments: Sequence[str] | None, quick: str) -> argparse.Namespace:
    """Parse the command line that the speed scripts share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--rounds", type=int, help="rounds (default 3, with --quick 1)")
    parser.add_argument("--out", type=Path, help="JSON file to write the tables to")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default 1)")
    options = parser.parse_args(arguments)
    options.rounds = options.rounds or (1 if options.quick else 3)
    return options


def write_tables(options: argparse.Namespace, tables: Mapping[str, Sequence[Row]]) -> None:
    """Write the tables to the file of ``--out``, if there is one."""
    if options.out is not None:
        Results(machine(options.device), options.rounds, tables).write(options.out)
