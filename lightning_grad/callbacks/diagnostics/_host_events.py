"""Host syncs and memory by callback, from the events that torch's own profiler records in a few batches.

The profiler observes operators from inside torch. A ``TorchDispatchMode`` would count them too, but
under a mode compiled functions run uncompiled, with other rounding.
"""

import ctypes
import math
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch.autograd import profiler

from lightning_grad.callbacks.diagnostics._owner_stack import REST, OwnerStack
from lightning_grad.core.syncs import SYNCING

_MARK = "TrainingDoctor: "
_MEMORY = "[memory]"
_COPY = "aten::_to_copy"
_WAITING = {f"aten::{name}" for name in SYNCING}
_READ = {_MEMORY, _COPY, *_WAITING}


class EventRecorder(OwnerStack):
    """Records the events of batches, and counts host syncs and allocated bytes by owner.

    Args:
        callbacks: Labels of the callbacks.
        device: Type of the module's device.

    Attributes:
        batches: Number of recorded batches.
        syncs: Number of calls in all of them that wait for a GPU, by owner.
        memory: Most bytes that the code of an owner allocated and held within one batch.
    """

    def __init__(self, callbacks: Collection[str], device: str) -> None:
        super().__init__(callbacks)
        self.batches = 0
        self.syncs: Counter[str] = Counter()
        self.memory: Counter[str] = Counter()
        self._device = device
        self._marks: list[Any] = []

    def record(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function and record what happens in it, unless another profiler is running."""
        if torch._C._autograd._profiler_enabled():
            return function(*args)
        recording: Any = profiler.profile(use_kineto=True, profile_memory=True)
        with _without_messages(), recording:
            self.begin()
            try:
                result = function(*args)
            finally:
                self.end()
        self._read(recording.kineto_results.events())
        return result

    def enter(self, owner: str) -> None:
        super().enter(owner)
        mark = torch._C._profiler._RecordFunctionFast(f"{_MARK}{owner}")
        mark.__enter__()
        self._marks.append(mark)

    def leave(self) -> None:
        super().leave()
        if self._marks:
            self._marks.pop().__exit__(None, None, None)

    def end(self) -> None:
        while self._marks:
            self.leave()
        super().end()

    def _read(self, events: Iterable[Any]) -> None:
        self.batches += 1
        held: Counter[str] = Counter()
        for owner, syncs, size in _by_owner(events, self._device):
            self.syncs[owner] += syncs
            held[owner] += size
            self.memory[owner] = max(self.memory[owner], held[owner])


def _by_owner(events: Iterable[Any], device: str) -> Iterator[tuple[str, int, int]]:
    """Yield (owner, number of syncs, bytes allocated) for each event that syncs or allocates, in order of time."""
    running: list[tuple[float, str]] = [(math.inf, REST)]  # end and owner, innermost last
    waiting_until = copying_until = 0
    read = [(event, name) for event in events if (name := event.name()) in _READ or name.startswith(_MARK)]
    for start, event, name in sorted(((event.start_ns(), event, name) for event, name in read), key=itemgetter(0)):
        while running[-1][0] <= start:
            running.pop()
        owner, end = running[-1][1], start + event.duration_ns()
        if name.startswith(_MARK):
            running.append((end, name.removeprefix(_MARK)))
        elif name in _WAITING and start >= waiting_until:  # nonzero may be a part of masked_select
            waiting_until = end
            yield owner, 1, 0
        elif name == _COPY:
            copying_until = end
        elif name == _MEMORY:
            place, size = event.device_type().name.lower(), event.nbytes()
            is_result_on_host = place == "cpu" != device and size > 0 and start < copying_until
            copying_until = 0 if is_result_on_host else copying_until
            yield owner, int(is_result_on_host), size if place == device else 0


@contextmanager
def _without_messages() -> Iterator[None]:
    """Mute what the profiler prints: that it starts and stops, and that memory from before its start is freed."""
    name = "KINETO_LOG_LEVEL"  # read when the profiler first starts in a process
    is_set, level = name in os.environ, _log_level()
    os.environ.setdefault(name, "99")
    before = level.value
    level.value = max(before, 2)  # errors only
    try:
        yield
    finally:
        level.value = before
        if not is_set:
            os.environ.pop(name, None)


def _log_level() -> ctypes.c_int:
    """Return the lowest level of messages that torch's C++ code prints, or an unused number if it is not found."""
    # torch has no Python function that changes this level.
    for library in (Path(torch.__file__).parent / "lib").glob("*c10.*"):
        with suppress(OSError, ValueError):
            return ctypes.c_int.in_dll(ctypes.CDLL(str(library)), "FLAGS_caffe2_log_level")
    return ctypes.c_int(0)
