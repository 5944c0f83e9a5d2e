"""A wire between two network namespaces that this process carries: every frame arrives `delay_s` after it was sent, in either direction.

    host A: device "wire" --frame--> [ waits delay_s ] --frame--> host B: device "wire"        (and back)

    ip netns exec A python -P tests/system/wire.py B 0.02        # says "ready" once both devices are there; they go when it ends

The kernel here has no netem. Frames keep their order, and none is lost but what is sent to a device that is down.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import struct
import sys
import time
from collections import deque

SET_INTERFACE, TAP, BARE = 0x400454CA, 0x0002, 0x1000
NETWORK = 0x40000000
"""CLONE_NEWNET"""
MOST = 1 << 16


def device(name: str) -> int:
    """A tap device in the present namespace, without the kernel's own header before each frame."""
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(fd, SET_INTERFACE, struct.pack("16sH", name.encode(), TAP | BARE))
    return fd


def enter(namespace: str) -> None:
    """From now on this thread is in that network namespace."""
    libc, fd = ctypes.CDLL(None, use_errno=True), os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    if libc.setns(fd, NETWORK):
        raise OSError(ctypes.get_errno(), f"no way into namespace {namespace}")
    os.close(fd)


def carry(ends: tuple[int, int], delay_s: float) -> None:
    """Until standard input ends."""
    other, waiting = {ends[0]: ends[1], ends[1]: ends[0]}, deque[tuple[float, int, bytes]]()
    while True:
        timeout = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        ready, _, _ = select.select([*ends, 0], [], [], timeout)
        if 0 in ready and not os.read(0, 1):
            return
        for fd in ends:
            while fd in ready:
                try:
                    frame = os.read(fd, MOST)
                except OSError:  # no more, or the device is down
                    break
                waiting.append((time.monotonic() + delay_s, other[fd], frame))
        now = time.monotonic()
        while waiting and waiting[0][0] <= now:
            _, fd, frame = waiting.popleft()
            try:
                os.write(fd, frame)
            except OSError:  # the device is down
                pass


def main() -> None:
    ours = device("wire")
    enter(sys.argv[1])
    theirs = device("wire")
    print("ready", flush=True)
    carry((ours, theirs), float(sys.argv[2]))


if __name__ == "__main__":
    main()
