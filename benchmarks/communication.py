"""Cost and gain of compressed gradients: bytes, time of a step, and time until a network has learned over a slow link.

Every part compares with a baseline of the same run:

- ``payload``: bytes that a step passes to collectives, and bytes of the gradients. They are exact.
- ``step``: steps of two ranks on this machine, where nothing is gained: the cost of compression. The variants take turns in
  one pair of processes.
- ``link``: the same steps of two ranks in network namespaces, over a link of 100 Mbit/s and of 1 Gbit/s; see ``slow_link.py``.
- ``accuracy``: a network learns digits over a link of 100 Mbit/s, and over one of 20 Mbit/s that delays every packet by
  20 ms. Accuracy after each epoch, by seconds since the first step without validation, and by megabytes that rank 0 passed
  to collectives; and the megabytes that the interface of rank 0 sent, which include acknowledgements.

The last two parts need Linux and root, and are skipped elsewhere. Results are medians of wall-clock time, which other
processes disturb; rows that repeat a baseline show by how much. ``topk_selection.py`` measures the selectors alone.

::

    python benchmarks/communication.py --quick
    python benchmarks/communication.py --parts payload step
    python benchmarks/communication.py --out communication.json --figure communication_slow_link.png
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
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

from benchmarks import network, slow_link
from benchmarks.common import (
    WARM_STEPS,
    machine,
    quiet_trainer,
    rotated,
    show,
    show_missed,
    silence,
    timed_fit,
)
from benchmarks.network import Quality
from benchmarks.rows import AGAIN, Results, Row
from benchmarks.slow_link import RANKS, STRATEGIES, WIDTHS, Perceptron, WallClock, build_strategy, noise
from lightning_grad.strategies import CompressedDDPStrategy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RATIO = 1e-3
LIMIT_S = 600.0
SETTLE = 2  # uncounted steps after WARM_STEPS: torch's PowerSGD starts dense
GOAL = 0.95
SLOW = 100.0  # Mbit/s
BATCH, WIDTH, RATE = 128, 768, 0.05
ACCURACY: dict[str, Quality] = {
    f"Digits over {SLOW:g} Mbit/s": Quality(SLOW),
    "Digits over 20 Mbit/s and 20 ms": Quality(20.0, delay_ms=20.0),
}

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
DDP, DDP_AGAIN, TORCH, OURS = "ddp", f"ddp{AGAIN}", "powersgd_torch", "powersgd"
STEP_BUDGET = 1.05
COMPRESSED = ("dgc", "powersgd")
FASTER = {SLOW: 10.0, 1000.0: 2.0}  # least speedup of a DGC step over DDP, by Mbit/s


def _diloco(every: int, **settings: Any) -> dict[str, Any]:
    arguments = {"sync_every_n_steps": every, **settings}
    return {"class_path": "lightning_grad.strategies.DiLoCoStrategy", "init_args": arguments}


LEARNERS: dict[str, dict[str, Any]] = {
    "dense": STRATEGIES["ddp"],
    "fp16": STRATEGIES["fp16"],
    "PowerSGD rank 4": STRATEGIES["powersgd"],
    DGC: {"class_path": "lightning_grad.strategies.DGCStrategy", "init_args": {"ratio": RATIO}},
    **{f"DiLoCo, H = {every}": _diloco(every) for every in (10, 30, 100)},
    "DiLoCo, H = 30, int8": _diloco(30, compression="int8"),
    "DiLoCo, H = 30, top 3 %": _diloco(30, compression="topk", ratio=0.03),
}
PALETTE = ("#555555", "#999999", "#d55e00", "#0072b2", "#7fcdb5", "#009e73", "#00493a", "#e69f00", "#cc79a7")
COLOURS = dict(zip(LEARNERS, PALETTE, strict=True))
MARKERS = dict(zip(LEARNERS, "osD^v<>Px", strict=True))


@dataclass(frozen=True)
class Sizes:
    """Sizes of the measurements.

    Args:
        rounds: Rounds of steps without a slow link.
        steps: Counted steps of such a round.
        links: Rounds and counted steps, by Mbit/s of the link.
        epochs: Epochs of each training over a link.
        learned: Links of these trainings, by the title of their table.
        figure: File for the figure of the trainings over the first link.
    """

    rounds: int
    steps: int
    links: Mapping[float, tuple[int, int]]
    epochs: int
    learned: Mapping[str, Quality] = field(default_factory=lambda: ACCURACY)
    figure: Path | None = None


FULL = Sizes(5, 8, {SLOW: (1, 3), 1000.0: (1, 8)}, 24)
QUICK = Sizes(2, 6, {1000.0: (1, 3)}, 4, dict([*ACCURACY.items()][:1]))


Tables = dict[str, list[Row]]


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


def payload(sizes: Sizes) -> Tables:
    """Count the bytes of a step for each net and scheme; the ratio says how many times fewer than dense."""
    counted: list[dict[str, Any]] = on_ranks(_count_all, 1)
    return {"Bytes of a step": [_payload_row(**row) for row in counted]}


def _payload_row(net: str, gradients: str, sent: int, dense: int) -> Row:
    bound, columns = SMALLER.get((net, gradients)), {"bytes": sent, "dense bytes": dense}
    return Row(f"{net}, {gradients}", None, dense / sent, bound, True, columns=columns)


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


# Steps without a slow link.


class Compression(Callback):
    """Collect the compression time that the strategies log."""

    def __init__(self) -> None:
        self.milliseconds: list[float] = []

    @override
    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if "comm/compress_ms" in trainer.callback_metrics:
            self.milliseconds.append(float(trainer.callback_metrics["comm/compress_ms"]))


def step(sizes: Sizes) -> Tables:
    """Time steps of two ranks on this machine."""
    found: dict[str, Any] = on_ranks(partial(_time_in_turns, sizes.rounds, sizes.steps), RANKS)
    typical = {name: median(times["ms"]) for name, times in found.items()}
    rows = [
        Row(
            name,
            milliseconds,
            milliseconds / typical[DDP],
            STEP_BUDGET if name in COMPRESSED else None,
            baseline="" if name == DDP else DDP,
            columns=_compress_ms(found[name]["compress_ms"]),
        )
        for name, milliseconds in typical.items()
    ]
    against_torch = Row(OURS, typical[OURS], typical[OURS] / typical[TORCH], STEP_BUDGET, baseline=TORCH)
    return {"A step of two ranks on one machine": [*rows, against_torch]}


def _compress_ms(logged: Sequence[float]) -> dict[str, float]:
    return {"comm/compress_ms": median(logged)} if logged else {}


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


def link(sizes: Sizes) -> Tables:
    """Time steps over links of several speeds."""
    unavailable = link_is_unavailable()
    return {
        f"A step over {megabits:g} Mbit/s": [] if unavailable else _link_rows(megabits, *turns)
        for megabits, turns in sizes.links.items()
    }


def _link_rows(megabits: float, rounds: int, steps: int) -> list[Row]:
    compared = {DDP: STRATEGIES[DDP], DDP_AGAIN: STRATEGIES[DDP], **STRATEGIES}
    found = slow_link.measure_all(compared, megabits, 0.0, rounds, steps, settle=2)
    budgets = {"dgc": 1 / FASTER[megabits]}
    return [
        Row(
            name,
            each.milliseconds,
            each.milliseconds / found[DDP].milliseconds,
            budgets.get(name),
            columns={"MB a step": each.megabytes},
        )
        for name, each in found.items()
    ]


def link_is_unavailable() -> bool:
    """Return True and print the reason if this machine cannot create a slow link."""
    if reason := network.why_unavailable():
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
        megabytes: Megabytes that rank 0 has passed to collectives to exchange gradients or weights.
        wire: Megabytes that the interface of rank 0 has sent since then, if they are counted.
    """

    epoch: int
    accuracy: float
    seconds: float
    megabytes: float
    wire: float = 0.0


class Follow(Callback):
    """Record accuracy, time and bytes after each epoch. The clock pauses during validation, until all ranks are done.

    Args:
        itemsize: Bytes of a dense gradient entry on the wire. The strategies of this package count their own bytes.
        wire: Returns the bytes that the interface of this rank has sent.
    """

    def __init__(self, itemsize: int, wire: Callable[[], int] = int) -> None:
        self.epochs: list[Epoch] = []
        self._itemsize, self._wire = itemsize, wire
        self._seconds, self._before = 0.0, 0
        self._since: float | None = None

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._since is None:
            trainer.strategy.barrier()
            self._before = self._wire()
            self._since = time.perf_counter()

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._since is not None
        self._seconds += time.perf_counter() - self._since

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        accuracy = float(trainer.callback_metrics["val_acc"])
        sent = self._sent(trainer, pl_module) / 1e6
        wire = (self._wire() - self._before) / 1e6
        self.epochs.append(Epoch(trainer.current_epoch + 1, accuracy, self._seconds, sent, wire))
        trainer.strategy.barrier()
        self._since = time.perf_counter()

    def _sent(self, trainer: Trainer, module: LightningModule) -> int:
        if hasattr(trainer.strategy, "ledger"):
            return int(trainer.strategy.ledger.sent_bytes)
        return trainer.global_step * self._itemsize * sum(p.numel() for p in module.parameters())


def perceptron() -> nn.Sequential:
    """Build the network of the part accuracy."""
    layers = (nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10))
    return nn.Sequential(nn.Flatten(), *layers)


def learn(gradients: str, epochs: int, wire: Callable[[], int] = int, **arguments: Any) -> list[Epoch]:
    """Train as one rank, and return its state after each epoch.

    Args:
        gradients: Way of sending gradients or weights, one of ``LEARNERS``.
        epochs: Number of epochs.
        wire: Returns the bytes that the interface of this rank has sent.
        arguments: Arguments of the Trainer.
    """
    seed_everything(0, verbose=False)
    module = ImageClassifier(perceptron(), optimizer="sgd", lr=RATE, weight_decay=5e-4)
    follow = Follow(2 if gradients == "fp16" else 4, wire)
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


def accuracy(sizes: Sizes) -> Tables:
    """Learn digits over slow links, and measure time and bytes until the goal accuracy."""
    if link_is_unavailable():
        return {title: [] for title in sizes.learned}
    tables: Tables = {}
    for title, quality in sizes.learned.items():
        found = learn_all(sizes.epochs, quality)
        if sizes.figure is not None and not tables:
            draw_accuracies(found).savefig(sizes.figure, dpi=140)
        tables[title] = accuracy_rows(found)
    return tables


def learn_all(epochs: int, quality: Quality) -> dict[str, list[Epoch]]:
    """Train with each of the learners over a slow link."""
    found: dict[str, list[Epoch]] = {}
    with network.slow_link(quality) as joined:
        for name in LEARNERS:
            work = partial(learn, name, epochs, network.sent_bytes, num_nodes=RANKS)
            found[name] = joined.call(work, LIMIT_S)[0]
    return found


def reached(epochs: Sequence[Epoch]) -> Epoch | None:
    """Return the first epoch that reaches the goal accuracy."""
    return next((epoch for epoch in epochs if epoch.accuracy >= GOAL), None)


def accuracy_rows(found: Mapping[str, Sequence[Epoch]]) -> list[Row]:
    """Return time and bytes until the goal accuracy, and the end of each training; the ratio says how much sooner."""
    goal, baseline = f"{100 * GOAL:g} %", reached(next(iter(found.values())))
    rows = []
    for name, epochs in found.items():
        first, last = reached(epochs), epochs[-1]
        ratio = baseline.seconds / first.seconds if first and baseline else None
        columns = {
            f"s to {goal}": first.seconds if first else "never",
            f"MB to {goal}": first.megabytes if first else "never",
            "s in all": last.seconds,
            "MB in all": last.megabytes,
            "MB on the wire": last.wire,
            "accuracy, %": 100 * last.accuracy,
        }
        rows.append(Row(name, None, ratio, columns=columns))
    return rows


def parameters() -> int:
    """Return the number of parameters of the network."""
    return sum(parameter.numel() for parameter in perceptron().parameters())


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

PARTS: dict[str, Callable[[Sizes], Tables]] = {"payload": payload, "step": step, "link": link, "accuracy": accuracy}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the tables and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="a rough answer in three minutes; steps over 1 Gbit/s only"
    )
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=list(PARTS), help="parts to measure (default: all)"
    )
    parser.add_argument("--out", type=Path, help="JSON file to write the tables to")
    parser.add_argument("--figure", type=Path, help="file for the figure of the last part")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the link is removed, too
    prepare()
    print(machine(), flush=True)
    sizes = replace(QUICK if options.quick else FULL, figure=options.figure)
    tables: Tables = {}
    for name in options.parts:
        found = PARTS[name](sizes)
        tables |= found
        for title, rows in found.items():
            if rows:
                show(title, rows)
    show_missed(tables)
    if options.out is not None:
        Results(machine(), sizes.rounds, tables).write(options.out)


if __name__ == "__main__":
    main()
