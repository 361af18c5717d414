"""The gain of compressed gradients on a slow link: two ranks in network namespaces, joined by a link of a given speed.

Each rank is a process in a Linux network namespace of its own, with Lightning's ``Trainer(num_nodes=2)`` and gloo. A veth pair
joins the namespaces, and a token bucket (tbf of ``tc``) shapes the outgoing traffic of each end, so the link is full duplex.
A perceptron of 10.2 M parameters trains on one small batch a rank, so nearly all of a step of plain DDP is communication.
The ranks must end with equal weights.

Time is wall-clock time on rank 0. Bytes are those that the interface counted, including acknowledgements. The strategies
take turns in rotating order, and the result is the median over the rounds of the median step. It needs Linux, root, ``ip``
and ``tc``, and removes all namespaces, interfaces and processes that it creates.

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
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from itertools import count, pairwise
from pathlib import Path
from pydoc import locate
from statistics import median
from typing import IO, Any, Literal

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
from benchmarks.rows import markdown_table

RANKS = 2
INTERFACE, NETWORK, ADDRESSES = "slow0", "10.77.0.0/24", ("10.77.0.1", "10.77.0.2")
BURST_MS, LEAST_BURST, LARGEST_SEND = 1.0, 4000, 65536
QUEUE_MS = 100
GRACE_S = 5.0  # time for a rank to end by itself after another one has failed
TAIL = 3000
WIDTHS = (640, 2048, 2048, 2048, 256)
BATCH = 4
SETTLE = 3  # uncounted steps after WARM_STEPS: PowerSGD starts, TCP finds its speed
CHILD = "train-in-namespace"

# Strategies by short name: the class that the child process imports and its arguments.
STRATEGIES: dict[str, dict[str, Any]] = {
    "ddp": {"class_path": "lightning.pytorch.strategies.DDPStrategy", "init_args": {}},
    "fp16": {"class_path": "benchmarks.slow_link.HookedDDP", "init_args": {"hook": "fp16"}},
    "powersgd_torch": {
        "class_path": "benchmarks.slow_link.HookedDDP",
        "init_args": {"hook": "powersgd", "rank": 4, "bucket_cap_mb": 1000},
    },
    "powersgd": {"class_path": "lightning_grad.strategies.PowerSGDStrategy", "init_args": {"rank": 4}},
    "dgc": {"class_path": "lightning_grad.strategies.DGCStrategy", "init_args": {"ratio": 1e-3, "warmup": None}},
}


# The link.


@cache
def why_unavailable(delay_ms: float = 0.0) -> str | None:
    """Return the reason why this machine cannot create a slow link, or None if it can. Tries to create one.

    Args:
        delay_ms: Delay of the link. A kernel may support limiting the speed but not delays.

    Returns:
        str: The reason.
    """
    if not sys.platform.startswith("linux"):
        return f"a slow link needs network namespaces of Linux; this is {sys.platform}"
    if os.geteuid() != 0:
        return "a slow link needs root to create network namespaces; run it as root"
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            return f"a slow link needs `{tool}`; install iproute2"
    try:
        with slow_link(1000.0, delay_ms):
            return None
    except (RuntimeError, OSError) as error:
        return f"a slow link could not be created: {error}"


def _call(*command: str) -> str:
    """Run a tool and return its output. An error contains its standard error."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"`{' '.join(command)}` failed: {done.stderr.strip() or done.returncode}")
    return done.stdout


_numbers = count()


@contextmanager
def slow_link(megabits: float, delay_ms: float = 0.0) -> Iterator[Link]:
    """Join two network namespaces by a link. On exit, remove both and kill all processes in them.

    Args:
        megabits: Speed in each direction, in Mbit/s.
        delay_ms: Additional one-way delay of a packet, in milliseconds.

    Yields:
        Link: Runs commands in the namespaces.

    Raises:
        ValueError: If the speed is not positive.
        RuntimeError: If the link cannot be created; see :func:`why_unavailable`.
    """
    if not megabits > 0:
        raise ValueError(f"slow_link: megabits must be positive; got {megabits}.")
    stem = f"slow-{os.getpid()}-{next(_numbers)}"
    names = (f"{stem}-0", f"{stem}-1")
    with ExitStack() as stack:
        for name in names:
            stack.callback(_delete_namespace, name)  # registered before creation, in case of an interrupt
            _call("ip", "netns", "add", name)
        # Create both ends inside their namespaces, so the machine's own namespace never has them.
        pair = ("type", "veth", "peer", "name", INTERFACE, "netns", names[1])
        _call("ip", "-netns", names[0], "link", "add", "name", INTERFACE, *pair)
        for name, address in zip(names, ADDRESSES, strict=True):
            _configure(name, address, megabits, delay_ms)
        yield Link(names)


def _configure(name: str, address: str, megabits: float, delay_ms: float) -> None:
    """Bring up one end, and shape its outgoing traffic.

    Data that fits into the bucket passes at once, so the bucket holds the bytes of one millisecond. TCP must not send segments
    larger than the bucket: tbf would split them into single packets, which is slow and can double the time of a step. The
    congestion control is one that every kernel has, because the defaults of machines differ.
    """
    burst = max(LEAST_BURST, round(megabits * 1e6 / 8 * BURST_MS / 1000))
    send = str(min(LARGEST_SEND, burst - 1000))  # headers come on top
    ip, tc = ("ip", "-netns", name), ("tc", "-netns", name, "qdisc", "add", "dev", INTERFACE)
    _call(*ip, "link", "set", "lo", "up")
    _call(*ip, "addr", "add", f"{address}/24", "dev", INTERFACE)
    _call(*ip, "link", "set", INTERFACE, "up", "gso_max_size", send)
    _call(*ip, "route", "change", NETWORK, "dev", INTERFACE, "src", address, "congctl", "reno")
    rate = ("rate", f"{round(megabits * 1e6)}bit", "burst", str(burst), "latency", f"{QUEUE_MS}ms")
    _call(*tc, "root", "handle", "1:", "tbf", *rate)
    if delay_ms > 0:
        _call(*tc, "parent", "1:1", "handle", "10:", "netem", "delay", f"{delay_ms}ms", "limit", "100000")


def _delete_namespace(name: str) -> None:
    """Kill all processes in a namespace, and delete it with its interfaces, if it exists."""
    if not Path("/run/netns", name).exists():
        return
    for pid in _call("ip", "netns", "pids", name).split():
        _kill(int(pid), os.kill)
    _call("ip", "netns", "delete", name)


def _kill(pid: int, how: Any) -> None:
    with suppress(ProcessLookupError):  # it has ended
        how(pid, signal.SIGKILL)


@dataclass
class Link:
    """Two network namespaces that reach only each other, over a slow link."""

    names: tuple[str, ...]
    addresses: tuple[str, ...] = ADDRESSES
    _runs: int = field(default=0, init=False)

    def variables(self, rank: int) -> dict[str, str]:
        """Return the environment of one rank for torch, gloo and Lightning's cluster environment."""
        return {
            "MASTER_ADDR": self.addresses[0],
            "MASTER_PORT": str(29500 + self._runs),  # the last run's port may still be in TIME_WAIT
            "WORLD_SIZE": str(len(self.names)),
            "RANK": str(rank),
            "NODE_RANK": str(rank),
            "LOCAL_RANK": "0",  # its presence keeps Lightning from launching processes
            "GLOO_SOCKET_IFNAME": INTERFACE,
            "TP_SOCKET_IFNAME": INTERFACE,
        }

    def run(self, command: Sequence[str], env: Mapping[str, str], timeout_s: float) -> list[str]:
        """Run a command in both namespaces at once.

        Args:
            command: Command; the variable ``RANK`` identifies the rank.
            env: Variables in addition to those of this process.
            timeout_s: Seconds until all ranks are killed.

        Returns:
            list: Standard output of each rank.

        Raises:
            RuntimeError: If a rank fails. Contains the end of each rank's standard error.
            TimeoutError: If a rank takes too long. Contains the same.
        """
        self._runs += 1
        with ExitStack() as stack:
            ranks = [stack.enter_context(self._start(rank, command, env)) for rank in range(len(self.names))]
            in_time = _wait([rank.process for rank in ranks], timeout_s)
            codes = [rank.process.poll() for rank in ranks]
            if not in_time:
                raise TimeoutError(f"a rank took more than {timeout_s:g} s{_complaints(ranks, codes)}")
            if any(codes):
                raise RuntimeError(f"a rank failed{_complaints(ranks, codes)}")
            return [_text(rank.out) for rank in ranks]

    @contextmanager
    def _start(self, rank: int, command: Sequence[str], env: Mapping[str, str]) -> Iterator[_Rank]:
        # Files, not pipes: a full pipe would block a rank, because nothing is read while both run.
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.names[rank], *command],
                env={**os.environ, **env, **self.variables(rank)},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
            try:
                yield _Rank(process, out, err)
            finally:
                _end(process)


@dataclass(frozen=True)
class _Rank:
    process: subprocess.Popen[bytes]
    out: IO[bytes]
    err: IO[bytes]


def _wait(processes: Sequence[subprocess.Popen[bytes]], timeout_s: float) -> bool:
    """Wait until all have ended, or one has failed and the grace time of the others is over. Return False on timeout."""
    deadline, failed = time.monotonic() + timeout_s, False
    while any(process.poll() is None for process in processes):
        if not failed and any(process.poll() for process in processes):
            failed, deadline = True, time.monotonic() + GRACE_S
        if time.monotonic() > deadline:
            return failed
        time.sleep(0.02)
    return True


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process with its group. Orphans of a process that has ended are killed with the namespace."""
    if process.poll() is None:  # after it ended, its number may belong to another process
        _kill(process.pid, os.killpg)
        process.wait()


def _text(stream: IO[bytes]) -> str:
    stream.seek(0)
    return stream.read().decode(errors="replace")


def _complaints(ranks: Sequence[_Rank], codes: Sequence[int | None]) -> str:
    states = ["was still running" if code is None else f"ended with {code}" for code in codes]
    messages = [
        f"\n--- rank {i} {state}:\n{_text(rank.err)[-TAIL:].strip()}"
        for i, (rank, state) in enumerate(zip(ranks, states, strict=True))
    ]
    return "".join(messages)


# The process of a rank.


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
    """

    def __init__(self, widths: Sequence[int] = WIDTHS, bias: bool = True) -> None:
        super().__init__()
        layers = [module for a, b in pairwise(widths) for module in (nn.Linear(a, b, bias), nn.ReLU())]
        self.layers = nn.Sequential(*layers[:-1])

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss on ``batch``."""
        return F.mse_loss(self.layers(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Build the optimizer."""
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


def _sent() -> int:
    lines = Path("/proc/self/net/dev").read_text().splitlines()
    (counts,) = (line.partition(":")[2].split() for line in lines if line.strip().startswith(f"{INTERFACE}:"))
    return int(counts[8])  # bytes sent, after eight columns about received data


def _train(text: str) -> None:
    """Train as one rank, and print milliseconds and sent bytes of each step and a hash of the weights as JSON."""
    task, sent = json.loads(text), list[int]()
    silence()
    torch.set_num_threads(1)
    seed_everything(0, verbose=False)
    module = Perceptron(task["widths"])
    seconds = timed_fit(
        module,
        noise(task["widths"], int(os.environ["RANK"])),
        task["steps"] + task["settle"],
        [],
        WallClock("cpu"),
        pause=lambda: sent.append(_sent()),
        num_nodes=RANKS,
        use_distributed_sampler=False,
        strategy=build_strategy(task["strategy"]),
    )
    milliseconds = [1000 * s for s in seconds[task["settle"] :]]
    sizes = [after - before for before, after in pairwise(sent)][WARM_STEPS + task["settle"] :]
    print(json.dumps({"milliseconds": milliseconds, "sent": sizes, "weights": digest(module)}))


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
    task = {"steps": steps, "settle": settle, "strategy": built, "widths": list(widths)}
    command = [sys.executable, str(Path(__file__).resolve()), CHILD, json.dumps(task)]
    outputs = link.run(command, {"OMP_NUM_THREADS": "1"}, timeout_s)
    found = [json.loads(output.splitlines()[-1]) for output in outputs]
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
    with slow_link(megabits, delay_ms) as link:
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
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the link is removed, too
    if reason := why_unavailable(options.delay_ms):
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
    if sys.argv[1:2] == [CHILD]:
        _train(sys.argv[2])
    else:
        main()
