"""When one stage of a run ends and the next begins, pure: a function of the configuration and of how groups ended.

A stage begins at an iteration. Groups for iteration k + 1 + S may be issued as soon as k is trained (S is the staleness bound), so what is known
then can decide about that iteration at the earliest: a stage whose condition holds after k ends before k + 1 + S. So every group is issued in the
stage of the latest iteration that may train it, the same in a run that was interrupted and in one that was not.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from protocol.messages import GroupOutcome


@dataclass(frozen=True, slots=True, kw_only=True)
class StageRule:
    """One stage as the learner sees it. It ends at whichever of its ends comes first; the last one has none."""

    lr: float
    """Peak learning rate."""
    iteration: int | None = None
    """The next stage begins with this iteration."""
    reward: float | None = None
    """Ends once the mean score over the last `over` iterations is at least this."""
    truncated: float | None = None
    """Ends once at least this share of the completions of the last `over` iterations was cut off."""
    over: int = 10

    @property
    def conditional(self) -> bool:
        return self.reward is not None or self.truncated is not None


@dataclass(frozen=True, slots=True)
class _Numbers:
    scores: float
    samples: int
    truncated: int


class StageClock:
    """The stages of a run. `starts` are the first iterations of those that have begun or will as decided; the first begins with 0."""

    def __init__(self, rules: Sequence[StageRule], *, iterations: int, max_staleness: int) -> None:
        self._rules, self._iterations, self._max_staleness = list(rules), iterations, max_staleness
        self._numbers: dict[int, _Numbers] = {}
        """Of as many iterations as a condition may ask for."""
        self._kept = max(rule.over for rule in rules)
        self._closed = -1
        self.starts = [0]
        self._decide()

    def close(self, iteration: int, outcomes: Iterable[GroupOutcome]) -> None:
        """Iteration `iteration` was trained; `outcomes` are of the groups in its batches. Iterations close in their order."""
        if iteration != self._closed + 1:
            raise ValueError(f"iteration {iteration} closes after {self._closed}")
        scored = [o for o in outcomes if o.mean_score is not None and o.num_samples]
        samples = sum(o.num_samples for o in scored)
        scores = sum((o.mean_score or 0.0) * o.num_samples for o in scored)
        self._numbers[iteration] = _Numbers(scores, samples, sum(o.num_truncated for o in scored))
        self._numbers.pop(iteration - self._kept, None)
        self._closed = iteration
        self._decide()

    def stage_of(self, iteration: int) -> int:
        """The stage of an iteration."""
        return stage_of(self.starts, iteration)

    def lr(self, iteration: int) -> float:
        """The peak learning rate at an iteration."""
        return self._rules[self.stage_of(iteration)].lr

    def _decide(self) -> None:
        """Let stages begin that can be decided about now."""
        horizon = self._closed + 1 + self._max_staleness
        while len(self.starts) < len(self._rules):
            rule, start = self._rules[len(self.starts) - 1], self.starts[-1]
            if rule.iteration is not None and rule.iteration <= horizon:
                border = max(rule.iteration, start)
            elif self._condition(rule, start):
                border = max(horizon, start + 1)
            else:
                return
            if border >= self._iterations:
                return
            self.starts.append(border)

    def _condition(self, rule: StageRule, start: int) -> bool:
        last = [self._numbers[k] for k in range(max(start, self._closed - rule.over + 1), self._closed + 1)]
        samples = sum(n.samples for n in last)
        if not rule.conditional or len(last) < rule.over or not samples:
            return False
        reward, truncated = sum(n.scores for n in last) / samples, sum(n.truncated for n in last) / samples
        return (rule.reward is not None and reward >= rule.reward) or (rule.truncated is not None and truncated >= rule.truncated)


def stage_of(starts: Sequence[int], iteration: int) -> int:
    """The stage of an iteration, from the first iterations of the stages. Of stages that begin together only the last has any iteration."""
    return bisect_right(starts, iteration) - 1
