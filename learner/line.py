"""Which groups make a batch, pure. Groups stand in a line by their numbers, which are the order in which they were issued.

    head -> [ 17 ready | 18 .... | 19 ready | 20 ready | 21 .... | 22 ready | ...        (.... is still being sampled or scored)

Batch k takes the first `groups_per_iteration` of the line that are ready, walking from the head. A group that is not ready (a straggler, or
one that is not even issued) may be passed by; how many, and what happens to them, are the parameters. The four schedules and three
straggler policies are this one rule with other numbers:

    wait            passes = 0              batch k is the head of the line, whole; with `reorder` = r at most r groups overtake a straggler
    over-issue o    passes = o              the surplus stays in line as long as it is inside the staleness bound
    drop, mask      passes = o + may_lag    a batch closes although so many of its groups are late
    minibatch       parts > 1               parts of iteration k are taken in the order in which groups become ready

docs/staleness.md derives what follows: staleness, reordering, and that no group waits for ever.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

StragglerPolicy = Literal["wait", "drop", "mask"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRule:
    """The numbers of the rule."""

    iterations: int
    groups_per_iteration: int
    max_staleness: int
    stragglers: StragglerPolicy = "wait"
    may_lag: int = 0
    """Groups of an iteration without which its batch may close (drop, mask)."""
    over_issue: int = 0
    """Groups issued beyond what the batches need."""
    reorder: int = 0
    """How many later groups may overtake one that is waited for."""
    parts: int = 1
    """Batches of one iteration, each an optimizer step; only the last is followed by a version (minibatch)."""
    refills: int = 0
    """Groups of one iteration that may be replaced because they were filtered or failed."""

    @property
    def passes(self) -> int:
        """Groups that are not ready which a batch may pass by."""
        return self.over_issue + self.may_lag

    def wanted(self, part: int) -> int:
        """Groups that a full part has, the same number for each up to one."""
        size, rest = divmod(self.groups_per_iteration, self.parts)
        return size + (part < rest)

    def needed(self, iteration: int) -> int:
        """Groups without which an iteration does not end.

        All, as long as the line is long enough to take them from behind the stragglers; else (no staleness, or the end of the run) all but those.
        """
        line = min(self.max_staleness + 1, self.iterations - iteration) * self.groups_per_iteration
        return min(self.groups_per_iteration, line - self.may_lag)

    def late(self, passed: Sequence[int]) -> Sequence[int]:
        """Under `drop`, of the groups that a batch passed by, in the line's order: those that end. The youngest stay, as many as are over-issued."""
        return passed[: max(0, len(passed) - self.over_issue)]


@dataclass(frozen=True, slots=True)
class Choice:
    """Groups that make a batch, and those before them that are not ready."""

    taken: tuple[int, ...]
    passed: tuple[int, ...]


def choose(line: Iterable[int], ready: Container[int], *, wanted: int, passes: int, reorder: int = 0) -> Choice:
    """Walk the line and take up to `wanted` ready groups.

    `passes` groups that are not ready may be passed by freely; the next one ends the walk `reorder` numbers further on.
    """
    taken: list[int] = []
    passed: list[int] = []
    last = None
    for group in line:
        if len(taken) == wanted or (last is not None and group > last):
            break
        if group in ready:
            taken.append(group)
        else:
            passed.append(group)
            if len(passed) == passes + 1:
                last = group + reorder
    if len(taken) == wanted:
        passed = [group for group in passed if taken and group < taken[-1]]
    return Choice(tuple(taken), tuple(passed))


class Line:
    """The groups that have not left. It has no end: numbers that were not issued yet stand in it as groups that are not ready."""

    def __init__(self, rule: BatchRule) -> None:
        self.rule = rule
        self.iteration = 0
        """The open iteration: the next part that is taken belongs to it."""
        self.part = 0
        self.taken = 0
        """Groups in the parts of the open iteration so far."""
        self._head = 0
        self._left: set[int] = set()

    def __iter__(self) -> Iterator[int]:
        group = self._head
        while True:
            if group not in self._left:
                yield group
            group += 1

    def __contains__(self, group: int) -> bool:
        return group >= self._head and group not in self._left

    def leave(self, group: int) -> None:
        """The group has its terminal state, or is in a batch."""
        if group not in self:
            raise ValueError(f"group {group} has left the line already")
        self._left.add(group)
        while self._head in self._left:
            self._left.remove(self._head)
            self._head += 1

    @property
    def last_part(self) -> bool:
        return self.part == self.rule.parts - 1

    @property
    def finished(self) -> bool:
        """Whether the last batch was taken."""
        return self.iteration >= self.rule.iterations

    def choice(self, ready: Container[int]) -> Choice:
        """What the next part would be if it closed now."""
        rule = self.rule
        missing = rule.groups_per_iteration - self.taken
        if self.last_part:
            return choose(self, ready, wanted=missing, passes=rule.passes, reorder=rule.reorder)
        own = list(islice(self, missing + rule.over_issue))
        return choose(own, ready, wanted=rule.wanted(self.part), passes=len(own))

    def may_close(self, ready: Collection[int]) -> bool:
        """False if the next part certainly cannot close yet; cheap, while `choice` walks the line."""
        rule = self.rule
        needed = rule.needed(self.iteration) - self.taken if self.last_part else rule.wanted(self.part)
        patient = self.last_part and not rule.passes and not rule.reorder
        return bool(ready) and len(ready) >= needed and (not patient or next(iter(self)) in ready)

    def lacks(self, choice: Choice) -> int:
        """Groups that the choice must still gain before the part may close."""
        rule = self.rule
        needed = rule.needed(self.iteration) - self.taken if self.last_part else rule.wanted(self.part)
        return max(0, needed - len(choice.taken))

    def close(self, choice: Choice) -> None:
        """Close the part: its groups leave, and the next part or iteration is open."""
        for group in choice.taken:
            self.leave(group)
        self.taken += len(choice.taken)
        self.part += 1
        if self.part == self.rule.parts:
            self.part, self.taken = 0, 0
            self.iteration += 1
