"""On a link of 1 Gbit/s: what crosses the wire, ranks that agree, and a harness that leaves nothing. Nothing about speed."""

import contextlib
import math
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import network
from benchmarks.network import Quality, sent_bytes, slow_link, why_unavailable
from benchmarks.slow_link import Perceptron, digest, measure, noise

WIDTHS = (4096, 512)  # 2.1 M weights, and few biases, which always go dense
FEWER = 300
FAST = Quality(1000.0)


@pytest.fixture
def root():
    if reason := why_unavailable():
        pytest.skip(reason)


def namespaces() -> list[str]:
    """Return the namespaces that this process has made and not deleted."""
    folder = Path("/run/netns")
    return sorted(path.name for path in folder.glob(f"slow-{os.getpid()}-*")) if folder.exists() else []


@pytest.mark.needs_root
@pytest.mark.usefixtures("root")
def test_dgc_sends_300_times_less_than_ddp_over_the_wire_and_ranks_agree():
    with slow_link(FAST) as link:
        assert namespaces() == sorted(link.names)
        # It raises unless the ranks end with equal weights.
        sparse = measure(link, "dgc", steps=2, settle=0, widths=WIDTHS)
    ddp = 4 * (WIDTHS[0] + 1) * WIDTHS[1] / 1e6  # of two ranks, each sends at least its gradients
    pairs_and_biases = 8 * math.ceil(1e-3 * WIDTHS[0] * WIDTHS[1]) + 4 * WIDTHS[1]
    assert pairs_and_biases / 1e6 <= sparse.megabytes < ddp / FEWER
    assert namespaces() == []


def test_ranks_that_do_not_agree_in_the_end_are_an_error():
    class Told:
        def call(self, work, timeout_s):
            assert work.args[1] == (8, 4)
            return [{"milliseconds": [1.0], "sent": [2], "weights": weights} for weights in self.weights]

    link = Told()
    link.weights = ["a", "a"]
    assert measure(link, "ddp", widths=(8, 4)).milliseconds == 1.0
    link.weights = ["a", "b"]
    with pytest.raises(RuntimeError, match="different weights"):
        measure(link, "ddp", widths=(8, 4))
    # Agreement says something: gradients differ, and one entry more or less shows.
    assert not torch.equal(noise(WIDTHS, 0)[0], noise(WIDTHS, 1)[0])
    module = Perceptron((8, 4))
    before = digest(module)
    module.layers[0].weight.data[0, 0] += 1e-6
    assert digest(module) != before


def _exchange_packets() -> tuple[float, int]:
    """Return when the last packet left and the bytes sent on rank 0, when the first came and the number of all on rank 1."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as mail:
        if os.environ["RANK"] == "0":
            time.sleep(0.2)  # until the other listens
            for _ in range(200):
                mail.sendto(bytes(500), (network.ADDRESSES[1], 9))
            left = time.monotonic()
            time.sleep(0.2)  # until all have left the queue
            return left, sent_bytes()
        mail.bind((network.ADDRESSES[1], 9))
        mail.settimeout(1.0)
        arrivals = []
        with contextlib.suppress(TimeoutError):
            while mail.recv(500):
                arrivals.append(time.monotonic())
        return arrivals[0], len(arrivals)


@pytest.mark.needs_root
@pytest.mark.usefixtures("root")
def test_a_wire_delays_and_loses_packets():
    with slow_link(Quality(1000.0, delay_ms=300.0, loss=0.25)) as link:
        (left, sent), (arrived, received) = link.call(_exchange_packets, 20.0)
        assert received + link.lost_packets == 200
    assert sent >= 200 * 500
    assert 20 < link.lost_packets < 80
    assert arrived - left > 0.25


def test_a_link_that_cannot_exist_is_refused():
    for wrong, words in (
        ({"megabits": 0}, "megabits must be positive"),
        ({"megabits": 1, "jitter_ms": 1}, "jitter_ms must be from 0 to delay_ms=0"),
        ({"megabits": 1, "loss": 1}, "loss must be at least 0 and less than 1"),
    ):
        with pytest.raises(ValueError, match=words):
            Quality(**wrong)


def _never_ends() -> None:
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    time.sleep(60)


def _runs(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and ") Z" not in stat.read_text()


@pytest.mark.needs_root
@pytest.mark.usefixtures("root")
def test_what_still_runs_ends_with_the_link():
    with slow_link(FAST) as link:
        with pytest.raises(TimeoutError, match="more than 0"):
            link.call(_never_ends, timeout_s=0.5)
        orphans = link.processes
        assert orphans
    assert namespaces() == []
    assert not [pid for pid in orphans if _runs(pid)]


@pytest.mark.needs_root
@pytest.mark.usefixtures("root")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_killed_benchmark_leaves_nothing_to_the_next(how):
    read, write = os.pipe()

    def hold() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with slow_link(Quality(1000.0, delay_ms=1.0)) as link:
            os.write(write, " ".join(link.names).encode())
            link.call(_never_ends, 60.0)

    process = multiprocessing.get_context("fork").Process(target=hold)
    process.start()
    names = os.read(read, 1000).decode().split()
    assert all(Path("/run/netns", name).exists() for name in names)
    os.kill(process.pid, how)
    process.join()
    with slow_link(FAST):
        assert not [name for name in names if Path("/run/netns", name).exists()]
