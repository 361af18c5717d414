"""The peak memory of a fit in a process of its own, which is forked from the one that has loaded the project."""

import ctypes
import gc
import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection

import torch


def can_fork() -> bool:
    """Return True if the system can fork processes."""
    return "fork" in multiprocessing.get_all_start_methods()


def peak_of(work: Callable[[], bool]) -> int | None:
    """Return the peak memory of a forked process that does some work, in bytes; ``None`` if the work did not succeed.

    Args:
        work: Returns whether it succeeded.
    """
    gc.collect()
    _give_back_free_memory()
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(work, sender), daemon=True)
    process.start()
    sender.close()
    try:
        peak: int | None = receiver.recv()
    except EOFError:  # killed, perhaps for lack of memory
        peak = None
    process.join()
    return peak


def _measure(work: Callable[[], bool], sender: Connection) -> None:
    import resource  # Unix only, like the fork

    torch.set_num_threads(1)  # the threads of the parent do not exist here
    try:
        if work():
            unit = 1 if sys.platform == "darwin" else 1024
            sender.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
        else:
            sender.send(None)
    finally:
        os._exit(0)


def _give_back_free_memory() -> None:
    """Return freed memory to the system, because the forked process would use it without taking more."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
