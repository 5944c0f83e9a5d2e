"""Who gets the next group, pure: the generator with the most free places among those that have its version, with a part kept for the others.

Generators load a new version within moments of each other, and it opens a whole iteration. If the first to be ready were given all that it has
places for, the last would have nothing to do until the iteration after: the batch would take as long as two thirds of the fleet need for it. So
groups are dealt as if every generator were ready; what falls to one that is still loading is kept for it, for twice the time that the slowest
load took so far, and then goes to the others.
"""

from __future__ import annotations

from collections.abc import Callable

FIRST_GRACE_S = 1.0
"""How long groups are kept for a loading generator before any load was seen."""


class Allotment:
    """Which version each generator has, and how long loads take. Times are seconds of any clock that does not go back."""

    def __init__(self) -> None:
        self._loaded: dict[str, int] = {}
        self._version = -1
        self._since_s = 0.0
        self._grace_s = FIRST_GRACE_S

    def published(self, version: int, now_s: float) -> None:
        """A version came out; late news of older ones change nothing."""
        if version > self._version:
            self._version, self._since_s = version, now_s

    def loaded(self, peer: str, version: int, now_s: float) -> None:
        """A generator has this version, or none (-1)."""
        if version == self._version > self._loaded.get(peer, version) >= 0:
            self._grace_s = max(self._grace_s, 2 * (now_s - self._since_s))
        self._loaded[peer] = version

    def drop(self, peer: str) -> None:
        """A generator is gone."""
        self._loaded.pop(peer, None)

    def deal(self, room: int, now_s: float) -> Deal:
        """Begin to deal out `room` groups."""
        return Deal(self._loaded, room if now_s - self._since_s <= self._grace_s else 0)


class Deal:
    """One round of dealing: `pick` names who gets the next group until nobody may have one."""

    def __init__(self, loaded: dict[str, int], room: int) -> None:
        self._loaded, self._room = loaded, room
        self._kept: dict[str, int] = {}
        self._keeps = room > 0

    def pick(self, credit: Callable[[str], int], min_version: int) -> str | None:
        """The generator for a group that needs `min_version`; `credit` says how many groups each would take now. None: nobody, for now."""
        able = [peer for peer, version in self._loaded.items() if version >= min_version and credit(peer) > 0]
        if not able:
            return None
        best = max(able, key=credit)
        if self._keeps:
            for peer, version in self._loaded.items():
                while self._room > 0 and 0 <= version < min_version and credit(peer) - self._kept.get(peer, 0) > credit(best):
                    self._kept[peer] = self._kept.get(peer, 0) + 1
                    self._room -= 1
            if self._room <= 0:
                return None
            self._room -= 1
        return best
