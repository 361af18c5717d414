"""The gain of compressed gradients on a slow link: two ranks in network namespaces, joined by a link of a given speed.

Each rank is a forked process in a Linux network namespace of its own, with Lightning's ``Trainer(num_nodes=2)`` and gloo;
``network.py`` makes the link. A perceptron of 10.2 M parameters trains on one small batch a rank, so nearly all of a step of
plain DDP is communication. The ranks must end with equal weights.

Time is wall-clock time on rank 0. Bytes are those that the interface counted, including acknowledgements. The strategies
take turns in rotating order, and the result is the median over the rounds of the median step. It needs Linux and root.

::

    python benchmarks/slow_link.py --quick
    python benchmarks/slow_link.py --megabits 100 1000 --strategies ddp fp16 --out slow_link.json
    python benchmarks/slow_link.py --strategies ddp 'lightning_grad.strategies.DGCStrategy={"ratio": 0.01}'
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from pydoc import locate
from statistics import median
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "examples"))

from benchmarks.common import WARM_STEPS, Clock, machine, rotated, silence, timed_fit
from benchmarks.network import Link, Quality, sent_bytes, slow_link, why_unavailable
from benchmarks.rows import markdown_table

RANKS = 2
WIDTHS = (640, 2048, 2048, 2048, 256)
BATCH = 4
SETTLE = 3  # uncounted steps after WARM_STEPS: PowerSGD starts, TCP finds its speed

# Strategies by short name: its class and its arguments, and the optimizer of the module if it is not SGD.
STRATEGIES: dict[str, dict[str, Any]] = {
    "ddp": {"class_path": "lightning.pytorch.strategies.DDPStrategy", "init_args": {}},
    "fp16": {"class_path": "benchmarks.slow_link.HookedDDP", "init_args": {"hook": "fp16"}},
    "powersgd_torch": {
        "class_path": "benchmarks.slow_link.HookedDDP",
        "init_args": {"hook": "powersgd", "rank": 4, "bucket_cap_mb": 1000},
    },
    "powersgd": {"class_path": "lightning_grad.strategies.PowerSGDStrategy", "init_args": {"rank": 4}},
    "ddp_adam": {
        "class_path": "lightning.pytorch.strategies.DDPStrategy",
        "init_args": {},
        "optimizer": "adam",
    },
    "onebit_adam": {
        "class_path": "lightning_grad.strategies.OneBitAdamStrategy",
        "init_args": {"freeze_step": 1},
        "optimizer": "adam",
    },
    "dgc": {"class_path": "lightning_grad.strategies.DGCStrategy", "init_args": {"ratio": 1e-3, "warmup": None}},
}


# A rank.


class HookedDDP(DDPStrategy):
    """DDP with one of torch's communication hooks, also on the CPU, where Lightning ignores hooks.

    Args:
        hook: The hook.
        rank: Rank of PowerSGD's approximation.
        bucket_cap_mb: Largest bucket. PowerSGD on gloo needs a single bucket, because messages of two get mixed up.
    """

    def __init__(self, hook: Literal["fp16", "powersgd"], rank: int = 4, bucket_cap_mb: int = 25) -> None:
        super().__init__(bucket_cap_mb=bucket_cap_mb)
        self._hook, self._rank = hook, rank

    @override
    def _register_ddp_hooks(self) -> None:
        assert isinstance(self.model, DistributedDataParallel)
        if self._hook == "fp16":
            self.model.register_comm_hook(None, fp16_compress_hook)
        else:
            state = PowerSGDState(None, matrix_approximation_rank=self._rank, start_powerSGD_iter=2)
            self.model.register_comm_hook(state, powerSGD_hook)


class Perceptron(LightningModule):
    """Linear layers, with momentum.

    Args:
        widths: Widths of the layers, inputs first; the default has 10.2 M parameters.
        bias: Whether they have biases.
        optimizer: SGD with momentum, or Adam.
    """

    def __init__(
        self, widths: Sequence[int] = WIDTHS, bias: bool = True, optimizer: Literal["sgd", "adam"] = "sgd"
    ) -> None:
        super().__init__()
        self.optimizer = optimizer
        layers = [module for a, b in pairwise(widths) for module in (nn.Linear(a, b, bias), nn.ReLU())]
        self.layers = nn.Sequential(*layers[:-1])

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss on ``batch``."""
        return F.mse_loss(self.layers(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Build the optimizer."""
        if self.optimizer == "adam":
            return torch.optim.Adam(self.parameters(), lr=1e-4)
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


class WallClock(Clock):
    """A clock of wall-clock time, which also runs while the process waits for the link."""

    @override
    def now(self) -> float:
        return time.perf_counter()


def build_strategy(strategy: Mapping[str, Any]) -> DDPStrategy:
    """Build a strategy from its ``class_path`` and ``init_args``.

    Raises:
        ValueError: If the class does not exist.
    """
    found = locate(strategy["class_path"])
    if not callable(found):
        raise ValueError(f"there is no strategy {strategy['class_path']!r}; pass the dotted path of a class.")
    built: DDPStrategy = found(**strategy.get("init_args", {}))
    return built


def noise(widths: Sequence[int], rank: int) -> tuple[Tensor, Tensor]:
    """Return a small batch that differs between ranks, so ranks that exchange no gradients diverge."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(BATCH, widths[0], generator=generator), torch.randn(BATCH, widths[-1], generator=generator)


def digest(module: nn.Module) -> str:
    """Return a hash of the weights, to compare them bit by bit."""
    flat = torch.cat([parameter.detach().view(-1) for parameter in module.parameters()])
    return hashlib.sha256(flat.numpy().tobytes()).hexdigest()


def _train(strategy: Mapping[str, Any], widths: Sequence[int], steps: int, settle: int) -> dict[str, Any]:
    """Train as one rank, and return milliseconds and sent bytes of each step and a hash of the weights."""
    sent = list[int]()
    silence()
    torch.set_num_threads(1)
    seed_everything(0, verbose=False)
    module = Perceptron(widths, optimizer=strategy.get("optimizer", "sgd"))
    seconds = timed_fit(
        module,
        noise(widths, int(os.environ["RANK"])),
        steps + settle,
        [],
        WallClock("cpu"),
        pause=lambda: sent.append(sent_bytes()),
        num_nodes=RANKS,
        use_distributed_sampler=False,
        strategy=build_strategy(strategy),
    )
    milliseconds = [1000 * s for s in seconds[settle:]]
    sizes = [after - before for before, after in pairwise(sent)][WARM_STEPS + settle :]
    return {"milliseconds": milliseconds, "sent": sizes, "weights": digest(module)}


# Measurement.


@dataclass(frozen=True)
class Measured:
    """Median and fastest step on rank 0, in milliseconds, and megabytes (1e6 bytes) sent a step."""

    milliseconds: float
    fastest: float
    megabytes: float


def measure(
    link: Link,
    strategy: str | Mapping[str, Any],
    steps: int = 5,
    settle: int = SETTLE,
    timeout_s: float = 300.0,
    widths: Sequence[int] = WIDTHS,
) -> Measured:
    """Train for a few steps over a link.

    Args:
        link: From :func:`slow_link`.
        strategy: A name from ``STRATEGIES``, or a mapping of ``class_path`` and ``init_args``.
        steps: Number of steps that count.
        settle: Number of steps before them, in addition to the two warm-up steps of every benchmark.
        timeout_s: Seconds until the ranks are killed.
        widths: Widths of the perceptron.

    Returns:
        Measured: Milliseconds and bytes a step.

    Raises:
        RuntimeError: If a rank fails, with its output, or if the ranks end with different weights.
        TimeoutError: If it takes too long.
    """
    built = STRATEGIES[strategy] if isinstance(strategy, str) else dict(strategy)
    found = link.call(partial(_train, built, widths, steps, settle), timeout_s)
    if len({rank["weights"] for rank in found}) > 1:
        raise RuntimeError(f"the ranks ended with different weights: {built} did not synchronize them.")
    times, sent = found[0]["milliseconds"], found[0]["sent"]
    return Measured(median(times), min(times), sum(sent) / len(sent) / 1e6)


def measure_all(
    strategies: Mapping[str, Mapping[str, Any]],
    megabits: float,
    delay_ms: float,
    rounds: int,
    steps: int,
    settle: int = SETTLE,
) -> dict[str, Measured]:
    """Measure strategies in turn at one speed, and return the medians over the rounds."""
    found: dict[str, list[Measured]] = {name: [] for name in strategies}
    with slow_link(Quality(megabits, delay_ms)) as link:
        for i in range(rounds):
            for name in rotated(list(strategies), i):
                found[name].append(measure(link, strategies[name], steps, settle))
    return {
        name: Measured(
            median(m.milliseconds for m in runs), min(m.fastest for m in runs), median(m.megabytes for m in runs)
        )
        for name, runs in found.items()
    }


def table(found: Mapping[float, Mapping[str, Measured]]) -> str:
    """Return the results as a Markdown table; the first strategy is the baseline."""
    names = list(next(iter(found.values())))
    header = ["strategy", "MB a step"]
    for megabits in found:
        header += [f"ms at {megabits:g} Mbit/s", f"ratio to {names[0]}"]
    rows = []
    for name in names:
        row = [name, f"{median(speed[name].megabytes for speed in found.values()):.3f}"]
        for speed in found.values():
            ratio = speed[name].milliseconds / speed[names[0]].milliseconds
            row += [f"{speed[name].milliseconds:.0f}", f"{ratio:.3f}"]
        rows.append(row)
    return markdown_table(header, rows)


def _strategy(text: str) -> tuple[str, dict[str, Any]]:
    """Read a strategy from the command line: a name, a dotted path, or a dotted path, ``=`` and JSON."""
    if text in STRATEGIES:
        return text, STRATEGIES[text]
    path, _, arguments = text.partition("=")
    if "." not in path:
        raise argparse.ArgumentTypeError(f"must be a dotted path or one of {', '.join(STRATEGIES)}; got {text!r}.")
    return text, {"class_path": path, "init_args": json.loads(arguments or "{}")}


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of three steps, at 1 Gbit/s by default")
    parser.add_argument("--megabits", type=float, nargs="+", help="speeds in Mbit/s (default 100 1000)")
    parser.add_argument("--delay-ms", type=float, default=0.0, help="delay one way, in milliseconds (default 0)")
    named = "the baseline, then strategies to compare with it: names or dotted paths, with =JSON for arguments"
    parser.add_argument("--strategies", type=_strategy, nargs="+", help=f"{named} (default: {' '.join(STRATEGIES)})")
    parser.add_argument("--rounds", type=int, help="rounds (default 3, with --quick 1)")
    parser.add_argument("--steps", type=int, help="steps of a round that count (default 5, with --quick 3)")
    parser.add_argument("--out", type=Path, help="JSON file for the table")
    options = parser.parse_args(arguments)
    options.megabits = options.megabits or ([1000.0] if options.quick else [100.0, 1000.0])
    options.strategies = dict(options.strategies or STRATEGIES.items())
    options.rounds = options.rounds or (1 if options.quick else 3)
    options.steps = options.steps or (3 if options.quick else 5)
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table and write it."""
    options = _options(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so the link is removed, too
    if reason := why_unavailable():
        print(f"Skipped: {reason}.")
        return
    torch.set_num_threads(1)
    print(f"{machine()} a rank; {options.rounds} round(s) of {options.steps} steps", flush=True)
    found = {
        megabits: measure_all(options.strategies, megabits, options.delay_ms, options.rounds, options.steps)
        for megabits in options.megabits
    }
    print(f"\nA step of two ranks with 10.2 M parameters, {options.delay_ms:g} ms delay\n\n{table(found)}")
    if options.out is not None:
        rows = {f"{speed:g}": {name: asdict(m) for name, m in runs.items()} for speed, runs in found.items()}
        options.out.write_text(json.dumps({"machine": machine(), "rounds": options.rounds, **rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
