"""Pacing, pure: whether a group may be issued now, and until which iteration it may be trained, so that no token is ever too stale.

Groups stand in a line, in the order of their numbers. The learner trains iteration k at version k on the first `groups_per_iteration` of the
line (`learner/line.py` says exactly which), and publishes k + 1. A group that joins at place p while version v is the newest is trained by
iteration v + floor((p + reorder) / groups_per_iteration) at the latest. It may be issued if that is at most v + S, and no token of it is sampled
before the version S below that iteration is loaded. docs/staleness.md proves the bound.

The four schedules are this rule with other numbers: `synchronous` and `minibatch` have S = 0, `one_off` has 1, `bounded` any.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class PacingRule:
    """The numbers of the rule."""

    iterations: int
    groups_per_iteration: int
    max_staleness: int
    """S: iteration k trains on tokens of versions k - S .. k."""
    reorder: int = 0
    """How many later groups may overtake one that is waited for; it takes its room from the lead over the learner."""
    over_issue: int = 0
    """Groups issued beyond what the batches need."""

    def latest_iteration(self, version: int, place: int) -> int | None:
        """The last iteration that may train a group which joins the line at `place` (0 is the head) at `version`; None: it must wait."""
        if not 0 <= version < self.iterations or place >= self.room(version):
            return None
        return min(self.iterations - 1, version + (place + self.reorder) // self.groups_per_iteration, version + self.max_staleness)

    def room(self, version: int) -> int:
        """How long the line may be at `version`: what S + 1 batches take, or all that are left, and the over-issue."""
        lead = (self.max_staleness + 1) * self.groups_per_iteration - self.reorder
        left = (self.iterations - version) * self.groups_per_iteration
        if version + self.max_staleness >= self.iterations - 1:
            lead = left  # the last iterations take all that are left, so nothing can come too late
        return min(lead, left) + self.over_issue

    def min_version(self, iteration: int) -> int:
        """The oldest version that may sample a token of a group which iteration `iteration` may train."""
        return max(0, iteration - self.max_staleness)


@dataclass
class Pacer:
    """The rule, and what the dispatcher knows of the line. News may come late, twice and in any order: they can only make it shorter."""

    rule: PacingRule
    published: int = -1
    """Newest published version; -1 before the first."""
    issued: int = 0
    """Training groups issued so far."""
    taken: int = 0
    """Of these, in the batches before `published`."""
    given_up: int = 0
    """Of these, ended without a place in a batch."""

    def publish(self, version: int, groups_taken: int) -> None:
        """A version was published after `groups_taken` groups had left the line in batches; late news of older ones change nothing."""
        if version > self.published:
            self.published, self.taken = version, groups_taken
        elif version == self.published:
            self.taken = max(self.taken, groups_taken)

    def issue(self) -> None:
        """A group joined the line."""
        self.issued += 1

    def give_up(self) -> None:
        """A group left the line without a place in a batch: the others move up."""
        self.given_up += 1

    @property
    def waiting(self) -> int:
        """How many groups stand in the line, as far as is known here: never fewer than there are."""
        return self.issued - self.taken - self.given_up

    def next_iteration(self) -> int | None:
        """The latest iteration of the next group to issue; None while the bound, a full line or the end holds it back."""
        return self.rule.latest_iteration(self.published, self.waiting)

    @property
    def room(self) -> int:
        """How many groups may be issued now."""
        return max(0, self.rule.room(self.published) - self.waiting) if 0 <= self.published < self.rule.iterations else 0

    @property
    def all_issued(self) -> bool:
        """Whether nothing is left to issue unless a group is given up."""
        rule = self.rule
        left = (rule.iterations - self.published) * rule.groups_per_iteration
        return self.published >= rule.iterations or (self.published >= 0 and self.waiting >= left + rule.over_issue)
