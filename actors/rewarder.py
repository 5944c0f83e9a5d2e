"""A reward actor: scores completions in several threads and passes them on as trajectories.

    generators --Completion--> [ reward x concurrency ] --Trajectory--> learner     (kept until the learner has journaled it)
        ^--Credit, Ack--/                                  ^--Credit, Ack--/

An acknowledgement goes back to the generator only after the learner's came, so that a reward actor may die at any time and lose nothing.
It waits for: completions (generators), credit (learner). It wakes: the learner, generators.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import msgpack
import numpy as np
import numpy.typing as npt

from actors.rewards import Reward, Sample, Score
from actors.rewards.answers import sound
from actors.text import Text
from protocol.channels import Link
from protocol.credits import Incoming, Outgoing
from protocol.errors import DataError, InfrastructureFault, RunEnded, UserError
from protocol.intervals import Activity, Recorder, is_waiting, phase, record_here
from protocol.messages import NOT_FINITE, Ack, Completion, Credit, Hello, Holdings, Inventory, Trajectory, key_of
from protocol.node import Node

log = logging.getLogger("rlsys.rewarder")

FACTS = 64
"""Most groups that a heartbeat names."""
QUEUED_PER_THREAD = 4
"""Completions granted per scoring thread: enough to hide a round trip, few enough that work goes where it is done first."""

Key = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class _Scored:
    peer: str
    completion: Completion
    score: Score
    scoring_s: float


class Scorers:
    """Threads that score. `put` takes work, `results` holds what is done, `wake` is called after each."""

    def __init__(
        self,
        reward: Reward,
        text: Text,
        threads: int,
        retries: int,
        wake: Callable[[], None],
        track: Callable[[str, str], Recorder],
        *,
        name: str = "reward",
        max_not_finite: int = 20,
    ) -> None:
        """`name` is the reward's, for messages; `max_not_finite` samples in a row without a finite score end the actor with a UserError."""
        self._reward, self._text, self._retries, self._name = reward, text, retries, name
        self._max_not_finite, self._not_finite = max_not_finite, 0
        self._wake = wake
        self._work: queue.SimpleQueue[tuple[str, Completion] | None] = queue.SimpleQueue()
        self.results: deque[_Scored] = deque()
        self.error: BaseException | None = None
        self.active = 0
        """Taken and not yet done."""
        self.started: dict[int, tuple[float, int]] = {}
        """Thread -> since when it scores a sample, and of which group."""
        self._tracks = [track(f"score-{i}", "waiting:completions") for i in range(threads)]
        self._threads = [threading.Thread(target=self._loop, args=(i,), name=f"score-{i}", daemon=True) for i in range(threads)]
        for thread in self._threads:
            thread.start()

    def put(self, peer: str, completion: Completion) -> None:
        """Score a completion that came from `peer`."""
        self.active += 1
        self._work.put((peer, completion))

    def close(self) -> None:
        """End the threads; what they score is forgotten."""
        for _ in self._threads:
            self._work.put(None)

    @property
    def wait(self) -> Activity | None:
        """What the first of the threads that score waits for, if all of them wait: a sandbox elsewhere that is away, say."""
        now = [self._tracks[number].activity for number in list(self.started)]
        return now[0] if now and all(is_waiting(activity.name) for activity in now) else None

    def _loop(self, number: int) -> None:
        recorder = self._tracks[number]
        record_here(recorder)
        try:
            while (work := self._work.get()) is not None:
                started, group = time.monotonic(), work[1].group_id
                recorder.enter("judge", iteration=work[1].iteration, group=group)
                self.started[number] = (time.time(), group)
                score = self._score(work[1])
                del self.started[number]
                recorder.enter("waiting:completions", "generator")
                self.results.append(_Scored(*work, score, time.monotonic() - started))
                self._wake()
        except BaseException as error:  # carried to the actor's own thread, which raises it
            self.error = error
            self._wake()

    def _score(self, completion: Completion) -> Score:
        problem = msgpack.unpackb(completion.payload)
        with phase("read text"):
            text = self._text.decode(completion.token_ids)
        sample = Sample(problem=problem, completion=text, truncated=completion.finish_reason != "stop")
        for attempt in range(self._retries + 1):
            try:
                score = sound(self._reward.score(sample), self._name)
                break
            except InfrastructureFault as fault:
                log.warning("sample %d/%d, try %d of %d: %s", completion.group_id, completion.index, attempt + 1, self._retries + 1, fault)
                reason = str(fault)
            except DataError as error:
                log.warning("sample %d/%d cannot be judged: %s", completion.group_id, completion.index, error)
                return Score(value=None, status="bad_problem", detail=str(error))
        else:
            return Score(value=None, status="failed", detail=reason)
        self._count(completion, score)
        return score

    def _count(self, completion: Completion, score: Score) -> None:
        """Samples in a row without a finite score. Threads may miss one another's count by one; a reward that is broken is found all the same."""
        if score.status != NOT_FINITE or score.value is not None:
            self._not_finite = 0
            return
        self._not_finite += 1
        where = f"sample {completion.group_id}/{completion.index}"
        log.warning("%s: %s: it is left without a score", where, score.detail)
        if self._not_finite >= self._max_not_finite:
            raise UserError(
                f"reward {self._name!r} gave no finite score for {self._not_finite} samples in a row (the last is {where}: {score.detail}); "
                f"rewarders.max_not_finite is {self._max_not_finite}"
            )


class Rewarder:
    """The loop of one reward actor."""

    def __init__(
        self, node: Node, reward: Reward, text: Text, *, reward_name: str, concurrency: int, retries: int, max_not_finite: int = 20
    ) -> None:
        self._node, self._reward, self._reward_name = node, reward, reward_name
        self._scorers = Scorers(reward, text, concurrency, retries, node.wake, node.track, name=reward_name, max_not_finite=max_not_finite)
        self._completions = node.serve("completions", on_gone=self._generator_gone)
        self._dispatchers = node.join("tasks", on_link=self._say_hello)
        self._learners = node.join("trajectories", on_link=self._greet, on_gone=self._learner_gone)
        self._incoming = Incoming(QUEUED_PER_THREAD * concurrency)
        self._credits = Outgoing()
        self._held: dict[Key, Trajectory | None] = {}
        """Every sample in this actor: None while it is scored, then its trajectory until the learner acknowledges it."""
        self._from: dict[Key, str] = {}
        self._outbox: deque[Trajectory] = deque()
        self._statuses: dict[str, int] = {}
        self._scored, self._scoring_s = 0, 0.0
        node.gauges = self._gauges
        node.progress = lambda: self._scored
        node.facts = self._facts

    def run(self) -> None:
        """Score until the run ends."""
        self._node.start()
        try:
            while True:
                self._node.recorder.enter(*self._activity())
                self._node.poll(1.0)
                if self._scorers.error is not None:
                    raise self._scorers.error
                self._receive()
                self._collect()
                self._send()
                if self._node.leaving:
                    self._leave_when_empty()
                    continue
                for peer, total in self._incoming.grants():
                    self._completions.send(peer, Credit(total=total))
        finally:
            self._scorers.close()

    def _leave_when_empty(self) -> None:
        """Told to leave: go once all that came is scored and journaled. What is on the wire then its generator still has, and sends to another."""
        if not self._held:
            raise RunEnded(f"nothing is left to score here, and it was told to leave: {self._node.leaving}")

    def _activity(self) -> tuple[str, str, str]:
        if self._scorers.active:
            wait = self._scorers.wait
            return (wait.name, wait.peer, wait.detail) if wait else ("scoring", "", "")
        if self._outbox:
            return "waiting:learner credit", "learner", f"{len(self._outbox)} trajectories wait"
        return "waiting:completions", "generator", ""

    def _greet(self, link: Link) -> None:
        """A learner appeared: it is told everything again that was never acknowledged."""
        self._credits.add_peer(link.peer)
        self._say_hello(link)
        self._outbox = deque(trajectory for trajectory in self._held.values() if trajectory is not None)

    def _say_hello(self, link: Link) -> None:
        spec = self._node.spec
        link.send(Hello(role="rewarder", index=spec.index, identity=self._node.identity, epoch=spec.epoch, holds=self._holds()))

    def _holds(self) -> npt.NDArray[np.int64]:
        return np.array(list(self._held), np.int64).reshape(-1, 3)

    def _generator_gone(self, identity: str) -> None:
        """What it sent is scored all the same; its places are free for the others, and nobody is told of acknowledgements."""
        self._incoming.drop_peer(identity)
        self._from = {key: peer for key, peer in self._from.items() if peer != identity}

    def _learner_gone(self, identity: str) -> None:
        self._credits.drop_peer(identity)

    def _receive(self) -> None:
        for peer, message in self._completions.receive():
            if isinstance(message, Hello):
                self._incoming.add_peer(peer)
            elif isinstance(message, Completion):
                key = key_of(message)
                self._from[key] = peer
                if key in self._held:  # sent again; the first copy is being scored or waits for the learner
                    self._incoming.done(peer)
                    continue
                self._held[key] = None
                self._scorers.put(peer, message)
        for link in list(self._dispatchers.values()):
            for message in link.receive():
                if isinstance(message, Inventory):
                    link.send(Holdings(number=message.number, keys=self._holds()))
        for link in list(self._learners.values()):
            for message in link.receive():
                if isinstance(message, Credit):
                    self._credits.granted(link.peer, message.total)
                elif isinstance(message, Ack):
                    self._acknowledge(map(tuple, message.keys.tolist()))

    def _acknowledge(self, keys: Iterable[Key]) -> None:
        back: dict[str, list[Key]] = {}
        for key in keys:
            self._held.pop(key, None)
            peer = self._from.pop(key, None)
            if peer is not None:
                back.setdefault(peer, []).append(key)
        for peer, acknowledged in back.items():
            self._completions.send(peer, Ack(keys=np.array(acknowledged, np.int64)))

    def _collect(self) -> None:
        while self._scorers.results:
            scored = self._scorers.results.popleft()
            self._scorers.active -= 1
            self._scored += 1
            self._scoring_s += scored.scoring_s
            self._statuses[scored.score.status] = self._statuses.get(scored.score.status, 0) + 1
            self._incoming.done(scored.peer)
            trajectory = self._trajectory(scored)
            self._held[key_of(trajectory)] = trajectory
            self._outbox.append(trajectory)

    def _trajectory(self, scored: _Scored) -> Trajectory:
        c, score = scored.completion, scored.score
        parts: Mapping[str, float] = score.parts or ({self._reward_name: score.value} if score.value is not None else {})
        return Trajectory(
            group_id=c.group_id,
            index=c.index,
            attempt=c.attempt,
            iteration=c.iteration,
            purpose=c.purpose,
            problem_id=c.problem_id,
            generator=c.generator,
            rewarder=self._node.identity,
            prompt_ids=c.prompt_ids,
            token_ids=c.token_ids,
            behaviour_logprobs=c.behaviour_logprobs,
            loss_mask=np.ones(len(c.token_ids), np.bool_),
            spans=c.spans,
            finish_reason=c.finish_reason,
            temperature=c.temperature,
            max_tokens=c.max_tokens,
            score=score.value,
            passed=score.passed,
            status=score.status,
            parts=dict(parts),
            detail=score.detail[:500],
            started_s=c.started_s,
            finished_s=c.finished_s,
            scored_s=time.time(),
            scoring_s=scored.scoring_s,
            stage=c.stage,
        )

    def _send(self) -> None:
        while self._outbox and (peer := self._credits.best()) is not None:
            self._learners[peer].send(self._outbox.popleft())
            self._credits.sent(peer)

    def _facts(self) -> dict[str, Any]:
        """For `rlsys why`: samples here by group, oldest first: being scored, scored and not acknowledged."""
        groups: dict[int, list[int]] = {}
        for key, trajectory in islice(self._held.items(), 8 * FACTS):
            groups.setdefault(key[0], [0, 0])[trajectory is not None] += 1
        oldest = min((since for since, _ in list(self._scorers.started.values())), default=0.0)
        return {
            "held": [(group, *counts) for group, counts in islice(groups.items(), FACTS)],
            "scoring_since_s": oldest,
            "active": self._scorers.active,
            "outbox": len(self._outbox),
        }

    def _gauges(self) -> dict[str, float]:
        statuses = {f"verdict/{status}": float(count) for status, count in self._statuses.items()}
        return {
            "rewarder/scored": self._scored,
            "rewarder/scoring_s": self._scoring_s,
            "rewarder/queued": self._scorers.active,
            "rewarder/outbox": len(self._outbox),
            "rewarder/unacknowledged": len(self._held),
            **statuses,
        }
