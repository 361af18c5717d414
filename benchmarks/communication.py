"""Cost and gain of compressed gradients: bytes and time of a step, also over a slow link.

Every part compares with a baseline of the same run:

- ``payload``: bytes that the last of three steps passes to collectives, and bytes of the gradients. They are exact.
- ``planned``: bytes, unsent rest and validation loss of two ranks with planned levels (``adapt``), against uniform levels; and
  the time of a plan.
- ``step``: steps of two ranks on this machine, where nothing is gained: the cost of compression. The variants take turns in
  one pair of processes.
- ``link``: the same steps of two ranks in network namespaces, over a link of 100 Mbit/s and of 1 Gbit/s; see ``slow_link.py``.

The last part needs Linux and root, and is skipped elsewhere. Results are medians of wall-clock time, which other
processes disturb; rows that repeat a baseline show by how much. ``topk_selection.py`` measures the selectors alone.

::

    python benchmarks/communication.py --quick
    python benchmarks/communication.py --parts payload step
    python benchmarks/communication.py --out communication.json
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch.utils.data import DataLoader
from typing_extensions import override

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "examples"))


from plain_project import Digits, ImageClassifier, VisionTransformer
from torch import nn

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
from benchmarks.rows import AGAIN, Results, Row
from benchmarks.slow_link import RANKS, STRATEGIES, WIDTHS, Perceptron, WallClock, build_strategy, noise
from lightning_grad.strategies import CompressedDDPStrategy, DGCStrategy, PowerSGDStrategy

if TYPE_CHECKING:
    pass

RATIO = 1e-3
SETTLE = 2  # uncounted steps after WARM_STEPS: torch's PowerSGD starts dense
SLOW = 100.0  # Mbit/s

# Networks of the part payload: widths of a perceptron, and whether it has biases.
NETS: dict[str, tuple[tuple[int, ...], bool]] = {
    "a layer of 1e6": ((1000, 1000), False),
    "a layer of 4e6": ((2000, 2000), False),
    "a net of 10.2 M": (WIDTHS, True),
}
DGC, HALF = f"DGC {100 * RATIO:g} %", f"DGC {100 * RATIO:g} %, float16 values"
ONE_BIT = "1-bit Adam after the freeze"
SCHEMES: dict[str, dict[str, Any]] = {
    DGC: {"class_path": "lightning_grad.strategies.DGCStrategy", "init_args": {"ratio": RATIO, "warmup": None}},
    HALF: {
        "class_path": "lightning_grad.strategies.DGCStrategy",
        "init_args": {"ratio": RATIO, "warmup": None, "value_dtype": "float16"},
    },
    "PowerSGD rank 1": {"class_path": "lightning_grad.strategies.PowerSGDStrategy", "init_args": {"rank": 1}},
    "PowerSGD rank 4": {"class_path": "lightning_grad.strategies.PowerSGDStrategy", "init_args": {"rank": 4}},
    ONE_BIT: STRATEGIES["onebit_adam"],
}
SMALLER = {
    ("a layer of 1e6", DGC): 499.0,
    ("a layer of 1e6", HALF): 660.0,
    ("a layer of 4e6", DGC): 499.0,
    ("a layer of 4e6", HALF): 660.0,
    ("a net of 10.2 M", DGC): 380.0,
    ("a net of 10.2 M", ONE_BIT): 20.0,
}
DDP, DDP_AGAIN, TORCH, OURS = "ddp", f"ddp{AGAIN}", "powersgd_torch", "powersgd"
DDP_ADAM = "ddp_adam"
STEP_BUDGET = 1.05

# Part planned: a name, the module of a seed, the strategy, its level, and a lower level that is uniform too.
LEVELS: list[tuple[str, Callable[[], LightningModule], type[CompressedDDPStrategy], str, float, float]] = [
    ("DGC", lambda: _three_layers(), DGCStrategy, "ratio", 0.01, 0.0025),
    ("PowerSGD", VisionTransformer, PowerSGDStrategy, "rank", 4, 3),
]
ADAPT = ("lgreco", "lgreco_feedback")
EVERY: dict[str, Any] = {"adapt": "lgreco", "adapt_every": 2}
COMPRESSED = ("dgc", "powersgd")
FASTER = {SLOW: 10.0, 1000.0: 2.0}  # least speedup of a DGC step over DDP, by Mbit/s


@dataclass(frozen=True)
class Sizes:
    """Sizes of the measurements.

    Args:
        rounds: Rounds of steps without a slow link.
        steps: Counted steps of such a round.
        links: Rounds and counted steps, by Mbit/s of the link.
        epochs: Epochs of the training with planned levels.
    """

    rounds: int
    steps: int
    links: Mapping[float, tuple[int, int]]
    epochs: int = 6


FULL = Sizes(5, 8, {SLOW: (1, 3), 1000.0: (1, 8)})
QUICK = Sizes(2, 6, {1000.0: (1, 3)}, epochs=3)


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
    optimizer = scheme.get("optimizer", "sgd")
    trainer.fit(Perceptron(widths, bias, optimizer), DataLoader(batches, batch_size=None))
    return {"sent": strategy.ledger.step_sent, "dense": strategy.ledger.step_dense}


# Planned levels.


class Plans(Callback):
    """Collect what the strategy says of each exchange, from the second epoch on: the first plan is made there."""

    def __init__(self) -> None:
        self.sent: list[int] = []
        self.unsent: list[float] = []
        self.errors: dict[int, float] = {}
        self.plan_milliseconds: list[float] = []

    @override
    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        logged = trainer.callback_metrics
        if trainer.current_epoch:
            self.sent.append(int(logged["comm/bytes_sent"]))
            self.unsent.append(float(logged["comm/residual_norm"]))
        if "comm/plan_ms" in logged:
            self.plan_milliseconds.append(float(logged["comm/plan_ms"]))
        if "comm/plan_error" in logged:
            self.errors[trainer.current_epoch] = float(logged["comm/plan_error"])


def planned(sizes: Sizes) -> Tables:
    """Train with planned and with uniform levels; the ratio says how many times fewer bytes than the first of its kind."""
    rows = []
    for found in on_ranks(partial(_train_all, sizes.epochs), RANKS):
        first = found[0]
        rows += [_planned_row(each, first) for each in found]
    plans = [Row(name, ms, None) for name, ms in on_ranks(_time_plans, 1).items()]
    return {"Planned levels": rows, "A plan of a net of 10.2 M": plans}


def _planned_row(each: dict[str, Any], first: dict[str, Any]) -> Row:
    columns = {
        "bytes": round(each["bytes"]),
        "error": each["error"],
        "unsent": each["unsent"] / first["unsent"],
        "validation loss": each["loss"],
    }
    budget = 1.0 if each["is_planned"] else None
    return Row(each["name"], None, first["bytes"] / each["bytes"], budget, True, first["name"], columns)


def _train_all(epochs: int) -> list[list[dict[str, Any]]]:
    found = []
    for name, module, kind, setting, level, lower in LEVELS:
        variants: list[tuple[str, dict[str, Any]]] = [
            *((f"{name}, {setting} {value:g}", {setting: value}) for value in (level, lower)),
            *((f"{name}, {setting} {level:g}, {adapt}", {setting: level, "adapt": adapt}) for adapt in ADAPT),
        ]
        found.append([_train(title, module, kind, options, epochs) for title, options in variants])
    return found


def _train(
    name: str,
    module: Callable[[], LightningModule],
    kind: type[CompressedDDPStrategy],
    options: dict[str, Any],
    epochs: int,
) -> dict[str, Any]:
    seed_everything(0, verbose=False)
    without: dict[str, Any] = {"warmup": None} if kind is DGCStrategy else {}
    plans = Plans()
    trainer = quiet_trainer(
        "cpu",
        devices=RANKS,
        strategy=kind(**options, **without),
        max_epochs=epochs,
        callbacks=[plans],
        log_every_n_steps=1,
    )
    trainer.fit(module(), Digits(batch_size=32))
    errors = [error for epoch, error in plans.errors.items() if epoch > 1]
    return {
        "name": name,
        "bytes": sum(plans.sent) / len(plans.sent),
        "error": sum(errors) / len(errors) if errors else "",
        "unsent": sum(plans.unsent) / len(plans.unsent),
        "loss": float(trainer.callback_metrics["val_loss"]),
        "is_planned": "adapt" in options,
    }


def _three_layers() -> LightningModule:
    layers = (nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10))
    return ImageClassifier(nn.Sequential(nn.Flatten(), *layers), optimizer="sgd", lr=0.05)


def _time_plans() -> dict[str, float]:
    kinds = {"DGC 0.1 %": DGCStrategy(warmup=None, **EVERY), "PowerSGD rank 4": PowerSGDStrategy(**EVERY)}
    found = {}
    for name, strategy in kinds.items():
        plans = Plans()
        trainer = quiet_trainer("cpu", strategy=strategy, max_epochs=2, callbacks=[plans], log_every_n_steps=1)
        trainer.fit(Perceptron(), DataLoader(cast(Any, [noise(WIDTHS, 0)] * 6), batch_size=None))
        found[name] = median(plans.plan_milliseconds)
    return found


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
            milliseconds / typical[baseline_of(name)],
            STEP_BUDGET if name in COMPRESSED else None,
            baseline="" if name == DDP else baseline_of(name),
            columns=_compress_ms(found[name]["compress_ms"]),
        )
        for name, milliseconds in typical.items()
    ]
    against_torch = Row(OURS, typical[OURS], typical[OURS] / typical[TORCH], STEP_BUDGET, baseline=TORCH)
    return {"A step of two ranks on one machine": [*rows, against_torch]}


def baseline_of(name: str) -> str:
    """Return the row that a row is compared with: DDP with the same optimizer."""
    return DDP_ADAM if STRATEGIES.get(name, {}).get("optimizer") == "adam" and name != DDP_ADAM else DDP


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
                Perceptron(optimizer=variants[name].get("optimizer", "sgd")),
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
            each.milliseconds / found[baseline_of(name)].milliseconds,
            budgets.get(name),
            baseline="" if name == DDP else baseline_of(name),
            columns={"MB a step": each.megabytes},
        )
        for name, each in found.items()
    ]


def link_is_unavailable() -> bool:
    """Return True and print the reason if this machine cannot create a slow link."""
    if reason := network.why_unavailable():
        print(f"\nSkipped: {reason}.", flush=True)
    return reason is not None


# Command line.

PARTS: dict[str, Callable[[Sizes], Tables]] = {"payload": payload, "planned": planned, "step": step, "link": link}


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
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so the link is removed, too
    prepare()
    print(machine(), flush=True)
    sizes = QUICK if options.quick else FULL
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
