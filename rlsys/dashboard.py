"""The dashboard: gathers what every process observed, and writes it where people and tools look.

    every process --Metrics, Intervals, Event--> [ dashboard ] --> tensorboard/, metrics.jsonl, events/ ; Snapshot --> supervisor

It waits for observations alone and wakes nobody: the ring runs on without it.
"""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict, deque
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.summary import Writer

from protocol.errors import RunEnded
from protocol.intervals import is_waiting
from protocol.messages import Event, Intervals, Metrics, Snapshot
from protocol.node import Node
from rlsys.config import RunConfig

SNAPSHOT_S = 0.5
RATE_WINDOW_S = 5.0
"""Counters arrive twice a second, so rates over shorter times would jump."""
EVENTS_BYTES = 32 << 20
"""Of a track's file before it is moved aside; with the old one, at most twice that. A busy track writes about 2 kB/s: hours."""


def curves(directory: Path) -> Any:
    """A TensorBoard writer into `directory`; here because tensorboard has this one door."""
    return Writer(str(directory))


def role_of(identity: str) -> str:
    """ "generator-0@1" -> "generator"."""
    return identity.rpartition("-")[0]


def finite(value: float) -> float | None:
    """JSON knows no NaN: what is not a finite number is null."""
    return value if math.isfinite(value) else None


class Fleets:
    """Sums over the processes of each role: cumulative gauges become rates, intervals become idle shares. Pure."""

    def __init__(self) -> None:
        self._gauges: dict[str, dict[str, float]] = {}
        self._busy_s: dict[str, float] = defaultdict(float)
        self._total_s: dict[str, float] = defaultdict(float)
        self._history: deque[tuple[float, dict[str, float]]] = deque()

    def gauge(self, identity: str, values: dict[str, float]) -> None:
        """The newest numbers of one process."""
        self._gauges.setdefault(identity, {}).update(values)

    def intervals(self, message: Intervals) -> None:
        """Add busy and waiting time of one process; its main track counts."""
        if message.track:
            return
        role = role_of(message.identity)
        seconds = (message.rows[:, 2] - message.rows[:, 1]) / 1e6
        waiting = np.array([is_waiting(name) for name in message.names], bool)[message.rows[:, 0]]
        self._busy_s[role] += float(seconds[~waiting].sum())
        self._total_s[role] += float(seconds.sum())

    def sum(self, name: str) -> float:
        """A gauge over all processes."""
        return sum(values.get(name, 0.0) for values in self._gauges.values())

    def sums(self, prefix: str) -> dict[str, float]:
        """All gauges whose names start with `prefix`, over all processes."""
        names = {name for values in self._gauges.values() for name in values if name.startswith(prefix)}
        return {name: self.sum(name) for name in sorted(names)}

    def window(self, now_s: float) -> dict[str, float]:
        """Rates over RATE_WINDOW_S or the last call, whichever is longer ago; idle shares since the last call."""
        counters = {
            "sampling": self.sum("generator/tokens"),
            "scoring": self.sum("rewarder/scored"),
            "training": self.sum("learner/tokens"),
        }
        while len(self._history) > 1 and now_s - self._history[1][0] >= RATE_WINDOW_S:
            self._history.popleft()
        values = {}
        if self._history and now_s > self._history[0][0]:
            then_s, then = self._history[0]
            values["throughput/sampled_tokens_per_s"] = (counters["sampling"] - then["sampling"]) / (now_s - then_s)
            values["throughput/scored_samples_per_s"] = (counters["scoring"] - then["scoring"]) / (now_s - then_s)
            values["throughput/trained_tokens_per_s"] = (counters["training"] - then["training"]) / (now_s - then_s)
        self._history.append((now_s, counters))
        for role, total in self._total_s.items():
            if total > 0:
                values[f"idle/{role}"] = 1.0 - self._busy_s[role] / total
        self._busy_s.clear()
        self._total_s.clear()
        return values

    def queues(self) -> dict[str, float]:
        """How much waits where."""
        return {
            "queues/groups_outstanding": self.sum("dispatcher/groups_outstanding"),
            "queues/samples_running": self.sum("generator/running"),
            "queues/samples_waiting": self.sum("generator/waiting"),
            "queues/completions_unscored": self.sum("generator/outbox") + self.sum("rewarder/queued"),
            "queues/completions_unacknowledged": self.sum("generator/unacknowledged"),
        }


class BoundedLines:
    """A file of lines that is moved to `old/` past `most_bytes`, where it replaces the one before."""

    def __init__(self, path: Path, most_bytes: int) -> None:
        self._path, self._most_bytes = path, most_bytes
        self._file = path.open("a", buffering=1)
        self._size = path.stat().st_size

    def write(self, line: str) -> None:
        """Append one line."""
        if self._size and self._size + len(line) > self._most_bytes:
            self._file.close()
            old = self._path.parent / "old"
            old.mkdir(exist_ok=True)
            self._path.replace(old / self._path.name)
            self._file, self._size = self._path.open("a", buffering=1), 0
        self._size += self._file.write(line + "\n")

    def close(self) -> None:
        self._file.close()


class Dashboard:
    """The loop of the dashboard process."""

    def __init__(self, node: Node, config: RunConfig) -> None:
        self._node, self._config = node, config
        self._observations = node.serve("observe")
        run_dir = Path(node.spec.run_dir)
        self._metrics = (run_dir / "metrics.jsonl").open("a", buffering=1)
        self._events_dir = run_dir / "events"
        self._events_dir.mkdir(exist_ok=True)
        self._tracks: dict[str, BoundedLines] = {}
        self._board = curves(run_dir / "tensorboard")
        self._fleets = Fleets()
        self._values: dict[str, Any] = {"iteration": 0, "iterations": config.iterations, "rewards": []}
        self._rewards: deque[float] = deque(maxlen=200)
        self._next_s = 0.0

    def run(self) -> None:
        """Write until the run ends, and then what arrives in a last moment."""
        self._node.start()
        try:
            while True:
                self._node.recorder.enter("waiting:observations", "everyone")
                self._node.poll(SNAPSHOT_S)
                self._node.recorder.enter("writing")
                self._take()
                if time.monotonic() >= self._next_s:
                    self._next_s = time.monotonic() + SNAPSHOT_S
                    self._snapshot()
        except RunEnded:
            self._drain()
            raise
        finally:
            self._board.close()
            self._metrics.close()
            for track in self._tracks.values():
                track.close()

    def _drain(self) -> None:
        """Other processes flush when they end: take that too, until nothing has come for a while."""
        quiet_since = time.monotonic()
        deadline = quiet_since + 3.0
        while time.monotonic() < min(deadline, quiet_since + 1.0):
            if self._take():
                quiet_since = time.monotonic()
            try:
                self._node.poll(0.05)
            except RunEnded:
                pass

    def _take(self) -> int:
        count = 0
        for _, message in self._observations.receive():
            count += 1
            if isinstance(message, Metrics) and message.iteration < 0:
                self._fleets.gauge(message.identity, message.values)
            elif isinstance(message, Metrics):
                self._iteration(message)
            elif isinstance(message, Intervals):
                self._fleets.intervals(message)
                rows = {"offset_s": message.offset_s, "names": message.names, "rows": message.rows.tolist()}
                name = message.identity.partition("@")[0] + (f"+{message.track}" if message.track else "")
                self._track(name).write(json.dumps(rows))
            elif isinstance(message, Event):
                self._event(message)
        return count

    def _track(self, name: str) -> BoundedLines:
        if name not in self._tracks:
            self._tracks[name] = BoundedLines(self._events_dir / f"{name}.jsonl", EVENTS_BYTES)
        return self._tracks[name]

    def _iteration(self, message: Metrics) -> None:
        """The learner finished an iteration: everything of this moment is written at that step."""
        if role_of(message.identity) != "learner":
            return
        values = {**message.values, **self._fleets.window(message.time_s), **self._fleets.queues(), **self._fleets.sums("verdict/")}
        self._write(message.iteration, message.time_s, values)
        self._rewards.append(values.get("reward/mean", float("nan")))
        self._values.update(
            iteration=message.iteration + 1, rewards=[round(r, 4) for r in self._rewards], last={k: round(v, 6) for k, v in values.items()}
        )

    def _event(self, message: Event) -> None:
        record = {"time_s": message.time_s, "identity": message.identity, "event": message.name, **message.data}
        self._metrics.write(json.dumps(record) + "\n")
        if message.name == "eval":
            self._write(
                message.data["version"],
                message.time_s,
                {
                    "eval/pass_at_1": message.data["pass_at_1"],
                    "eval/problems": message.data["problems"],
                    "eval/failed": message.data["failed"],
                },
            )

    def _write(self, step: int, time_s: float, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._board.add_scalar(name, value, step=step)
        self._board.flush()
        self._metrics.write(
            json.dumps({"time_s": round(time_s, 3), "iteration": step, **{name: finite(value) for name, value in values.items()}}) + "\n"
        )

    def _snapshot(self) -> None:
        values = {**self._values, "queues": self._fleets.queues(), "sampled_tokens": self._fleets.sum("generator/tokens")}
        self._node.tell(Snapshot(time_s=time.time(), values=values))
