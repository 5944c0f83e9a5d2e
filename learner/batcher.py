"""From trajectories to batches, pure: groups are assembled, and decided on before a batch is built.

    trajectories --Assembler--> complete groups --Batcher.add--> the line --Batcher.take--> Batch(samples to train on, one outcome per group)

Which groups of the line make a batch says `learner/line.py`; what becomes of each of them is decided here: trained, filtered, failed, rejected,
superseded, dropped, unfinished. The first trajectory of a (group_id, index) counts; later ones, of any attempt, are counted and dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from learner.advantages import advantages
from learner.line import BatchRule, Choice, Line
from learner.packing import TrainSample
from learner.seen import Seen
from learner.settings import LearnerSettings
from learner.shaping import shaped_score
from protocol.errors import StalenessViolation
from protocol.messages import NOT_FINITE, GroupOutcome, TerminalState, Trajectory, token_versions


@dataclass(slots=True)
class Group:
    """The trajectories of one prompt, by index."""

    group_id: int
    size: int
    members: dict[int, Trajectory] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        return len(self.members) == self.size

    @property
    def trajectories(self) -> list[Trajectory]:
        """By index."""
        return [self.members[i] for i in sorted(self.members)]

    @property
    def scored(self) -> list[Trajectory]:
        """Those whose score is known."""
        return [t for t in self.trajectories if t.score is not None]


class Assembler:
    """Open groups. `add` returns a group when its last trajectory has come."""

    def __init__(self, train_size: int, eval_size: int, seen: Iterable[int] = ()) -> None:
        """`seen`: groups of which nothing more is wanted, because they have their terminal state."""
        self._sizes = {"train": train_size, "eval": eval_size}
        self._open: dict[int, Group] = {}
        self._seen = Seen(seen)
        self.duplicates = 0

    def holds(self, trajectory: Trajectory) -> bool:
        """Whether this (group, index) was added before."""
        group = self._open.get(trajectory.group_id)
        return trajectory.group_id in self._seen or (group is not None and trajectory.index in group.members)

    def add(self, trajectory: Trajectory) -> Group | None:
        """Take one trajectory; a second one of the same place is counted and dropped."""
        if self.holds(trajectory):
            self.duplicates += 1
            return None
        group = self._open.setdefault(trajectory.group_id, Group(trajectory.group_id, self._sizes[trajectory.purpose]))
        group.members[trajectory.index] = trajectory
        if not group.complete:
            return None
        self._seen.add(group.group_id)
        return self._open.pop(group.group_id)

    def forget(self, group_id: int) -> Group | None:
        """The group has ended before it was complete: what it has so far, and nothing more is taken."""
        self._seen.add(group_id)
        return self._open.pop(group_id, None)

    @property
    def open_groups(self) -> dict[int, int]:
        """group_id -> trajectories still missing."""
        return {g.group_id: g.size - len(g.members) for g in self._open.values()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What one part of iteration k trains on, and how its groups ended. Only `minibatch` has iterations of several parts."""

    iteration: int
    samples: tuple[TrainSample, ...]
    outcomes: tuple[GroupOutcome, ...]
    """Of the groups that took a place in the batch."""
    metrics: dict[str, float]
    """Of the whole iteration, at its last part; empty before."""
    part: int = 0
    last: bool = True
    """Whether the iteration ends with it, so that a version is published."""
    given_up: tuple[GroupOutcome, ...] = ()
    """Groups that ended with this batch and without a place in it."""
    versions: tuple[tuple[int, int], ...] = ()
    """Oldest and newest version of the tokens that are trained on, by sample; (iteration, iteration) without any."""
    groups: tuple[Group, ...] = ()
    """All groups of the whole iteration, at its last part, for what is shown of them."""


AFTER_THE_END = "the run had its last batch"


class Batcher:
    """Complete groups in the order of the line, and the decision about each."""

    def __init__(self, settings: LearnerSettings, rule: BatchRule, group_size: int) -> None:
        self._settings = settings
        self.rule = rule
        self.line = Line(rule)
        self._min_samples = settings.min_samples if settings.min_samples is not None else max(1, group_size - 1)
        self._ready: dict[int, Group] = {}
        self._refilled = 0
        self._seen: list[Group] = []
        self._ended: list[GroupOutcome] = []
        self.groups_taken = 0
        """Training groups that had a place in a batch, over the whole run."""

    # ------------------------------------------------------------------------------------------------ groups

    def add(self, group: Group) -> list[GroupOutcome]:
        """A complete training group. Returns its outcome if it ends here, without a place in a batch."""
        self.hold(group)
        return self._settle([group.group_id])

    def hold(self, group: Group) -> None:
        """A complete training group, without a decision: while recorded batches are built again. `settle` decides later."""
        if group.group_id not in self.line:
            raise ValueError(f"group {group.group_id} is complete but has ended already")
        self._ready[group.group_id] = group

    def settle(self) -> list[GroupOutcome]:
        """Decide on every group that is held. Returns the outcomes of those that end here, without a place in a batch."""
        return self._settle(sorted(self._ready))

    @property
    def ready(self) -> list[int]:
        """Complete groups that have not ended, whether or not the next part may take them yet."""
        return sorted(self._ready)

    def missing(self, iteration: int) -> int:
        """Groups that the next part of the open iteration still waits for."""
        self._check_open(iteration)
        return self.line.lacks(self.line.choice(self._ready))

    def take(self, iteration: int, issued: Mapping[int, str] | None = None, assembler: Assembler | None = None) -> Batch:
        """Close the next part of the open iteration, for which nothing may be missing. Groups stand in the order of the line.

        `issued` are the problems of training groups that were given out, as far as they may be unfinished: of groups that no trajectory has
        come of nothing else is known. `assembler` holds those that are incomplete, and forgets those that are given up.
        """
        self._check_open(iteration)
        choice = self.line.choice(self._ready)
        if self.line.lacks(choice):
            raise ValueError(f"batch {iteration} lacks {self.line.lacks(choice)} groups")
        return self._close(choice, iteration, issued or {}, assembler)

    def retake(self, iteration: int, group_ids: Sequence[int]) -> Batch:
        """Build a recorded batch again from groups that are held; they leave the line as they did then."""
        self._check_open(iteration)
        return self._close(Choice(tuple(group_ids), ()), iteration, {}, None, decide=False)

    def _close(
        self, choice: Choice, iteration: int, issued: Mapping[int, str], assembler: Assembler | None, *, decide: bool = True
    ) -> Batch:
        last, part = self.line.last_part, self.line.part
        groups = [self._ready.pop(number) for number in choice.taken]
        batch = self.build(groups, iteration)
        self.line.close(choice)
        self.groups_taken += len(groups)
        self._seen += groups
        self._ended += batch.outcomes
        given_up: list[GroupOutcome] = []
        metrics: dict[str, float] = {}
        seen: tuple[Group, ...] = ()
        if last:
            if self.rule.stragglers == "drop":
                given_up += self._drop(choice, iteration, issued, assembler)
            metrics = describe(self._seen, self._ended, iteration, self.rule.max_staleness)
            metrics["data/zero_variance_share"] = self._zero_variance(self._seen)
            seen = tuple(self._seen)
            self._seen, self._ended, self._refilled = [], [], 0
            if decide:
                given_up += self._settle(sorted(self._ready))
        return replace(batch, part=part, last=last, given_up=tuple(given_up), metrics=metrics, groups=seen)

    def leave_over(self, issued: Mapping[int, str], assembler: Assembler) -> list[GroupOutcome]:
        """After the last batch: every group that was issued and has not ended is `unfinished`."""
        late = [number for number in issued if number in self.line]
        return [self._give_up(n, self.rule.iterations - 1, "unfinished", AFTER_THE_END, issued[n], assembler.forget(n)) for n in late]

    def _give_up(
        self, group_id: int, iteration: int, state: TerminalState, reason: str, problem_id: str, group: Group | None
    ) -> GroupOutcome:
        """End a group of the line without a place in a batch."""
        self.line.leave(group_id)
        self._ready.pop(group_id, None)
        ended = outcome(group or Group(group_id, 0), iteration, state, reason, problem_id=problem_id)
        self._ended.append(ended)
        return ended

    def restore(self, iteration: int, ended: Sequence[int], groups_taken: int) -> None:
        """Go on where another process stopped: `iteration` is open, `ended` are the training groups that left the line, in any order."""
        self.line = Line(self.rule)
        self.line.iteration = iteration
        for number in ended:
            self.line.leave(number)
        self.groups_taken = groups_taken

    def _drop(self, choice: Choice, iteration: int, issued: Mapping[int, str], assembler: Assembler | None) -> list[GroupOutcome]:
        """The stragglers of this batch end. The youngest of those that were passed by stay: they are the over-issue."""
        late = self.rule.late([number for number in choice.passed if number in issued])
        partial = {number: assembler.forget(number) if assembler else None for number in late}
        reason = f"not complete when batch {iteration} closed"
        return [self._give_up(number, iteration, "dropped", reason, issued[number], partial[number]) for number in late]

    def _settle(self, numbers: Sequence[int]) -> list[GroupOutcome]:
        """End those ready groups that shall not take a place in a batch."""
        given_up = []
        for number in numbers:
            group = self._ready[number]
            state: TerminalState
            if self.line.finished:
                state, reason = "unfinished", AFTER_THE_END
            else:
                state, reason = self._decide(group, self.line.iteration)
                if state in ("filtered", "failed") and self._refilled < self.rule.refills:
                    self._refilled += 1
                elif state not in ("rejected", "superseded"):
                    continue
            self._seen.append(group)
            iteration = min(self.line.iteration, self.rule.iterations - 1)
            given_up.append(self._give_up(number, iteration, state, reason, "", group))
        return given_up

    def _check_open(self, iteration: int) -> None:
        if iteration != self.line.iteration:
            raise ValueError(f"iteration {self.line.iteration} is open, not {iteration}")

    # ------------------------------------------------------------------------------------------------ decisions

    def build(self, groups: Sequence[Group], iteration: int) -> Batch:
        """The batch of these groups at this iteration: the same for the same groups, whenever it is built."""
        states = [self._decide(group, iteration) for group in groups]
        kept = [group for group, (state, _) in zip(groups, states, strict=True) if state == "trained"]
        trajectories = [t for group in kept for t in group.scored]
        samples = self._samples(trajectories, iteration)
        outcomes = tuple(outcome(group, iteration, *states[i], in_batch=True) for i, group in enumerate(groups))
        versions = tuple(_trained_versions(t, s.loss_mask, iteration) for t, s in zip(trajectories, samples, strict=True))
        return Batch(iteration=iteration, samples=tuple(samples), outcomes=outcomes, metrics={}, versions=versions)

    def _decide(self, group: Group, iteration: int) -> tuple[TerminalState, str]:
        scored = group.scored
        stale = self._check_versions(group, iteration)
        if stale is not None and self.rule.stragglers != "mask":
            state: TerminalState = "superseded" if self.rule.over_issue else "rejected"
            return state, f"has tokens of v{stale}, iteration {iteration} takes v{iteration - self.rule.max_staleness} and newer"
        if len(scored) < self._min_samples:
            return "failed", f"{len(scored)} of {group.size} samples have a score, at least {self._min_samples} are needed"
        if self._settings.zero_variance != "keep" and len({self._signal(t) for t in scored}) == 1:
            return "filtered", "zero variance"
        if not any(self._mask(t, iteration).any() for t in scored):
            if stale is not None and any(self._mask(t, None).any() for t in scored):
                return "rejected", f"no token of it is of v{iteration - self.rule.max_staleness} or newer"
            return "filtered", "every completion was cut off"
        return "trained", ""

    def _zero_variance(self, groups: Sequence[Group]) -> float:
        """The share of the groups with scores whose samples all have the same, whatever becomes of such groups."""
        distinct = [len({self._score(t) for t in group.scored}) for group in groups if group.scored]
        return sum(count == 1 for count in distinct) / len(distinct) if distinct else float("nan")

    def _check_versions(self, group: Group, iteration: int) -> int | None:
        """The oldest version of its tokens if that is too old. Raises StalenessViolation for what the rule makes impossible: a bug."""
        bound, stale = iteration - self.rule.max_staleness, None
        for t in group.trajectories:
            if not len(t.spans):
                continue
            oldest, newest = int(t.spans[0, 0]), int(t.spans[-1, 0])
            if newest > iteration or (oldest < bound and self.rule.stragglers == "wait" and not self.rule.over_issue):
                raise StalenessViolation(_violation(t.group_id, t.index, iteration, oldest, newest, self.rule.max_staleness))
            if oldest < bound:
                stale = oldest if stale is None else min(stale, oldest)
        return stale

    def _mask(self, trajectory: Trajectory, iteration: int | None) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        """The tokens that are trained on: not of a tool, of a completion that is not cut off, and not too old for `iteration`."""
        if self._settings.overlong == "mask" and trajectory.finish_reason != "stop":
            return np.zeros(len(trajectory.token_ids), np.bool_)
        mask = trajectory.loss_mask
        if iteration is None or not len(trajectory.spans) or int(trajectory.spans[0, 0]) >= iteration - self.rule.max_staleness:
            return mask
        return np.asarray(mask & (token_versions(trajectory.spans) >= iteration - self.rule.max_staleness))

    def _samples(self, trajectories: Sequence[Trajectory], iteration: int) -> list[TrainSample]:
        if not trajectories:
            return []
        scores = [self._score(t) for t in trajectories]
        values = advantages(
            self._settings.advantage,
            self._settings.advantage_options,
            scores,
            [t.group_id for t in trajectories],
            [t.passed for t in trajectories],
        )
        return [
            TrainSample(
                group_id=t.group_id,
                index=t.index,
                prompt_ids=t.prompt_ids,
                token_ids=t.token_ids,
                behaviour_logprobs=t.behaviour_logprobs,
                loss_mask=self._mask(t, iteration),
                advantage=float(value),
                temperature=t.temperature,
                positive=t.passed,
            )
            for t, value in zip(trajectories, values, strict=True)
        ]

    def _score(self, trajectory: Trajectory) -> float:
        """What advantages are made of: the score of a scored trajectory, weighted and shaped as the settings say."""
        return self._shaped(trajectory, self._settings.overlong_penalty_tokens)

    def _signal(self, trajectory: Trajectory) -> float:
        """What a group must not agree on. Without the penalty for length: lengths that differ say nothing about the problem.

        DAPO, eq. 11, filters by correctness; so does what reads nothing else, and a graded score is compared as it is.
        """
        return float(trajectory.passed) if self._settings.advantage == "pass_at_k" else self._shaped(trajectory, None)

    def _shaped(self, trajectory: Trajectory, penalty_tokens: int | None) -> float:
        if trajectory.score is None:
            raise ValueError(f"sample {trajectory.group_id}/{trajectory.index} has no score")
        return shaped_score(
            trajectory.score,
            trajectory.parts,
            len(trajectory.token_ids),
            max_tokens=trajectory.max_tokens,
            weights=self._settings.reward_weights,
            penalty_tokens=penalty_tokens,
        )


def _trained_versions(trajectory: Trajectory, mask: np.ndarray[tuple[int], np.dtype[np.bool_]], iteration: int) -> tuple[int, int]:
    spans = trajectory.spans
    if len(spans) and mask.all():  # as a rule: no need to look at single tokens
        return int(spans[0, 0]), int(spans[-1, 0])
    versions = token_versions(spans)[mask]
    return (int(versions.min()), int(versions.max())) if len(versions) else (iteration, iteration)


def _violation(group_id: int, index: int, iteration: int, oldest: int, newest: int, bound: int) -> str:
    return f"sample {group_id}/{index} of iteration {iteration} has tokens of v{oldest}..v{newest}, allowed are {iteration - bound}..{iteration}"


def check_staleness(batch: Batch, max_staleness: int) -> None:
    """Raise StalenessViolation if a token that is trained on lies outside [iteration - max_staleness, iteration]. Never, unless there is a bug."""
    for sample, (oldest, newest) in zip(batch.samples, batch.versions, strict=True):
        if not batch.iteration - max_staleness <= oldest <= newest <= batch.iteration:
            raise StalenessViolation(_violation(sample.group_id, sample.index, batch.iteration, oldest, newest, max_staleness))


def outcome(
    group: Group, iteration: int, state: TerminalState, reason: str, *, in_batch: bool = False, problem_id: str = ""
) -> GroupOutcome:
    """The terminal state of a group as it goes to the ledger and to the dispatcher."""
    members, scored = group.trajectories, group.scored
    return GroupOutcome(
        group_id=group.group_id,
        iteration=iteration,
        purpose=members[0].purpose if members else "train",
        problem_id=members[0].problem_id if members else problem_id,
        state=state,
        reason=reason,
        num_samples=len(scored),
        num_passed=sum(t.passed for t in scored),
        mean_score=float(np.mean([float(t.score) for t in scored if t.score is not None])) if scored else None,
        oldest_version=min((int(t.spans[0, 0]) for t in members if len(t.spans)), default=-1),
        newest_version=max((int(t.spans[-1, 0]) for t in members if len(t.spans)), default=-1),
        in_batch=in_batch,
        num_truncated=sum(t.finish_reason == "length" for t in scored),
    )


STATES: tuple[TerminalState, ...] = ("trained", "filtered", "rejected", "dropped", "superseded", "failed")


_ZERO = np.zeros(1, np.int64)


def describe(groups: Sequence[Group], outcomes: Sequence[GroupOutcome], iteration: int, max_staleness: int) -> dict[str, float]:
    """What an iteration looks like: its batches, and the groups that ended without a place in them. Names are those of docs/metrics.md."""
    members = [t for group in groups for t in group.trajectories]
    scores = np.array([float(t.score) for t in members if t.score is not None])
    lengths = np.array([len(t.token_ids) for t in members])
    spans = np.concatenate([t.spans for t in members]) if members else np.zeros((0, 3), np.int32)
    starts = np.concatenate([np.append(0, t.spans[:-1, 2]) if len(t.spans) > 1 else _ZERO[: len(t.spans)] for t in members] or [_ZERO[:0]])
    ages, counts = iteration - spans[:, 0], spans[:, 2] - starts  # of each span, and its tokens
    young = ages <= max_staleness
    states = [o.state for o in outcomes]
    reasons = {f"data/groups_{state}": float(states.count(state)) for state in STATES}
    latest = {group.group_id: group.trajectories[0].iteration for group in groups}
    placed = [latest[o.group_id] for o in outcomes if o.in_batch]
    return {
        "reward/mean": float(scores.mean()) if len(scores) else float("nan"),
        "reward/std": float(scores.std()) if len(scores) else float("nan"),
        "reward/pass_rate": float(np.mean([t.passed for t in members])),
        "reward/samples_failed": float(len(members) - len(scores)),
        "reward/samples_not_finite": float(sum(t.status == NOT_FINITE for t in members)),
        "data/completion_tokens_mean": float(lengths.mean()),
        "data/completion_tokens_max": float(lengths.max()),
        "data/truncated_share": float(np.mean([t.finish_reason == "length" for t in members])),
        "data/tokens": float(lengths.sum()),
        "staleness/mean": float((ages * counts)[young].sum() / max(1, counts[young].sum())),
        "staleness/max": float(ages[young].max()) if young.any() else 0.0,
        "staleness/mixed_share": float(np.mean([len(t.spans) > 1 for t in members])),
        "reward/scoring_s_mean": float(np.mean([t.scoring_s for t in members])),
        "staleness/too_old_share": float(counts[~young].sum() / max(1, counts.sum())),
        "data/groups_replaced": float(sum(o.state in ("filtered", "failed") and not o.in_batch for o in outcomes)),
        "data/groups_early": float(sum(last > iteration for last in placed)),
        "data/groups_late": float(sum(last < iteration for last in placed)),
        **reasons,
    }
