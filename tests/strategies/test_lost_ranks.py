"""What a rank says when a collective fails: which rank is lost, that none is, or that it cannot know."""

import re
import threading

import pytest
import torch.distributed as dist

from lightning_grad.strategies import _lost_ranks
from lightning_grad.strategies._lost_ranks import explain_loss

_AGAIN = re.escape(". Start the run again from its last checkpoint.")


class Unreachable:
    def set(self, key: str, value: str) -> None:
        raise RuntimeError("connection reset")


@pytest.fixture
def meet(monkeypatch):
    """Let this process be rank 0 of four, in a store to which others have reported."""

    def meet(store, reported=()):
        monkeypatch.setattr(_lost_ranks, "_GRACE_SECONDS", 0.1)
        for rank in reported:
            store.set(f"{_lost_ranks._KEY}/{rank}", "1")
        for name, value in (("is_initialized", True), ("get_world_size", 4), ("get_rank", 0)):
            monkeypatch.setattr(dist, name, lambda value=value: value)
        monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
        return explain_loss()

    return meet


def test_a_rank_that_does_not_report_is_lost(meet):
    assert re.fullmatch(f"rank 2 has stopped or cannot be reached; see its log{_AGAIN}", meet(dist.HashStore(), (1, 3)))


def test_of_several_silent_ranks_some_may_be_busy(meet):
    found = meet(dist.HashStore(), (1,))
    assert re.fullmatch(
        f"ranks 2, 3 do not answer: at least one has stopped .*may be busy; see their logs{_AGAIN}", found
    )


def test_if_all_ranks_report_the_network_failed(meet):
    assert "all 4 ranks still run. If a step may take longer, pass a longer timeout" in meet(
        dist.HashStore(), (1, 2, 3)
    )


def test_without_the_store_the_machine_that_holds_it_is_lost(meet):
    assert re.search(
        f"store does not answer either, so rank 0 or the machine at MASTER_ADDR.*{_AGAIN}", meet(Unreachable())
    )


def test_ranks_that_never_met_are_told_to_name_their_interface():
    assert "the ranks could not connect. On every machine, set GLOO_SOCKET_IFNAME" in explain_loss()


def test_a_signal_in_the_meantime_does_not_end_the_wait(meet, monkeypatch):
    """torchrun ends the other ranks of a machine; Lightning's handler then raises in whatever the main thread does."""
    raised = []

    class Interrupted(threading.Event):
        def wait(self, timeout=None):
            if not raised:
                raised.append(True)
                raise RuntimeError("of a signal handler")
            return super().wait(timeout)

    monkeypatch.setattr(_lost_ranks, "Event", Interrupted)
    assert meet(dist.HashStore(), (1, 2)).startswith("rank 3 has stopped")
    assert raised
