"""Host syncs and memory by callback, from the events that torch's own profiler records in a few batches.

The profiler observes operators from inside torch. A ``TorchDispatchMode`` would count them too, but
under a mode compiled functions run uncompiled, with other rounding.
"""

import ctypes
import os
from bisect import bisect
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
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
        if torch.autograd._profiler_enabled():
            return function(*args)
        recording = profiler.profile(use_kineto=True, profile_memory=True)
        with _without_messages():
            recording.__enter__()
            self.begin()
            try:
                return function(*args)
            finally:
                self.end()
                recording.__exit__(None, None, None)
                self._read(recording.kineto_results.events())

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
    timed = sorted(((event.start_ns(), event) for event in events), key=lambda pair: pair[0])
    owners = _Owners([event for _, event in timed if event.name().startswith(_MARK)])
    waiting_until = copying_until = 0
    for start, event in timed:
        name = event.name()
        if name in _WAITING and start >= waiting_until:  # nonzero may be a part of masked_select
            waiting_until = start + event.duration_ns()
            yield owners.at(start), 1, 0
        elif name == _COPY:
            copying_until = start + event.duration_ns()
        elif name == _MEMORY:
            kind = event.device_type().name.lower()
            is_result_on_host = kind == "cpu" != device and event.nbytes() > 0 and start < copying_until
            copying_until = 0 if is_result_on_host else copying_until
            yield owners.at(start), int(is_result_on_host), event.nbytes() if kind == device else 0


class _Owners:
    """Whose code ran at a time.

    Args:
        marks: Events of the marks, in order of time. Marks are nested.
    """

    def __init__(self, marks: list[Any]) -> None:
        self._times, self._owners = [0], [REST]
        open_marks: list[tuple[float, str]] = [(float("inf"), REST)]
        for mark in [*marks, None]:
            start = float("inf") if mark is None else mark.start_ns()
            while len(open_marks) > 1 and open_marks[-1][0] <= start:
                end, _ = open_marks.pop()
                self._note(end, open_marks[-1][1])
            if mark is not None:
                owner = mark.name().removeprefix(_MARK)
                self._note(start, owner)
                open_marks.append((start + mark.duration_ns(), owner))

    def _note(self, time: Any, owner: str) -> None:
        self._times.append(time)
        self._owners.append(owner)

    def at(self, time: int) -> str:
        """Return the owner at a time."""
        return self._owners[bisect(self._times, time) - 1]


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


def _log_level() -> "ctypes.c_int":
    """Return the lowest level of messages that torch's C++ code prints, or an unused number if it is not found."""
    # torch has no Python function that changes this level.
    for library in (Path(torch.__file__).parent / "lib").glob("*c10.*"):
        with suppress(OSError, ValueError):
            return ctypes.c_int.in_dll(ctypes.CDLL(str(library)), "FLAGS_caffe2_log_level")
    return ctypes.c_int(0)
