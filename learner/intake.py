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
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from learner.batcher import Assembler, Batch, Batcher, Group, outcome
from learner.recovery import TRAJECTORY
from learner.recovery import Journaled as OnRecord
from protocol.channels import Link
from protocol.codec import encode
from protocol.credits import Incoming
from protocol.intervals import Recorder, record_here
from protocol.journal import Journal
from protocol.ledger import Ledger
from protocol.messages import (
    Ack,
    Credit,
    Distribution,
    GroupOutcome,
    Hello,
    Journaled,
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
CLOSE_S = 30.0
"""Longest wait for the thread to end: it may be writing to a disk that is busy."""
CREDIT_WINDOW = 4096
"""Trajectories that all reward actors together may have under way to the learner. Journaling one costs microseconds."""


class Intake:
    """Owns the learner's node. `start` begins the thread; `close` ends it."""

    def __init__(self, node: Node, assembler: Assembler, batcher: Batcher, journal: Journal, ledger: Ledger) -> None:
        self._node, self._assembler, self._batcher, self._journal, self._ledger = node, assembler, batcher, journal, ledger
        self._run = node.transport.run
        self._trajectories = node.serve("trajectories", on_gone=self._rewarder_gone)
        self._weights = node.serve("weights", on_gone=self._reader_gone)
        self._dispatchers = node.join("outcomes", on_link=self._greet)
        self._incoming = Incoming(CREDIT_WINDOW)
        self._lock = threading.Condition()
        self._outgoing: deque[Message] = deque()
        self._readers: set[str] = set()
        self._newest: WeightsReady | None = None
        self._uncommitted: dict[int, GroupOutcome] = {}
        """Told to the dispatcher, and in the ledger with the next commit."""
        self._on_record: dict[int, list[tuple[int, int, int]]] = {}
        """Keys of journaled samples, by group, until the group's terminal state is in the ledger."""
        self._holding = False
        self._segments: dict[int, int] = {}
        """Oldest journal segment of each of these groups."""
        self._error: BaseException | None = None
        self.received = 0
        self._wanted = -1
        self._track = node.track("intake")
        self._thread = threading.Thread(target=self._loop, name="intake", daemon=True)

    # ------------------------------------------------------------------------------------------------ for the trainer's thread

    def restore(self, on_record: Iterable[OnRecord]) -> None:
        """Take what an earlier learner journaled; until `caught_up` nothing is decided about training groups. Call it before `start`."""
        ended: list[GroupOutcome] = []
        with self._lock:
            self._holding = True
            for found in on_record:
                ended += self._keep(found.trajectory, found.segment)
        self._end_now(ended)

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
        self._end_now(batch.given_up)
        return batch

    def retake(self, iteration: int, group_ids: Sequence[int]) -> Batch:
        """A batch as it was recorded before a restart."""
        with self._lock:
            return self._batcher.retake(iteration, group_ids)

    def caught_up(self) -> None:
        """Every recorded batch has been built again: from now on complete groups are decided on when they come."""
        with self._lock:
            self._holding = False
            ended = self._batcher.settle()
        self._end_now(ended)

    def wait_end(self, recorder: Recorder) -> None:
        """Serve until the run stops (evaluation goes on after the last iteration). What is still issued for training is unfinished."""
        while True:
            with self._lock:
                unfinished = self._batcher.leave_over(self._issued(), self._assembler)
            self._end_now(unfinished)
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

    def end_groups(self, outcomes: Sequence[GroupOutcome]) -> None:
        """Tell the dispatcher of terminal states; they are written with the next commit."""
        with self._lock:
            self._uncommitted |= {outcome.group_id: outcome for outcome in outcomes}
            self._outgoing.extend(outcomes)
        self._node.wake()

    def to_commit(self) -> tuple[tuple[GroupOutcome, ...], int]:
        """Terminal states that the next commit writes, and the oldest journal segment that is needed once they are written."""
        with self._lock:
            needed = [segment for group, segment in self._segments.items() if group not in self._uncommitted]
            return tuple(self._uncommitted.values()), min([*needed, self._journal.position[0]])

    def committed(self, outcomes: Iterable[GroupOutcome]) -> None:
        """These stand in the ledger."""
        with self._lock:
            for ended in outcomes:
                self._uncommitted.pop(ended.group_id, None)
                self._forget(ended.group_id)

    def _end_now(self, outcomes: Sequence[GroupOutcome]) -> None:
        """Terminal states that no update depends on: written at once, then told."""
        if not outcomes:
            return
        self._ledger.ended(outcomes)
        with self._lock:
            for ended in outcomes:
                self._forget(ended.group_id)
            self._outgoing.extend(outcomes)
        self._node.wake()

    def _forget(self, group_id: int) -> None:
        self._on_record.pop(group_id, None)
        self._segments.pop(group_id, None)

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
                "complete": self._batcher.ready[:MANY_FACTS] if self._wanted >= 0 else [],
            }

    def show(self, messages: Sequence[Distribution | Trajectory]) -> None:
        """Send the dashboard what people look at."""
        with self._lock:
            self._outgoing.extend(messages)
        self._node.wake()

    def close(self) -> None:
        """End the thread and wait for it: its sockets, the journal and the ledger are closed next. Nothing happens when it was never started."""
        self._node.stop("closing")
        if self._thread.ident is not None:
            self._thread.join(CLOSE_S)

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
        record_here(self._track)
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
        journaled: list[tuple[int, int, int]] = []
        for peer, message in self._trajectories.receive():
            if isinstance(message, Hello):
                self._incoming.add_peer(peer)
            elif isinstance(message, Trajectory):
                self._incoming.done(peer)
                self.received += 1
                acknowledged.setdefault(peer, []).append(key_of(message))
                with self._lock:
                    if self._assembler.holds(message):
                        self._assembler.add(message)  # counted and dropped
                        continue
                    segment, _ = self._journal.append([TRAJECTORY, *encode(message, self._run)])
                    journaled.append(key_of(message))
                    ended += self._keep(message, segment)
        if journaled:
            for link in self._dispatchers.values():
                link.send(Journaled(keys=np.array(journaled, np.int64)))
        for peer, keys in acknowledged.items():
            self._trajectories.send(peer, Ack(keys=np.array(keys, np.int64)))
        for peer, total in self._incoming.grants():
            self._trajectories.send(peer, Credit(total=total))
        self._end_now(ended)

    def _keep(self, trajectory: Trajectory, segment: int) -> list[GroupOutcome]:
        """A trajectory that is on record. Returns the terminal states that follow from it."""
        self._on_record.setdefault(trajectory.group_id, []).append(key_of(trajectory))
        self._segments.setdefault(trajectory.group_id, segment)
        group = self._assembler.add(trajectory)
        return [] if group is None else self._complete(group)

    def _complete(self, group: Group) -> list[GroupOutcome]:
        """A training group waits for its batch; an evaluation group ends here."""
        first = group.trajectories[0]
        if first.purpose == "train":
            if self._holding:
                self._batcher.hold(group)
                return []
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
                newest = self._newest
                if message.error and newest is not None and (message.number, message.incarnation) < (newest.number, newest.incarnation):
                    self._weights.send(peer, newest)  # that one may have been removed already: it shall take the newest
                elif message.error:
                    log.warning("%s could not load v%d: %s", message.generator, message.number, message.error)
                    self._node.event("weights refused", generator=message.generator, version=message.number, error=message.error)
                    if newest is not None:
                        self._weights.send(peer, newest)  # once more; the actor itself gives up after that

    def _rewarder_gone(self, identity: str) -> None:
        self._incoming.drop_peer(identity)

    def _reader_gone(self, identity: str) -> None:
        self._readers.discard(identity)

    def _greet(self, link: Link) -> None:
        """A dispatcher appeared: it hears what is on record without a terminal state in the ledger, and the states that are not there yet."""
        spec = self._node.spec
        with self._lock:
            keys = [key for known in self._on_record.values() for key in known]
            holds = np.array(keys, np.int64).reshape(-1, 3)
            link.send(Hello(role="learner", index=spec.index, identity=self._node.identity, epoch=spec.epoch, holds=holds))
            for known in self._uncommitted.values():
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
