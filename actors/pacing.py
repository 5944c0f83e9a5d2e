"""Pacing, pure: which group may be issued next, so that no token is ever staler than the bound.

The learner trains iteration k at version k and publishes k + 1. Groups for k may be issued once version k - S is published, and a generator
samples no token of them before it has loaded at least that version; so every token of iteration k is of a version in [k - S, k].
Proof of the upper end: version k + 1 is published only after iteration k was trained, when all its tokens exist.
"""

from __future__ import annotations

from dataclasses import dataclass, field


def may_issue(iteration: int, published_version: int, max_staleness: int) -> bool:
    """Whether a group may be sampled for `iteration`.

    The learner trains iteration k while at version k, so the answer bounds staleness by `max_staleness`.
    """
    return published_version >= iteration - max_staleness


@dataclass
class Pacer:
    """Counts what was issued for each iteration and says for which iteration the next group is."""

    iterations: int
    groups_per_iteration: int
    max_staleness: int
    published: int = -1
    """Newest published version; -1 before the first."""
    _issued: dict[int, int] = field(default_factory=dict)
    _first_open: int = 0

    def publish(self, version: int) -> None:
        """A version was published; late news of older ones change nothing."""
        self.published = max(self.published, version)

    def next_iteration(self) -> int | None:
        """The iteration of the next group to issue; None when pacing holds everything back or all is issued."""
        k = self._first_open
        started = self.published >= 0  # the bound alone would let the first S + 1 iterations begin without any version
        return k if started and k < self.iterations and may_issue(k, self.published, self.max_staleness) else None

    def min_version(self, iteration: int) -> int:
        """The oldest version that may sample a token of `iteration`."""
        return max(0, iteration - self.max_staleness)

    def issue(self, iteration: int) -> None:
        """One group of `iteration` was issued."""
        self._issued[iteration] = self._issued.get(iteration, 0) + 1
        while self._issued.get(self._first_open, 0) >= self.groups_per_iteration:
            self._first_open += 1

    @property
    def all_issued(self) -> bool:
        """Whether every group of every iteration has been issued."""
        return self._first_open >= self.iterations
