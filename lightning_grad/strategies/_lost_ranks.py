"""Names the ranks that were lost when a collective fails.

A backend reports at most which connection broke. So each rank that sees a failure reports to the store in which the
ranks met, and then reads who else has. A rank that does not report was killed, hangs, or cannot be reached.
"""

import time
from collections.abc import Callable
from threading import Thread

import torch.distributed as dist

_GRACE_SECONDS = 5.0  # time for the other ranks to see the failure, too
_KEY = "lightning_grad/failed"


def explain_loss() -> str:
    """Return what was lost, as a clause and an imperative. Takes a few seconds, and never raises."""
    unknown = "another rank has stopped or cannot be reached; see its log"
    if not dist.is_initialized():
        return unknown
    ranks = dist.get_world_size()
    lost = _within(2 * _GRACE_SECONDS, lambda: _lost(dist.get_rank(), ranks))
    if lost is None:
        return f"{unknown}. The store of the ranks does not answer either, so the machine at MASTER_ADDR may be lost"
    if not lost:
        return (
            f"the connection broke although all {ranks} ranks still run. If a step may take longer, pass a longer timeout "
            "to the strategy; otherwise check the network"
        )
    who = f"rank {lost[0]} has" if len(lost) == 1 else f"ranks {', '.join(map(str, lost))} have"
    return f"{who} stopped or cannot be reached; see {'its log' if len(lost) == 1 else 'their logs'}"


def _lost(rank: int, ranks: int) -> list[int]:
    """Report this rank, and return the ranks that do not report in time."""
    store = dist.distributed_c10d._get_default_store()
    store.set(f"{_KEY}/{rank}", "1")
    end = time.monotonic() + _GRACE_SECONDS
    while lost := [other for other in range(ranks) if not store.check([f"{_KEY}/{other}"])]:
        if time.monotonic() > end:
            break
        time.sleep(0.05)
    return lost


def _within(seconds: float, work: Callable[[], list[int]]) -> list[int] | None:
    """Call a function in a thread, because a store whose machine is lost may not answer. Return None if it fails."""
    found: list[list[int]] = []

    def run() -> None:
        try:
            found.append(work())
        except Exception:  # the store's errors differ between versions, and the rank ends with another error anyway
            return

    thread = Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else None
