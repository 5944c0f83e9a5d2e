"""The learner's ear: a thread that takes trajectories, journals them, acknowledges them, and assembles groups, while the trainer computes.

    reward actors --Trajectory--> [ journal -> groups ] --batch k--> trainer (its own thread)
          ^--Credit, Ack (after the journal has it)--/
    generators, dispatcher <--WeightsReady-- | --GroupOutcome--> dispatcher

All sockets of the learner belong to this thread. The trainer calls `wait_batch`, `announce` and `end_groups`, which hand over under a lock.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from learner.batcher import Assembler, Batch, Batcher, Group, outcome
from protocol.channels import Link
from protocol.codec import encode
from protocol.credits import Incoming
from protocol.intervals import Recorder
from protocol.journal import Journal
from protocol.ledger import Ledger
from protocol.messages import (
    Ack,
    Credit,
    Distribution,
    GroupOutcome,
    Hello,
    Message,
    Metrics,
    Trajectory,
    WeightsLoaded,
    WeightsReady,
    key_of,
)
from protocol.node import Node

log = logging.getLogger("rlsys.learner")

FACTS, MANY_FACTS = 64, 1024
"""Most groups that a heartbeat names: incomplete ones with what they lack, and complete ones by their number alone."""
CREDIT_WINDOW = 4096
"""Trajectories that all reward actors together may have under way to the learner. Journaling one costs microseconds."""


class Intake:
    """Owns the learner's node. `start` begins the thread; `close` ends it."""

    def __init__(self, node: Node, assembler: Assembler, batcher: Batcher, journal: Journal, ledger: Ledger) -> None:
        self._node, self._assembler, self._batcher, self._journal, self._ledger = node, assembler, batcher, journal, ledger
        self._run = node.transport.run
        self._trajectories = node.serve("trajectories")
        self._weights = node.serve("weights")
        self._dispatchers = node.join("outcomes", on_link=self._greet)
        self._incoming = Incoming(CREDIT_WINDOW)
        self._lock = threading.Condition()
        self._outgoing: deque[Message] = deque()
        self._readers: set[str] = set()
        self._newest: WeightsReady | None = None
        self._outcomes: list[GroupOutcome] = []
        self._error: BaseException | None = None
        self.loaded: deque[WeightsLoaded] = deque(maxlen=10_000)
        self.received = 0
        self._wanted = -1
        self._track = node.track("intake")
        self._thread = threading.Thread(target=self._loop, name="intake", daemon=True)

    # ------------------------------------------------------------------------------------------------ for the trainer's thread

    def start(self) -> None:
        """Register with the supervisor and begin to take trajectories."""
        self._thread.start()

    def wait_batch(self, iteration: int, recorder: Recorder) -> Batch:
        """Block until batch `iteration` is complete. Raises RunEnded when the run stops first."""
        with self._lock:
            while (missing := self._batcher.missing(iteration)) > 0:
                self._wanted = iteration
                detail = f"{missing} groups of iteration {iteration}{self._who()}"
                recorder.enter("waiting:trajectories", "rewarder", detail, iteration=iteration)
                self._lock.wait(1.0)
                self._raise()
            self._wanted = -1
            recorder.enter("build batch", iteration=iteration)
            batch = self._batcher.take(iteration, self._issued(), self._assembler)
        self.end_groups(batch.given_up)
        return batch

    def wait_end(self, recorder: Recorder) -> None:
        """Serve until the run stops (evaluation goes on after the last iteration). What is still issued for training is unfinished."""
        while True:
            with self._lock:
                unfinished = self._batcher.leave_over(self._issued(), self._assembler)
            self.end_groups(tuple(unfinished))
            with self._lock:
                recorder.enter("waiting:end of run", "dispatcher", "the last evaluation")
                self._lock.wait(1.0)
                self._raise()

    @property
    def groups_taken(self) -> int:
        """Training groups that had a place in a batch, over the whole run."""
        return self._batcher.groups_taken

    def _issued(self) -> dict[int, str]:
        """Training groups without a terminal state in the ledger, with their problems; asked for only where some may be given up."""
        batcher = self._batcher
        return self._ledger.open_groups() if batcher.rule.stragglers == "drop" or batcher.line.finished else {}

    def announce(self, ready: WeightsReady) -> None:
        """Tell every generator and the dispatcher, now and when they say Hello later."""
        with self._lock:
            self._newest = ready
            self._outgoing.append(ready)
        self._node.wake()

    def end_groups(self, outcomes: tuple[GroupOutcome, ...]) -> None:
        """Write terminal states to the ledger and tell the dispatcher."""
        if not outcomes:
            return
        self._ledger.ended(outcomes)
        with self._lock:
            self._outcomes.extend(outcomes)
            self._outgoing.extend(outcomes)
        self._node.wake()

    def report(self, iteration: int, values: dict[str, float]) -> None:
        """Send the numbers of one iteration to the dashboard."""
        message = Metrics(identity=self._node.identity, iteration=iteration, time_s=time.time(), values=values)
        with self._lock:
            self._outgoing.append(message)
        self._node.wake()

    def facts(self) -> dict[str, Any]:
        """For `rlsys why`: the newest version, the iteration that is waited for, and its groups, incomplete and complete."""
        with self._lock:
            newest = self._newest
            return {
                "version": newest.number if newest else -1,
                "published_s": newest.published_s if newest else 0.0,
                "wanted": self._wanted,
                "missing": sorted(self._assembler.open_groups.items())[:FACTS],
                "complete": self._batcher.complete(self._wanted)[:MANY_FACTS] if self._wanted >= 0 else [],
            }

    def show(self, messages: Sequence[Distribution | Trajectory]) -> None:
        """Send the dashboard what people look at."""
        with self._lock:
            self._outgoing.extend(messages)
        self._node.wake()

    def close(self) -> None:
        """End the thread, waiting a moment for it. Nothing happens when it was never started."""
        self._node.stop("closing")
        if self._thread.ident is not None:
            self._thread.join(timeout=3.0)

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _who(self) -> str:
        open_groups = self._assembler.open_groups
        if not open_groups:
            return ""
        group_id, missing = min(open_groups.items())
        return f"; group {group_id} lacks {missing} samples"

    # ------------------------------------------------------------------------------------------------ the thread

    def _loop(self) -> None:
        try:
            self._node.start()
            while True:
                self._track.enter("waiting:trajectories", "rewarder")
                self._node.poll(1.0)
                self._track.enter("journal")
                self._take_trajectories()
                self._greet_readers()
                self._send()
        except BaseException as error:  # carried to the trainer's thread, which raises it
            with self._lock:
                self._error = error
                self._lock.notify_all()

    def _take_trajectories(self) -> None:
        acknowledged: dict[str, list[tuple[int, int, int]]] = {}
        ended: list[GroupOutcome] = []
        for peer, message in self._trajectories.receive():
            if isinstance(message, Hello):
                self._incoming.add_peer(peer)
            elif isinstance(message, Trajectory):
                self._incoming.done(peer)
                self.received += 1
                acknowledged.setdefault(peer, []).append(key_of(message))
                with self._lock:
                    if not self._assembler.holds(message):
                        self._journal.append([b"trajectory", *encode(message, self._run)])
                    group = self._assembler.add(message)
                    if group is not None:
                        ended += self._complete(group)
        for peer, keys in acknowledged.items():
            self._trajectories.send(peer, Ack(keys=np.array(keys, np.int64)))
        for peer, total in self._incoming.grants():
            self._trajectories.send(peer, Credit(total=total))
        if ended:
            self.end_groups(tuple(ended))

    def _complete(self, group: Group) -> list[GroupOutcome]:
        """A training group waits for its batch; an evaluation group ends here."""
        first = group.trajectories[0]
        if first.purpose == "train":
            ended = self._batcher.add(group)
            self._lock.notify_all()
            return ended
        enough = bool(group.scored)
        return [outcome(group, first.iteration, "evaluated" if enough else "failed", "" if enough else "no sample has a score")]

    def _greet_readers(self) -> None:
        for peer, message in self._weights.receive():
            if isinstance(message, Hello):
                self._readers.add(peer)
                with self._lock:
                    if self._newest is not None:
                        self._weights.send(peer, self._newest)
            elif isinstance(message, WeightsLoaded):
                self.loaded.append(message)
                if message.error:
                    log.warning("%s could not load v%d: %s", message.generator, message.number, message.error)
                    self._node.event("weights refused", generator=message.generator, version=message.number, error=message.error)
                    if self._newest is not None:
                        self._weights.send(
                            peer, self._newest
                        )  # once more, or the newer one that it missed; the actor itself gives up after that

    def _greet(self, link: Link) -> None:
        """A dispatcher appeared: it hears every terminal state again."""
        spec = self._node.spec
        link.send(Hello(role="learner", index=spec.index, identity=self._node.identity, epoch=spec.epoch))
        with self._lock:
            for known in self._outcomes:
                link.send(known)

    def _send(self) -> None:
        with self._lock:
            outgoing, self._outgoing = self._outgoing, deque()
        for message in outgoing:
            if isinstance(message, WeightsReady):
                self._readers = {peer for peer in self._readers if self._weights.send(peer, message)}
            elif isinstance(message, Metrics):
                self._node.flush_intervals()  # first, so that the iteration's idle share counts all of it
                self._node.observe(message)
            elif isinstance(message, Distribution | Trajectory):
                self._node.observe(message)
            else:
                for link in self._dispatchers.values():
                    link.send(message)
