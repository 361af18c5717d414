"""A link of a given speed, delay and loss between two network namespaces, and processes in them.

Each namespace is like a machine of its own. Without delay and loss, a veth pair joins them; with one of these, a wire
that ``wire.py`` emulates. A token bucket (tbf of ``tc``) shapes the outgoing traffic of each end, so the link is full
duplex. It needs Linux, root, ``ip`` and ``tc``. On exit, all namespaces, interfaces and processes are removed; those of a
process that was killed are removed when the next link is created.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from itertools import count
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import IO, Any

from benchmarks.wire import carry, end_with_parent, enter, tun

INTERFACE, NETWORK, ADDRESSES = "slow0", "10.77.0.0/24", ("10.77.0.1", "10.77.0.2")
BURST_MS, LEAST_BURST, LARGEST_SEND = 1.0, 4000, 65536
QUEUE_MS = 100
START_S = 10.0
GRACE_S = 5.0  # time for a process to end by itself after another one has failed
TAIL = 3000
_FOLDER, _PREFIX = Path("/run/netns"), "slow-"
_ENDING = {signal.SIGINT, signal.SIGTERM}

_numbers = count()
_fork = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Quality:
    """Quality of a link, the same in each direction.

    Args:
        megabits: Speed in Mbit/s.
        delay_ms: Delay of a packet one way, in milliseconds, in addition to the time of its transmission.
        jitter_ms: Largest deviation from this delay.
        loss: Share of packets that never arrive.

    Raises:
        ValueError: If a value is out of range.
    """

    megabits: float
    delay_ms: float = 0.0
    jitter_ms: float = 0.0
    loss: float = 0.0

    def __post_init__(self) -> None:
        if not self.megabits > 0:
            raise ValueError(f"megabits must be positive; got {self.megabits}.")
        if not 0 <= self.jitter_ms <= self.delay_ms:
            raise ValueError(f"jitter_ms must be from 0 to delay_ms={self.delay_ms:g}; got {self.jitter_ms:g}.")
        if not 0 <= self.loss < 1:
            raise ValueError(f"loss must be at least 0 and less than 1; got {self.loss:g}.")

    def __str__(self) -> str:
        delay = f" with {self.delay_ms:g} ms delay" if self.delay_ms else ""
        return f"{self.megabits:g} Mbit/s{delay}"

    @property
    def needs_wire(self) -> bool:
        """Whether a veth pair is not enough."""
        return self.delay_ms > 0 or self.loss > 0


@cache
def why_unavailable() -> str | None:
    """Return the reason why this machine cannot create a slow link, or None if it can. Tries to create one."""
    if not sys.platform.startswith("linux"):
        return f"a slow link needs network namespaces of Linux; this is {sys.platform}"
    if os.geteuid() != 0:
        return "a slow link needs root to create network namespaces; run it as root"
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            return f"a slow link needs `{tool}`; install iproute2"
    try:
        with slow_link(Quality(1000.0, delay_ms=1.0)):
            return None
    except (RuntimeError, OSError) as error:
        return f"a slow link could not be created: {error}"


@contextmanager
def slow_link(quality: Quality) -> Iterator[Link]:
    """Join two network namespaces by a link. On exit, remove both and kill all processes in them.

    Args:
        quality: Quality of the link.

    Yields:
        Link: Runs functions in the namespaces.

    Raises:
        RuntimeError: If the link cannot be created; see :func:`why_unavailable`.
    """
    _delete_left_behind()
    stem = f"{_PREFIX}{os.getpid()}-{next(_numbers)}"
    names = (f"{stem}-0", f"{stem}-1")
    with ExitStack() as stack:
        for name in names:
            stack.callback(_delete_namespace, name)  # registered before creation, in case of an interrupt
            _call("ip", "netns", "add", name)
        lost = stack.enter_context(_wire(names, quality)) if quality.needs_wire else _veth(names)
        for name, address in zip(names, ADDRESSES, strict=True):
            _configure(name, address, quality.megabits)
        yield Link(names, _lost=lost)


def _call(*command: str) -> str:
    """Run a tool and return its output. An error contains its standard error."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"`{' '.join(command)}` failed: {done.stderr.strip() or done.returncode}")
    return done.stdout


def _veth(names: Sequence[str]) -> Synchronized[int]:
    # Create both ends inside their namespaces, so the machine's own namespace never has them.
    pair = ("type", "veth", "peer", "name", INTERFACE, "netns", names[1])
    _call("ip", "-netns", names[0], "link", "add", "name", INTERFACE, *pair)
    return _fork.Value("L", 0)


@contextmanager
def _wire(names: Sequence[str], quality: Quality) -> Iterator[Synchronized[int]]:
    """Join the namespaces by a process that carries the packets; yield the count of lost packets."""
    lost, is_ready = _fork.Value("L", 0), _fork.Event()

    def run() -> None:
        _begin()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent removes the link
        ends = []
        for name in names:
            enter(name)
            ends.append(tun(INTERFACE))
        os.nice(-10)  # the ranks keep all cores busy, and a wire that waits for one would add to the delay
        is_ready.set()
        carry(ends, quality.delay_ms / 1000, quality.jitter_ms / 1000, quality.loss, lost)

    process = _fork.Process(target=run, daemon=True)
    with _started(process):
        deadline = time.monotonic() + START_S
        while not is_ready.wait(0.05):
            if process.exitcode is not None or time.monotonic() > deadline:
                needs = "it needs /dev/net/tun and the capability CAP_NET_ADMIN"
                raise RuntimeError(f"the process that carries packets did not start; {needs}.")
        yield lost


def _configure(name: str, address: str, megabits: float) -> None:
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


def _delete_namespace(name: str) -> None:
    """Kill all processes in a namespace, and delete it with its interfaces, if it exists."""
    if not (_FOLDER / name).exists():
        return
    while pids := _processes(name):
        for pid in pids:
            with suppress(ProcessLookupError):  # it has ended
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    _call("ip", "netns", "delete", name)


def _processes(name: str) -> list[int]:
    return [int(pid) for pid in _call("ip", "netns", "pids", name).split()]


def _delete_left_behind() -> None:
    """Delete the namespaces of processes that were killed before they could."""
    for path in _FOLDER.glob(f"{_PREFIX}*") if _FOLDER.exists() else ():
        if not Path("/proc", path.name.split("-")[1]).exists():
            with suppress(RuntimeError):  # another process deletes it at the same time
                _delete_namespace(path.name)


@dataclass
class Link:
    """Two network namespaces that reach only each other, over a slow link."""

    names: tuple[str, ...]
    addresses: tuple[str, ...] = ADDRESSES
    _lost: Synchronized[int] = field(default_factory=lambda: _fork.Value("L", 0))
    _runs: int = field(default=0, init=False)

    @property
    def lost_packets(self) -> int:
        """Number of packets that the wire has lost."""
        return self._lost.value

    @property
    def processes(self) -> list[int]:
        """Numbers of the processes in the namespaces."""
        return [pid for name in self.names for pid in _processes(name)]

    def variables(self, rank: int) -> dict[str, str]:
        """Return the environment of one rank a namespace, for torch, gloo and Lightning's cluster environment."""
        return {
            "MASTER_ADDR": self.addresses[0],
            "MASTER_PORT": str(29500 + self._runs),  # the last run's port may still be in TIME_WAIT
            "WORLD_SIZE": str(len(self.names)),
            "RANK": str(rank),
            "NODE_RANK": str(rank),
            "LOCAL_RANK": "0",  # its presence keeps Lightning from launching processes
            "GLOO_SOCKET_IFNAME": INTERFACE,
        }

    def call(self, work: Callable[[], Any], timeout_s: float) -> list[Any]:
        """Call a function in a forked process in each namespace at once, one rank each.

        Args:
            work: The function; the variable ``RANK`` identifies the rank.
            timeout_s: Seconds until all ranks are killed.

        Returns:
            list: What each rank returned.

        Raises:
            RuntimeError: If a rank fails. Contains the end of each rank's output.
            TimeoutError: If a rank takes too long. Contains the same.
        """
        self._runs += 1
        with ExitStack() as stack:
            ranks = [
                stack.enter_context(forked(name, work, self.variables(rank))) for rank, name in enumerate(self.names)
            ]
            in_time = wait(ranks, timeout_s)
            if not in_time:
                raise TimeoutError(f"a rank took more than {timeout_s:g} s{_complaints(ranks)}")
            if any(rank.code for rank in ranks):
                raise RuntimeError(f"a rank failed{_complaints(ranks)}")
            return [rank.result for rank in ranks]


def sent_bytes() -> int:
    """Return how many bytes the interface of the present namespace has sent."""
    lines = Path("/proc/thread-self/net/dev").read_text().splitlines()
    (counts,) = (line.partition(":")[2].split() for line in lines if line.strip().startswith(f"{INTERFACE}:"))
    return int(counts[8])  # after eight columns about received data


# Processes in a namespace.


@dataclass(frozen=True)
class Forked:
    """A function in a forked process in a network namespace."""

    process: Any
    _out: IO[bytes]
    _result: IO[bytes]

    @property
    def code(self) -> int | None:
        """The exit code, or None while it runs."""
        found: int | None = self.process.exitcode
        return found

    @property
    def output(self) -> str:
        """What the process and its children have printed."""
        return _read(self._out).decode(errors="replace")

    @property
    def result(self) -> Any:
        """What the function returned."""
        return pickle.loads(_read(self._result))


@contextmanager
def forked(namespace: str, work: Callable[[], Any], variables: Mapping[str, str]) -> Iterator[Forked]:
    """Run a function in a forked process in a namespace, which has imported all that this process has.

    Args:
        namespace: Name of the namespace.
        work: The function.
        variables: Environment variables in addition to those of this process.
    """
    # Files, not pipes: a full pipe would block the process, because nothing is read while it runs.
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as result:
        process = _fork.Process(target=_run, args=(namespace, work, variables, out, result))
        with _started(process):
            yield Forked(process, out, result)


@contextmanager
def _started(process: Any) -> Iterator[None]:
    """Start a process, and kill it on exit. A signal is held back until nothing can keep the process from being killed."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    try:
        process.start()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        yield
    finally:
        if process.pid is not None:
            process.kill()
            process.join()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _begin() -> None:
    """Begin a forked process, which ends with its parent."""
    end_with_parent()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)


def _run(
    namespace: str, work: Callable[[], Any], variables: Mapping[str, str], out: IO[bytes], result: IO[bytes]
) -> None:
    """Be the forked process, and leave without the exit handlers of the process that forked it."""
    code = 1
    try:
        _begin()
        for stream in (1, 2):
            os.dup2(out.fileno(), stream)
        sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1, closefd=False)
        enter(namespace)
        os.environ.update(variables)
        result.write(pickle.dumps(work()))
        result.flush()
        code = 0
    except BaseException:
        print(traceback.format_exc(), flush=True)
    finally:
        os._exit(code)


def wait(processes: Sequence[Forked], timeout_s: float, grace_s: float = GRACE_S) -> bool:
    """Wait until all have ended, or one has failed and the grace time of the others is over. Return False on timeout."""
    deadline, failed = time.monotonic() + timeout_s, False
    while any(process.code is None for process in processes):
        if not failed and any(process.code for process in processes):
            failed, deadline = True, time.monotonic() + grace_s
        if time.monotonic() > deadline:
            return failed
        time.sleep(0.02)
    return True


def _read(file: IO[bytes]) -> bytes:
    return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0)


def _complaints(ranks: Sequence[Forked]) -> str:
    states = ["was still running" if rank.code is None else f"ended with {rank.code}" for rank in ranks]
    messages = [
        f"\n--- rank {i} {state}:\n{rank.output[-TAIL:].strip()}"
        for i, (rank, state) in enumerate(zip(ranks, states, strict=True))
    ]
    return "".join(messages)
