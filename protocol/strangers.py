"""Who was turned away at the handshake of a bound tcp socket: counted, and named by address in a line at most every ten seconds.

    zmq's monitor: "a handshake failed" (not whose) --+
    the kernel's table: connections that this end closed --+--> Strangers.lines --> log

By the time that zmq tells of it the connection is closed. But for a minute the kernel remembers the connections that this end closed first, and
that is what a refusal is: a peer that leaves, or dies, closes its own. It does not remember those that were reset, because more bytes had come
than were read: they are counted without an address.
"""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

EVERY_S = 10.0
"""Between two lines about one address."""
MANY = 1000
"""Addresses that are remembered; beyond it all are forgotten, so that nobody can make this grow."""
TABLES = (Path("/proc/self/net/tcp"), Path("/proc/self/net/tcp6"))
_CLOSED_HERE = {"04", "05", "06", "0B"}
"""FIN_WAIT1, FIN_WAIT2, TIME_WAIT, CLOSING in the kernel's tables."""
UNKNOWN = "an address that is gone already"


def closed_here(port: int, lines: Iterable[str]) -> set[tuple[str, int]]:
    """(address, port) of the peers whose connections to local `port` this end closed, from lines of the kernel's tables. Pure."""
    found, mark = set(), f":{port:04X} "
    for line in lines:
        if mark not in line:  # a flood leaves tens of thousands of lines
            continue
        fields = line.split()
        if len(fields) < 4 or fields[3] not in _CLOSED_HERE or int(fields[1].rpartition(":")[2], 16) != port:
            continue
        address, _, peer = fields[2].rpartition(":")
        words = b"".join(bytes.fromhex(address[i : i + 8])[::-1] for i in range(0, len(address), 8))  # 32-bit words, little-endian
        text = socket.inet_ntop(socket.AF_INET if len(words) == 4 else socket.AF_INET6, words).removeprefix("::ffff:")
        found.add((text, int(peer, 16)))
    return found


def read_tables() -> list[str]:
    """The kernel's lines about tcp connections; none where there is no such table."""
    return [line for table in TABLES if table.exists() for line in table.read_text().splitlines()[1:]]


class Patience:
    """How many messages a socket refuses before its reader turns to something else for a moment: `PER_S` in the long run. Pure.

    A reader that is away takes nothing in, so what a flood sends waits at the sender. Sockets take from their peers in turn: while one peer
    floods, each other one gets a message through for each that is refused.
    """

    PER_S = 250.0
    PAUSE_S = 0.02
    """Short enough that nobody who waits for an answer notices."""

    def __init__(self) -> None:
        self._left, self._at_s = self.PER_S * self.PAUSE_S, 0.0

    def refuse(self, now_s: float) -> float:
        """Count one refusal. Returns until when (on `now_s`'s clock) the socket shall not be read, 0.0 for no pause."""
        most = self.PER_S * self.PAUSE_S
        self._left = min(most, self._left + (now_s - self._at_s) * self.PER_S) - 1.0
        self._at_s = now_s
        return now_s + self.PAUSE_S if self._left <= 0.0 else 0.0


class Strangers:
    """Counts refused connections by address. Pure: the caller tells the time and what it saw."""

    def __init__(self) -> None:
        self.count = 0
        self._seen: set[tuple[str, int]] = set()
        self._waiting: Counter[str] = Counter()
        self._said_s: dict[str, float] = {}

    @property
    def unsaid(self) -> bool:
        """Whether a line is still to come."""
        return bool(self._waiting)

    def lines(self, failed: int, closed: set[tuple[str, int]], now_s: float) -> list[str]:
        """What there is to say. `failed`: handshakes since the last call; `closed`: what `closed_here` finds now."""
        new = closed - self._seen
        self._seen = closed
        self._waiting.update(address for address, _ in new)
        if failed > len(new):
            self._waiting[UNKNOWN] += failed - len(new)
        self.count += max(failed, len(new))
        if len(self._said_s) > MANY:
            self._said_s.clear()
        due = [address for address in self._waiting if now_s - self._said_s.get(address, float("-inf")) >= EVERY_S]
        said = []
        for address in due:
            self._said_s[address] = now_s
            said.append(f"{self._waiting.pop(address)} connections from {address} ({self.count} so far from everywhere)")
        return said
