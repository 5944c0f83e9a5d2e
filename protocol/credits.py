"""Credit accounting, pure: how many messages a producer may send to whom, and how many a consumer has granted."""

from __future__ import annotations


class Outgoing:
    """The producer's side: credits by peer, and which peer gets the next message."""

    def __init__(self) -> None:
        self._total: dict[str, int] = {}
        self._sent: dict[str, int] = {}

    def add_peer(self, peer: str) -> None:
        """A peer without credit so far; said Hello again, it starts from nothing."""
        self._total[peer] = self._sent[peer] = 0

    def drop_peer(self, peer: str) -> None:
        """The peer is gone."""
        self._total.pop(peer, None)
        self._sent.pop(peer, None)

    def granted(self, peer: str, total: int) -> None:
        """Take a Credit; late and repeated ones change nothing."""
        if peer in self._total:
            self._total[peer] = max(self._total[peer], total)

    def left(self, peer: str) -> int:
        """How many messages may still be sent to `peer`."""
        return self._total.get(peer, 0) - self._sent.get(peer, 0)

    def best(self) -> str | None:
        """The peer with the most credit left, None if nobody has any: the least busy consumer gets the next message."""
        peer = max(self._total, key=self.left, default=None)
        return peer if peer is not None and self.left(peer) > 0 else None

    def sent(self, peer: str) -> None:
        """One message went out."""
        self._sent[peer] += 1

    @property
    def peers(self) -> tuple[str, ...]:
        return tuple(self._total)


class Incoming:
    """The consumer's side: grants `window` messages in flight, shared evenly by the producers that are connected."""

    def __init__(self, window: int) -> None:
        self._window = window
        self._taken: dict[str, int] = {}
        self._granted: dict[str, int] = {}

    def add_peer(self, peer: str) -> None:
        """A producer said Hello."""
        self._taken[peer] = self._granted[peer] = 0

    def drop_peer(self, peer: str) -> None:
        """A producer is gone."""
        self._taken.pop(peer, None)
        self._granted.pop(peer, None)

    def done(self, peer: str) -> None:
        """One of the peer's messages has been worked off, so that its place is free again."""
        if peer in self._taken:
            self._taken[peer] += 1

    def grants(self) -> list[tuple[str, int]]:
        """New cumulative totals to send, [(peer, total)]; empty when nothing changed.

        A peer hears of free places when they are a quarter of its share, not of each one: three quarters stay under way meanwhile.
        """
        if not self._taken:
            return []
        share = max(1, self._window // len(self._taken))
        step = max(1, share // 4)
        news = [(peer, taken + share) for peer, taken in self._taken.items() if taken + share - self._granted[peer] >= step]
        self._granted.update(news)
        return news
