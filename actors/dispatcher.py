"""The dispatcher: turns the dataset into group tasks, as fast as generators ask and no faster than the staleness bound allows.

    dataset --> [ dispatcher ] --GroupTask--> generators        (a task goes only to a generator that has loaded its min_version)
                    ^  ^  ^-----Credit, loaded version---/
                    |  +-------WeightsReady----- learner        (opens the next iteration)
                    +----------GroupOutcome----- learner        (terminal states; the end of the run is when all have one)
    generators, reward actors --Holdings--> [ dispatcher ] <--Journaled-- learner      (when an actor died: what must be issued again)

It waits for: credits (generators), versions (learner), outcomes (learner), inventories (actors). It wakes: generators.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from actors.allotment import Allotment
from actors.custody import Custody
from actors.dataset import Problem, read_problems
from actors.pacing import Pacer, PacingRule
from actors.settings import DataSettings, EvaluationSettings, SamplingSettings
from actors.stages import Drawn, Prepared, Prompts, StagePlan
from actors.text import Text, stop_token_ids
from protocol.channels import Link
from protocol.credits import Outgoing
from protocol.errors import DataError
from protocol.ledger import Issue, Ledger, Stage, Writer
from protocol.messages import (
    Credit,
    GroupOutcome,
    GroupTask,
    Hello,
    Holdings,
    Inventory,
    Journaled,
    Message,
    WeightsReady,
)
from protocol.node import Node

log = logging.getLogger("rlsys.dispatcher")

MANY_FACTS = 1024
"""Most groups that a heartbeat names, oldest first: more than an iteration has in most runs."""
FIRST_EVAL_GROUP = 1 << 40
"""Evaluation groups are numbered from here, round by round, so that training groups are numbered alike with and without evaluation."""
EVAL_ROUND = 1 << 24


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatcherJob:
    """What a dispatcher is started with; `max_context` is the model's or the configuration's, whichever is smaller."""

    seed: int
    iterations: int
    pacing: PacingRule
    max_requeues: int
    stages: tuple[StagePlan, ...]
    model_dir: Path
    max_context: int
    data: DataSettings
    sampling: SamplingSettings
    evaluation: EvaluationSettings
    ledger: Path


def sample_seed(run_seed: int, group_id: int, index: int) -> int:
    """63 bits from (run seed, group, index), without the attempt, so that a sample drawn again is the same draw."""
    digest = hashlib.blake2b(f"{run_seed}/{group_id}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def prepare(problems: list[Problem], text: Text, data: DataSettings, longest: int) -> tuple[list[Prepared], list[Problem]]:
    """Problems with their prompt ids, and those whose prompt is longer than `longest` tokens (skipped)."""
    all_ids = text.encode_prompts([p.prompt for p in problems], data.prompt_template, data.chat)
    fits, skipped = [], []
    for problem, ids in zip(problems, all_ids, strict=True):
        if 0 < len(ids) <= longest:
            fits.append(Prepared(problem, ids))
        else:
            skipped.append(problem)
    return fits, skipped


class Dispatcher:
    """What is issued, what is out, what is evaluated. No sockets in here: `next_task` and the `on_*` methods are the whole interface."""

    def __init__(self, job: DispatcherJob) -> None:
        self._job = job
        self.pacer = Pacer(job.pacing)
        text = Text(job.model_dir)
        self._stop_ids = np.array(
            stop_token_ids(job.model_dir) if job.sampling.stop_token_ids is None else job.sampling.stop_token_ids, np.int32
        )
        self.skipped: list[Problem] = []
        prompts = [self._read(text, plan.train, self._longest(plan.max_tokens), needed=True) for plan in job.stages]
        self._eval: list[Prepared] = []
        if job.data.eval is not None:
            longest = self._longest(max(plan.max_tokens for plan in job.stages))
            self._eval = self._read(text, job.data.eval, longest, job.evaluation.problems)
        self.prompts = Prompts(job.stages, prompts, seed=job.seed, shuffle=job.data.shuffle, max_requeues=job.max_requeues)
        self._next_group = 0
        self._eval_queue: deque[GroupTask] = deque()
        self._eval_rounds: dict[int, list[GroupOutcome]] = {}
        self._eval_sizes: dict[int, int] = {}
        self.outstanding: dict[int, GroupTask] = {}
        """Groups that were issued and have no terminal state."""
        self._again: deque[GroupTask] = deque()
        self.groups_issued = self.groups_ended = 0

    def _longest(self, max_tokens: int) -> int:
        """Tokens that the context leaves for a prompt."""
        longest, limit = self._job.max_context - max_tokens, self._job.sampling.max_prompt_tokens
        return longest if limit is None else min(longest, limit)

    def _read(self, text: Text, path: Path, longest: int, limit: int | None = None, *, needed: bool = False) -> list[Prepared]:
        fits, skipped = prepare(read_problems(path, limit), text, self._job.data, longest)
        if needed and not fits:
            raise DataError(f"{path}: every prompt is longer than {longest} tokens, so nothing can be trained on")
        known = {problem.problem_id for problem in self.skipped}
        self.skipped += [problem for problem in skipped if problem.problem_id not in known]
        return fits

    # ------------------------------------------------------------------------------------------------ issuing

    def next_task(self) -> GroupTask | None:
        """The next group to give out; None while pacing or the end of the run holds everything back. `issue` takes it."""
        while self._again and self._again[0].group_id not in self.outstanding:
            self._again.popleft()  # it ended after all
        if self._again:
            return self._again[0]
        if self._eval_queue:
            return self._eval_queue[0]
        iteration = self.pacer.next_iteration()
        if iteration is None or not self.prompts.knows_all(iteration, self.pacer.published, self.pacer.taken):
            return None
        drawn = self.prompts.next(iteration, self.pacer.rule.max_staleness)
        return self._train_task(drawn, self._next_group, iteration)

    @property
    def room(self) -> int:
        """How many groups may be issued now."""
        return len(self._eval_queue) or self.pacer.room

    def issue(self, task: GroupTask) -> None:
        """`task` is given to a generator."""
        if task.attempt:
            self._again.popleft()
            return
        self.outstanding[task.group_id] = task
        self.groups_issued += 1
        if task.purpose == "eval":
            self._eval_queue.popleft()
        else:
            self.prompts.take(task.group_id, self.prompts.next(task.iteration, self.pacer.rule.max_staleness))
            self._next_group += 1
            self.pacer.issue()

    def requeues(self, task: GroupTask) -> int:
        """How many groups of the task's prompt were given up before."""
        drawn = self.prompts.of(task.group_id)
        return drawn.requeues if drawn else 0

    def issue_again(self, lost: Mapping[int, Iterable[int]], attempts: Mapping[int, int]) -> int:
        """Members of groups that died with an actor: their tasks come next, with the same seeds. Returns how many samples that are."""
        count = 0
        for group_id, indices in lost.items():
            task = self.outstanding[group_id]
            places = [task.indices.tolist().index(i) for i in indices]
            count += len(places)
            self._again.append(
                replace(task, attempt=attempts[group_id], indices=task.indices[places].copy(), seeds=task.seeds[places].copy())
            )
        return count

    def _train_task(self, drawn: Drawn, group_id: int, iteration: int) -> GroupTask:
        sampling, stage = self._job.sampling, self._job.stages[drawn.stage]
        version, size = self.pacer.rule.min_version(iteration), sampling.group_size
        task = self._task(drawn.prepared, group_id, iteration, "train", version, size, stage.temperature, sampling.top_p)
        return replace(task, max_tokens=stage.max_tokens, stage=drawn.stage)

    def _eval_task(self, version: int, place: int) -> GroupTask:
        evaluation, group_id = self._job.evaluation, FIRST_EVAL_GROUP + version * EVAL_ROUND + place
        return self._task(
            self._eval[place], group_id, version, "eval", version, evaluation.samples, evaluation.temperature, evaluation.top_p
        )

    def _task(
        self, prepared: Prepared, group_id: int, iteration: int, purpose: Any, min_version: int, size: int, temperature: float, top_p: float
    ) -> GroupTask:
        sampling = self._job.sampling
        return GroupTask(
            group_id=group_id,
            iteration=iteration,
            attempt=0,
            purpose=purpose,
            min_version=min_version,
            problem_id=prepared.problem.problem_id,
            indices=np.arange(size, dtype=np.int32),
            seeds=np.array([sample_seed(self._job.seed, group_id, i) for i in range(size)], np.int64),
            prompt_ids=prepared.prompt_ids,
            temperature=temperature,
            top_p=top_p,
            top_k=sampling.top_k if purpose == "train" else 0,
            max_tokens=max(plan.max_tokens for plan in self._job.stages),
            stop_token_ids=self._stop_ids,
            payload=prepared.problem.payload,
        )

    # ------------------------------------------------------------------------------------------------ news

    def on_version(self, number: int, groups_taken: int, stage_starts: Sequence[int] = (0,)) -> None:
        """A version was published: it opens an iteration, may decide about the next stage, and may be due for evaluation.

        One that was missed is made up for.
        """
        if len(stage_starts) > len(self.prompts.starts):
            self.prompts.starts = list(stage_starts)
        for missed in range(self.pacer.published + 1, number):
            self._open(missed)
        if number > self.pacer.published:
            self._open(number)
        self.pacer.publish(number, groups_taken)

    def _open(self, number: int) -> None:
        first = number == 0
        evaluation, last = self._job.evaluation, number >= self._job.iterations
        due = (first and number == 0 and evaluation.at_start) or (last and evaluation.at_end)
        due = due or (number > 0 and not last and evaluation.every > 0 and number % evaluation.every == 0)
        if due and self._eval and number not in self._eval_sizes:
            self._eval_sizes[number] = len(self._eval)
            self._eval_rounds[number] = []
            self._eval_queue.extend(self._eval_task(number, i) for i in range(len(self._eval)))

    def restore(
        self, issues: Sequence[Issue], outcomes: Iterable[GroupOutcome], published: int, stages: Iterable[Stage] = ()
    ) -> list[dict[str, Any]]:
        """Be where an earlier dispatcher of the run was, from the issue log and the terminal states. Call it on a new object.

        Groups without a terminal state are outstanding again. Returns the results of the evaluation rounds that were complete.
        """
        ended = list(outcomes)
        first = [issue for issue in issues if issue.purpose == "train" and not issue.attempt]
        self.prompts.restore(first, stages)
        rounds: dict[int, set[int]] = {}
        for issue in issues:
            if issue.attempt:
                continue
            if issue.purpose == "eval":
                self.outstanding[issue.group_id] = self._eval_task(issue.iteration, issue.group_id % EVAL_ROUND)
                rounds.setdefault(issue.iteration, set()).add(issue.group_id % EVAL_ROUND)
            else:
                drawn = self.prompts.of(issue.group_id)
                if drawn is None:
                    raise ValueError(f"group {issue.group_id} has no prompt")
                self.outstanding[issue.group_id] = self._train_task(drawn, issue.group_id, issue.iteration)
                self._next_group = max(self._next_group, issue.group_id + 1)
                self.pacer.issue()
            self.groups_issued += 1
        for version, known in rounds.items():
            self._eval_sizes[version], self._eval_rounds[version] = len(self._eval), []
            self._eval_queue.extend(self._eval_task(version, i) for i in range(len(self._eval)) if i not in known)
        results = [result for result in map(self.on_outcome, ended) if result]
        self.prompts.settle()
        self.on_version(published, sum(o.in_batch for o in ended if o.purpose == "train"))
        return results

    def on_outcome(self, outcome: GroupOutcome) -> dict[str, Any] | None:
        """A group ended. Returns the result of an evaluation round when this completed it."""
        if self.outstanding.pop(outcome.group_id, None) is None:
            return None
        self.groups_ended += 1
        if outcome.purpose != "eval":
            self._on_training_outcome(outcome)
            return None
        outcomes = self._eval_rounds[outcome.iteration]
        outcomes.append(outcome)
        return evaluate(outcomes) if len(outcomes) == self._eval_sizes[outcome.iteration] else None

    def _on_training_outcome(self, outcome: GroupOutcome) -> None:
        if not outcome.in_batch:
            self.pacer.give_up()
        self.prompts.end(outcome)

    @property
    def done(self) -> bool:
        """Whether every iteration was trained and every group that was issued has its terminal state, the last evaluation included."""
        return self.pacer.published >= self._job.iterations and not self._eval_queue and not self.outstanding

    def waits_for(self) -> tuple[str, str, str]:
        """(what, peer, detail) of the present wait."""
        if self.pacer.published < 0:
            return "waiting:first version", "learner", "the learner has published nothing yet"
        if self.next_task() is not None:
            return "waiting:credits", "generator", "no generator has a free place with the version that the next group needs"
        if not self.pacer.all_issued:
            return "waiting:version", "learner", f"v{self.pacer.published + 1} opens the next iteration"
        return "waiting:outcomes", "learner", f"{len(self.outstanding)} groups have no terminal state yet"


def evaluate(outcomes: list[GroupOutcome]) -> dict[str, Any]:
    """pass@1 of one evaluation round: the mean over problems of the share of samples that passed. Failed ones are only counted."""
    scored = [o for o in outcomes if o.state == "evaluated"]
    return {
        "version": outcomes[0].iteration,
        "pass_at_1": sum(o.num_passed / o.num_samples for o in scored) / len(scored) if scored else float("nan"),
        "problems": len(scored),
        "failed": len(outcomes) - len(scored),
        "samples": sum(o.num_samples for o in scored),
        "oldest_version": min((o.oldest_version for o in scored), default=-1),
        "newest_version": max((o.newest_version for o in scored), default=-1),
    }


# ---------------------------------------------------------------------------------------------------- the process


class DispatcherProcess:
    """Moves bytes between `Dispatcher` and its channels."""

    def __init__(self, node: Node, job: DispatcherJob) -> None:
        self._node = node
        self._tasks = node.serve("tasks", on_gone=self._actor_gone)
        self._outcomes = node.serve("outcomes")
        self._weights = node.join("weights", on_link=self._greet)
        self._credits = Outgoing()
        self._allotment = Allotment()
        self._given: dict[int, str] = {}
        """Group -> the generator that has it, until the group ends."""
        self._custody = Custody()
        self._job = job
        self._dispatcher = Dispatcher(job)
        spec = node.spec
        self._ledger = Ledger(job.ledger, Writer(spec.role, spec.index, spec.start))
        self._learner_heard = False
        self._restored = self._restore()
        self._asked: set[str] = set()
        self._reissued = 0
        node.gauges = self._gauges
        node.facts = self._facts
        node.progress = lambda: self._dispatcher.groups_issued + self._dispatcher.groups_ended + self._reissued
        self._training = self._finished = False

    def _restore(self) -> bool:
        """Whether an earlier dispatcher of this run has issued anything; then this one is where that was, but for who holds what."""
        issues = self._ledger.issues()
        published = max((number for number, _ in self._ledger.versions()), default=-1)
        for result in self._dispatcher.restore(issues, self._ledger.outcomes(), published, self._ledger.stages()):
            self._node.event("eval", **result)
        for issue in issues:
            task = self._dispatcher.outstanding.get(issue.group_id)
            if task is not None:
                self._custody.issued(issue.group_id, issue.attempt, task.indices.tolist(), "")
        self._custody.doubt()
        if issues:
            count = len(self._dispatcher.outstanding)
            log.info("%d groups were issued before, %d of them have no terminal state; asking who holds them", len(issues), count)
        return bool(issues)

    def run(self) -> None:
        """Issue until the run ends."""
        node, dispatcher = self._node, self._dispatcher
        if dispatcher.skipped:
            ids = [problem.problem_id for problem in dispatcher.skipped]
            log.warning("%d prompts are longer than the context leaves room for and are skipped: %s", len(ids), ", ".join(ids[:10]))
            self._ledger.skipped((i, "prompt too long") for i in ids)
            node.event("skipped", count=len(ids), reason="prompt too long", first=ids[:10])
        node.start()
        while True:
            name, peer, detail = self._waits_for()
            node.recorder.enter(name, peer, detail)
            node.poll(1.0)
            node.recorder.enter("dispatching")
            for message in self._news():
                self._on_news(message)
            for peer, message in self._tasks.receive():
                self._on_actor(peer, message)
            for peer in node.leavers:
                self._credits.drop_peer(peer)
                self._allotment.drop(peer)
            self._take_inventory()
            if not self._restored:
                self._issue()
            if dispatcher.done and not self._finished:
                self._finished = True
                node.finished()

    def close(self) -> None:
        """Close the ledger."""
        self._ledger.close()

    def _waits_for(self) -> tuple[str, str, str]:
        if self._restored and not self._learner_heard:
            return "waiting:what is journaled", "learner", "before anything is issued again"
        if self._custody.asking:
            return "waiting:inventory", min(self._custody.asking), "what the living hold, before anything is issued again"
        return self._dispatcher.waits_for()

    def _greet(self, link: Link) -> None:
        link.send(Hello(role="dispatcher", index=self._node.spec.index, identity=self._node.identity, epoch=self._node.spec.epoch))

    def _news(self) -> Iterator[Message]:
        for link in list(self._weights.values()):
            yield from link.receive()
        for _, message in self._outcomes.receive():
            yield message

    def _on_news(self, message: Message) -> None:
        if isinstance(message, WeightsReady):
            self._allotment.published(message.number, time.monotonic())
            self._dispatcher.on_version(message.number, message.groups_taken, message.stage_starts)
        elif isinstance(message, Hello):
            self._learner_heard = True
            self._custody.journaled(message.holds.tolist())
            for known in self._ledger.outcomes_of(self._dispatcher.outstanding):  # the last learner may have died before it told
                self._on_news(known)
        elif isinstance(message, Journaled):
            self._custody.journaled(message.keys.tolist())
        elif isinstance(message, GroupOutcome):
            self._given.pop(message.group_id, None)
            self._custody.ended(message.group_id)
            result = self._dispatcher.on_outcome(message)
            if result is not None:
                self._node.event("eval", **result)

    # ------------------------------------------------------------------------------------------------ actors that come and go

    def _actor_gone(self, identity: str) -> None:
        """Confirmed dead: what only it held must be issued again."""
        self._credits.drop_peer(identity)
        self._allotment.drop(identity)
        self._custody.died(identity)

    def _on_actor(self, peer: str, message: Message) -> None:
        if isinstance(message, Hello):
            if message.role == "generator":
                self._credits.add_peer(peer)
                self._allotment.loaded(peer, message.loaded[0], time.monotonic())
                self._custody.claimed(peer, message.holds.tolist())  # also when its connection broke: what was on the wire may be lost
            self._asked.discard(peer)
        elif isinstance(message, Credit):
            self._credits.granted(peer, message.total)
            self._allotment.loaded(peer, message.loaded[0], time.monotonic())
        elif isinstance(message, Holdings):
            self._custody.answer(peer, message.number, message.keys.tolist())

    def _take_inventory(self) -> None:
        """When samples may have died with an actor: ask the living, and once all have answered, issue again what nobody has."""
        custody, node = self._custody, self._node
        if self._restored and not (self._learner_heard and node.identity in node.identities_of("dispatcher")):
            return
        if custody.due:
            custody.ask(node.identities_of("generator", "rewarder"))
            self._asked.clear()
        elif self._restored and not custody.suspects:
            self._restored = False
        for peer in custody.asking - self._asked:
            if self._tasks.send(peer, Inventory(number=custody.number)):
                self._asked.add(peer)
        lost = custody.settle()
        if lost is None:
            return
        self._restored = False
        if lost:
            count = self._dispatcher.issue_again(lost, {group_id: custody.attempt(group_id) for group_id in lost})
            self._reissued += count
            log.warning("%d samples of %d groups died with their actors and are issued again", count, len(lost))

    def _issue(self) -> None:
        """Decide, write down, send: a task that was sent always stands in the issue log."""
        chosen: list[tuple[str, GroupTask]] = []
        deal = self._allotment.deal(self._dispatcher.room, time.monotonic())
        while (task := self._dispatcher.next_task()) is not None:
            peer = deal.pick(self._credits.left, task.min_version)
            if peer is None:
                break
            self._credits.sent(peer)
            self._dispatcher.issue(task)
            self._given[task.group_id] = peer
            self._custody.issued(task.group_id, task.attempt, task.indices.tolist(), peer)
            chosen.append((peer, task))
        self._tell_stages()
        now = time.time()
        self._ledger.issued(
            Issue(
                group_id=task.group_id,
                attempt=task.attempt,
                iteration=task.iteration,
                purpose=task.purpose,
                problem_id=task.problem_id,
                generator=peer,
                issued_s=now,
                stage=task.stage,
                requeues=self._dispatcher.requeues(task),
            )
            for peer, task in chosen
        )
        for peer, task in chosen:
            self._tasks.send(peer, task)  # a generator that is gone meanwhile never gets it: its death is told next, and it is issued again
            if task.purpose == "train" and not self._training:
                self._training = True
                self._node.event("training started")

    def _tell_stages(self) -> None:
        """A stage that began goes to the ledger, the log and the dashboard."""
        entered = self._dispatcher.prompts.entered
        while entered:
            stage = entered.popleft()
            self._ledger.stage(stage.stage, stage.name, stage.iteration, stage.problems, stage.of, stage.kept)
            if not stage.problems:
                log.warning("stage %s: its filters leave no problem, so it has all %d of its data set", stage.name, stage.of)
            if len(self._job.stages) > 1:
                values = {"number": stage.stage, "stage": stage.name, "from_iteration": stage.iteration}
                self._node.event("stage", **values, problems=stage.problems or stage.of, of=stage.of)

    def _facts(self) -> dict[str, Any]:
        """For `rlsys why`: the newest version, what the next group needs, and who was given the oldest groups that have not ended."""
        d = self._dispatcher
        task = d.next_task()
        return {
            "published": d.pacer.published,
            "needs": -1 if task is None else task.min_version,
            "outstanding": [(g, task.iteration, self._given.get(g, "")) for g, task in islice(d.outstanding.items(), MANY_FACTS)],
            "credits": {peer: self._credits.left(peer) for peer in self._credits.peers},
        }

    def _gauges(self) -> dict[str, float]:
        d = self._dispatcher
        return {
            "dispatcher/groups_outstanding": len(d.outstanding),
            "dispatcher/credits": sum(self._credits.left(peer) for peer in self._credits.peers),
            "dispatcher/published_version": d.pacer.published,
        }


def run_dispatcher(node: Node, job: DispatcherJob) -> None:
    """The body of a dispatcher process."""
    process = DispatcherProcess(node, job)
    try:
        process.run()
    finally:
        process.close()
