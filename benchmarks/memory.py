"""What each technique holds in memory, in addition to weights, gradients and optimizer state, as a multiple of the weights.

A transformer with 50 MB of weights trains for a few epochs with each callback at its trial setting. Each fit has a process of
its own, which is forked from this one, and the same seed. Between all steps of the last epoch, the script adds up the bytes
of all tensors that exist, each storage once; every fourth step is a log step. The peak is the largest memory of the process.
Both numbers are those of a fit with the technique minus those of a fit without it; a second fit without it shows the noise.
The strategies train on two ranks, next to DDP with the same optimizer. It needs a system that can fork processes.

::

    python benchmarks/memory.py --quick
    python benchmarks/memory.py --only NMSparsity DGCStrategy
    python benchmarks/memory.py --out memory.json
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import resource
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "examples"))

from benchmarks.common import machine, quiet_trainer, show, silence, speed_options, write_tables
from benchmarks.communication import on_ranks
from benchmarks.rows import AGAIN, HELD, MOST, PEAK, Row
from benchmarks.slow_link import RANKS
from lightning_grad import callbacks, strategies
from lightning_grad.cli.check.memory import can_fork, peak_of
from lightning_grad.functional.plain_tensors import is_opaque

LAYERS, WIDTH, CLASSES, BATCH = 4, 512, 10, 8
CHANNELS, SIZE, PATCH = 2, 32, 16  # of the images; a patch has WIDTH entries
BATCHES, EPOCHS = 6, 3
LOG_EVERY = 4  # steps
PLAIN, DDP = "plain", "DDP"
CALLBACKS, STRATEGIES = "callbacks", "strategies"  # titles of the tables
# The paper's share of entries, and its warm-up, which decides the peak, in a few steps.
BUCKETS: dict[str, Any] = {
    "gradient_as_bucket_view": True
}  # else Python sees DDP's copy of the gradients only with a hook
DGC: dict[str, Any] = {"ratio": 1e-3, "warmup": [0.25, 0.0625], "warmup_steps": 3, **BUCKETS}
POWER: dict[str, Any] = {"rank": 4, **BUCKETS}


SETTINGS: dict[str, dict[str, Any]] = {  # other settings of callbacks, measured next to their trial setting
    "OptimizerSwap, muon": {"optimizer": "muon"},
    "OptimizerSwap, galore-adamw, rank 64": {"optimizer": "galore-adamw", "options": {"rank": 64}},
    "OptimizerSwap, frugal": {"optimizer": "frugal"},
    "OptimizerSwap, dct-adamw, rank 64": {"optimizer": "dct-adamw", "options": {"rank": 64}},
}


class Classifier(LightningModule):
    """A transformer that classifies images by their patches.

    Args:
        optimizer: ``adamw``, or ``sgd`` with momentum.
    """

    def __init__(self, optimizer: str = "adamw") -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.norm = nn.BatchNorm2d(CHANNELS)
        self.head = nn.Linear(WIDTH, CLASSES)
        self._optimizer = optimizer

    @override
    def forward(self, x: Tensor) -> Tensor:
        tokens = F.pixel_unshuffle(self.norm(x), PATCH).flatten(2).transpose(1, 2)
        logits: Tensor = self.head(self.encoder(tokens).mean(1))
        return logits

    @override
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    @override
    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean(), sync_dist=True)

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self._optimizer == "sgd":
            return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9)
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


def bytes_of_weights() -> int:
    """Return the bytes of the weights."""
    with torch.device("meta"):
        return sum(p.numel() * p.element_size() for p in Classifier().parameters())


# What is measured in one fit.


@dataclass(frozen=True)
class Bytes:
    """Memory of a fit, in bytes.

    Args:
        held: Tensors that exist between two steps; the median over the steps of the last epoch.
        most: The same; the maximum.
        peak: Largest memory of the process.
    """

    held: float
    most: float
    peak: float


class Watch(Callback):
    """Add up all tensors between steps. Must be the first callback, so no other one has begun the next step."""

    def __init__(self) -> None:
        self.held: list[int] = []

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == EPOCHS - 1:
            self.held.append(bytes_of_tensors())


def bytes_of_tensors() -> int:
    """Return the bytes of all tensors that exist, each storage once."""
    return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in _tensors())}.values())


def _tensors() -> Iterator[Tensor]:
    for found in gc.get_objects():
        # isinstance would wake lazy objects; a tensor of a compiler has no memory.
        if issubclass(type(found), Tensor) and not is_opaque(found) and found.layout == torch.strided:
            yield found
            if found.is_leaf and found.grad is not None:  # a gradient that Python has not asked for
                yield found.grad


def watched_fit(extra: Sequence[Callback], optimizer: str = "adamw", **arguments: Any) -> Watch:
    """Train a new classifier."""
    seed_everything(0, verbose=False)
    watch = Watch()
    samples = BATCH * BATCHES * arguments.get("devices", 1)
    data = TensorDataset(torch.randn(samples, CHANNELS, SIZE, SIZE), torch.randint(CLASSES, (samples,)))
    trainer = quiet_trainer(
        "cpu",
        max_epochs=EPOCHS,
        log_every_n_steps=LOG_EVERY,
        limit_val_batches=1,
        callbacks=[watch, *extra],
        **arguments,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(Classifier(optimizer), DataLoader(data, BATCH, shuffle=True), DataLoader(data, BATCH))
    return watch


def memory_of(technique: Callable[[], list[Callback]]) -> Bytes:
    """Return the memory of a fit with callbacks, in a process of its own."""
    held = get_context("fork").RawArray("q", 2)

    def work() -> bool:
        watch = watched_fit(technique())
        held[:] = [int(median(watch.held)), max(watch.held)]
        return True

    peak = peak_of(work)
    if peak is None:
        raise RuntimeError(f"the fit did not succeed in its process: {technique}.")
    return Bytes(held[0], held[1], peak)


def memory_of_ranks(strategy: Callable[[], Strategy], optimizer: str) -> Bytes:
    """Return the memory of rank 0 of a fit on two ranks."""

    def work() -> dict[str, float]:
        watch = watched_fit([], optimizer, devices=RANKS, strategy=strategy())
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return asdict(Bytes(median(watch.held), max(watch.held), peak))

    return Bytes(**on_ranks(work, RANKS))


# Tables.


def rows_of(found: Mapping[str, Bytes], baselines: Mapping[str, str]) -> list[Row]:
    """Return what each fit holds more than its baseline, as multiples of the weights' bytes."""
    weights = bytes_of_weights()

    def row(name: str, baseline: str) -> Row:
        mine, other = found[name], found[baseline]
        more = {HELD: mine.held - other.held, MOST: mine.most - other.most, PEAK: mine.peak - other.peak}
        return Row(name, None, None, baseline=baseline, columns={key: each / weights for key, each in more.items()})

    return [row(name, baseline) for name, baseline in baselines.items()]


def callback_rows(only: Sequence[str]) -> list[Row]:
    """Measure every callback at its trial setting."""
    techniques = {name: getattr(callbacks, name) for name in callbacks.__all__ if not only or name in only}
    fits: dict[str, Callable[[], list[Callback]]] = {PLAIN: list, f"{PLAIN}{AGAIN}": list}
    fits |= {name: partial(_one, technique) for name, technique in techniques.items()}
    for name, arguments in SETTINGS.items():
        technique = techniques.get(name.partition(",")[0])
        fits |= {name: partial(_one, technique, arguments)} if technique is not None else {}
    found = {name: memory_of(fit) for name, fit in fits.items()}
    return rows_of(found, {name: PLAIN for name in fits if name != PLAIN})


def _one(technique: Any, arguments: Mapping[str, Any] | None = None) -> list[Callback]:
    return [technique(**(technique.trial if arguments is None else arguments))]


def strategy_rows(only: Sequence[str]) -> list[Row]:
    """Measure every strategy on two ranks."""
    fits: dict[str, tuple[Callable[[], Strategy], str]] = {}
    for optimizer in ("adamw", "sgd"):
        fits |= {f"{DDP}, {optimizer}{again}": (_ddp, optimizer) for again in ("", AGAIN)}
    dgc, power = strategies.DGCStrategy, strategies.PowerSGDStrategy
    compressing: dict[str, tuple[Callable[[], Strategy], str]] = {
        "DGCStrategy": (partial(dgc, **DGC), "sgd"),
        "DGCStrategy, error feedback": (partial(dgc, **DGC, correction="error_feedback"), "adamw"),
        "PowerSGDStrategy": (partial(power, **POWER), "adamw"),
        "OneBitAdamStrategy": (partial(strategies.OneBitAdamStrategy, freeze_step=1, **BUCKETS), "adamw"),
    }
    for name in ("LocalSGDStrategy", "DiLoCoStrategy"):
        compressing[name] = (partial(getattr(strategies, name), sync_every_n_steps=2, **BUCKETS), "adamw")
    fits |= {name: fit for name, fit in compressing.items() if not only or name.partition(",")[0] in only}
    found = {name: memory_of_ranks(*fit) for name, fit in fits.items()}
    baselines = {name: f"{DDP}, {optimizer}" for name, (_, optimizer) in fits.items()}
    return rows_of(found, {name: baseline for name, baseline in baselines.items() if name != baseline})


def _ddp() -> Strategy:
    return DDPStrategy(**BUCKETS)


def map_large_memory() -> None:
    """Make glibc return memory to the system when a tensor is freed; otherwise the peak would depend on earlier work."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        mmap_threshold = -3
        ctypes.CDLL(None).mallopt(mmap_threshold, 2**16)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the tables and write them."""
    assert __doc__ is not None
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--only", nargs="+", default=[], metavar="NAME", help="techniques to measure (default: all)")
    chosen, rest = own.parse_known_args(arguments)
    options = speed_options(__doc__, rest, quick="no strategies: a rough answer in two minutes")
    if options.device != "cpu" or not can_fork():
        sys.exit("memory.py measures on a CPU, on a system that can fork processes.")
    silence()
    torch.set_num_threads(1)
    map_large_memory()
    print(f"{machine()}; weights of {bytes_of_weights() / 1e6:.0f} MB")
    tables = {CALLBACKS: callback_rows(chosen.only)}
    show("More memory than a plain fit, as multiples of the weights", tables[CALLBACKS])
    if not options.quick:
        tables[STRATEGIES] = strategy_rows(chosen.only)
        show("More memory than DDP on two ranks, as multiples of the weights", tables[STRATEGIES])
    write_tables(options, tables)


if __name__ == "__main__":
    main()
