"""Who holds which sample, pure: what must be issued again when an actor has died, and nothing else.

A sample (group, index) that was issued is sampled or kept by the generator it was given to, until the learner has journaled it; copies of it
may be in reward actors. When actors die, `suspects` are the samples whose generator is dead and that are not known to be journaled. Then the
living are asked what they hold (`ask`, `answer`), and when all have answered, `settle` gives what nobody has. A sample is never issued again
because its holder is slow: the shorter second draw would win the race.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

Sample = tuple[int, int]
"""(group_id, index)"""
PENDING = "?"
"""In place of a generator: the sample waits to be issued again."""


@dataclass(slots=True)
class _Group:
    generators: dict[int, str]
    """Index -> identity of the generator that was given it last; "" when that is not known."""
    attempt: int = 0
    journaled: set[int] = field(default_factory=set)


class Custody:
    """Every sample of every group that was issued and has no terminal state."""

    def __init__(self) -> None:
        self._groups: dict[int, _Group] = {}
        self._dead: set[str] = set()
        self._early: dict[int, set[int]] = {}
        """Journaled samples of groups that are not known yet."""
        self.number = 0
        """Of the present inventory."""
        self._waiting: set[str] = set()
        self._held: set[Sample] = set()
        self._open = False
        self._unsettled = False

    # ------------------------------------------------------------------------------------------------ what happens to samples

    def issued(self, group_id: int, attempt: int, indices: Iterable[int], generator: str) -> None:
        """These members of a group were given to a generator, "" if nobody knows to whom."""
        group = self._groups.setdefault(group_id, _Group({}))
        group.attempt = max(group.attempt, attempt)
        group.generators |= dict.fromkeys(indices, generator)
        group.journaled |= self._early.pop(group_id, set())

    def journaled(self, keys: Iterable[tuple[int, ...]]) -> None:
        """The learner has these (group, index, ...) on record."""
        for group_id, index, *_ in keys:
            group = self._groups.get(group_id)
            if group is None:
                self._early.setdefault(group_id, set()).add(index)
            else:
                group.journaled.add(index)

    def claimed(self, generator: str, keys: Iterable[tuple[int, ...]]) -> None:
        """A generator says Hello and that it holds these: what the issue log could not tell a restarted dispatcher.

        What it was given and neither holds nor has delivered was on a connection that broke; whether a reward actor has it, an inventory tells.
        """
        held = {(group_id, index) for group_id, index, *_ in keys}
        for group_id, group in self._groups.items():
            for index, known in group.generators.items():
                if (group_id, index) in held:
                    group.generators[index] = generator
                elif known == generator and index not in group.journaled:
                    group.generators[index] = ""
                    self.doubt()

    def ended(self, group_id: int) -> None:
        """The group has its terminal state."""
        self._groups.pop(group_id, None)
        self._early.pop(group_id, None)

    def attempt(self, group_id: int) -> int:
        """The latest attempt of a group."""
        return self._groups[group_id].attempt

    # ------------------------------------------------------------------------------------------------ deaths

    def died(self, identity: str) -> None:
        """An actor is confirmed dead: nothing that only it held will ever come. An inventory that waits for it is void, for it may have held some."""
        self._dead.add(identity)
        self.doubt()

    def doubt(self) -> None:
        """Somebody may have died: the next inventory is due, and one that is going on is void."""
        self._open, self._unsettled = False, True

    @property
    def due(self) -> bool:
        """Whether the living must be asked what they hold."""
        return self._unsettled and not self._open and bool(self.suspects)

    @property
    def suspects(self) -> set[Sample]:
        """Samples whose generator is dead or unknown, and that are not journaled."""
        return {
            (group_id, index)
            for group_id, group in self._groups.items()
            for index, generator in group.generators.items()
            if index not in group.journaled and (generator in self._dead or not generator)
        }

    @property
    def asking(self) -> set[str]:
        """Who has yet to answer the present inventory."""
        return self._waiting if self._open else set()

    def ask(self, living: Iterable[str]) -> int:
        """Begin an inventory among the living; returns its number, for `answer`."""
        self.number += 1
        self._waiting, self._held, self._open = set(living), set(), True
        return self.number

    def answer(self, identity: str, number: int, keys: Iterable[tuple[int, ...]]) -> None:
        """One of them says what it holds. Answers to earlier inventories change nothing."""
        if self._open and number == self.number and identity in self._waiting:
            self._waiting.discard(identity)
            self._held |= {(group_id, index) for group_id, index, *_ in keys}

    def settle(self) -> dict[int, list[int]] | None:
        """Once all have answered: group_id -> indices that nobody has, to be issued again under `attempt(group_id)`. None before."""
        if not self._open or self._waiting:
            return None
        self._open = self._unsettled = False
        lost: dict[int, list[int]] = {}
        for group_id, index in sorted(self.suspects - self._held):
            lost.setdefault(group_id, []).append(index)
        for group_id, indices in lost.items():
            self.issued(group_id, self._groups[group_id].attempt + 1, indices, PENDING)
        return lost
