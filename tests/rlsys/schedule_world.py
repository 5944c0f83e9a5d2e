"""The pure cores of a run, driven by hand: the real dispatcher, assembler and batcher, and between them everything that can happen.

Generators load versions late, samples end in any order, rewards are slow, fail or come twice, generators die, news to the dispatcher are late.
What must never happen is asserted at every step by code of its own, which knows nothing of lines and places.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from actors.dispatcher import Dispatcher, DispatcherJob
from actors.pacing import PacingRule
from actors.settings import DataSettings, EvaluationSettings, SamplingSettings
from actors.stages import GIVEN_BACK, StagePlan
from learner.batcher import Assembler, Batch, Batcher, check_staleness
from learner.line import BatchRule
from learner.settings import LearnerSettings
from protocol.messages import GroupOutcome, GroupTask, Trajectory, token_versions
from tests.learner.trajectories import trajectory

GROUP_SIZE = 2
ROOM = 3
"""Groups that one generator works on at once."""


@dataclass
class Generator:
    """Loaded version, and the running samples: (group, index) -> version of every token."""

    loaded: int = -1
    running: dict[tuple[int, int], list[int]] = field(default_factory=dict)


class World:
    """One run. Events are methods; `enabled` names those that can happen now."""

    def __init__(self, directory: Path, batches: BatchRule, *, zero_variance: str = "drop", generators: int = 2) -> None:
        self.rule = batches
        pacing = PacingRule(
            iterations=batches.iterations, groups_per_iteration=batches.groups_per_iteration, max_staleness=batches.max_staleness,
            reorder=batches.reorder, over_issue=batches.over_issue,
        )  # fmt: skip
        self.pacing, self.max_requeues = pacing, 1
        stages = (StagePlan(name="0", train=directory / "train.jsonl", max_tokens=8, temperature=0.7),)
        job = DispatcherJob(
            seed=0, iterations=batches.iterations, pacing=pacing, max_requeues=self.max_requeues, stages=stages, model_dir=directory / "model",
            max_context=64, data=DataSettings(train=directory / "train.jsonl"), ledger=directory / "unused",
            sampling=SamplingSettings(groups_per_iteration=batches.groups_per_iteration, group_size=GROUP_SIZE, max_tokens=8),
            evaluation=EvaluationSettings(),
        )  # fmt: skip
        self.dispatcher = Dispatcher(job)
        settings = LearnerSettings(zero_variance=zero_variance, overlong="keep")  # type: ignore[arg-type]
        self.batcher, self.assembler = Batcher(settings, batches, GROUP_SIZE), Assembler(GROUP_SIZE, 1)
        self.generators = [Generator() for _ in range(generators)]
        self.tasks: dict[int, GroupTask] = {}
        self.lost: list[tuple[int, int]] = []
        self.scoring: list[Trajectory] = []
        self.scored: list[Trajectory] = []
        self.versions: deque[tuple[int, int]] = deque([(0, 0)])
        self.outcomes: deque[GroupOutcome] = deque()
        self.ledger: dict[int, GroupOutcome] = {}
        self.version = 0
        self.parts: list[Batch] = []
        self.trained_order: list[int] = []
        self.replaced: Counter[int] = Counter()

    # ------------------------------------------------------------------------------------------------ actors

    def issue(self, choose: Any) -> None:
        task = self.dispatcher.next_task()
        assert task is not None
        able = [g for g in self.generators if self._room(g) and g.loaded >= task.min_version]
        generator = choose(able)
        self.dispatcher.issue(task)
        assert task.group_id not in self.tasks, "a number is given once"
        self.tasks[task.group_id] = task
        for index in task.indices.tolist():
            generator.running[task.group_id, index] = []

    def issue_again(self, choose: Any) -> None:
        """A sample that died with its generator, on another."""
        key = choose([key for key in self.lost if any(g.loaded >= self.tasks[key[0]].min_version for g in self.generators)])
        generator = choose([g for g in self.generators if g.loaded >= self.tasks[key[0]].min_version])
        self.lost.remove(key)
        generator.running[key] = []

    def decode(self, choose: Any) -> None:
        generator = choose([g for g in self.generators if g.running])
        key = choose(sorted(generator.running))
        generator.running[key].append(generator.loaded)

    def finish(self, choose: Any) -> None:
        generator = choose([g for g in self.generators if any(g.running.values())])
        key = choose(sorted(key for key, tokens in generator.running.items() if tokens))
        tokens, task = generator.running.pop(key), self.tasks[key[0]]
        ends = np.cumsum([len(list(run)) for _, run in groupby(tokens)])
        spans = [[version, 0, int(end)] for (version, _), end in zip(groupby(tokens), ends, strict=True)]
        score = choose([0.0, 1.0, 0.0, 1.0, None])
        self.scoring.append(
            trajectory(*key, score, tokens=len(tokens), spans=spans, iteration=task.iteration, problem_id=task.problem_id)
        )  # fmt: skip

    def load(self, choose: Any) -> None:
        choose([g for g in self.generators if g.loaded < self.version]).loaded = self.version

    def die(self, choose: Any) -> None:
        """A generator dies and comes back, with nothing; what it had completed lives on in the reward actors."""
        generator = choose([g for g in self.generators if g.running])
        self.lost += sorted(generator.running)
        generator.running, generator.loaded = {}, -1

    # ------------------------------------------------------------------------------------------------ the learner

    def score(self, choose: Any) -> None:
        t = choose(self.scoring)
        self.scoring = [other for other in self.scoring if other is not t]
        self.scored.append(t)
        self._journal(t)

    def repeat(self, choose: Any) -> None:
        """A reward actor that lost its connection sends again."""
        self._journal(choose(self.scored))

    def _journal(self, t: Trajectory) -> None:
        known = self.assembler.holds(t)
        group = self.assembler.add(t)
        assert not known or group is None
        if group is not None:
            self._end(self.batcher.add(group))

    def take(self, _: Any) -> None:
        iteration = self.version
        issued = {g: task.problem_id for g, task in self.tasks.items() if g not in self.ledger}
        batch = self.batcher.take(iteration, issued, self.assembler)
        check_staleness(batch, self.rule.max_staleness)
        self._check_batch(batch)
        self._end(batch.given_up)
        self.parts.append(batch)

    def publish(self, _: Any) -> None:
        self.version += 1
        self.versions.append((self.version, self.batcher.groups_taken))
        for batch in self.parts:
            self._end(batch.outcomes)
            self.trained_order += [o.group_id for o in batch.outcomes]
        self.parts = []

    def leave_over(self, _: Any) -> None:
        issued = {g: task.problem_id for g, task in self.tasks.items() if g not in self.ledger}
        self._end(self.batcher.leave_over(issued, self.assembler))

    def _end(self, outcomes: Any) -> None:
        for outcome in outcomes:
            assert outcome.group_id in self.tasks, "only what was issued can end"
            assert outcome.group_id not in self.ledger, f"{outcome} after {self.ledger[outcome.group_id]}"
            assert outcome.problem_id == self.tasks[outcome.group_id].problem_id
            self.ledger[outcome.group_id] = outcome
            self.outcomes.append(outcome)
            if outcome.state in ("filtered", "failed") and not outcome.in_batch:
                self.replaced[outcome.iteration] += 1

    def _check_batch(self, batch: Batch) -> None:
        bound = self.rule.max_staleness
        journaled = {(t.group_id, t.index): t for t in reversed(self.scored)}
        for sample in batch.samples:
            versions = token_versions(journaled[sample.group_id, sample.index].spans)[sample.loss_mask]
            assert ((versions >= batch.iteration - bound) & (versions <= batch.iteration)).all(), "a token that is too stale is trained on"
            assert sample.loss_mask.all() or self.rule.stragglers == "mask"
        places = sum(len(part.outcomes) for part in self.parts) + len(batch.outcomes)
        assert places <= self.rule.groups_per_iteration
        dropped = [outcome.group_id for outcome in batch.given_up if outcome.state == "dropped"]
        assert len(dropped) <= self.rule.may_lag, f"{dropped} dropped, of which the over-issue stays: at most {self.rule.may_lag} are late"
        if batch.last:
            patient = self.rule.stragglers == "wait"
            assert places >= self.rule.groups_per_iteration - (0 if patient else self.rule.may_lag)
            assert self.replaced[batch.iteration] <= self.rule.refills

    # ------------------------------------------------------------------------------------------------ news to the dispatcher

    def hear_version(self, _: Any) -> None:
        self.dispatcher.on_version(*self.versions.popleft())

    def hear_outcome(self, _: Any) -> None:
        self.dispatcher.on_outcome(self.outcomes.popleft())

    # ------------------------------------------------------------------------------------------------ what can happen

    def _room(self, generator: Generator) -> bool:
        return len(generator.running) < ROOM * GROUP_SIZE

    def enabled(self) -> list[str]:
        """What can happen now, but for mishaps."""
        task = self.dispatcher.next_task()
        finished = self.version >= self.rule.iterations
        training = bool(self.parts) and self.parts[-1].last
        able = [
            ("issue", task is not None and any(self._room(g) and g.loaded >= task.min_version for g in self.generators)),
            ("issue_again", any(g.loaded >= self.tasks[key[0]].min_version for key in self.lost for g in self.generators)),
            ("decode", any(g.running for g in self.generators)),
            ("finish", any(any(g.running.values()) for g in self.generators)),
            ("load", any(g.loaded < self.version for g in self.generators)),
            ("score", bool(self.scoring)),
            ("take", not finished and not training and self.batcher.missing(self.version) == 0),
            ("publish", training),
            ("leave_over", finished and any(g not in self.ledger for g in self.tasks)),
            ("hear_version", bool(self.versions)),
            ("hear_outcome", bool(self.outcomes)),
        ]
        return [name for name, can in able if can]

    def mishaps(self) -> list[str]:
        """What can go wrong now."""
        return [name for name, can in (("die", any(g.running for g in self.generators)), ("repeat", bool(self.scored))) if can]

    def go_on(self, choose: Any, limit: int = 5_000) -> None:
        """Everything that can happen goes on happening, nothing for ever before anything else, until the run is done."""
        for _ in range(limit):
            if self.dispatcher.done and not self.outcomes:
                return
            able = self.enabled()
            assert able, f"the run stands still at version {self.version}: {self.dispatcher.waits_for()}"
            for name in able:
                if name in self.enabled():
                    getattr(self, name)(choose)
        raise AssertionError(f"the run does not end: version {self.version}, {self.dispatcher.waits_for()}")

    def check_end(self) -> None:
        """Everything that was issued has ended, once, and nobody was overtaken by more than the rule allows."""
        rule = self.rule
        assert self.version == rule.iterations
        assert sorted(self.ledger) == sorted(self.tasks) == list(range(len(self.tasks)))
        states = Counter(o.state for o in self.ledger.values())
        if rule.stragglers == "wait" and not rule.over_issue:
            assert not {"dropped", "rejected", "superseded", "unfinished"} & set(states), states
            replaced = sum(self.replaced.values())
            assert len(self.tasks) == rule.iterations * rule.groups_per_iteration + replaced
            for place, group in enumerate(self.trained_order):
                later = sum(other > group for other in self.trained_order[:place])
                bound = rule.reorder if rule.parts == 1 else rule.groups_per_iteration - 1
                assert later <= bound, f"{later} later groups overtook group {group}"
            if not replaced and rule.parts == 1 and not rule.reorder:
                assert self.trained_order == sorted(self.trained_order)
        if rule.stragglers != "drop":
            assert not states["dropped"]
        if rule.stragglers == "mask":
            assert not states["superseded"]
        given_back = Counter(o.problem_id for o in self.ledger.values() if o.state in GIVEN_BACK)
        requeued = Counter(task.problem_id for g, task in self.tasks.items() if self.requeues[g])
        assert all(requeued[problem] <= given_back[problem] for problem in requeued), "a prompt is issued again only when it was given back"

    @property
    def requeues(self) -> dict[int, int]:
        """How often the prompt of each group came back before it: counted from the order in which prompts were given out."""
        seen: Counter[str] = Counter()
        epochs = {}
        for group in sorted(self.tasks):
            epochs[group] = seen[self.tasks[group].problem_id]
            seen[self.tasks[group].problem_id] += 1
        return epochs
