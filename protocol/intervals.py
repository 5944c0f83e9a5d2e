"""One recorder of named busy and waiting intervals, used by every process.

A thread is in exactly one activity at a time, so that the seconds by name sum to the wall time by construction. Each thread that is worth
watching has a recorder of its own, a *track*; the track without a name is the process's main one, and busy and idle shares are of it.
Names of waits start with "waiting:" and name a peer; everything else is work. `ACTIVITIES` lists them all.

    with phase("optimizer"):        # deep inside a library: goes to the recorder of this thread, if it has one
        ...
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import numpy as np

from protocol.clock import now_s
from protocol.messages import Intervals

WAITING = "waiting:"

ACTIVITIES = {
    # every process
    "starting": "importing, loading, binding sockets",
    # dispatcher
    "dispatching": "issuing groups and taking news",
    "waiting:first version": "the learner has published nothing yet",
    "waiting:credits": "no generator has room with the version that the next group needs",
    "waiting:version": "the next version opens the next iteration",
    "waiting:outcomes": "all is issued, groups have no terminal state yet",
    # generator
    "prefill": "reading prompts",
    "decode": "sampling tokens",
    "swap weights": "verifying and loading a version, running samples stand still",
    "start server": "the engine's server is started, or started again",
    "waiting:first weights": "nothing is loaded yet",
    "fetch weights": "the weights' track, on a host that does not see the learner's files: pieces of a version arrive",
    "verify weights": "every byte that came is checked against the manifest",
    "waiting:announcement": "no newer version is announced",
    "waiting:weights": "the learner, or the host that passes them on, sends no pieces",
    "waiting:weights of this host": "another process of this host fetches the version",
    "waiting:tasks": "the engine is empty",
    "waiting:reward credit": "back-pressure: reward actors take no more completions",
    "waiting:engine": "the engine's server shows no life",
    # reward actor, and its scoring threads
    "scoring": "at least one thread scores",
    "read text": "tokens become text",
    "judge": "the reward's own work besides what stands below",
    "run program": "a program, or its compiler, runs in the sandbox",
    "waiting:sandbox": "all cells of the sandbox are taken, or the sandbox service is full or away",
    "waiting:completions": "nothing to score",
    "waiting:learner credit": "back-pressure: the learner takes no more trajectories",
    # learner
    "build batch": "deciding on groups, advantages",
    "journal batch": "the batch record is written and synced",
    "train": "what of a step has no name of its own",
    "pack": "rows and micro-batches are laid out",
    "forward backward": "log-probs, loss, gradients",
    "optimizer": "clipping and the parameter update",
    "publish": "shards and manifest of a version",
    "snapshot": "state is copied to host memory, to be written in the background",
    "commit": "state, hash and ledger row of a checkpoint",
    "save": "the final model",
    "journal": "the intake's track: trajectories are written and acknowledged",
    "waiting:trajectories": "groups of the iteration are incomplete",
    "waiting:ranks": "other ranks of the learner group",
    "waiting:rank 0": "the address of rank 0",
    "waiting:batch": "rank 0's broadcast",
    "waiting:end of run": "this part is done",
    # dashboard
    "writing": "TensorBoard and files",
    "waiting:observations": "nothing has come",
}
"""Every name that is recorded, with its meaning; docs/observe.md has the same table."""

TRAINING = frozenset({"train", "pack", "forward backward", "optimizer"})
"""What makes up a step of the learner."""


def is_waiting(name: str) -> bool:
    """Whether an activity is a wait."""
    return name.startswith(WAITING)


@dataclass(frozen=True, slots=True)
class Activity:
    """What a thread does now: a name, the peer that it waits for, since when, and what for: iteration and group, -1 for none."""

    name: str
    peer: str = ""
    detail: str = ""
    since_s: float = 0.0
    iteration: int = -1
    group: int = -1


class Recorder:
    """The activities of one track. `enter` ends the present one and starts the next; equal neighbours merge.

    Thread-safe, because heartbeats read what the working thread writes. Bounded: at most `max_rows` rows wait for `drain`; past that
    the oldest rows are merged into the totals alone and counted in `rows_lost`. With `keep` False there are totals and no rows.
    """

    def __init__(
        self,
        identity: str,
        first: str = "starting",
        clock: Callable[[], float] = now_s,
        max_rows: int = 100_000,
        *,
        track: str = "",
        keep: bool = True,
    ) -> None:
        self._identity, self._clock, self._max_rows = identity, clock, max_rows
        self.track, self.keep = track, keep
        self._lock = threading.Lock()
        self._started_s = clock()
        self._now = Activity(first, since_s=self._started_s)
        self._rows: list[tuple[str, float, float, int, int]] = []
        self._totals: dict[str, float] = {}
        self.rows_lost = 0
        self.latest = -1
        """The last iteration that an activity named."""

    @property
    def activity(self) -> Activity:
        """The present activity."""
        return self._now

    def enter(self, name: str, peer: str = "", detail: str = "", *, iteration: int = -1, group: int = -1) -> Activity:
        """End the present activity and start `name`. Returns the one that ended, so that a caller can go back to it."""
        with self._lock:
            before = self._now
            if before.name == name and before.peer == peer and before.iteration == iteration and before.group == group:
                if before.detail != detail:
                    self._now = Activity(name, peer, detail, before.since_s, iteration, group)
                return before
            now = self._clock()
            self._close(now)
            self.latest = iteration if iteration >= 0 else self.latest
            self._now = Activity(name, peer, detail, now, iteration, group)
            return before

    @contextmanager
    def during(
        self, name: str, peer: str = "", detail: str = "", *, iteration: int | None = None, group: int | None = None
    ) -> Iterator[None]:
        """`name` for the length of the block, then what was before. Iteration and group are those from before, unless given."""
        now = self._now
        before = self.enter(
            name, peer, detail, iteration=now.iteration if iteration is None else iteration, group=now.group if group is None else group
        )
        try:
            yield
        finally:
            self.enter(before.name, before.peer, before.detail, iteration=before.iteration, group=before.group)

    def _close(self, now: float) -> None:
        activity = self._now
        name = activity.name
        self._totals[name] = self._totals.get(name, 0.0) + now - self._started_s
        if self.keep and now > self._started_s:
            last = self._rows[-1] if self._rows else None
            if last and last[0] == name and last[3:] == (activity.iteration, activity.group) and self._started_s - last[2] < 1e-6:
                self._rows[-1] = (name, last[1], now, *last[3:])
            else:
                self._rows.append((name, self._started_s, now, activity.iteration, activity.group))
        self._started_s = now
        if len(self._rows) > self._max_rows:
            del self._rows[0]
            self.rows_lost += 1

    def totals(self) -> dict[str, float]:
        """Seconds by activity since the start, the present one included. They sum to the time since the start."""
        with self._lock:
            totals = dict(self._totals)
            totals[self._now.name] = totals.get(self._now.name, 0.0) + self._clock() - self._started_s
            return totals

    def drain(self, clock_offset_s: float = 0.0) -> Intervals:
        """The rows since the last call, the present activity cut at this moment, as a message for the dashboard.

        `clock_offset_s` is added to every time, so that the receiver sees all of them on the supervisor's clock.
        """
        with self._lock:
            self._close(self._clock())
            rows, self._rows = self._rows, []
            offset = rows[0][1] if rows else self._started_s
        table = np.zeros((len(rows), 5), np.int64)
        names: list[str] = []
        if rows:
            activities, starts, ends, iterations, groups = zip(*rows, strict=True)
            names = sorted(set(activities))
            place = {name: i for i, name in enumerate(names)}
            table[:, 0] = [place[name] for name in activities]
            table[:, 1] = np.rint((np.array(starts) - offset) * 1e6)
            table[:, 2] = np.rint((np.array(ends) - offset) * 1e6)
            table[:, 3], table[:, 4] = iterations, groups
        return Intervals(identity=self._identity, names=names, rows=table, offset_s=offset + clock_offset_s, track=self.track)


_here: ContextVar[Recorder | None] = ContextVar("recorder", default=None)


def record_here(recorder: Recorder) -> None:
    """From now on, `phase` on this thread goes to `recorder`."""
    _here.set(recorder)


@contextmanager
def phase(name: str, peer: str = "", detail: str = "", *, iteration: int | None = None, group: int | None = None) -> Iterator[None]:
    """`Recorder.during` of this thread's recorder; nothing where there is none."""
    recorder = _here.get()
    if recorder is None:
        yield
        return
    with recorder.during(name, peer, detail, iteration=iteration, group=group):
        yield


def here() -> tuple[int, int]:
    """Iteration and group that this thread is at, or the last iteration that it was at; -1 for none. Logs say it in every line."""
    recorder = _here.get()
    if recorder is None:
        return -1, -1
    now = recorder.activity
    return (now.iteration if now.iteration >= 0 else recorder.latest), now.group
