"""From trajectories to batches, pure: groups are assembled, and decided on before a batch is built.

    trajectories --Assembler--> complete groups, by iteration --Batcher.take(k)--> Batch(samples to train on, one outcome per group)

Batch k is complete when every group that was issued for it is complete: exactly `groups_per_iteration` of them. The first trajectory of a
(group_id, index) counts; later ones, of any attempt, are counted and dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from learner.advantages import advantages
from learner.packing import TrainSample
from learner.settings import LearnerSettings
from learner.shaping import shaped_score
from protocol.errors import StalenessViolation
from protocol.messages import GroupOutcome, TerminalState, Trajectory, token_versions


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

    def __init__(self, train_size: int, eval_size: int) -> None:
        self._sizes = {"train": train_size, "eval": eval_size}
        self._open: dict[int, Group] = {}
        self._seen: set[int] = set()
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

    @property
    def open_groups(self) -> dict[int, int]:
        """group_id -> trajectories still missing."""
        return {g.group_id: g.size - len(g.members) for g in self._open.values()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What iteration k trains on, and how each of its groups ended."""

    iteration: int
    samples: tuple[TrainSample, ...]
    outcomes: tuple[GroupOutcome, ...]
    metrics: dict[str, float]


class Batcher:
    """Complete groups by iteration, and the decision about each."""

    def __init__(
        self,
        settings: LearnerSettings,
        *,
        groups_per_iteration: int,
        group_size: int,
        max_staleness: int,
        temperature: float,
        max_tokens: int,
    ) -> None:
        self._settings = settings
        self._groups_per_iteration = groups_per_iteration
        self._min_samples = settings.min_samples if settings.min_samples is not None else max(1, group_size - 1)
        self._max_staleness, self._temperature, self._max_tokens = max_staleness, temperature, max_tokens
        self._groups: dict[int, list[Group]] = {}

    def add(self, group: Group) -> None:
        """A complete training group."""
        self._groups.setdefault(group.trajectories[0].iteration, []).append(group)

    def complete(self, iteration: int) -> list[int]:
        """The groups of batch `iteration` that have come."""
        return [group.group_id for group in self._groups.get(iteration, ())]

    def missing(self, iteration: int) -> int:
        """Groups that batch `iteration` still waits for."""
        return self._groups_per_iteration - len(self._groups.get(iteration, ()))

    def take(self, iteration: int) -> Batch:
        """Build batch `iteration`, which must be complete. Groups stand in the order of their ids, whatever order they came in."""
        groups = sorted(self._groups.pop(iteration), key=lambda g: g.group_id)
        states = [self._decide(group, iteration) for group in groups]
        check_staleness([t for group in groups for t in group.trajectories], iteration, self._max_staleness)
        kept = [group for group, (state, _) in zip(groups, states, strict=True) if state == "trained"]
        trajectories = [t for group in kept for t in group.scored]
        samples = self._samples(trajectories, iteration)
        outcomes = tuple(outcome(group, iteration, state, reason) for group, (state, reason) in zip(groups, states, strict=True))
        return Batch(iteration=iteration, samples=tuple(samples), outcomes=outcomes, metrics=describe(groups, outcomes, iteration))

    def _decide(self, group: Group, iteration: int) -> tuple[TerminalState, str]:
        scored = group.scored
        if len(scored) < self._min_samples:
            return "failed", f"{len(scored)} of {group.size} samples have a score, at least {self._min_samples} are needed"
        if self._settings.zero_variance == "drop" and len({self._score(t) for t in scored}) == 1:
            return "filtered", "zero variance"
        if not any(self._mask(t).any() for t in scored):
            return "filtered", "every completion was cut off"
        return "trained", ""

    def _mask(self, trajectory: Trajectory) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        if self._settings.overlong == "mask" and trajectory.finish_reason != "stop":
            return np.zeros(len(trajectory.token_ids), np.bool_)
        return trajectory.loss_mask

    def _samples(self, trajectories: Sequence[Trajectory], iteration: int) -> list[TrainSample]:
        if not trajectories:
            return []
        scores = [self._score(t) for t in trajectories]
        values = advantages(self._settings.advantage, self._settings.advantage_options, scores, [t.group_id for t in trajectories])
        return [
            TrainSample(
                group_id=t.group_id,
                index=t.index,
                prompt_ids=t.prompt_ids,
                token_ids=t.token_ids,
                behaviour_logprobs=t.behaviour_logprobs,
                loss_mask=self._mask(t),
                advantage=float(value),
                temperature=self._temperature,
                positive=t.passed,
            )
            for t, value in zip(trajectories, values, strict=True)
        ]

    def _score(self, trajectory: Trajectory) -> float:
        """What advantages are made of: the score of a scored trajectory, weighted and shaped as the settings say."""
        if trajectory.score is None:
            raise ValueError(f"sample {trajectory.group_id}/{trajectory.index} has no score")
        return shaped_score(
            trajectory.score,
            trajectory.parts,
            len(trajectory.token_ids),
            max_tokens=self._max_tokens,
            weights=self._settings.reward_weights,
            penalty_tokens=self._settings.overlong_penalty_tokens,
        )


def outcome(group: Group, iteration: int, state: TerminalState, reason: str) -> GroupOutcome:
    """The terminal state of a group as it goes to the ledger and to the dispatcher."""
    members, scored = group.trajectories, group.scored
    first = members[0]
    return GroupOutcome(
        group_id=group.group_id,
        iteration=iteration,
        purpose=first.purpose,
        problem_id=first.problem_id,
        state=state,
        reason=reason,
        num_samples=len(scored),
        num_passed=sum(t.passed for t in scored),
        mean_score=float(np.mean([float(t.score) for t in scored if t.score is not None])) if scored else None,
        oldest_version=min((int(t.spans[0, 0]) for t in members if len(t.spans)), default=-1),
        newest_version=max((int(t.spans[-1, 0]) for t in members if len(t.spans)), default=-1),
    )


def check_staleness(trajectories: Sequence[Trajectory], iteration: int, max_staleness: int) -> None:
    """Raise StalenessViolation if any token lies outside [iteration - max_staleness, iteration]. Never true unless there is a bug."""
    for t in trajectories:
        if len(t.spans) and not iteration - max_staleness <= int(t.spans[0, 0]) <= int(t.spans[-1, 0]) <= iteration:
            raise StalenessViolation(
                f"sample {t.group_id}/{t.index} of iteration {iteration} has tokens of v{int(t.spans[0, 0])}..v{int(t.spans[-1, 0])}, "
                f"allowed are {iteration - max_staleness}..{iteration}"
            )


def describe(groups: Sequence[Group], outcomes: Sequence[GroupOutcome], iteration: int) -> dict[str, float]:
    """What the batch looks like, before training on it. Names are those of docs/metrics.md."""
    members = [t for group in groups for t in group.trajectories]
    scores = np.array([float(t.score) for t in members if t.score is not None])
    lengths = np.array([len(t.token_ids) for t in members])
    staleness = np.concatenate([iteration - token_versions(t.spans) for t in members]) if len(members) else np.zeros(0)
    states = [o.state for o in outcomes]
    reasons = {f"data/groups_{state}": float(states.count(state)) for state in ("trained", "filtered", "rejected", "dropped", "failed")}
    return {
        "reward/mean": float(scores.mean()) if len(scores) else float("nan"),
        "reward/std": float(scores.std()) if len(scores) else float("nan"),
        "reward/pass_rate": float(np.mean([t.passed for t in members])),
        "reward/samples_failed": float(len(members) - len(scores)),
        "data/completion_tokens_mean": float(lengths.mean()),
        "data/completion_tokens_max": float(lengths.max()),
        "data/truncated_share": float(np.mean([t.finish_reason == "length" for t in members])),
        "data/tokens": float(lengths.sum()),
        "staleness/mean": float(staleness.mean()) if len(staleness) else 0.0,
        "staleness/max": float(staleness.max()) if len(staleness) else 0.0,
        "staleness/mixed_share": float(np.mean([len(t.spans) > 1 for t in members])),
        "reward/scoring_s_mean": float(np.mean([t.scoring_s for t in members])),
        **reasons,
    }
