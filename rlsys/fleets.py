"""Sums over the processes of each role: cumulative gauges become rates, intervals become shares of busy and idle time. Pure."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping

import numpy as np

from protocol.intervals import WAITING, is_waiting
from protocol.messages import Intervals

TOTALS = frozenset(f"generator/{name}" for name in ("tokens", "samples", "mixed_samples", "swaps", "restarts", "pause_s")) | {
    "rewarder/scored",
    "rewarder/scoring_s",
    "learner/tokens",
    "process/cpu_s",
}
"""Gauges that only grow: what a process has done stays done when it has left. `verdict/...` are totals too."""
RATE_WINDOW_S = 5.0
"""Counters arrive twice a second, so rates over shorter times would jump."""


def role_of(identity: str) -> str:
    """ "generator-0@1" -> "generator"."""
    return identity.rpartition("-")[0]


def plain(name: str) -> str:
    """As a part of a metric's name: "waiting:reward credit" -> "reward_credit"."""
    return "".join(c if c.isalnum() else "_" for c in name.removeprefix(WAITING))


class Fleets:
    """The newest gauges of every process, and the seconds of every activity since `window` was last called."""

    def __init__(self) -> None:
        self._gauges: dict[str, dict[str, float]] = {}
        self._left: set[str] = set()
        self._seconds: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        self._history: deque[tuple[float, dict[str, float]]] = deque()
        self._recorded: dict[str, tuple[float, float]] = {}
        """By role: seconds of waiting, and of all, since the start."""
        self._recent: deque[tuple[float, dict[str, float], dict[str, tuple[float, float]]]] = deque()

    def gauge(self, identity: str, values: dict[str, float]) -> None:
        """The newest numbers of one process. One that was started again replaces what it was before."""
        name = identity.partition("@")[0]
        for known in [k for k in self._gauges if k != identity and k.partition("@")[0] == name]:
            del self._gauges[known]
        self._gauges.setdefault(identity, {}).update(_totals(values) if identity in self._left else values)

    def left(self, identity: str) -> None:
        """A process has gone: it holds nothing any more, and what it did stays counted. Its last words may still come."""
        self._left.add(identity)
        self._gauges[identity] = _totals(self._gauges.get(identity, {}))

    def intervals(self, message: Intervals) -> None:
        """Add busy and waiting time of one process; its main track counts."""
        if message.track:
            return
        of_role = self._seconds[role_of(message.identity)]
        lengths = np.zeros(len(message.names))
        np.add.at(lengths, message.rows[:, 0], (message.rows[:, 2] - message.rows[:, 1]) / 1e6)
        idle, total = self._recorded.get(role_of(message.identity), (0.0, 0.0))
        for name, seconds in zip(message.names, lengths.tolist(), strict=True):
            of_role[name] += seconds
            idle, total = idle + seconds * is_waiting(name), total + seconds
        self._recorded[role_of(message.identity)] = idle, total

    def sum(self, name: str) -> float:
        """A gauge over all processes."""
        return sum(values.get(name, 0.0) for values in self._gauges.values())

    def sums(self, prefix: str) -> dict[str, float]:
        """All gauges whose names start with `prefix`, over all processes."""
        names = {name for values in self._gauges.values() for name in values if name.startswith(prefix)}
        return {name: self.sum(name) for name in sorted(names)}

    def window(self, now_s: float) -> dict[str, float]:
        """Rates over RATE_WINDOW_S or the last call, whichever is longer ago; shares of time since the last call."""
        counters = {
            "throughput/sampled_tokens_per_s": self.sum("generator/tokens"),
            "throughput/scored_samples_per_s": self.sum("rewarder/scored"),
            "throughput/trained_tokens_per_s": self.sum("learner/tokens"),
        }
        scoring_s, cpu = self.sum("rewarder/scoring_s"), self._by_process("process/cpu_s", "cpu/")
        counters |= {"scoring_s": scoring_s, **cpu}
        while len(self._history) > 1 and now_s - self._history[1][0] >= RATE_WINDOW_S:
            self._history.popleft()
        values = {}
        if self._history and now_s > self._history[0][0]:
            then_s, then = self._history[0]
            for name, value in counters.items():
                if "/" in name and value >= then.get(name, value):
                    values[name] = (value - then.get(name, value)) / (now_s - then_s)
            scored = counters["throughput/scored_samples_per_s"] - then["throughput/scored_samples_per_s"]
            values["sandbox/scoring_s_mean"] = (scoring_s - then["scoring_s"]) / scored if scored > 0 else float("nan")
        self._history.append((now_s, counters))
        return values | self._shares()

    def live(self, now_s: float) -> dict[str, float]:
        """Rates and idle shares of the last RATE_WINDOW_S, under the names of `window`; empty before there are two moments.

        Sampling and scoring go on all the time, training does not: its rate stays that of whole iterations.
        """
        counters = {
            "throughput/sampled_tokens_per_s": self.sum("generator/tokens"),
            "throughput/scored_samples_per_s": self.sum("rewarder/scored"),
        }
        self._recent.append((now_s, counters, {role: (idle, total) for role, (idle, total) in self._recorded.items()}))
        while len(self._recent) > 2 and now_s - self._recent[1][0] >= RATE_WINDOW_S:
            self._recent.popleft()
        then_s, then, recorded = self._recent[0]
        values = {}
        if now_s > then_s:
            values = {name: max(0.0, (value - then[name]) / (now_s - then_s)) for name, value in counters.items()}
            for role, (idle, total) in self._recorded.items():
                idle_then, total_then = recorded.get(role, (0.0, 0.0))
                if total > total_then:
                    values[f"idle/{role}"] = (idle - idle_then) / (total - total_then)
        return values

    def _shares(self) -> dict[str, float]:
        values = {}
        for role, seconds in self._seconds.items():
            total = sum(seconds.values())
            if total <= 0:
                continue
            values[f"idle/{role}"] = sum(s for name, s in seconds.items() if is_waiting(name)) / total
            for name, s in seconds.items():
                values[f"{'idle' if is_waiting(name) else 'busy'}/{role}_{plain(name)}"] = s / total
        self._seconds.clear()
        return values

    def _by_process(self, gauge: str, prefix: str) -> dict[str, float]:
        return {prefix + plain(i.partition("@")[0]): values[gauge] for i, values in self._gauges.items() if gauge in values}

    def now(self) -> dict[str, float]:
        """Numbers of this moment: how much waits where, what engines and sandboxes have done, memory of each process."""
        sampled = self.sum("generator/samples")
        return {
            "queues/groups_outstanding": self.sum("dispatcher/groups_outstanding"),
            "queues/samples_running": self.sum("generator/running"),
            "queues/samples_waiting": self.sum("generator/waiting"),
            "queues/completions_unscored": self.sum("generator/outbox") + self.sum("rewarder/queued"),
            "queues/completions_unacknowledged": self.sum("generator/unacknowledged"),
            "engine/tokens_total": self.sum("generator/tokens"),
            "engine/samples_total": sampled,
            "engine/swaps_total": self.sum("generator/swaps"),
            "engine/swap_pause_s_total": self.sum("generator/pause_s"),
            "engine/restarts_total": self.sum("generator/restarts"),
            "engine/capacity": self.sum("generator/capacity"),
            "engine/load_s": max((values.get("generator/load_s", 0.0) for values in self._gauges.values()), default=0.0),
            "engine/canary_error": max((values.get("generator/canary_error", 0.0) for values in self._gauges.values()), default=0.0),
            "engine/mixed_share": self.sum("generator/mixed_samples") / sampled if sampled else 0.0,
            "sandbox/samples_total": self.sum("rewarder/scored"),
            **self._by_process("process/rss_bytes", "memory/"),
            **self.sums("verdict/"),
            **self.sums("weights/"),
        }

    def queues(self) -> dict[str, float]:
        """How much waits where."""
        return {name: value for name, value in self.now().items() if name.startswith("queues/")}


def _totals(values: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if name in TOTALS or name.startswith("verdict/")}
