"""A wire between two TUN interfaces that delays packets and loses some of them.

Kernels often lack netem. A TUN interface passes its packets to a process instead, and this process carries them to the
other end: later, and not all of them. It takes about 2 % of a core at 20 Mbit/s.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import os
import random
import select
import signal
import struct
import time
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.sharedctypes import Synchronized
from typing import NoReturn

_TUNSETIFF, _TUN_WITHOUT_HEADER = 0x400454CA, 0x0001 | 0x1000
_LARGEST_PACKET = 65536
_SET_PARENT_DEATH_SIGNAL = 1


def enter(namespace: str) -> None:
    """Move this thread into a network namespace.

    Raises:
        OSError: If the namespace does not exist or this process is not root.
    """
    with open(f"/run/netns/{namespace}") as entry:
        if ctypes.CDLL(None, use_errno=True).setns(entry.fileno(), 0):
            raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {namespace}")


def end_with_parent() -> None:
    """Have the kernel kill this process when its parent ends, even if the parent is killed."""
    ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)


def tun(interface: str) -> int:
    """Create a TUN interface in the present namespace, and return its file. It vanishes with the file."""
    file = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.ioctl(file, _TUNSETIFF, struct.pack("16sH22x", interface.encode(), _TUN_WITHOUT_HEADER))
    except OSError:
        os.close(file)
        raise
    return file


def carry(ends: Sequence[int], delay_s: float, jitter_s: float, loss: float, lost: Synchronized[int]) -> NoReturn:
    """Carry packets between two ends until this process is killed. Packets of one direction keep their order.

    Args:
        ends: Files of the two interfaces.
        delay_s: Mean delay of a packet, in seconds.
        jitter_s: Largest deviation from this mean.
        loss: Share of packets to lose.
        lost: Counts the lost packets.
    """
    other = dict(zip(ends, reversed(ends), strict=True))
    latest = dict.fromkeys(ends, 0.0)  # arrival of the packet before
    under_way: list[tuple[float, int, int, bytes]] = []
    generator, number = random.Random(0), 0
    while True:
        wait = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
        for end in select.select(ends, [], [], wait)[0]:
            now = time.monotonic()
            while packet := _read(end):
                number += 1
                if generator.random() < loss:
                    lost.value += 1
                    continue
                late = delay_s + jitter_s * generator.uniform(-1.0, 1.0)
                latest[end] = max(latest[end], now + late)
                heapq.heappush(under_way, (latest[end], number, other[end], packet))
        while under_way and under_way[0][0] <= time.monotonic():
            _, _, end, packet = heapq.heappop(under_way)
            with suppress(OSError):  # the interface is down: the packet is lost
                os.write(end, packet)


def _read(end: int) -> bytes:
    try:
        return os.read(end, _LARGEST_PACKET)
    except BlockingIOError:  # no more packets for now
        return b""
