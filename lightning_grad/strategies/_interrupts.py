"""Ctrl-C that waits: an exchange is made on all ranks or on none, and its memory is changed wholly or not at all."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Let SIGINT wait for the end of a block, and then do what it would have done.

    Only in the main thread, the only one that Python interrupts.
    """
    if threading.current_thread() is not threading.main_thread() or not callable(signal.getsignal(signal.SIGINT)):
        yield
        return
    waiting: list[tuple[Any, ...]] = []
    handler: Any = signal.signal(signal.SIGINT, lambda *arguments: waiting.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if waiting:
            handler(*waiting[0])
