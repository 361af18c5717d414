"""Cost and gain of compressed gradients: bytes, time of a step, and time until a network has learned over a slow link.

Every part compares with a baseline of the same run:

- ``payload``: bytes that a step passes to collectives, and bytes of the gradients. They are exact.
- ``selection``: selectors of the largest entries, and ``torch.topk``; see ``topk_selection.py``.
- ``step``: steps of two ranks on this machine, where nothing is gained: the cost of compression. The variants take turns in
  one pair of processes.
- ``link``: the same steps of two ranks in network namespaces, over a link of 100 Mbit/s and of 1 Gbit/s; see ``slow_link.py``.
- ``accuracy``: a network learns digits over the link of 100 Mbit/s. Accuracy after each epoch, by seconds since the first
  step without validation, and by megabytes that rank 0 passed to collectives.

The last two parts need Linux and root, and are skipped elsewhere. Results are medians. Selection is measured in processor
time, all else in wall-clock time, which other processes disturb; rows that repeat a baseline show by how much. ``--out`` is a
folder for the tables (JSON), and for the figure of the last part with its numbers (CSV). All parts take about ten minutes.

::

    python benchmarks/communication.py --quick
    python benchmarks/communication.py --parts payload selection
    python benchmarks/communication.py --out runs/communication_benchmark
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import nn
from torch.utils.data import DataLoader
from typing_extensions import override

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "examples"))

from plain_project import Digits, ImageClassifier

from benchmarks import slow_link, topk_selection
from benchmarks.common import (
    WARM_STEPS,
    Clock,
    machine,
    markdown_table,
    quiet_trainer,
    rotated,
    show,
    silence,
    timed_fit,
)
from benchmarks.slow_link import RANKS, STRATEGIES, WIDTHS, Perceptron, WallClock, build_strategy, noise
from lightning_grad.strategies import CompressedDDPStrategy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CHILD = "learn-in-namespace"
RATIO = 1e-3
LIMIT_S = 600.0
SETTLE = 2  # uncounted steps after WARM_STEPS: torch's PowerSGD starts dense
GOAL = 0.95
SLOW = 100.0  # Mbit/s
BATCH, WIDTH, RATE = 128, 768, 0.05

# Networks of the part payload: widths of a perceptron, and whether it has biases.
NETS: dict[str, tuple[tuple[int, ...], bool]] = {
    "a layer of 1e6": ((1000, 1000), False),
    "a layer of 4e6": ((2000, 2000), False),
    "a net of 10.2 M": (WIDTHS, True),
}
DGC, HALF = f"DGC {100 * RATIO:g} %", f"DGC {100 * RATIO:g} %, float16 values"
SCHEMES: dict[str, dict[str, Any]] = {
    DGC: {"class_path": "lightning_grad.strategies.DGCStrategy", "init_args": {"ratio": RATIO, "warmup": None}},
    HALF: {
        "class_path": "lightning_grad.strategies.DGCStrategy",
        "init_args": {"ratio": RATIO, "warmup": None, "value_dtype": "float16"},
    },
    "PowerSGD rank 1": {"class_path": "lightning_grad.strategies.PowerSGDStrategy", "init_args": {"rank": 1}},
    "PowerSGD rank 4": {"class_path": "lightning_grad.strategies.PowerSGDStrategy", "init_args": {"rank": 4}},
}
SMALLER = {
    ("a layer of 1e6", DGC): 499.0,
    ("a layer of 1e6", HALF): 660.0,
    ("a layer of 4e6", DGC): 499.0,
    ("a layer of 4e6", HALF): 660.0,
    ("a net of 10.2 M", DGC): 380.0,
}
DDP, DDP_AGAIN, TORCH, OURS = "ddp", "ddp, again", "powersgd_torch", "powersgd"
STEP_BUDGET = 1.05
FASTER = {SLOW: 10.0, 1000.0: 2.0}  # least speedup of a DGC step over DDP, by Mbit/s
LEARNERS: dict[str, dict[str, Any]] = {
    "dense": STRATEGIES["ddp"],
    "fp16": STRATEGIES["fp16"],
    "PowerSGD rank 4": STRATEGIES["powersgd"],
    DGC: {"class_path": "lightning_grad.strategies.DGCStrategy", "init_args": {"ratio": RATIO}},
}
COLOURS = dict(zip(LEARNERS, ("#555555", "#999999", "#d55e00", "#0072b2"), strict=True))
MARKERS = dict(zip(LEARNERS, "osD^", strict=True))


@dataclass(frozen=True)
class Sizes:
    """Sizes of the measurements.

    Args:
        entries: Entries of the vector to select from.
        selections: Rounds of the selectors.
        rounds: Rounds of steps without a slow link.
        steps: Counted steps of such a round.
        links: Rounds and counted steps, by Mbit/s of the link.
        epochs: Epochs of each training over the link.
    """

    entries: int
    selections: int
    rounds: int
    steps: int
    links: Mapping[float, tuple[int, int]]
    epochs: int


FULL = Sizes(topk_selection.ENTRIES, 15, 5, 8, {SLOW: (2, 3), 1000.0: (3, 5)}, 24)
QUICK = Sizes(topk_selection.ENTRIES, 3, 2, 6, {1000.0: (1, 3)}, 4)


@dataclass(frozen=True)
class Budget:
    """An upper or, with ``at_least``, lower bound of a measured number."""

    name: str
    measured: float
    bound: float
    at_least: bool = False

    @property
    def is_kept(self) -> bool:
        """Whether the number meets the bound."""
        return self.measured >= self.bound if self.at_least else self.measured <= self.bound

    @property
    def cells(self) -> list[str]:
        """The line as text."""
        sign = ">=" if self.at_least else "<="
        return [self.name, f"{self.measured:.4g}", f"{sign} {self.bound:g}", "ok" if self.is_kept else "missed"]


Found = tuple[list[dict[str, Any]], list[Budget]]


def display(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print one result."""
    print(f"\n{title}\n\n{markdown_table(header, rows)}", flush=True)


# Ranks on this machine.


def on_ranks(work: Callable[[], Any], ranks: int) -> Any:
    """Run ``work`` in forked processes, one a rank, and return the result of rank 0, which must be JSON."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_rank, (work, ranks, folder), nprocs=ranks, start_method="fork")  # type: ignore[attr-defined, no-untyped-call]
        return json.loads(Path(folder, "0.json").read_text())


def _rank(rank: int, work: Callable[[], Any], ranks: int, folder: str) -> None:
    prepare()
    # With LOCAL_RANK set, Lightning assumes an external launcher and joins the existing process group.
    os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0", GLOO_SOCKET_IFNAME="lo")
    limit = timedelta(seconds=120)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=ranks, timeout=limit)
    Path(folder, f"{rank}.json").write_text(json.dumps(work()))
    dist.barrier()


def prepare() -> None:
    """Configure a process: warnings, log levels, threads."""
    silence()
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)  # raised by DDP in torch 2.13
    torch.set_num_threads(1)


# Bytes.


def payload(sizes: Sizes, out: Path | None) -> Found:
    """Count the bytes of a step for each net and scheme."""
    counted: list[dict[str, Any]] = on_ranks(_count_all, 1)
    budgets, cells = [], []
    for row in counted:
        ratio = row["ratio"] = row["dense"] / row["sent"]
        bound = SMALLER.get((row["net"], row["gradients"]))
        budget = None if bound is None else Budget(f"{row['net']}, {row['gradients']}: smaller by", ratio, bound, True)
        budgets += [] if budget is None else [budget]
        verdict = ["", ""] if budget is None else budget.cells[2:]
        cells.append(
            [f"{row['net']}, {row['gradients']}", f"{row['sent']:,}", f"{row['dense']:,}", f"{ratio:.1f}", *verdict]
        )
    display("Bytes of a step", ["net, gradients", "bytes", "dense bytes", "smaller by", "budget", ""], cells)
    return counted, budgets


def _count_all() -> list[dict[str, Any]]:
    return [
        {"net": net, "gradients": scheme, **_count(*NETS[net], SCHEMES[scheme])} for net in NETS for scheme in SCHEMES
    ]


def _count(widths: Sequence[int], bias: bool, scheme: Mapping[str, Any], steps: int = 3) -> dict[str, int]:
    strategy = cast(CompressedDDPStrategy, build_strategy(scheme))
    trainer = quiet_trainer("cpu", strategy=strategy, max_steps=steps, max_epochs=1, use_distributed_sampler=False)
    batches = cast(Any, [noise(widths, 0)] * steps)
    trainer.fit(Perceptron(widths, bias), DataLoader(batches, batch_size=None))
    ledger = strategy.ledger
    return {"sent": ledger.sent_bytes // ledger.steps, "dense": ledger.dense_bytes // ledger.steps}


# Selection.


def selection(sizes: Sizes, out: Path | None) -> Found:
    """Time the selectors on vectors of several kinds."""
    k, rows, budgets = math.ceil(RATIO * sizes.entries), [], []
    for kind, values in topk_selection.vectors(sizes.entries, "cpu").items():
        found = topk_selection.selector_rows(values, k, sizes.selections, Clock("cpu"), kind != "constant")
        show(f"The {k} largest of {sizes.entries} float32 entries, {kind}", topk_selection.TOPK, found)
        rows += [{"entries": kind, **asdict(row)} for row in found]
        held = [(row, row.budget) for row in found if row.budget is not None]
        budgets += [Budget(f"{row.name} of {topk_selection.TOPK}, {kind}", row.ratio, bound) for row, bound in held]
    return rows, budgets


# Steps without a slow link.


class Compression(Callback):
    """Collect the compression time that the strategies log."""

    def __init__(self) -> None:
        self.milliseconds: list[float] = []

    @override
    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if "comm/compress_ms" in trainer.callback_metrics:
            self.milliseconds.append(float(trainer.callback_metrics["comm/compress_ms"]))


def step(sizes: Sizes, out: Path | None) -> Found:
    """Time steps of two ranks on this machine."""
    found: dict[str, Any] = on_ranks(partial(_time_in_turns, sizes.rounds, sizes.steps), RANKS)
    typical = {name: median(times["ms"]) for name, times in found.items()}
    rows = [
        {
            "gradients": name,
            "milliseconds": milliseconds,
            "ratio": milliseconds / typical[DDP],
            "compress_ms": median(found[name]["compress_ms"]) if found[name]["compress_ms"] else None,
        }
        for name, milliseconds in typical.items()
    ]
    cells = [
        [
            r["gradients"],
            f"{r['milliseconds']:.1f}",
            f"{r['ratio']:.3f}",
            f"{r['compress_ms']:.1f}" if r["compress_ms"] else "",
        ]
        for r in rows
    ]
    title = f"A step of two ranks with 10.2 M parameters on one machine, {sizes.rounds} round(s) of {sizes.steps} steps"
    display(title, ["gradients", "median ms", f"ratio to {DDP}", "comm/compress_ms"], cells)
    return rows, [Budget("step of PowerSGDStrategy to torch's hook", typical[OURS] / typical[TORCH], STEP_BUDGET)]


def _time_in_turns(rounds: int, steps: int) -> dict[str, dict[str, list[float]]]:
    variants = {DDP: STRATEGIES[DDP], DDP_AGAIN: STRATEGIES[DDP], **STRATEGIES}
    found: dict[str, dict[str, list[float]]] = {name: {"ms": [], "compress_ms": []} for name in variants}
    for i in range(rounds):
        for name in rotated(list(variants), i):
            seed_everything(0, verbose=False)
            compression = Compression()
            seconds = timed_fit(
                Perceptron(),
                noise(WIDTHS, dist.get_rank()),
                steps + SETTLE,
                [compression],
                WallClock("cpu"),
                devices=RANKS,
                strategy=build_strategy(variants[name]),
                use_distributed_sampler=False,
                log_every_n_steps=WARM_STEPS + SETTLE + steps + 1,  # the last step, which is not timed
            )
            found[name]["ms"] += [1000 * s for s in seconds[SETTLE:]]
            found[name]["compress_ms"] += compression.milliseconds
    return found


# Steps over a slow link.


def link(sizes: Sizes, out: Path | None) -> Found:
    """Time steps over links of several speeds."""
    if link_is_unavailable():
        return [], []
    found = {
        megabits: slow_link.measure_all(STRATEGIES, megabits, 0.0, rounds, steps, settle=2)
        for megabits, (rounds, steps) in sizes.links.items()
    }
    print(f"\nA step of two ranks with 10.2 M parameters over a link\n\n{slow_link.table(found)}", flush=True)
    rows = [
        {"megabits": megabits, "gradients": name, **asdict(measured)}
        for megabits, speed in found.items()
        for name, measured in speed.items()
    ]
    faster = {megabits: speed[DDP].milliseconds / speed["dgc"].milliseconds for megabits, speed in found.items()}
    return rows, [
        Budget(f"step of DGC at {megabits:g} Mbit/s: faster by", ratio, FASTER[megabits], True)
        for megabits, ratio in faster.items()
    ]


def link_is_unavailable() -> bool:
    """Return True and print the reason if this machine cannot create a slow link."""
    if reason := slow_link.why_unavailable():
        print(f"\nSkipped: {reason}.", flush=True)
    return reason is not None


# Accuracy over a slow link.


@dataclass(frozen=True)
class Epoch:
    """State of a training after an epoch.

    Args:
        epoch: Number of the epoch, from 1.
        accuracy: Accuracy on the validation images.
        seconds: Seconds since the first step, without validation.
        megabytes: Megabytes of gradients that rank 0 has passed to collectives.
    """

    epoch: int
    accuracy: float
    seconds: float
    megabytes: float


class Follow(Callback):
    """Record accuracy, time and bytes after each epoch. The clock pauses during validation, until all ranks are done.

    Args:
        itemsize: Bytes of a dense gradient entry on the wire. Compressing strategies count their own bytes.
    """

    def __init__(self, itemsize: int) -> None:
        self.epochs: list[Epoch] = []
        self._itemsize = itemsize
        self._seconds = 0.0
        self._since: float | None = None

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._since is None:
            trainer.strategy.barrier()
            self._since = time.perf_counter()

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._since is not None
        self._seconds += time.perf_counter() - self._since

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        accuracy = float(trainer.callback_metrics["val_acc"])
        sent = self._sent(trainer, pl_module) / 1e6
        self.epochs.append(Epoch(trainer.current_epoch + 1, accuracy, self._seconds, sent))
        trainer.strategy.barrier()
        self._since = time.perf_counter()

    def _sent(self, trainer: Trainer, module: LightningModule) -> int:
        if isinstance(trainer.strategy, CompressedDDPStrategy):
            return trainer.strategy.ledger.sent_bytes
        return trainer.global_step * self._itemsize * sum(p.numel() for p in module.parameters())


def network() -> nn.Sequential:
    """Build the network of the part accuracy."""
    layers = (nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10))
    return nn.Sequential(nn.Flatten(), *layers)


def learn(gradients: str, epochs: int, **arguments: Any) -> list[Epoch]:
    """Train as one rank, and return its state after each epoch.

    Args:
        gradients: Way of sending gradients, one of ``LEARNERS``.
        epochs: Number of epochs.
        arguments: Arguments of the Trainer.
    """
    seed_everything(0, verbose=False)
    module = ImageClassifier(network(), optimizer="sgd", lr=RATE, weight_decay=5e-4)
    follow = Follow(2 if gradients == "fp16" else 4)
    trainer = quiet_trainer(
        "cpu",
        strategy=build_strategy(LEARNERS[gradients]),
        max_epochs=epochs,
        callbacks=[follow],
        num_sanity_val_steps=0,
        **arguments,
    )
    trainer.fit(module, Digits(BATCH // RANKS))
    return follow.epochs


def accuracy(sizes: Sizes, out: Path | None) -> Found:
    """Learn digits over a slow link, and print time and bytes until the goal accuracy."""
    if link_is_unavailable():
        return [], []
    found: dict[str, list[Epoch]] = {}
    with slow_link.slow_link(SLOW) as joined:
        for name in LEARNERS:
            task = json.dumps({"gradients": name, "epochs": sizes.epochs, "num_nodes": RANKS})
            command = [sys.executable, str(Path(__file__).resolve()), CHILD, task]
            printed = joined.run(command, {"OMP_NUM_THREADS": "1"}, LIMIT_S)[0]
            found[name] = [Epoch(**epoch) for epoch in json.loads(printed.splitlines()[-1])]
    show_accuracies(found)
    if out is not None:
        write_accuracies(found, out)
    return [{"gradients": name, **asdict(epoch)} for name, epochs in found.items() for epoch in epochs], []


def reached(epochs: Sequence[Epoch]) -> Epoch | None:
    """Return the first epoch that reaches the goal accuracy."""
    return next((epoch for epoch in epochs if epoch.accuracy >= GOAL), None)


def show_accuracies(found: Mapping[str, Sequence[Epoch]]) -> None:
    """Print time and bytes until the goal accuracy, and the end of each training."""
    goal = f"{100 * GOAL:g} %"
    header = ["gradients", f"s to {goal}", "faster by", f"MB to {goal}", "less by", "s in all", "MB in all", "accuracy"]
    baseline, rows = reached(next(iter(found.values()))), []
    for name, epochs in found.items():
        first, last, row = reached(epochs), epochs[-1], [name]
        for key in ("seconds", "megabytes"):
            row.append(f"{getattr(first, key):.2f}" if first else "never")
            row.append(f"{getattr(baseline, key) / getattr(first, key):.1f}" if first and baseline else "")
        rows.append([*row, f"{last.seconds:.1f}", f"{last.megabytes:.1f}", f"{100 * last.accuracy:.1f} %"])
    entries = f"{parameters() / 1e6:.2f} M parameters"
    display(f"Digits over {SLOW:g} Mbit/s, two ranks, {entries}, {len(epochs)} epochs", header, rows)


def parameters() -> int:
    """Return the number of parameters of the network."""
    return sum(parameter.numel() for parameter in network().parameters())


def write_accuracies(found: Mapping[str, Sequence[Epoch]], folder: Path) -> None:
    """Write the numbers and the figure."""
    with (folder / "communication_slow_link.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["gradients", *Epoch.__dataclass_fields__])
        writer.writerows([name, *asdict(epoch).values()] for name, epochs in found.items() for epoch in epochs)
    draw_accuracies(found).savefig(folder / "communication_slow_link.png", dpi=140)


def draw_accuracies(found: Mapping[str, Sequence[Epoch]]) -> Figure:
    """Draw accuracy by megabytes sent and by seconds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 4.4), layout="constrained")
    by_bytes, by_time = figure.subplots(1, 2, sharey=True)
    for name, epochs in found.items():
        _draw_line(by_bytes, name, [epoch.megabytes for epoch in epochs], epochs)
        _draw_line(by_time, name, [epoch.seconds for epoch in epochs], epochs)
    by_bytes.set(xscale="log", xlabel="MB sent by each rank", ylabel="validation accuracy, %")
    by_bytes.xaxis.set_major_formatter("{x:g}")
    by_time.set(xscale="log", xlabel="seconds since the first step, without validation")
    by_time.xaxis.set_major_formatter("{x:g}")
    for axes in (by_bytes, by_time):
        axes.axhline(100 * GOAL, color="black", linestyle=":", linewidth=1, zorder=1)
        axes.grid(color="#eeeeee", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    size = f"{parameters() / 1e6:.2f} M parameters, {len(epochs)} epochs"
    title = f"Digits learned by two ranks over {SLOW:g} Mbit/s, {size}; large marks: {100 * GOAL:g} % reached"
    figure.suptitle(title, fontsize=11)
    figure.legend(*by_bytes.get_legend_handles_labels(), loc="outside lower center", ncols=len(found), frameon=False)
    return figure


def _draw_line(axes: Axes, name: str, places: Sequence[float], epochs: Sequence[Epoch]) -> None:
    heights, colour, marker = [100 * epoch.accuracy for epoch in epochs], COLOURS[name], MARKERS[name]
    axes.plot(places, heights, color=colour, marker=marker, markersize=3.5, linewidth=1.6, label=name)
    if (first := reached(epochs)) is not None:
        at = epochs.index(first)
        axes.plot(places[at], heights[at], marker, color=colour, markersize=10, markeredgecolor="white", zorder=3)


# Command line.

PARTS: dict[str, Callable[[Sizes, Path | None], Found]] = {
    "payload": payload,
    "selection": selection,
    "step": step,
    "link": link,
    "accuracy": accuracy,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the tables and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="a rough answer in three minutes; steps over 1 Gbit/s only"
    )
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=list(PARTS), help="parts to measure (default: all)"
    )
    parser.add_argument("--out", type=Path, help="folder for the tables (JSON), and the figure with its numbers (CSV)")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the link is removed, too
    prepare()
    print(machine(), flush=True)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
    tables: dict[str, Any] = {"machine": machine()}
    budgets: list[Budget] = []
    for name in options.parts:
        tables[name], held = PARTS[name](QUICK if options.quick else FULL, options.out)
        budgets += held
    if budgets:
        display("Budgets", ["what", "measured", "budget", ""], [budget.cells for budget in budgets])
    tables["budgets"] = [{**asdict(budget), "is_kept": budget.is_kept} for budget in budgets]
    if options.out is not None:
        (options.out / "communication.json").write_text(json.dumps(tables, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == [CHILD]:
        prepare()
        print(json.dumps([asdict(epoch) for epoch in learn(**json.loads(sys.argv[2]))]))
    else:
        main()
