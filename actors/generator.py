"""A generator actor: one engine, fed with groups, giving back completions one by one as they end.

    dispatcher --GroupTask--> [ engine ] --Completion--> reward actors      (to the one with the most credit; kept until acknowledged)
        ^-----Credit, loaded version-/ ^--WeightsReady-- learner            (swapped in flight: later tokens carry the new version)

It waits for: the first weights (learner), tasks (dispatcher), credit (reward actors). It wakes: reward actors, the dispatcher.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from actors.engines import Engine, EngineLoad, Sampled, SampleRequest, Sampling
from actors.network_weights import NetworkWeights
from actors.weights import WeightsIntake
from protocol.channels import Link
from protocol.credits import Outgoing
from protocol.errors import RunEnded, WeightsError
from protocol.messages import (
    Ack,
    Completion,
    Credit,
    GroupTask,
    Hello,
    Holdings,
    Inventory,
    Version,
    WeightsLoaded,
    WeightsReady,
    key_of,
    pack_spans,
)
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
    """A group in the engine, or in quarantine."""

    task: GroupTask
    left: set[int]
    """Places in the task's indices that are not done."""
    places: list[int]
    """Place of each position of the request that the engine has."""
    started_s: float
    requests: int = 0
    """How often it was given to the engine: again after a quarantine."""


class Generator:
    """The loop of one generator actor. `group_size` turns free slots into credits, which are counted in groups."""

    def __init__(
        self,
        node: Node,
        engine: Engine,
        group_size: int,
        dtype: str = "float32",
        device: str = "cpu",
        weights: Path | None = None,
        network: NetworkWeights | None = None,
    ) -> None:
        """`weights` is where this host sees the versions, if not where the learner says; with `network` they are brought here first."""
        self._device = device
        self._node, self._engine, self._group_size = node, engine, group_size
        self._network = network
        if network is not None:
            weights = network.directory
        self._intake = WeightsIntake(node.identity, engine, dtype, weights, network.fetcher if network else None)
        self._wake_fd: int | None = getattr(engine, "wake_fd", None)
        self._loaded: Version | None = None
        self._held: list[_Running] | None = None
        self._restarts = 0
        self._paused_s, self._load_s, self._canary_error = 0.0, 0.0, 0.0
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
        node.progress = lambda: (
            engine.load.tokens_sampled + self._samples_done + self._groups_taken + (network.fetcher.arrivals if network else 0)
        )

    def run(self) -> None:
        """Sample until the run ends."""
        self._node.start()
        if self._wake_fd is not None:
            self._node.watch(self._wake_fd)
        while True:
            load = self._engine.load
            self._node.recorder.enter(*(self._sampling(load) if self._busy(load) else self._wait()))
            self._node.poll(min(load.ready_in_s, IDLE_WAIT_S) if self._busy(load) else IDLE_WAIT_S)
            self._receive()
            self._load_weights()
            load = self._engine.load
            if self._busy(load) or self._wake_fd is not None:
                if self._busy(load):
                    self._node.recorder.enter(*self._sampling(load))
                for sampled in self._engine.step(IDLE_WAIT_S if self._wake_fd is None else 0.0):
                    self._complete(sampled)
                self._tell_faults()
            self._send()
            self._give_credits()
            self._leave_when_empty()

    def _leave_when_empty(self) -> None:
        """Told to leave: go once every sample is done and journaled. A task that is still on the wire then is issued again to another."""
        if self._node.leaving and not (self._running or self._held or self._unacknowledged):
            raise RunEnded(f"nothing is left to do here, and it was told to leave: {self._node.leaving}")

    def _busy(self, load: EngineLoad) -> bool:
        """Whether the engine samples; one that has lost its weights only waits for them."""
        return load.running + load.waiting > 0 and self._engine.version is not None

    def _sampling(self, load: EngineLoad) -> tuple[str, str, str]:
        return ("waiting:engine", "", f"its {load.trouble.server} {load.trouble.doing}") if load.trouble else ("decode", "", "")

    def _tell_faults(self) -> None:
        """An engine that lost its server says so; it mends itself once weights are loaded again, which `pending` now asks for."""
        load = self._engine.load
        if load.restarts != self._restarts:
            self._restarts = load.restarts
            log.error("the engine lost its server and starts it again (%d so far): %s", load.restarts, load.fault)
            self._node.event("engine restarted", fault=load.fault, restarts=load.restarts, unfinished=load.waiting)

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
            for running in (*self._running.values(), *(self._held or ()))
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
        loaded = self._loaded  # what a credit told the dispatcher; should the engine have lost it, nothing older follows
        if loaded is None or loaded.number < task.min_version:
            raise AssertionError(f"group {task.group_id} needs version {task.min_version}, {loaded} is loaded: a bug of the dispatcher")
        running = _Running(task, set(range(len(task.indices))), [], time.time())
        if self._held is not None:
            self._held.append(running)
        else:
            self._submit(running)

    def _submit(self, running: _Running) -> None:
        task = running.task
        request_id = f"{task.group_id}/{task.attempt}" + (f"~{running.requests}" if running.requests else "")
        running.requests += 1
        running.places = sorted(running.left)
        self._running[request_id] = running
        sampling = Sampling(
            max_tokens=task.max_tokens,
            temperature=task.temperature,
            top_p=task.top_p,
            top_k=task.top_k,
            stop_token_ids=tuple(task.stop_token_ids.tolist()),
        )
        seeds = tuple(int(task.seeds[place]) for place in running.places)
        self._engine.submit(SampleRequest(request_id=request_id, prompt_ids=task.prompt_ids, seeds=seeds, sampling=sampling))

    def _load_weights(self) -> None:
        lost = self._intake.lost()
        if lost is not None:
            for link in self._learner.values():
                link.send(lost)
        ready = self._intake.pending
        if ready is None:
            if lost is not None:
                self._give_up_after(lost.error)
            return
        with self._node.recorder.during("swap weights", "learner", f"v{ready.number}", iteration=ready.number):
            self._node.beat()  # loading may take long and cannot be interrupted: say so before
            loaded = self._away(lambda: self._intake.load(ready), ready)
        self._tell_faults()
        for link in self._learner.values():
            link.send(loaded)
        self._paused_s, self._load_s = self._paused_s + loaded.pause_s, loaded.load_s
        self._canary_error = 0.0 if math.isnan(loaded.canary_error) else loaded.canary_error
        if self._intake.quarantined:
            self._hold(loaded.error)
        elif not loaded.error:
            self._loaded = Version(ready.number, ready.incarnation)
            self._release()
        self._give_up_after(loaded.error)

    def _give_up_after(self, error: str) -> None:
        if self._intake.failures > RELOADS:
            raise WeightsError(f"{self._intake.failures} loads in a row failed, the last: {error}")

    def _away(self, call: Callable[[], WeightsLoaded], ready: WeightsReady) -> WeightsLoaded:
        """Do what may take minutes in a thread of its own, for an engine that works elsewhere; meanwhile say that this process lives.

        When the run ends meanwhile the thread is left behind: closing the engine ends what it waits for.
        """
        if self._wake_fd is None:
            return call()
        done: Future[WeightsLoaded] = Future()

        def work() -> None:
            try:
                done.set_result(call())
            except BaseException as error:  # handed over, not swallowed: `result` raises it
                done.set_exception(error)
            self._node.wake()

        threading.Thread(target=work, name="load weights", daemon=True).start()
        while not done.done():
            trouble = self._engine.load.trouble
            if trouble is not None and trouble.doing in ("starts", "is awaited"):
                within = f", within {trouble.limit_s:.0f} s" if trouble.limit_s else ""
                self._node.recorder.enter("start server", "", trouble.server + within, iteration=ready.number)
            else:
                self._node.recorder.enter("swap weights", "learner", f"v{ready.number}", iteration=ready.number)
            self._tell_faults()
            self._node.poll(IDLE_WAIT_S)
        return done.result()

    def _hold(self, why: str) -> None:
        """Quarantine: what the engine samples now is not to be trusted. Take everything back; it is sampled again once weights have proved good."""
        self._node.event("quarantine", reason=why, groups=len(self._running))
        left = sum(len(running.left) for running in self._running.values())
        for request_id in list(self._running):
            self._engine.abort(request_id)
        while left:
            left -= len(self._engine.step(IDLE_WAIT_S))  # thrown away, also what ended by itself between the swap and the canary
            self._node.poll(0.0)
        self._held = [*(self._held or []), *self._running.values()]
        self._running.clear()

    def _release(self) -> None:
        held, self._held = self._held or [], None
        for running in held:
            self._submit(running)

    # ------------------------------------------------------------------------------------------------ leaving

    def _complete(self, sampled: Sampled) -> None:
        running = self._running[sampled.request_id]
        place = running.places[sampled.position]
        running.left.discard(place)
        if not running.left:
            del self._running[sampled.request_id]
        task = running.task
        self._samples_done += 1
        self._mixed += len(sampled.spans) > 1
        completion = Completion(
            group_id=task.group_id,
            index=int(task.indices[place]),
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
        for leaver in self._node.leavers:
            self._credits.drop_peer(leaver)
        while self._outbox and (peer := self._credits.best()) is not None:
            completion = self._outbox.popleft()
            key = key_of(completion)
            if key not in self._unacknowledged:
                continue
            self._rewarders[peer].send(completion)
            self._credits.sent(peer)
            self._sent_to[key] = peer

    def _give_credits(self) -> None:
        """As many groups as the free slots hold. Completions that wait for reward actors take no slot: the pacing rule bounds how many there are."""
        load = self._engine.load
        free = load.capacity - load.running - load.waiting
        version = (None if self._held is not None else self._engine.version) or Version(-1)
        wanted = 0 if version.number < 0 or self._node.leaving else max(0, -(-free // self._group_size))
        total = max(self._granted[0], self._groups_taken + wanted)
        if (total, version.number) != self._granted:
            self._granted = (total, version.number)
            for link in self._tasks.values():
                link.send(Credit(total=total, loaded=(version.number, version.incarnation)))

    def _wait(self) -> tuple[str, str, str]:
        if self._engine.version is None:
            return "waiting:first weights", "learner", self._fetching() or self._engine.load.fault
        if self._outbox:
            return "waiting:reward credit", "rewarder", f"{len(self._outbox)} completions wait to be scored"
        return "waiting:tasks", "dispatcher", ""

    def _fetching(self) -> str:
        """What is under way from other hosts, in words."""
        if self._network is None:
            return ""
        number, left, cells, last_s = self._network.fetcher.progress  # once: it is of another thread
        if number < 0:
            return ""
        return f"{cells - left} of {cells} pieces of v{number} have come, the last {time.monotonic() - last_s:.0f} s ago"

    def _facts(self) -> dict[str, Any]:
        """For `rlsys why`: the loaded version, what is up with the engine's server, and where the groups are that are here, oldest first."""
        load = self._engine.load
        version, tokens, trouble = self._engine.version, load.progress, load.trouble
        groups = [
            (r.task.group_id, len(r.left), tokens.get(request_id, 0), r.task.max_tokens, r.started_s)
            for request_id, r in islice(self._running.items(), FACTS)
        ]
        sent: dict[tuple[int, str], int] = {}
        for key in islice(self._unacknowledged, 8 * FACTS):
            place = (key[0], self._sent_to.get(key, ""))
            sent[place] = sent.get(place, 0) + 1
        return {
            "device": self._device,
            "version": version.number if version else -1,
            "announced": self._intake.announced,
            "fetching": self._fetching(),
            "server": [trouble.server, trouble.doing, trouble.for_s, trouble.detail[:300], trouble.limit_s] if trouble else [],
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
            "generator/capacity": load.capacity,
            "generator/restarts": load.restarts,
            "generator/pause_s": self._paused_s,
            "generator/load_s": self._load_s,
            "generator/canary_error": self._canary_error,
            **(self._network.gauges() if self._network else {}),
        }
