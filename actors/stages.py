"""The prompts of a run, pure: which stage a group belongs to, which problems that stage has, and which of them comes next.

Everything here is a function of the configuration and the ledger (issue log, terminal states, what the filters of a stage left when it began), so a
restarted dispatcher finds its place again.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from actors.dataset import Order, Problem
from protocol.ledger import Issue, Stage
from protocol.messages import GroupOutcome, Int32Array

GIVEN_BACK = ("dropped", "rejected", "superseded")
"""States of a group whose prompt is queued again: it was given up for its length or age, which says nothing against the prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageFilters:
    """Which problems stay in a stage. One that was never sampled always does."""

    drop_solved: bool = False
    """Leave out problems that every scored sample of the stage before solved."""
    solved_at_most: tuple[int, int] | None = None
    """(m, n): keep problems that at most m of the newest n samples solved, over all earlier stages; of fewer samples the same share."""

    def __bool__(self) -> bool:
        return self.drop_solved or self.solved_at_most is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan:
    """One stage as the dispatcher sees it."""

    name: str
    train: Path
    max_tokens: int
    temperature: float
    filters: StageFilters = field(default_factory=StageFilters)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A problem with its prompt ids."""

    problem: Problem
    prompt_ids: Int32Array


@dataclass(frozen=True, slots=True)
class Drawn:
    """The prompt of a group, the stage it was drawn for, and how many groups of it were given up before this one."""

    prepared: Prepared
    stage: int = 0
    requeues: int = 0


@dataclass(frozen=True, slots=True)
class Result:
    """How one group ended: its stage, its iteration, and how many of its samples solved the problem."""

    stage: int
    iteration: int
    num_samples: int
    num_passed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Entered:
    """A stage began: from which iteration on, and how many problems its filters left of how many."""

    stage: int
    name: str
    iteration: int
    problems: int
    of: int
    kept: tuple[str, ...] | None
    """Their ids; None without filters."""


class Prompts:
    """Which prompt the next group has."""

    def __init__(
        self, stages: Sequence[StagePlan], prompts: Sequence[Sequence[Prepared]], *, seed: int, shuffle: bool, max_requeues: int
    ) -> None:
        self._stages, self._all, self._max_requeues = list(stages), [list(of_stage) for of_stage in prompts], max_requeues
        self._seed, self._shuffle = seed, shuffle
        self.starts = [0]
        """First iterations of the stages that have begun or are decided; the learner says so with each version."""
        self._entered: dict[int, list[Prepared]] = {}
        self._orders: dict[int, Order] = {}
        self._fresh: Counter[int] = Counter()
        self._returned: deque[Drawn] = deque()
        self._drawn: dict[int, Drawn] = {}
        self._filtered = any(plan.filters for plan in stages)
        self._results: dict[str, dict[int, Result]] = {}
        """Of every group that ended, where filters of a stage may ask for them; a run without filters keeps none, however long it is."""
        self._in_batch: Counter[int] = Counter()
        self._again: list[Drawn] = []
        self._restoring = False
        self.entered: deque[Entered] = deque()
        """Stages that began and were not told of yet."""

    def stage_of(self, iteration: int) -> int:
        """The stage of a group that `iteration` may train."""
        return bisect_right(self.starts, iteration) - 1

    def knows_all(self, iteration: int, version: int, taken: int) -> bool:
        """Whether the prompts for `iteration` are decided: a stage with filters begins once every group of the batches before `version` is known.

        `taken` is how many that are.
        """
        stage = self.stage_of(iteration)
        if stage in self._entered or not self._stages[stage].filters:
            return True
        return sum(count for k, count in self._in_batch.items() if k < version) >= taken

    def next(self, iteration: int, max_staleness: int) -> Drawn:
        """The prompt of the next group, which `iteration` may train; `take` takes it. Prompts that were given back come first."""
        stage = self.stage_of(iteration)
        if stage not in self._entered:
            self._enter(stage, max_staleness)
        if self._returned:
            return self._returned[0]
        return Drawn(self._entered[stage][self._orders[stage][self._fresh[stage]]], stage)

    def take(self, group_id: int, drawn: Drawn) -> None:
        """`drawn`, which came from `next`, is now that of a group."""
        if self._returned:
            self._returned.popleft()
        else:
            self._fresh[drawn.stage] += 1
        self._drawn[group_id] = drawn

    def of(self, group_id: int) -> Drawn | None:
        """The prompt of a group that has not ended."""
        return self._drawn.get(group_id)

    def end(self, outcome: GroupOutcome) -> None:
        """A training group ended."""
        drawn = self._drawn.pop(outcome.group_id)
        if self._filtered:
            result = Result(drawn.stage, outcome.iteration, outcome.num_samples, outcome.num_passed)
            self._results.setdefault(outcome.problem_id, {})[outcome.group_id] = result
            self._in_batch[outcome.iteration] += outcome.in_batch
        if outcome.state in GIVEN_BACK and drawn.requeues < self._max_requeues:
            self._give_back(Drawn(drawn.prepared, drawn.stage, drawn.requeues + 1))

    def restore(self, issues: Iterable[Issue], stages: Iterable[Stage]) -> None:
        """Be where an earlier dispatcher was: first attempts of training groups, and the stages that began.

        Then every group that is known to have ended is told to `end`, and `settle` finds what is left of those that were given back.
        """
        began = {stage.stage: stage for stage in stages}
        self.starts = [began[number].iteration for number in sorted(began)] or [0]
        places = [{p.problem.problem_id: p for p in of_stage} for of_stage in self._all]
        for issue in issues:
            drawn = Drawn(places[issue.stage][issue.problem_id], issue.stage, issue.requeues)
            self._drawn[issue.group_id] = drawn
            if issue.requeues:
                self._again.append(drawn)
            else:
                self._fresh[issue.stage] += 1
        self._restoring = True
        for number, stage in sorted(began.items()):
            left = None if stage.kept is None else set(stage.kept)
            self._open(number, [p for p in self._all[number] if left is None or p.problem.problem_id in left])

    def settle(self) -> None:
        """After `restore` and the groups that ended: of the prompts that were given back, those that were not issued again."""
        self._restoring = False
        waiting, self._returned = list(self._returned), deque()
        reached = max(self._entered, default=-1)
        for drawn in sorted(
            self._again, key=lambda d: d.stage
        ):  # each was one of those that wait, and of those the one that had to leave first
            same = [w for w in waiting if _same(w, drawn) and w.stage <= drawn.stage < self._leaves(w)]
            if same:
                waiting.remove(min(same, key=self._leaves))
        for drawn in waiting:
            if self._leaves(drawn) > reached:
                self._give_back(drawn)

    def _leaves(self, drawn: Drawn) -> int:
        """The first stage that a prompt which was given back does not live to see."""
        for stage in sorted(self._entered):
            if stage > drawn.stage and self._find(stage, drawn) is None:
                return stage
        return len(self._stages)

    def _find(self, stage: int, drawn: Drawn) -> Prepared | None:
        return next((p for p in self._entered[stage] if p.problem.problem_id == drawn.prepared.problem.problem_id), None)

    def _give_back(self, drawn: Drawn) -> None:
        if self._restoring:
            self._returned.append(drawn)
            return
        newest = max(self._entered, default=0)
        if drawn.stage < newest:  # in another stage it counts only if that has the problem as well
            same = self._find(newest, drawn)
            if same is None:
                return
            drawn = Drawn(same, newest, drawn.requeues)
        self._returned.append(drawn)

    def _enter(self, stage: int, max_staleness: int) -> None:
        plan, prompts = self._stages[stage], self._all[stage]
        known = self.starts[stage] - max_staleness
        kept = [p for p in prompts if keeps(plan.filters, self._before(p.problem.problem_id, known), stage)] if plan.filters else prompts
        left = tuple(p.problem.problem_id for p in kept) if plan.filters else None
        entered = Entered(stage=stage, name=plan.name, iteration=self.starts[stage], problems=len(kept), of=len(prompts), kept=left)
        self.entered.append(entered)
        self._open(stage, kept)
        returned, self._returned = self._returned, deque()
        for drawn in returned:
            self._give_back(drawn)

    def _open(self, stage: int, kept: list[Prepared]) -> None:
        self._entered[stage] = kept or self._all[stage]  # filters that leave nothing leave everything; the dispatcher says so
        seed = self._seed if stage == 0 else self._seed + (stage << 32)
        self._orders[stage] = Order(len(self._entered[stage]), seed, self._shuffle)

    def _before(self, problem_id: str, iteration: int) -> list[Result]:
        """Results of a problem that are certain when the first group for `iteration` + S may be issued, in the order of the groups."""
        found = self._results.get(problem_id, {})
        return [found[group] for group in sorted(found) if found[group].iteration < iteration]


def _same(a: Drawn, b: Drawn) -> bool:
    return a.prepared.problem.problem_id == b.prepared.problem.problem_id and a.requeues == b.requeues


def keeps(filters: StageFilters, results: Sequence[Result], stage: int) -> bool:
    """Whether a problem with these results, oldest first, stays in `stage`."""
    if filters.drop_solved:
        last = [r for r in results if r.stage == stage - 1]
        samples = sum(r.num_samples for r in last)
        if samples and sum(r.num_passed for r in last) == samples:
            return False
    if filters.solved_at_most is not None:
        most, of = filters.solved_at_most
        samples = passed = 0
        for result in reversed(results):
            if samples >= of:
                break
            samples += result.num_samples
            passed += result.num_passed
        if samples and passed * of > most * samples:
            return False
    return True
