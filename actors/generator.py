"""A generator actor: one engine, fed with groups, giving back completions one by one as they end.

    dispatcher --GroupTask--> [ engine ] --Completion--> reward actors      (to the one with the most credit; kept until acknowledged)
        ^-----Credit, loaded version-/ ^--WeightsReady-- learner            (swapped in flight: later tokens carry the new version)

It waits for: the first weights (learner), tasks (dispatcher), credit (reward actors). It wakes: reward actors, the dispatcher.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict, deque
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from actors.engines import Engine, Sampled, SampleRequest, Sampling
from actors.weights import WeightsIntake
from protocol.channels import Link
from protocol.credits import Outgoing
from protocol.errors import WeightsError
from protocol.messages import Ack, Completion, Credit, GroupTask, Hello, Holdings, Inventory, Version, WeightsReady, key_of, pack_spans
from protocol.node import Node

log = logging.getLogger("rlsys.generator")

IDLE_WAIT_S = 0.5
"""Longest poll while the engine has nothing to do; messages end it early."""

FACTS = 64
"""Most groups that a heartbeat names."""

RELOADS = 1
"""How often a refused version is announced and loaded again before the actor gives up, which ends it with the reason."""

Key = tuple[int, int, int]


@dataclass(slots=True)
class _Running:
    task: GroupTask
    left: set[int]
    """Places in the task's indices that are not done."""
    started_s: float


class Generator:
    """The loop of one generator actor. `group_size` turns free slots into credits, which are counted in groups."""

    def __init__(self, node: Node, engine: Engine, group_size: int) -> None:
        self._node, self._engine, self._group_size = node, engine, group_size
        self._intake = WeightsIntake(node.identity, engine)
        self._running: dict[str, _Running] = {}
        self._outbox: deque[Completion] = deque()
        self._unacknowledged: OrderedDict[Key, Completion] = OrderedDict()
        self._sent_to: dict[Key, str] = {}
        self._credits = Outgoing()
        self._groups_taken = 0
        self._granted = (0, -2)
        self._samples_done = 0
        self._mixed = 0
        self._tasks = node.join("tasks", on_link=self._greet_dispatcher)
        self._rewarders = node.join("completions", on_link=self._greet_rewarder, on_gone=self._rewarder_gone)
        self._learner = node.join("weights", on_link=self._greet)
        node.gauges = self._gauges
        node.facts = self._facts
        node.progress = lambda: engine.load.tokens_sampled + self._samples_done + self._groups_taken

    def run(self) -> None:
        """Sample until the run ends."""
        self._node.start()
        while True:
            load = self._engine.load
            if load.running + load.waiting > 0:
                self._node.recorder.enter("decode")
                self._node.poll(min(load.ready_in_s, IDLE_WAIT_S))
            else:
                self._node.recorder.enter(*self._wait())
                self._node.poll(IDLE_WAIT_S)
            self._receive()
            self._load_weights()
            if self._engine.load.running + self._engine.load.waiting:
                self._node.recorder.enter("decode")
                for sampled in self._engine.step(IDLE_WAIT_S):
                    self._complete(sampled)
            self._send()
            self._give_credits()

    # ------------------------------------------------------------------------------------------------ arriving

    def _hello(self) -> Hello:
        version = self._engine.version or Version(-1)
        return Hello(
            role="generator",
            index=self._node.spec.index,
            identity=self._node.identity,
            epoch=self._node.spec.epoch,
            loaded=(version.number, version.incarnation),
            holds=self._holds(),
        )

    def _holds(self) -> npt.NDArray[np.int64]:
        """Every sample that is being sampled here, or done and not acknowledged."""
        keys = [
            (running.task.group_id, int(running.task.indices[place]), running.task.attempt)
            for running in self._running.values()
            for place in running.left
        ]
        return np.array([*keys, *self._unacknowledged], np.int64).reshape(-1, 3)

    def _greet(self, link: Link) -> None:
        link.send(self._hello())

    def _greet_dispatcher(self, link: Link) -> None:
        self._groups_taken, self._granted = 0, (0, -2)
        link.send(self._hello())

    def _greet_rewarder(self, link: Link) -> None:
        self._credits.add_peer(link.peer)
        link.send(self._hello())

    def _rewarder_gone(self, identity: str) -> None:
        """What that reward actor had and never acknowledged goes to another."""
        self._credits.drop_peer(identity)
        lost = [key for key, peer in self._sent_to.items() if peer == identity]
        for key in lost:
            del self._sent_to[key]
            self._outbox.append(self._unacknowledged[key])

    def _receive(self) -> None:
        for link in list(self._tasks.values()):
            for message in link.receive():
                if isinstance(message, GroupTask):
                    self._take(message)
                elif isinstance(message, Inventory):
                    link.send(Holdings(number=message.number, keys=self._holds()))
        for link in list(self._learner.values()):
            for message in link.receive():
                if isinstance(message, WeightsReady):
                    self._intake.announce(message)
        for link in list(self._rewarders.values()):
            for message in link.receive():
                if isinstance(message, Credit):
                    self._credits.granted(link.peer, message.total)
                elif isinstance(message, Ack):
                    for key in map(tuple, message.keys.tolist()):
                        self._unacknowledged.pop(key, None)
                        self._sent_to.pop(key, None)

    def _take(self, task: GroupTask) -> None:
        self._groups_taken += 1
        loaded = self._engine.version
        if loaded is None or loaded.number < task.min_version:
            raise AssertionError(f"group {task.group_id} needs version {task.min_version}, {loaded} is loaded: a bug of the dispatcher")
        request_id = f"{task.group_id}/{task.attempt}"
        self._running[request_id] = _Running(task, set(range(len(task.indices))), time.time())
        sampling = Sampling(
            max_tokens=task.max_tokens,
            temperature=task.temperature,
            top_p=task.top_p,
            top_k=task.top_k,
            stop_token_ids=tuple(task.stop_token_ids.tolist()),
        )
        self._engine.submit(
            SampleRequest(request_id=request_id, prompt_ids=task.prompt_ids, seeds=tuple(task.seeds.tolist()), sampling=sampling)
        )

    def _load_weights(self) -> None:
        ready = self._intake.pending
        if ready is None:
            return
        with self._node.recorder.during("swap weights", "learner", f"v{ready.number}", iteration=ready.number):
            self._node.beat()  # loading may take long and cannot be interrupted: say so before
            loaded = self._intake.load(ready)
        for link in self._learner.values():
            link.send(loaded)
        if self._intake.failures > RELOADS:
            raise WeightsError(f"{self._intake.failures} loads in a row failed, the last: {loaded.error}")

    # ------------------------------------------------------------------------------------------------ leaving

    def _complete(self, sampled: Sampled) -> None:
        running = self._running[sampled.request_id]
        running.left.discard(sampled.position)
        if not running.left:
            del self._running[sampled.request_id]
        task = running.task
        self._samples_done += 1
        self._mixed += len(sampled.spans) > 1
        completion = Completion(
            group_id=task.group_id,
            index=int(task.indices[sampled.position]),
            attempt=task.attempt,
            iteration=task.iteration,
            purpose=task.purpose,
            problem_id=task.problem_id,
            generator=self._node.identity,
            prompt_ids=task.prompt_ids,
            token_ids=sampled.token_ids,
            behaviour_logprobs=sampled.logprobs,
            spans=pack_spans(sampled.spans),
            finish_reason=sampled.finish_reason,
            temperature=task.temperature,
            max_tokens=task.max_tokens,
            started_s=running.started_s,
            finished_s=time.time(),
            payload=task.payload,
            stage=task.stage,
        )
        self._unacknowledged[key_of(completion)] = completion
        self._outbox.append(completion)

    def _send(self) -> None:
        while self._outbox and (peer := self._credits.best()) is not None:
            completion = self._outbox.popleft()
            key = key_of(completion)
            if key not in self._unacknowledged:
                continue
            self._rewarders[peer].send(completion)
            self._credits.sent(peer)
            self._sent_to[key] = peer

    def _give_credits(self) -> None:
        """As many groups as the free slots hold, unless finished completions pile up before the reward actors."""
        load = self._engine.load
        free = load.capacity - load.running - load.waiting
        wanted = 0 if len(self._outbox) >= load.capacity or self._engine.version is None else max(0, -(-free // self._group_size))
        version = self._engine.version or Version(-1)
        total = max(self._granted[0], self._groups_taken + wanted)
        if (total, version.number) != self._granted:
            self._granted = (total, version.number)
            for link in self._tasks.values():
                link.send(Credit(total=total, loaded=(version.number, version.incarnation)))

    def _wait(self) -> tuple[str, str, str]:
        if self._engine.version is None:
            return "waiting:first weights", "learner", ""
        if self._outbox:
            return "waiting:reward credit", "rewarder", f"{len(self._outbox)} completions wait to be scored"
        return "waiting:tasks", "dispatcher", ""

    def _facts(self) -> dict[str, Any]:
        """For `rlsys why`: the loaded version, and where the groups are that are here, oldest first."""
        version, tokens = self._engine.version, self._engine.load.progress
        groups = [
            (r.task.group_id, len(r.left), tokens.get(request_id, 0), r.task.max_tokens, r.started_s)
            for request_id, r in islice(self._running.items(), FACTS)
        ]
        sent: dict[tuple[int, str], int] = {}
        for key in islice(self._unacknowledged, 8 * FACTS):
            place = (key[0], self._sent_to.get(key, ""))
            sent[place] = sent.get(place, 0) + 1
        return {
            "version": version.number if version else -1,
            "announced": self._intake.announced,
            "running": groups,
            "sent": [(group, peer, count) for (group, peer), count in islice(sent.items(), FACTS)],
            "outbox": len(self._outbox),
        }

    def _gauges(self) -> dict[str, float]:
        load = self._engine.load
        return {
            "generator/tokens": load.tokens_sampled,
            "generator/running": load.running,
            "generator/waiting": load.waiting,
            "generator/outbox": len(self._outbox),
            "generator/unacknowledged": len(self._unacknowledged),
            "generator/samples": self._samples_done,
            "generator/mixed_samples": self._mixed,
            "generator/swaps": load.swaps,
        }
