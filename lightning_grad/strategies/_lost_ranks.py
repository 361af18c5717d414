"""Names the ranks that were lost when a collective fails.

A backend reports at most which connection broke. So each rank that sees a failure closes its connections, which lets the
others see it too, reports to the store in which the ranks met, and reads who else has. A rank that does not report was
killed, hangs, or cannot be reached.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from threading import Event, Thread

import torch
import torch.distributed as dist

_GRACE_SECONDS = 5.0  # time for the other ranks to see the failure, too
_KEY, _TAG = "lightning_grad/failed", 0x6C67


def explain_loss() -> str:
    """Return what was lost and what to do, to follow the word "because". Takes a few seconds, and never raises."""
    if not dist.is_initialized():
        return (
            "the ranks could not connect. On every machine, set GLOO_SOCKET_IFNAME (with GPUs NCCL_SOCKET_IFNAME) to the "
            "interface that leads to the others, and open the firewall between them."
        )
    return f"{_loss()}. Start the run again from its last checkpoint."


def _loss() -> str:
    ranks = dist.get_world_size()
    lost = _within(2 * _GRACE_SECONDS, lambda: _lost(dist.get_rank(), ranks))
    if lost is None:
        return (
            "another rank has stopped or cannot be reached; see its log. The ranks' store does not answer either, so rank 0 "
            "or the machine at MASTER_ADDR may be lost"
        )
    if not lost:
        return (
            f"a connection broke although all {ranks} ranks still run. If a step may take longer, pass a longer timeout to "
            "the strategy; otherwise check the network"
        )
    if len(lost) == 1:
        return f"rank {lost[0]} has stopped or cannot be reached; see its log"
    return (
        f"ranks {', '.join(map(str, lost))} do not answer: at least one has stopped or cannot be reached, and the others "
        "may be busy; see their logs"
    )


def _lost(rank: int, ranks: int) -> list[int]:
    """Report this rank, and return the ranks that do not report in time."""
    _close_connections()
    store = dist.distributed_c10d._get_default_store()
    store.set(f"{_KEY}/{rank}", "1")

    def silent() -> list[int]:
        return [other for other in range(ranks) if not store.check([f"{_KEY}/{other}"])]

    lost, end = silent(), time.monotonic() + _GRACE_SECONDS
    with suppress(Exception):  # rank 0, which holds the store, has waited long enough and ends: keep what is known
        while lost and time.monotonic() < end:
            time.sleep(0.05)
            lost = silent()
    return lost


def _close_connections() -> None:
    """Let ranks that wait for this one fail now, not when this process ends: gloo closes its connections on a timeout."""
    with suppress(Exception):  # of the timeout, or because another backend cannot do this
        group = dist.distributed_c10d._get_default_group()
        group.recv_anysource([torch.empty(1)], _TAG).wait(timedelta(milliseconds=1))


def _within(seconds: float, work: Callable[[], list[int]]) -> list[int] | None:
    """Call a function in a thread, because a store whose machine is lost may not answer. Return None if it fails."""
    found: list[list[int]] = []
    is_done = Event()

    def run() -> None:
        with suppress(Exception):  # errors of the store differ between versions, and the rank ends with its own anyway
            found.append(work())
        is_done.set()

    Thread(target=run, daemon=True).start()
    end = time.monotonic() + seconds
    while not is_done.is_set() and time.monotonic() < end:
        # torchrun may end this rank now, and Lightning's handler of SIGTERM fails on the closed connections.
        with suppress(Exception):
            is_done.wait(end - time.monotonic())
    return found[0] if found else None
