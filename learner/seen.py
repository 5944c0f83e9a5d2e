"""A set of group numbers that only grows and stays small, pure: groups end nearly in the order of their numbers, so blocks of it fill up.

A block that is full takes one entry however many numbers are in it: a run of a million groups keeps 245 of them, where a plain set would
take 90 MB.
"""

from __future__ import annotations

from collections.abc import Iterable

_BITS = 12
_FULL = (1 << (1 << _BITS)) - 1
"""4,096 numbers to a block."""


class Seen:
    """`number in seen`, `seen.add(number)`; numbers from 0."""

    def __init__(self, numbers: Iterable[int] = ()) -> None:
        self._blocks: dict[int, int] = {}
        """Block -> its numbers as bits; all full ones share one object."""
        for number in numbers:
            self.add(number)

    def __contains__(self, number: int) -> bool:
        return bool(self._blocks.get(number >> _BITS, 0) >> (number & (1 << _BITS) - 1) & 1)

    def add(self, number: int) -> None:
        """Take a number in. Raises ValueError for one below 0."""
        if number < 0:
            raise ValueError(f"{number}: expected 0 or more")
        bits = self._blocks.get(number >> _BITS, 0) | 1 << (number & (1 << _BITS) - 1)
        self._blocks[number >> _BITS] = _FULL if bits == _FULL else bits
